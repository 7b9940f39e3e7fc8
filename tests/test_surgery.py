"""Surgery on every family: the cut model is the dense model with units passed over: in memory, saved, and decoding."""

from __future__ import annotations

import errno
import functools
import inspect
import json
import os
import random
import re
import shutil
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

import shallower
from shallower.anatomy import Anatomy, dissect
from shallower.checkpoint.load import load, load_model
from shallower.errors import BudgetError, ModelError, OutputError, VerificationError
from shallower.plan import CalibrationIdentity, MadeBy, ModelIdentity, PruningPlan
from shallower.surgery import (
    cut,
    cut_config,
    leftovers,
    re_pair,
    require_apart,
    require_free,
    runtimes,
    save,
    verify,
    verify_saved,
)
from shallower.surgery.card import model_card
from shallower.surgery.contents import written_with
from shallower.surgery.cut import assemble
from shallower.surgery.ordinary_pairs import exact_pairs
from shallower.surgery.save import ordinary
from shallower.surgery.stations import layers_of
from shallower.surgery.verify import load_stock
from shallower.testing.conformance import sample_text
from shallower.testing.families import BLOCKS, DEPTH_BOUND, FAMILIES, tiny_config, tiny_model, tiny_tokenizer
from shallower.units import Unit, parse_units

IDS = torch.randint(3, 120, (2, 20), generator=torch.Generator().manual_seed(0))
DECODED_FROM = 15

SETS = {
    "first": "block.0",
    "last": f"block.{BLOCKS - 1}",
    "run": "block.2-3",
    "two runs": "block.0,block.3-4",
}

# What Jamba and ERNIE can say is a period.
PERIODS = {"jamba": "attn_layer_period|expert_layer_period", "ernie4_5_moe_interval": "moe_layer_interval"}


def refusal(family: str, removed: Collection[Unit]) -> str | None:
    """The words of the error that removing blocks must give; None where it must work."""
    config = tiny_config(family)
    kept = [index for index in range(BLOCKS) if Unit(index, "block") not in removed]
    if not any(counts(config, index) for index in kept) and any(counts(config, index) for index in range(BLOCKS)):
        return "no attention with a KV cache"
    if family == "diffllama" and kept != list(range(len(kept))):
        return "cannot describe block"  # lambda_init comes from the place
    if family == "modernbert_decoder" and kept[0] != 0:
        return "cannot describe block"  # block 0 has no norm
    if family in PERIODS and not is_periodic(family, config, kept):
        return PERIODS[family]
    return None


def counts(config: PretrainedConfig, index: int) -> bool:
    types = getattr(config, "layer_types", None)
    return types is None or types[index] not in ("linear_attention", "conv", "moe", "mlp")


def is_periodic(family: str, config: PretrainedConfig, kept: list[int]) -> bool:
    """Whether some period and offset (and start and end) give the kinds of the kept blocks."""
    places = range(len(kept))
    if family == "jamba":
        return all(
            any(
                [new % period == offset for new in places] == [old % old_period == old_offset for old in kept]
                for period in range(1, BLOCKS + 2)
                for offset in range(period)
            )
            for old_period, old_offset in (
                (config.attn_layer_period, config.attn_layer_offset),
                (config.expert_layer_period, config.expert_layer_offset),
            )
        )
    step, start = config.moe_layer_interval, config.moe_layer_start_index
    wanted = [old >= start and (old + 1) % step == 0 and old <= config.moe_layer_end_index for old in kept]
    return any(
        [first <= new <= last and (new + 1) % period == 0 for new in places] == wanted
        for period in range(1, BLOCKS + 1)
        for first in places
        for last in places
    )


def units(text: str) -> frozenset[Unit]:
    return frozenset(parse_units(text))


def random_set(family: str) -> str:
    chosen = random.Random(family).sample(range(BLOCKS), 2)
    return ",".join(f"block.{index}" for index in sorted(chosen))


@functools.lru_cache(maxsize=1)
def dense(family: str) -> tuple[Anatomy, Tensor]:
    """A dense model's anatomy and logits. Tests of one family follow each other."""
    anatomy = dissect(tiny_model(family))
    return anatomy, logits(anatomy.model)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def decoded(model: PreTrainedModel) -> Tensor:
    """Logits of the tokens one by one, with the cache and the positions that `generate` gives."""
    takes = inspect.signature(model.forward).parameters
    cache, steps = DynamicCache(config=model.config), []
    held: dict[str, Any] = {"cache_params" if "cache_params" in takes else "past_key_values": cache}
    with torch.no_grad():
        for start, stop in pairwise([0, *range(DECODED_FROM, IDS.shape[1] + 1)]):
            at = {"position_ids": torch.arange(start, stop).repeat(len(IDS), 1)} if "position_ids" in takes else {}
            steps.append(model(input_ids=IDS[:, start:stop], use_cache=True, **held, **at).logits)
    return torch.cat(steps, dim=1)


