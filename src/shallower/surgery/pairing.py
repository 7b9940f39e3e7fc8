"""Make whole blocks of the halves that are left: without mlp.3 and attn.4, attn.3 and mlp.4 are one ordinary block."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shallower.anatomy.dissect import Anatomy, Block, probe_ids, unpack
from shallower.units import Unit


@dataclass(frozen=True)
class Layer:
    """A block of the cut model.

    attn, mlp: the dense blocks that the two halves come from; None for a half that is missing.
    home: the dense block whose module holds the halves.
    """

    attn: int | None
    mlp: int | None
    home: int

    @property
    def leftover(self) -> tuple[Unit, ...]:
        """The removed sublayers that need something in their place."""
        halves = (("attn", self.attn), ("mlp", self.mlp))
        return tuple(Unit(self.home, kind) for kind, source in halves if source is None)  # type: ignore[arg-type]


def re_pair(anatomy: Anatomy, units: Collection[Unit]) -> tuple[list[Layer], tuple[Unit, ...]]:
    """Layers of the model without `units`, joining an attention with the MLP that follows it, and the units left over.

    Exact where blocks are sequential and each half has its own norm; `cut` checks it before it relies on it. A block
    whose two halves are removed is gone.
    """
    layers: list[Layer] = []
    waiting: int | None = None  # an attention that has not met an MLP

    def close() -> None:
        nonlocal waiting
        if waiting is not None:
            layers.append(Layer(waiting, None, waiting))
            waiting = None

    for block in anatomy.blocks:
        index = block.index
        if Unit(index, "block") in units:
            continue
        attn, mlp = (Unit(index, kind) not in units for kind in ("attn", "mlp"))
        if block.attn is None or block.mlp is None:  # not made of two halves that we know
            close()
            layers.append(Layer(index if attn else None, index if mlp else None, index))
            continue
        if attn:
            close()
            waiting = index
        if mlp and waiting is not None:
            layers.append(Layer(waiting, index, waiting))
            waiting = None
        elif mlp:
            layers.append(Layer(None, index, index))
    close()
    return layers, tuple(unit for layer in layers for unit in layer.leftover)


def in_place(anatomy: Anatomy, units: Collection[Unit], *, keep_empty: bool) -> list[Layer]:
    """Layers of the model without `units`, each half in the block it was in.

    keep_empty: a block that lost both halves stays (it still applies a norm to the stream in some families).
    """
    layers = []
    for block in anatomy.blocks:
        if Unit(block.index, "block") in units:
            continue
        index = block.index
        attn, mlp = (Unit(index, kind) not in units for kind in ("attn", "mlp"))
        if attn or mlp or keep_empty:
            layers.append(Layer(index if attn else None, index if mlp else None, index))
    return layers


def mlp_side(anatomy: Anatomy) -> list[frozenset[str]]:
    """Of each block, the children that belong to its MLP half: called after the attention, not on its output alone."""
    calls: list[list[tuple[str, Tensor | None, Tensor]]] = [[] for _ in anatomy.blocks]
    handles = []

    def watch(block: Block, name: str, child: nn.Module) -> None:
        def remember(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
            given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            calls[block.index].append((name, given, unpack(output)))

        handles.append(child.register_forward_hook(remember, with_kwargs=True))

    for block in anatomy.blocks:
        for name, child in block.module.named_children():
            watch(block, name, child)
    try:
        with torch.no_grad():
            anatomy.model(input_ids=probe_ids(anatomy.model), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [_after_attention(block, order) for block, order in zip(anatomy.blocks, calls, strict=True)]


def _after_attention(block: Block, calls: list[tuple[str, Tensor | None, Tensor]]) -> frozenset[str]:
    names: set[str] = set()
    update: Tensor | None = None  # what the attention half gives back so far; tensors are alive, so addresses differ
    for name, given, output in calls:
        if block.attn is not None and name in block.attn.names:
            update = output
        elif update is not None and block.attn is not None:
            on_update = given is not None and given.data_ptr() == update.data_ptr()
            if on_update and not block.attn.adds_residual:  # else the output is the stream (Bloom)
                update = output  # a norm on the attention's output (Gemma 2, OLMo 2)
            else:
                names.add(name)
    return frozenset(names)
