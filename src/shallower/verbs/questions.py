"""What models are asked: texts and tasks, read before the first model is loaded, and what they reach in the tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shallower.checkpoint.cache import cache_root
from shallower.checkpoint.load import load_tokenizer
from shallower.errors import UserError
from shallower.evaluation.comparison import Comparison, Evaluation
from shallower.evaluation.suites import suite as suite_named
from shallower.evaluation.tasks import (
    LoadedTasks,
    TaskResult,
    TaskSettings,
    open_tasks,
    require_template,
    run_tasks,
)
from shallower.verbs.subject import ModelLike, Subject, several_names
from shallower.verbs.texts import read_texts

if TYPE_CHECKING:
    from shallower.evaluation.answered import Answered


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
        notes += loaded.notes
    return Questions(contents, loaded, settings, generation, notes)


def require_templates(
    models: Sequence[ModelLike], tokenizer: PreTrainedTokenizerBase | None, *, trust_remote_code: bool
) -> None:
    """Raise UserError unless prompts can take the chat template of each model: before task data is read, and before one
    model is measured that is compared with another that has none.
    """
    for model in models:
        if tokenizer is not None:
            require_template(tokenizer)
        elif isinstance(model, Subject):
            require_template(model.tokenizer, model.loaded.name)
        elif not isinstance(model, PreTrainedModel):
            require_template(*load_tokenizer(str(model), trust_remote_code=trust_remote_code))


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
    """Scores before and after, by what a report calls them. notes: what is to be known of the questions, and which
    differences could be chance.
    """

    dense: Mapping[str, float] = field(default_factory=dict)
    pruned: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def task_scores(dense: Subject, pruned: Subject, asked: Questions) -> TaskScores:
    """Ask two loaded models the same items."""
    sides = []
    with open_answered() as answered:
        for subject, label in ((dense, "dense"), (pruned, "pruned")):
            results = model_tasks(subject, asked, answered, label)
            sides.append(Evaluation(label, len(subject.anatomy.blocks), 0, tasks=tuple(results)))
    both = Comparison(tuple(sides))
    scores: tuple[dict[str, float], dict[str, float]] = {}, {}
    notes = [*asked.notes, *both.overflows()]
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


def open_answered() -> closing[Answered]:
    """The answers that are kept on disk, for a `with`."""
    from shallower.evaluation.answered import Answered

    return closing(Answered(cache_root() / "answered.sqlite"))
