"""The text that a plan was made with, for those who apply the plan and name no other."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from shallower import progress
from shallower.corpus import asks_model, named_options, without_options
from shallower.engine import reads_choices
from shallower.errors import CorpusError, UserError
from shallower.plan import PruningPlan, source_and_options
from shallower.registry import objective as objectives
from shallower.verbs.calibrate import DEFAULT_CALIBRATION
from shallower.verbs.contamination import read_again
from shallower.verbs.subject import Subject
from shallower.verbs.supply import supply
from shallower.verbs.texts import held_out

NOTHING_HELD_OUT = "nothing of it is held out to measure on"


@dataclass(frozen=True)
class PlanText:
    """spec: None for the default text. size: sequences that the plan was made with, and tokens of each; None where it
    is not the plan's text. notes: what is to be told of that.
    """

    spec: str | None = None
    size: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()


def text_of_plan(
    subject: Subject, plan: PruningPlan, seed: int | None, *, repairs: bool, has_held_out: bool
) -> PlanText:
    """The plan's own text where it can be had, without how much of it was read: what is measured is then what the plan
    was chosen by, and a repair fits what it was chosen for.

    seed: where one was given, other sequences of it than the recorded one chose. repairs: it is repaired or trained on.
    has_held_out: text to measure on was named; else some of the plan's own has to be held out.

    Raises CorpusError where a repair would read the default text, and the plan was made with another.
    """
    recorded = plan.made_by.calibration
    if recorded is None:
        return PlanText()
    source = recorded.source
    is_default = source_and_options(recorded.spec)[0] == DEFAULT_CALIBRATION
    other = "name other text with --calibration."
    again, reason = None, _unreadable(recorded.spec, plan.made_by.objective, has_held_out=has_held_out)
    if not reason:
        again, reason = read_again(subject, recorded, supply(subject.model, subject.loaded.tokenizer))
        if again is not None and not has_held_out and not held_out(recorded.spec):
            again, reason = None, NOTHING_HELD_OUT
    if again is None:
        if is_default:
            return PlanText()
        if repairs:
            to_measure = "text to measure on (--text), or " if reason.endswith(NOTHING_HELD_OUT) else ""
            raise CorpusError(
                f"the plan's own text, {source}, is not what the model would be repaired or trained on ({reason}): "
                f"name {to_measure}the text to repair and train on (--calibration, such as --calibration "
                f"{DEFAULT_CALIBRATION})."
            )
        note = f"The plan's own text, {source}, is not read ({reason}), but the default, {DEFAULT_CALIBRATION}: {other}"
        progress.note(note)
        return PlanText(notes=(note,))
    chosen = named_options(recorded.spec).get("seed")
    reseeded = seed is not None and chosen not in (None, str(seed))
    told = f"{source} (by seed {seed}, not {chosen})" if reseeded else source
    notes = () if is_default else (f"The calibration text is the plan's own, {told}: {other}",)
    left = without_options(recorded.spec, ("sequences", "length", *(["seed"] if reseeded else [])))
    return PlanText(left, (again.sequences, again.length), notes)


def _unreadable(spec: str, objective: str | None, *, has_held_out: bool) -> str:
    """Why what a plan was made with is not worth reading again, or nothing."""
    with suppress(UserError):  # an objective of a package that is not here; a set that was made in memory
        if objective is not None and reads_choices(objectives.get(objective)):
            return "it holds questions, which are no text to measure on"
        if not has_held_out and asks_model(spec):
            return f"the model wrote it, and {NOTHING_HELD_OUT}"
    return ""
