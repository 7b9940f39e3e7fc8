"""The cheapest set by additive scores, exactly."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint
from scipy.optimize import milp as solve

from shallower.budget import TOLERANCE, Budget, Limit
from shallower.errors import BudgetError
from shallower.registry import search
from shallower.units import Unit

SCALE = 1e3  # what a budget asks for, in the solver's eyes: its tolerance is absolute, and small against this
MARGIN = 1e-4  # by how much a budget is missed at least where it is missed and costs are no multiples of anything
MOST_CUTS = 200  # sets with a worthless unit that are ruled out one by one; two or three are usual


@search("milp", metric="loss", unordered=True)
def milp(scores: Mapping[Unit, float], budget: Budget) -> Iterator[frozenset[Unit]]:
    """Minimise the sum of scores of what is removed, subject to every budget at once, by integer programming.

    Units that have a sublayer in common, such as a block and its attention, are not removed together. A unit whose
    removal would better the model has a negative score: it is taken for that in the place of others, but not on top of
    them. So the minimum is over those sets that would miss the budget with any one unit less. Units without which the
    model overflows stay.
    """
    units = [unit for unit in sorted(scores) if math.isfinite(scores[unit])]
    useful = [unit for unit in units if budget.admits((), unit)]
    left = f"the {len(units)} units that may go"
    if len(units) < len(scores):
        left += f" (without {len(scores) - len(units)} more the model overflows)"
    removed = _cheapest(useful, scores, budget) if useful else None
    if removed is None:
        raise BudgetError(f"no set of {left} removes {budget}; remove less or protect fewer.")
    yield removed


def _cheapest(units: Sequence[Unit], scores: Mapping[Unit, float], budget: Budget) -> frozenset[Unit] | None:
    """The set with the least sum of scores that just meets the budget; None if there is none.

    The solver tells sums apart by a millionth of the largest score. A score above the rest by more than that would
    leave the choice among these to chance, so units that cost more than a whole set that was found are left out, and
    the others looked at again.
    """
    found = _just_meeting(units, scores, budget)
    if found is None:
        return None
    most = math.fsum(scores[unit] for unit in found) - math.fsum(min(scores[unit], 0.0) for unit in units)
    possible = [unit for unit in units if unit in found or scores[unit] <= most]
    if len(possible) == len(units):
        return found
    return _cheapest(possible, scores, budget) or found


def _just_meeting(units: Sequence[Unit], scores: Mapping[Unit, float], budget: Budget) -> frozenset[Unit] | None:
    """What the solver finds, without those sets that its tolerance lets pass although one of their units is worthless.

    Such a set is ruled out with all that hold it, in which the unit is worthless, too.
    """
    values = [scores[unit] for unit in units]
    cuts: list[frozenset[Unit]] = []
    found = _solved(units, values, budget, cuts)
    while found is not None and budget.superfluous(found) and len(cuts) < MOST_CUTS:
        cuts.append(found)
        found = _solved(units, values, budget, cuts)
    while found is not None and (spare := budget.superfluous(found)):
        found -= {max(spare, key=scores.__getitem__)}
    return found


def _solved(
    units: Sequence[Unit], values: Sequence[float], budget: Budget, cuts: Sequence[frozenset[Unit]]
) -> frozenset[Unit] | None:
    """What the solver takes for the set with the least sum of `values` that just meets the budget, and holds none of
    `cuts`.
    """
    if not all(any(limit.cost[unit] for unit in units) for limit in budget.limits):
        return None
    value = np.array(values)
    missing = len(budget.limits) * len(units) if (value < 0).any() else 0  # else what needs not go only costs
    width = len(units) + missing
    scaled = [_scaled(limit, units) for limit in budget.limits]
    constraints = [LinearConstraint(_row(width, costs), lb=SCALE * (1 - TOLERANCE)) for costs, _ in scaled]
    overlapping = (pair for pair in itertools.combinations(units, 2) if pair[0].overlaps(pair[1]))
    for together in (*overlapping, *cuts):  # not all of these at once
        row = _row(width, [float(unit in together) for unit in units])
        constraints.append(LinearConstraint(row, ub=len(together) - 1.0))
    if missing:
        constraints += _none_superfluous(len(units), scaled)
    size = max(float(abs(value).max()), 1e-9)
    found = solve(
        _row(width, value / size + 1e-6 / len(units)),  # of equal sums the smaller set
        constraints=constraints,
        integrality=np.ones(width),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        return None
    return frozenset(unit for unit, chosen in zip(units, found.x[: len(units)], strict=True) if chosen > 0.5)


def _none_superfluous(number: int, scaled: Sequence[tuple[list[float], float]]) -> list[LinearConstraint]:
    """For each of `number` units that goes, there is a budget that would be missed without it. scaled: by `_scaled`.

    One more variable for each unit and budget says which: it may be 1 only if the budget is missed by what else goes.
    """
    width = number * (1 + len(scaled))
    constraints = []
    for place in range(number):
        witnesses = [number * (1 + limit) + place for limit in range(len(scaled))]
        needed = np.zeros(width)
        needed[place], needed[witnesses] = 1.0, -1.0
        constraints.append(LinearConstraint(needed, ub=0.0))  # the unit stays, or one of the budgets is the witness
        for (costs, margin), witness in zip(scaled, witnesses, strict=True):
            others = _row(width, costs)
            others[place] = 0.0
            others[witness] = most = others.sum()  # enough to lift the constraint where the variable is 0
            constraints.append(LinearConstraint(others, ub=SCALE - margin + most))
    return constraints


def _scaled(limit: Limit, units: Sequence[Unit]) -> tuple[list[float], float]:
    """What each unit gives of what the limit asks for, which is `SCALE`, and by how much that is missed at least.

    Costs are multiples of something, mostly of a large one. Where a limit between two multiples means the upper one, it
    is missed by a whole step, which the solver's tolerance cannot bridge.
    """
    costs = [limit.cost[unit] for unit in units]
    halves = [round(2 * cost) for cost in costs]  # a sublayer is half a block
    if any(2 * cost != half for cost, half in zip(costs, halves, strict=True)):
        return [cost / limit.least * SCALE for cost in costs], MARGIN
    step = math.gcd(*halves) / 2
    least = step * math.ceil(limit.least * (1 - TOLERANCE) / step)
    return [cost / least * SCALE for cost in costs], max(SCALE * step / least / 2, MARGIN)


def _row(width: int, values: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    """`values` of the units, and 0 for every other variable."""
    row = np.zeros(width)
    row[: len(values)] = values
    return row
