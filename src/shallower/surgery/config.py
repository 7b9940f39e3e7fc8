"""Rewrite a config for a model with fewer blocks.

Three forms of per-block field are known by the way they look, and one table holds the fields that say by a formula
which block is of which kind:

- a list with one entry a block is cut, if its name speaks of layers, blocks, kinds or patterns (`_PER_BLOCK`) or is one
  of the few sizes that families give per block (`_SIZES_PER_BLOCK`). Every other list is left alone, whatever its
  length: rope factors, multipliers and token ids can happen to be as many as the blocks;
- a list of block indices (`_INDICES`) is filtered and renumbered, as are the keys of `per_layer_config`;
- `_FORMULAS` rewrites counts (`first_k_dense_replace`), periods (`attn_layer_period`) and constants that depend on
  depth, or refuses where no value is right.

Lists that a config computed from a period (`layer_types` from `sliding_window_pattern`, …) are attributes by the time
a config exists, and are written out by cutting them. That nothing was forgotten is proved by `surgery.skeleton`.
"""

from __future__ import annotations

import copy
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from shallower.errors import ModelError
from shallower.units import Kind, Unit, listed

_PER_BLOCK = re.compile(r"(^|_)(layers?|blocks?)(_|$)|_types$|_pattern$|_modes$")
_SIZES_PER_BLOCK = {
    "head_dim",
    "intermediate_size",
    "moe_intermediate_size",
    "moe_topk",
    "num_attention_heads",
    "num_experts",
    "num_key_value_heads",
    "num_kv_heads",
    "num_query_heads",
    "num_shared_expert",
    "sliding_window",
}
_INDICES = re.compile(r"_(indices|indexes|idxs|layer_ids|layers_ids)$|^(mlp_only|moe|dense|cross_attention)_layers$")
_ABOUT_MLP = re.compile(r"mlp|moe|ffn|feed_forward|expert|intermediate|spars|dense")


@dataclass(frozen=True)
class _Cut:
    """What a formula sees: the dense text config, the new one, and where each new block's two halves come from."""

    dense: PretrainedConfig
    new: PretrainedConfig
    attn: tuple[int, ...]
    mlp: tuple[int, ...]

    @property
    def blocks(self) -> int:
        return int(self.dense.num_hidden_layers)


def stored_text(config: PretrainedConfig) -> Any:
    """The part of a config that describes the language model; what is set on it is stored with the rest. Not what
    `get_text_config(decoder=True)` gives, which is a copy, made for caches, where attentions are missing.
    """
    return config.get_text_config()


def cut_config(config: PretrainedConfig, kept: Sequence[int], *, mlp: Sequence[int] | None = None) -> PretrainedConfig:
    """A copy of `config` for the blocks `kept`, in order; `config` is not changed.

    Args:
        config: The dense model's config; of a composite one, the text decoder's part is cut.
        kept: Indices of the dense blocks, increasing, at least one.
        mlp: The dense blocks that the MLPs come from where it is not `kept` (re-paired halves).

    Raises:
        ModelError: the family's config cannot describe these blocks, in one sentence that names the field.
    """
    new = copy.deepcopy(config)
    dense_text = config.get_text_config()
    text = new.get_text_config()
    cut = _Cut(dense_text, text, tuple(kept), tuple(kept if mlp is None else mlp))
    blocks = cut.blocks
    if not cut.attn or list(cut.attn) != sorted(set(cut.attn)) or cut.attn[0] < 0 or cut.attn[-1] >= blocks:
        raise ModelError(
            f"cannot keep blocks {list(kept)} of {blocks}: give increasing indices from 0 to {blocks - 1}."
        )
    if cut.attn == cut.mlp == tuple(range(blocks)):
        return new
    for field, why in _REFUSED.items():
        if _number(dense_text, field):
            raise ModelError(
                f"cannot cut blocks out of {config.model_type} with {field}={getattr(dense_text, field)}: {why}."
            )

    overrides = _per_layer_overrides(dense_text)
    text.per_layer_config = None
    text.num_hidden_layers = len(cut.attn)
    for name, value in vars(dense_text).items():
        if not isinstance(value, list | tuple) or name in _FORMULAS or name.startswith(("_", "mtp_")):
            continue
        source = cut.mlp if _ABOUT_MLP.search(name) else cut.attn
        if _INDICES.search(name):
            setattr(text, name, type(value)(new for new, old in enumerate(source) if old in value))
        elif len(value) == blocks and (_PER_BLOCK.search(name) or name in _SIZES_PER_BLOCK):
            setattr(text, name, type(value)(value[old] for old in source))
    for name, rewrite in _FORMULAS.items():
        if name in vars(dense_text) and getattr(dense_text, name) is not None:
            rewrite(cut, name)
    if overrides:
        if cut.attn != cut.mlp:
            raise ModelError(
                f"cannot join halves of different blocks of {config.model_type}: it has a per_layer_config."
            )
        text.per_layer_config = {new: overrides[old] for new, old in enumerate(cut.attn) if old in overrides}
    _require_loadable(new)
    return new