@contextmanager
def passed_over(anatomy: Anatomy, removed: Collection[Unit]) -> Iterator[None]:
    """The stock model, indices and all, with some forwards replaced: an oracle that shares no code with `cut`."""

    def identity(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return hidden if arity is None else (hidden, *[None] * (arity - 1))

    patched: list[nn.Module] = []
    sublayers = [unit for unit in removed if unit.kind != "block"]
    for unit in set(removed) - set(sublayers):
        block = anatomy.blocks[unit.index]
        arity = block.arity
        block.module.forward = identity
        patched.append(block.module)
    scaled: list[tuple[nn.Module, Any]] = []
    for unit in sublayers:
        for module in anatomy.blocks[unit.index].modules_of(unit.kind):
            scaled.append((module, module.register_forward_hook(nothing, with_kwargs=True)))
    try:
        yield
    finally:
        for module in patched:
            del module.forward
        for _, handle in scaled:
            handle.remove()


def nothing(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Run a sublayer and throw its update away."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    given = dict(zip(names, args, strict=False)) | kwargs
    hidden, *rest = output if isinstance(output, tuple) else (output,)
    update = given["residual"] if "residual" in given else torch.zeros_like(hidden)
    return (update, *rest) if isinstance(output, tuple) else update


def close(found: Tensor, wanted: Tensor, scale: float = 1e-4) -> bool:
    return bool((found - wanted).abs().max() <= scale * wanted.abs().max())


def require_same_as_passed_over(anatomy: Anatomy, removed: Collection[Unit]) -> PreTrainedModel:
    model = cut(anatomy, removed)
    with passed_over(anatomy, removed):
        wanted = logits(anatomy.model)
    assert close(logits(model), wanted), "one pass"
    assert close(decoded(model), wanted), "token by token"
    return model


SOMETIMES = ("diffllama", "ernie4_5_moe_interval", "jamba", "modernbert_decoder")  # depth-bound, but not every removal


@pytest.mark.parametrize("family", [*FAMILIES, *SOMETIMES])
def test_blocks(family: str, tmp_path: Path) -> None:
    anatomy, before = dense(family)
    config_before = anatomy.model.config.to_dict()
    sets = {**SETS, "random": random_set(family)}
    # One pass over the sets costs half a second a family, so families take turns.
    turn = random.Random(family)
    names = [*turn.sample(["first", "two runs", "random"], 2), turn.choice(["last", "run"])]
    for name in names:
        removed = units(sets[name])
        if (why := refusal(family, removed)) is not None:
            with pytest.raises(ModelError, match=why):
                cut(anatomy, removed)
            continue
        model = require_same_as_passed_over(anatomy, removed)
        assert model.config.get_text_config().num_hidden_layers == BLOCKS - len(removed)
        require_lists(model.config, anatomy.model.config, removed)
        assert {id(p) for p in model.parameters()} <= {id(p) for p in anatomy.model.parameters()}
        if name == names[-1]:
            save(model, tmp_path / name, plan=None, verify_ids=IDS)
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name, local_files_only=True)
            assert close(logits(loaded), logits(model))
    assert torch.equal(logits(anatomy.model), before)
    assert anatomy.model.config.to_dict() == config_before
    assert [block.module for block in anatomy.blocks] == list(anatomy.model.get_submodule(anatomy.path))


def require_lists(config: PretrainedConfig, dense_config: PretrainedConfig, removed: Collection[Unit]) -> None:
    kept = [index for index in range(BLOCKS) if Unit(index, "block") not in removed]
    for name in (
        "layer_types",
        "mlp_layer_types",
        "no_rope_layers",
        "attention_layers",
        "num_attention_heads_per_layer",
    ):
        if isinstance(whole := getattr(dense_config, name, None), list):
            assert getattr(config, name) == [whole[index] for index in kept], name


@pytest.mark.parametrize("family", [*FAMILIES, *SOMETIMES])
def test_sublayers(family: str) -> None:
    anatomy, before = dense(family)
    if family in ("falcon_h1", "dbrx"):
        with pytest.raises(BudgetError, match="told apart"):
            cut(anatomy, units("attn.0"))
        return
    if all(block.mlp is None for block in anatomy.blocks):  # Mamba's other half is the block
        require_same_as_passed_over(anatomy, units("attn.0,attn.3"))
        with pytest.raises(BudgetError, match="told apart"):
            cut(anatomy, units("mlp.0"))
        return
    if not any(block.attn is not None and block.mlp is not None for block in anatomy.blocks):
        require_same_as_passed_over(anatomy, units("mlp.1,attn.5"))
        return
    for text in ("attn.0,attn.3", "mlp.0,block.2,mlp.4", "attn.2,mlp.1,attn.5"):
        removed = units(text)
        blocks = [unit for unit in removed if unit.kind == "block"]
        if blocks and refusal(family, blocks):
            continue
        model = require_same_as_passed_over(anatomy, removed)
        assert leftovers(model)
        layers_of(dissect(model), anatomy, removed)  # what is left is still told apart
    assert torch.equal(logits(anatomy.model), before)


SEQUENTIAL = [
    "llama",
    "gemma2",
    "gemma3",
    "olmo2",
    "qwen2_moe",
    "llama4",
    "gpt2",
    "opt",
    "bloom",
    "mpt",
    "granite",
    "smollm3",
]
PARALLEL = ["gpt_neox", "phi", "cohere", "falcon", "gptj", "stablelm_parallel"]


@pytest.mark.parametrize("family", SEQUENTIAL)
@pytest.mark.parametrize("text", ["mlp.1,attn.2", "mlp.0,block.1,block.2,attn.3", "mlp.0,attn.1,mlp.3,attn.4"])
def test_pairs(family: str, text: str, tmp_path: Path) -> None:
    anatomy, _ = dense(family)
    layers = re_pair(anatomy, units(text))
    assert not any(layer.leftover for layer in layers)
    model = require_same_as_passed_over(anatomy, units(text))
    assert not leftovers(model)
    assert len(model.get_submodule(anatomy.path)) == len(layers) == model.config.num_hidden_layers
    save(model, tmp_path / "out", plan=None, verify_ids=IDS)


@pytest.mark.parametrize("family", PARALLEL)
def test_parallel_blocks_do_not_pair(family: str, tmp_path: Path) -> None:
    anatomy, _ = dense(family)
    model = require_same_as_passed_over(anatomy, units("mlp.1,attn.2"))
    assert leftovers(model) == parse_units("mlp.1,attn.2")
    with pytest.raises(ModelError, match=r"attn\.2, mlp\.1"):
        save(model, tmp_path / "out", plan=None)
    assert os.listdir(tmp_path) == []


def test_both_sublayers_are_the_block() -> None:
    anatomy, _ = dense("llama")
    model = require_same_as_passed_over(anatomy, units("attn.2,mlp.2"))
    assert not leftovers(model)
    assert model.config.num_hidden_layers == BLOCKS - 1


def test_both_sublayers_are_less_than_the_block_where_norms_are_on_the_stream() -> None:
    anatomy, _ = dense("opt_post_norm")
    model = require_same_as_passed_over(anatomy, units("attn.2,mlp.2"))
    assert leftovers(model) == parse_units("attn.2,mlp.2")


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next", "gpt2"])
@pytest.mark.parametrize("text", ["block.0,block.3", "attn.0,attn.3"])
def test_generates(family: str, text: str) -> None:
    model = cut(dense(family)[0], units(text))
    with_cache = model.generate(IDS[:1, :8], max_new_tokens=8, do_sample=False, pad_token_id=0)
    without = model.generate(IDS[:1, :8], max_new_tokens=8, do_sample=False, pad_token_id=0, use_cache=False)
    assert torch.equal(with_cache, without)


def test_removing_nothing_is_the_dense_model() -> None:
    anatomy, before = dense("gemma3")
    model = cut(anatomy, ())
    assert model is not anatomy.model
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("gpt2_inverse_scale", r"cannot describe block 2 in its new place: attn\.scaling"),
        ("zamba2", "cannot describe block 2 in its new place"),
        ("gemma3n", "num_kv_shared_layers"),
        ("gemma4", "num_kv_shared_layers"),
    ],
)
def test_what_depends_on_depth_is_refused(family: str, why: str) -> None:
    anatomy = dissect(tiny_model(family))
    with pytest.raises(ModelError, match=why):
        cut(anatomy, units("block.1"))


