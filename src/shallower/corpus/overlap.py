"""Contamination: how much of the evaluation text is in the calibration text, as runs of n tokens that both contain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from shallower.corpus.calibration import CalibrationSet

_Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Overlap:
    """`shared` of the evaluation text's `total` n-token runs (each position counts) are in the calibration text."""

    shared: int
    total: int
    n: int

    @property
    def fraction(self) -> float:
        return self.shared / self.total if self.total else 0.0


def overlap(calibration: CalibrationSet | Tensor, evaluation: Tensor, *, n: int = 13) -> Overlap:
    """Count the n-token runs of `evaluation` that are in `calibration`, exactly.

    calibration, evaluation: a set, or int64 ids [tokens] or [sequences, length]. Runs do not cross sequences or reach
    into padding. Memory is a few int64 a token.
    """
    if n < 1:
        raise ValueError(f"n is {n}; a run has at least one token")
    known, asked = _flat(calibration), _flat(evaluation)
    ids = np.concatenate([known, [-1], asked])
    valid = _runs_without_gap(ids, n)
    first = len(known) + 1
    if len(ids) < n:
        return Overlap(0, 0, n)
    names = _run_names(ids, n)
    ours = names[first:][valid[first:]]
    theirs = names[:first][valid[:first]]
    return Overlap(int(np.isin(ours, theirs).sum()), len(ours), n)


def rows_in(calibration: CalibrationSet | Tensor, rows: Sequence[Sequence[int]], *, n: int = 13) -> list[int]:
    """Which rows of token ids (such as the questions of a task) share a run of n tokens with `calibration`."""
    known = _flat(calibration)
    joined = [np.asarray([*row, -1], dtype=np.int64) for row in rows]
    if not joined:
        return []
    ids = np.concatenate([known, [-1], *joined])
    valid = _runs_without_gap(ids, n)
    if len(ids) < n:
        return []
    names = _run_names(ids, n)
    first = len(known) + 1
    owner = np.repeat(np.arange(len(rows)), [len(row) for row in joined])[: len(names) - first]
    inside = valid[first:] & np.isin(names[first:], names[:first][valid[:first]])
    return [int(row) for row in np.unique(owner[inside])]


def _flat(ids: CalibrationSet | Tensor) -> _Ids:
    """Ids in one row; -1 stands for padding and between sequences."""
    mask = ids.attention_mask if isinstance(ids, CalibrationSet) else None
    tensor = ids.input_ids if isinstance(ids, CalibrationSet) else ids
    rows: _Ids = np.atleast_2d(tensor.cpu().numpy().astype(np.int64))
    if mask is not None:
        rows = np.where(mask.numpy() == 1, rows, -1)
    return np.pad(rows, ((0, 0), (0, 1)), constant_values=-1).ravel()[:-1]


def _runs_without_gap(ids: _Ids, n: int) -> npt.NDArray[np.bool_]:
    gaps = np.concatenate([[0], np.cumsum(ids < 0)])
    valid: npt.NDArray[np.bool_] = gaps[n:] == gaps[:-n] if len(ids) >= n else np.zeros(0, dtype=bool)
    return valid


def _run_names(ids: _Ids, n: int) -> _Ids:
    """One integer for each run of n ids, equal just when the runs are equal.

    Names of runs of 2m follow from pairs of names of runs of m (as in suffix-array doubling), so nothing can collide.
    """
    names: _Ids = np.unique(ids, return_inverse=True)[1].astype(np.int64)
    width = 1
    while width < n:
        step = min(width, n - width)  # the last doubling overlaps itself
        paired = names[: len(names) - step] * (int(names.max()) + 1) + names[step:]
        names = np.unique(paired, return_inverse=True)[1].astype(np.int64)
        width += step
    return names
