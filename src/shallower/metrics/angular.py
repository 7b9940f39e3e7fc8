"""Angular distance of the stream, for every span."""

from __future__ import annotations

import math

from torch import Tensor

from shallower.registry import metric


@metric(
    "angular",
    source="arXiv:2403.17887",
    published=("angular distance", "Gromov", "The Unreasonable Ineffectiveness of the Deeper Layers"),
    positions="last",
    spans=True,
)
def angular(dot: Tensor, before_l2: Tensor, after_l2: Tensor) -> Tensor:
    """Angle between the stream before and after, as a fraction of a half turn; at each sequence's last token.

    dot, before_l2, after_l2: float64 of any shape; in float32 the smallest angle that an arccos can
    tell from 0 would be 3e-4. Returns the same shape, in [0, 1].
    """
    return (dot / (before_l2 * after_l2).clamp_min(1e-300)).clamp(-1, 1).arccos() / math.pi
