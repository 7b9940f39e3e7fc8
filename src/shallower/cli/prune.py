"""`shallower prune`: the whole job, from a model and some text to a smaller checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from shallower.cli import options
from shallower.cli.output import print_places, print_removed, say
from shallower.cli.verb import Answer, verb
from shallower.defaults import LENGTH, REPAIR_LENGTH, REPAIR_SEQUENCES, SEQUENCES, WINDOW, WINDOWS
from shallower.errors import UserError
from shallower.filenames import PAGE
from shallower.forms import FORMS
from shallower.plan import Gone

if TYPE_CHECKING:
    from rich.console import Console

    from shallower.reporting.data import ReportData


@verb
def prune(
    model: options.Model,
    out: Annotated[Path, Option("--out", metavar="FOLDER", help="Write the smaller checkpoint here.")],
    remove: options.RemoveOrPlan = None,
    plan: Annotated[
        Path | None,
        Option(
            "--plan", metavar="FILE", help="Apply this plan of 'shallower search' instead of --remove. Default: search."
        ),
    ] = None,
    search: options.Search = "greedy",
    objective: options.Objective = "nll",
    metric: options.Metric = None,
    units: options.Kinds = "block",
    ordinary: options.Ordinary = False,
    protect: options.Protect = "",
    calibration: options.PruneText = None,
    sequences: Annotated[
        int | None,
        Option(
            "--sequences",
            metavar="N",
            min=1,
            help=f"Calibration sequences, or questions. A repair reads at least {REPAIR_SEQUENCES}. Default: "
            f"{SEQUENCES}; of a plan's text, as many as the plan was made with.",
        ),
    ] = None,
    length: Annotated[
        int | None,
        Option(
            "--length",
            metavar="N",
            min=2,
            help=f"Tokens in each sequence. A repair uses sequences of at least {REPAIR_LENGTH} tokens, or of the "
            f"model's context if that is shorter. Default: {LENGTH}; of a plan's text, as many as the plan was made "
            "with.",
        ),
    ] = None,
    settings: options.Settings = None,
    exact: options.Exact = False,
    repair: options.RepairBy = "",
    recover: options.Recover = "",
    train_sequences: options.TrainSequences = None,
    instructions: options.Instructions = None,
    distill: options.Distill = None,
    text: options.Texts = None,
    window: options.WindowLength = WINDOW,
    windows: options.Windows = WINDOWS,
    speed: Annotated[bool, Option("--speed/--no-speed", help="Time prefill and decoding before and after.")] = True,
    form: Annotated[
        str,
        Option(
            "--form",
            metavar="FORM",
            help="How to store a model whose removed sublayers do not pair up to whole blocks: packaged (they are "
            "gone, and the folder carries code that leaves them out), padded (stock software loads it, but it is no "
            "smaller and no faster), or auto (transformers' own way if it has one, else packaged).",
        ),
    ] = "auto",
    stock: Annotated[bool, Option("--stock", help="The same as --form padded. Default: the smaller model.")] = False,
    force: options.Force = False,
    seed: options.SeedOrPlans = None,
    memory: options.Memory = None,
    workers: options.MeasuredBy = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    trust_remote_code: options.RemoteCode = False,
) -> Answer:
    """Remove blocks or sublayers, and write the smaller checkpoint.

    Chooses what to remove (or takes a plan), cuts it out, measures before and after, and writes a folder that ordinary
    software loads, with the plan, a model card and a page that shows what it cost.
    """
    chosen = options.with_distill(options.parse_settings(settings), distill, recover)
    searched = {
        "--search": search != "greedy",
        "--objective": objective != "nll",
        "--metric": metric is not None,
        "--units": units != "block",
        "--ordinary": ordinary,
        "--protect": bool(protect),
        "--set": bool(chosen) and not recover,
        "--exact": exact,
        "--repair": bool(repair),
        "--memory": memory is not None and not recover,
        "--workers": workers is not None,
    }
    idle = [flag for flag, given in searched.items() if given]
    if plan is not None and remove is None and idle:
        raise UserError(f"--plan says what goes, so {', '.join(idle)} would change nothing; drop that, or drop --plan.")
    if plan is None and remove is not None:
        heeded = {flag: searched[flag] for flag in ("--search", "--metric", "--units", "--exact")}
        methods = (repair, recover)
        options.require_amount(
            remove,
            heeded,
            search=search,
            objective=objective,
            metric=metric,
            settings=chosen,
            recoveries=methods,
        )
    if stock and form not in ("auto", "padded"):
        raise UserError(f"--stock means --form padded, and --form {form} was given, too: drop one of the two.")
    from shallower.verbs.prune import prune as run

    pruned = run(
        model,
        remove,
        out=out,
        plan=plan,
        search=search,
        objective=objective,
        metric=metric,
        units=units,
        ordinary=ordinary,
        protect=protect,
        calibration=calibration,
        sequences=sequences,
        length=length,
        settings=chosen,
        exact=exact,
        repair=repair,
        recover=recover,
        train_sequences=train_sequences,
        instructions=instructions,
        texts=text or (),
        window=window,
        max_windows=windows,
        speed=speed,
        form="padded" if stock else form,
        seed=seed,
        memory=memory,
        workers=workers,
        force=force,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    return pruned_answer(pruned.report, out, out / PAGE, pruned.of_blocks)


def pruned_answer(data: ReportData, folder: Path, page: Path | None, of_blocks: int | None = None) -> Answer:
    """What was removed, what it cost, where it is and how to load it. page: None where it could not be written;
    of_blocks: parameters of the dense blocks.
    """
    form = FORMS[data.form]
    told = (
        "plan",
        "form",
        "dense",
        "pruned",
        "speed_setting",
        "seconds",
        "machine",
        "notes",
        "recovery",
        "recovery_made_by",
        "dtype",
        "device",
        "window",
        "windows",
    )
    everything = data.to_json()
    answer: dict[str, Any] = {"folder": str(folder), "page": None if page is None else str(page)}
    answer |= {key: everything[key] for key in told}

    def show(console: Console) -> None:
        from shallower.reporting.tables import before_after_table, recovery_table

        console.print(before_after_table(data))
        if data.recovery:
            console.print(recovery_table(data.recovery, data.dense.perplexity))
        dense = data.dense.parameters
        print_removed(
            console, data.plan.remove, data.plan.model, Gone(dense - data.pruned.parameters, dense, of_blocks)
        )
        for note in data.notes:
            say(console, f"Note: {note}")
        print_places(console, folder, page)
        say(console, f"\nForm:  {form.name}. {form.meaning}")
        console.print(f"\n{form.loading(str(folder), tokenizer=data.tokenizer)}", soft_wrap=True)

    return Answer(answer, show)
