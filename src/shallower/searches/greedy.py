"""Remove, measure again, repeat."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from shallower.budget import Budget
from shallower.registry import search
from shallower.searches import Losses, best
from shallower.units import Unit


@search("greedy", source="arXiv:2402.09025, arXiv:2406.10594", published=("SLEB", "BlockPruner"))
def greedy(units: Sequence[Unit], budget: Budget, losses: Losses) -> Iterator[frozenset[Unit]]:
    """Remove the unit whose absence costs least, then measure the rest again (SLEB, BlockPruner).

    Each step is a race, so it may take one that costs a little more; with `--exact` it does not.
    """
    removed: frozenset[Unit] = frozenset()
    while not budget.met(removed):
        candidates = [removed | {unit} for unit in units if budget.admits(removed, unit)]
        if not candidates:
            return
        measured = losses(candidates, keep=1)
        removed = best(candidates, measured)
        yield removed
