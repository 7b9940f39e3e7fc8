"""One copy of the model that measures candidates on calibration batches: a prefix tree, walked in one of two orders.

Layer-major takes every candidate through a block before the next block, so that states that wait at the same depth go
through it together: a small batch neither fills an accelerator nor pays for what Python does around a block.
Depth-first holds one state a level, for when memory is short. Both start from what `States` kept, and both give the
same numbers to the precision of the compute type.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shallower.anatomy.dissect import Anatomy
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

    block_tokens: tokens run through one block. tokens: calibration tokens times routes.
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
        besides: Sequence[Method] | None = None,
        dense_answers: DenseAnswers | None = None,
    ) -> None:
        """states: what is kept between questions. memory: bytes for what a visit of one batch needs besides: half for
        the streams of a layer-major walk, half for the dense model's logits, which stay while there is room. order:
        None takes layer-major where the streams of a few candidates fit, else depth-first. besides: objectives that
        come along; None takes those that are registered here (`along_with`). dense_answers: shared with others.
        """
        self.anatomy = anatomy
        self.batches = batches
        self.objective = objective
        self.options = options
        self.besides = along_with(objective, options) if besides is None else tuple(besides)
        self.memory = memory
        self.states = states
        self._share(DenseAnswers() if dense_answers is None else dense_answers)
        self._head = find_head(anatomy)
        self._traces: dict[tuple[int, int], Trace] = {}
        self.order = order
        self._group = 0
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
            besides=self.besides,
            dense_answers=self._dense_answers,
        )

    def measure(self, job: Job, tick: Callable[[], None] = lambda: None) -> Measured:
        """Measure the job's routes on its batch; `tick` is called after each."""
        whole = "." * len(self.anatomy.blocks)
        with torch.no_grad(), self.states.visit(job.number, (*job.routes, whole)):
            replay = self._trace(job.number)
            self._block_tokens = 0
            dense = None
            if needs_dense(self.objective):
                [(_, dense)] = self._walk(job.number, replay, "", replay.entry, [whole])
                self.states.keep(job.number, whole, dense)
            scorer = self._scorer(job.number, dense)
            sums = {}
            if self.order == "depth-first" or (self.order is None and self._at_once(replay) < FEWEST_AT_ONCE):
                walk = self._walk(job.number, replay, "", replay.entry, list(job.routes))
            else:
                walk = self._layers(job.number, replay, job.routes)
            for group in _batched(walk, scorer.together):
                for (route, _), values in zip(group, scorer([hidden for _, hidden in group]), strict=True):
                    sums[route] = values.numpy()
                    tick()
            tokens = replay.batch.input_ids.numel() * len(sums)
            return Measured(job, sums, tokens, self._block_tokens)

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
            for other in [key for key in self._traces if key[0] != number]:
                del self._traces[other]
            batch = self.batches[number]
            if times > 1:
                mask = batch.attention_mask
                batch = Batch(batch.input_ids.repeat(times, 1), None if mask is None else mask.repeat(times, 1))
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

    def _layers(self, number: int, replay: Trace, routes: Sequence[Route]) -> Iterator[tuple[Route, Tensor]]:
        """Layer-major, as many routes at a time as half of the memory holds states for, before and after a block."""
        ordered = sorted(routes)  # neighbours share most
        size = max(1, self._at_once(replay))
        for start in range(0, len(ordered), size):
            yield from self._sweep(number, replay, ordered[start : start + size])

    def _at_once(self, replay: Trace) -> int:
        """Candidates whose streams fit half of the memory, before and after a block."""
        return self.memory // 4 // replay.entry.nbytes

    def _sweep(self, number: int, replay: Trace, routes: Sequence[Route]) -> Iterator[tuple[Route, Tensor]]:
        depths = len(self.anatomy.blocks)
        waiting: dict[str, Tensor] = {}  # streams by the prefix that made them
        needed: list[set[str]] = [set() for _ in range(depths + 1)]
        for route in routes:
            start, state = self.states.deepest(number, route) or (0, replay.entry)
            waiting[route[:start]] = state
            for depth in range(start + 1, depths + 1):
                needed[depth].add(route[:depth])
        for depth in range(1, depths + 1):
            by_action: dict[str, list[str]] = defaultdict(list)
            for prefix in sorted(needed[depth] - waiting.keys()):
                if prefix[-1] == PASSED_OVER:
                    waiting[prefix] = waiting[prefix[:-1]]
                else:
                    by_action[prefix[-1]].append(prefix)
            for action, prefixes in by_action.items():
                for group in self._grouped(number, prefixes):
                    states = self._together(number, depth - 1, [waiting[prefix[:-1]] for prefix in group], action)
                    for prefix, state in zip(group, states, strict=True):
                        waiting[prefix] = state
                        self._keep(number, prefix, state)
            for prefix in [prefix for prefix in waiting if len(prefix) == depth - 1]:
                del waiting[prefix]
        for route in routes:
            yield route, waiting[route]

    def _grouped(self, number: int, prefixes: list[str]) -> Iterator[list[str]]:
        """Split into groups of the best size, the rest into smaller ones, each half as large."""
        entry = self._trace(number).entry
        if entry.device.type == "cpu":  # batches of questions differ in size
            size = max(1, TOKENS_TOGETHER // (entry.shape[0] * entry.shape[1]))
        else:
            size = self._group or self._measure_group(number)
        start = 0
        while start < len(prefixes):
            while size > len(prefixes) - start:
                size //= 2
            yield prefixes[start : start + size]
            start += size

    def _together(self, number: int, index: int, states: list[Tensor], action: str) -> Sequence[Tensor]:
        if len(states) == 1:
            return [self._run(self._trace(number), index, states[0], action)]
        found = self._run(self._trace(number, len(states)), index, stacked(states), action)
        return [part.clone() for part in found.chunk(len(states))]  # else one that is kept keeps all of them

    def _measure_group(self, number: int) -> int:
        """How many states are best run together on an accelerator: seconds a state of a block in the middle."""
        entry = self._trace(number).entry
        best, self._group = float("inf"), 1
        for size in GROUPS:
            if size > 1 and 4 * size * entry.nbytes > self.memory:
                break
            try:
                copies = entry.repeat(size, *[1] * (entry.ndim - 1))
                seconds = min(self._seconds(number, size, copies) for _ in range(3)) / size
            except Exception as error:
                if out_of_memory(error):
                    break
                raise
            if seconds * WORTHWHILE > best:
                break
            best, self._group = seconds, size
        for tried in [key for key in self._traces if key[1] > self._group]:
            del self._traces[tried]
        return self._group

    def _seconds(self, number: int, size: int, copies: Tensor) -> float:
        start = time.perf_counter()
        self._trace(number, size).run(len(self.anatomy.blocks) // 2, copies).flatten()[0].item()
        return time.perf_counter() - start

    def _keep(self, number: int, prefix: str, hidden: Tensor) -> None:
        if len(prefix) < len(self.anatomy.blocks):  # what leaves the last block was scored, and is not asked for again
            self.states.keep(number, prefix, hidden)

    def _run(self, replay: Trace, index: int, hidden: Tensor, action: str) -> Tensor:
        self._block_tokens += hidden.shape[0] * hidden.shape[1]
        return replay.run(index, hidden, ACTIONS[action])


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
