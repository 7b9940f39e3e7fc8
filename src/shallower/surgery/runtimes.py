"""What other software takes an ordinary checkpoint for, where it does not read all of its config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from shallower.surgery.config import routed_by_step, stored_text
from shallower.surgery.skeleton import buffers_of_other_places

# llama.cpp, early 2026: `swa_period` or `n_no_rope_layer_step` in src/models/ of cohere2, openai-moe, afmoe, gemma2,
# gemma3, llama4 and smollm3, for which conversion/ writes no pattern, and `full_attn_interval` of qwen3next, qwen35 and
# qwen35moe, which it writes as 4. vLLM, early 2026: `layer_idx % 2` in gpt_oss.py.
_PERIODS: Mapping[str, int] = {
    "afmoe": 4,
    "cohere2": 4,
    "gemma2": 2,
    "gemma3_text": 6,
    "gpt_oss": 2,
    "llama4_text": 4,
    "qwen3_5_moe_text": 4,
    "qwen3_5_text": 4,
    "qwen3_next": 4,
    "smollm3": 4,
}
"""By model type, every which block has full attention, or no rotary positions, whatever the config says."""

_OTHER_WEIGHTS = frozenset({"qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"})
"""Those of them whose two kinds of attention have other weights, so that the wrong kind does not load."""

# Likewise `f_attention_scale` of gemma2 and gemma3, chosen by the number of blocks.
_LARGEST: Mapping[str, int] = {"gemma2": 46, "gemma3_text": 62}
"""By model type, how many blocks a model has whose attention is scaled by the width of the model / its heads."""

# Likewise what exaone4 does where `n_layer` is 64, `scale_depth` in minicpm3, and `is_lite` in deepseek2.
_WITH_WINDOWS = 64
_SCALE_DEPTH = 1.4
_LITE = ((26, None), (27, None), (48, 128_256))
"""Blocks, and for some words of the vocabulary, of a DeepSeek whose queries are made without a low rank."""

_LLAMA_CPP = "llama.cpp, as of early 2026,"
_BOTH = "llama.cpp and vLLM, as of early 2026,"


def misreadings(model: PreTrainedModel) -> tuple[str, ...]:
    """What llama.cpp, vLLM and SGLang take for something else in this model, one sentence each."""
    text = stored_text(model.config)
    return (*_by_number(text), *_by_count(text), *_by_place(model), *_by_switch(text))


def _by_number(text: Any) -> Iterator[str]:
    """Of kinds of blocks that are taken from a block's number."""
    period = _PERIODS.get(text.model_type)
    if period is not None and any(rare != (at % period == period - 1) for at, rare in enumerate(_rare(text))):
        who = _wrong(_BOTH) if text.model_type == "gpt_oss" else _wrong(_LLAMA_CPP)
        who = f"{_LLAMA_CPP} refuses this model" if text.model_type in _OTHER_WEIGHTS else who
        what = "no rotary positions" if hasattr(text, "no_rope_layers") else "full attention"
        yield f"{who}: one block in {period} has {what} there, by its number, and in this model others have."
    if text.model_type == "llama4_text" and text.moe_layers != routed_by_step(
        text.interleave_moe_layer_step, text.num_hidden_layers
    ):
        yield (
            f"{_BOTH} refuse this model: which MLPs are routed they take from the blocks' numbers, by "
            f"interleave_moe_layer_step={text.interleave_moe_layer_step}, and in this model others are."
        )


def _by_count(text: Any) -> Iterator[str]:
    """Of what is taken from the number of blocks."""
    family, blocks = text.model_type, text.num_hidden_layers
    largest = _LARGEST.get(family)
    if largest is not None and blocks != largest:
        by_width = text.hidden_size // text.num_attention_heads
        if text.query_pre_attn_scalar == by_width != text.head_dim:
            yield f"{_wrong(_LLAMA_CPP)}: it scales this attention rightly only in a model of {largest} blocks."
    if family == "exaone4" and text.sliding_window is not None and blocks != _WITH_WINDOWS:
        yield (
            f"{_wrong(_LLAMA_CPP)}: in a model of {_WITH_WINDOWS} blocks alone does its attention have windows, and no "
            "rotary positions where it is full."
        )
    if family == "minicpm3" and text.scale_depth != _SCALE_DEPTH:
        yield (
            f"{_wrong(_LLAMA_CPP)}: it scales what blocks add by {_SCALE_DEPTH} / √{blocks}, and this model's "
            f"scale_depth is {text.scale_depth:.4g}."
        )
    if family in ("deepseek_v2", "deepseek_v3"):
        lite = any(blocks == number and words in (None, text.vocab_size) for number, words in _LITE)
        if lite != (text.q_lora_rank is None):
            yield (
                f"{_LLAMA_CPP} refuses this model: by its number of blocks it takes it for one "
                f"{'without' if lite else 'with'} a q_lora_rank, and that is {text.q_lora_rank}."
            )


def _by_place(model: PreTrainedModel) -> Iterator[str]:
    """Of tensors in the checkpoint that are made from a block's place."""
    if names := buffers_of_other_places(model):
        yield (
            f"software that computes {', '.join(names)} from the place of a block gets something else, without a "
            "warning: blocks have moved. transformers reads them from the checkpoint; vLLM, as of early 2026, computes "
            "what MiniMax has of these."
        )


def _by_switch(text: Any) -> Iterator[str]:
    """Of weights that a switch in the config says are there."""
    if text.model_type == "llama" and text.mlp_bias:
        yield f"{_wrong('SGLang, as of early 2026,')}: it leaves out the biases of the MLPs (mlp_bias)."


def _wrong(who: str) -> str:
    return f"{who} {'compute' if who == _BOTH else 'computes'} something else, without a warning"


def _rare(text: PretrainedConfig) -> list[bool]:
    """Of each block, whether it lacks rotary positions, or, where blocks do not differ in these, a window."""
    if (rotary := getattr(text, "no_rope_layers", None)) is not None:
        return [not has for has in rotary]
    return [kind == "full_attention" for kind in getattr(text, "layer_types", None) or ()]
