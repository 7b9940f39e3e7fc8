"""How alike plans are when only one thing about them differs."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.stats import kendalltau

from shallower.studies.interval import Interval, mean_interval
from shallower.studies.result import FACTORS, Cell, Result, grouped
from shallower.units import Unit, sublayers_of


@dataclass(frozen=True)
class Agreement:
    """How alike the plans of cells are that differ in `factor` and in nothing else.

    jaccard: shared sublayers / all sublayers of both. order: Kendall's tau-b of the removal order (the sublayers of a
    block are tied, and those that stay come last, tied); nan where a plan has no order to speak of, or one that depends
    on more than its set does. pairs: of plans that depend on the factor. groups: sets of cells that such pairs come
    from.
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

    Cells whose plan does not depend on the factor are left out, and so are, where seeds are compared, those whose
    search draws: there the seed would be that of the calibration set and of the draws. Two plans are compared once,
    however many cells have them.

    The interval is a bootstrap over groups: cells of one group share everything but the factor, and their pairs are not
    independent of each other.
    """
    return [found for factor in factors if (found := _across(results, factor, seed)) is not None]


def _across(results: Sequence[Result], factor: str, seed: int) -> Agreement | None:
    reading = [result for result in results if result.cell.compared(factor) is not None]
    groups: dict[Hashable, list[tuple[Result, Result]]] = {}
    compared: set[frozenset[Hashable]] = set()
    for alike in grouped(reading, lambda result: result.cell.apart_from(factor)).values():
        group = groups.setdefault(_group([result.cell for result in alike], factor), [])
        for pair in combinations(alike, 2):
            plans = frozenset(result.cell.same_plan for result in pair)
            if plans not in compared:
                compared.add(plans)
                group.append(pair)
    pairs = [group for group in groups.values() if group]
    if not pairs:
        return None

    def over(measure: Callable[[Result, Result], float]) -> Interval:
        return mean_interval([np.array([measure(*pair) for pair in group]) for group in pairs], seed)

    return Agreement(
        factor,
        over(lambda first, second: jaccard(first.removed, second.removed)),
        over(_order),
        sum(map(len, pairs)),
        len(pairs),
    )


def _order(first: Result, second: Result) -> float:
    ordered = first.cell.ordered and second.cell.ordered
    return order_agreement(first.order, second.order) if ordered else math.nan


def _group(alike: Sequence[Cell], factor: str) -> Hashable:
    """What cells that differ in `factor` only share with those of their group: what all of them depend on.

    Of several searches one may ignore the objective; then all objectives are one group, as its plan is in all of their
    pairs. A plan that no calibration set changes (`last`) joins no groups.
    """
    calibrated = [cell for cell in alike if "text" in cell.reads]
    shared = set(FACTORS).intersection(*(cell.reads for cell in calibrated)) - {factor}
    return alike[0].stratum, tuple(getattr(alike[0], name) for name in FACTORS if name in shared)
