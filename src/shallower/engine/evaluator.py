"""One copy of the model that measures candidates on calibration batches: a prefix tree, walked in one of two orders.

Depth-first holds one state a level and suits a processor whose products are at full speed for a single batch.
Layer-major takes every candidate through a block before the next block, so that states that wait at the same depth can
go through it together: better for an accelerator that one batch does not fill. Both start from what `States` kept, and
both give the same numbers to the precision of the compute type.
"""

from __future__ import annotations

import copy
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shallower.anatomy.dissect import Anatomy
from shallower.corpus.calibration import Batch
from shallower.engine.head import find_head
from shallower.engine.routes import ACTIONS, PASSED_OVER, Route
from shallower.engine.scoring import Scorer, needs_dense
from shallower.engine.states import States
from shallower.engine.trace import Trace, trace
from shallower.registry import Method

Order = Literal["depth-first", "layer-major"]
GROUPS = (1, 2, 4, 8, 16)  # states that go through a block together
WORTHWHILE = 1.25  # a larger group has to be this many times faster


@dataclass(frozen=True)
class Job:
    """Candidates to be measured on one batch."""

    number: int
    routes: tuple[Route, ...]


@dataclass(frozen=True)
class Measured:
    """What a job found: for each route the objective summed over each item of the batch, float64 [items].

    block_tokens: tokens run through one block. tokens: calibration tokens times routes.
    """

    job: Job
    sums: dict[Route, NDArray[np.float64]]
    tokens: int
    block_tokens: int


