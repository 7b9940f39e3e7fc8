"""Contamination: how much of the evaluation text is in the calibration text, as runs that both contain.

`overlap` counts runs of tokens of a finished set; `EvaluationRuns` finds the rows of an evaluation set whose words
stand in documents, before there are tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from shallower.corpus.calibration import CalibrationSet
from shallower.corpus.duplicates import Shingles, words_of
from shallower.corpus.sources import json_records, open_source
from shallower.corpus.supply import NOTHING, Supply
from shallower.errors import CorpusError
from shallower.files import expanded

_EXAMPLES = 3
_Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Overlap:
    """`shared` of the evaluation text's `total` n-token runs (each position counts) are in the calibration text."""

    shared: int
    total: int
    n: int


def overlap(calibration: CalibrationSet | Tensor, evaluation: CalibrationSet | Tensor, *, n: int = 13) -> Overlap:
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


@dataclass(frozen=True)
class SharedRows:
    """`shared` of the `rows` of an evaluation set have a run of `n` words that stands in one of `documents` documents.

    long_enough: rows that have so many words in one field; others cannot be found. examples: such runs.
    """

    name: str
    n: int
    rows: int
    long_enough: int
    shared: int
    documents: int
    examples: tuple[str, ...]


class EvaluationRuns:
    """The runs of words of an evaluation set, to be looked for in document after document.

    path: a .jsonl file, of whose rows every text is read, field by field, or any other text source. supply: what the
    sources `demo:` need. Runs are known by 64 bits. Keeps 16 bytes a run.

    Raises CorpusError when it cannot be read, or no row has `n` words.
    """

    def __init__(self, path: str, n: int = 13, supply: Supply = NOTHING) -> None:
        self._n = n
        self._name = "/".join(Path(path).parts[-2:])
        self._shingles = Shingles(n)
        found: list[npt.NDArray[np.uint64]] = []
        owners: list[_Ids] = []
        self._rows = self._long = 0
        for texts in _rows_of(path, supply):
            runs = [self._shingles.runs(words) for words in map(words_of, texts) if len(words) >= n]
            found += runs
            owners += [np.full(len(row), self._rows) for row in runs]
            self._rows += 1
            self._long += bool(runs)
        if not found:
            raise CorpusError(
                f"{path} has no row with {n} words in a row in one field: overlap with it cannot be found. Leave it "
                "out of --against."
            )
        order = np.argsort(np.concatenate(found), kind="stable")
        self._runs, self._owners = np.concatenate(found)[order], np.concatenate(owners)[order]
        self._hit: set[int] = set()
        self._documents = 0
        self._examples: list[str] = []

    def look(self, text: str) -> None:
        """Look for the runs in a document."""
        words = words_of(text)
        if len(words) < self._n:
            return
        runs = self._shingles.runs(words)
        first = np.searchsorted(self._runs, runs, side="left")
        last = np.searchsorted(self._runs, runs, side="right")
        there = np.flatnonzero(last > first)
        if not len(there):
            return
        self._documents += 1
        for place in there:
            owners = set(self._owners[first[place] : last[place]].tolist())
            if owners - self._hit and len(self._examples) < _EXAMPLES:
                self._examples.append(" ".join(words[place : place + self._n]))
            self._hit |= owners

    def found(self) -> SharedRows:
        hit = len(self._hit)
        return SharedRows(self._name, self._n, self._rows, self._long, hit, self._documents, tuple(self._examples))


def _rows_of(path: str, supply: Supply) -> Iterator[list[str]]:
    if ".jsonl" in Path(path).suffixes and expanded(path).is_file():
        for _, record in json_records(expanded(path)):
            yield list(_texts(record))
    else:
        for document in open_source(path, supply).read():
            yield [document.text]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)


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
    owner = np.repeat(np.arange(len(rows)), [len(row) for row in joined])[: max(0, len(names) - first)]
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
