"""Rank once, take the least important."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from shallower.budget import Budget
from shallower.exchange import in_turn
from shallower.registry import search
from shallower.units import Unit


@search("one-shot", source="arXiv:2403.03853, arXiv:2402.02834", metric="cosine")
def one_shot(scores: Mapping[Unit, float], budget: Budget) -> Iterator[frozenset[Unit]]:
    """Remove units from the least important on, by one metric, measured once; of equals the deeper goes first."""
    return in_turn(sorted(scores, key=lambda unit: (scores[unit], -unit.index)), budget)
