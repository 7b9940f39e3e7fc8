"""Growing sets, and sets one exchange away: a removed unit back in, another one out.

Where units differ in size, what comes in may be more or less than what goes out: a small unit's place is taken by a
large one and further small ones come back, or a random exchange takes several small ones for a large one. So no set
that an exchange makes removes a unit without which the budget would be met, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from random import Random

from shallower.budget import Budget
from shallower.units import Unit


def in_turn(order: Iterable[Unit], budget: Budget) -> Iterator[frozenset[Unit]]:
    """The sets that grow by the units of `order`, less those that help no more, until the budget is met."""
    removed: frozenset[Unit] = frozenset()
    for unit in order:
        if budget.met(removed):
            return
        if budget.admits(removed, unit):
            removed |= {unit}
            yield removed


def exchanges(units: Sequence[Unit], budget: Budget, removed: frozenset[Unit]) -> list[frozenset[Unit]]:
    """Every set that differs from `removed` by one exchange and still meets the budget, each once.

    Of several units that need not go any more the first by depth comes back, as more depends on it.
    """
    found: dict[frozenset[Unit], None] = {}
    for back in sorted(removed):
        rest = removed - {back}
        for unit in _fitting(units, budget, rest, back):
            if budget.met(rest | {unit}):
                found[_least(budget, rest | {unit})] = None
    return list(found)


def random_exchange(units: Sequence[Unit], budget: Budget, removed: frozenset[Unit], rng: Random) -> frozenset[Unit]:
    """One at random; `removed` itself when the drawn unit has no replacement."""
    back = rng.choice(sorted(removed))
    changed = removed - {back}
    while not budget.met(changed):
        fitting = _fitting(units, budget, changed, back)
        if not fitting:
            return removed
        changed |= {rng.choice(fitting)}
    while spare := budget.superfluous(changed):
        changed -= {rng.choice(spare)}
    return changed


def _fitting(units: Sequence[Unit], budget: Budget, rest: frozenset[Unit], back: Unit) -> list[Unit]:
    return [unit for unit in units if unit != back and budget.admits(rest, unit)]


def _least(budget: Budget, removed: frozenset[Unit]) -> frozenset[Unit]:
    while spare := budget.superfluous(removed):
        removed -= {spare[0]}
    return removed
