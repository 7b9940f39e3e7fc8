"""The text that a plan was made with, for those who apply the plan and name no other."""

from __future__ import annotations

from dataclasses import dataclass

from shallower import progress
from shallower.corpus import without_options
from shallower.plan import PruningPlan
from shallower.verbs.contamination import read_again
from shallower.verbs.subject import DEFAULT_CALIBRATION, Subject
from shallower.verbs.supply import supply


@dataclass(frozen=True)
class PlanText:
    """spec: None for the default text. size: sequences that the plan was made with, and tokens of each; None where it
    is not the plan's text. notes: what is to be told of that.
    """

    spec: str | None = None
    size: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()


def text_of_plan(subject: Subject, plan: PruningPlan) -> PlanText:
    """The plan's own text where it can be had, without how much of it was read: what is measured is then what the plan
    was chosen by, and a repair fits what it was chosen for.
    """
    recorded = plan.made_by.calibration
    if recorded is None:
        return PlanText()
    again, reason = None, "it holds questions, which are no text to measure on"
    if plan.made_by.objective != "task":
        again, reason = read_again(subject, recorded, supply(subject.model, subject.loaded.tokenizer))
    source, other = recorded.title.partition("?")[0], "name other text with --calibration."
    is_default = source == DEFAULT_CALIBRATION
    if again is None:
        if is_default:
            return PlanText()
        note = f"The plan's own text, {source}, is not read ({reason}), but the default, {DEFAULT_CALIBRATION}: {other}"
        progress.note(note)
        return PlanText(notes=(note,))
    notes = () if is_default else (f"The calibration text is the plan's own, {source}: {other}",)
    return PlanText(without_options(recorded.spec, ("sequences", "length")), (again.sequences, again.length), notes)
