"""Distance of logits."""

from __future__ import annotations

import torch
from torch import Tensor

from shallower.registry import objective


@objective("logit-l2", source="arXiv:2407.16286", floor=0.0)
def logit_l2(logits: Tensor, dense_logits: Tensor) -> Tensor:
    """Euclidean distance of the pruned and the dense model's logits.

    logits, dense_logits: float32 [tokens, vocabulary]. Returns float32 [tokens].
    """
    values: Tensor = torch.linalg.vector_norm(logits - dense_logits, dim=-1)
    return values
