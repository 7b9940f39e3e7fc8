"""`shallower search`: which units should go? Writes a plan, cuts nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from shallower.cli import options
from shallower.cli.output import print_written, require_free, typed, typed_again
from shallower.cli.plan import show_plan
from shallower.cli.verb import Answer, verb
from shallower.defaults import LENGTH, SEQUENCES

if TYPE_CHECKING:
    from rich.console import Console


@verb
def search(
    model: options.Model,
    remove: options.Remove,
    search: options.Search = "greedy",
    objective: options.Objective = "nll",
    metric: options.Metric = None,
    scores: options.ScoresFile = None,
    units: options.Kinds = "block",
    ordinary: options.Ordinary = False,
    protect: options.Protect = "",
    calibration: options.Calibration = None,
    target: Annotated[
        str | None,
        Option(
            "--for",
            metavar="TEXT",
            help="With --calibration auto: a sample of what the smaller model is for, a text (all of a short one is "
            "read) or a .jsonl of questions. The calibration text that ranks units most like it is used. To find it, "
            "the model is measured without each unit on the sample and on every text, up to seven: minutes before the "
            "search.",
        ),
    ] = None,
    sequences: options.Sequences = SEQUENCES,
    length: options.Length = LENGTH,
    settings: options.Settings = None,
    exact: options.Exact = False,
    repair: options.RepairBy = "",
    out: Annotated[
        Path | None, Option("--out", metavar="FILE", help="Write the plan here, as JSON. Default: only show it.")
    ] = None,
    force: options.Force = False,
    seed: options.Seed = 0,
    memory: options.Memory = None,
    workers: options.MeasuredBy = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    trust_remote_code: options.RemoteCode = False,
    stream_blocks: options.StreamBlocks = False,
) -> Answer:
    """Choose what to remove, and show what each removal costs. Cuts nothing.

    --json prints the plan and what the search cost: spent.tokens (tokens read: calibration tokens times candidate
    sets), spent.exhaustive (tokens that it would have read if it had dropped no candidate before the end of the
    text) and spent.recalled (measurements known from before, which neither counts). made_by.options says
    how many races dropped candidates, and what each was allowed to get wrong (races, error_a_race, tie_of_a_race).
    """
    require_free(out, force=force)
    chosen = options.parse_settings(settings)
    heeded = {
        "--search": search != "greedy",
        "--metric": metric is not None,
        "--scores": scores is not None,
        "--units": units != "block" and target is None,  # a text is chosen by how it ranks these
        "--exact": exact,
    }
    options.require_amount(
        remove, heeded, search=search, objective=objective, metric=metric, settings=chosen, recoveries=(repair,)
    )
    from shallower.engine import reads_choices
    from shallower.registry import objective as objectives
    from shallower.verbs.recovery_steps import named_recoveries
    from shallower.verbs.search import search as run

    plan = run(
        model,
        remove,
        search=search,
        objective=objective,
        metric=metric,
        scores=scores,
        units=units,
        ordinary=ordinary,
        protect=protect,
        calibration=calibration,
        target=target,
        sequences=sequences,
        length=length,
        settings=chosen,
        exact=exact,
        repair=repair,
        seed=seed,
        memory=memory,
        workers=workers,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        stream_blocks=stream_blocks,
    )
    if out is not None:
        plan.save(out)
    text, size = calibration, (sequences, length)
    if reads_choices(objectives.get(objective)):
        text, size = None, (SEQUENCES, LENGTH)  # questions are no text to measure on
    elif target is not None and text is not None and plan.made_by.calibration is not None:
        text, size = plan.made_by.calibration.spec, (SEQUENCES, LENGTH)  # the one that was chosen, and how much of it

    def show(console: Console) -> None:
        show_plan(console, plan)
        step = f"shallower prune {typed(model)} --plan {typed(out)} --out FOLDER"
        if repair:
            known = {option for method in named_recoveries(repair) for option in method.options}
            step += f" --recover {typed(repair)}"
            step += "".join(f" --set {typed(f'{name}={value}')}" for name, value in chosen.items() if name in known)
        step += typed_again(text, size, seed, dtype, trust_remote_code=trust_remote_code)
        step += " --device cpu" * stream_blocks  # where it is loaded whole
        print_written(console, out, "the plan", step)

    return Answer({**plan.to_json(), "spent": plan.spent}, show)
