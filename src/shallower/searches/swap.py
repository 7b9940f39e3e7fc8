"""Local exchange until no exchange helps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

from shallower.budget import Budget
from shallower.exchange import exchanges
from shallower.registry import Above, search
from shallower.searches import Losses, best
from shallower.units import Unit


@search("swap", starts="greedy")
def swap(
    units: Sequence[Unit],
    budget: Budget,
    losses: Losses,
    start: frozenset[Unit],
    *,
    rounds: Annotated[int, Above(0)] = 20,
) -> Iterator[frozenset[Unit]]:
    """Exchange one removed unit for one that is kept as long as the best exchange lowers the loss.

    Starts from the search before it (`--search greedy,swap`), by default from greedy. rounds: exchanges at most.
    Exchanges race: one that gains less than what a race calls a tie may be passed over, and none is made for nothing.
    """
    removed = start
    for _ in range(rounds):
        candidates = [removed, *exchanges(units, budget, removed)]
        chosen = best(candidates, losses(candidates, keep=1))
        if chosen != removed:
            chosen = best([removed, chosen], losses([removed, chosen]))  # a race may call a tie what is a little worse
        if chosen == removed:
            return
        removed = chosen
        yield removed
