"""Estimates with the bootstrap interval that shows how far to trust them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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
