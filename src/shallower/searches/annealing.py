"""Simulated annealing over exchanges."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from random import Random
from typing import Annotated

from shallower.budget import Budget
from shallower.exchange import random_exchange
from shallower.registry import Above, search
from shallower.searches import Losses
from shallower.units import Unit


@search("annealing", starts="random")
def annealing(
    units: Sequence[Unit],
    budget: Budget,
    losses: Losses,
    start: frozenset[Unit],
    rng: Random,
    *,
    steps: Annotated[int, Above(0)] = 200,
    hot: Annotated[float, Above(0)] = 0.1,
    cold: Annotated[float, Above(0)] = 0.002,
) -> Iterator[frozenset[Unit]]:
    """Walk by random exchanges; a worse set is accepted with probability exp(-increase / temperature).

    hot, cold: first and last temperature, in units of the objective. Yields each new best. Starts from the search
    before it, by default from a random set.
    """
    [current] = losses([start])
    removed, best = start, current
    for step in range(steps):
        temperature = hot * (cold / hot) ** (step / max(steps - 1, 1))
        neighbour = random_exchange(units, budget, removed, rng)
        [loss] = losses([neighbour])
        if loss <= current or rng.random() < math.exp((current - loss) / temperature):
            removed, current = neighbour, loss
        if loss < best:
            best = loss
            yield neighbour
