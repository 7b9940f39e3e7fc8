"""Streams at nodes of the prefix tree, kept from one question to the next within a number of bytes.

What a search asks next mostly agrees, at the shallow end, with what it asked before: greedy adds a unit to a set whose
neighbours were all measured in the round before, an offspring differs from its parent in a few places. A set of removed
units whose shallow part was run once starts from there.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable

from torch import Tensor

Prefix = str  # what the first blocks do, one character each


class States:
    """Hidden states under (batch, prefix). Safe for several threads that work on different batches.

    When the bytes are used up, a batch gives up its own states that its present visit has no use for, the longest
    unused first. States of other batches stay: taking turns would otherwise throw away what is needed next.
    """

    def __init__(self, budget: int) -> None:
        """Hold at most `budget` bytes."""
        self.left = budget
        self._lock = threading.Lock()
        self._kept: dict[int, OrderedDict[Prefix, Tensor]] = {}
        self._wanted: dict[int, set[Prefix]] = {}

    def begin(self, number: int, routes: Iterable[str], passed_over: str) -> None:
        """A visit of batch `number` begins that will ask for `routes`: what it can start from is not given up."""
        kept = self._kept.setdefault(number, OrderedDict())
        wanted: set[Prefix] = set()
        for route in routes:
            for depth in range(len(route), 0, -1):
                key = route[:depth].rstrip(passed_over)
                if key in kept:
                    wanted.add(key)
                    break
        self._wanted[number] = wanted

    def get(self, number: int, prefix: Prefix) -> Tensor | None:
        kept = self._kept.get(number)
        if kept is None or prefix not in kept:
            return None
        kept.move_to_end(prefix)
        self._wanted[number].add(prefix)
        return kept[prefix]

    def put(self, number: int, prefix: Prefix, state: Tensor) -> None:
        """Keep a state if there is room, or room can be made."""
        kept, wanted = self._kept[number], self._wanted[number]
        with self._lock:
            while self.left < state.nbytes and kept:
                oldest = next(iter(kept))
                if oldest in wanted:
                    return
                self.left += kept.pop(oldest).nbytes
            if self.left < state.nbytes or prefix in kept:
                return
            self.left -= state.nbytes
        kept[prefix] = state
        wanted.add(prefix)
