"""Tiny random models of every supported family, built offline from their config classes.

Notable features:
- every sublayer of every block matters: matrices are drawn larger than the default initialisation, norm weights and
  biases are spread around their neutral value;
- blocks differ where the family allows it (sliding, chunked, linear and full attention, rotary and not, dense and
  routed MLPs), in an order without period whose last two entries differ. So cutting any block but the last changes the
  kind of a survivor unless the per-block config fields are cut with it;
- windows and chunks are shorter than 24 tokens, so that a wrong kind shows in the logits of a short input;
- weights depend on family, block count and seed alone, and the global random state is left as it was.

`FAMILIES` holds the families that lose blocks like any other. `DEPTH_BOUND` holds those whose arithmetic depends on the
number of blocks or on a block's place, or whose blocks share state: surgery has to compensate or refuse.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

__all__ = ["BLOCKS", "CORE", "DEPTH_BOUND", "FAMILIES", "VOCAB", "tiny_config", "tiny_model", "tiny_tokenizer"]

BLOCKS = 6
"""Blocks of a tiny model, unless told otherwise."""

VOCAB = 128
"""Entries in the vocabulary of the tiny models and of the tiny tokenizer."""

WINDOW = 6
"""Tokens in a sliding window."""

ConfigFactory = Callable[..., PretrainedConfig]
"""A config of a tiny model; takes the number of blocks, `BLOCKS` by default."""

# Passed to every family under the names its config has; the others are left out.
_SHARED: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
_ROUTED: dict[str, Any] = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}
_GATED_DELTA: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}


_YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 64,
}
_LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _pattern(usual: Any, other: Any, places: str) -> Callable[[int], list[Any]]:
    """A list with one entry a block: `other` where `places`, repeated as needed, has an `x`, else `usual`."""
    return lambda blocks: [other if places[i % len(places)] == "x" else usual for i in range(blocks)]


def _alternate(local: str) -> Callable[[int], list[Any]]:
    """Attention kinds: mostly `local`, some full, without a period below eight blocks."""
    return _pattern(local, "full_attention", ".x..x.xx")


def _places(places: str) -> Callable[[int], list[int]]:
    """The indices of the blocks marked `x`."""
    return lambda blocks: [i for i in range(blocks) if places[i % len(places)] == "x"]


def _numbered_from_one(places: str) -> Callable[[int], dict[str, Any]]:
    """Kimi Linear's kinds of attention: full in the blocks marked `x`."""
    return lambda blocks: {
        "full_attn_layers": [i + 1 for i in _places(places)(blocks)],
        "kda_layers": [i + 1 for i in range(blocks) if i not in _places(places)(blocks)],
        "head_dim": 8,
        "num_heads": 4,
        "short_conv_kernel_size": 4,
    }


_SLIDING: dict[str, Any] = {"sliding_window": WINDOW, "layer_types": _alternate("sliding_attention")}
_NO_LEAST = 1e-6  # of a Mamba 2's time steps: decoding does not keep to it
_NEMOTRON = ("linear_attention", "moe", "full_attention", "mlp", "linear_attention", "full_attention", "moe", "moe")
_ZAMBA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "layers_block_type": _pattern("linear_attention", "hybrid", ".xx.x.x."),
}
_DENSE_OR_SPARSE = _pattern("sparse", "dense", "x..x..x.")


def _family(model_type: str, **fields: Any) -> ConfigFactory:
    """A config factory. Fields that are functions receive the number of blocks."""

    def build(blocks: int = BLOCKS) -> PretrainedConfig:
        accepted = _field_names(model_type)
        shared = {name: value for name, value in _SHARED.items() if name in accepted}
        chosen = {name: value(blocks) if callable(value) else value for name, value in fields.items()}
        return AutoConfig.for_model(model_type, **{**shared, "num_hidden_layers": blocks, **chosen})

    return build


