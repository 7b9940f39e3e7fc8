"""What other software takes an ordinary checkpoint for, where it does not read all of its config."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PretrainedConfig, PreTrainedModel

from shallower.surgery.config import stored_text

# llama.cpp, early 2026: `swa_period` or `n_no_rope_layer_step` in src/models/ of cohere2, openai-moe, afmoe, gemma2,
# gemma3, llama4 and smollm3, for which conversion/ writes no pattern. vLLM, early 2026: `layer_idx % 2` in gpt_oss.py.
_PERIODS: Mapping[str, int] = {
    "afmoe": 4,
    "cohere2": 4,
    "gemma2": 2,
    "gemma3_text": 6,
    "gpt_oss": 2,
    "llama4_text": 4,
    "smollm3": 4,
}
"""By model type, every which block has full attention, or no rotary positions, whatever the config says."""

# Likewise `f_attention_scale` of gemma2 and gemma3, chosen by the number of blocks.
_LARGEST: Mapping[str, int] = {"gemma2": 46, "gemma3_text": 62}
"""By model type, how many blocks a model has whose attention is scaled by the width of the model / its heads."""

_LLAMA_CPP = "llama.cpp, as of early 2026, computes"


def misreadings(model: PreTrainedModel) -> tuple[str, ...]:
    """What llama.cpp and vLLM take for something else in this model, one sentence each."""
    text = stored_text(model.config)
    found = []
    period = _PERIODS.get(text.model_type)
    if period is not None and any(rare != (at % period == period - 1) for at, rare in enumerate(_rare(text))):
        who = "llama.cpp and vLLM, as of early 2026, compute" if text.model_type == "gpt_oss" else _LLAMA_CPP
        what = "no rotary positions" if hasattr(text, "no_rope_layers") else "full attention"
        found.append(
            f"{who} something else, without a warning: one block in {period} has {what} there, by its number, and in "
            "this model others have."
        )
    largest = _LARGEST.get(text.model_type)
    if largest is not None and text.num_hidden_layers != largest:
        by_width = text.hidden_size // text.num_attention_heads
        if text.query_pre_attn_scalar == by_width != text.head_dim:
            found.append(
                f"{_LLAMA_CPP} something else, without a warning: it scales this attention rightly only in a model of "
                f"{largest} blocks."
            )
    return tuple(found)


def _rare(text: PretrainedConfig) -> list[bool]:
    """Of each block, whether it lacks rotary positions, or, where blocks do not differ in these, a window."""
    if (rotary := getattr(text, "no_rope_layers", None)) is not None:
        return [not has for has in rotary]
    return [kind == "full_attention" for kind in getattr(text, "layer_types", None) or ()]
