"""The best run of neighbouring units."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from shallower.budget import Budget, require_run
from shallower.errors import BudgetError
from shallower.registry import search
from shallower.units import Span, Unit, neighbours, of_one_sublayer


@dataclass(frozen=True)
class _ScoredRun:
    units: tuple[Unit, ...]
    value: float


@search(
    "contiguous",
    source="arXiv:2403.17887",
    published=("Gromov", "The Unreasonable Ineffectiveness of the Deeper Layers"),
    metric="angular",
)
def contiguous(
    units: Sequence[Unit], budget: Budget, spans: Mapping[Span, float], scores: Mapping[Unit, float]
) -> Iterator[frozenset[Unit]]:
    """Remove the run that changes the stream least, among the shortest that meet the budget.

    A run of attention and MLP sublayers may begin and end in mid-block. Between attentions alone, or MLPs alone, others
    stay, so that their runs have no ends to compare: these count the sum of their units' scores.

    The trail grows that run unit by unit, so that a prefix of the plan is a good shorter run. Where sublayers stand
    side by side, nothing lies between them, and it grows by both of a block, one after the other.
    """
    require_run(units, budget)
    runs = _alone(units, scores) if of_one_sublayer(units) else _spanned(units, spans)
    meeting = [span for span, run in runs.items() if budget.met(run.units)]
    shortest = [span for span in meeting if not any(budget.met(runs[part].units) for part in _parts(span, runs))]
    if not shortest:
        raise BudgetError(f"none of the spans that have a score removes {budget}; score all spans.")
    grown = [min(shortest, key=lambda span: (runs[span].value, span.start))]
    while parts := _parts(grown[-1], runs):
        grown.append(min(parts, key=lambda span: runs[span].value))
    removed: frozenset[Unit] = frozenset()
    for span in reversed(grown):
        added = sorted(removed.symmetric_difference(runs[span].units))
        if len({unit.index for unit in added}) == 1:
            yield from (removed.union(added[:count]) for count in range(1, len(added)))
        removed = frozenset(runs[span].units)
        yield removed


def _spanned(units: Sequence[Unit], spans: Mapping[Span, float]) -> dict[Span, _ScoredRun]:
    """The spans of which nothing has to stay: of blocks, or of pairs, each as its sublayers where both may go."""
    there = frozenset(units)
    runs = {}
    for span, value in spans.items():
        for found in (_halved(span, there), _pairs(span)):
            if found and there.issuperset(found):
                runs[span] = _ScoredRun(found, value)
    return runs


def _halved(span: Span, there: frozenset[Unit]) -> tuple[Unit, ...]:
    found: list[Unit] = []
    for unit in span.units:
        found += unit.sublayers if there.issuperset(unit.sublayers) else (unit,)
    return tuple(found)


def _pairs(span: Span) -> tuple[Unit, ...]:
    """The pairs that a span consists of, if it begins and ends in mid-block."""
    if span.start % 1 == 0 or span.stop % 1 == 0:
        return ()
    return tuple(Unit(unit.index, "pair") for unit in span.sublayers if unit.kind == "mlp")


def _alone(units: Sequence[Unit], scores: Mapping[Unit, float]) -> dict[Span, _ScoredRun]:
    """Runs of attentions, or of MLPs, by the blocks that they are in."""
    runs = {}
    for line in neighbours(units):
        for start, stop in itertools.combinations(range(len(line) + 1), 2):
            run = line[start:stop]
            runs[Span(run[0].index, run[-1].index + 1)] = _ScoredRun(run, sum(scores[unit] for unit in run))
    return runs


def _parts(span: Span, runs: Mapping[Span, _ScoredRun]) -> list[Span]:
    """The longest runs that begin later, or end earlier, by half a block or a block."""
    found = []
    for left, right in ((1, 0), (0, 1)):
        for step in (0.5, 1):
            start, stop = span.start + step * left, span.stop - step * right
            if start < stop and Span(start, stop) in runs:
                found.append(Span(start, stop))
                break
    return found
