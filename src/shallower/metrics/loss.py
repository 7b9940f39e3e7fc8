"""Leave-one-out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shallower.registry import metric
from shallower.units import Unit

Differences = Callable[[Sequence[frozenset[Unit]]], list[tuple[float, float | None]]]


@metric(
    "loss", source="arXiv:2402.02834", published=("PPL", "perplexity", "leave-one-out", "Shortened LLaMA"), in_all=True
)
def loss(units: Sequence[Unit], differences: Differences) -> dict[Unit, tuple[float, float | None]]:
    """Leave-one-out: the objective without a unit, minus the objective of the dense model."""
    return dict(zip(units, differences([frozenset({unit}) for unit in units]), strict=True))
