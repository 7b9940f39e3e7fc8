"""Tiny models of every family: finite, repeatable, cached decoding exact, and every block and kind matters."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from shallower.anatomy import dissect
from shallower.anatomy.weigh import weigh
from shallower.decoding import with_cache
from shallower.testing.families import (
    BLOCKS,
    CORE,
    DEPTH_BOUND,
    FAMILIES,
    VOCAB,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
)
from shallower.training.adapters import projections, quantise

EVERY = [*FAMILIES, *DEPTH_BOUND]
IDS = torch.randint(3, VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
PARAMETER_FREE_KINDS = {"sliding_attention", "chunked_attention", "full_attention"}


@cache
def _model(family: str) -> PreTrainedModel:
    return tiny_model(family)


@cache
def _dense(family: str) -> Tensor:
    return _logits(_model(family))


@torch.no_grad()
def _logits(model: PreTrainedModel) -> Tensor:
    logits: Tensor = model(IDS, use_cache=False).logits
    return logits


def _blocks(model: PreTrainedModel) -> nn.ModuleList:
    lists = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == model.config.num_hidden_layers
        and all(isinstance(member, GradientCheckpointingLayer) for member in module)
    ]
    assert len(lists) == 1
    return lists[0]


@contextmanager
def _skipped(block: nn.Module) -> Iterator[None]:
    """The block runs, and hands its input on in the place of its output."""

    def restore(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    hook = block.register_forward_hook(restore, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("family", EVERY)
def test_forward_is_finite_and_spread_out(family: str) -> None:
    logits = _dense(family)
    assert logits.shape == (2, 24, VOCAB)
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()
    assert 0.2 < logits.std() < 5
    assert logits.std(dim=1).mean() > 0.1  # tokens differ from each other


@pytest.mark.parametrize("family", EVERY)
@torch.no_grad()
def test_cached_decoding_gives_the_same_logits(family: str) -> None:
    model, cache, steps = _model(family), None, []
    for position in range(17):  # past the second window and the second chunk
        output, cache = with_cache(model, IDS[:, position : position + 1], cache, past=position)
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), _dense(family)[:, :17], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", EVERY)
def test_weights_follow_from_the_seed_alone(family: str) -> None:
    before = torch.random.get_rng_state()
    again = tiny_model(family)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not again.training
    weights = again.state_dict()
    for name, weight in _model(family).state_dict().items():
        assert torch.equal(weight, weights[name]), name


def test_another_seed_gives_other_weights() -> None:
    weights, others = _model("llama").state_dict(), tiny_model("llama", seed=1).state_dict()
    assert all(not torch.equal(weight, others[name]) for name, weight in weights.items())


@pytest.mark.parametrize("family", EVERY)
def test_every_block_matters(family: str) -> None:
    model = _model(family)
    for block in _blocks(model):
        with _skipped(block):
            assert (_logits(model) - _dense(family)).abs().max() > 0.1


@pytest.mark.parametrize("family", EVERY)
def test_every_parameter_matters(family: str) -> None:
    model = tiny_model(family)
    model(IDS, use_cache=False).logits.logsumexp(-1).sum().backward()
    trained = [(name, parameter) for name, parameter in _blocks(model).named_parameters() if parameter.requires_grad]
    assert not [name for name, parameter in trained if not _reached(parameter)]


def _reached(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and bool(parameter.grad.abs().max() > 0)


def _free_kinds(family: str) -> dict[str, list[Any]]:
    """The lists of kinds that can be permuted without other weights."""
    config = tiny_config(family)
    if family in {"mimo_v2_flash", "gemma3n", "gemma4"}:  # key and value heads, or sharing, follow from the kind
        return {}
    return {
        name: kinds
        for name in ("layer_types", "attention_layers", "no_rope_layers", "layer_rope_theta", "moe_topk")
        if isinstance(kinds := getattr(config, name, None), list)
        and (name != "layer_types" or set(kinds) <= PARAMETER_FREE_KINDS)
    }


@pytest.mark.parametrize("family", [family for family in EVERY if _free_kinds(family)])
def test_a_wrong_kind_of_block_shows(family: str) -> None:
    """Every swap of unlike neighbours changes the logits."""
    for name, kinds in _free_kinds(family).items():
        assert len(kinds) == BLOCKS
        assert family == "qwen2" or kinds[-2] != kinds[-1], "cutting any block but the last has to move a kind"
        for left in (i for i in range(BLOCKS - 1) if kinds[i] != kinds[i + 1]):
            swapped = [*kinds[:left], kinds[left + 1], kinds[left], *kinds[left + 2 :]]
            wrong = tiny_config(family)
            setattr(wrong, name, swapped)
            model = type(_model(family))(wrong).eval()
            model.load_state_dict(_model(family).state_dict())
            assert (_logits(model) - _dense(family)).abs().max() > 1e-2, f"{name}: {swapped}"


@pytest.mark.parametrize("family", EVERY)
def test_every_family_can_be_weighed(family: str) -> None:
    """Blocks weigh what is in them, and no weight is left as another found it."""
    model = tiny_model(family)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    anatomy = dissect(model)
    weights = weigh(anatomy)
    held = [parameter for block in anatomy.blocks for parameter in block.module.parameters()]  # once in each block
    assert weights.blocks.parameters == sum(parameter.numel() for parameter in held)
    assert all(weights.units[unit].flops > 0 for unit in anatomy.of_kind("block"))
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_next", "olmo_hybrid"])
def test_linear_attention_is_weighed_by_whole_chunks(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It pads what it reads: eight tokens would count as sixty-four."""
    anatomy = dissect(tiny_model(family))
    types = anatomy.model.config.layer_types
    [first, *_] = [unit for unit in anatomy.of_kind("attn") if types[unit.index] == "linear_attention"]

    def flops(tokens: int) -> int:
        monkeypatch.setattr(sys.modules["shallower.anatomy.weigh"], "CHUNK", tokens)
        return weigh(anatomy).units[first].flops

    usual = weigh(anatomy).units[first].flops
    assert flops(128) == pytest.approx(usual, rel=0.01)  # but for what the convolution pads
    assert flops(8) > 1.2 * usual


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "deepseek_v3"])  # llama's keys are shared by queries
def test_attention_weighs_the_same_however_it_is_computed(family: str) -> None:
    model = tiny_model(family, blocks=2)
    weighed = []
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        weighed.append(weigh(dissect(model)))
    assert weighed[0] == weighed[1]


