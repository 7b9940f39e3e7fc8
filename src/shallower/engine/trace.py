"""Trace and replay: the model's own forward runs once with its blocks passed over, and shows what each block would be
given.

A trace holds the embedding output and the exact arguments of every block (masks, rotary tables, per-layer variants).
Any subset of blocks can then be run on any state, and the part after the blocks replayed, without a line of family
code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shallower.anatomy.dissect import Anatomy, Block, pack, probe_ids, unpack
from shallower.corpus.calibration import Batch
from shallower.errors import ModelError
from shallower.units import Kind

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class _Reached(Exception):
    """Carries a tensor out of a forward that need not go on."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@dataclass(frozen=True, eq=False)
class Trace:
    """One batch, ready to be replayed through any subset of blocks.

    entry: the stream entering block 0, [sequences, length, hidden].
    calls: for each block, its arguments without the hidden states.
    """

    anatomy: Anatomy
    batch: Batch
    entry: Tensor
    calls: tuple[Arguments, ...]

    def run(self, index: int, hidden: Tensor, without: tuple[Kind, ...] = ()) -> Tensor:
        """Block `index`, without the named sublayers, applied to `hidden` [sequences, length, hidden]."""
        block = self.anatomy.blocks[index]
        args, kwargs = self.calls[index]
        with ExitStack() as stack:
            for kind in without:
                stack.enter_context(block.without(kind))
            return unpack(block.module(hidden, *args, **kwargs))

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's own logits [sequences, length, vocabulary] for the stream `hidden` that leaves the last block."""
        last = self.anatomy.blocks[-1]
        with _passed_over(self.anatomy, lambda block, given: hidden if block is last else given):
            logits: Tensor = _forward(self.anatomy, self.batch).logits
        return logits

    def head_input(self, hidden: Tensor, head: nn.Module) -> Tensor:
        """What `head` (the output embedding) is given for the stream `hidden`: [sequences, length, hidden]."""
        last = self.anatomy.blocks[-1]
        with _passed_over(self.anatomy, lambda block, given: hidden if block is last else given):
            return reach(head, lambda: _forward(self.anatomy, self.batch))


def reach(module: nn.Module, forward: Callable[[], Any]) -> Tensor:
    """Run `forward` until `module` is called, and return the tensor that it is called with."""

    def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
        raise _Reached(args[0])

    handle = module.register_forward_pre_hook(stop)
    try:
        forward()
    except _Reached as reached:
        return reached.tensor
    finally:
        handle.remove()
    raise ModelError(f"the model's forward never calls its {type(module).__name__}; its output cannot be replayed.")


def trace(anatomy: Anatomy, batch: Batch) -> Trace:
    """Capture the embedding output and every block's arguments for one batch. Costs no block and no head."""
    entries: list[Tensor] = []
    calls: list[Arguments] = []

    def record(_: Block, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        entries.append(hidden)
        calls.append((args, kwargs))
        return hidden

    head = anatomy.model.get_output_embeddings()
    with _recorded(anatomy, record):
        if head is None:
            _forward(anatomy, batch)
        else:
            reach(head, lambda: _forward(anatomy, batch))
    return Trace(anatomy, batch, entries[0], tuple(calls))


def prove(anatomy: Anatomy, batch: Batch | None = None) -> None:
    """Check that trace and replay give the model's own logits on a few tokens.

    Raises ModelError with the difference seen when they do not, and when the model overflows in its number format.
    """
    if batch is None:
        batch = Batch(probe_ids(anatomy.model, 2), None)
    else:
        mask = batch.attention_mask
        batch = Batch(batch.input_ids[:2, :32], None if mask is None else mask[:2, :32])
    with torch.no_grad():
        expected = _forward(anatomy, batch).logits.float()
        _require_finite(anatomy, expected)
        replay = trace(anatomy, batch)
        hidden = replay.entry
        for block in anatomy.blocks:
            hidden = replay.run(block.index, hidden)
        found = replay.logits(hidden).float()
    difference = float((expected - found).abs().max())
    if not difference <= 1e-3 * max(1.0, float(expected.abs().max())):
        raise ModelError(
            f"{anatomy.family} is not supported: running its {len(anatomy.blocks)} blocks ({anatomy.path}) one by one "
            "does "
            f"not give the model's logits (largest difference {difference:.3g}), so its blocks pass on more than one "
            "residual "
            "stream. Please report the family."
        )


def _require_finite(anatomy: Anatomy, logits: Tensor) -> None:
    if bool(logits.isfinite().all()):
        return
    dtype = str(anatomy.model.dtype).removeprefix("torch.")
    wider = {"float16": "use --dtype float32 (or bfloat16)", "bfloat16": "use --dtype float32"}
    raise ModelError(
        f"this {anatomy.family} model gives no finite logits in {dtype}: "
        f"{wider.get(dtype, 'its weights are damaged, so load it from an undamaged checkpoint')}."
    )


def _forward(anatomy: Anatomy, batch: Batch) -> Any:
    ids = batch.input_ids.to(anatomy.model.device)
    mask = torch.ones_like(ids) if batch.attention_mask is None else batch.attention_mask.to(ids.device)
    return anatomy.model(input_ids=ids, attention_mask=mask, use_cache=False)


@contextmanager
def _recorded(
    anatomy: Anatomy, stub: Callable[[Block, Tensor, tuple[Any, ...], dict[str, Any]], Tensor]
) -> Iterator[None]:
    """Inside the `with`, a block does not compute: it returns `stub(block, hidden, other args, other kwargs)`."""

    def forward_of(block: Block) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if args:
                hidden, rest = args[0], args[1:]
            else:
                hidden, rest = kwargs.pop("hidden_states"), ()
            return pack(stub(block, hidden, rest, kwargs), block.arity)

        return forward

    own = [block.module.__dict__.get("forward") for block in anatomy.blocks]
    try:
        for block in anatomy.blocks:
            block.module.forward = forward_of(block)  # an attribute of the instance shadows the class's method
        yield
    finally:
        for block, forward in zip(anatomy.blocks, own, strict=True):
            if forward is None:
                del block.module.forward
            else:
                block.module.forward = forward


def _passed_over(anatomy: Anatomy, state: Callable[[Block, Tensor], Tensor]) -> Any:
    return _recorded(anatomy, lambda block, hidden, args, kwargs: state(block, hidden))
