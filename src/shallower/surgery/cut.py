"""Cut units out of a model in memory.

The cut model has its own modules and config and shares the dense model's tensors; the dense model is not changed.
Where sublayers are missing that do not pair up to whole blocks, it is of the class that a packaged checkpoint has
(`shallower.packaged`), whose KV cache holds only the attentions that are left.
Nothing is believed: the new config must describe every block that is kept (`skeleton`), and on a few tokens the cut
model must give the logits of the dense model that runs with the units skipped, in one pass and token by token with its
cache.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain, product
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from shallower.anatomy.dissect import Anatomy, Block, pack, probe_ids, substitutes
from shallower.anatomy.streamed import is_streamed
from shallower.checkpoint.stock import copied
from shallower.errors import BudgetError, ModelError, out_of_memory
from shallower.packaged import FORMAT, Absent, LeavesOut, entries, shallow_class
from shallower.surgery.config import cut_config
from shallower.surgery.pairing import Layer, in_place, layouts, mlp_side, serving
from shallower.surgery.silence import output_projections, silence
from shallower.surgery.skeleton import (
    index_attributes,
    plain_attributes,
    require_place_free_buffers,
    require_same,
    skeleton_blocks,
)
from shallower.surgery.verify import cached_logits, decoding_noise, difference, full_logits, tolerance
from shallower.units import Unit, require_distinct

_STATES = {"linear_attention", "conv", "mamba", "dummy", "moe", "mlp"}
"""Kinds of cache slot that do not count tokens."""


def cut(anatomy: Anatomy, units: Collection[Unit], *, padded: bool = False) -> PreTrainedModel:
    """The model without `units`, sharing weight tensors with the dense one.

    Sublayers are re-paired to whole blocks where that is exact (`pairing`). Those left over are replaced by an
    `Absent`: their weights and their part of the KV cache are gone.

    Args:
        anatomy: Of the dense model.
        units: Blocks and sublayers to remove. None removed gives a copy.
        padded: Keep the sublayers left over, but let them add nothing, by zeros in their output projections: a model of
            the stock class that computes the same and saves nothing by it.

    Raises:
        BudgetError: A unit does not exist, is named twice, or nothing would be left.
        ModelError: The family cannot lose these units: its config cannot say what is left, or its forward or its cache
            go wrong.
    """
    require_whole(anatomy.model)
    removed = _checked(anatomy, units)
    ids = probe_ids(anatomy.model)
    expected: Tensor | None = None
    problem: ModelError | None = None
    # What served a removed sublayer goes with it, unless its block needs it for something that cannot be observed; of a
    # padded sublayer the output projection is enough, unless something follows it.
    for layers, thorough in product(layouts(anatomy, removed), (not padded, padded)):
        if thorough is padded and not any(layer.leftover for layer in layers):
            continue  # the same again
        try:
            model = assemble(anatomy, layers, padded=padded, thorough=thorough)
            expected = _expected(anatomy, removed, ids) if expected is None else expected
            _require_equal(anatomy, model, ids, expected)
        except ModelError as error:
            problem = error
        else:
            return model
    assert problem is not None
    raise problem


def sharing(model: PreTrainedModel) -> PreTrainedModel:
    """A model with modules and a config of its own and the tensors of this one: for recoveries, which replace what they
    change.

    Raises ModelError when the modules are spread over devices, or cannot be copied.
    """
    return _copy(model, copy.deepcopy)


def require_whole(model: PreTrainedModel) -> None:
    """Raise ModelError when sublayers are missing already."""
    if isinstance(model, LeavesOut):
        raise ModelError(
            "this model lacks sublayers already, and nothing more can be cut out of it: prune the original, with a "
            "plan that removes all of it."
        )


def is_spread(model: PreTrainedModel) -> bool:
    """Whether accelerate moves what the modules are given, as their weights are on several devices or in files, or
    blocks are streamed.
    """
    return is_streamed(model) or any(hasattr(module, "_hf_hook") for module in model.modules())


def require_together(model: PreTrainedModel) -> None:
    """Raise ModelError when the model is spread over devices, or its blocks are streamed."""
    if is_streamed(model):
        raise ModelError(
            "the model's blocks are streamed, and a streamed model can be scored and searched, but not cut: leave "
            "--stream-blocks out (and choose --device cpu where the model does not fit on another)."
        )
    if is_spread(model):
        raise ModelError(
            "the model is spread over devices by accelerate, and its modules cannot be taken apart: load it on one "
            "device. As it is, it can be scored and searched, if all of its weights are in memory."
        )


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
    anatomy.require(units)
    if not in_place(anatomy, units, keep_empty=False):
        raise BudgetError(f"cannot remove all {len(anatomy.blocks)} blocks; leave at least one.")
    return frozenset(units)


def assemble(anatomy: Anatomy, layers: Sequence[Layer], *, padded: bool, thorough: bool) -> PreTrainedModel:
    """A model whose blocks are `layers`, sharing tensors with the dense one; nothing is verified.

    padded: as for `cut`. thorough: what only serves a removed sublayer goes, too.

    Raises ModelError when the family's config cannot describe them.
    """
    dense = anatomy.model
    homes = [layer.home for layer in layers]
    mlps = [layer.home if layer.mlp is None else layer.mlp for layer in layers]
    whole = homes == mlps == list(range(len(anatomy.blocks)))
    dense_blocks = nn.ModuleList(block.module for block in anatomy.blocks)
    indices = index_attributes(dense_blocks)
    model = _copy(dense, lambda config: cut_config(config, homes, mlp=mlps))
    _restate(model, dense.config.get_text_config(), model.config.get_text_config())
    copied = model.get_submodule(anatomy.path)
    assert isinstance(copied, nn.ModuleList)
    built = copied
    if not whole:
        with refusing(anatomy.family):  # as Zamba, whose class cannot be built of one block with attention
            built = skeleton_blocks(dense, model.config, anatomy.path)
    if not whole:
        require_place_free_buffers(dense_blocks, indices)
    if len(built) != len(layers):
        raise ModelError(
            f"a config of {model.config.model_type} for {len(layers)} blocks builds {len(built)}, as it says their "
            "number in another field, too: no blocks can be cut out of this family."
        )
    sides = mlp_side(anatomy) if homes != mlps else []
    leftover = [missed for layer in layers for missed in layer.leftover]
    served = serving(anatomy) if leftover and thorough else {}
    outputs = output_projections(anatomy, leftover) if padded else {}
    blocks = []
    for layer, home, mlp, described in zip(layers, homes, mlps, built, strict=True):
        block = copied[home]
        if mlp != home:
            _join(block, copied[mlp], sides[home], sides[mlp], described)
        what = f"block {home}" if mlp == home else f"attn.{home} with mlp.{mlp}"
        missing: dict[str, nn.Module] = {}
        for unit in layer.leftover:
            if padded:
                sublayer = anatomy.blocks[home].sublayer(unit.kind)
                names = (*sublayer.names, *served.get(unit, ())) if thorough and sublayer is not None else outputs[unit]
                silence(block, names)
                continue
            for name, module in substitutes(anatomy.blocks[home], unit.kind).items():
                if isinstance(module, Absent):
                    module.unit = unit
                missing[name] = module
            missing |= {name: nn.Identity() for name in served.get(unit, ())}
        if not whole:
            require_same(described, block, what, indices, tuple(missing))
        block._modules.update(missing)
        blocks.append(block)
    parent, _, name = anatomy.path.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.ModuleList(blocks))
    if not padded:
        _require_counting_attention(anatomy, model.config.get_text_config(), layers)
    if leftover and not padded:
        _become_shallow(anatomy, model, layers, served)
    _renumber(anatomy, layers, blocks, indices, padded=padded)
    return model


def _become_shallow(
    anatomy: Anatomy, model: PreTrainedModel, layers: Sequence[Layer], served: Mapping[Unit, tuple[str, ...]]
) -> None:
    """Make `model` of the class that leaves sublayers out, and its configs say which."""
    text = model.config.get_text_config()
    if text is not model.config:
        raise ModelError(
            f"{model.config.model_type} keeps the config of its text part inside another, and no form is known that "
            "leaves single sublayers out of it: remove whole blocks, or sublayers that pair up (mlp.3 with attn.4)."
        )
    if vars(text).get("_heterogeneity_spec") is not None:
        raise ModelError(
            f"{text.model_type} has a per_layer_config, and no form is known that leaves single sublayers out of it: "
            "remove whole blocks, or sublayers that pair up (mlp.3 with attn.4)."
        )
    described = []
    for layer in layers:
        entry: dict[str, dict[str, Any]] = {}
        for half, kind, source in (("attention", "attn", layer.attn), ("ffn", "mlp", layer.mlp)):
            block = anatomy.blocks[layer.home if source is None else source]
            sublayer = block.sublayer(kind)  # type: ignore[arg-type]
            entry[half] = {"no_op": source is None}
            if sublayer is None:
                entry[half]["modules"] = {}  # else readers take Llama's, which this family may not have
                continue
            if source is not None and kind == "mlp":
                continue
            stand_ins = substitutes(block, kind)  # type: ignore[arg-type]
            arities = dict(zip(sublayer.names, sublayer.arities, strict=True))
            entry[half]["modules"] = {n: arities[n] for n, module in stand_ins.items() if isinstance(module, Absent)}
            if source is None:
                passing = [name for name, module in stand_ins.items() if not isinstance(module, Absent)]
                unit = Unit(layer.home, kind)  # type: ignore[arg-type]
                entry[half]["serving"] = [*served.get(unit, ()), *passing]
        described.append(entry)
    packaged = {"format": FORMAT, "stock_class": type(model).__name__, "blocks_at": anatomy.path}
    stock = type(text)
    model.__class__ = shallow_class(type(model))
    # Weights keep the names that they have in memory, as transformers knows no other names for this class.
    model._weight_conversions = None
    configs = {id(config): config for module in model.modules() if (config := vars(module).get("config")) is not None}
    for config in configs.values():  # some modules keep a copy of their own
        if type(config) is stock and config.num_hidden_layers == len(layers):
            config.block_configs, config.packaged = entries(described), packaged
            config.__class__ = type(model).config_class
            # what was read from disk has its type on itself, by which transformers would rename the weights
            vars(config).pop("model_type", None)


def _copy(dense: PreTrainedModel, new_config: Callable[[PretrainedConfig], PretrainedConfig]) -> PreTrainedModel:
    """Copy the module tree and share its tensors; what refers to the config refers to the new one in the copy."""
    require_together(dense)
    memo: dict[int, Any] = {id(tensor): tensor for tensor in chain(dense.parameters(), dense.buffers())}
    blocks = dense.config.get_text_config().num_hidden_layers
    _map_config(dense.config, new_config(dense.config), memo)
    for module in dense.modules():
        config = vars(module).get("config")
        # Some modules keep a copy of their own.
        if not isinstance(config, PretrainedConfig) or id(config) in memo:
            continue
        if getattr(config.get_text_config(), "num_hidden_layers", None) == blocks:
            _map_config(config, new_config(config), memo)
    return copied(dense, memo)


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
    layers: Sequence[Layer],
    blocks: Sequence[nn.Module],
    indices: frozenset[str],
    *,
    padded: bool,
) -> None:
    """Number blocks by their new place, and attentions by the layer of the cache that they use."""
    slot = 0
    for place, (layer, block) in enumerate(zip(layers, blocks, strict=True)):
        _set(block, indices, place)
        sublayer = None if layer.attn is None else anatomy.blocks[layer.attn].attn
        for name in () if sublayer is None else sublayer.names:
            _set(block.get_submodule(name), indices, slot)
        slot += padded or layer.attn is not None


def _set(module: nn.Module, names: frozenset[str], value: int) -> None:
    for inner in module.modules():
        for name in names & vars(inner).keys():
            setattr(inner, name, value)


def _require_counting_attention(anatomy: Anatomy, text: PretrainedConfig, layers: Sequence[Layer]) -> None:
    """Raise ModelError unless an attention is left whose cache counts tokens, or the model has none to begin with."""

    def counts(config: PretrainedConfig, attentions: Sequence[int | None]) -> bool:
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(attentions)
        return any(one is not None and kind not in _STATES for one, kind in zip(attentions, kinds, strict=True))

    dense = anatomy.model.config.get_text_config()
    if counts(dense, range(len(anatomy.blocks))) and not counts(text, [layer.attn for layer in layers]):
        raise ModelError(
            f"{text.model_type} without these units would have no attention with a KV cache, by which it tells "
            "positions: keep at least one."
        )


def _expected(anatomy: Anatomy, units: Collection[Unit], ids: Tensor) -> Tensor:
    with refusing(anatomy.family), skipping(anatomy, units):
        return full_logits(anatomy.model, ids)


def _require_equal(anatomy: Anatomy, model: PreTrainedModel, ids: Tensor, expected: Tensor) -> None:
    """Raise ModelError unless the cut model computes the same, in one pass and token by token."""
    allowed = tolerance(model, expected)
    with refusing(anatomy.family):
        whole = difference(full_logits(model, ids), expected)
    if whole > allowed:
        raise ModelError(
            f"{anatomy.family} does not compute the same when these units are cut out as when they are passed over: "
            f"logits differ by {whole:.3g}."
        )
    with refusing(anatomy.family):
        stepwise = difference(cached_logits(model, ids), expected)
    if stepwise > allowed and stepwise > 4 * decoding_noise(anatomy.model, ids):
        raise ModelError(
            f"{anatomy.family} without these units decodes wrongly with its cache: logits differ by {stepwise:.3g}."
        )


@contextmanager
def refusing(family: str) -> Iterator[None]:
    """A forward that fails on what is left is a reason to refuse."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        if out_of_memory(error):  # which says nothing of the family
            raise
        raise ModelError(f"{family} does not run without these units: {type(error).__name__}: {error}") from error