def _field_names(model_type: str) -> set[str]:
    config_class = CONFIG_MAPPING[model_type]
    return {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map)


FAMILIES: dict[str, ConfigFactory] = {
    # Sequential, pre-norm, every block alike.
    "llama": _family("llama"),
    "llama_bias": _family("llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "mistral": _family("mistral", sliding_window=WINDOW),
    "ministral3": _family("ministral3", sliding_window=WINDOW, rope_parameters=_YARN | {"llama_4_scaling_beta": 0.1}),
    "phi3": _family("phi3", sliding_window=WINDOW, original_max_position_embeddings=256),
    "granite": _family(
        "granite", logits_scaling=2.0, residual_multiplier=0.6, embedding_multiplier=3.0, attention_multiplier=0.3
    ),
    "stablelm": _family("stablelm", use_qkv_bias=True),
    "starcoder2": _family("starcoder2", sliding_window=WINDOW),
    "gemma": _family("gemma", head_dim=16),
    "olmo": _family("olmo", clip_qkv=2.0),
    "nemotron": _family("nemotron"),
    "seed_oss": _family("seed_oss"),
    "helium": _family("helium"),
    "arcee": _family("arcee"),
    "apertus": _family("apertus", rope_parameters=_LLAMA3_ROPE),
    "glm": _family("glm"),
    "ernie4_5": _family("ernie4_5"),
    "hunyuan_v1_dense": _family("hunyuan_v1_dense"),
    "jais2": _family("jais2"),
    "nanochat": _family("nanochat"),
    "persimmon": _family("persimmon"),
    "gpt2": _family("gpt2", n_inner=48),
    "gpt_bigcode": _family("gpt_bigcode", n_inner=48),
    "biogpt": _family("biogpt"),
    "xglm": _family("xglm", ffn_dim=48),
    "opt": _family("opt", ffn_dim=48),
    "bloom": _family("bloom"),
    "mpt": _family("mpt", max_seq_len=256),
    "gpt_neox_sequential": _family("gpt_neox", use_parallel_residual=False),
    "falcon_alibi": _family(
        "falcon", alibi=True, parallel_attn=False, multi_query=False, bias=True, ffn_hidden_size=48
    ),
    # Attention and MLP side by side, on one norm or two.
    "gpt_neox": _family("gpt_neox"),
    "falcon": _family("falcon", new_decoder_architecture=True, num_kv_heads=2, ffn_hidden_size=48),
    "falcon_multiquery": _family("falcon", ffn_hidden_size=48),
    "stablelm_parallel": _family("stablelm", use_parallel_residual=True, qk_layernorm=True),
    "phi": _family("phi"),
    "cohere": _family("cohere", logit_scale=0.5, use_qk_norm=True),
    "gptj": _family("gptj", n_inner=48, rotary_dim=4),
    "codegen": _family("codegen", n_inner=48, rotary_dim=4),
    # Norms after the sublayers, inside the residual branch.
    "olmo2": _family("olmo2"),
    "glm4": _family("glm4"),
    "hyperclovax": _family("hyperclovax", residual_multiplier=0.6, logits_scaling=2.0),
    # Norms on the residual stream itself.
    "opt_post_norm": _family("opt", ffn_dim=48, do_layer_norm_before=False, word_embed_proj_dim=16),
    # Attention of several kinds.
    "qwen2": _family(
        "qwen2", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=lambda blocks: blocks // 2
    ),
    "qwen2_mixed": _family("qwen2", use_sliding_window=True, **_SLIDING),
    "qwen3": _family("qwen3", head_dim=16, use_sliding_window=True, **_SLIDING),
    "gemma2": _family("gemma2", head_dim=16, query_pre_attn_scalar=16, **_SLIDING),
    "gemma3": _family("gemma3_text", head_dim=16, query_pre_attn_scalar=16, **_SLIDING),
    "vaultgemma": _family("vaultgemma", head_dim=16, query_pre_attn_scalar=16, **_SLIDING),
    "cohere2": _family("cohere2", logit_scale=0.5, **_SLIDING),
    "olmo3": _family("olmo3", **_SLIDING),
    "exaone4": _family("exaone4", **_SLIDING),
    "ministral": _family("ministral", **_SLIDING),
    "cwm": _family("cwm", rope_parameters=_LLAMA3_ROPE, **_SLIDING),
    "granite_swa": _family(
        "granite_swa", residual_multiplier=0.6, layer_rope_theta=_pattern(10000.0, 50.0, ".xx.x..x"), **_SLIDING
    ),
    "smollm3": _family(
        "smollm3",
        use_sliding_window=True,
        sliding_window=WINDOW,
        layer_types=_alternate("sliding_attention"),
        no_rope_layers=_pattern(1, 0, "..x..x.x"),
    ),
    "gpt_neo": _family(
        "gpt_neo",
        intermediate_size=48,
        window_size=WINDOW,
        attention_types=lambda blocks: [[_pattern("local", "global", ".x..x.xx")(blocks), 1]],
    ),
    "lfm2": _family("lfm2", block_auto_adjust_ff_dim=False, layer_types=_alternate("conv")),
    "qwen3_5": _family("qwen3_5_text", layer_types=_alternate("linear_attention"), **_GATED_DELTA),
    "olmo_hybrid": _family("olmo_hybrid", layer_types=_alternate("linear_attention"), **_GATED_DELTA),
    # Routed MLPs.
    "mixtral": _family("mixtral", sliding_window=WINDOW, **_EXPERTS),
    "phimoe": _family("phimoe", **_EXPERTS),
    "olmoe": _family("olmoe", num_key_value_heads=4, **_EXPERTS),
    "flex_olmo": _family("flex_olmo", **_EXPERTS),
    "granitemoe": _family("granitemoe", residual_multiplier=0.6, num_local_experts=4, num_experts_per_tok=2),
    "granitemoeshared": _family(
        "granitemoeshared",
        residual_multiplier=0.6,
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=24,
    ),
    "minimax_m2": _family("minimax_m2", **_EXPERTS),
    "hunyuan_v1_moe": _family("hunyuan_v1_moe", num_experts=4, moe_topk=_pattern(2, 1, ".x..x..x")),
    "jetmoe": _family("jetmoe", kv_channels=8, num_local_experts=4, num_experts_per_tok=2),
    "dbrx": _family(
        "dbrx",
        d_model=32,
        max_seq_len=256,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    ),
    # Routed and dense MLPs mixed, attention of one kind or several.
    "qwen2_moe": _family(
        "qwen2_moe",
        decoder_sparse_step=2,
        mlp_only_layers=_places(".x......"),
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
        **_EXPERTS,
        use_sliding_window=True,
        sliding_window=WINDOW,
        max_window_layers=lambda blocks: blocks,  # here: every other of the first blocks slides
    ),
    "qwen3_moe": _family(
        "qwen3_moe",
        decoder_sparse_step=1,
        mlp_only_layers=_places("x...x..."),
        moe_intermediate_size=24,
        use_sliding_window=True,
        sliding_window=WINDOW,
        **_EXPERTS,
    ),
    "qwen3_next": _family(
        "qwen3_next",
        layer_types=_alternate("linear_attention"),
        mlp_only_layers=_places("x..x...."),
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
        **_EXPERTS,
        **_GATED_DELTA,
    ),
    "qwen3_5_moe": _family(
        "qwen3_5_moe_text",
        layer_types=_alternate("linear_attention"),
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
        **_EXPERTS,
        **_GATED_DELTA,
    ),
    "gpt_oss": _family(
        "gpt_oss",
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters=_YARN | {"truncate": False},
        **_SLIDING,
    ),
    "llama4": _family(
        "llama4_text",
        intermediate_size_mlp=40,
        num_local_experts=4,
        num_experts_per_tok=2,
        moe_layers=_places("..xx.x.x"),
        attention_chunk_size=7,
        layer_types=_alternate("chunked_attention"),
        no_rope_layers=_pattern(1, 0, "..x..x.x"),
        floor_scale=5,
    ),
    "deepseek_v2": _family(
        "deepseek_v2", first_k_dense_replace=1, n_shared_experts=1, head_dim=4, **_ROUTED, **_LATENT
    ),
    "deepseek_v3": _family("deepseek_v3", first_k_dense_replace=2, n_group=2, topk_group=1, **_ROUTED, **_LATENT),
    "glm4_moe": _family("glm4_moe", first_k_dense_replace=2, use_qk_norm=True, **_ROUTED),
    "dots1": _family("dots1", first_k_dense_replace=1, n_shared_experts=1, **_ROUTED, **_SLIDING),
    "ernie4_5_moe": _family(
        "ernie4_5_moe",
        moe_num_experts=4,
        moe_k=2,
        moe_num_shared_experts=1,
        moe_intermediate_size=24,
        moe_layer_start_index=2,
    ),
    "exaone_moe": _family(
        "exaone_moe",
        mlp_layer_types=_DENSE_OR_SPARSE,
        moe_intermediate_size=24,
        num_shared_experts=1,
        **_EXPERTS,
        **_SLIDING,
    ),
    "afmoe": _family(
        "afmoe", num_dense_layers=2, moe_intermediate_size=24, num_shared_experts=1, **_EXPERTS, **_SLIDING
    ),
    "mimo_v2_flash": _family(
        "mimo_v2_flash", head_dim=12, v_head_dim=8, mlp_layer_types=_DENSE_OR_SPARSE, **_ROUTED, **_SLIDING
    ),
    "laguna": _family(
        "laguna",
        mlp_layer_types=_DENSE_OR_SPARSE,
        num_attention_heads_per_layer=_pattern(4, 2, "x.x..x.."),
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
        **_EXPERTS,
        **_SLIDING,
    ),
    "mellum": _family("mellum", mlp_layer_types=_DENSE_OR_SPARSE, moe_intermediate_size=24, **_EXPERTS, **_SLIDING),
    "hy_v3": _family(
        "hy_v3", mlp_layer_types=_DENSE_OR_SPARSE, moe_intermediate_size=24, num_shared_experts=1, **_EXPERTS
    ),
    "lfm2_moe": _family(
        "lfm2_moe",
        num_dense_layers=2,
        moe_intermediate_size=24,
        layer_types=_alternate("conv"),
        **_EXPERTS,
    ),
    "granitemoehybrid": _family(
        "granitemoehybrid",
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=24,
        position_embedding_type="rope",
        layer_types=_alternate("linear_attention"),
        mamba_n_heads=4,
        mamba_d_state=8,
        mamba_chunk_size=8,
        attention_multiplier=0.3,
    ),
    "falcon_h1": _family(
        "falcon_h1", mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8
    ),
    "kimi_linear": _family(
        "kimi_linear",
        mlp_layer_types=_DENSE_OR_SPARSE,
        linear_attn_config=_numbered_from_one(".x..x.xx"),
        moe_intermediate_size=24,
        **_EXPERTS,
        **_LATENT,
    ),
    "bamba": _family(
        "bamba",
        attn_layer_indices=_places(".x..x.xx"),
        mamba_n_heads=4,
        mamba_d_state=8,
        mamba_chunk_size=8,
    ),
    "recurrent_gemma": _family(
        "recurrent_gemma",
        lru_width=32,
        attention_window_size=WINDOW,
        block_types=_pattern("recurrent", "attention", ".x..x.xx"),
    ),
    # Blocks of one sublayer each.
    "nemotron_h": _family(
        "nemotron_h",
        layers_block_type=lambda blocks: [_NEMOTRON[i % len(_NEMOTRON)] for i in range(blocks)],
        ssm_state_size=8,
        mamba_num_heads=4,
        mamba_head_dim=16,
        n_groups=1,
        chunk_size=8,
        time_step_min=_NO_LEAST,
        moe_shared_expert_intermediate_size=24,
        n_group=1,
        topk_group=1,
        **_ROUTED,
    ),
    # Blocks with attention share one, and have a Mamba each, as the others do.
    "zamba": _family("zamba", mamba_d_state=8, n_mamba_heads=2, **_ZAMBA),
    "solar_open": _family("solar_open", **_ROUTED),
    "doge": _family("doge", keep_window_size=64),
    # No attention at all.
    "mamba": _family("mamba", state_size=8),
    "mamba2": _family("mamba2", num_heads=8, head_dim=8, state_size=8, n_groups=1, chunk_size=8),
    "falcon_mamba": _family("falcon_mamba", state_size=8),
}

CORE: tuple[str, ...] = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3",
    "olmo2",
    "smollm3",
    "gpt2",
    "opt",
    "gpt_neox",
    "gpt_neox_sequential",
    "falcon",
    "falcon_alibi",
    "stablelm",
    "granite",
    "cohere",
    "cohere2",
    "starcoder2",
    "bloom",
    "mpt",
    "mixtral",
    "qwen3_moe",
    "glm4",
    "gpt_oss",
    "llama4",
    "deepseek_v3",
    "qwen3_next",
)
"""Names from `FAMILIES` that together cover every arrangement of blocks, for a suite that has to be short."""

