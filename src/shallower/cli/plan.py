"""`shallower plan`: read and shorten plan files. Needs no model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option, Typer

from shallower.cli import options
from shallower.cli.output import print_removed, print_written, require_free
from shallower.cli.verb import Answer, verb
from shallower.plan import PruningPlan
from shallower.strict_json import finite

if TYPE_CHECKING:
    from rich.console import Console

app = Typer(help="Show a plan file, or keep its first removals.", rich_markup_mode=None)


@app.command("show")
@verb
def show(plan: options.PlanFile) -> Answer:
    """Show what a plan removes, in which order, and how it was chosen."""
    found = PruningPlan.load(plan)
    return Answer(found.to_json(), lambda console: show_plan(console, found))


@app.command("cut")
@verb
def cut(
    plan: options.PlanFile,
    remove: Annotated[
        int, Option("--remove", metavar="N", help="Keep the first N removals, 1 to as many as there are.")
    ],
    out: Annotated[
        Path | None,
        Option("--out", metavar="FILE", help="Write the shorter plan here, as JSON. Default: only show it."),
    ] = None,
    force: options.Force = False,
) -> Answer:
    """Keep the first removals of a plan, as a plan of its own."""
    require_free(out, force=force)
    shorter = PruningPlan.load(plan).at(remove)
    if out is not None:
        shorter.save(out)

    def show(console: Console) -> None:
        show_plan(console, shorter)
        print_written(console, out, "the plan")

    return Answer(shorter.to_json(), show)


def show_plan(console: Console, plan: PruningPlan) -> None:
    """Print the removal order with what each step costs, and the sum."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from shallower.reporting.wording import signed

    made = plan.made_by
    # what overflows is null in a file, and is shown as it is when it comes from there
    steps = [(str(unit), finite(loss)) for unit, loss in (("nothing", plan.dense), *plan.order)]
    dense = steps[0][1]
    largest = max((abs(loss) for _, loss in steps if loss is not None), default=0)
    form = "{:.4f}".format if largest < 100 else "{:,.1f}".format
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("Step", justify="right")
    table.add_column("Removed")
    table.add_column(made.measure if made.objective else "Objective", justify="right")
    table.add_column("Difference", justify="right")
    for step, (unit, loss) in enumerate(steps):
        change = "" if loss is None or dense is None or not step else signed(loss - dense, form)
        table.add_row(str(step), unit, "–" if loss is None else form(loss), change)
    console.print(table)
    print_removed(console, plan.remove, plan.model, plan.gone)
    how = [f"search {made.search}" if made.search else "naming units"]
    how += [f"metric {made.metric}"] if made.metric else []
    how += [f"objective {made.measure}"] if made.objective else []
    if made.calibration is not None:
        judged = " (a part judged, on which repairs were not fitted)" if made.repair else ""
        how.append(f"{made.calibration.tokens:,} tokens of {made.calibration.source}{judged}")
    console.print(f"For {plan.model.name}, by {', '.join(how)}, seed {made.seed}; shallower {made.version}.")
