"""Relative L1 change of the stream."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from shallower.registry import metric


@metric("relative-l1", source="arXiv:2407.16286")
def relative_l1(before: Tensor, after: Tensor, *, below: Literal["after", "before"] = "after") -> Tensor:
    """L1 norm of the change, relative to the L1 norm of the stream after it (or before it).

    before, after: float32 [tokens, hidden]. Returns float32 [tokens].
    """
    scale = torch.linalg.vector_norm(after if below == "after" else before, ord=1, dim=-1)
    values: Tensor = torch.linalg.vector_norm(after - before, ord=1, dim=-1) / scale.clamp_min(1e-12)
    return values
