"""The baseline that everything must beat."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

from shallower.budget import Budget
from shallower.exchange import in_turn
from shallower.registry import search
from shallower.units import Unit


@search("random")
def random(units: Sequence[Unit], budget: Budget, rng: Random) -> Iterator[frozenset[Unit]]:
    """Remove units drawn at random."""
    return in_turn(rng.sample(list(units), len(units)), budget)
