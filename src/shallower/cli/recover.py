"""`shallower recover`: repair a cut model with its dense teacher."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from shallower.cli import options
from shallower.cli.output import print_places, print_removed, say
from shallower.cli.verb import Answer, verb
from shallower.defaults import REPAIR_LENGTH, REPAIR_SEQUENCES, WINDOW, WINDOWS
from shallower.errors import UserError
from shallower.filenames import PAGE, PLAN

if TYPE_CHECKING:
    from rich.console import Console

    from shallower.plan import PruningPlan
    from shallower.reporting.data import RecoveryData


@verb
def recover(
    model: Annotated[
        str,
        Argument(
            metavar="MODEL",
            help="A pruned checkpoint, with --teacher; or a dense model (a name or folder as elsewhere), with --plan.",
        ),
    ],
    methods: Annotated[
        str,
        Option("--with", metavar="NAME", help=f"One recovery or several in turn (refit,full): {options.RECOVERIES}."),
    ],
    teacher: Annotated[
        str | None,
        Option(
            "--teacher",
            metavar="MODEL",
            help="The dense model that MODEL was cut from. Default: MODEL is the dense one.",
        ),
    ] = None,
    plan: Annotated[
        Path | None,
        Option("--plan", metavar="FILE", help=f"What is cut out. Default: {PLAN} in the pruned checkpoint."),
    ] = None,
    out: Annotated[
        Path | None,
        Option(
            "--out",
            metavar="FOLDER",
            help="Write the repaired checkpoint here; a training needs it. Default: only show the result.",
        ),
    ] = None,
    calibration: options.RepairText = None,
    sequences: Annotated[
        int | None,
        Option(
            "--sequences",
            metavar="N",
            min=1,
            help=f"Sequences of the calibration text, for recoveries in closed form. Default: {REPAIR_SEQUENCES}.",
        ),
    ] = None,
    length: options.Length = REPAIR_LENGTH,
    train_sequences: options.TrainSequences = None,
    instructions: options.Instructions = None,
    distill: options.Distill = None,
    settings: options.Settings = None,
    text: options.Texts = None,
    window: options.WindowLength = WINDOW,
    windows: options.Windows = WINDOWS,
    force: options.Force = False,
    seed: options.SeedOrPlans = None,
    memory: options.Memory = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    trust_remote_code: options.RemoteCode = False,
) -> Answer:
    """Repair a cut model, and show what each step gains.

    Held-out perplexity is measured before and after each recovery. Recoveries work in closed form (refit, linear-fold,
    …), in minutes, or by training (full, lora, …). Training reads the text once, up to 4,096 sequences; --set
    minutes=30 ends it after that long at the latest. To resume a training that was killed, run the same command again.
    """
    chosen = options.with_distill(options.parse_settings(settings), distill, methods)
    from shallower.verbs.recover import recover as run
    from shallower.verbs.recovery_steps import parse_recoveries

    if out is None and (trained := [method.name for method, _ in parse_recoveries(methods, chosen) if method.trained]):
        raise UserError(
            f"--with {methods} trains ({', '.join(trained)}), and without --out nothing would be left of that: add "
            "--out FOLDER."
        )
    found = run(
        model,
        methods,
        teacher=teacher,
        plan=plan,
        out=out,
        calibration=calibration,
        sequences=sequences,
        length=length,
        train_sequences=train_sequences,
        instructions=instructions,
        settings=chosen,
        texts=text or (),
        window=window,
        max_windows=windows,
        seed=seed,
        force=force,
        memory=memory,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    folder = None if found.folder is None else out  # as it was named
    return recovered_answer(found.plan, found.data, folder, None if folder is None else folder / PAGE)


def recovered_answer(plan: PruningPlan, data: RecoveryData, folder: Path | None, page: Path | None) -> Answer:
    """What was removed, what each recovery gained, where it is and how to load it. folder: None where nothing was
    written; page: None where it could not be.
    """
    told = {key: value for key, value in data.to_json().items() if key != "format"}
    places = {name: None if path is None else str(path) for name, path in (("folder", folder), ("page", page))}
    answer = {**places, "plan": plan.to_json(), **told}
    return Answer(answer, lambda console: _show(console, plan, data, folder, page))


def _show(console: Console, plan: PruningPlan, data: RecoveryData, folder: Path | None, page: Path | None) -> None:
    from shallower.reporting.tables import recovery_table

    console.print(recovery_table(data.recovery, data.dense))
    print_removed(console, plan.remove, plan.model)
    for note in data.notes:
        say(console, f"Note: {note}")
    if folder is None:
        console.print("\nNothing was written; add --out FOLDER to keep the repaired model.")
        return
    print_places(console, folder, page)
    if data.form is not None:
        from shallower.forms import FORMS

        console.print(f"\n{FORMS[data.form].loading(str(folder), tokenizer=data.tokenizer)}", soft_wrap=True)
