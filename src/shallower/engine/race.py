"""Which candidates can be dropped after a part of the calibration text, at a stated error probability.

Candidates are compared on the same sequences, so what counts is the spread of their paired differences, which is far
smaller than the spread of the losses themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

FEWEST_SEQUENCES = 4  # below this the spread of differences is not worth estimating
PRIOR_DEGREES = 8  # how many degrees of freedom the candidates' common spread counts for against a candidate's own
LOOK_GROWTH = 1.25  # a race looks again when it has read this many times as much: looks between tell nearly the same
LOOKS_AS_ONE = 3  # that many looks in a row err together; dividing the error accordingly holds it in simulated races


@dataclass(frozen=True)
class Racing:
    """How races are run.

    error: probability that what a race chooses is worse than the best by more than `tie`, held by simulated races in
    the tests.
    tie: a candidate that cannot be ahead by more than this share of the loss may go.
    """

    error: float = 0.05
    tie: float = 0.002


def looks(whole: int) -> list[int]:
    """After how many of `whole` sequences a race asks who can go; when all were read, nothing is left to ask."""
    found = []
    count = FEWEST_SEQUENCES
    while count < whole:
        found.append(count)
        count = math.ceil(count * LOOK_GROWTH)
    return found


def survivors(
    sums: NDArray[np.float64], counts: NDArray[np.int64], keep: int, racing: Racing, whole: int
) -> NDArray[np.bool_]:
    """Who may still be among the `keep` best on all of the calibration set.

    sums: float64 [candidates, sequences], the objective summed over each sequence measured so far. counts: int64
    [sequences], its tokens. whole: sequences in the set. Returns bool [candidates].

    A candidate is dropped when the lower confidence bound of its paired difference to the `keep`-th best says that it
    cannot be better by more than the tie (Student's t over sequences). After a few sequences a variance is a poor
    estimate, so each is drawn towards the median of all (a moderated t, as in the analysis of gene expression). What is
    asked is the mean over this set and no other, so only sequences not yet seen are uncertain (the finite population
    correction). The correction for many candidates counts those still running, and is repeated when some have gone
    (Holm's step-down). The error is divided among the `looks` of the whole race. Where each item is only right or wrong
    nobody is dropped but who overflows.
    """
    alive = np.asarray(np.isfinite(sums).all(axis=1))  # an overflow is as bad as can be
    sequences = sums.shape[1]
    right_or_wrong = (counts == 1).all() and np.isin(sums[alive], (0, 1)).all()  # a few equal answers have no spread,
    told = int((counts > 0).sum())  # a sequence of one token predicts nothing
    if alive.sum() <= keep or told < FEWEST_SEQUENCES or right_or_wrong:  # which is not certainty
        return alive if alive.sum() >= keep else np.ones(len(sums), dtype=bool)
    if not alive.all():
        alive[alive] = survivors(sums[alive], counts, keep, racing, whole)
        return alive
    tokens = counts.sum()
    order = np.argsort(sums.sum(1), kind="stable")
    mark = sums[order[keep - 1]]
    difference = (sums - mark).sum(1) / tokens
    variance = ((sums - mark - difference[:, None] * counts) ** 2).sum(1) / (sequences - 1)
    freedom = sequences - 1 + PRIOR_DEGREES
    moderated = (PRIOR_DEGREES * np.median(variance[order[keep:]]) + (sequences - 1) * variance) / freedom
    error = np.sqrt(moderated * sequences * (1 - sequences / whole)) / tokens
    a_look = racing.error / max(1.0, len(looks(whole)) / LOOKS_AS_ONE)
    tie = racing.tie * abs(mark.sum() / tokens)
    ahead: NDArray[np.bool_] = np.zeros(len(sums), dtype=bool)
    ahead[order[:keep]] = True
    while (rivals := int(alive.sum()) - keep) > 0:
        bound = difference - float(stdtrit(freedom, 1 - a_look / rivals)) * error
        left = ahead | (alive & (bound <= -tie))
        if left.sum() == alive.sum():
            break
        alive = left
    return alive
