"""A symmetric, bounded distance of next-token distributions."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from shallower.registry import Above, objective


@objective("js", floor=0.0)
def js(logits: Tensor, dense_logits: Tensor, *, temperature: Annotated[float, Above(0)] = 1.0) -> Tensor:
    """Jensen-Shannon divergence of the pruned and the dense model's next-token distributions.

    logits, dense_logits: float32 [tokens, vocabulary]. Returns float32 [tokens], in nats, at most log 2.
    """
    pruned = torch.softmax(logits / temperature, dim=-1)
    dense = torch.softmax(dense_logits / temperature, dim=-1)
    middle = ((pruned + dense) / 2).clamp_min_(torch.finfo(logits.dtype).tiny)  # 0 where both are: not 0 / 0
    return (_divergence(pruned, middle) + _divergence(dense, middle)) / 2


def _divergence(probabilities: Tensor, others: Tensor) -> Tensor:
    """Kullback-Leibler. By quotients, not as a difference of entropies: it keeps its digits where both are alike."""
    return torch.xlogy(probabilities, probabilities / others).sum(-1)
