"""What recovery may put at a cut: a low-rank affine change of the stream, for which no stock checkpoint has a place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

Where = Literal["entry", "middle", "exit"]


class Patch(nn.Module):
    """x ↦ x + (x − mean) down up + bias, on every token alone.

    down: [hidden, rank]. up: [rank, hidden]. mean, bias: [hidden]. `mean` is a buffer, the rest are parameters.
    Computes in the type of its tensors, and adds in the type of x.
    """

    mean: Tensor

    def __init__(self, down: Tensor, up: Tensor, mean: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(up)
        self.bias = nn.Parameter(bias)
        self.register_buffer("mean", mean)

    @property
    def rank(self) -> int:
        return int(self.down.shape[1])

    def change(self, hidden: Tensor) -> Tensor:
        """What is added to `hidden` [..., hidden]; the same shape and type."""
        centred = hidden.to(self.down.dtype) - self.mean
        return torch.addmm(self.bias, centred.flatten(0, -2) @ self.down, self.up).view_as(hidden).to(hidden.dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.change(hidden)


def held(module: nn.Module, where: Where) -> nn.Sequential | None:
    """The patches that a module holds there, in the order in which the stream meets them; None where it has none."""
    found = module._modules.get(f"{where}_patch")
    assert found is None or isinstance(found, nn.Sequential)
    return found


@contextmanager
def lifted(module: nn.Module, where: Where) -> Iterator[None]:
    """Inside the `with`, the patches that a module holds there change nothing."""
    standing = held(module, where)
    if standing is None:
        yield
        return
    name = f"{where}_patch"
    module._modules[name] = nn.Sequential()
    try:
        yield
    finally:
        module._modules[name] = standing
