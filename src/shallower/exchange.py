"""Sets one exchange away: a removed unit back in, another one out."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from shallower.budget import Budget
from shallower.units import Unit


def exchanges(units: Sequence[Unit], budget: Budget, removed: frozenset[Unit]) -> list[frozenset[Unit]]:
    """Every set that differs from `removed` by one exchange and still meets the budget."""
    return [found for back in sorted(removed) for found in _without(units, budget, removed, back)]


def random_exchange(units: Sequence[Unit], budget: Budget, removed: frozenset[Unit], rng: Random) -> frozenset[Unit]:
    """One of them at random; `removed` itself when the drawn unit has no replacement."""
    found = _without(units, budget, removed, rng.choice(sorted(removed)))
    return rng.choice(found) if found else removed


def _without(units: Sequence[Unit], budget: Budget, removed: frozenset[Unit], back: Unit) -> list[frozenset[Unit]]:
    rest = removed - {back}
    return [rest | {unit} for unit in units if unit != back and budget.admits(rest, unit) and budget.met(rest | {unit})]
