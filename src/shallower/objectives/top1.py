"""How often the pruned model would say something else."""

from __future__ import annotations

import torch
from torch import Tensor

from shallower.registry import objective


@objective("top1", floor=0.0)
def top1(logits: Tensor, dense_logits: Tensor) -> Tensor:
    """Share of positions where the likeliest token differs from the dense model's.

    logits, dense_logits: float32 [tokens, vocabulary]. Returns float32 [tokens] of 0 and 1, NaN where the
    model overflows.
    """
    differs = (logits.argmax(-1) != dense_logits.argmax(-1)).float()
    return differs.where(~logits.isnan().any(-1), torch.nan)  # else a model that overflows could agree
