"""How the loss feels a unit being turned down."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from shallower.registry import metric


@metric("gate-gradient")
def gate_gradient(gate: Tensor, *, power: Literal[1, 2] = 1) -> Tensor:
    """|∂L/∂g|, or its square, where g = 1 multiplies what the unit adds to the stream.

    L is the mean next-token loss of the calibration text. One backward pass gives all units.

    gate: the derivatives, float64 of any shape. Returns the same shape.
    """
    return gate.abs() ** power