def test_packed_weights_weigh_what_they_stand_for() -> None:
    pytest.importorskip("bitsandbytes")
    anatomy = dissect(tiny_model("llama", blocks=2))
    dense = weigh(anatomy)
    quantise(anatomy.model, projections(anatomy.model))
    packed = weigh(anatomy)
    for unit, weight in dense.units.items():
        assert (packed.units[unit].parameters, packed.units[unit].flops) == (weight.parameters, weight.flops)
        assert packed.units[unit].bytes < weight.bytes / 4
    assert packed.model.parameters == dense.model.parameters


@pytest.mark.parametrize("blocks", [1, 9])
@pytest.mark.parametrize("family", CORE)
def test_any_number_of_blocks(family: str, blocks: int) -> None:
    assert len(_blocks(tiny_model(family, blocks=blocks))) == blocks


def test_names() -> None:
    assert set(CORE) <= set(FAMILIES)
    assert not set(FAMILIES) & set(DEPTH_BOUND)
    with pytest.raises(KeyError, match="no tiny model of family 'lama'"):
        tiny_config("lama")


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "Hello the world, and in of\n\tis  it  ",
        "".join(map(chr, range(128))),
        "naïve — 日本 ␛c3",
        "<s> hi </s>",
    ],
)
def test_text_comes_back(text: str) -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < VOCAB for i in ids)


def test_special_tokens_and_chat() -> None:
    tokenizer = tiny_tokenizer()
    assert len(tokenizer) <= VOCAB
    config = tiny_config("llama")
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        assert getattr(tokenizer, name) == getattr(config, name)
    messages = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<s>[user] hi</s>\n[assistant] "
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert ids[0] == tokenizer.bos_token_id


# The page on families: docs/formats.md


def test_the_page_lists_every_family(root: Path) -> None:
    page = (root / "docs" / "formats.md").read_text(encoding="utf-8")
    section = re.search(r"^## Families\n(.*?)^## ", page, re.MULTILINE | re.DOTALL)
    assert section is not None
    [tested] = re.findall(r"^(?:`[\w-]+`,?\s)+", section[1], re.MULTILINE)
    rows = " ".join(re.findall(r"^\| (`.*?) \|", section[1], re.MULTILINE))
    assert re.findall(r"`(.*?)`", tested) == sorted({tiny_config(family).model_type for family in FAMILIES})
    assert {tiny_config(family).model_type for family in DEPTH_BOUND} <= set(re.findall(r"`(.*?)`", rows))
