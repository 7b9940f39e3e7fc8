"""Trace and replay: the model's own forward runs once with its blocks passed over, and shows what each block would be
given.

A trace holds the embedding output and the exact arguments of every block (masks, rotary tables, per-layer variants).
Any subset of blocks can then be run on any state, and the part after the blocks replayed, without a line of family
code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shallower.anatomy.dissect import Anatomy, Block, pack, probe_ids, unpack
from shallower.checkpoint.dtype import dtype_name
from shallower.checkpoint.stock import hooks_on
from shallower.corpus.calibration import Batch
from shallower.errors import ModelError, out_of_memory
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
            found = reach(head, lambda: _forward(self.anatomy, self.batch))
        weight = getattr(head, "weight", None)  # elsewhere if it is tied to the first device's: seen before it is moved
        return found.to(weight.device) if isinstance(weight, Tensor) and not weight.is_meta else found


def stacked(hiddens: Sequence[Tensor]) -> Tensor:
    """Streams of several candidates as one batch, on the device of the first: blocks may be on several devices."""
    return torch.cat([hidden.to(hiddens[0].device) for hidden in hiddens])


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


def prove(anatomy: Anatomy, batch: Batch | None = None, *, shared: bool = False) -> None:
    """Check that trace and replay give the model's own logits on a few tokens. shared: several candidates go on from
    the stream that one block left.

    Raises ModelError with what was seen when they do not, when blocks leave something for each other besides the
    stream, when one writes into a `shared` stream, and when the model overflows in its number format.
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
        if replay.entry.dim() != 3 or replay.entry.shape[:2] != batch.input_ids.shape:
            raise _unsupported(anatomy, f"they are given {list(replay.entry.shape)} in place of one vector a token")
        beside = _collections(replay)
        try:
            found, written = _replayed(replay)
        except Exception as error:  # whatever a block raises that misses what another would have left for it
            if out_of_memory(error):
                raise
            raise _unsupported(anatomy, f"running them one by one fails ({error})") from error
    if _identities(_collections(replay)) != _identities(beside):
        raise ModelError(
            f"{anatomy.family} is not supported: its {len(anatomy.blocks)} blocks ({anatomy.path}) pass on keys and "
            "values besides the residual stream, which others read, so none can be judged or removed alone. Use a "
            "model whose blocks have keys and values of their own."
        )
    if shared and written:
        raise ModelError(
            f"block {written[0]} of this {anatomy.family} model writes into the residual stream that it is given, from "
            "which other candidates go on: score units by a metric of the stream, such as cosine, or let its forward "
            "work on a copy."
        )
    difference = float((expected - found.float()).abs().max())
    if not difference <= 1e-3 * max(1.0, float(expected.abs().max())):
        raise _unsupported(
            anatomy,
            f"running them one by one does not give the model's logits (largest difference {difference:.3g})",
        )


def _replayed(replay: Trace) -> tuple[Tensor, list[int]]:
    """The logits of a trace, by running all of its blocks; and the blocks that write into what they are given."""
    hidden, written = replay.entry, []
    for block in replay.anatomy.blocks:
        given = hidden.clone()
        left = replay.run(block.index, given)
        if not torch.equal(given, hidden):
            written.append(block.index)
        hidden = left
    return replay.logits(hidden), written


def _collections(replay: Trace) -> list[list[Any]]:
    """What is in each mapping and list that the blocks are given, where one may leave something for the next."""
    given = [one for args, kwargs in replay.calls for one in (*args, *kwargs.values())]
    mappings = [[part for item in one.items() for part in item] for one in given if isinstance(one, MutableMapping)]
    return mappings + [list(one) for one in given if isinstance(one, list)]


def _identities(collections: list[list[Any]]) -> list[list[int]]:
    return [[id(part) for part in parts] for parts in collections]


def _unsupported(anatomy: Anatomy, seen: str) -> ModelError:
    if any(module.training for module in anatomy.model.modules()):
        return ModelError(
            f"this {anatomy.family} model is in training mode, in which dropout makes each pass another one ({seen}): "
            "call model.eval() first."
        )
    if hooks := hooks_on(anatomy.model):
        return ModelError(
            f"this {anatomy.family} model cannot be replayed block by block ({seen}), and {hooks}, which then run at "
            "other times: remove them (handle.remove()) first."
        )
    return ModelError(
        f"{anatomy.family} is not supported: its {len(anatomy.blocks)} blocks ({anatomy.path}) pass on more than one "
        f"residual stream: {seen}. Please report the family."
    )


def _require_finite(anatomy: Anatomy, logits: Tensor) -> None:
    if bool(logits.isfinite().all()):
        return
    dtype = dtype_name(anatomy.model.dtype)
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
