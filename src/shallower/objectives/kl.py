"""How far the pruned model's next-token distribution is from the dense one's."""

from __future__ import annotations

import torch
from torch import Tensor

from shallower.registry import objective


@objective("kl", source="arXiv:2410.14649")
def kl(logits: Tensor, dense_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Kullback-Leibler divergence from the dense to the pruned model's next-token distribution.

    logits, dense_logits: float32 [tokens, vocabulary]. Returns float32 [tokens], in nats.
    """
    pruned = torch.log_softmax(logits / temperature, dim=-1)
    dense = torch.log_softmax(dense_logits / temperature, dim=-1)
    return (dense.exp() * (dense - pruned)).sum(-1)
