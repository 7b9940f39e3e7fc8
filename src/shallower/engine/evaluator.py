"""One copy of the model that measures candidates on calibration batches: a prefix tree, walked in one of two orders.

Layer-major takes every candidate through a block before the next block, so that states that wait at the same depth go
through it together: a small batch neither fills an accelerator nor pays for what Python does around a block.
Depth-first holds one state a level, for when memory is short. Both start from what `States` kept, and both give the
same numbers to the precision of the compute type.

Of a model whose blocks are streamed, layer-major takes all batches through a block before the next, so that its weights
are loaded once a sweep.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shallower import progress
from shallower.anatomy.dissect import Anatomy, Block
from shallower.anatomy.streamed import held
from shallower.checkpoint.stock import copied
from shallower.corpus.calibration import Batch
from shallower.engine.head import find_head
from shallower.engine.routes import ACTIONS, PASSED_OVER, Route
from shallower.engine.scoring import Scorer, along_with, needs_dense
from shallower.engine.states import DenseAnswers, States
from shallower.engine.trace import Trace, stacked, trace
from shallower.errors import out_of_memory
from shallower.registry import Method

Order = Literal["depth-first", "layer-major"]
FEWEST_AT_ONCE = 8  # candidates, for layer-major to be worthwhile
GROUPS = (1, 2, 4, 8, 16)  # states that go through a block together
HEAD_IN_BLOCKS = 7  # what the head costs, measured on a small model; larger models have a cheaper one
TOKENS_TOGETHER = 1024  # on a processor: 26 µs a token and block with 256 tokens, 23.7 with 512, 21.5 with 1,024
BESIDES_ROUTES = (
    5  # of a batch in a sweep: the dense model, and traces of one, two and four copies, with one state each
)
WORTHWHILE = 1.25  # a larger group has to be this many times faster


@dataclass(frozen=True)
class Job:
    """Candidates to be measured on one batch."""

    number: int
    routes: tuple[Route, ...]


@dataclass(frozen=True)
class Measured:
    """What a job found: for each route the objective, and those that come along with it (`along_with`), summed over
    each item of the batch, float64 [objectives, items].

    block_tokens: tokens run through one block. tokens: calibration tokens times routes, without
    padding.
    """

    job: Job
    sums: dict[Route, NDArray[np.float64]]
    tokens: int
    block_tokens: int


class Scoring(Protocol):
    """Makes numbers of streams that leave the last block, `together` at a time: what `Measured` holds of each."""

    @property
    def together(self) -> int: ...

    def __call__(self, hiddens: Sequence[Tensor]) -> list[Tensor]: ...


class Evaluator:
    """A model with the calibration batches. Not safe for two threads: each takes a `replica`."""

    def __init__(
        self,
        anatomy: Anatomy,
        batches: Sequence[Batch],
        objective: Method,
        options: Mapping[str, Any],
        *,
        states: States,
        memory: int,
        order: Order | None = None,
        dense_answers: DenseAnswers | None = None,
    ) -> None:
        """states: what is kept between questions. memory: bytes for what a visit of one batch needs besides: half for
        the streams of a layer-major walk, half for the dense model's logits, which stay while there is room. order:
        None takes layer-major where the streams of a few candidates fit, else depth-first. dense_answers: shared with
        others.
        """
        self.anatomy = anatomy
        self.batches = batches
        self.objective = objective
        self.options = options
        self.besides = along_with(objective, options)
        self.memory = memory
        self.states = states
        self._share(DenseAnswers() if dense_answers is None else dense_answers)
        self._head = find_head(anatomy)
        self._traces: dict[tuple[int, int], Trace] = {}
        self._visited: Collection[int] = ()
        self.order = order
        self._tokens_together = 0
        self._block_tokens = 0

    def _share(self, answers: DenseAnswers) -> None:
        self._dense_answers = answers
        answers.share(self.memory // 2)

    def forget(self) -> None:
        """Give up what was kept for later questions. To be called when no replica is used any more."""
        self.states.clear()
        self._traces.clear()
        self._share(DenseAnswers())

    def replica(self) -> Evaluator:
        """Another evaluator for another thread: the same weights and kept states, its own modules."""
        model = self.anatomy.model
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        own = copied(model, shared)
        layers = own.get_submodule(self.anatomy.path)
        blocks = tuple(replace(block, module=layers.get_submodule(str(block.index))) for block in self.anatomy.blocks)
        return type(self)(
            Anatomy(own, self.anatomy.path, blocks),
            self.batches,
            self.objective,
            self.options,
            states=self.states,
            memory=self.memory,
            order=self.order,
            dense_answers=self._dense_answers,
        )

    def measure(self, job: Job, tick: Callable[[], None] = lambda: None) -> Measured:
        """Measure the job's routes on its batch; `tick` is called after each."""
        whole = self._whole
        with torch.no_grad(), self.states.visit(job.number, (*job.routes, whole)):
            self._visit([job.number])
            replay = self._trace(job.number)
            dense = None
            if needs_dense(self.objective):
                [(_, dense)] = self._walk(job.number, replay, "", replay.entry, [whole])
                self.states.keep(job.number, whole, dense)
            if self.order == "depth-first" or (self.order is None and self._at_once(job.number) < FEWEST_AT_ONCE):
                walk = self._walk(job.number, replay, "", replay.entry, list(job.routes))
            else:
                walk = self._layers(job)
            sums = self._scored(job, walk, dense, tick)
            return Measured(job, sums, self._tokens(job), self._block_tokens)

    def sweeps(self, jobs: Sequence[Job]) -> Iterator[list[Job]]:
        """Portions of the jobs, each of which fits half of the memory as a whole, with the traces that it needs; jobs
        with many routes in parts.
        """
        portion: list[Job] = []
        filled = 0.0
        for job in jobs:
            most = self._at_once(job.number)
            size = max(1, most - BESIDES_ROUTES)
            for start in range(0, len(job.routes), size):
                part = Job(job.number, job.routes[start : start + size])
                share = (BESIDES_ROUTES + len(part.routes)) / max(1, most)
                if portion and filled + share > 1:
                    yield portion
                    portion, filled = [], 0.0
                portion.append(part)
                filled += share
        if portion:
            yield portion

    def sweep(self, jobs: Sequence[Job], tick: Callable[[], None] = lambda: None) -> Iterator[Measured]:
        """Measure jobs of several batches in one walk over the blocks. `tick` is called after each route."""
        whole = self._whole
        with torch.no_grad(), ExitStack() as visits:
            for job in jobs:
                visits.enter_context(self.states.visit(job.number, (*job.routes, whole)))
            self._visit({job.number for job in jobs})
            asked = {(job.number, route) for job in jobs for route in job.routes}
            if needs_dense(self.objective):
                asked |= {(job.number, whole) for job in jobs}
            with progress.task("taking all of them through the blocks", len(self.anatomy.blocks)) as step:
                ends = dict(self._sweep(sorted(asked), step))
            for job in jobs:
                dense = None
                if needs_dense(self.objective):
                    dense = ends[job.number, whole]
                    self.states.keep(job.number, whole, dense)
                walk = ((route, ends[job.number, route]) for route in job.routes)
                sums = self._scored(job, walk, dense, tick)
                blocks, self._block_tokens = self._block_tokens, 0  # the first job tells what all have cost
                yield Measured(job, sums, self._tokens(job), blocks)

    @property
    def _whole(self) -> Route:
        return "." * len(self.anatomy.blocks)

    def _visit(self, numbers: Collection[int]) -> None:
        self._visited = numbers
        self._block_tokens = 0

    def _tokens(self, job: Job) -> int:
        return self.batches[job.number].tokens * len(job.routes)

    def _scored(
        self, job: Job, walk: Iterator[tuple[Route, Tensor]], dense: Tensor | None, tick: Callable[[], None]
    ) -> dict[Route, NDArray[np.float64]]:
        """What `Measured` holds of each route, whose stream behind the last block comes from `walk`."""
        scorer = self._scorer(job.number, dense)
        sums = {}
        for group in _batched(walk, scorer.together):
            for (route, _), values in zip(group, scorer([hidden for _, hidden in group]), strict=True):
                sums[route] = values.numpy()
                tick()
        return sums

    def _scorer(self, number: int, dense: Tensor | None) -> Scoring:
        return Scorer(
            self.objective,
            self.options,
            self._head,
            partial(self._trace, number),
            dense,
            self.memory // 2,
            self.besides,
            kept=self._dense_answers.of(number),
            keep=partial(self._dense_answers.keep, number),
        )

    def _trace(self, number: int, times: int = 1) -> Trace:
        """The batch's trace, or that of `times` copies of the batch. Traces cost no block, but some memory each."""
        if (number, times) not in self._traces:
            for other in [key for key in self._traces if key[0] != number and key[0] not in self._visited]:
                del self._traces[other]
            batch = self.batches[number]
            if times > 1:
                mask = batch.attention_mask
                batch = Batch(batch.input_ids.repeat(times, 1), None if mask is None else mask.repeat(times, 1))
            with torch.no_grad():
                self._traces[number, times] = trace(self.anatomy, batch)
        return self._traces[number, times]

    def _walk(
        self, number: int, replay: Trace, prefix: str, hidden: Tensor, routes: list[Route]
    ) -> Iterator[tuple[Route, Tensor]]:
        """Depth-first over the tree of `routes`, which begin with `prefix`; `hidden` is the stream after it."""
        shared = _common_prefix(routes)
        kept = self.states.deepest(number, shared, len(prefix))
        if kept is not None:
            prefix, hidden = shared[: kept[0]], kept[1]
        while len(prefix) < len(shared):
            action = shared[len(prefix)]
            prefix += action
            if action != PASSED_OVER:
                hidden = self._run(replay, len(prefix) - 1, hidden, action)
                self._keep(number, prefix, hidden)
        if len(prefix) == len(self.anatomy.blocks):
            yield prefix, hidden
            return
        branches: dict[str, list[Route]] = defaultdict(list)
        for route in routes:
            branches[route[len(prefix)]].append(route)
        for members in branches.values():
            yield from self._walk(number, replay, prefix, hidden, members)

    def _layers(self, job: Job) -> Iterator[tuple[Route, Tensor]]:
        """Layer-major, as many routes at a time as half of the memory holds states for, before and after a block."""
        ordered = sorted(job.routes)  # neighbours share most
        size = max(1, self._at_once(job.number))
        for start in range(0, len(ordered), size):
            for (_, route), hidden in self._sweep([(job.number, route) for route in ordered[start : start + size]]):
                yield route, hidden

    def _at_once(self, number: int) -> int:
        """Candidates whose streams fit half of the memory, before and after a block."""
        entry = next(iter(self._traces.values()), None) or self._trace(number)
        token = entry.entry.nbytes // entry.batch.input_ids.numel()
        return self.memory // 4 // (token * self.batches[number].input_ids.numel())

    def _sweep(
        self, asked: Sequence[tuple[int, Route]], step: Callable[[], None] = lambda: None
    ) -> Iterator[tuple[tuple[int, Route], Tensor]]:
        """asked: batches and routes. Yields each with its stream behind the last block; `step` is called after each
        block.
        """
        depths = len(self.anatomy.blocks)
        waiting: dict[tuple[int, str], Tensor] = {}  # streams by the batch and the prefix that made them
        needed: list[set[tuple[int, str]]] = [set() for _ in range(depths + 1)]
        for number, route in asked:
            start, state = self.states.deepest(number, route) or (0, self._trace(number).entry)
            waiting[number, route[:start]] = state
            for depth in range(start + 1, depths + 1):
                needed[depth].add((number, route[:depth]))
        for depth in range(1, depths + 1):
            by_action: dict[tuple[int, str], list[str]] = defaultdict(list)
            for number, prefix in sorted(needed[depth] - waiting.keys()):
                if prefix[-1] == PASSED_OVER:
                    waiting[number, prefix] = waiting[number, prefix[:-1]]
                else:
                    by_action[number, prefix[-1]].append(prefix)
            if by_action:
                with held(self.anatomy.blocks[depth - 1].module):
                    for (number, action), prefixes in by_action.items():
                        self._pass(number, depth - 1, prefixes, action, waiting)
            for place in [place for place in waiting if len(place[1]) == depth - 1]:
                del waiting[place]
            step()
        for place in asked:
            yield place, waiting[place]

    def _pass(
        self, number: int, index: int, prefixes: list[str], action: str, waiting: dict[tuple[int, str], Tensor]
    ) -> None:
        """Take the streams that `prefixes` end in through a block, from `waiting` into it."""
        for group in self._grouped(number, prefixes):
            states = self._together(number, index, [waiting[number, prefix[:-1]] for prefix in group], action)
            for prefix, state in zip(group, states, strict=True):
                waiting[number, prefix] = state
                self._keep(number, prefix, state)

    def _grouped(self, number: int, prefixes: list[str]) -> Iterator[list[str]]:
        """Split into groups of the best size, the rest into smaller ones, each half as large."""
        start = 0
        while start < len(prefixes):
            size = self._most_together(number)  # fewer than before where there was no room
            while size > len(prefixes) - start:
                size //= 2
            yield prefixes[start : start + size]
            start += size

    def _most_together(self, number: int) -> int:
        entry = self._trace(number).entry
        if entry.device.type == "cpu":  # batches of questions differ in size
            return max(1, TOKENS_TOGETHER // (entry.shape[0] * entry.shape[1]))
        if len(self._visited) > 1:
            return 1  # each group size takes a trace of each batch
        return self._fitting(number)

    def _fitting(self, number: int) -> int:
        """How many states of a batch are best run together on an accelerator: a power of two, as each size takes a
        trace.
        """
        self._tokens_together = self._tokens_together or self._measure_together(number)
        entry = self._trace(number).entry
        size = min(self._tokens_together // self.batches[number].input_ids.numel(), self.memory // (4 * entry.nbytes))
        return 1 << (max(1, size).bit_length() - 1)

    def _together(self, number: int, index: int, states: list[Tensor], action: str) -> Sequence[Tensor]:
        if len(states) == 1:
            return [self._run(self._trace(number), index, states[0], action)]
        try:
            found = self._run(self._trace(number, len(states)), index, stacked(states), action)
            return [part.clone() for part in found.chunk(len(states))]  # else one that is kept keeps all of them
        except Exception as error:
            if not out_of_memory(error):
                raise
        # not while the error is there, which keeps what was in memory when it was raised
        self._traces.pop((number, len(states)), None)
        half = len(states) // 2
        self._tokens_together = min(self._tokens_together, half * self.batches[number].input_ids.numel())
        return [
            *self._together(number, index, states[:half], action),
            *self._together(number, index, states[half:], action),
        ]

    def _measure_together(self, number: int) -> int:
        """How many tokens are best run together on an accelerator: seconds a state of a block in the middle."""
        entry = self._trace(number).entry
        best, group = float("inf"), 1
        for size in GROUPS:
            if size > 1 and 4 * size * entry.nbytes > self.memory:
                break
            try:
                copies = entry.repeat(size, *[1] * (entry.ndim - 1))
                with held(self._middle.module):
                    seconds = min(self._seconds(number, size, copies) for _ in range(3)) / size
            except Exception as error:
                if out_of_memory(error):
                    break
                raise
            if seconds * WORTHWHILE > best:
                break
            best, group = seconds, size
        for tried in [key for key in self._traces if key[1] > group]:
            del self._traces[tried]
        return group * self.batches[number].input_ids.numel()

    @property
    def _middle(self) -> Block:
        return self.anatomy.blocks[len(self.anatomy.blocks) // 2]

    def _seconds(self, number: int, size: int, copies: Tensor) -> float:
        start = time.perf_counter()
        self._trace(number, size).run(self._middle.index, copies).flatten()[0].item()
        return time.perf_counter() - start

    def _keep(self, number: int, prefix: str, hidden: Tensor) -> None:
        if len(prefix) < len(self.anatomy.blocks):  # what leaves the last block was scored, and is not asked for again
            self.states.keep(number, prefix, hidden)

    def _run(self, replay: Trace, index: int, hidden: Tensor, action: str) -> Tensor:
        found = replay.run(index, hidden, ACTIONS[action])
        self._block_tokens += hidden.shape[0] * hidden.shape[1]
        return found


def _batched(walk: Iterator[tuple[Route, Tensor]], size: int) -> Iterator[list[tuple[Route, Tensor]]]:
    while group := list(itertools.islice(walk, size)):
        yield group


def shares(jobs: Sequence[Job], states: States, count: int) -> list[Job]:
    """The same work in at least `count` jobs of about the same cost, where there are routes enough.

    Neighbours in the prefix tree stay together, so that little is run twice.
    """
    if not jobs or len(jobs) >= count:
        return list(jobs)
    pieces = -(-count // len(jobs))
    divided = []
    for job in jobs:
        routes = sorted(job.routes)
        costs = []
        for before, route in zip([None, *routes], routes, strict=False):
            shared = 0 if before is None else len(_common_prefix([before, route]))
            kept = states.deepest(job.number, route)
            costs.append(HEAD_IN_BLOCKS + len(route) - max(shared, 0 if kept is None else kept[0]))
        ends = np.cumsum(costs)
        piece = np.minimum((ends - 1e-9) * pieces // ends[-1], pieces - 1)
        parts = (tuple(route for route, at in zip(routes, piece, strict=True) if at == part) for part in range(pieces))
        divided += [Job(job.number, part) for part in parts if part]
    return divided


def _common_prefix(routes: Sequence[Route]) -> str:
    first, last = min(routes), max(routes)
    for depth, (one, other) in enumerate(zip(first, last, strict=True)):
        if one != other:
            return first[:depth]
    return first
