"""Greedy with several sets in hand."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Annotated

from shallower.budget import Budget
from shallower.registry import Above, search
from shallower.searches import Losses, best
from shallower.units import Unit


@search("beam")
def beam(
    units: Sequence[Unit], budget: Budget, losses: Losses, *, width: Annotated[int, Above(0)] = 4
) -> Iterator[frozenset[Unit]]:
    """Grow the `width` best sets at once by every unit, and keep the `width` best of the results.

    Greedy is `width` 1. Sets that differ in size are compared only at equal numbers of removals; the first generation
    in which one of the `width` best meets the budget decides, between those of them that do, on all of the text.
    """
    hand: list[frozenset[Unit]] = [frozenset()]
    while True:
        candidates = list(
            dict.fromkeys(removed | {unit} for removed in hand for unit in units if budget.admits(removed, unit))
        )
        if not candidates:
            return
        measured = losses(candidates, keep=width)
        ranked = sorted(range(len(candidates)), key=measured.__getitem__)
        finite = [index for index in ranked[:width] if math.isfinite(measured[index])]
        hand = [candidates[index] for index in finite or ranked[:1]]  # where all overflow, the caller says so
        meeting = [removed for removed in hand if budget.met(removed)]
        if meeting:  # the race told who is among the best, not who is the best
            yield best(meeting, losses(meeting))
            return
        yield hand[0]
