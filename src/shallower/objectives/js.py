"""A symmetric, bounded distance of next-token distributions."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor

from shallower.registry import Above, objective


@objective("js")
def js(logits: Tensor, dense_logits: Tensor, *, temperature: Annotated[float, Above(0)] = 1.0) -> Tensor:
    """Jensen-Shannon divergence of the pruned and the dense model's next-token distributions.

    logits, dense_logits: float32 [tokens, vocabulary]. Returns float32 [tokens], in nats, at most log 2.
    """
    lowest = torch.finfo(logits.dtype).min  # of a word that is ruled out: infinity less infinity is not a number
    pruned = torch.log_softmax((logits / temperature).clamp_min(lowest), dim=-1)
    dense = torch.log_softmax((dense_logits / temperature).clamp_min(lowest), dim=-1)
    middle = torch.logaddexp(pruned, dense) - math.log(2)
    return ((pruned.exp() * (pruned - middle)).sum(-1) + (dense.exp() * (dense - middle)).sum(-1)) / 2
