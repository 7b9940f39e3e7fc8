"""Which architectures can be pruned: decoder-only causal language models. Decided from the config alone."""

from __future__ import annotations

from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from shallower.errors import ModelError

_ALLOWED = "only decoder-only causal language models (Llama, Qwen, Gemma, GPT-2, …) can be pruned"


def require_decoder(config: PretrainedConfig, name: str, *, trust_remote_code: bool = False) -> None:
    """Raise ModelError, naming the architecture seen, unless `config` is of a decoder-only causal language model."""
    seen = ", ".join(config.architectures or ()) or f"{config.model_type!r} model"
    senses = [name for name in _SENSES if getattr(config, name, None) is not None]
    if senses or (hasattr(config, "text_config") and hasattr(config, "image_token_id")):
        raise ModelError(
            f"{name} is a {seen}, a model with more senses than text, which cannot be pruned yet; {_ALLOWED}."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is a {seen}, an encoder-decoder; {_ALLOWED}.")
    if trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return
    # BERT and its kin are in the causal mapping too: there it takes `is_decoder` to tell.
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        raise ModelError(f"{name} is a {seen}, an encoder; {_ALLOWED}.")
    known = _CAUSAL.intersection(config.architectures or ())
    if not known and (config.architectures or config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        raise ModelError(f"{name} is a {seen}; {_ALLOWED}.")
    if not hasattr(config.get_text_config(decoder=True), "num_hidden_layers"):
        raise ModelError(f"{name} is a {seen}, whose config has no number of blocks (num_hidden_layers); {_ALLOWED}.")


_SENSES = ("vision_config", "audio_config", "vq_config", "audio_encoder_config")
_CAUSAL = {
    architecture
    for entry in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    for architecture in ((entry,) if isinstance(entry, str) else entry)
}
