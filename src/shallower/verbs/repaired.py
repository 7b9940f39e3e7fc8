"""The question that a search asks, answered after the repair: how good is the model without these units, once it was
repaired?

What is removed best is not what matters least but what is replaced best. Each candidate is cut, repaired in closed form
on one part of the calibration text, and judged on the other part, so that a repair that learned its text by heart does
not win. The first part is as large as what a repair needs, which is more than what a search reads to judge.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shallower import progress
from shallower.anatomy import dissect
from shallower.checkpoint.determinants import determinants
from shallower.corpus import CalibrationSet
from shallower.corpus.choices import ChoiceSet
from shallower.engine import Ablator, Spent
from shallower.engine.ablator import MEASURED_AS
from shallower.engine.memo import Memo, context_key
from shallower.engine.method_code import code_of, is_fully_known
from shallower.engine.twins import Streams
from shallower.engine.workers import usual_memory
from shallower.errors import CorpusError, ModelError, TooLittleText, UserError
from shallower.plan import PruningPlan
from shallower.recovery import Repair
from shallower.registry import Configured, Method
from shallower.surgery import cut
from shallower.units import Unit
from shallower.verbs.calibrate import calibrate
from shallower.verbs.recoveries import repair_size
from shallower.verbs.subject import Subject
from shallower.verbs.texts import or_all_of_it

REPAIRED_AS = 4  # to be raised when cuts or repairs come out otherwise than before, beside the engine's own number
JUDGED = 4  # of a ready-made set one sequence in so many judges, the others are what repairs are fitted on


@dataclass(frozen=True, eq=False)
class SplitText:
    """A calibration text in two parts without a sequence in common: repairs are fitted on one, candidates are judged on
    the other.
    """

    whole: CalibrationSet
    fitted: CalibrationSet
    judged: CalibrationSet


def left_unrepaired(plan: PruningPlan, without: str, advice: str) -> tuple[str, ...]:
    """What to know of a plan that was chosen after a repair, where there is none. without: what was not repaired, as
    `this model was`. advice: a sentence on how to repair it, with the repair in place of `{}`.
    """
    repair = plan.made_by.repair
    if not repair:
        return ()
    return (
        f"The plan was chosen by what {repair} makes of the cut (--repair), and {without} not repaired: losses in the "
        f"plan are of repaired models, and without repair another may be better. {advice.format(repair)}",
    )


def split(whole: CalibrationSet, judges: int | None = None) -> SplitText:
    """Let `judges` sequences, from all over the text, judge, by default one in `JUDGED`.

    Raises CorpusError when the text has fewer than `JUDGED` sequences.
    """
    there = whole.questions if isinstance(whole, ChoiceSet) else whole.sequences
    if there < JUDGED:
        raise CorpusError(
            f"{there} sequences are too few to repair on some and judge on others: use a text of {JUDGED} or more."
        )
    count = -(-there // JUDGED) if judges is None else judges
    judging = {number * there // count for number in range(count)}
    rest = [row for row in range(there) if row not in judging]
    return SplitText(whole, whole.subset(rest), whole.subset(sorted(judging)))


def judging_text(
    subject: Subject, calibration: str | Path | CalibrationSet | None, *, sequences: int, length: int, seed: int
) -> SplitText:
    """Text of the size that a repair needs, and, to judge, other text of as many tokens as `sequences` of `length` are.

    A ready-made set, or one whose specification says how many sequences it has, is split as it is.

    Raises CorpusError as `calibrate` does, and when there is less text than that.
    """
    if isinstance(calibration, CalibrationSet):
        return split(calibrate(subject, calibration, sequences=sequences, length=length, seed=seed))
    most, longest = repair_size(subject, sequences, length)
    judges = -(-sequences * length // longest)
    try:
        whole = calibrate(subject, calibration, sequences=most + judges, length=longest, seed=seed)
    except TooLittleText as error:
        raise TooLittleText(
            f"{error.fault}, as with --repair a candidate is fitted on {most} sequences of {longest} tokens and judged "
            f"on {judges} others: {or_all_of_it(calibration, error, most + judges, JUDGED)}use more text."
        ) from None
    if whole.sequences != most + judges:
        return split(whole)
    return split(whole, min(-(-sequences * length // whole.length), whole.sequences - 1))  # it may say its own length


def require_closed(methods: Sequence[Method]) -> None:
    """Raise UserError for a recovery that is trained."""
    if trained := [method.name for method in methods if method.trained]:
        raise UserError(
            f"{trained[0]} is trained, which takes too long to judge every candidate by: use a recovery in closed form "
            "(--repair linear-fold), and train what is left afterwards (shallower recover)."
        )


class RepairedLosses:
    """Mean next-token loss of repaired candidates; answers what `Ablator.losses` answers for unrepaired ones."""

    def __init__(
        self,
        subject: Subject,
        text: SplitText,
        steps: Sequence[Configured],
        *,
        memory: int | None = None,
        memo: Memo | None = None,
    ) -> None:
        """steps: recoveries with their options. memory: bytes that may be kept besides the models, by default a quarter
        of what is free: half for a repair and its judgement, half for the dense model's streams, which all repairs
        read. memo: where losses are kept from one search to the next.

        Raises UserError for a recovery that is trained.
        """
        require_closed([method for method, _ in steps])
        self.steps = steps
        self.subject = subject
        self.judged, self.fitted = text.judged, text.fitted
        self.memory = (usual_memory(subject.model) if memory is None else memory) // 2
        self._streams = Streams(subject.anatomy, self.fitted, self.memory)
        self.spent = Spent()
        self._known: dict[frozenset[Unit], float] = {}
        self._refused: dict[frozenset[Unit], str] = {}
        self._memo = memo = memo if all(is_fully_known(method) for method, _ in self.steps) else None
        self._context = ""
        self._remembered: dict[str, float] = {}
        if memo is not None:
            self._context = self._depends_on()
            self._remembered = {name: float(loss) for (name, _), [loss] in memo.read(self._context).items()}

    def losses(
        self, candidates: Sequence[Collection[Unit]], keep: int | None = None, *, race: bool = True
    ) -> list[float]:
        """For each candidate the loss of the repaired model; infinity where it cannot be cut or repaired.

        keep, race: not used; all are measured on all of the text.

        Raises ModelError, with the reason for the last, when every single unit is asked for and none can be repaired.
        """
        asked = [frozenset(candidate) for candidate in candidates]
        new = [candidate for candidate in dict.fromkeys(asked) if candidate not in self._known]
        with progress.task(f"repairing {len(new)} candidates", len(new)) as step:
            for candidate in new:
                self._known[candidate] = self._loss(candidate)
                step()
        alone = len(set(asked)) > 1 and all(len(removed) == 1 for removed in asked)
        if alone and self._refused.keys() >= set(asked):  # larger sets may yet be found that can be repaired
            self.require_possible(asked[-1])
        return [self._known[candidate] for candidate in asked]

    def require_possible(self, candidate: Collection[Unit]) -> None:
        """Raise ModelError, with the reason, for a candidate that was found impossible to cut or repair."""
        reason = self._refused.get(frozenset(candidate))
        if reason is not None:
            raise ModelError(reason)

    def _loss(self, removed: frozenset[Unit]) -> float:
        name = ",".join(map(str, sorted(removed)))
        if name in self._remembered:
            self.spent.recalled += 1
            return self._remembered[name]
        try:
            loss = self._judge(removed)
        except ModelError as error:  # no such cut, or no such repair, in this family
            self._refused[removed] = str(error)  # not the error itself, which would keep the model
            return math.inf
        if self._memo is not None:
            self._memo.write(self._context, [(name, 0, np.array([loss]))])
        return loss

    def _judge(self, removed: frozenset[Unit]) -> float:
        student = cut(self.subject.anatomy, removed)
        for method, options in self.steps if removed else ():
            anatomy, dense = dissect(student), self.subject.anatomy
            repair = Repair(anatomy, dense, removed, self.fitted, memory=self.memory, streams=self._streams)
            method.function(repair, **options)
            self.spent.tokens += repair.tokens
        with closing(Ablator(dissect(student), self.judged, "nll", memory=self.memory)) as ablator:
            [loss] = ablator.losses([frozenset()])
            self.spent.tokens += ablator.spent.tokens
        return loss

    def _depends_on(self) -> str:
        """The key of everything besides the removed set that a loss depends on."""
        return context_key(
            {
                "model": determinants(self.subject.model),
                "repaired_by": [
                    [method.name, code_of(method), sorted(method.options_in_use(given).items())]
                    for method, given in self.steps
                ],
                "fitted": self.fitted.digest,
                "judged": self.judged.digest,
                "measured_as": [MEASURED_AS, REPAIRED_AS],
            }
        )
