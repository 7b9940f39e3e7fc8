"""Try everything: the oracle for small problems."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from shallower.budget import Budget
from shallower.errors import BudgetError
from shallower.registry import search
from shallower.searches import Losses
from shallower.units import Unit


@search("exhaustive")
def exhaustive(
    units: Sequence[Unit], budget: Budget, losses: Losses, *, limit: int = 20_000
) -> Iterator[frozenset[Unit]]:
    """Measure every smallest set that meets the budget, and take the best.

    limit: sets at most; a larger problem is refused.
    """
    candidates = list(itertools.islice(_meeting(units, budget, frozenset()), limit + 1))
    if len(candidates) > limit:
        raise BudgetError(
            f"more than {limit:,} sets of {len(units)} units remove {budget}: too many to try them all; "
            "use --search beam or greedy,swap, or raise --set limit=…."
        )
    if candidates:
        measured = losses(candidates, keep=1)
        yield candidates[min(range(len(candidates)), key=measured.__getitem__)]


def _meeting(units: Sequence[Unit], budget: Budget, removed: frozenset[Unit]) -> Iterator[frozenset[Unit]]:
    """Every set made of `removed` and some of `units` that just meets the budget, each once."""
    for place, unit in enumerate(units):
        if budget.admits(removed, unit):
            grown = removed | {unit}
            if not budget.met(grown):
                yield from _meeting(units[place + 1 :], budget, grown)
            elif _just_meets(budget, grown):
                yield grown


def _just_meets(budget: Budget, removed: frozenset[Unit]) -> bool:
    """The budget is met, and would not be with any one unit less."""
    return budget.met(removed) and not any(budget.met(removed - {unit}) for unit in removed)
