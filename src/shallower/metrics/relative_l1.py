"""Relative L1 change of the stream."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from shallower.registry import metric


@metric("relative-l1", source="arXiv:2407.16286")
def relative_l1(
    before_l1: Tensor, after_l1: Tensor, change_l1: Tensor, *, below: Literal["after", "before"] = "after"
) -> Tensor:
    """L1 norm of the change, relative to the L1 norm of the stream after it (or before it).

    before_l1, after_l1, change_l1: float64 of any shape. Returns the same shape.
    """
    return change_l1 / (after_l1 if below == "after" else before_l1).clamp_min(1e-12)