def test_a_config_that_no_model_can_be_built_from_is_refused() -> None:
    with pytest.raises(ModelError, match="zamba does not run without these units: ValueError"):
        cut(dissect(tiny_model("zamba")), units("block.1-2"))  # one block with attention has none to share it with


def test_depth_scale_is_compensated() -> None:
    anatomy = dissect(tiny_model("minicpm3"))
    require_same_as_passed_over(anatomy, units("block.1,block.4"))


def test_depth_bound_families_are_all_known() -> None:
    assert set(DEPTH_BOUND) <= {"gpt2_inverse_scale", "gemma3n", "gemma4", "minicpm3", "minimax", "zamba2", *SOMETIMES}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("block.0-5", "cannot remove all 6 blocks"),
        (",".join(f"attn.{i},mlp.{i}" for i in range(BLOCKS)), "cannot remove all 6 blocks"),
        ("block.6", "has blocks 0 to 5"),
    ],
)
def test_impossible_removals(text: str, says: str) -> None:
    with pytest.raises(BudgetError, match=says):
        cut(dense("llama")[0], units(text))


@pytest.mark.parametrize(
    "family", ["gemma2", "gemma3", "cohere2", "smollm3", "llama4", "gpt_oss", "modernbert_decoder"]
)
@pytest.mark.parametrize("text", ["attn.0,attn.2-3,attn.5", "attn.1,attn.4"])
def test_attentions_of_one_kind(family: str, text: str) -> None:
    """The cache's first slot is of a kind that no attention uses any more."""
    require_same_as_passed_over(dense(family)[0], units(text))


@pytest.mark.parametrize(("family", "text"), [("gpt2", "attn.0-5"), ("nemotron_h", "block.2,block.5")])
def test_positions_without_any_attention_are_refused(family: str, text: str) -> None:
    with pytest.raises(ModelError, match="KV cache"):
        cut(dense(family)[0], units(text))


def test_tensors_made_from_a_place_are_refused() -> None:
    anatomy = dissect(tiny_model("llama"))
    for block in anatomy.blocks:
        block.module.mlp.register_buffer("decay", torch.tensor(0.5**block.index), persistent=False)
    with pytest.raises(ModelError, match=r"computes mlp\.decay from the place of the block"):
        cut(anatomy, units("block.1"))


def test_blocks_with_weights_of_their_own_are_not_joined() -> None:
    anatomy = dissect(tiny_model("llama"))
    for block in anatomy.blocks:
        block.module.register_parameter("gain", nn.Parameter(torch.ones(())))
    removed = units("mlp.1,attn.2")
    with pytest.raises(ModelError, match="has weights of its own, which belong to neither half"):
        assemble(anatomy, re_pair(anatomy, removed), padded=False, thorough=True)
    assert leftovers(require_same_as_passed_over(anatomy, removed)) == parse_units("mlp.1,attn.2")


# The config.


def test_lists_that_only_happen_to_be_as_long_are_left_alone() -> None:
    config = tiny_config("phi3")
    config.eos_token_id = [2, 3, 4, 5, 6, 7]
    config.rope_parameters = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
        "short_factor": [1.0, 1.0, 1.0, 1.0],
        "long_factor": [2.0, 2.0, 2.0, 2.0],
        "original_max_position_embeddings": 256,
    }
    for blocks in (6, 4):
        config.num_hidden_layers = blocks
        new = cut_config(config, range(blocks - 1))
        assert new.eos_token_id == config.eos_token_id
        assert new.rope_parameters == config.rope_parameters
        assert new.num_hidden_layers == blocks - 1


def test_patterns_are_written_out() -> None:
    from transformers import Gemma3TextConfig, Llama4TextConfig, Qwen2Config, RecurrentGemmaConfig, SmolLM3Config

    gemma = Gemma3TextConfig(num_hidden_layers=12)
    assert cut_config(gemma, [0, 5, 6, 11]).layer_types == [gemma.layer_types[i] for i in (0, 5, 6, 11)]
    qwen = Qwen2Config(num_hidden_layers=8, use_sliding_window=True, sliding_window=4, max_window_layers=5)
    new = cut_config(qwen, [0, 4, 5, 7])
    assert new.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    assert new.max_window_layers == 2
    smol = SmolLM3Config(num_hidden_layers=8)
    assert cut_config(smol, [2, 3, 7]).no_rope_layers == [1, 0, 0]
    llama = Llama4TextConfig(num_hidden_layers=8, interleave_moe_layer_step=2)
    new = cut_config(llama, [0, 1, 2, 5])
    assert new.moe_layers == [1, 3]
    assert new.no_rope_layers == [llama.no_rope_layers[i] for i in (0, 1, 2, 5)]
    recurrent = RecurrentGemmaConfig(num_hidden_layers=8)
    assert cut_config(recurrent, [1, 2, 5, 6]).block_types == ["recurrent", "attention", "attention", "recurrent"]


