"""Leave-one-out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shallower.registry import metric
from shallower.units import Unit


@metric("loss", source="arXiv:2402.02834")
def loss(units: Sequence[Unit], losses: Callable[[Sequence[frozenset[Unit]]], list[float]]) -> dict[Unit, float]:
    """Leave-one-out: the objective without a unit, minus the objective of the dense model."""
    dense, *without = losses([frozenset(), *(frozenset({unit}) for unit in units)])
    return {unit: value - dense for unit, value in zip(units, without, strict=True)}
