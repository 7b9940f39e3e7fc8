"""Two models on the same items: how far apart they are, and whether that could be chance.

The items were the same for both, so what counts is the spread of the differences, which is much smaller than that of
either model: paired errors tell models apart that unpaired ones cannot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

SIGNIFICANT = 0.05
RESAMPLES = 2000
FEW = 20  # items; with fewer, resampling is too sure of itself


@dataclass(frozen=True)
class Difference:
    """Second model minus first. error: paired standard error. p: the probability of a difference as large by chance
    alone, None where there is nothing to compare. test: how it was found.
    """

    value: float
    error: float | None
    p: float | None
    test: str

    @property
    def significant(self) -> bool:
        return self.p is not None and self.p < SIGNIFICANT

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "significant": self.significant}


def paired(first: Sequence[float], second: Sequence[float], weights: Sequence[float] | None = None) -> Difference:
    """Compare the means of values of the same items.

    weights: what each item counts, such as tokens of a window; by default all the same. Values that are all 0 or 1 are
    compared by McNemar's exact test, others by a bootstrap of the paired differences (2,000 resamples), or, where there
    are fewer than 20, by Student's t.

    Raises ValueError when there are not as many items.
    """
    if len(first) != len(second) or not len(first):
        raise ValueError(f"{len(first)} and {len(second)} items cannot be paired")
    one, other = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        return Difference(math.nan, None, None, "none: a value is infinite")
    shares = np.ones(len(one)) if weights is None else np.asarray(weights, dtype=np.float64)
    differences = other - one
    mean = float((shares * differences).sum() / shares.sum())
    if len(one) < 2:
        return Difference(mean, None, None, "none: a single item")
    spread = float((shares**2 * (differences - mean) ** 2).sum())
    error = math.sqrt(spread * len(one) / (len(one) - 1)) / float(shares.sum())
    if weights is None and np.isin(one, (0, 1)).all() and np.isin(other, (0, 1)).all():
        gained, lost = int((differences > 0).sum()), int((differences < 0).sum())
        p = float(stats.binomtest(min(gained, lost), gained + lost).pvalue) if gained + lost else 1.0
        return Difference(mean, error, p, "McNemar, exact")
    if len(one) < FEW:
        p = 2 * float(stats.t.sf(abs(mean) / error, len(one) - 1)) if error else float(mean == 0)
        return Difference(mean, error, p, "paired t")
    return Difference(mean, error, _bootstrap(differences, shares, mean), "paired bootstrap")


def _bootstrap(differences: np.ndarray[Any, Any], shares: np.ndarray[Any, Any], mean: float) -> float:
    """Two-sided p: how often the resampled mean is on the other side of 0."""
    if not differences.any():
        return 1.0
    drawn = stats.bootstrap(
        (shares * differences, shares),
        lambda weighted, total, axis: weighted.sum(axis) / total.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, 2_000_000 // len(differences)),
        method="percentile",
        rng=np.random.default_rng(0),
    ).bootstrap_distribution
    beyond = int((drawn <= 0).sum()) if mean > 0 else int((drawn >= 0).sum())
    return min(1.0, 2 * (beyond + 1) / (RESAMPLES + 1))