def test_numbers_of_blocks_in_a_dict_follow_their_blocks() -> None:
    """Of Kimi Linear's two ways to say which attention is which, transformers reads one and llama.cpp the other."""
    config = tiny_config("kimi_linear")
    said = cut_config(config, [1, 3, 4]).to_dict()
    assert said["layer_types"] == ["full_attention", "linear_attention", "full_attention"]
    assert (said["linear_attn_config"]["full_attn_layers"], said["linear_attn_config"]["kda_layers"]) == ([1, 3], [2])
    assert config.linear_attn_config["full_attn_layers"] == [2, 5]


def test_routed_blocks_stay_routed() -> None:
    from transformers import DeepseekV3Config, Qwen2MoeConfig

    qwen = Qwen2MoeConfig(num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3])
    new = cut_config(qwen, [1, 2, 3, 5])
    assert (new.decoder_sparse_step, new.mlp_only_layers) == (1, [1, 2])
    deep = DeepseekV3Config(num_hidden_layers=6, first_k_dense_replace=3, num_nextn_predict_layers=1)
    new = cut_config(deep, [0, 2, 3, 5])
    assert (new.first_k_dense_replace, new.num_nextn_predict_layers) == (2, 0)


def test_a_list_of_kinds_outweighs_their_period() -> None:
    from transformers import ZambaConfig

    config = ZambaConfig(num_hidden_layers=24)
    kept = [0, *range(2, 13), *range(14, 24)]
    assert cut_config(config, kept).layers_block_type == [config.layers_block_type[index] for index in kept]


def test_prediction_blocks_are_no_blocks() -> None:
    from transformers import InklingTextConfig

    config = InklingTextConfig(num_hidden_layers=6, num_mtp_layers=2, mtp_local_layer_ids=[1])
    new = cut_config(config, [0, 2, 3, 5])
    assert (new.num_mtp_layers, new.mtp_local_layer_ids) == (0, [1])


def test_per_layer_config_is_renumbered() -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(
        num_hidden_layers=6, per_layer_config={1: {"intermediate_size": 7}, 4: {"intermediate_size": 9}}
    )
    new = cut_config(config, [0, 2, 4, 5])
    assert new.to_dict()["per_layer_config"] == {"2": {"intermediate_size": 9}}
    assert set(config.to_dict()["per_layer_config"]) == {"1", "4"}


def test_halves_of_blocks_that_have_a_config_of_their_own_are_not_joined() -> None:
    config = tiny_config("llama")
    config.per_layer_config = {4: {"intermediate_size": 24}}
    with pytest.raises(ModelError, match="cannot join halves of different blocks of llama: it has a per_layer_config"):
        cut_config(config, [0, 1, 3, 4, 5], mlp=[0, 2, 3, 4, 5])


@pytest.mark.parametrize("kept", [[], [0, 6], [2, 1], [1, 1]])
def test_impossible_blocks_to_keep(kept: list[int]) -> None:
    with pytest.raises(ModelError, match="increasing"):
        cut_config(tiny_config("llama"), kept)


# Saving.


@pytest.fixture(scope="module")
def pruned() -> PreTrainedModel:
    return cut(dissect(tiny_model("llama_bias")), units("block.1,block.4"))


@pytest.fixture
def plan() -> PruningPlan:
    made = MadeBy(
        "greedy", "nll", None, {"beam": 1}, 0, CalibrationIdentity("/data/c4.jsonl", 2048, "sha256:0"), "0.1.0"
    )
    model = ModelIdentity("acme/tiny", None, "sha256:1234", BLOCKS)
    removed = parse_units("block.1,block.4")
    return PruningPlan(model, removed, tuple((unit, 3.0) for unit in removed), 2.9, made)


def test_everything_is_in_the_folder(pruned: PreTrainedModel, plan: PruningPlan, tmp_path: Path) -> None:
    pruned.generation_config.temperature = 0.6  # invalid without do_sample, and in many published checkpoints
    pruned.config._name_or_path = "/home/me/models/tiny"
    try:
        folder = save(pruned, tmp_path / "a" / "out", plan=plan, tokenizer=tiny_tokenizer(), card="## Measured\n\n42")
    finally:
        pruned.generation_config.temperature = None
    assert os.listdir(tmp_path / "a") == ["out"]
    assert folder.stat().st_mode & 0o777 == 0o777 & ~umask()
    assert {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "plan.json",
        "tokenizer.json",
        "tokenizer_config.json",
    } == set(os.listdir(folder))
    assert PruningPlan.load(folder / "plan.json") == plan
    card = (folder / "README.md").read_text()
    assert "base_model: acme/tiny" in card
    assert "`block.1`, `block.4`" in card
    assert card.rstrip().endswith("Made with shallower 0.1.0.")
    assert "## Measured" in card
    for path in folder.iterdir():
        if path.suffix != ".safetensors" and path.name != "plan.json":
            assert "/home/me" not in path.read_text()
            assert "/data/" not in path.read_text()
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["temperature"] == 0.6
    assert "_from_model_config" not in generation
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == BLOCKS - 2
    assert AutoTokenizer.from_pretrained(folder).chat_template
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight


def test_the_card_names_units_as_they_are_typed(pruned: PreTrainedModel, plan: PruningPlan) -> None:
    removed = parse_units("attn.4,block.2,block.1")
    chosen = replace(plan, remove=removed, order=tuple((unit, None) for unit in removed))
    assert "Removed, counted from 0: `block.1-2`, `attn.4`." in model_card(pruned, chosen, None)


def test_the_card_tells_of_weights_that_were_rounded(plan: PruningPlan, tmp_path: Path) -> None:
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    stored = load_file(file)
    save_file({name: w.float() if "norm" in name else w for name, w in stored.items()}, file, {"format": "pt"})
    for dtype, told in (("bfloat16", True), ("float32", False)):
        model = cut(dissect(load(tmp_path / "dense", dtype=dtype, device="cpu")), plan.removed)
        card = (save(model, tmp_path / dtype, plan=plan) / "README.md").read_text()
        assert ("Weights that the original holds in float32 were rounded to bfloat16." in card) == told


def counted(family: str, period: int, blocks: int) -> PreTrainedModel:
    """A model whose blocks are of a kind as their number says."""
    config = tiny_config(family, blocks=blocks)
    full = [at % period == period - 1 for at in range(blocks)]
    [usual] = set(config.layer_types) - {"full_attention"}
    config.layer_types = ["full_attention" if here else usual for here in full]
    if family in ("llama4", "smollm3"):
        config.no_rope_layers = [int(not here) for here in full]
    if family == "llama4":
        config.moe_layers = [*range(blocks)]
    return AutoModelForCausalLM.from_config(config).eval()


