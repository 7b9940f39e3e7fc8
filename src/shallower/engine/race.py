"""Which candidates can be dropped after a part of the calibration text, at a stated error probability.

Candidates are compared on the same sequences, so what counts is the spread of their paired differences, which is far
smaller than the spread of the losses themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

FEWEST_SEQUENCES = 4  # below this the spread of differences is not worth estimating


@dataclass(frozen=True)
class Racing:
    """How races are run.

    error: probability that a race drops a candidate that belongs to the best. Each look at the sums is corrected for
    the candidates still running (Bonferroni); that this also covers looking many times is held by simulated races in
    the tests.
    tie: candidates whose losses differ by less than this share of the loss count as equal.
    """

    error: float = 0.05
    tie: float = 0.0005


def survivors(sums: NDArray[np.float64], counts: NDArray[np.int64], keep: int, racing: Racing) -> NDArray[np.bool_]:
    """Who may still be among the `keep` best.

    sums: float64 [candidates, sequences], the objective summed over each sequence measured so far. counts: int64
    [sequences], its tokens. Returns bool [candidates].

    A candidate is dropped when its paired difference to the `keep`-th best is positive beyond doubt: its lower
    confidence bound (Student's t over sequences) is above zero. When a bound cannot tell two apart but both are equal
    within `racing.tie`, the one that is ahead stays.
    """
    candidates, sequences = sums.shape
    if candidates <= keep or sequences < FEWEST_SEQUENCES:
        return np.ones(candidates, dtype=bool)
    tokens = counts.sum()
    order = np.argsort(sums.sum(1), kind="stable")
    mark = sums[order[keep - 1]]
    difference = (sums - mark).sum(1) / tokens
    centred = (sums - mark) - difference[:, None] * counts
    error = np.sqrt((centred**2).sum(1) * sequences / (sequences - 1)) / tokens
    bound = float(student.ppf(1 - racing.error / candidates, sequences - 1)) * error
    worse = difference - bound > 0
    equal = np.abs(difference) + bound < racing.tie * abs(mark.sum() / tokens)
    ahead = np.zeros(candidates, dtype=bool)
    ahead[order[:keep]] = True
    alive: NDArray[np.bool_] = ahead | ~(worse | equal)
    return alive
