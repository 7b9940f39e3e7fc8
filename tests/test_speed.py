"""What a timing run measures, not how long it takes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from shallower.anatomy import dissect
from shallower.anatomy.weigh import weigh
from shallower.errors import ModelError, UserError
from shallower.testing.families import tiny_model
from shallower.timing import compare_speed, measure_speed
from shallower.timing.speed import cache_bytes


def _expected_cache_bytes(model: Any, positions: int, batch: int) -> int:
    config = model.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * positions * batch * 4


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_counts_and_bytes(family: str) -> None:
    model = tiny_model(family, blocks=2)
    speed = measure_speed(model, prompt=8, generate=4, batch=2, warmup=0, repeats=2)
    assert speed.kv_cache_bytes == _expected_cache_bytes(model, 8 + 4, 2)
    assert speed.parameter_bytes == sum(parameter.numel() for parameter in set(model.parameters())) * 4
    assert 0 < speed.prefill_s.least <= speed.prefill_s.median <= speed.prefill_s.most
    assert speed.prefill_tokens_per_s == 16 / speed.prefill_s.median
    assert speed.decode_tokens_per_s == 8 / speed.decode_s.median


def test_fewer_blocks_less_cache() -> None:
    speeds = compare_speed(
        {"deep": tiny_model("llama", blocks=4), "shallow": tiny_model("llama", blocks=2)},
        prompt=8,
        generate=4,
        repeats=1,
    )
    assert list(speeds) == ["deep", "shallow"]
    assert speeds["deep"].kv_cache_bytes == 2 * speeds["shallow"].kv_cache_bytes


@pytest.mark.parametrize("family", ["gemma2", "mistral", "qwen3_next"])
def test_cache_of_sliding_and_recurrent_models(family: str) -> None:
    model = tiny_model(family)
    short = measure_speed(model, prompt=8, generate=1, warmup=0, repeats=1).kv_cache_bytes
    long = measure_speed(model, prompt=64, generate=1, warmup=0, repeats=1).kv_cache_bytes
    assert 0 < short <= long < _expected_cache_bytes(model, 65, 1), "windows and states do not grow with the text"


@pytest.mark.parametrize("family", ["mamba", "recurrent_gemma"])
def test_models_that_return_no_kv_cache_are_timed(family: str) -> None:
    """One keeps states under another name, the other returns nothing."""
    short, long = (measure_speed(tiny_model(family), prompt=prompt, generate=1, repeats=1) for prompt in (8, 64))
    assert 0 < short.kv_cache_bytes == long.kv_cache_bytes


def test_cache_of_indexed_attention_weighs_what_it_takes() -> None:
    latent = {"kv_lora_rank": 12, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
    experts = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "index_n_heads": 2, "index_head_dim": 8}
    config = AutoConfig.for_model("deepseek_v32", num_hidden_layers=2, **latent, **experts, **sizes, **heads)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = weigh(dissect(model))
    assert weights.model.kv_bytes == 2 * 4 * (12 + 4 + 8)
    measured = measure_speed(model, prompt=16, generate=8, warmup=0, repeats=1).kv_cache_bytes
    assert weights.model.kv_bytes * 24 == measured


def test_runs_alternate_and_have_equal_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    models = {"a": tiny_model("llama", blocks=1), "b": tiny_model("llama", blocks=2)}
    calls: list[tuple[str, int]] = []
    for name, model in models.items():
        forward = model.forward

        def record(*args: Any, _name: str = name, _forward: Any = forward, **options: Any) -> Any:
            calls.append((_name, options["input_ids"].shape[1]))
            assert options["use_cache"]
            return _forward(*args, **options)

        monkeypatch.setattr(model, "forward", record)
    compare_speed(models, prompt=6, generate=3, warmup=1, repeats=2)
    assert [name for name, tokens in calls if tokens == 6] == ["a", "b"] * 3
    assert Counter(calls) == {(name, tokens): count for name in "ab" for tokens, count in ((6, 3), (1, 9))}


def test_tensors_are_counted_once() -> None:
    shared = torch.zeros(5)
    assert cache_bytes([shared, (shared, {"x": torch.zeros(2, dtype=torch.float16)}), None, "text"]) == 5 * 4 + 2 * 2
    assert cache_bytes(None) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": 0}, "prompt=0 .* at least 1"),
        ({"repeats": 0}, "repeats=0"),
        ({"warmup": -1}, "warmup=-1 .* at least 0"),
        ({"prompt": 10**6}, "positions"),
    ],
)
def test_bad_counts(options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        measure_speed(tiny_model("llama", blocks=1), **options)
    with pytest.raises(UserError, match="no model"):
        compare_speed({})


def test_a_model_without_a_cache_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", blocks=1)
    forward = model.forward
    without = {"use_cache": False, "past_key_values": None}
    monkeypatch.setattr(model, "forward", lambda **options: forward(**options | without))
    with pytest.raises(ModelError, match="no KV cache"):
        measure_speed(model, prompt=4, generate=1)
