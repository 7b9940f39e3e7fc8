"""Relative L2 change of the stream."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from shallower.registry import metric


@metric("relative-l2", source="arXiv:2407.16286")
def relative_l2(
    before_l2: Tensor, after_l2: Tensor, change_l2: Tensor, *, below: Literal["after", "before"] = "after"
) -> Tensor:
    """L2 norm of the change, relative to the L2 norm of the stream after it (or before it).

    before_l2, after_l2, change_l2: float64 of any shape. Returns the same shape.
    """
    return change_l2 / (after_l2 if below == "after" else before_l2).clamp_min(1e-12)