DEPTH_BOUND: dict[str, ConfigFactory] = {
    # Factors made of the place or of the number of blocks.
    "gpt2_inverse_scale": _family("gpt2", n_inner=48, scale_attn_by_inverse_layer_idx=True),
    "diffllama": _family("diffllama"),
    "minicpm3": _family("minicpm3", scale_emb=2, dim_model_base=16, **_LATENT),
    # Decays made of the place, and stored.
    "minimax": _family(
        "minimax",
        num_local_experts=4,
        num_experts_per_tok=2,
        block_size=8,
        layer_types=_alternate("linear_attention"),
    ),
    # Kinds that follow from a place by a formula, and cannot be listed.
    "ernie4_5_moe_interval": _family(
        "ernie4_5_moe",
        moe_num_experts=4,
        moe_k=2,
        moe_num_shared_experts=1,
        moe_intermediate_size=24,
        moe_layer_start_index=1,
        moe_layer_interval=2,
    ),
    "jamba": _family(
        "jamba",
        attn_layer_period=3,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=8,
        **_EXPERTS,
    ),
    # Adapters of the shared attention, as many as there are blocks with one.
    "zamba2": _family(
        "zamba2",
        mamba_d_state=8,
        n_mamba_heads=4,
        mamba_headdim=16,
        mamba_ngroups=1,
        chunk_size=8,
        time_step_min=_NO_LEAST,
        adapter_rank=4,
        **_ZAMBA,
    ),
    # The first block is built without its input norm.
    "modernbert_decoder": _family(
        "modernbert-decoder",
        local_attention=2 * WINDOW,
        layer_types=_SLIDING["layer_types"],
        cls_token_id=1,
        sep_token_id=2,
    ),
    # Keys and values, or per-layer embeddings, shared between blocks.
    "gemma3n": _family(
        "gemma3n_text",
        head_dim=16,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=2,
        laurel_rank=8,
        altup_num_inputs=2,
        **_SLIDING,
    ),
    "gemma4": _family(
        "gemma4_text",
        head_dim=8,
        global_head_dim=8,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=2,
        sliding_window=WINDOW,
        layer_types=_pattern("sliding_attention", "full_attention", ".x...x"),
    ),
}


