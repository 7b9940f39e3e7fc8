"""Which windows of a text benchmarks measure perplexity on."""

from __future__ import annotations

from torch import Tensor, cat


def evenly(ids: Tensor, windows: int | None, window: int) -> Tensor:
    """So many whole windows of a text, spread evenly over it; all of the text where it has no more, or none or 0 are
    asked for.
    """
    whole = len(ids) // window
    if not windows or windows >= whole:
        return ids
    starts = [index * whole // windows * window for index in range(windows)]
    return cat([ids[start : start + window] for start in starts])
