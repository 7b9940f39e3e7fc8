"""`--calibration auto --for TEXT`: which text, of those at hand, tells best what a model needs for the user's own?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from shallower import progress
from shallower.corpus import DOMAINS, CalibrationSet
from shallower.corpus.sources import json_records
from shallower.defaults import LENGTH, SEQUENCES
from shallower.errors import CorpusError, UserError
from shallower.files import expanded
from shallower.plan import source_and_options, text_name
from shallower.units import Unit
from shallower.verbs.calibrate import calibrate, calibrate_most
from shallower.verbs.measuring import make_ablator
from shallower.verbs.score import require_finite
from shallower.verbs.subject import Subject

AUTO = "auto"
TASK = "task"  # the objective for a target that is questions


@dataclass(frozen=True)
class CandidateText:
    """A source and how it ranks units: Spearman's correlation with the ranking by the target."""

    source: str
    correlation: float


@dataclass(frozen=True)
class Advice:
    """Candidates, the best first, and why, in one sentence. text: the best one's calibration set. target: what it is
    chosen for, without its folder.
    """

    candidates: tuple[CandidateText, ...]
    text: CalibrationSet
    why: str
    target: str

    @property
    def options(self) -> dict[str, str]:
        """The same for `made_by.options` of a plan, without folders."""
        compared = ", ".join(f"{text_name(item.source)} {item.correlation:.2f}" for item in self.candidates)
        return {"target": self.target, "compared": compared}


def is_auto(calibration: object) -> bool:
    """Whether a calibration text is to be chosen: `auto`, or `auto:` and the sources to choose from."""
    return isinstance(calibration, str) and (calibration == AUTO or calibration.startswith(f"{AUTO}:"))


def require_target(calibration: object, target: object) -> None:
    """Raise UserError unless a target is given exactly where a calibration text is to be chosen for it."""
    if is_auto(calibration) and target is None:
        raise UserError("--calibration auto chooses text for what the model will read: name that with --for TEXT.")
    if target is not None and not is_auto(calibration):
        raise UserError(
            f"--for {target} is for --calibration auto, which chooses by it; here the text is "
            f"{calibration or 'the default'}."
        )


def advise(
    subject: Subject,
    calibration: str,
    target: str | Path,
    units: Sequence[Unit],
    *,
    sequences: int = SEQUENCES,
    length: int = LENGTH,
    objective: str = "nll",
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    memory: int | str | None = None,
    workers: int | str | None = None,
) -> Advice:
    """Choose the source whose text ranks `units` most as the target does, by the loss without each (leave-one-out).

    The target stays out of the calibration set, so that it can be evaluated on. What is compared is what a search
    reads, not how the texts look: two texts that differ in every word may need the same blocks.

    calibration: `auto` for every domain that can be had here, or `auto:a.jsonl,b.jsonl` for these. target: a text, or a
    .jsonl file of multiple-choice questions, on which the objective is then the margin of the right choice; of a short
    text all is read. options: of the objective.

    Raises CorpusError when no source, or not the target, can be read, and UserError when there is nothing to rank, or
    no text ranks the units at all.
    """
    if len(units) < 2:
        raise UserError(
            f"--calibration auto chooses by how texts rank the units that may go, and only {units[0]} may: name the "
            "text (--calibration), or protect fewer blocks."
        )
    named = [item.strip() for item in calibration.partition(":")[2].split(",") if item.strip()]
    judged = TASK if _asks(target) else objective
    shown = text_name(str(target))
    goal, there = calibrate_most(subject, target, sequences=sequences, length=length, seed=seed, objective=judged)
    if there < sequences:
        progress.note(f"{shown} holds text for {there} of {sequences} sequences of {length} tokens: so many are read.")

    def ranking(text: CalibrationSet, judged: str) -> list[float]:
        own = options if judged == objective else None
        with closing(make_ablator(subject, text, judged, own, memory=memory, workers=workers)) as ablator:
            found = [value for value, _ in ablator.differences([frozenset({unit}) for unit in units])]
            require_finite(ablator.losses)
            return found

    built: dict[str, CalibrationSet] = {}
    failed: list[str] = []
    for source in named or list(DOMAINS):
        try:
            built[source] = calibrate(
                subject, source, sequences=sequences, length=length, seed=seed, objective=objective
            )
        except CorpusError as error:
            if named:
                raise
            failed.append(f"{source}: {error}")
    if not built:
        raise CorpusError(
            f"--calibration auto finds no text here ({failed[0]}) Name some: --calibration auto:web.jsonl,books.jsonl."
        )
    with progress.task(f"comparing {len(built)} sources with {shown}", len(built) + 1) as step:
        wanted = ranking(goal, judged)
        step()
        found = []
        for source, text in built.items():
            found.append(CandidateText(source, _correlation(wanted, ranking(text, objective))))
            step()
    found.sort(key=lambda item: -math.inf if math.isnan(item.correlation) else item.correlation, reverse=True)
    if math.isnan(found[0].correlation):
        raise UserError(
            f"--calibration auto cannot compare {', '.join(built)} with {target}: by {objective} all {len(units)} "
            "units matter the same; use another objective, or name the text (--calibration)."
        )
    told = ", ".join(f"{item.source} {item.correlation:.2f}" for item in found)
    why = (
        f"Calibration: {found[0].source}, which ranks {len(units)} units most as {Path(target).name} does (rank "
        f"correlation of the loss without each: {told})."
    )
    progress.note(why)
    return Advice(tuple(found), built[found[0].source], why, shown)


def _correlation(wanted: Sequence[float], found: Sequence[float]) -> float:
    """Spearman's; NaN where one side is the same for all."""
    if len(set(wanted)) < 2 or len(set(found)) < 2:
        return math.nan
    return float(spearmanr(wanted, found).statistic)


def _asks(target: str | Path) -> bool:
    """Whether the first row of a file is a question with choices."""
    path = expanded(source_and_options(str(target))[0])
    if path.suffix != ".jsonl" or not path.is_file():
        return False
    try:
        _, row = next(json_records(path), (0, dict[str, Any]()))
    except CorpusError:  # told of where the text is read
        return False
    return bool({"choices", "endings"} & set(row) or {"passage", "question"} <= set(row))
