"""What no linear repair can bring back."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from shallower.registry import Above, AtLeast, metric

NOTHING = 1e-12  # of the other variance: less than this is rounding, not change


@metric("linear-residual", spans=True)
def linear_residual(
    before_before: Tensor,
    before_after: Tensor,
    after_after: Tensor,
    *,
    width: Annotated[int, AtLeast(0)] = 64,
    ridge: Annotated[float, Above(0)] = 1e-6,
) -> Tensor:
    """Share of the change's variance that the best linear map of the stream before it does not explain: 1 - R².

    That is what is lost when a unit or span is replaced by such a map and a constant.

    before_before, before_after, after_after: centred second moments over tokens, float64 [width, width]. width: how
    many directions, drawn at random but always the same ones, the stream is projected to; 0 keeps the whole width (for
    N blocks and hidden size d the sums of all spans then take 4 N² d² bytes). ridge: what the map's regression adds to
    the variance in each direction, relative to the mean of these variances. Returns a scalar in [0, 1]: 0 where nothing
    changes, 1 where only the change varies and the stream before it does not.
    """
    change = after_after - before_after - before_after.T + before_before
    variance, stream = change.trace(), before_before.trace()
    if bool(variance <= NOTHING * stream):
        return torch.zeros_like(variance)
    if bool(stream <= NOTHING * variance):
        return torch.ones_like(variance)
    target = before_after - before_before
    regularised = before_before + torch.eye(len(before_before)).to(before_before) * (
        ridge * stream / len(before_before)
    )
    explained = torch.linalg.solve(regularised, target)
    left: Tensor = variance - 2 * (explained * target).sum() + (explained * (before_before @ explained)).sum()
    return torch.clamp(left / variance, 0, 1)
