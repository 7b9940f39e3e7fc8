"""Block influence."""

from __future__ import annotations

from torch import Tensor

from shallower.registry import metric


@metric("cosine", source="arXiv:2403.03853, arXiv:2407.16286", published=("block influence", "BI", "ShortGPT"))
def cosine(dot: Tensor, before_l2: Tensor, after_l2: Tensor) -> Tensor:
    """Block influence: one minus the cosine of the stream before and after.

    dot, before_l2, after_l2: float64 of any shape. Returns the same shape, in [0, 2].
    """
    return (1 - dot / (before_l2 * after_l2).clamp_min(1e-300)).clamp(0, 2)