PERIODICAL = {"afmoe": 4, "cohere2": 4, "gemma2": 2, "gemma3": 6, "gpt_oss": 2, "llama4": 4, "smollm3": 4}
OF_OTHER_WEIGHTS = {"qwen3_5": 4, "qwen3_5_moe": 4, "qwen3_next": 4}


@pytest.mark.parametrize(("family", "period"), (PERIODICAL | OF_OTHER_WEIGHTS).items())
def test_what_other_software_takes_for_another_kind_is_told(family: str, period: int) -> None:
    anatomy = dissect(counted(family, period, 2 * period))
    for right in (f"block.{2 * period - 1}", f"block.0-{period - 1}"):
        assert ordinary(cut(anatomy, units(right))).notes == ()
    [note] = ordinary(cut(anatomy, units("block.0"))).notes
    assert note.startswith("llama.cpp and vLLM, as" if family == "gpt_oss" else "llama.cpp, as")
    assert ("refuses this model" in note) == (family in OF_OTHER_WEIGHTS)
    assert ("something else, without a warning" in note) == (family in PERIODICAL)
    rare = "no rotary positions" if family in ("llama4", "smollm3") else "full attention"
    assert f"one block in {period} has {rare} there" in note


def test_biases_that_other_software_leaves_out_are_told() -> None:
    [note] = ordinary(cut(dissect(tiny_model("llama_bias")), units("block.0"))).notes
    assert note.startswith("SGLang, as of early 2026, computes something else, without a warning: it leaves out the")


def test_a_step_of_routed_blocks_is_rewritten_or_told_of() -> None:
    config = tiny_config("llama4", blocks=8)
    config.layer_types, config.no_rope_layers = ["full_attention"] * 8, [1, 1, 1, 0] * 2
    config.interleave_moe_layer_step, config.moe_layers = 2, [1, 3, 5, 7]
    anatomy = dissect(AutoModelForCausalLM.from_config(config).eval())
    for removed, step, routed in (("block.4-7", 2, [1, 3]), ("block.0,block.2,block.4,block.6", 1, [0, 1, 2, 3])):
        model = cut(anatomy, units(removed))
        assert (model.config.interleave_moe_layer_step, model.config.moe_layers) == (step, routed)
        assert "interleave_moe_layer_step" not in str(ordinary(model).notes)
    [told] = [note for note in ordinary(cut(anatomy, units("block.0,block.5-7"))).notes if "moe" in note]
    assert told.startswith("llama.cpp and vLLM, as of early 2026, refuse this model")
    assert "interleave_moe_layer_step=2" in told


