"""One question, asked in batches: how good is the model without these units?

Candidates are arranged as a prefix tree over depth, so the stream entering block l is computed once for all candidates
that agree below l: leave-one-out over N blocks costs N (N + 1) / 2 block passes, not N². Streams are kept from one
question to the next, results on disk, and candidates that are clearly worse are dropped after a part of the text.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from shallower import progress
from shallower.anatomy.dissect import Anatomy
from shallower.anatomy.streamed import is_streamed
from shallower.checkpoint.determinants import determinants, determined
from shallower.checkpoint.fingerprint import stored
from shallower.corpus.calibration import CalibrationSet
from shallower.corpus.choices import ChoiceSet
from shallower.engine.evaluator import Evaluator, Job, Measured, Order
from shallower.engine.memo import Memo, context_key
from shallower.engine.method_code import code_of, is_fully_known
from shallower.engine.race import FEWEST_SEQUENCES, Racing, looks, survivors
from shallower.engine.routes import Route, route_of
from shallower.engine.scoring import reads_choices
from shallower.engine.states import States
from shallower.engine.stream import mean_and_error
from shallower.engine.trace import prove
from shallower.engine.workers import Sweeps, Threads, Workers, thread_count, usual_memory
from shallower.errors import CorpusError, UserError
from shallower.registry import objective as objectives
from shallower.units import Unit

TOKENS_A_BATCH = {"cpu": 256}  # enough rows for matrix products at full speed, few enough for races to end early
TOKENS_A_BATCH_ELSEWHERE = 8192
BATCHES_A_RACE = 8  # at least, if these are not shorter than a race's first look: a look comes after a whole batch
EXACT_LOOKS = 8  # how often it is asked, at most, who has already lost for certain
ROUNDED = 1e-5  # an objective in float32 may come out that far below its floor, each token
ROUTES_A_JOB = 64  # what is lost at most, of each worker, when work is interrupted (of streamed blocks, a sweep)
MEASURED_AS = 6  # to be raised when the engine measures otherwise than before: what is remembered no longer holds


@dataclass
class Spent:
    """What evaluation has cost so far.

    tokens: calibration tokens × candidates measured, without padding. block_tokens: tokens run through one block, with
    padding. recalled: measurements of one candidate on one batch that were asked for and that the memo had kept from
    before. exhaustive: what `tokens` would be if nobody had been dropped before the end of the text: never less.
    races: those that dropped someone before the end of the text, so that they may have erred.
    """

    tokens: int = 0
    block_tokens: int = 0
    recalled: int = 0
    exhaustive: int = 0
    races: int = 0

    def since(self, before: Spent) -> Spent:
        """What was added to an earlier state."""
        return Spent(**{key: value - getattr(before, key) for key, value in asdict(self).items()})


class Ablator:
    """Evaluates sets of removed units on a calibration set.

    Lives as long as a search: keeps streams, and every result, and shares results through `memo`.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        calibration: CalibrationSet,
        objective: str = "nll",
        options: Mapping[str, Any] | None = None,
        *,
        racing: Racing | None = None,
        memo: Memo | None = None,
        memory: int | None = None,
        order: Order | None = None,
        threads: int | None = None,
        workers: Callable[[Evaluator], Workers] | None = None,
    ) -> None:
        """Prepare to measure `objective`. racing: None evaluates exactly. memo: knows the model by its weights, which
        are read for that once, so change none while this is in use; not used where the model is not
        `determined`, or the objective not `is_fully_known`.

        memory: bytes for streams and logits that are kept besides the model, by default a quarter of what is free.
        order: how the tree is walked, by default what is faster on the device. threads: how many measure, by default
        one a core. workers: makes those who measure in their place, of an evaluator to copy.

        Raises UnknownName for an unknown objective, CorpusError when it reads choices and `calibration` has none, and
        ModelError when replay does not reproduce the model.
        """
        self.anatomy = anatomy
        self.calibration = calibration
        self.objective = objectives.get(objective)
        self.options = self.objective.options_in_use(options or {})
        self._questions: int | None = None
        if reads_choices(self.objective):
            if not isinstance(calibration, ChoiceSet):
                raise CorpusError(
                    f"objective {objective!r} reads multiple-choice questions, but {calibration.spec} is text: "
                    "calibrate on a .jsonl file of questions with choices and gold, or take another objective, such as "
                    "nll."
                )
            self._questions = calibration.questions
        else:
            calibration.require_next()
        self.racing = racing
        # each question about streamed blocks would load them again
        self._floor: float | None = None if is_streamed(anatomy.model) else self.objective.traits.get("floor")
        self.spent = Spent()
        sequences = _sequences_a_batch(calibration, anatomy.model.device.type, races=racing is not None)
        mixed, self._order = _mixed(calibration, self._questions is not None)
        self._draws, self._mixed_draws = (_draws(text, self._questions is not None) for text in (calibration, mixed))
        self._batches = list(mixed.batches(sequences))
        prove(anatomy, self._batches[0], shared=True)
        if memory is None:
            memory = usual_memory(anatomy.model)
        threads = threads or thread_count(anatomy)
        evaluator = Evaluator(
            anatomy,
            self._batches,
            self.objective,
            self.options,
            states=States(memory // 2),
            memory=memory // 2 // threads,
            order=order,
        )
        self._workers = _crew(evaluator, threads) if workers is None else workers(evaluator)
        each = ((self.objective, self.options), *((other, {}) for other in evaluator.besides))
        known = determined(anatomy.model) and is_fully_known(self.objective)
        self._versions = _versions(anatomy.model)
        if memo is not None and not known:
            progress.note(
                "What is measured now is not remembered: hooks, a replaced forward, adapters, attention of another "
                "package, autocast, or what the objective closes over or calls, cannot be told from others of their "
                "kind."
            )
        self._memo = memo = memo if known else None
        self._contexts: list[str] = []
        if memo is not None:
            same = {
                "model": determinants(anatomy.model),
                "calibration": calibration.digest,
                "sequences_a_batch": sequences,
                "measured_as": MEASURED_AS,
            }
            self._contexts = [
                context_key({**same, "objective": [method.name, code_of(method), sorted(own.items())]})
                for method, own in each
            ]
        self._measured: dict[tuple[Route, int], NDArray[np.float64]] = memo.read(self._contexts[0]) if memo else {}
        self._kept_before = set(self._measured)  # less what was asked for since
        self._asked: set[Route] = set()  # in `spent.exhaustive` with all that was unknown of them

    def require_measures(
        self, model: nn.Module, calibration: CalibrationSet, objective: str, options: Mapping[str, Any]
    ) -> None:
        """Raise UserError unless this was made for a model, with the weights that it has now, text and objective."""
        asked = objectives.get(objective)
        others = {
            "model": self.anatomy.model is not model,
            "calibration": self.calibration.digest != calibration.digest,
            "objective": self.objective is not asked or self.options != asked.options_in_use(options),
        }
        if other := next((name for name in others if others[name]), None):
            raise UserError(f"the ablator was made for another {other}; give one that was made for this, or none.")
        if _versions(self.anatomy.model) != self._versions:
            raise UserError(
                "the ablator knows what the model computed before its weights were changed; make a new one, or none."
            )

    def account(self) -> Spent:
        """What was spent so far, to be given to `Spent.since` later. Of candidates that are asked for again from here
        on, `exhaustive` counts what is unknown now.
        """
        self._asked.clear()
        return copy(self.spent)

    def close(self) -> None:
        """Let workers in other processes go, and all that is kept in memory but results: what was measured can still
        be asked for. More can be measured, too, for which workers are started anew.
        """
        self._workers.close()

    @property
    def memo(self) -> Memo | None:
        """Where results are kept on disk; None where they are not."""
        return self._memo

    @property
    def dense(self) -> float:
        """The objective of the dense model."""
        return self.losses([frozenset()])[0]

    @property
    def counts(self) -> NDArray[np.int64]:
        """What each item weighs in the mean, int64 [items]: a sequence the tokens of it that have a real next token, a
        question 1.
        """
        if self._questions is not None:
            return np.ones(self._questions, dtype=np.int64)
        mask = self.calibration.attention_mask
        if mask is None:
            return np.full(self.calibration.sequences, self.calibration.length - 1, dtype=np.int64)
        return mask[:, 1:].sum(1).numpy().astype(np.int64)

    def losses(
        self, candidates: Sequence[Collection[Unit]], keep: int | None = None, *, race: bool = True
    ) -> list[float]:
        """The objective, a mean over tokens or questions, of the model without each candidate's units. Lower is better.

        keep: only the `keep` best matter. With racing on, candidates that are clearly not among them are dropped after
        a part of the text and come back as infinity; the others are then comparable among themselves, measured on the
        same tokens. Without, or with `race` off, only those come back as infinity that are certainly not among them,
        since the objective is never below its `floor` (a trait of it), and the others were measured on all of the text.
        """
        if keep is not None:
            routes = [self.route(candidate) for candidate in candidates]
            if len(set(routes)) > keep and race and self.racing is not None:
                return self._race(routes, keep, self.racing)
            if len(set(routes)) > keep and self._floor is not None:
                return self._best_in_full(routes, keep, self._floor)
        tokens = int(self.counts.sum())
        return [_finite(float(sums.sum()) / tokens) for sums in self.sums(candidates)]

    def differences(self, candidates: Sequence[Collection[Unit]]) -> list[tuple[float, float | None]]:
        """For each candidate how much higher its objective is than the dense model's, and the standard error of that
        over sequences or questions, which were the same for both; None for a single one.

        The error takes items for independent draws, the choices of one question together. Sequences cut from one
        document are alike, so where documents are longer than sequences the true error is larger.
        """
        dense, *without = self.sums([frozenset(), *candidates])
        counts = np.add.reduceat(self.counts, self._draws)
        found = [mean_and_error(np.add.reduceat(sums - dense, self._draws), counts) for sums in without]
        return [(_finite(mean), error if math.isfinite(mean) else None) for mean, error in found]

    def sums(self, candidates: Sequence[Collection[Unit]]) -> list[NDArray[np.float64]]:
        """For each candidate the objective summed over the tokens of each sequence, or that of each question: float64
        [items], in the order of the calibration set.

        Raises BudgetError when a candidate names a unit that the model does not have.
        """
        routes = [self.route(candidate) for candidate in candidates]
        distinct = list(dict.fromkeys(routes))
        description = "measuring the model" if len(distinct) == 1 else f"measuring {len(distinct)} candidates"
        self.spent.exhaustive += self._unread(distinct)
        with progress.task(description, len(distinct) * len(self._batches)) as step:
            self._measure(distinct, range(len(self._batches)), step)
        joined = {route: self._in_order(self._joined(route, len(self._batches))) for route in distinct}
        return [joined[route] for route in routes]

    def route(self, candidate: Collection[Unit]) -> Route:
        """What each block does for a candidate. Candidates with the same route are the same model."""
        return route_of(self.anatomy, candidate)

    def _race(self, routes: list[Route], keep: int, racing: Racing) -> list[float]:
        """Losses of the survivors on what was measured, infinity for the rest."""
        running = list(dict.fromkeys(routes))
        self.spent.exhaustive += self._unread(running)
        total = len(self._batches)
        counts = self.counts[self._order]
        draws = self._mixed_draws
        of_draws = np.add.reduceat(counts, draws)
        measured, early = 0, False
        with progress.task(f"racing {len(running)} candidates", len(running) * total) as step:
            for upto in self._looks:
                if len(running) <= keep:
                    break
                self._measure(running, range(measured, upto), step)
                measured = upto
                sums = np.stack([self._joined(route, measured) for route in running])
                sums = np.add.reduceat(sums, draws[draws < sums.shape[1]], axis=1)
                alive = survivors(sums, of_draws[: sums.shape[1]], keep, racing, len(draws))
                step(int((~alive).sum()) * (total - measured))
                early = early or (measured < total and not bool(alive.all()))
                running = [route for route, stays in zip(running, alive, strict=True) if stays]
        self.spent.races += early
        losses = {}
        for route in running:
            sums = self._joined(route, measured)
            losses[route] = _finite(float(sums.sum() / counts[: len(sums)].sum()))
        return [losses.get(route, math.inf) for route in routes]

    def _best_in_full(self, routes: list[Route], keep: int, floor: float) -> list[float]:
        """Losses of the `keep` best on all of the text, and of whom else was read in full; infinity for the rest.

        Exact, by abandoning early: a candidate goes when what was read of it comes to more than all of the `keep`-th
        best of those that were read in full, so that values of `floor` on the rest would not help it. The leaders are
        read in full as soon as somebody would go if they kept their mean.
        """
        running = list(dict.fromkeys(routes))
        self.spent.exhaustive += self._unread(running)
        total, counts = len(self._batches), self.counts[self._order]
        tokens = int(counts.sum())
        finished: dict[Route, float] = {}
        known = all((route, number) in self._measured for route in running for number in range(total))
        at_once = 1 if known else self._workers.count  # which starts those of Ray
        stride = -(-total // (EXACT_LOOKS * at_once)) * at_once
        with progress.task(f"measuring {len(running)} candidates", len(running) * total) as step:
            for start in range(0, total, stride):
                upto = min(start + stride, total)
                self._measure([route for route in running if route not in finished], range(start, upto), step)
                if upto == total:
                    break
                read = {route: self._joined(route, upto) for route in running}
                sums = {route: _finite(float(items.sum())) for route, items in read.items()}
                unread = int(counts[len(read[running[0]]) :].sum())
                at_least = {route: found + unread * (floor - ROUNDED) for route, found in sums.items()}
                leaders = sorted(running, key=sums.__getitem__)[:keep]
                worst = max((at_least[route] for route in running if route not in finished), default=-math.inf)
                if worst * (tokens - unread) > sums[leaders[-1]] * tokens:
                    ahead = [route for route in leaders if route not in finished]
                    self._measure(ahead, range(upto, total), step)
                    finished |= {route: _finite(float(self._joined(route, total).sum())) for route in ahead}
                mark = sorted(finished.values())[keep - 1] if finished else math.inf
                stay = [route for route in running if route in finished or not at_least[route] > mark]
                step((len(running) - len(stay)) * (total - upto))
                running = stay
        losses = {route: _finite(float(self._in_order(self._joined(route, total)).sum()) / tokens) for route in running}
        return [losses.get(route, math.inf) for route in routes]

    def _unread(self, routes: Sequence[Route]) -> int:
        """Tokens that it takes to measure candidates in full. Those that were asked for before would be known by now,
        had they not been dropped.
        """
        new = [route for route in routes if route not in self._asked]
        self._asked.update(new)
        sizes = [batch.tokens for batch in self._batches]
        return sum(size for route in new for number, size in enumerate(sizes) if (route, number) not in self._measured)

    @property
    def _looks(self) -> list[int]:
        """After how many batches a race asks who can go, the last time after all of them."""
        per_batch = [
            len(batch.input_ids) if batch.answers is None else batch.answers.questions for batch in self._batches
        ]
        ends = np.cumsum(per_batch)
        return sorted({int(np.searchsorted(ends, count)) + 1 for count in (*looks(int(ends[-1])), ends[-1])})

    def _in_order(self, mixed: NDArray[np.float64]) -> NDArray[np.float64]:
        """Values of all items, put back in the order of the calibration set."""
        values = np.empty_like(mixed)
        values[self._order] = mixed
        return values

    def _joined(self, route: Route, batches: int) -> NDArray[np.float64]:
        return np.concatenate([self._measured[route, number] for number in range(batches)])

    def _measure(self, routes: Sequence[Route], numbers: range, step: progress.Step) -> None:
        """Fill in whatever is not yet known of `routes` on the batches `numbers`; what was measured is kept even when
        interrupted.
        """
        jobs = []
        for number in numbers:
            missing = sorted(route for route in routes if (route, number) not in self._measured)
            pieces = (missing[at : at + ROUTES_A_JOB] for at in range(0, len(missing), ROUTES_A_JOB))
            jobs += [Job(number, tuple(piece)) for piece in pieces]
        recalled = {(route, number) for route in routes for number in numbers} & self._kept_before
        self._kept_before -= recalled
        self.spent.recalled += len(recalled)
        step(len(routes) * len(numbers) - sum(len(job.routes) for job in jobs))
        for done in self._workers.run(jobs, step):
            number = done.job.number
            if self._memo is not None:  # also for searches by the objectives that came along
                self._remember(self._memo, done)
            # copies, as a view would keep the rows of the objectives that came along
            self._measured.update({(route, number): sums[0].copy() for route, sums in done.sums.items()})
            self.spent.tokens += done.tokens
            self.spent.block_tokens += done.block_tokens

    def _remember(self, memo: Memo, done: Measured) -> None:
        counts = {len(sums) for sums in done.sums.values()} - {len(self._contexts)}
        if counts:  # rows are told apart by their place alone
            raise UserError(
                f"a worker sent results of another shape (rows: {counts.pop()}, asked for: {len(self._contexts)}); "
                "install the same version of shallower on every machine."
            )
        for place, context in enumerate(self._contexts):
            memo.write(context, [(route, done.job.number, sums[place]) for route, sums in done.sums.items()])


def _sequences_a_batch(calibration: CalibrationSet, device: str, *, races: bool) -> int:
    """As many as make good use of the device, and of those that fill it with a whole set fewer, or no race could end
    early.
    """
    sequences = max(1, TOKENS_A_BATCH.get(device, TOKENS_A_BATCH_ELSEWHERE) // calibration.length)
    if races and device not in TOKENS_A_BATCH:
        return min(sequences, max(FEWEST_SEQUENCES, calibration.sequences // BATCHES_A_RACE))
    return sequences


def _mixed(calibration: CalibrationSet, asks: bool) -> tuple[CalibrationSet, NDArray[np.int64]]:
    """The set in the order in which it is measured, always the same for the same text, and which items of `calibration`
    come in turn: int64 [items]. asks: items are questions, not sequences.

    A race takes what it has read for a random sample of the rest. Neighbours come from one document, which would make
    it far too sure.
    """
    groups = calibration.questions if isinstance(calibration, ChoiceSet) else calibration.sequences
    keys = [hashlib.sha256(f"{calibration.digest} {group}".encode()).digest() for group in range(groups)]
    order = sorted(range(groups), key=keys.__getitem__)
    mixed = calibration.subset(order)
    if isinstance(calibration, ChoiceSet) and not asks:  # the choices of a question stay together
        question = calibration.answers.question.numpy()
        return mixed, np.concatenate([np.flatnonzero(question == group) for group in order])
    return mixed, np.array(order, dtype=np.int64)


def _draws(text: CalibrationSet, asks: bool) -> NDArray[np.int64]:
    """Where each independent draw of the items begins, int64 [draws]: choices of one question have a context in common.
    asks: items are questions.
    """
    if asks or not isinstance(text, ChoiceSet):
        return np.arange(text.questions if isinstance(text, ChoiceSet) else text.sequences)
    return np.flatnonzero(np.diff(text.answers.question.numpy(), prepend=-1))


def _versions(model: nn.Module) -> list[tuple[int, int]]:
    """Where each stored tensor is, and how often it was written to, but for what is written through `.data`.

    Of packed weights it is which tensor that is, as they may be in other memory the next time.
    """
    return [
        (
            id(tensor) if _is_packed(tensor) else tensor.data_ptr(),
            0 if tensor.is_inference() else tensor._version,
        )
        for tensor in stored(model).values()
    ]


def _is_packed(tensor: Tensor) -> bool:
    """Whether measuring may store it anew, as bitsandbytes does, in whatever type it packs weights."""
    integers = not tensor.is_floating_point() and not tensor.is_meta
    return integers or hasattr(tensor, "quant_state") or hasattr(tensor, "SCB")


def _crew(evaluator: Evaluator, threads: int) -> Workers:
    return Sweeps(evaluator) if is_streamed(evaluator.anatomy.model) else Threads(evaluator, threads)


def _finite(loss: float) -> float:
    """An overflow is as bad as can be; as NaN, which compares as neither better nor worse, it could win a search."""
    return loss if math.isfinite(loss) else math.inf
