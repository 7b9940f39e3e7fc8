"""The cheapest set by additive scores, exactly."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import numpy as np
from scipy.optimize import Bounds, LinearConstraint
from scipy.optimize import milp as solve

from shallower.budget import Budget
from shallower.errors import BudgetError
from shallower.registry import search
from shallower.units import Unit


@search("milp", metric="loss")
def milp(scores: Mapping[Unit, float], budget: Budget) -> Iterator[frozenset[Unit]]:
    """Minimise the sum of scores of what is removed, subject to every budget at once, by integer programming.

    Units that have a sublayer in common, such as a block and its attention, are not removed together.
    """
    units = sorted(scores)
    least = 1e-9 + 1e-6 * max(map(abs, scores.values()))  # of equal sums the smaller set; never more than was asked for
    constraints = [
        LinearConstraint(np.array([limit.cost[unit] for unit in units]), lb=limit.least) for limit in budget.limits
    ]
    for one, other in itertools.combinations(units, 2):
        if one.overlaps(other):
            constraints.append(LinearConstraint(np.array([float(unit in (one, other)) for unit in units]), ub=1.0))
    found = solve(
        np.array([max(scores[unit], 0.0) for unit in units]) + least / len(units),
        constraints=constraints,
        integrality=np.ones(len(units)),
        bounds=Bounds(0, 1),
    )
    if found.x is None:
        raise BudgetError(f"no set of the {len(units)} units that may go removes {budget} ({found.message}).")
    removed = frozenset(unit for unit, chosen in zip(units, found.x, strict=True) if chosen > 0.5)
    for unit in sorted(
        removed, key=scores.__getitem__, reverse=True
    ):  # the solver's tolerance lets worthless units pass
        if budget.met(removed - {unit}):
            removed -= {unit}
    yield removed
