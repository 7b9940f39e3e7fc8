"""Whether a model is evaluated on text that it was cut, repaired or trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from shallower.corpus import (
    CalibrationSet,
    Supply,
    asks_model,
    build_calibration,
    build_choices,
    named_options,
    overlap,
    with_options,
)
from shallower.corpus.instructions import CONVERSATIONS
from shallower.corpus.overlap import rows_in
from shallower.defaults import LENGTH
from shallower.errors import CorpusError, UserError
from shallower.evaluation.perplexity import first_ids
from shallower.plan import CalibrationIdentity, PruningPlan
from shallower.verbs.history import texts_of, told_before
from shallower.verbs.subject import Subject
from shallower.verbs.supply import supply

if TYPE_CHECKING:
    from shallower.verbs.questions import Questions

# What score, search and prune without a plan read unless they are told otherwise
_AS_SEARCHED = {"length": str(LENGTH), "seed": "0", "part": "train"}


def shared_runs(
    subject: Subject,
    read: Mapping[str, CalibrationSet | None],
    contents: Mapping[str, str],
    tokens: int | None,
    *,
    flattered: str,
) -> Iterator[str]:
    """Sentences about evaluated texts that share runs of 13 tokens with what a model was made with.

    read: sets by what to call them, None for one that was not read. contents: evaluated texts by name. tokens: how many
    of each are evaluated, None for all. flattered: which model its perplexity then flatters.
    """
    sets: dict[str, tuple[str, CalibrationSet]] = {}
    for what, made_with in read.items():
        if made_with is not None:
            sets.setdefault(made_with.digest, (what, made_with))  # of two that are one, one sentence
    for name, content in contents.items() if sets else ():
        ids, _ = first_ids(subject.tokenizer, content, tokens)
        for what, made_with in sets.values():
            shared = overlap(made_with, ids)
            if shared.shared:
                yield (
                    f"{name} shares {shared.shared} of {shared.total} runs of 13 tokens with {what}: its perplexity "
                    f"flatters {flattered}."
                )


def contamination(
    subject: Subject,
    plan: PruningPlan | None,
    calibration: str | Path | None,
    asked: Questions,
    tokens: int | None,
    *,
    cut: bool,
    insist: bool = True,
) -> Iterator[str]:
    """Sentences about texts and questions that share 13 tokens in a row with what the model was calibrated on, or what
    its checkpoint says that it was repaired or trained on.

    tokens: how many of each text are read, None for all. cut: the plan was applied already, so that this is not the
    model that wrote a text of its own. insist: raise CorpusError where a text that the user named cannot be read with
    this model's tokenizer; else, and where it would be such a text, it is told.
    """
    label = subject.identity.name
    supplied = supply() if cut else supply(subject.model, subject.tokenizer)
    try:
        text, told = _calibration_of(subject, plan, calibration, supplied)
    except CorpusError as error:
        if insist and not (cut and asks_model(str(calibration))):
            raise
        text, told = None, f"whether it shares text with {calibration} is not known ({str(error).rstrip('.')})."
    read: dict[str, CalibrationSet] = {}
    if text is not None:
        read[f"the calibration text {told}"] = text
    elif told:
        yield f"{label}: {told}"
    seen = {known.digest for known in read.values()}
    try:
        repaired_on = list(texts_of(told_before(subject.loaded.path)))
    except UserError as error:
        repaired_on = []
        yield f"{label}: whether what is evaluated was trained on is not known ({str(error).rstrip('.')})."
    for what, recorded in repaired_on:
        if recorded.digest in seen:
            continue
        seen.add(recorded.digest)
        # without the model, which is not the one that may have written it
        again, reason = read_again(subject, recorded, supply())
        if again is None:
            yield f"{label}: whether {what} {recorded.title} is in what is evaluated is not known ({reason})."
            continue
        short = f"{what} {recorded.source}"
        read[f"{what} {recorded.title}" if short in read else short] = again
    yield from shared_runs(subject, read, asked.contents, tokens, flattered="what was made with it")
    if asked.tasks is None or not read:
        return
    by_task: dict[str, list[str]] = {}
    for task, question in asked.tasks.questions(asked.settings.limit):
        by_task.setdefault(task, []).append(question)
    encode = subject.tokenizer
    for task, questions in by_task.items():
        rows = encode(questions, add_special_tokens=False, verbose=False).input_ids
        for what, made_with in read.items():
            if found := rows_in(made_with, rows):
                yield (
                    f"{len(found)} of {len(rows)} questions of {task} share 13 tokens in a row with {what}: its score "
                    "flatters what was made with it."
                )


def read_again(subject: Subject, recorded: CalibrationIdentity, supplied: Supply) -> tuple[CalibrationSet | None, str]:
    """A text that was read before, by a search or a repair; without it, why it cannot be had."""
    if CONVERSATIONS in recorded.spec:
        return None, "conversations that trained a model are not read again"
    try:
        found = build_calibration(recorded.spec, subject.tokenizer, supply=supplied)
    except UserError as error:
        return None, str(error).rstrip(".")
    return (found, "") if found.digest == recorded.digest else (None, "it is not what it was")


def _calibration_of(
    subject: Subject, plan: PruningPlan | None, named: str | Path | None, supplied: Supply
) -> tuple[CalibrationSet | None, str]:
    """The calibration set and its name; without a set, why the overlap cannot be told, if there is anything to tell."""
    made = None if plan is None else plan.made_by
    recorded = None if made is None else made.calibration
    spec = str(named) if named is not None else None if recorded is None else recorded.spec
    if spec is None:
        return None, ""
    found: CalibrationSet
    of_questions = made is not None and made.objective == "task"
    try:
        if named is not None:
            spec = with_options(spec, _AS_SEARCHED | _recorded_options(recorded, of_questions))
        if of_questions:
            found = build_choices(spec, subject.tokenizer)
        else:
            found = build_calibration(spec, subject.tokenizer, supply=supplied)
    except UserError as error:
        if named is not None:
            raise
        reason = str(error).rstrip(".")
        return None, f"whether it was calibrated on what is evaluated is not known ({reason}); name it: --calibration."
    if named is None and recorded is not None and found.identity.digest != recorded.digest:
        return None, f"its calibration text {recorded.title} is not what it was, so overlaps are not known."
    return found, found.identity.source


def _recorded_options(recorded: CalibrationIdentity | None, of_questions: bool) -> dict[str, str]:
    """The options of the text, or of the questions, that a plan was made with; none where it is no specification."""
    try:
        options = {} if recorded is None else named_options(recorded.spec)
    except UserError:  # a set that was made in memory is called what its maker likes
        return {}
    return options if of_questions else {name: value for name, value in options.items() if name != "questions"}
