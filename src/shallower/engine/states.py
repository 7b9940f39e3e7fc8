"""Streams at nodes of the prefix tree, kept from one question to the next within a number of bytes.

What a search asks next mostly agrees, at the shallow end, with what it asked before: greedy adds a unit to a set whose
neighbours were all measured in the round before, an offspring differs from its parent in a few places. A set of removed
units whose shallow part was run once starts from there.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

from shallower.engine.routes import PASSED_OVER, Route

Prefix = str  # what the first blocks do, one character each
DenseRows = tuple[Tensor, ...]


class States:
    """Hidden states under (batch, prefix). Safe for several threads.

    When the bytes are used up, a batch gives up its own states that its present visit has no use for, the longest
    unused first. States of other batches stay: taking turns would otherwise throw away what is needed next.
    """

    def __init__(self, budget: int) -> None:
        """Hold at most `budget` bytes."""
        self.left = budget
        self._lock = threading.RLock()
        self._kept: dict[int, OrderedDict[Prefix, Tensor]] = defaultdict(OrderedDict)
        self._wanted: dict[int, set[Prefix]] = defaultdict(set)
        self._visits: dict[int, int] = defaultdict(int)

    def clear(self) -> None:
        """Give up all of them."""
        with self._lock:
            for kept in self._kept.values():
                self.left += sum(state.nbytes for state in kept.values())
                kept.clear()

    @contextmanager
    def visit(self, number: int, routes: Iterable[Route]) -> Iterator[None]:
        """Inside the `with`, batch `number` is asked for `routes`: what they start from is not given up."""
        with self._lock:
            self._visits[number] += 1
            for route in routes:
                self.deepest(number, route)
        try:
            yield
        finally:
            with self._lock:
                self._visits[number] -= 1
                if not self._visits[number]:
                    self._wanted[number].clear()

    def deepest(self, number: int, route: Route, above: int = 0) -> tuple[int, Tensor] | None:
        """The deepest kept state on the way of `route`, below depth `above`: (depth, state)."""
        with self._lock:
            kept = self._kept[number]
            for depth in range(len(route), above, -1):
                prefix = route[:depth].rstrip(PASSED_OVER)
                if prefix in kept:
                    kept.move_to_end(prefix)
                    self._wanted[number].add(prefix)
                    return depth, kept[prefix]
        return None

    def keep(self, number: int, prefix: Prefix, state: Tensor) -> None:
        """Keep a state, which is after a block that was run, if there is room or room can be made."""
        with self._lock:
            kept, wanted = self._kept[number], self._wanted[number]
            if prefix in kept:
                return
            while self.left < state.nbytes and kept:
                oldest = next(iter(kept))
                if oldest in wanted:
                    return
                self.left += kept.pop(oldest).nbytes
            if self.left >= state.nbytes:
                self.left -= state.nbytes
                kept[prefix] = state
                wanted.add(prefix)


class DenseAnswers:
    """What the head makes of the dense model's stream, kept from one visit of a batch to the next. Safe for several
    threads.

    A search that asks for one candidate at a time would otherwise compute it anew for each. Batches take turns, so none
    makes way for another: those that came first stay.
    """

    def __init__(self) -> None:
        self._room = 0
        self._sharing = 0
        self._lock = threading.Lock()
        self._kept: dict[int, DenseRows] = {}

    def share(self, room: int) -> None:
        """One more evaluator takes part, and brings `room` bytes."""
        with self._lock:
            self._sharing += 1
            self._room += room

    def of(self, number: int) -> DenseRows | None:
        """What was kept of batch `number`."""
        return self._kept.get(number)

    def keep(self, number: int, rows: DenseRows) -> None:
        """Keep what batch `number` has, if that leaves room for what each evaluator holds while it visits another."""
        size = sum(tensor.nbytes for tensor in rows)
        with self._lock:
            if number not in self._kept and (1 + self._sharing) * size <= self._room:
                self._room -= size
                self._kept[number] = rows
