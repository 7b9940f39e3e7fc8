"""Choose a set of units to remove. One search a file; a search knows nothing of models.

A search is a generator of removed sets; the last one is its choice and the rest is its trail. The framework supplies
what the signature asks for:

    units    what may be removed, in depth order; some may overlap (a block and its attention), and `budget.admits`
             never puts two such units together
    budget   a `Budget`: `met(removed)`, `admits(removed, unit)`
    scores   {unit: importance} by the chosen metric; infinite where the model overflows without the unit, never NaN.
             Empty for a search that also asks for spans, unless only attentions or only MLPs may go
    spans    {span: importance} by the chosen metric, likewise; from mid-block to mid-block where sublayers may go
    losses   `Losses`: objective of the model without each candidate
    start    the choice of the search before it, for searches that improve on a set; where none stands before it, that
             of the search which the trait `starts="greedy"` names, or of `random`
    rng      a seeded `random.Random`

A search that yields a set and no way to it has the trait `unordered=True`: the framework measures an order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

from shallower.units import Unit

if TYPE_CHECKING:
    from shallower.registry import Method

Candidate = TypeVar("Candidate")


class Losses(Protocol):
    """The question that a search may ask."""

    def __call__(
        self, candidates: Sequence[frozenset[Unit]], keep: int | None = None, *, race: bool = True
    ) -> list[float]:
        """The objective of the model without each candidate's units; lower is better.

        keep: only the `keep` best matter; others may come back as infinity, and where candidates race what comes back
        as the best may be a little worse than that, and is the mean over a part of the text: compare it with nothing
        but what came with it. Without `race` the best are certainly among those that come back with a loss, of all of
        the text. None measures all of them in full.
        """


def search_before(method: Method) -> str | None:
    """The search that makes the set which `method` improves on, where no search stands before it; None where it needs
    no set.
    """
    return method.traits.get("starts", "random") if "start" in method.parameters else None


def best(candidates: Sequence[Candidate], measured: Sequence[float]) -> Candidate:
    """The candidate with the least loss, the first of equals."""
    return candidates[min(range(len(candidates)), key=measured.__getitem__)]
