"""Cut units out of a model in memory.

The cut model has its own modules and config and shares the dense model's tensors; the dense model is not changed.
Nothing is believed: the new config must describe every block that is kept (`skeleton`), and on a few tokens the cut
model must give the logits of the dense model that runs with the units skipped, in one pass and token by token with its
cache.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from shallower.anatomy.dissect import Absent, Anatomy, Block, pack, probe_ids, substitutes
from shallower.errors import BudgetError, ModelError
from shallower.surgery.config import cut_config
from shallower.surgery.pairing import Layer, in_place, mlp_side, re_pair
from shallower.surgery.skeleton import (
    index_attributes,
    plain_attributes,
    require_place_free_buffers,
    require_same,
    skeleton_blocks,
)
from shallower.surgery.verify import cached_logits, decoding_noise, difference, full_logits, tolerance
from shallower.units import Unit, require_distinct

_STATES = {"linear_attention", "conv", "mamba", "dummy"}
"""Kinds of cache slot that do not count tokens."""


def cut(anatomy: Anatomy, units: Collection[Unit]) -> PreTrainedModel:
    """The model without `units`, sharing weight tensors with the dense one.

    Sublayers are re-paired to whole blocks where that is exact (`pairing`); those left over are replaced by an
    `Absent`, so that the model runs and generates but has no stock checkpoint.

    Args:
        anatomy: Of the dense model.
        units: Blocks and sublayers to remove. None removed gives a copy.

    Raises:
        BudgetError: A unit does not exist, is named twice, or nothing would be left.
        ModelError: The family cannot lose these units: its config cannot say what is left, or its forward or its cache
            go wrong.
    """
    removed = _checked(anatomy, units)
    attempts = [
        re_pair(anatomy, removed)[0],
        in_place(anatomy, removed, keep_empty=False),
        in_place(anatomy, removed, keep_empty=True),
    ]
    ids = probe_ids(anatomy.model)
    expected: Tensor | None = None
    problem: ModelError | None = None
    for number, layers in enumerate(attempts):
        if not layers or layers in attempts[:number]:
            continue
        try:
            model = _assemble(anatomy, layers)
            expected = _expected(anatomy, removed, ids) if expected is None else expected
            _require_equal(anatomy, model, ids, expected)
        except ModelError as error:
            problem = error
        else:
            return model
    assert problem is not None
    raise problem


@contextmanager
def skipping(anatomy: Anatomy, units: Collection[Unit]) -> Iterator[None]:
    """Inside the `with`, the dense model's forward passes `units` over; for one pass without a cache."""
    with ExitStack() as stack:
        for unit in units:
            block = anatomy.blocks[unit.index]
            stack.enter_context(_passing(block) if unit.kind == "block" else block.without(unit.kind))
        yield


@contextmanager
def _passing(block: Block) -> Iterator[None]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        return pack(hidden, block.arity)

    had = vars(block.module).get("forward")
    block.module.forward = forward
    try:
        yield
    finally:
        if had is None:
            del block.module.forward
        else:
            block.module.forward = had


def leftovers(model: nn.Module) -> tuple[Unit, ...]:
    """The removed sublayers that an `Absent` stands for, by their place in the dense model."""
    return tuple(sorted({m.unit for m in model.modules() if isinstance(m, Absent) and m.unit is not None}))


def _checked(anatomy: Anatomy, units: Collection[Unit]) -> frozenset[Unit]:
    require_distinct(units)
    known = set(anatomy.units)
    for unit in sorted(units):
        if unit not in known:
            last = len(anatomy.blocks) - 1
            what = f"there is no {unit} in this {anatomy.family} model"
            if unit.index <= last:
                raise BudgetError(f"{what}: {unit.kind} is not a part of block {unit.index} that can be told apart.")
            raise BudgetError(f"{what}: its blocks are 0 to {last}.")
    if not in_place(anatomy, units, keep_empty=False):
        raise BudgetError(f"cannot remove all {len(anatomy.blocks)} blocks; leave at least one.")
    return frozenset(units)


