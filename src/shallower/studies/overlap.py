"""How alike plans are when only one thing about them differs."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau

from shallower.studies.result import FACTORS, Result, grouped
from shallower.units import Unit, sublayers_of

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate with the bounds of its bootstrap interval, which are nan where too little was measured for one."""

    value: float
    low: float
    high: float

    def told(self, form: Callable[[float], str]) -> str:
        """As `value [low, high]`, with `–` for what is not known."""
        if math.isnan(self.value):
            return "–"
        return f"{form(self.value)} [{'–' if math.isnan(self.low) else f'{form(self.low)}, {form(self.high)}'}]"


@dataclass(frozen=True)
class Agreement:
    """How alike the plans of cells are that differ in `factor` and in nothing else.

    jaccard: shared sublayers / all sublayers of both. order: Kendall's tau-b of the removal order (the sublayers of a
    block are tied, and those that stay come last, tied); nan where a plan has no order to speak of. pairs: of cells.
    groups: sets of cells that such pairs come from.
    """

    factor: str
    jaccard: Interval
    order: Interval
    pairs: int
    groups: int


def jaccard(first: Collection[Unit], second: Collection[Unit]) -> float:
    """Sublayers in both / sublayers in either; 1 for two empty sets. Whole blocks may as well be counted as blocks."""
    one, other = sublayers_of(first), sublayers_of(second)
    return len(one & other) / len(one | other) if one | other else 1.0


def order_agreement(first: Sequence[Unit], second: Sequence[Unit]) -> float:
    """Kendall's tau-b of the places that two orders give to the sublayers that either removes; nan where one of them
    gives all the same place, as for a single unit.
    """
    parts = sorted(sublayers_of([*first, *second]))

    def places(order: Sequence[Unit]) -> list[int]:
        known = {part: place for place, unit in enumerate(order) for part in unit.sublayers}
        return [known.get(part, len(order)) for part in parts]

    both = places(first), places(second)
    if any(len(set(each)) < 2 for each in both):
        return math.nan  # one place is no order
    return float(kendalltau(*both).statistic)


def agreement(results: Sequence[Result], factors: Sequence[str] = FACTORS, seed: int = 0) -> list[Agreement]:
    """For each factor that takes several levels, how alike plans are across its levels with all else equal.

    The interval is a bootstrap over groups: cells of one group share everything but the factor, and their pairs are not
    independent of each other. Cells whose search draws are left out where seeds are compared: there the seed would be
    that of the calibration set and of the draws.
    """
    return [found for factor in factors if (found := _across(results, factor, seed)) is not None]


def _across(results: Sequence[Result], factor: str, seed: int) -> Agreement | None:
    if factor == "seed":
        results = [result for result in results if not result.cell.draws]
    others = [name for name in FACTORS if name != factor]
    groups = grouped(results, lambda result: (result.cell.stratum, *(result.cell.level(name) for name in others)))
    pairs = [list(combinations(group, 2)) for group in groups.values() if len(group) > 1]
    if not pairs:
        return None

    def over(measure: Callable[[Result, Result], float]) -> Interval:
        return mean_interval([np.array([measure(*pair) for pair in group]) for group in pairs], seed)

    return Agreement(
        factor,
        over(lambda first, second: jaccard(first.removed, second.removed)),
        over(lambda first, second: order_agreement(first.order, second.order)),
        sum(map(len, pairs)),
        len(pairs),
    )


def mean_interval(groups: Sequence[NDArray[np.float64]], seed: int = 0) -> Interval:
    """Mean of all values, with a bootstrap interval that draws whole groups, which takes two of them. Values that are
    nan do not count.
    """
    sums = np.array([np.nansum(group) for group in groups])
    counts = np.array([np.count_nonzero(~np.isnan(group)) for group in groups])
    if not counts.sum():
        return Interval(float("nan"), float("nan"), float("nan"))
    if np.count_nonzero(counts) < 2:
        return Interval(float(sums.sum() / counts.sum()), float("nan"), float("nan"))
    drawn = np.random.default_rng(seed).integers(len(groups), size=(RESAMPLES, len(groups)))
    total = counts[drawn].sum(1)
    means = np.where(total, sums[drawn].sum(1) / np.maximum(total, 1), np.nan)
    return Interval(float(sums.sum() / counts.sum()), *percentiles(means))


def percentiles(values: NDArray[np.float64]) -> tuple[float, float]:
    """The bounds between which the middle `CONFIDENCE` of resampled values lie."""
    low, high = np.nanquantile(values, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return float(low), float(high)
