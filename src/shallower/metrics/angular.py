"""Angular distance of the stream, for every span."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shallower.registry import metric


@metric("angular", source="arXiv:2403.17887", positions="last", spans=True)
def angular(before: Tensor, after: Tensor) -> Tensor:
    """Angle between the stream before and after, as a fraction of a half turn; at each sequence's last token.

    before, after: float32 [tokens, hidden]. Returns float32 [tokens], in [0, 1].
    """
    first = torch.nn.functional.normalize(before.double(), dim=-1)
    second = torch.nn.functional.normalize(after.double(), dim=-1)
    # arccos(u·v) loses half the digits where the angle is small, which is where it matters; this form does not
    angle = 2 * torch.atan2((first - second).norm(dim=-1), (first + second).norm(dim=-1))
    return (angle / math.pi).float()