def _assemble(anatomy: Anatomy, layers: Sequence[Layer]) -> PreTrainedModel:
    """A model whose blocks are `layers`. Raises ModelError when the family's config cannot describe them."""
    dense = anatomy.model
    homes = [layer.home for layer in layers]
    mlps = [layer.home if layer.mlp is None else layer.mlp for layer in layers]
    whole = homes == mlps == list(range(len(anatomy.blocks)))
    dense_blocks = nn.ModuleList(block.module for block in anatomy.blocks)
    indices = index_attributes(dense_blocks)
    model = _copy(dense, lambda config: cut_config(config, homes, mlp=mlps))
    _restate(model, dense.config.get_text_config(decoder=True), model.config.get_text_config(decoder=True))
    copied = model.get_submodule(anatomy.path)
    assert isinstance(copied, nn.ModuleList)
    built = copied if whole else skeleton_blocks(dense, model.config, anatomy.path)
    if not whole:
        require_place_free_buffers(dense_blocks, indices)
    sides = mlp_side(anatomy) if homes != mlps else []
    blocks = []
    for layer, home, mlp, described in zip(layers, homes, mlps, built, strict=True):
        block = copied[home]
        if mlp != home:
            _join(block, copied[mlp], sides[home], sides[mlp], described)
        what = f"block {home}" if mlp == home else f"attn.{home} with mlp.{mlp}"
        missing = {
            name: (unit, module)
            for unit in layer.leftover
            for name, module in substitutes(anatomy.blocks[home], unit.kind).items()
        }
        if not whole:
            require_same(described, block, what, indices, tuple(missing))
        for name, (unit, module) in missing.items():
            if isinstance(module, Absent):
                module.unit = unit
            block._modules[name] = module
        blocks.append(block)
    parent, _, name = anatomy.path.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.ModuleList(blocks))
    _renumber(anatomy, model, layers, blocks, indices)
    return model


def _copy(dense: PreTrainedModel, new_config: Callable[[PretrainedConfig], PretrainedConfig]) -> PreTrainedModel:
    """Copy the module tree and share its tensors; what refers to the config refers to the new one in the copy."""
    if any(hasattr(module, "_hf_hook") for module in dense.modules()):
        raise ModelError(
            "the model is spread over devices by accelerate, and its modules cannot be taken apart: load it on one "
            "device."
        )
    memo: dict[int, Any] = {id(tensor): tensor for tensor in chain(dense.parameters(), dense.buffers())}
    blocks = dense.config.get_text_config(decoder=True).num_hidden_layers
    _map_config(dense.config, new_config(dense.config), memo)
    for module in dense.modules():
        config = vars(module).get("config")
        # Some modules keep a copy of their own.
        if not isinstance(config, PretrainedConfig) or id(config) in memo:
            continue
        if getattr(config.get_text_config(decoder=True), "num_hidden_layers", None) == blocks:
            _map_config(config, new_config(config), memo)
    return copy.deepcopy(dense, memo)


def _map_config(old: PretrainedConfig, new: PretrainedConfig, memo: dict[int, Any]) -> None:
    memo[id(old)] = new
    for name, value in vars(old).items():
        if isinstance(value, PretrainedConfig):
            _map_config(value, getattr(new, name), memo)


def _restate(model: nn.Module, dense: PretrainedConfig, new: PretrainedConfig) -> None:
    """Where a module repeats a config field that changed (`num_hidden_layers`), let it repeat the new one."""
    fields = vars(new)
    changed = {name: value for name, value in vars(dense).items() if name in fields and fields[name] != value}
    for module in model.modules():
        for name in changed.keys() & vars(module).keys():
            if vars(module)[name] == changed[name]:
                setattr(module, name, copy.copy(fields[name]))


