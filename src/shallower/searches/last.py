"""Drop from the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from shallower.budget import Budget
from shallower.exchange import in_turn
from shallower.registry import search
from shallower.units import Unit


@search("last", source="arXiv:2403.17887", keeps_last_block=True)
def last(units: Sequence[Unit], budget: Budget) -> Iterator[frozenset[Unit]]:
    """Remove the deepest units, but never the last block's, which prepares the output."""
    return in_turn(sorted(units, reverse=True), budget)
