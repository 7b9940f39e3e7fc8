"""Blocks that wait on the processor and are on the device only while they run: for models that are larger than it.

On the processor the weights of a checkpoint stay mapped from its files where they are loaded in the number format that
they are stored in. Then its memory need not hold them either: the system reads what a block needs when it runs, and
gives it up when memory is short.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from transformers import PreTrainedModel

from shallower.anatomy.dissect import find_blocks


class StreamedBlock:
    """In place of a block's forward: brings its weights to the device before, and lets them go after."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._module = module
        self._device = device
        self._holds = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.held():
            return type(self._module).forward(self._module, *args, **kwargs)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside the `with` the weights are on the device, so that all runs pay for them once."""
        if self._holds:
            waiting: list[tuple[dict[str, Any], str, Tensor]] = []
        else:
            waiting = _moved(self._module.modules(), self._device)
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1
            for where, name, tensor in waiting:
                where[name] = tensor


def stream_from_processor(model: PreTrainedModel, device: torch.device) -> None:
    """Make a model on the processor compute on `device`, with the weights of one block there at a time. Whatever is
    outside of the blocks moves there for good.

    Raises ModelError when the blocks cannot be found.
    """
    blocks = find_blocks(model)[1]
    inside = set(blocks.modules())
    _moved((module for module in model.modules() if module not in inside), device)
    for block in blocks:
        block.forward = StreamedBlock(block, device)


def is_streamed(model: nn.Module) -> bool:
    """Whether `stream_from_processor` was applied to a model."""
    return any(isinstance(vars(module).get("forward"), StreamedBlock) for module in model.modules())


@contextmanager
def held(block: nn.Module) -> Iterator[None]:
    """Inside the `with` a block's weights are where it computes, if they are not there anyway."""
    forward = vars(block).get("forward")
    if isinstance(forward, StreamedBlock):
        with forward.held():
            yield
    else:
        yield


def _moved(modules: Iterable[nn.Module], device: torch.device) -> list[tuple[dict[str, Any], str, Tensor]]:
    """Put copies on `device` in the place of the modules' own weights and buffers that are elsewhere; what is tied
    stays tied. Returns what was replaced, and where.
    """
    replaced: list[tuple[dict[str, Any], str, Tensor]] = []
    copies: dict[int, Tensor] = {}
    for module in modules:
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for where in tables:
            for name, tensor in where.items():
                if tensor is None or tensor.device == device:
                    continue
                if id(tensor) not in copies:
                    copy = tensor.detach().to(device)
                    copies[id(tensor)] = Parameter(copy, requires_grad=False) if where is module._parameters else copy
                replaced.append((where, name, tensor))
    for where, name, tensor in replaced:
        where[name] = copies[id(tensor)]
    return replaced
