"""How alike metrics rank units."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from shallower.scores import ScoreSheet


@dataclass(frozen=True)
class RankCorrelation:
    """Of two metrics over the units that both score: Spearman's rho and Kendall's tau-b.

    None where fewer than three units have a value, or all have the same.
    """

    first: str
    second: str
    spearman: float | None
    kendall: float | None


def rank_correlations(sheet: ScoreSheet) -> tuple[RankCorrelation, ...]:
    """Every pair of metrics of a sheet, in its order. A unit without a value (NaN) is left out of its pairs."""
    found = []
    for first, second in itertools.combinations(sheet.scores, 2):
        left, right = first.units, second.units
        pairs = [(left[unit], right[unit]) for unit in left if unit in right]
        values = np.array([pair for pair in pairs if not any(map(math.isnan, pair))])
        if len(values) < 3 or any(len(set(column)) == 1 for column in values.T.tolist()):
            found.append(RankCorrelation(first.metric, second.metric, None, None))
            continue
        spearman = float(stats.spearmanr(values[:, 0], values[:, 1]).statistic)
        kendall = float(stats.kendalltau(values[:, 0], values[:, 1]).statistic)
        found.append(RankCorrelation(first.metric, second.metric, spearman, kendall))
    return tuple(found)
