"""Put a `Patch` at a cut of a model in memory.

The patched block stays the block it is: its class is replaced by a subclass whose forward patches the stream on the way
in, on the way out, or between attention and MLP. So whatever finds, replays, copies or cuts blocks goes on working.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import wraps
from typing import Any, get_args

from torch import Tensor, nn

from shallower.anatomy.dissect import Anatomy, pack, unpack
from shallower.anatomy.patch import Patch, Where, held, lifted
from shallower.anatomy.writers import Halves, find_writers
from shallower.engine.twins import Point
from shallower.errors import ModelError

PLACES: tuple[Where, ...] = get_args(Where)


def attach(anatomy: Anatomy, index: int, where: Where, patch: Patch, halves: Halves) -> None:
    """Patch the stream at block `index`, in place.

    anatomy: of the cut model, and `halves` of its block. Where a patch stands already, the new one goes behind it.

    Raises ModelError for the middle of a block whose attention does not write to the stream on its own.
    """
    block = anatomy.blocks[index].module
    if where == "middle":
        if halves.attn is None and any(patches(block)):  # a map changes what is seen of the sublayers in front of it
            halves = _halves_beneath(anatomy, index)
        if halves.attn is None or not halves.sequential:
            raise ModelError(
                f"{anatomy.family} has no point between attention and MLP where a map could stand (block {index})."
            )
        sublayer = anatomy.blocks[index].attn
        assert sublayer is not None
        name = sublayer.names[-1]
        attention = block.get_submodule(name)
        _subclass(attention, _AttentionPatched)
        _hold(attention, "middle", patch)
        vars(attention).update(_factor=halves.attn.factor, _adds_residual=sublayer.adds_residual)
        _subclass(block, _BlockPatched)
        block._patched_attention = name  # type: ignore[assignment]
        return
    _subclass(block, _BlockPatched)
    _hold(block, where, patch)


def attach_at(anatomy: Anatomy, here: Point, patch: Patch, halves: Sequence[Halves]) -> None:
    """Patch the stream at a place of a cut model, in place. halves: of all of its blocks.

    Raises ModelError when the family has no such place.
    """
    index = here.index
    if here.without:
        attach(anatomy, index, "middle", patch, halves[index])
    elif index == 0:
        attach(anatomy, 0, "entry", patch, halves[0])
    else:
        attach(anatomy, index - 1, "exit", patch, halves[index - 1])


def patches(model: nn.Module) -> Iterator[tuple[str, Patch]]:
    """Every patch of a model with its name, such as `model.layers.12.exit_patch.0`."""
    for name, module in model.named_modules():
        if isinstance(module, Patch):
            yield name, module


def patches_at(anatomy: Anatomy, index: int, where: Where) -> list[Patch]:
    """The patches that stand there, in the order in which the stream meets them."""
    block = anatomy.blocks[index].module
    holder = block
    if where == "middle":
        name = vars(block).get("_patched_attention")
        if name is None:
            return []
        holder = block.get_submodule(name)
    standing = held(holder, where)
    return [] if standing is None else [patch for patch in standing if isinstance(patch, Patch)]


def repeat_patches(source: Anatomy, target: Anatomy) -> None:
    """Patch `target` as `source` is, which has the same blocks, in its own type and on its own device."""
    kind = {"dtype": target.model.dtype, "device": target.model.device}
    halves = find_writers(target)
    for block in source.blocks:
        for where in PLACES:
            for patch in patches_at(source, block.index, where):
                copied = Patch(
                    *(t.detach().to(**kind, copy=True) for t in (patch.down, patch.up, patch.mean, patch.bias))
                )
                copied.requires_grad_(patch.down.requires_grad)
                attach(target, block.index, where, copied, halves[block.index])


def _halves_beneath(anatomy: Anatomy, index: int) -> Halves:
    """How the block writes to the stream without its patches."""
    block = anatomy.blocks[index].module
    with ExitStack() as stack:
        for module in list(block.modules()):
            for where in PLACES:
                stack.enter_context(lifted(module, where))
        return find_writers(anatomy)[index]


def _hold(module: nn.Module, where: Where, patch: Patch) -> None:
    standing = held(module, where)
    if standing is None:
        standing = nn.Sequential()
        module.add_module(f"{where}_patch", standing)
    standing.append(patch)


def _subclass(module: nn.Module, mixin: type) -> None:
    if not isinstance(module, mixin):
        kind, forward = type(module), mixin.forward  # type: ignore[attr-defined]

        @wraps(kind.forward)  # what looks at its arguments goes on seeing the original's
        def patched(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return forward(self, *args, **kwargs)

        own = {"__module__": kind.__module__, "__doc__": kind.__doc__, "forward": patched}
        module.__class__ = type(kind.__name__, (mixin, kind), own)


class _BlockPatched:
    """Mixin of a block."""

    _patched_attention: str | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        entry, leaving = held(self, "entry"), held(self, "exit")  # type: ignore[arg-type]
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        if entry is not None:
            hidden = entry(hidden)
        if self._patched_attention is not None:
            attention = self.get_submodule(self._patched_attention)  # type: ignore[attr-defined]
            attention._entering = hidden  # not used where it was replaced by nothing
        if args:
            args = (hidden, *args[1:])
        else:
            kwargs["hidden_states"] = hidden
        output = super().forward(*args, **kwargs)  # type: ignore[misc]
        if leaving is None:
            return output
        patched = leaving(unpack(output))
        return (patched, *output[1:]) if isinstance(output, tuple) else patched


class _AttentionPatched:
    """Mixin of an attention: what it gives back, its update or the stream itself, also holds what the patch adds."""

    _entering: Tensor | None = None
    _factor: float = 1.0
    _adds_residual: bool = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)  # type: ignore[misc]
        given, middle = unpack(output), held(self, "middle")  # type: ignore[arg-type]
        assert self._entering is not None
        assert middle is not None
        factor = 1.0 if self._adds_residual else self._factor
        before = given if self._adds_residual else self._entering + factor * given
        self._entering = None
        given = given + (middle(before) - before) / factor
        return (given, *output[1:]) if isinstance(output, tuple) else pack(given, None)
