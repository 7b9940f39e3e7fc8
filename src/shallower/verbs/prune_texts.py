"""What `prune` reads: text to search on, to repair and train on, and to measure on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shallower.corpus import CalibrationSet
from shallower.defaults import LENGTH, SEQUENCES
from shallower.engine import reads_choices
from shallower.errors import TooLittleText
from shallower.plan import PruningPlan
from shallower.registry import Configured
from shallower.registry import objective as objectives
from shallower.verbs.calibrate import calibrate, note_default
from shallower.verbs.contamination import shared_runs
from shallower.verbs.plan_text import PlanText, text_of_plan
from shallower.verbs.recoveries import repair_size, texts_read
from shallower.verbs.recovery_steps import in_closed_form
from shallower.verbs.repaired import SplitText, judging_text
from shallower.verbs.subject import Subject
from shallower.verbs.texts import held_out, or_all_of_it
from shallower.verbs.training_text import Training, training_text


@dataclass(frozen=True, eq=False)
class JobTexts:
    """What a job reads. calibration: what was named, or the plan's own text. notes: what is to be told of that.

    searched: what the search gets; whole: all of that; judging: the part of it that candidates are judged on. fitted:
    what repairs in closed form are fitted on; training: what trainings read, None without any. held_out: texts by name
    that perplexity is measured on.
    """

    calibration: str | Path | CalibrationSet | None
    notes: tuple[str, ...]
    searched: CalibrationSet | SplitText
    whole: CalibrationSet
    judging: CalibrationSet
    fitted: CalibrationSet
    training: Training | None
    held_out: Mapping[str, str]


def texts_of_prune(
    subject: Subject,
    plan: PruningPlan | None,
    calibration: str | Path | CalibrationSet | None,
    steps: Sequence[Configured],
    objective: str,
    contents: Mapping[str, str],
    *,
    sequences: int | None,
    length: int | None,
    repair: bool,
    train_sequences: int | None,
    instructions: str | Path | None,
    window: int,
    max_windows: int | None,
    seed: int | None,
) -> JobTexts:
    """All texts, as `prune` says; `contents` are held out where there are any, else what calibration left out."""
    wanted = _wanted(
        subject,
        plan,
        calibration,
        objective,
        sequences,
        length,
        seed,
        repairs=in_closed_form(steps) or (bool(steps) and instructions is None),
        has_held_out=bool(contents),
    )
    seed = seed or 0
    if not wanted.notes:  # else that was told with the reason
        note_default(wanted.calibration)
    size = {"sequences": wanted.sequences, "length": wanted.length, "seed": seed}
    searched: CalibrationSet | SplitText
    if repair:
        searched = parts = judging_text(subject, wanted.calibration, **size)
        whole, judging = parts.whole, parts.judged
    else:
        searched = whole = judging = calibrate(subject, wanted.calibration, **size, objective=objective)
    contents = contents or held_out(wanted.calibration)
    fitted, longest = judging, wanted.length
    if steps:
        asks_questions = reads_choices(objectives.get(objective))  # whose number says nothing of text
        most, longest = repair_size(subject, *((0, 0) if asks_questions else (wanted.sequences, wanted.length)))
        if in_closed_form(steps):
            fitted = _fitted(subject, wanted, most, longest, seed)
    training = training_text(
        subject,
        steps,
        wanted.calibration,
        sequences=train_sequences,
        length=longest,
        instructions=instructions,
        contents=contents,
        window=window,
        max_windows=max_windows,
        seed=seed,
    )
    return JobTexts(wanted.calibration, wanted.notes, searched, whole, judging, fitted, training, contents)


@dataclass(frozen=True, eq=False)
class _Wanted:
    """What is to be read of which text. notes: what is to be told of that."""

    calibration: str | Path | CalibrationSet | None
    sequences: int
    length: int
    notes: tuple[str, ...] = ()


def _wanted(
    subject: Subject,
    plan: PruningPlan | None,
    calibration: str | Path | CalibrationSet | None,
    objective: str,
    sequences: int | None,
    length: int | None,
    seed: int | None,
    *,
    repairs: bool,
    has_held_out: bool,
) -> _Wanted:
    """What was named; with a plan and no text the plan's own, and as much of it as the plan was made with, where it can
    be had; seed, repairs, has_held_out: as for `text_of_plan`.
    """
    own = PlanText()
    if plan is not None and calibration is None and not reads_choices(objectives.get(objective)):
        own = text_of_plan(subject, plan, seed, repairs=repairs, has_held_out=has_held_out)
    named = own.spec if calibration is None else calibration
    usual = own.size or (SEQUENCES, LENGTH)
    return _Wanted(
        named, usual[0] if sequences is None else sequences, usual[1] if length is None else length, own.notes
    )


def _fitted(subject: Subject, wanted: _Wanted, sequences: int, length: int, seed: int) -> CalibrationSet:
    """What repairs in closed form are fitted on. Raises TooLittleText, with what else could be done."""
    try:
        return calibrate(subject, wanted.calibration, sequences=sequences, length=length, seed=seed)
    except TooLittleText as error:
        told = [
            f"{error.fault}, as a repair in prune reads: {or_all_of_it(wanted.calibration, error, sequences)}repair "
            "with 'shallower recover', which can do with less.",
            *wanted.notes,
        ]
        raise TooLittleText(" ".join(told)) from None


def shared_with_held_out(
    subject: Subject, read: JobTexts, steps: Sequence[Configured], tokens: int | None
) -> Iterator[str]:
    """What is to be told of held-out text that was read before. tokens: how much of each text is measured."""
    repaired, trained = texts_read(steps, read.fitted, read.training)
    before = {"the calibration text": read.whole, "the text of the repair": repaired, "the training text": trained}
    return shared_runs(subject, before, read.held_out, tokens, flattered="the pruned model")
