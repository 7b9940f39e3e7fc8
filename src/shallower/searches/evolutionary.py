"""(1 + λ) evolution with level-switch mutation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import Annotated

from shallower.budget import Budget
from shallower.exchange import random_exchange
from shallower.registry import Above, search
from shallower.searches import Losses, best
from shallower.units import Unit


@search("evolutionary", source="arXiv:2410.14649", published=("EvoPress",), starts="random")
def evolutionary(
    units: Sequence[Unit],
    budget: Budget,
    losses: Losses,
    start: frozenset[Unit],
    rng: Random,
    *,
    generations: Annotated[int, Above(0)] = 50,
    offspring: Annotated[int, Above(0)] = 16,
    patience: Annotated[int, Above(0)] = 15,
) -> Iterator[frozenset[Unit]]:
    """EvoPress: each generation switches a few removed units of the parent with kept ones; the best of all lives on.

    The number of switches is the smaller of two draws from 1 to 3, so that most offspring are close. Selection on
    growing token budgets is the engine's racing. patience: generations without a better child before it ends. Starts
    from the search before it, by default from a random set.
    """
    parent, stale = start, 0
    for _ in range(generations):
        children = list(dict.fromkeys(_mutated(units, budget, parent, rng) for _ in range(offspring)))
        candidates = [parent, *(child for child in children if child != parent)]
        chosen = best(candidates, losses(candidates, keep=1))
        if chosen != parent:
            chosen = best([parent, chosen], losses([parent, chosen]))  # a race may call a tie what is a little worse
        stale = stale + 1 if chosen == parent else 0
        if stale >= patience:
            return
        if chosen != parent:
            parent = chosen
            yield parent


def _mutated(units: Sequence[Unit], budget: Budget, parent: frozenset[Unit], rng: Random) -> frozenset[Unit]:
    child = parent
    for _ in range(min(rng.randint(1, 3), rng.randint(1, 3))):
        child = random_exchange(units, budget, child, rng)
    return child
