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
from shallower.verbs.recoveries import Training, repair_size, texts_read, training_text
from shallower.verbs.recovery_steps import in_closed_form
from shallower.verbs.repaired import SplitText, judging_text
from shallower.verbs.subject import Subject
from shallower.verbs.texts import held_out, or_all_of_it


@dataclass(frozen=True, eq=False)
class Wanted:
    """What is to be read of which text. notes: what is to be told of that."""

    calibration: str | Path | CalibrationSet | None
    sequences: int
    length: int
    notes: tuple[str, ...] = ()


def wanted_of_prune(
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
) -> Wanted:
    """What was named; with a plan and no text the plan's own, and as much of it as the plan was made with, where it can
    be had; seed, repairs, has_held_out: as for `text_of_plan`.
    """
    own = PlanText()
    if plan is not None and calibration is None and not reads_choices(objectives.get(objective)):
        own = text_of_plan(subject, plan, seed, repairs=repairs, has_held_out=has_held_out)
    named = own.spec if calibration is None else calibration
    usual = own.size or (SEQUENCES, LENGTH)
    return Wanted(
        named, usual[0] if sequences is None else sequences, usual[1] if length is None else length, own.notes
    )


@dataclass(frozen=True, eq=False)
class JobTexts:
    """What a job reads. searched: what the search gets; whole: all of that; judging: the part of it that candidates are
    judged on. fitted: what repairs in closed form are fitted on; training: what trainings read, None without any.
    held_out: texts by name that perplexity is measured on.
    """

    searched: CalibrationSet | SplitText
    whole: CalibrationSet
    judging: CalibrationSet
    fitted: CalibrationSet
    training: Training | None
    held_out: Mapping[str, str]


def texts_of_prune(
    subject: Subject,
    wanted: Wanted,
    steps: Sequence[Configured],
    objective: str,
    contents: Mapping[str, str],
    *,
    repair: bool,
    train_sequences: int | None,
    instructions: str | Path | None,
    window: int,
    max_windows: int | None,
    seed: int,
) -> JobTexts:
    """All texts, as `prune` says; `contents` are held out where there are any, else what calibration left out."""
    calibration, sequences, length = wanted.calibration, wanted.sequences, wanted.length
    if not wanted.notes:  # else that was told with the reason
        note_default(calibration)
    searched: CalibrationSet | SplitText
    if repair:
        searched = parts = judging_text(subject, calibration, sequences=sequences, length=length, seed=seed)
        whole, judging = parts.whole, parts.judged
    else:
        whole = calibrate(subject, calibration, sequences=sequences, length=length, seed=seed, objective=objective)
        searched = judging = whole
    contents = contents or held_out(calibration)
    fitted, longest = judging, length
    if steps:
        size = (0, 0) if reads_choices(objectives.get(objective)) else (sequences, length)  # of text, not questions
        most, longest = repair_size(subject, *size)
        try:
            if in_closed_form(steps):
                fitted = calibrate(subject, calibration, sequences=most, length=longest, seed=seed)
        except TooLittleText as error:
            told = [
                f"{error.fault}, as a repair in prune reads: {or_all_of_it(calibration, error, most)}repair with "
                "'shallower recover', which can do with less.",
                *wanted.notes,
            ]
            raise TooLittleText(" ".join(told)) from None
    training = training_text(
        subject,
        steps,
        calibration,
        sequences=train_sequences,
        length=longest,
        instructions=instructions,
        contents=contents,
        window=window,
        max_windows=max_windows,
        seed=seed,
    )
    return JobTexts(searched, whole, judging, fitted, training, contents)


def shared_with_held_out(
    subject: Subject, read: JobTexts, steps: Sequence[Configured], tokens: int | None
) -> Iterator[str]:
    """What is to be told of held-out text that was read before. tokens: how much of each text is measured."""
    repaired, trained = texts_read(steps, read.fitted, read.training)
    before = {"the calibration text": read.whole, "the text of the repair": repaired, "the training text": trained}
    return shared_runs(subject, before, read.held_out, tokens, flattered="the pruned model")
