"""How much of an outcome is due to each factor: an analysis of variance with a bootstrap of its residuals."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from shallower.studies.interval import RESAMPLES, Interval, percentiles

Matrix = NDArray[np.float64]
RESIDUAL = "rest"


@dataclass(frozen=True)
class Share:
    """Part of the variance that a term explains, 0 to 1. term: a factor, two joined by ` × `, or `rest`."""

    term: str
    share: Interval


def decompose(outcome: Matrix, levels: Mapping[str, Sequence[Hashable]], seed: int = 0) -> list[Share]:
    """Shares of the variance of `outcome` by main effects and interactions of two factors, and what they leave.

    outcome: float64 [cells] or [cells, outcomes]; of several outcomes the sums of squares are added (a plan is one
    column a unit, 1 where it is removed: squared distances are then twice the number of units that differ). levels: of
    each factor, one a cell, None where it has none. Factors with one level are left out, and interactions that the
    cells cannot tell apart from main effects.

    Sums of squares are of type II: what a term adds to all terms that do not contain it. In a balanced grid they add
    up. The intervals redraw the residuals on the same grid; what that adds to a share on average (noise looks like an
    effect, and a redrawn outcome has it twice) is taken off the bounds. Where terms are as many as cells, interactions
    take in all noise, and bounds are nan. An outcome that does not vary has no shares: all are 0.
    """
    values = np.asarray(outcome, dtype=np.float64)
    values = values[:, None] if values.ndim == 1 else values
    cells = len(values)
    factors = [name for name, of in levels.items() if len(set(of) - {None}) > 1]
    codes = {name: _dummies(levels[name]) for name in factors}
    terms: dict[tuple[str, ...], Matrix] = {(name,): codes[name] for name in factors}
    for first, second in combinations(factors, 2):
        product = codes[first][:, :, None] * codes[second][:, None, :]
        terms[first, second] = product.reshape(cells, -1)
    bases: dict[tuple[str, ...], Matrix] = {}
    for term, columns in terms.items():
        others = [own for other, own in terms.items() if other != term and not set(term) < set(other)]
        bases[term] = _beyond(columns, np.hstack([np.ones((cells, 1)), *others]))
    bases = {term: basis for term, basis in bases.items() if basis.shape[1]}
    whole = _basis(np.hstack([np.ones((cells, 1)), *(terms[term] for term in bases)]))
    fitted = whole @ (whole.T @ values)
    left = values - fitted
    free = cells - whole.shape[1]
    names = [" × ".join(term) for term in bases]
    found = _shares(values[None], list(bases.values()), whole)[0]
    drawn = np.empty((0, len(found)))
    if free > 0 and np.abs(left).max() > 1e-12:
        spread = left * np.sqrt(cells / free)  # residuals of a fit are smaller than the errors
        index = np.random.default_rng(seed).integers(cells, size=(RESAMPLES // 4, cells))
        drawn = _shares(fitted + spread[index], list(bases.values()), whole)
    result = []
    for column, name in enumerate([*names, RESIDUAL]):
        value = float(found[column])
        bounds = (value, value) if free > 0 else (math.nan, math.nan)
        if len(drawn):
            centred = drawn[:, column] - drawn[:, column].mean() + value
            bounds = percentiles(np.clip(centred, 0, 1))
        result.append(Share(name, Interval(value, *bounds)))
    return result


def _shares(values: Matrix, bases: Sequence[Matrix], whole: Matrix) -> Matrix:
    """Of [draws, cells, outcomes]: [draws, terms + 1], the last what no term explains."""
    total = ((values - values.mean(1, keepdims=True)) ** 2).sum((1, 2))
    explained = [((basis.T @ values) ** 2).sum((1, 2)) for basis in bases]
    rest = (values**2).sum((1, 2)) - ((whole.T @ values) ** 2).sum((1, 2))
    parts = np.stack([*explained, np.maximum(rest, 0)], axis=1)
    return np.where(total[:, None] > 1e-12, parts / np.maximum(total[:, None], 1e-300), 0.0)


def _dummies(levels: Sequence[Hashable]) -> Matrix:
    """One column for each level but the first, float64 [cells, levels - 1]: 1 in cells of its level, -1 in those of the
    first, and 0 where a cell has no level, which then lies in the middle of them.
    """
    first, *others = [level for level in dict.fromkeys(levels) if level is not None]
    return np.array([[float(level == other) - float(level == first) for other in others] for level in levels])


def _basis(columns: Matrix) -> Matrix:
    """Orthonormal columns that span the same space."""
    left, sizes, _ = np.linalg.svd(columns, full_matrices=False)
    return np.asarray(left[:, sizes > 1e-9 * max(1.0, sizes.max(initial=0.0))])


def _beyond(columns: Matrix, others: Matrix) -> Matrix:
    """Orthonormal columns of what `columns` span beyond `others`."""
    base = _basis(others)
    return _basis_of_rest(columns - base @ (base.T @ columns))


def _basis_of_rest(rest: Matrix) -> Matrix:
    left, sizes, _ = np.linalg.svd(rest, full_matrices=False)
    return np.asarray(left[:, sizes > 1e-9])
