"""Sublayers that the installed transformers leaves out by itself, where it does: `per_layer_config` with `skip`.

transformers 5.23 accepts the field and ignores it, and its models then compute as if nothing was removed. So nothing is
believed: a small random model of the class is run with and without it.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence

import torch
from transformers import PretrainedConfig, PreTrainedModel

from shallower.anatomy import Anatomy, dissect
from shallower.anatomy.dissect import probe_ids
from shallower.checkpoint.stock import quiet
from shallower.errors import out_of_memory
from shallower.packaged import has_maps
from shallower.surgery.config import cut_config
from shallower.surgery.cut import cut, skipping
from shallower.surgery.save import Export, form_of
from shallower.surgery.verify import cached_logits, difference, full_logits, tolerance
from shallower.units import Kind, Unit

_WORDS: Mapping[Kind, tuple[str, ...]] = {
    "attn": ("attention", "self_attn", "attn", "self_attention"),
    "mlp": ("mlp", "feed_forward", "ffn"),
}
_BLOCKS = 3
_SKIPPED = 1


def native(anatomy: Anatomy, units: Collection[Unit], model: PreTrainedModel) -> Export | None:
    """The stock class with a config that says what to skip; None where that class does not obey, or cannot say it."""
    entries = model.config.block_configs
    missing = [Unit(place, "attn") for place, entry in enumerate(entries) if entry.attention.no_op]
    missing += [Unit(place, "mlp") for place, entry in enumerate(entries) if entry.ffn.no_op]
    words = {} if has_maps(model.config) else skip_words(anatomy.model)
    if not {unit.kind for unit in missing} <= words.keys():
        return None
    filled = cut(anatomy, units, padded=True)
    if filled.config.num_hidden_layers != len(entries):
        return None  # a block that lost both halves was gone, and is there again
    made = _skipping(filled, missing, words)
    if made.load_state_dict(filled.state_dict(), strict=False, assign=True).missing_keys:
        return None
    made.tie_weights()
    return Export(form_of("native", made), made.eval())


def skip_words(model: PreTrainedModel) -> dict[Kind, str]:
    """By kind of sublayer the word with which `per_layer_config={i: {"skip": [word]}}` makes the class of `model` leave
    it out, in one pass and in decoding; without an entry where no word does.

    Runs a random model of three blocks, a few numbers wide. A class that cannot be built so small counts as one that
    does not obey.
    """
    devices = range(torch.cuda.device_count())
    try:
        with quiet(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            small = type(model)(_small(model.config)).eval()
            with torch.no_grad():
                for parameter in small.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
            anatomy = dissect(small)
    except Exception as error:  # code and validators of hundreds of classes raise what they like
        if out_of_memory(error):
            raise
        return {}
    found: dict[Kind, str] = {}
    for kind, words in _WORDS.items():
        for word in words:
            if _obeys(anatomy, Unit(_SKIPPED, kind), word):
                found[kind] = word
                break
    return found


def _small(config: PretrainedConfig) -> PretrainedConfig:
    """A config of the same class for three narrow blocks."""
    small = cut_config(config, range(min(_BLOCKS, config.num_hidden_layers)))
    heads = config.num_attention_heads // (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    sizes = {"vocab_size": 64, "num_attention_heads": max(heads, 2), "num_key_value_heads": max(2 // heads, 1)}
    sizes |= {"head_dim": 16, "hidden_size": 16 * max(heads, 2), "intermediate_size": 32}
    for name, size in sizes.items():
        if getattr(small, name, None) is not None:
            setattr(small, name, size)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(small, name, 0)  # within the vocabulary; some classes take no None
    return small


def _obeys(anatomy: Anatomy, unit: Unit, word: str) -> bool:
    """Whether a model of the same weights, told by `word` to skip `unit`, computes what the model without it does."""
    whole, ids = anatomy.model, probe_ids(anatomy.model)
    if unit not in anatomy.units:
        return False
    try:
        with skipping(anatomy, {unit}):
            wanted = full_logits(whole, ids)
        allowed = tolerance(whole, wanted)
        if difference(full_logits(whole, ids), wanted) <= allowed:
            return False  # it would not show
        told = _skipping(whole, [unit], {unit.kind: word})
        if told.load_state_dict(whole.state_dict(), strict=False).missing_keys:
            return False
        fewer = sum(p.numel() for p in told.parameters()) < sum(p.numel() for p in whole.parameters())
        return fewer and all(difference(run(told, ids), wanted) <= allowed for run in (full_logits, cached_logits))
    except Exception as error:  # as above
        if out_of_memory(error):
            raise
        return False


def _skipping(model: PreTrainedModel, missing: Sequence[Unit], words: Mapping[Kind, str]) -> PreTrainedModel:
    """A new model of the same class and config, told to skip `missing`."""
    config = copy.deepcopy(model.config)
    skip: dict[int, dict[str, list[str]]] = {}
    for unit in missing:
        skip.setdefault(unit.index, {"skip": []})["skip"].append(words[unit.kind])
    config.per_layer_config = skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(model.dtype)
    try:
        made: PreTrainedModel = type(model)(config).eval()
    finally:
        torch.set_default_dtype(before)
    return made
