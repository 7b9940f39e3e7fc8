"""Distance of logits."""

from __future__ import annotations

from torch import Tensor

from shallower.registry import objective


@objective("logit-l2", source="arXiv:2407.16286")
def logit_l2(logits: Tensor, dense_logits: Tensor) -> Tensor:
    """Euclidean distance of the pruned and the dense model's logits.

    logits, dense_logits: float32 [tokens, vocabulary]. Returns float32 [tokens].
    """
    return (logits - dense_logits).norm(dim=-1)
