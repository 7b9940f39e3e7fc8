"""From one number a weight to one number a unit, in the ways of Shortened LLaMA (arXiv:2402.02834). Torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

OverWeights = Literal["sum", "mean", "max"]
OverTensors = Literal["sum", "mean", "max", "prod"]


def reduce_weights(tensors: Iterable[Tensor], weights: OverWeights, block: OverTensors) -> float:
    """Reduce what each weight counts, tensor by tensor; 0 where a unit has no weights.

    A row, which is one output of a matrix (of GPT-2's `Conv1D`, stored the other way round, one input) or one entry of
    a vector, is summed. weights: how the rows of one tensor are joined (the source's product under- or overflows for
    any real matrix). block: how the tensors of a unit are.
    """
    joined = []
    for tensor in tensors:
        rows = tensor.reshape(-1, tensor.shape[-1] if tensor.dim() > 1 else 1).double().sum(1)
        joined.append(float(rows.max() if weights == "max" else rows.mean() if weights == "mean" else rows.sum()))
    if not joined:
        return 0.0
    if block == "prod":
        return math.prod(joined)
    return max(joined) if block == "max" else math.fsum(joined) / (len(joined) if block == "mean" else 1)
