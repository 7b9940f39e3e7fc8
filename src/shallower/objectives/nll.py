"""Mean negative log-likelihood of the next token; perplexity is its exponential."""

from __future__ import annotations

import torch
from torch import Tensor

from shallower.registry import objective


@objective("nll", source="arXiv:2402.02834")
def nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of the next token.

    logits: float32 [tokens, vocabulary]. targets: int64 [tokens]. Returns float32 [tokens], in nats.
    """
    return torch.logsumexp(logits, dim=-1) - logits.gather(-1, targets[:, None]).squeeze(-1)
