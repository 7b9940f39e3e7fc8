"""The residual stream at both ends of a block and between its sublayers, seen while the model's own forward runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shallower.anatomy.dissect import Anatomy, Block, probe_ids, unpack
from shallower.corpus.calibration import Batch
from shallower.engine.head import forward_to_head
from shallower.engine.trace import Trace, trace
from shallower.units import Kind, Unit


@dataclass(frozen=True)
class Midpoint:
    """Where a block's stream can be seen between attention and MLP.

    child: the module that is given it, or, if `returned`, gives it back; None where no module does.
    parallel: both sublayers read the stream that enters the block.
    """

    child: str | None = None
    returned: bool = False
    parallel: bool = False


@dataclass(frozen=True, eq=False)
class Crossing:
    """The stream crossing one block, [sequences, length, hidden] each.

    before, between: copies, as a block may go on to change in place what it was given.
    between: after the attention, before the MLP; None where nobody asked for sublayers or the block has only one.
    given: `between` as the model's own forward has it, on the way to `after`; None where it was worked out apart.
    without_attention: what the block returns without its attention, where there is a `between` but no `given`.
    """

    block: Block
    before: Tensor
    between: Tensor | None
    given: Tensor | None
    without_attention: Tensor | None
    after: Tensor
    parallel: bool

    def changes(self) -> dict[Unit, tuple[Tensor, Tensor]]:
        """For each unit the stream before and after it."""
        index, half = self.block.index, self.between
        found = {Unit(index, "block"): (self.before, self.after)}
        if self.block.attn is not None:  # alone in its block, it is the block
            found[Unit(index, "attn")] = (self.before, self.after if half is None else half)
        if self.block.mlp is not None:
            found[Unit(index, "mlp")] = (self.before if half is None else half, self.after)
            if self.parallel and half is not None:
                found[Unit(index, "mlp")] = (self.before, self.before + (self.after - half))
        return found


@contextmanager
def crossings(
    anatomy: Anatomy, midpoints: Mapping[int, Midpoint], visit: Callable[[Crossing], None], *, gates: bool = False
) -> Iterator[None]:
    """Inside the `with`, each block that the model runs is shown to `visit` as soon as it is left.

    midpoints: what `find_midpoints` returned; empty where sublayers do not matter. gates: also run blocks without their
    attention where there is no other way to tell what it adds to `after`.
    """
    entering: dict[int, Tensor] = {}
    apart: dict[int, tuple[Tensor, Tensor | None]] = {}
    given: dict[int, Tensor] = {}

    def enter(block: Block, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        entering[block.index] = hidden.detach().clone()
        midpoint = midpoints.get(block.index)
        if midpoint is None or midpoint.child is not None:
            return

        def run_without(kind: Kind) -> Tensor:
            with block.without(kind), torch.no_grad():
                # not a call, which would come here again; the instance's own, as accelerate moves what it is given
                return unpack(module.forward(*args, **kwargs))

        apart[block.index] = run_without("mlp"), run_without("attn") if gates and block.attn is not None else None

    def keep(index: int, middle: Tensor) -> None:
        given[index] = middle
        apart[index] = middle.detach().clone().view(entering[index].shape), None  # OPT has one row a token

    def pause(index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(index, args[0] if args else next(iter(kwargs.values())))

    def note(index: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        keep(index, unpack(output))

    def leave(block: Block, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        between, without_attention = apart.pop(block.index, (None, None))
        parallel = block.index in midpoints and midpoints[block.index].parallel
        after, middle = unpack(output), given.pop(block.index, None)
        before = entering.pop(block.index).to(after.device)  # it may come from a block on another device
        visit(Crossing(block, before, between, middle, without_attention, after, parallel))

    handles = []
    for block in anatomy.blocks:
        handles.append(block.module.register_forward_pre_hook(partial(enter, block), with_kwargs=True))
        handles.append(block.module.register_forward_hook(partial(leave, block)))
        midpoint = midpoints.get(block.index)
        if midpoint is not None and midpoint.child is not None:
            child = block.module.get_submodule(midpoint.child)
            if midpoint.returned:
                handles.append(child.register_forward_hook(partial(note, block.index)))
            else:
                handles.append(child.register_forward_pre_hook(partial(pause, block.index), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_to_head(anatomy: Anatomy, batch: Batch) -> None:
    """The model's own forward, but for the output embedding, whose cost nobody asked for."""
    ids = batch.input_ids.to(anatomy.model.device)
    mask = torch.ones_like(ids) if batch.attention_mask is None else batch.attention_mask.to(ids.device)
    forward_to_head(anatomy, lambda: anatomy.model(input_ids=ids, attention_mask=mask, use_cache=False))


def find_midpoints(anatomy: Anatomy) -> dict[int, Midpoint]:
    """For each block whose MLP is not all of it, where the stream before the MLP can be seen.

    A child qualifies when what it is given, or gives back, equals what the block returns without its MLP, on a few
    tokens. Where none does, sublayers are parallel if the MLP is given the same with and without the attention.
    """
    found: dict[int, Midpoint] = {}
    with torch.no_grad():
        replay = trace(anatomy, Batch(probe_ids(anatomy.model), None))
        hidden = replay.entry
        for block in anatomy.blocks:
            given, returned = _watched(replay, block, hidden)
            if block.mlp is not None:
                half = replay.run(block.index, hidden, ("mlp",))
                midpoint = _midpoint(half, given, returned)
                if block.attn is not None:
                    found[block.index] = midpoint or Midpoint(parallel=_is_parallel(replay, block, hidden, given))
                elif not _alike(half, hidden):  # Falcon-H1: mixers that no unit names come before the MLP
                    found[block.index] = midpoint or Midpoint()
            hidden = replay.run(block.index, hidden)
    return found


def _midpoint(half: Tensor, given: Mapping[str, Tensor], returned: Mapping[str, Tensor]) -> Midpoint | None:
    for tensors in (given, returned):
        for name, tensor in tensors.items():
            if _alike(tensor, half):
                return Midpoint(name, returned=tensors is returned)
    return None


def _is_parallel(replay: Trace, block: Block, hidden: Tensor, given: Mapping[str, Tensor]) -> bool:
    assert block.mlp is not None
    first = block.mlp.names[0]
    alone, _ = _watched(replay, block, hidden, "attn")
    return _alike(given[first], alone[first])


def _alike(first: Tensor, second: Tensor) -> bool:
    return first.numel() == second.numel() and torch.allclose(
        first.to(second.device).reshape(second.shape), second, rtol=1e-4, atol=1e-5
    )


def _watched(
    replay: Trace, block: Block, hidden: Tensor, *without: Kind
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The first tensor that each child of a block is given, and gives back."""
    given: dict[str, Tensor] = {}
    returned: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        for seen, values in (
            (given, (*args, *kwargs.values())),
            (returned, output if isinstance(output, tuple) else (output,)),
        ):
            tensors = [value for value in values[:1] if isinstance(value, Tensor)]
            if tensors:
                seen.setdefault(name, tensors[0])

    handles = [
        child.register_forward_hook(partial(note, name), with_kwargs=True)
        for name, child in block.module.named_children()
    ]
    try:
        replay.run(block.index, hidden, without)
    finally:
        for handle in handles:
            handle.remove()
    return given, returned
