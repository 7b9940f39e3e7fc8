"""Distance of the last hidden states; needs no head."""

from __future__ import annotations

import torch
from torch import Tensor

from shallower.registry import objective


@objective("hidden-cosine", floor=0.0)
def hidden_cosine(hidden: Tensor, dense_hidden: Tensor) -> Tensor:
    """One minus the cosine of the stream leaving the last block, pruned against dense; skips the head.

    hidden, dense_hidden: float32 [tokens, hidden], before the final norm. Returns float32 [tokens], in [0, 2].
    """
    return 1 - torch.cosine_similarity(hidden, dense_hidden, dim=-1)
