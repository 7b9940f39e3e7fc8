"""Relative L2 change of the stream."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from shallower.registry import metric


@metric("relative-l2", source="arXiv:2407.16286")
def relative_l2(before: Tensor, after: Tensor, *, below: Literal["after", "before"] = "after") -> Tensor:
    """L2 norm of the change, relative to the L2 norm of the stream after it (or before it).

    before, after: float32 [tokens, hidden]. Returns float32 [tokens].
    """
    scale = torch.linalg.vector_norm(after if below == "after" else before, ord=2, dim=-1)
    values: Tensor = torch.linalg.vector_norm(after - before, ord=2, dim=-1) / scale.clamp_min(1e-12)
    return values
