"""What the loss would change, to first or second order, if weights were zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from shallower.reduction import OverTensors, OverWeights, reduce_weights
from shallower.registry import metric


@metric("taylor", source="arXiv:2402.02834")
def taylor(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    fisher: Sequence[Tensor] | None,
    *,
    order: Literal[1, 2] = 1,
    weight_reduction: OverWeights = "sum",
    block_reduction: OverTensors = "sum",
) -> float:
    """Sum over a unit's weights of |w ∂L/∂w|, where L is the mean next-token loss of the calibration text.

    order: 2 adds the second-order term with the diagonal of the Fisher information in place of the Hessian,
    |w ∂L/∂w - w² F / 2|, and takes memory for another copy of the gradients in float32.

    weights: the unit's parameters, float32. gradients, fisher: the same shapes; fisher is None at order 1.
    weight_reduction: over the outputs of one matrix, or the entries of one vector. block_reduction: over the matrices
    and vectors of a unit.
    """
    change = (weight * gradient for weight, gradient in zip(weights, gradients, strict=True))
    if order == 2 and fisher is not None:
        curved = zip(change, weights, fisher, strict=True)
        change = (first - weight.square() * information / 2 for first, weight, information in curved)
    return reduce_weights((part.abs() for part in change), weight_reduction, block_reduction)