class Evaluator:
    """A model with the calibration batches. Not safe for two threads: each takes a `replica`."""

    def __init__(
        self,
        anatomy: Anatomy,
        batches: Sequence[Batch],
        objective: Method,
        options: Mapping[str, Any],
        *,
        memory: int,
        order: Order | None = None,
        states: States | None = None,
    ) -> None:
        """memory: bytes for what is kept besides the model: half for states between questions, a quarter for states of
        one question, a quarter for the dense model's logits. order: None takes the faster one for the device.
        """
        self.anatomy = anatomy
        self.batches = batches
        self.objective = objective
        self.options = options
        self.memory = memory
        self.states = States(memory // 2) if states is None else states
        self._head = find_head(anatomy)
        self._traces: dict[tuple[int, int], Trace] = {}
        self.order: Order = order or ("depth-first" if anatomy.model.device.type == "cpu" else "layer-major")
        self._group = 0
        self._block_tokens = 0

    def replica(self) -> Evaluator:
        """Another evaluator for another thread: the same weights and kept states, its own modules."""
        model = self.anatomy.model
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        own = copy.deepcopy(model, shared)
        layers = own.get_submodule(self.anatomy.path)
        blocks = tuple(replace(block, module=layers.get_submodule(str(block.index))) for block in self.anatomy.blocks)
        return Evaluator(
            Anatomy(own, self.anatomy.path, blocks),
            self.batches,
            self.objective,
            self.options,
            memory=self.memory,
            order=self.order,
            states=self.states,
        )

    def measure(self, job: Job, tick: Callable[[], None] = lambda: None) -> Measured:
        """Measure the job's routes on its batch; `tick` is called after each."""
        with torch.no_grad():
            replay = self._trace(job.number)
            self._block_tokens = 0
            whole = "." * len(self.anatomy.blocks)
            dense = None
            self.states.begin(job.number, (*job.routes, whole), PASSED_OVER)
            if needs_dense(self.objective):
                [(_, dense)] = self._walk(job.number, replay, "", replay.entry, [whole])
                self.states.put(job.number, whole, dense)
            scorer = Scorer(self.objective, self.options, self._head, replay, dense, self.memory // 4)
            sums = {}
            walk = (
                self._layers(job.number, replay, job.routes)
                if self.order == "layer-major"
                else (self._walk(job.number, replay, "", replay.entry, list(job.routes)))
            )
            for route, hidden in walk:
                sums[route] = scorer(hidden).double().sum(1).cpu().numpy()
                tick()
            tokens = replay.batch.input_ids.numel() * len(sums)
            return Measured(job, sums, tokens, self._block_tokens)

    def _trace(self, number: int, times: int = 1) -> Trace:
        """The batch's trace, or that of `times` copies of the batch. Traces cost no block, but some memory each."""
        if (number, times) not in self._traces:
            for other in [key for key in self._traces if key[0] != number]:
                del self._traces[other]
            batch = self.batches[number]
            mask = batch.attention_mask
            copies = Batch(batch.input_ids.repeat(times, 1), None if mask is None else mask.repeat(times, 1))
            self._traces[number, times] = trace(self.anatomy, copies)
        return self._traces[number, times]

    def _walk(
        self, number: int, replay: Trace, prefix: str, hidden: Tensor, routes: list[Route]
    ) -> Iterator[tuple[Route, Tensor]]:
        """Depth-first over the tree of `routes`, which begin with `prefix`; `hidden` is the stream after it."""
        shared = _common_prefix(routes)
        for depth in range(len(shared), len(prefix), -1):
            kept = self.states.get(number, shared[:depth].rstrip(PASSED_OVER))
            if kept is not None:
                prefix, hidden = shared[:depth], kept
                break
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
        """Layer-major, as many routes at a time as a quarter of the memory holds states for."""
        ordered = sorted(routes)  # neighbours share most
        size = max(1, self.memory // 4 // max(replay.entry.nbytes, 1))
        for start in range(0, len(ordered), size):
            yield from self._sweep(number, replay, ordered[start : start + size])

    def _sweep(self, number: int, replay: Trace, routes: Sequence[Route]) -> Iterator[tuple[Route, Tensor]]:
        depths = len(self.anatomy.blocks)
        waiting: dict[str, Tensor] = {}  # streams by the prefix that made them
        needed: list[set[str]] = [set() for _ in range(depths + 1)]
        for route in routes:
            start, state = 0, replay.entry
            for depth in range(depths, 0, -1):
                kept = self.states.get(number, route[:depth].rstrip(PASSED_OVER))
                if kept is not None:
                    start, state = depth, kept
                    break
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
        """Split into groups of the measured size, the rest into smaller powers of two."""
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
        stacked = self._run(self._trace(number, len(states)), index, torch.cat(states), action)
        return [part.clone() for part in stacked.chunk(len(states))]  # else one that is kept keeps all of them

    def _measure_group(self, number: int) -> int:
        """How many states are best run together on this device: seconds a state of a block in the middle."""
        entry = self._trace(number).entry
        best, self._group = float("inf"), 1
        for size in GROUPS:
            stacked = entry.repeat(size, *[1] * (entry.ndim - 1))
            seconds = min(self._seconds(number, size, stacked) for _ in range(3)) / size
            if seconds * WORTHWHILE > best:
                break
            best, self._group = seconds, size
        return self._group

    def _seconds(self, number: int, size: int, stacked: Tensor) -> float:
        start = time.perf_counter()
        self._trace(number, size).run(len(self.anatomy.blocks) // 2, stacked).flatten()[0].item()
        return time.perf_counter() - start

    def _keep(self, number: int, prefix: str, hidden: Tensor) -> None:
        if len(prefix) < len(self.anatomy.blocks):  # what leaves the last block was scored, and is not asked for again
            self.states.put(number, prefix, hidden)

    def _run(self, replay: Trace, index: int, hidden: Tensor, action: str) -> Tensor:
        self._block_tokens += hidden.shape[0] * hidden.shape[1]
        return replay.run(index, hidden, ACTIONS[action])


def _common_prefix(routes: Sequence[Route]) -> str:
    first, last = min(routes), max(routes)
    for depth, (one, other) in enumerate(zip(first, last, strict=True)):
        if one != other:
            return first[:depth]
    return first
