"""The size of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from shallower.reduction import OverTensors, OverWeights, reduce_weights
from shallower.registry import metric


@metric("magnitude", source="arXiv:2402.02834")
def magnitude(
    weights: Sequence[Tensor],
    *,
    p: Literal[1, 2] = 1,
    weight_reduction: OverWeights = "sum",
    block_reduction: OverTensors = "sum",
) -> float:
    """Sum over a unit's weights of their absolute value to the power p. Reads no text.

    weights: the unit's parameters, float32. weight_reduction: over the outputs of one matrix, or the entries of one
    vector. block_reduction: over the matrices and vectors of a unit.
    """
    return reduce_weights((weight.abs() ** p for weight in weights), weight_reduction, block_reduction)