# What llama.cpp, and vLLM, make of the families whose blocks differ, as far as their sources say: here by `runtimes`, …
TOLD = {*runtimes._PERIODS, *runtimes._LARGEST, "deepseek_v2", "deepseek_v3", "exaone4", "minicpm3", "minimax"}
# … read from the file, which its converter writes them to, or seen by the tensors that are there; …
READ = {"bamba", "dots1", "ernie4_5_moe", "exaone_moe", "glm4_moe", "granite_swa", "granitemoehybrid", "hy_v3", "jamba"}
READ |= {"kimi_linear", "laguna", "lfm2", "lfm2_moe", "mellum", "mimo_v2_flash", "olmo3"}
# … taken for one kind, or refused, in the dense model as well; …
AS_DENSE = {"gpt2", "hunyuan_v1_moe", "nemotron_h", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"}
# … not known to its converter; …
UNKNOWN = {
    "cwm",
    "diffllama",
    "gpt_neo",
    "ministral",
    "modernbert-decoder",
    "olmo_hybrid",
    "recurrent_gemma",
    "vaultgemma",
    "zamba",
    "zamba2",
}
# … or never cut.
NEVER_CUT = {"gemma3n_text", "gemma4_text"}


def has_blocks_that_differ(family: str) -> bool:
    """Whether the family's config says anything of blocks that is not the same of all."""
    config = tiny_config(family)
    try:
        smaller = cut_config(config, range(1, BLOCKS)).to_dict()
    except ModelError:
        return True
    number = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    changed = [value for name, value in config.to_dict().items() if name != number and value != smaller[name]]
    return any(not isinstance(value, list) or len(set(map(str, value))) > 1 for value in changed)


def test_of_every_family_whose_blocks_differ_it_was_looked_up_what_other_software_reads() -> None:
    there = {*DEPTH_BOUND, *filter(has_blocks_that_differ, FAMILIES)}
    looked_up = [TOLD, READ, AS_DENSE, UNKNOWN, NEVER_CUT]
    assert {tiny_config(family).model_type for family in there} == set().union(*looked_up)
    assert sum(map(len, looked_up)) == len(set().union(*looked_up))


@pytest.mark.parametrize(("family", "blocks"), [("gemma2", 46), ("gemma3", 62)])
def test_a_scale_that_other_software_takes_from_the_number_of_blocks_is_told(family: str, blocks: int) -> None:
    config = tiny_config(family, blocks=blocks)
    config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads
    told = f"scales this attention rightly only in a model of {blocks} blocks"
    for of_all, left in ((False, range(blocks)), (True, range(blocks - 1))):
        model = AutoModelForCausalLM.from_config(cut_config(config, left))
        assert (told in str(ordinary(model).notes)) == of_all
    config.query_pre_attn_scalar = config.head_dim  # of the smaller ones of the family
    assert told not in str(ordinary(AutoModelForCausalLM.from_config(cut_config(config, range(4)))).notes)


def test_windows_that_other_software_has_at_one_number_of_blocks_are_told_of() -> None:
    told = "in a model of 64 blocks alone does its attention have windows"
    config = tiny_config("exaone4", blocks=64)
    for left, window, wrong in ((64, 6, False), (63, 6, True), (63, None, False)):
        smaller = cut_config(config, range(left))
        smaller.sliding_window = window
        assert (told in str(ordinary(AutoModelForCausalLM.from_config(smaller)).notes)) == wrong


def test_a_scale_that_other_software_computes_by_a_constant_is_told_of() -> None:
    anatomy = dissect(tiny_model("minicpm3"))
    assert ordinary(cut(anatomy, ())).notes == ()
    [note] = ordinary(cut(anatomy, units("block.1,block.4"))).notes
    assert "it scales what blocks add by 1.4 / √4, and this model's scale_depth is 1.143." in note


def test_stored_tensors_that_other_software_computes_from_the_place_are_told_of(tmp_path: Path) -> None:
    anatomy = dissect(tiny_model("minimax"))
    assert ordinary(cut(anatomy, ())).notes == ()
    model = cut(anatomy, units("block.2"))
    with passed_over(anatomy, units("block.2")):
        wanted = logits(anatomy.model)
    save(model, tmp_path / "out", plan=None)
    assert close(logits(load_stock(tmp_path / "out", model)[0]), wanted)
    [note] = ordinary(model.to(torch.bfloat16)).notes
    assert "computes diagonal_decay, key_decay, query_decay, slope_rate from the place of a block" in note
    for family in ("minimax_m2", "apertus"):  # biases that are trained, constants
        assert ordinary(cut(dissect(tiny_model(family)), units("block.2"))).notes == ()


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_a_rank_that_other_software_expects_by_the_number_of_blocks_is_told_of(family: str) -> None:
    for rank, right, wrong in ((None, (27, 26), (25,)), (16, (28, 25), (27, 26))):
        config = tiny_config(family, blocks=28)
        config.q_lora_rank = rank
        for left in (*right, *wrong):
            notes = ordinary(AutoModelForCausalLM.from_config(cut_config(config, range(left)))).notes
            assert ("refuses this model: by its number of blocks" in str(notes)) == (left in wrong)


@pytest.mark.parametrize("form", ["auto", "padded"])
def test_the_card_and_the_report_tell_what_other_software_computes(form: str, tmp_path: Path) -> None:
    model = counted("gpt_oss", 2, 6)
    removed = "block.1" if form == "auto" else "block.1,attn.3"
    text = sample_text(model, padded=False)
    done = shallower.prune(model, removed, out=tmp_path / "out", calibration=text, form=form, speed=False)
    [note] = [note for note in done.report.notes if "vLLM" in note]
    assert note in (tmp_path / "out" / "README.md").read_text()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def quantize(folder: Path, method: str) -> None:
    """Rewrite a checkpoint as one in FP8 (by blocks of 16 x 16) or MXFP4 (experts alone, of random numbers)."""
    stored: dict[str, Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if method == "fp8" and re.search(r"(proj|w[123])\.weight$", name):
            scale = torch.full((-(-weight.shape[0] // 16), -(-weight.shape[1] // 16)), float(weight.abs().max()) / 448)
            stored[name] = (weight.float() / scale[0, 0]).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scale
        elif method == "mxfp4" and name.endswith(("gate_up_proj", "down_proj")):
            experts, inner, outer = weight.shape
            stored[f"{name}_blocks"] = torch.randint(0, 256, (experts, outer, inner // 32, 16), dtype=torch.uint8)
            stored[f"{name}_scales"] = torch.full((experts, outer, inner // 32), 122, dtype=torch.uint8)
        else:
            stored[name] = weight
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16], "fmt": "e4m3"},
        "mxfp4": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": ["self_attn", "router", "embed_tokens", "lm_head"],
        },
    }[method]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("number_format", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("family", "method"), [("llama", "fp8"), ("mixtral", "fp8"), ("gpt_oss", "mxfp4")])
def test_what_was_dequantized_is_saved_like_any_other(
    family: str, method: str, number_format: str, tmp_path: Path
) -> None:
    config = tiny_config(family)
    config.hidden_size = config.intermediate_size = 32
    source = AutoModelForCausalLM.from_config(config).bfloat16()
    source.save_pretrained(tmp_path / "source")
    plain = {name.replace(".0.", ".N.") for name in load_file(tmp_path / "source" / "model.safetensors")}
    quantize(tmp_path / "source", method)
    model = load(tmp_path / "source", dtype=number_format, device="cpu")
    types = {str(parameter.dtype) for parameter in model.parameters()}
    assert types <= {f"torch.{number_format}", "torch.float32"}  # GPT-OSS keeps some in float32
    folder = save(cut(dissect(model), units("block.1")), tmp_path / "out", plan=None)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    written = {name.replace(".0.", ".N.") for name in load_file(folder / "model.safetensors")}
    assert written == {name for name in plain if f".{BLOCKS - 1}." not in name}


def test_what_stays_quantized_is_refused(pruned: PreTrainedModel, tmp_path: Path) -> None:
    method = type("Config", (), {"quant_method": "gptq"})
    pruned.hf_quantizer = type("Quantizer", (), {"quantization_config": method})  # type: ignore[assignment]
    try:
        with pytest.raises(ModelError, match=r"stay quantized in memory \(gptq\), .* use the checkpoint from before"):
            save(pruned, tmp_path / "out", plan=None)
    finally:
        del pruned.hf_quantizer
    assert os.listdir(tmp_path) == []


def test_shards(pruned: PreTrainedModel, tmp_path: Path) -> None:
    folder = save(pruned, tmp_path / "out", plan=None, max_shard_size="40KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert (folder / "model.safetensors.index.json").exists()


def test_a_taken_place(pruned: PreTrainedModel, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    save(pruned, folder, plan=None)
    (folder / "report.html").touch()
    with pytest.raises(OutputError, match="--force"):
        save(pruned, folder, plan=None)
    assert (folder / "report.html").exists()
    save(pruned, folder, plan=None, force=True)
    assert not (folder / "report.html").exists()
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("nth", [1, 2])
def test_a_signal_behind_a_rename_leaves_a_whole_checkpoint(
    pruned: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    folder = save(pruned, tmp_path / "out", plan=None)
    (folder / "report.html").touch()
    rename = os.rename
    renamed: list[str] = []

    def interrupted(source: Any, target: Any) -> None:
        rename(source, target)
        if folder in (source, target):  # not the locks of all that is written
            renamed.append(str(target))
            if len(renamed) == nth:
                raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(pruned, folder, plan=None, force=True)
    assert os.listdir(tmp_path) == ["out"]
    assert (folder / "report.html").exists() is (nth == 1)
    assert verify_saved(folder, pruned, IDS) < 1e-5


def test_a_tokenizer_without_a_config(pruned: PreTrainedModel, tmp_path: Path) -> None:
    class Tekken(type(tiny_tokenizer())):  # type: ignore[misc]
        """Writes what mistral-common's does."""

        def save_pretrained(self, folder: Any, **_: Any) -> None:
            (Path(folder) / "tekken.json").write_text("{}")

    folder = save(pruned, tmp_path / "out", plan=None, tokenizer=Tekken(tokenizer_object=Tokenizer(models.BPE())))
    assert (folder / "tekken.json").exists()


def test_nothing_names_code_that_is_not_in_the_folder(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    for name, code in (
        ("config.json", {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["own.OwnTokenizer", None]}),
    ):
        file = tmp_path / "source" / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": code}))
    loaded = load_model(str(tmp_path / "source"), dtype="float32", device="cpu")
    model = cut(dissect(loaded.model), units("block.1"))
    folder = save(model, tmp_path / "out", plan=None, tokenizer=loaded.tokenizer)
    for file in folder.glob("*.json"):
        assert "auto_map" not in file.read_text()
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


def test_force_replaces_a_folder_of_the_models_bare_name(
    pruned: PreTrainedModel, plan: PruningPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = save(pruned, plan.model.name, plan=plan)
    (folder / "report.html").touch()
    assert save(pruned, plan.model.name, plan=plan, force=True) == tmp_path / plan.model.name
    assert not (folder / "report.html").exists()


def test_force_replaces_nothing_but_checkpoints(
    pruned: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "config.json").write_text("{}")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="not a checkpoint"):
        save(pruned, tmp_path / "thesis", plan=None, force=True)
    with pytest.raises(OutputError, match="not a folder"):
        save(pruned, tmp_path / "file", plan=None, force=True)
    source = save(pruned, tmp_path / "source", plan=None)
    monkeypatch.setattr(pruned.config, "_name_or_path", str(source))
    with pytest.raises(OutputError, match="is the model itself"):
        save(pruned, source, plan=None, force=True)
    with pytest.raises(OutputError, match=r"smaller is inside the model's own folder \(.*source\); choose a place"):
        save(pruned, source / "smaller", plan=None)
    monkeypatch.setattr(pruned.config, "_name_or_path", "")
    checkpoint = save(pruned, source / "checkpoint-5", plan=None)  # where a training keeps it
    monkeypatch.setattr(pruned.config, "_name_or_path", str(checkpoint))
    with pytest.raises(OutputError, match=r"source holds the model \(.*checkpoint-5\); choose another folder"):
        require_apart(source, checkpoint)
    with pytest.raises(OutputError, match=r"source also holds checkpoint-5/README"):
        save(pruned, source, plan=None, force=True)
    assert checkpoint.is_dir()
    monkeypatch.chdir(source)
    with pytest.raises(OutputError, match="is, or holds, the current folder or your home"):
        save(pruned, source, plan=None, force=True)
    assert sorted(os.listdir(tmp_path)) == ["file", "source", "thesis"]


def test_force_deletes_nothing_that_was_not_written_with_the_checkpoint(
    pruned: PreTrainedModel, plan: PruningPlan, tmp_path: Path
) -> None:
    pages = dict.fromkeys(("report.json", "report.html", "recovery.json"), "")
    save_again = partial(save, tokenizer=tiny_tokenizer(), plan=plan, pages=pages, max_shard_size="40KB", force=True)
    folder = save_again(pruned, tmp_path / "out")
    save_again(pruned, folder)
    (folder / "smaller.gguf").touch()
    for number in range(3):
        (folder / f"checkpoint-{number}").mkdir()
        (folder / f"checkpoint-{number}" / "config.json").touch()
    told = (
        r"also holds checkpoint-0/config.json, .*, checkpoint-2/config.json and 1 more, which shallower did not write"
    )
    with pytest.raises(OutputError, match=told):
        save_again(pruned, folder)
    for number in range(3):
        shutil.rmtree(folder / f"checkpoint-{number}")
    with pytest.raises(OutputError, match=r"also holds smaller\.gguf, which .* move that to another place"):
        require_free(folder, force=True)
    assert (folder / "smaller.gguf").exists()


def test_force_knows_what_the_systems_leave_and_what_a_tokenizer_of_own_code_writes(
    pruned: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny_tokenizer()

    def save_pretrained(folder: Path) -> None:
        (folder / "parts").mkdir()
        for name in ("qwen.tiktoken", "parts/more.bin"):
            (folder / name).touch()

    monkeypatch.setattr(tokenizer, "save_pretrained", save_pretrained)
    folder = save(pruned, tmp_path / "out", plan=None, tokenizer=tokenizer)
    for name in (".ipynb_checkpoints", ".cache/huggingface/download", ".git"):
        (folder / name).mkdir(parents=True)
    for name in (".DS_Store", "parts/Thumbs.db", ".ipynb_checkpoints/a.json", ".cache/huggingface/download/x.lock"):
        (folder / name).touch()
    require_free(folder, force=True)
    (folder / ".git" / "config").touch()
    (folder / "other.tiktoken").touch()
    with pytest.raises(OutputError, match=r"also holds \.git/config, other\.tiktoken, which"):
        require_free(folder, force=True)


def test_the_files_of_each_tokenizer_of_transformers_are_known(tmp_path: Path) -> None:
    known = written_with(tmp_path)
    named: set[str] = set()
    for source in Path(transformers.__file__).parent.glob("models/*/tokenization_*.py"):
        for found in re.finditer(r"VOCAB_FILES_NAMES = \{(.*?)\}", source.read_text(encoding="utf-8"), re.DOTALL):
            named.update(re.findall(r':\s*"([^"]+)"', found[1]))
    assert len(named) > 20
    assert not [name for name in named if not known(Path(name))]


def test_force_replaces_code_that_came_with_a_model_and_no_other(pruned: PreTrainedModel, tmp_path: Path) -> None:
    folder = save(pruned, tmp_path / "out", plan=None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "own.OwnConfig"}}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["names.Own", None]}}))
    (folder / "own.py").write_text("from .parts import Part\n")
    for name in ("parts.py", "names.py", "train.py"):
        (folder / name).touch()
    with pytest.raises(OutputError, match=r"also holds train\.py, which"):
        require_free(folder, force=True)
    (folder / "train.py").unlink()
    require_free(folder, force=True)


@pytest.mark.parametrize("kept", [False, True], ids=["new", "replacing"])
@pytest.mark.parametrize(
    ("where", "error", "seen"),
    [
        ("model", OSError(errno.ENOSPC, "No space left on device"), OutputError),
        (
            "model",
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            OutputError,
        ),
        ("model", PermissionError(errno.EACCES, "Permission denied"), OutputError),
        ("model", KeyboardInterrupt(), KeyboardInterrupt),
        ("verify", VerificationError("differs"), VerificationError),
        ("rename", KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_nothing_is_left_behind(
    pruned: PreTrainedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kept: bool,
    where: str,
    error: BaseException,
    seen: type[BaseException],
) -> None:
    if kept:
        save(pruned, tmp_path / "out", plan=None)
        (tmp_path / "out" / "report.html").touch()
    write = PreTrainedModel.save_pretrained
    rename = os.rename

    def fail(*args: Any, **kwargs: Any) -> Any:
        if where == "model":
            write(*args, **kwargs)
        raise error

    def fail_last(source: Any, target: Any) -> None:
        if Path(target) == tmp_path / "out" and "old" not in str(source):
            raise error
        rename(source, target)

    if where == "rename":
        monkeypatch.setattr(os, "rename", fail_last)
    elif where == "verify":
        # The package's function `save` hides the module of that name.
        monkeypatch.setattr(sys.modules[save.__module__], "verify_saved", fail)
    else:
        monkeypatch.setattr(PreTrainedModel, "save_pretrained", fail)
    with pytest.raises(seen) as caught:
        save(pruned, tmp_path / "out", plan=None, force=kept)
    if "space" in str(error):
        assert "disk is full" in str(caught.value)
    assert os.listdir(tmp_path) == (["out"] if kept else [])
    if kept:
        assert (tmp_path / "out" / "report.html").exists()


def test_too_little_room(pruned: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 1000}))
    with pytest.raises(OutputError, match="are free on that disk"):
        save(pruned, tmp_path / "out", plan=None)
    assert os.listdir(tmp_path) == []


def test_a_wrong_checkpoint_is_found(pruned: PreTrainedModel, tmp_path: Path) -> None:
    folder = save(pruned, tmp_path / "out", plan=None)
    assert verify_saved(folder, pruned, IDS) < 1e-5
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": BLOCKS - 1}))
    with pytest.raises(VerificationError, match="missing keys"):
        verify_saved(folder, pruned, IDS)
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": BLOCKS - 3}))
    with pytest.raises(VerificationError, match="unexpected keys"):
        verify_saved(folder, pruned, IDS)
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    with pytest.raises(VerificationError, match="differ by up to"):
        verify_saved(folder, pruned, IDS)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(VerificationError, match="does not load"):
        verify_saved(folder, pruned, IDS)


def test_too_little_memory_is_no_property_of_a_family(
    pruned: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    folder = save(pruned, tmp_path / "out", plan=None)
    with pytest.raises(RuntimeError, match="allocate memory"):
        verify_saved(folder, pruned, IDS, load=no_room)
    anatomy = dissect(tiny_model("llama"))
    monkeypatch.setattr(sys.modules[cut.__module__], "full_logits", no_room)
    with pytest.raises(RuntimeError, match="allocate memory"):
        cut(anatomy, units("block.1"))
    with pytest.raises(RuntimeError, match="allocate memory"):
        exact_pairs(anatomy)


def test_a_checkpoint_that_does_not_fit_beside_the_model_is_compared_on_the_processor(
    pruned: PreTrainedModel, tmp_path: Path, notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(AttentionInterface._global_mapping, "of_a_gpu", sdpa_attention_forward)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "of_a_gpu", sdpa_mask)
    folder = save(pruned, tmp_path / "out", plan=None)
    pruned.set_attn_implementation("of_a_gpu")
    asked: list[Any] = []
    found: list[PreTrainedModel] = []

    def load_too_large(folder: Path, like: PreTrainedModel) -> Any:
        loaded, info = load_stock(folder, like)
        move = loaded.to

        def to(device: Any) -> Any:
            asked.append(device)
            if len(asked) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 112.00 MiB.")
            return move(device)

        loaded.to = to  # type: ignore[method-assign]
        found.append(loaded)
        return loaded, info

    gpu = torch.device("cuda")
    monkeypatch.setattr(
        verify, "_logits_beside", lambda loaded, _, ids, run=verify._logits_beside: run(loaded, gpu, ids)
    )
    try:
        assert verify_saved(folder, pruned, IDS, load=load_too_large) < 1e-5
    finally:
        pruned.set_attn_implementation("sdpa")
    assert asked == [gpu, "cpu"]
    assert found[0].config._attn_implementation == "eager"  # what runs on GPUs alone cannot go with it
    assert notes == ["cuda has no room for the checkpoint beside the model, so it is compared on the processor."]


def test_padded_decoding_without_the_last_state() -> None:
    model = cut(dense("qwen3_next")[0], units("attn.3,attn.5"))
    alone = IDS[:1, :8]
    padded = torch.cat([torch.zeros_like(alone[:, :3]), alone], dim=1)
    batch = torch.cat([padded, IDS[1:2, :11]])
    mask = (batch != 0).long()
    together = model.generate(batch, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    single = model.generate(alone, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(together[0, 3:], single[0])


def test_files_are_as_readable_as_any_new_file(tmp_path):
    model = cut(dissect(tiny_model("llama")), [Unit(2, "block")])
    (tmp_path / "any").write_text("")
    saved = save(model, tmp_path / "out", plan=None)
    mode = (tmp_path / "any").stat().st_mode
    assert {path.stat().st_mode for path in saved.iterdir()} == {mode}