def _comparable(config: PretrainedConfig) -> dict[str, Any]:
    """What a config says of the model, without names and versions."""
    ignored = {"transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype"}
    fields = json.loads(config.to_json_string(use_diff=False))
    return {name: value for name, value in fields.items() if name not in ignored}


def _require_loadable(config: PretrainedConfig) -> None:
    """Raise ModelError unless the config's own class reads back what it writes."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "config.json")
            config.to_json_file(path)
            again = type(config).from_json_file(path)
    except Exception as error:  # validators of 400 config classes raise what they like
        reason = str(error).strip().splitlines()[-1]
        raise ModelError(
            f"{config.model_type} has no valid config for the blocks that would be left: {reason}"
        ) from error
    wanted, got = _comparable(config), _comparable(again)
    changed = sorted(name for name in wanted if got.get(name) != wanted[name])
    if changed:
        raise ModelError(
            f"a config of {config.model_type} cannot say what the blocks that would be left are: when it is read "
            f"again, {changed[0]} is {got.get(changed[0])!r} in place of {wanted[changed[0]]!r}."
        )


def _per_layer_overrides(text: PretrainedConfig) -> dict[int, dict[str, Any]]:
    spec = vars(text).get("_heterogeneity_spec")
    return {} if spec is None else copy.deepcopy(spec.per_layer_overrides)


def _number(config: PretrainedConfig, field: str) -> float:
    value = vars(config).get(field)
    return value if isinstance(value, int | float) else 0


_REFUSED = {
    "num_kv_shared_layers": "the last blocks share the keys and values of others by their place",
    "hidden_size_per_layer_input": "the embedding holds a slice for every block",
}


def _count_before(cut: _Cut, name: str) -> None:
    """A number of leading blocks: those of them that are kept."""
    source = cut.mlp if _ABOUT_MLP.search(name) else cut.attn
    setattr(cut.new, name, sum(old < getattr(cut.dense, name) for old in source))


def _sparse_step(cut: _Cut, name: str) -> None:
    """Every `decoder_sparse_step`-th MLP is routed unless listed: list all that are not, with step 1."""
    step, listed = cut.dense.decoder_sparse_step, cut.dense.mlp_only_layers or ()
    routed = [old not in listed and (old + 1) % step == 0 for old in cut.mlp]
    cut.new.decoder_sparse_step = 1
    cut.new.mlp_only_layers = [new for new, is_routed in enumerate(routed) if not is_routed]


def _moe_interval(cut: _Cut, name: str) -> None:
    """ERNIE: every `moe_layer_interval`-th MLP from start to end is routed."""
    dense, count = cut.dense, len(cut.mlp)

    def routed(index: int, start: int, end: int, interval: int) -> bool:
        return (index + 1) % interval == 0 and start <= index <= end

    wanted = [
        routed(old, dense.moe_layer_start_index, dense.moe_layer_end_index, dense.moe_layer_interval) for old in cut.mlp
    ]
    places = [index for index, is_routed in enumerate(wanted) if is_routed]
    start, end = (places[0], places[-1]) if places else (count, count)
    for interval in (dense.moe_layer_interval, *range(1, count + 1)):
        if [routed(index, start, end, interval) for index in range(count)] == wanted:
            cut.new.moe_layer_start_index, cut.new.moe_layer_end_index = start, end
            cut.new.moe_layer_interval = interval
            return
    _refuse_period(cut, name)


def _period(about: str) -> Callable[[_Cut, str], None]:
    """Jamba: block i is special where i % period == offset."""

    def rewrite(cut: _Cut, name: str) -> None:
        if about == "attn_layer" and "layers_block_type" in vars(cut.dense):  # Zamba: the list says it all
            return
        old_period, old_offset = getattr(cut.dense, f"{about}_period"), getattr(cut.dense, f"{about}_offset")
        source = cut.mlp if _ABOUT_MLP.search(about) else cut.attn
        wanted = [old % old_period == old_offset for old in source]
        for period in (old_period, *range(1, len(wanted) + 2)):
            for offset in range(period):
                if [index % period == offset for index in range(len(wanted))] == wanted:
                    # The config refuses an offset that is not below the period, also between the two assignments.
                    setattr(cut.new, f"{about}_offset", 0)
                    setattr(cut.new, f"{about}_period", period)
                    setattr(cut.new, f"{about}_offset", offset)
                    return
        _refuse_period(cut, name)

    return rewrite


def _refuse_period(cut: _Cut, name: str) -> None:
    attn, mlp = (set(range(cut.blocks)) - set(kept) for kept in (cut.attn, cut.mlp))
    gone: dict[Kind, set[int]] = {"block": attn & mlp, "attn": attn - mlp, "mlp": mlp - attn}
    removed = listed(Unit(index, kind) for kind, indices in gone.items() for index in indices)
    raise ModelError(
        f"{cut.dense.model_type} says with {name}={getattr(cut.dense, name)} which blocks are of which kind, and no "
        f"value says it for the blocks that are left without {removed}: remove whole periods."
    )


def _attention_types(cut: _Cut, name: str) -> None:
    """GPT-Neo: run-length form of attention_layers."""
    cut.new.attention_types = [[[cut.dense.attention_layers[old] for old in cut.attn], 1]]


def _repeated_types(cut: _Cut, name: str) -> None:
    """RecurrentGemma: a list that is repeated to the number of blocks; as long as they are, it says all."""
    types = cut.dense.block_types
    cut.new.block_types = [types[old % len(types)] for old in cut.attn]


def _numbered_in_dict(cut: _Cut, name: str) -> None:
    """Kimi Linear: lists of block numbers, counted from 1, which other software reads instead of `layer_types`."""
    dense = getattr(cut.dense, name)
    numbers = {
        kind: [new for new, old in enumerate(cut.attn, start=1) if old + 1 in dense[kind]]
        for kind in ("kda_layers", "full_attn_layers")
        if kind in dense
    }
    setattr(cut.new, name, dense | numbers)


def routed_by_step(step: int, blocks: int) -> list[int]:
    """Llama 4: places of the MLPs that are routed where every `step`-th of them is; 0 for none."""
    return [at for at in range(blocks) if step > 0 and (at + 1) % step == 0]


def _routed_step(cut: _Cut, name: str) -> None:
    """Llama 4: `moe_layers` says it all, and other software reads the step instead: one that says the same, if any."""
    blocks = len(cut.mlp)
    for step in (cut.dense.interleave_moe_layer_step, *range(1, blocks + 2)):
        if routed_by_step(step, blocks) == cut.new.moe_layers:
            cut.new.interleave_moe_layer_step = step
            return


def _scale_depth(cut: _Cut, name: str) -> None:
    """MiniCPM: branches are scaled by scale_depth / sqrt(number of blocks)."""
    cut.new.scale_depth = cut.dense.scale_depth * math.sqrt(len(cut.attn) / cut.blocks)


def _no_prediction_blocks(cut: _Cut, name: str) -> None:
    """Multi-token prediction blocks are not among the blocks that transformers loads, so they are not saved either."""
    setattr(cut.new, name, 0)


_FORMULAS: dict[str, Callable[[_Cut, str], None]] = {
    "first_k_dense_replace": _count_before,
    "num_dense_layers": _count_before,
    "max_window_layers": _count_before,
    "decoder_sparse_step": _sparse_step,
    "moe_layer_interval": _moe_interval,
    "attn_layer_period": _period("attn_layer"),
    "expert_layer_period": _period("expert_layer"),
    "attention_types": _attention_types,
    "block_types": _repeated_types,
    "linear_attn_config": _numbered_in_dict,
    "interleave_moe_layer_step": _routed_step,
    "scale_depth": _scale_depth,
    "num_nextn_predict_layers": _no_prediction_blocks,
    "num_mtp_layers": _no_prediction_blocks,
}