def tiny_config(family: str, *, blocks: int = BLOCKS) -> PretrainedConfig:
    """The config of a tiny model.

    Args:
        family: A name from `FAMILIES` or `DEPTH_BOUND`.
        blocks: The number of blocks.
    """
    known = FAMILIES | DEPTH_BOUND
    if family not in known:
        raise KeyError(f"no tiny model of family {family!r}; there are {', '.join(sorted(known))}")
    return known[family](blocks)


def tiny_model(family: str, *, blocks: int = BLOCKS, seed: int = 0) -> PreTrainedModel:
    """A causal language model with random weights, in float32 and evaluation mode.

    Args:
        family: A name from `FAMILIES` or `DEPTH_BOUND`.
        blocks: The number of blocks.
        seed: Decides the weights. The global random state is neither read nor changed.
    """
    config = tiny_config(family, blocks=blocks)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _roughen(model)
    return model.eval()


def _roughen(model: PreTrainedModel, *, scale: float = 0.18, spread: float = 0.2) -> None:
    """Redraws the matrices at `scale`, and moves everything else by `spread` from the family's own initial value."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):  # slow decay: a state that remembers, and sums that float32 holds exactly
                parameter.normal_(-1.5, spread)
            elif parameter.ndim == 3 and parameter.shape[1] == 1:  # a depthwise convolution: few inputs an output
                parameter.normal_(0.0, 3 * scale)
            elif parameter.ndim >= 2:
                parameter.normal_(0.0, scale)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=spread)
        for name, buffer in model.named_buffers():
            if name.endswith(("correction_bias", "expert_bias", "layer_scalar")):
                buffer.add_(torch.randn_like(buffer), alpha=spread)


_SPECIAL = ["<pad>", "<s>", "</s>"]
_ESCAPE = "\N{SYMBOL FOR ESCAPE}"
# fmt: off
_MERGES = [
    ("Ġ", "t"), ("h", "e"), ("Ġ", "a"), ("i", "n"), ("Ġt", "he"), ("r", "e"),
    ("o", "n"), ("e", "r"), ("Ġ", "s"), ("a", "t"), ("e", "n"), ("Ġ", "o"),
    ("o", "r"), ("in", "g"), ("Ġo", "f"), ("a", "n"), ("e", "s"), ("Ġa", "n"),
    ("Ġan", "d"), ("i", "s"), ("Ġ", "i"), ("Ġi", "n"),
]
# fmt: on

_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of at most `VOCAB` entries, with a chat template.

    Printable ASCII, tab and newline are an entry each, and a few frequent English pairs are merged. Any other byte is
    an escape character and two hexadecimal digits, so that every text comes back as it was. `encode` adds no special
    tokens; `<pad>`, `<s>` and `</s>` are 0, 1 and 2, as in the tiny models' configs.
    """
    visible = _visible_bytes()
    plain = [visible[byte] for byte in (9, 10, *range(32, 127))]
    escapes = [(visible[byte], f"{_ESCAPE}{byte:02x}") for byte in range(256) if visible[byte] not in plain]
    entries = [*_SPECIAL, _ESCAPE, *plain, *(left + right for left, right in _MERGES)]

    tokenizer = Tokenizer(models.BPE(vocab={entry: i for i, entry in enumerate(entries)}, merges=_MERGES))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.ByteLevel(), *(normalizers.Replace(raw, escaped) for raw, escaped in escapes)]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("Ġ?[^ĠĊ]+|Ġ|Ċ"), behavior="isolated")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Fuse(),
            *(decoders.Replace(escaped, raw) for raw, escaped in escapes),
            decoders.ByteLevel(),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_SPECIAL[0],
        bos_token=_SPECIAL[1],
        eos_token=_SPECIAL[2],
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def _visible_bytes() -> list[str]:
    """The character that byte-level tokenizers write for each byte; printable Latin-1 stays as it is."""
    spare = iter(range(256, 512))
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]
