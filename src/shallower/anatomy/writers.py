"""The linear map through which a sublayer writes to the residual stream (`o_proj`, `down_proj`), found by nudging.

A map qualifies when a change of its output is the same change of the stream, up to one constant factor (Granite's
residual multiplier). So nothing behind a norm qualifies (Gemma 2, OLMo 2), nor one of several experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from shallower.anatomy.dissect import Anatomy, Block, run_probe, unpack
from shallower.units import Kind

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True, eq=False)
class Writer:
    """A linear map whose output, times `factor`, is added to the stream.

    block: place of its block. kind: `attn` or `mlp`. path: from the block to the module.
    """

    block: Block
    kind: Kind
    path: str
    factor: float

    @property
    def module(self) -> nn.Module:
        """An nn.Linear, or GPT-2's Conv1D, which keeps its weight transposed."""
        return self.block.module.get_submodule(self.path)

    @property
    def weight(self) -> Tensor:
        """[hidden, inputs], a view."""
        module = self.module
        weight: Tensor = module.weight  # type: ignore[assignment]
        return weight.T if isinstance(module, Conv1D) else weight

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = self.module.bias  # type: ignore[assignment]
        return bias

    def replace(self, weight: Tensor | None = None, bias: Tensor | None = None) -> None:
        """Give the module new tensors, rounded to its type; the old ones, which other models may share, stay as they
        were.

        weight: [hidden, inputs]. bias: [hidden].
        """
        module, old = self.module, self.weight
        if weight is not None:
            stored = weight.T if isinstance(module, Conv1D) else weight
            module.weight = _parameter(stored, old)
        if bias is not None:
            module.bias = _parameter(bias, old)


def _parameter(values: Tensor, like: Tensor) -> nn.Parameter:
    stored = values.detach().to(device=like.device, dtype=like.dtype, copy=True).contiguous()
    return nn.Parameter(stored, requires_grad=like.requires_grad)


@dataclass(frozen=True, eq=False)
class Halves:
    """How a block adds to the stream.

    attn, mlp: the maps that write, None where there is none. sequential: the MLP reads what the attention has written;
    False for blocks that have only one half or run both side by side.
    """

    attn: Writer | None
    mlp: Writer | None
    sequential: bool

    def writer(self, kind: Kind) -> Writer | None:
        return {"attn": self.attn, "mlp": self.mlp}.get(kind)


def find_writers(anatomy: Anatomy) -> tuple[Halves, ...]:
    """How each block writes to the stream; runs each block a few times on a few tokens."""
    calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def remember(index: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[index] = args, kwargs

        return hook

    handles = [
        block.module.register_forward_pre_hook(remember(block.index), with_kwargs=True) for block in anatomy.blocks
    ]
    run_probe(anatomy.model, handles)
    with torch.no_grad():
        return tuple(_halves(block, *calls[block.index]) for block in anatomy.blocks)


def _halves(block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Halves:
    def run() -> Tensor:
        return unpack(block.module(*args, **kwargs))

    both = block.attn is not None and block.mlp is not None
    whole = run()
    mlp = _writer(block, "mlp", run, whole)
    if not both:
        return Halves(_writer(block, "attn", run, whole), mlp, False)
    with block.without("mlp"):
        middle = run()
        attn = _writer(block, "attn", run, middle)
    return Halves(attn, mlp, _sequential(block, run, whole))


def _sequential(block: Block, run: Callable[[], Tensor], stream: Tensor) -> bool:
    """Whether what the MLP is given changes when the attention gives something else back; `stream` is what `run`
    returns undisturbed.
    """
    given: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.append(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)).double())

    def change(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        # Not a multiple of the output, which a norm behind it makes the output again (OLMo 2).
        other = _noise(unpack(output), stream)
        return (other, *output[1:]) if isinstance(output, tuple) else other

    assert block.attn is not None
    assert block.mlp is not None
    watched = block.module.get_submodule(block.mlp.names[0]).register_forward_pre_hook(note, with_kwargs=True)
    try:
        run()
        changed = block.module.get_submodule(block.attn.names[-1]).register_forward_hook(change)
        try:
            run()
        finally:
            changed.remove()
    finally:
        watched.remove()
    was, became = given
    changed_by = (became - was).norm(dim=-1) / was.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return not float(changed_by.max()) <= torch.finfo(stream.dtype).eps


def _noise(like: Tensor, stream: Tensor) -> Tensor:
    """Seeded noise in the shape of `like`, as large in every token as the largest token of `stream`: a sink neither
    swallows it nor counts for more than others.
    """
    generator = torch.Generator().manual_seed(0)
    size = stream.float().square().mean(-1).sqrt().max()
    return (torch.randn(like.shape, generator=generator).to(like.device) * size).to(like.dtype)


def _writer(block: Block, kind: Kind, run: Callable[[], Tensor], stream: Tensor) -> Writer | None:
    """The last map of the sublayer that `run` shows to write to the stream; `stream` is what it returns undisturbed."""
    sublayer = block.sublayer(kind)
    if sublayer is None:
        return None
    paths = [
        f"{name}.{inner}".rstrip(".")
        for name in sublayer.names
        for inner, module in block.module.get_submodule(name).named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]
    nudge = _noise(stream, stream)
    for path in reversed(paths):
        factor = _factor(block.module.get_submodule(path), nudge, run, stream)
        if factor is not None:
            return Writer(block, kind, path, factor)
    return None


def _factor(module: nn.Module, nudge: Tensor, run: Callable[[], Tensor], stream: Tensor) -> float | None:
    """By how much the stream moves with the map's output; None when it moves in another way."""
    fitting: list[bool] = []

    def push(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        fits = isinstance(output, Tensor) and output.shape[-1] == nudge.shape[-1] and output.numel() == nudge.numel()
        fitting.append(fits)
        return output + nudge.reshape(output.shape) if fits else None

    handle = module.register_forward_hook(push)
    try:
        moved = (run() - stream).double()
    finally:
        handle.remove()
    if fitting != [True]:
        return None
    push_by = nudge.double()
    factor = float((moved * push_by).sum() / push_by.square().sum())
    tolerance = _TOLERANCE.get(stream.dtype, 5e-2)
    wrong = (moved - factor * push_by).norm(dim=-1) / push_by.norm(dim=-1)
    if not float(wrong.max()) <= tolerance * abs(factor):  # of every token: a gate may differ in one of them
        return None
    return 1.0 if abs(factor - 1) < tolerance / 10 else factor