def _join(block: nn.Module, other: nn.Module, out: frozenset[str], into: frozenset[str], described: nn.Module) -> None:
    """Put the MLP half of `other` in place of the MLP half of `block`."""
    if block._parameters or block._buffers:
        raise ModelError(f"{type(block).__name__} has weights of its own, which belong to neither half.")
    for name in out:
        del block._modules[name]
    for name in into:
        block._modules[name] = other._modules[name]
    # Attributes that tell the MLP's kind (`is_moe_layer`): the config decides, `other` must agree.
    theirs, wanted = dict(plain_attributes(other)), dict(plain_attributes(described))
    for name, value in plain_attributes(block):
        if name in wanted and name in theirs and value != wanted[name] == theirs[name]:
            setattr(block, name, wanted[name])


def _renumber(
    anatomy: Anatomy,
    model: PreTrainedModel,
    layers: Sequence[Layer],
    blocks: Sequence[nn.Module],
    indices: frozenset[str],
) -> None:
    """Number blocks by their new place, and attentions by the cache slot they use."""
    slots = _cache_slots(model.config.get_text_config(decoder=True), layers, blocks)
    for place, (layer, block) in enumerate(zip(layers, blocks, strict=True)):
        _set(block, indices, place)
        part = None if layer.attn is None else anatomy.blocks[layer.attn].attn
        for name in () if part is None else part.names:
            _set(block.get_submodule(name), indices, slots[place])


def _set(module: nn.Module, names: frozenset[str], value: int) -> None:
    for inner in module.modules():
        for name in names & vars(inner).keys():
            setattr(inner, name, value)


def _cache_slots(text: PretrainedConfig, layers: Sequence[Layer], blocks: Sequence[nn.Module]) -> dict[int, int]:
    """The cache slot of every block that has attention.

    The cache is made from the config, one slot a block, of the kind in `layer_types`; positions are read from its first
    slot, masks from the first of a kind. So the attentions of each kind take the first slots of that kind. Where the
    very first slot would stay empty, blocks without attention, whose kind means nothing, are given the kind of the
    first attention.
    """
    holders = [place for place, layer in enumerate(layers) if layer.attn is not None]
    types = getattr(text, "layer_types", None)
    kinds = list(types) if types is not None else ["all"] * len(layers)
    counting = [place for place in holders if kinds[place] not in _STATES]
    first = next((kind for kind in kinds if kind not in _STATES), None)
    if not counting:
        raise ModelError(
            f"{text.model_type} without these units would have no attention with a KV cache, by which it tells "
            "positions: keep at least one."
        )
    if first not in {kinds[place] for place in counting}:
        for place in set(range(len(layers))) - set(holders):
            kinds[place] = kinds[counting[0]]
            if hasattr(blocks[place], "attention_type"):
                setattr(blocks[place], "attention_type", kinds[place])  # noqa: B010, some blocks choose their mask by it
        text.layer_types = kinds
    slots: dict[int, int] = {}
    for kind in set(kinds):
        own = [place for place in holders if kinds[place] == kind]
        free = [place for place in range(len(kinds)) if kinds[place] == kind]
        slots.update(zip(own, free, strict=False))
    return slots


def _expected(anatomy: Anatomy, units: Collection[Unit], ids: Tensor) -> Tensor:
    with _refusing(anatomy.family), skipping(anatomy, units):
        return full_logits(anatomy.model, ids)


def _require_equal(anatomy: Anatomy, model: PreTrainedModel, ids: Tensor, expected: Tensor) -> None:
    """Raise ModelError unless the cut model computes the same, in one pass and token by token."""
    allowed = tolerance(model, expected)
    with _refusing(anatomy.family):
        whole = difference(full_logits(model, ids), expected)
    if whole > allowed:
        raise ModelError(
            f"{anatomy.family} does not compute the same when these units are cut out as when they are passed over: "
            f"logits differ by {whole:.3g}."
        )
    with _refusing(anatomy.family):
        stepwise = difference(cached_logits(model, ids), expected)
    if stepwise > allowed and stepwise > 4 * decoding_noise(anatomy.model, ids):
        raise ModelError(
            f"{anatomy.family} without these units decodes wrongly with its cache: logits differ by {stepwise:.3g}."
        )


@contextmanager
def _refusing(family: str) -> Iterator[None]:
    """A forward that fails on what is left is a reason to refuse."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise ModelError(f"{family} does not run without these units: {type(error).__name__}: {error}") from error
