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
    side by side, nothing lies between them, and it grows by one of a block and then the other.
    """
    require_run(units, budget)
    runs = _alone(units, scores) if of_one_sublayer(units) else _spanned(units, spans)
    meeting = [span for span, run in runs.items() if budget.met(run.units)]
    shortest = [span for span in meeting if not any(budget.met(runs[part].units) for part in _parts(span, runs))]
    if not shortest:
        raise BudgetError(f"none of the spans that have a score removes {budget}; score all spans.")
    grown = [min(shortest, key=lambda span: (runs[span].value, span.start))]
    while parts := _parts(grown[-1], runs, nested=True):
        grown.append(min(parts, key=lambda span: runs[span].value))
    removed: frozenset[Unit] = frozenset()
    for span in reversed(grown):
        added = sorted(removed.symmetric_difference(runs[span].units))
        steps = range(1, len(added)) if len({unit.index for unit in added}) == 1 else ()
        for more in [*steps, len(added)]:
            yield removed.union(added[:more])
            if budget.met(removed.union(added[:more])):
                return
        removed = frozenset(runs[span].units)


def _spanned(units: Sequence[Unit], spans: Mapping[Span, float]) -> dict[Span, _ScoredRun]:
    """The spans that consist of units that may go: blocks and halves at the ends, or sublayers alone, or pairs."""
    there = frozenset(units)
    runs = {}
    for span, value in spans.items():
        for found in (span.units, span.sublayers, _pairs(span)):
            if found and there.issuperset(found):
                runs[span] = _ScoredRun(found, value)
                break
    return runs


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


def _parts(span: Span, runs: Mapping[Span, _ScoredRun], *, nested: bool = False) -> list[Span]:
    """The longest runs that begin later, or end earlier, by half a block or a block.

    nested: only those of which `span` is made by adding units, which half of a block is not of that block.
    """
    later = (Span(span.start + step, span.stop) for step in (0.5, 1) if span.blocks > step)
    earlier = (Span(span.start, span.stop - step) for step in (0.5, 1) if span.blocks > step)
    found = []
    for parts in (later, earlier):
        there = (part for part in parts if part in runs)
        found += [part for part in there if not nested or set(runs[part].units) < set(runs[span].units)][:1]
    return found
