"""Make whole blocks of the halves that are left: without mlp.3 and attn.4, attn.3 and mlp.4 are one ordinary block."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor, nn

from shallower.anatomy.dissect import Anatomy, Block, Sublayer, run_probe, unpack
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


def re_pair(anatomy: Anatomy, units: Collection[Unit]) -> list[Layer]:
    """Layers of the model without `units`, joining an attention with the MLP that follows it.

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
    return layers


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


def layouts(anatomy: Anatomy, units: Collection[Unit]) -> list[list[Layer]]:
    """The ways to lay out the model without `units`, in the order in which `cut` tries them; each once."""
    ways = [re_pair(anatomy, units), *(in_place(anatomy, units, keep_empty=keep) for keep in (False, True))]
    return [layers for number, layers in enumerate(ways) if layers and layers not in ways[:number]]


def mlp_side(anatomy: Anatomy) -> list[frozenset[str]]:
    """Of each block, the children that belong to its MLP half: called after the attention, not on its output alone."""
    return [_after_attention(block, calls) for block, calls in zip(anatomy.blocks, _watch(anatomy), strict=True)]


def serving(anatomy: Anatomy) -> dict[Unit, tuple[str, ...]]:
    """For each sublayer the children of its block that only serve it: norms of what it reads and of what it gives."""
    found: dict[Unit, tuple[str, ...]] = {}
    for block, calls in zip(anatomy.blocks, _watch(anatomy), strict=True):
        for kind in ("attn", "mlp"):
            sublayer = block.sublayer(kind)
            if sublayer is not None and not sublayer.adds_residual:
                found[Unit(block.index, kind)] = _servants(block, sublayer, calls)
    return found


@dataclass(frozen=True)
class _Call:
    """A child that was called, on what, and what it gave; the tensors stay alive, so that their addresses differ."""

    name: str
    given: Tensor | None
    output: Tensor


def _watch(anatomy: Anatomy) -> list[list[_Call]]:
    """Of each block, the calls of its children on a few tokens, in order."""
    calls: list[list[_Call]] = [[] for _ in anatomy.blocks]
    handles = []

    def watch(block: Block, name: str, child: nn.Module) -> None:
        def remember(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
            given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            calls[block.index].append(_Call(name, given, unpack(output)))

        handles.append(child.register_forward_hook(remember, with_kwargs=True))

    for block in anatomy.blocks:
        for name, child in block.module.named_children():
            watch(block, name, child)
    run_probe(anatomy.model, handles)
    return calls


def _after_attention(block: Block, calls: list[_Call]) -> frozenset[str]:
    names: set[str] = set()
    update: Tensor | None = None  # what the attention half gives back so far
    for call in calls:
        if block.attn is not None and call.name in block.attn.names:
            update = call.output
        elif update is not None and block.attn is not None:
            on_update = call.given is not None and call.given.data_ptr() == update.data_ptr()
            if on_update and not block.attn.adds_residual:  # else the output is the stream (Bloom)
                update = call.output  # a norm on the attention's output (Gemma 2, OLMo 2)
            else:
                names.add(call.name)
    return frozenset(names)


def _servants(block: Block, sublayer: Sublayer, calls: list[_Call]) -> tuple[str, ...]:
    """Norms whose only reader is the sublayer, and those whose only source it is."""
    own = [call for call in calls if call.name in sublayer.names]
    others = [call for call in calls if call.name not in sublayer.names]
    names = []
    for call in others:
        norm = block.module.get_submodule(call.name)
        if not any(True for _ in norm.parameters()) or any(p.dim() > 1 for p in norm.parameters()):
            continue
        readers = [
            other.name for other in calls if other is not call and _address(other.given) == _address(call.output)
        ]
        reads = {_address(one.output) for one in own}
        if (readers and set(readers) <= set(sublayer.names)) or _address(call.given) in reads:
            names.append(call.name)
    return tuple(names)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
