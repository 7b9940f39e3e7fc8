"""Try everything: the oracle for small problems."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Annotated

from shallower.budget import Budget
from shallower.errors import BudgetError
from shallower.registry import Above, search
from shallower.searches import Losses, best
from shallower.units import Unit


@search("exhaustive")
def exhaustive(
    units: Sequence[Unit], budget: Budget, losses: Losses, *, limit: Annotated[int, Above(0)] = 20_000
) -> Iterator[frozenset[Unit]]:
    """Measure every smallest set that meets the budget, without races, and take the best on all of the text.

    limit: sets at most; a larger problem is refused.
    """
    candidates = list(itertools.islice(_candidates(units, budget), limit + 1))
    if len(candidates) > limit:
        raise BudgetError(
            f"more than {limit:,} sets of {len(units)} units remove {budget}: too many to try them all; "
            "use --search beam or greedy,swap, or raise --set limit=…."
        )
    if candidates:
        measured = losses(candidates, keep=1, race=False)
        yield best(candidates, measured)


def _candidates(units: Sequence[Unit], budget: Budget) -> Iterator[frozenset[Unit]]:
    """Every set that just meets the budget, each once."""
    alike = all(len({cost.cost[unit] for unit in units}) == 1 for cost in budget.limits)
    if not alike or any(one.overlaps(other) for one, other in itertools.combinations(units, 2)):
        return _meeting(units, budget, frozenset())
    size = next((size for size in range(1, len(units) + 1) if budget.met(units[:size])), len(units) + 1)
    return map(frozenset, itertools.combinations(units, size))


def _meeting(units: Sequence[Unit], budget: Budget, removed: frozenset[Unit]) -> Iterator[frozenset[Unit]]:
    """Every set made of `removed` and some of `units` that just meets the budget, each once."""
    for place, unit in enumerate(units):
        if not budget.met(removed.union(units[place:])):
            return  # not even with all that is left
        if budget.admits(removed, unit):
            grown = removed | {unit}
            if not budget.met(grown):
                yield from _meeting(units[place + 1 :], budget, grown)
            elif not budget.superfluous(grown):
                yield grown
