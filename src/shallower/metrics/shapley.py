"""Shapley values: what a unit is worth on average over what else may be missing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from random import Random
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from shallower import progress
from shallower.registry import Above, AtLeast, metric
from shallower.units import Unit

Removed = frozenset[Unit]
LossesOf = Callable[[Sequence[Removed]], list[float]]

ORDERS_AT_ONCE = 4  # asked for together: the more, the more the prefix tree shares; between questions it may end
FEWEST_ORDERS = 8  # below this two halves say little of each other


@metric("shapley", source="arXiv:2407.16286")
def shapley(
    units: Sequence[Unit],
    losses: LossesOf,
    rng: Random,
    *,
    samples: Annotated[int, Above(0)] = 22,
    max_removed: Annotated[int, Above(0)] = 4,
    stable: Annotated[float, AtLeast(0, 1)] = 0.95,
) -> dict[Unit, tuple[float, float | None]]:
    """How much the objective rises when a unit goes, averaged over what went before it.

    The Shapley value of each unit among `max_removed` that go in random order, averaged over all such groups with it.
    That is the mean of objective(S and the unit removed) - objective(S removed) over all S of each size below
    `max_removed`, each size weighing the same: the Shapley value of the whole model where all units may go, and
    leave-one-out for `max_removed=1`. A model without most of its blocks is noise, hence the limit.

    samples: random orders of all units at most. An order is cut into groups, and each group is removed one by one,
    forwards and then backwards (antithetic: what is before a unit in one is after it in the other). So each order gives
    every unit one independent and unbiased value. Where it takes no more, all sets are measured instead.
    stable: stop when the even and the odd orders rank the units alike, by Spearman's correlation; two runs of that
    length, being twice as long as a half, agree better. 0 takes all samples.

    Returns for each unit its value in the objective's unit, and its standard error over orders: 0 where all sets were
    measured, None after one order or an overflow.
    """
    together = min(max_removed, len(units))
    if sum(math.comb(len(units), size) for size in range(together + 1)) <= 2 * samples * len(units):
        return {unit: (value, 0.0) for unit, value in enumerated(units, losses, together).items()}
    values = sampled(units, losses, rng, samples, together, stable)
    return {unit: _mean_and_error(column) for unit, column in zip(units, values.T, strict=True)}


def enumerated(units: Sequence[Unit], losses: LossesOf, together: int) -> dict[Unit, float]:
    """The exact values, from every set of up to `together` units."""
    sets = [frozenset(chosen) for size in range(together + 1) for chosen in itertools.combinations(units, size)]
    loss = dict(zip(sets, losses(sets), strict=True))
    values = dict.fromkeys(units, 0.0)
    for removed in sets[1:]:
        choices = math.comb(len(units) - 1, len(removed) - 1)  # of what else of this size may be gone
        for unit in removed:
            values[unit] += _rise(loss, removed - {unit}, removed) / choices / together
    return values


def sampled(
    units: Sequence[Unit], losses: LossesOf, rng: Random, samples: int, together: int, stable: float
) -> NDArray[np.float64]:
    """One value of each unit for each order: float64 [orders, units], rows independent and each unbiased."""
    place = {unit: number for number, unit in enumerate(units)}
    values = np.empty((0, len(units)))
    with progress.task("sampling orders of removal", samples) as step:
        while len(values) < samples:
            orders = [_groups(units, together, rng) for _ in range(min(ORDERS_AT_ONCE, samples - len(values)))]
            walks = [walk for groups in orders for group in groups for walk in (group, group[::-1])]
            sets = list(dict.fromkeys(frozenset(walk[:size]) for walk in walks for size in range(together + 1)))
            loss = dict(zip(sets, losses(sets), strict=True))
            rows = np.zeros((len(orders), len(units)))
            for row, groups in zip(rows, orders, strict=True):
                counts = np.zeros(len(units))
                for group in groups:
                    for unit, rise in itertools.chain(_rises(group, loss), _rises(group[::-1], loss)):
                        row[place[unit]] += rise
                        counts[place[unit]] += 1
                row /= counts
            values = np.concatenate([values, rows])
            step(len(orders))
            if stable and len(values) >= FEWEST_ORDERS and rank_agreement(values) >= stable:
                break
    return values


def rank_agreement(values: NDArray[np.float64]) -> float:
    """Spearman's correlation between the units' means over even and odd orders. values: float64 [orders, units]."""
    from scipy.stats import spearmanr  # takes as long to import as the rest of the command line

    return float(spearmanr(values[::2].mean(axis=0), values[1::2].mean(axis=0)).statistic)


def _mean_and_error(values: NDArray[np.float64]) -> tuple[float, float | None]:
    known = len(values) > 1 and bool(np.isfinite(values).all())
    return float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values)) if known else None


def _groups(units: Sequence[Unit], together: int, rng: Random) -> list[list[Unit]]:
    """A random order of all units, cut into groups; the last one is filled up with others, and in random order."""
    order = rng.sample(list(units), len(units))
    groups = [order[start : start + together] for start in range(0, len(order), together)]
    missing = together - len(groups[-1])
    if missing:
        others = order[: len(order) - len(groups[-1])]
        groups[-1] = rng.sample([*groups[-1], *rng.sample(others, missing)], together)
    return groups


def _rises(walk: Sequence[Unit], loss: Mapping[Removed, float]) -> Iterator[tuple[Unit, float]]:
    """By how much each unit's removal raises the objective, removed one after another."""
    for size, unit in enumerate(walk):
        yield unit, _rise(loss, frozenset(walk[:size]), frozenset(walk[: size + 1]))


def _rise(loss: Mapping[Removed, float], before: Removed, after: Removed) -> float:
    """A model that has overflowed already gets no worse, where infinity minus infinity would be no number."""
    return 0.0 if loss[after] == loss[before] else loss[after] - loss[before]
