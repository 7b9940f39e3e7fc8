"""Block influence."""

from __future__ import annotations

import torch
from torch import Tensor

from shallower.registry import metric


@metric("cosine", source="arXiv:2403.03853, arXiv:2407.16286")
def cosine(before: Tensor, after: Tensor) -> Tensor:
    """Block influence: one minus the cosine of the stream before and after.

    before, after: float32 [tokens, hidden]. Returns float32 [tokens], in [0, 2].
    """
    return 1 - torch.cosine_similarity(before, after, dim=-1)
