"""The best run of neighbouring blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from shallower.budget import Budget, require_run
from shallower.errors import BudgetError
from shallower.registry import search
from shallower.units import Span, Unit


@search(
    "contiguous",
    source="arXiv:2403.17887",
    published=("Gromov", "The Unreasonable Ineffectiveness of the Deeper Layers"),
    metric="angular",
    kinds=("block",),
)
def contiguous(units: Sequence[Unit], budget: Budget, spans: Mapping[Span, float]) -> Iterator[frozenset[Unit]]:
    """Remove the span that changes the stream least, among the shortest that meet the budget.

    The trail grows that span block by block, so that a prefix of the plan is a good shorter span.
    """
    require_run(units, budget)
    removable = {unit.index for unit in units}

    def allowed(span: Span) -> bool:
        return removable.issuperset(range(span.start, span.stop))

    meeting = [span for span in spans if allowed(span) and budget.met(span.units)]
    shortest = [
        span
        for span in meeting
        if not any(
            budget.met(part.units)
            for part in (_shrunk(span, 1, 0), _shrunk(span, 0, 1))
            if part is not None and part in spans
        )
    ]
    if not shortest:
        raise BudgetError(f"none of the spans that have a score removes {budget}; score all spans.")
    span: Span | None = min(shortest, key=lambda span: (spans[span], span.start))
    grown: list[Span] = []
    while span is not None:
        grown.append(span)
        parts = (_shrunk(span, 1, 0), _shrunk(span, 0, 1))
        smaller = [part for part in parts if part is not None and part in spans]
        span = min(smaller, key=spans.__getitem__) if smaller else None
    for part in reversed(grown):
        yield frozenset(part.units)


def _shrunk(span: Span, left: int, right: int) -> Span | None:
    return Span(span.start + left, span.stop - right) if len(span) > 1 else None
