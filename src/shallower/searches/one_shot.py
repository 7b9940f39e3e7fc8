"""Rank once, take the least important."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from shallower.budget import Budget
from shallower.registry import search
from shallower.units import Unit


@search("one-shot", source="arXiv:2403.03853, arXiv:2402.02834", metric="cosine")
def one_shot(scores: Mapping[Unit, float], budget: Budget) -> Iterator[frozenset[Unit]]:
    """Remove units from the least important on, by one metric, measured once; of equals the deeper goes first."""
    removed: frozenset[Unit] = frozenset()
    for unit in sorted(scores, key=lambda unit: (scores[unit], -unit.index)):
        if budget.met(removed):
            return
        if budget.admits(removed, unit):
            removed |= {unit}
            yield removed
