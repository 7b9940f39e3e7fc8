"""Models that miss lone sublayers: saved, loaded with and without shallower, decoding, and what their cache holds."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LlamaConfig,
    PreTrainedModel,
    StaticCache,
)
from transformers.models.llama.modeling_llama import LlamaForCausalLM

import shallower
from shallower.anatomy import Anatomy, dissect
from shallower.anatomy.weigh import weigh
from shallower.cli import main
from shallower.engine import Ablator
from shallower.errors import BudgetError, ModelError, UnknownName, VerificationError
from shallower.exporters import export, save
from shallower.exporters.native import skip_words
from shallower.exporters.packaged import ffn_mult
from shallower.surgery import cut, leftovers, require_free, require_ordinary, verify_saved
from shallower.surgery import save as write
from shallower.surgery.mapping import put_map
from shallower.testing.conformance import sample_text
from shallower.testing.families import tiny_config, tiny_model, tiny_tokenizer
from shallower.timing.speed import cache_bytes
from shallower.units import Unit
from shallower.verbs.search import search
from test_surgery import IDS, close, decoded, dense, logits, passed_over, units

MIXED = "block.1,attn.2,mlp.4"  # of six blocks; five are left, of which one has no attention and one no MLP
FAMILIES = (
    "llama",
    "qwen3",
    "gemma2",
    "gemma3",
    "olmo2",
    "cohere2",
    "gpt2",
    "opt",
    "gpt_neox",
    "falcon",
    "bloom",
    "mixtral",
    "phi3",
    "granite",
    "gpt_oss",
    "cwm",
    "llama4",
    "deepseek_v3",
    "qwen3_next",
    "bamba",
)


def with_code(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, local_files_only=True).eval()


def load(folder: Path) -> PreTrainedModel:
    return shallower.load(folder, dtype="float32", device="cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_form_computes_the_same(family: str, tmp_path: Path) -> None:
    anatomy, _ = dense(family)
    removed = units(MIXED)
    with passed_over(anatomy, removed):
        wanted = logits(anatomy.model)
    model = cut(anatomy, removed)
    assert close(logits(model), wanted)
    found = export(anatomy, removed, model)
    assert found.form.name == "packaged"
    folder = write(found, tmp_path / family, plan=None, tokenizer=tiny_tokenizer(), verify_ids=IDS)
    for trust in (True, False):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
        assert tokenizer("the way").input_ids == tiny_tokenizer()("the way").input_ids
    for loaded in (load(folder), with_code(folder)):
        assert close(logits(loaded), wanted), "one pass"
        assert close(decoded(loaded), wanted), "token by token"
        assert loaded.num_parameters() == model.num_parameters() < anatomy.model.num_parameters()
        assert len(cache_of(loaded).layers) == len(loaded.config.block_configs) - 1 == 4
    declared = json.loads((folder / "config.json").read_text(encoding="utf-8"))["auto_map"]
    assert ("AutoModel" in declared) == (family != "llama4")  # which has no part that is its model without the head
    if "AutoModel" in declared:
        headless, told = AutoModel.from_pretrained(
            folder, trust_remote_code=True, local_files_only=True, output_loading_info=True
        )
        assert not told["missing_keys"]
        states = [part.eval()(IDS).last_hidden_state for part in (headless, with_code(folder).base_model)]
        assert torch.equal(*states)
    require_free(folder, force=True)  # also with the code that Python compiled
    kinds = [unit.kind for unit in dissect(load(folder)).units]
    assert kinds.count("attn") == kinds.count("mlp") == 4
    stored = load_file(folder / "model.safetensors")
    assert len(model.get_submodule(anatomy.path)) == 5
    gone = [(1, anatomy.blocks[2].attn), (3, anatomy.blocks[4].mlp)]  # attn.2 is in the second block that is left
    names = [f"{anatomy.path}.{place}.{name}." for place, part in gone for name in part.names]
    assert not [name for name in stored if name.startswith(tuple(names))]
    assert sum(tensor.numel() for tensor in stored.values()) < sum(p.numel() for p in anatomy.model.parameters())

    padded = export(anatomy, removed, model, "padded")
    assert type(padded.model) is type(anatomy.model)
    before = {name: parameter.clone() for name, parameter in anatomy.model.named_parameters()}
    stock = write(padded, tmp_path / f"{family}_stock", plan=None, verify_ids=IDS)
    loaded = AutoModelForCausalLM.from_pretrained(stock, local_files_only=True)
    assert close(logits(loaded), wanted)
    assert close(decoded(loaded), wanted)
    assert all(torch.equal(before[name], parameter) for name, parameter in anatomy.model.named_parameters())
    assert "no smaller and no faster" in (stock / "README.md").read_text()


def cache_of(model: PreTrainedModel, ids: Tensor = IDS) -> Any:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=True).past_key_values


# The KV cache.


@pytest.fixture(scope="module")
def deep() -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model of 30 blocks, and the same without ten of its attentions, the first among them."""
    whole = tiny_model("llama", blocks=30)
    return whole, cut(dissect(whole), units(",".join(f"attn.{index}" for index in range(0, 30, 3))))


def test_a_third_of_the_cache_is_gone(deep: tuple[PreTrainedModel, PreTrainedModel], tmp_path: Path) -> None:
    whole, model = deep
    assert model.config.num_hidden_layers == 30
    for loaded in (model, load(save(model, tmp_path / "deep", plan=None))):
        before, after = cache_of(whole), cache_of(loaded)
        assert [layer.keys.shape for layer in after.layers] == [(2, 2, IDS.shape[1], 8)] * 20
        assert 3 * cache_bytes(after) == 2 * cache_bytes(before)
        for cache in (DynamicCache(config=loaded.config), StaticCache(loaded.config, max_cache_len=32)):
            assert len(cache.layers) == 20
            with torch.no_grad():
                loaded(input_ids=IDS, past_key_values=cache, use_cache=True)
            assert {layer.is_initialized for layer in cache.layers} == {True}
        whole_cache = StaticCache(whole.config, max_cache_len=32)
        with torch.no_grad():
            whole(input_ids=IDS, past_key_values=whole_cache, use_cache=True)
        assert 3 * sum(layer.keys.nbytes for layer in cache.layers) == 2 * sum(
            layer.keys.nbytes for layer in whole_cache.layers
        )
        weights = weigh(dissect(loaded))
        assert 3 * weights.blocks.kv_bytes == 2 * weigh(dissect(whole)).blocks.kv_bytes
        assert weights.units[Unit(0, "block")].kv_bytes == 0 < weights.units[Unit(1, "block")].kv_bytes


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "cohere2", "qwen3_next"])
def test_generates_in_batches_and_with_every_cache(family: str) -> None:
    anatomy, _ = dense(family)
    model = cut(anatomy, units("attn.0,mlp.1,attn.3"))
    alone = IDS[:1, :7]
    padded = torch.cat([torch.zeros_like(alone[:, :4]), alone], dim=1)
    batch = torch.cat([padded, IDS[1:2, :11]])
    asked = {"attention_mask": (batch != 0).long(), "max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    asked |= {"eos_token_id": None}
    wanted = []  # the stock model with sublayers passed over, without any cache, one sequence at a time
    for row in (alone, IDS[1:2, :11]):
        with passed_over(anatomy, units("attn.0,mlp.1,attn.3")), torch.no_grad():
            ids = row
            for _ in range(9):
                ids = torch.cat([ids, anatomy.model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        wanted.append(ids)
    for how in ({}, {"cache_implementation": "static", "disable_compile": True}):
        found = model.generate(batch, **asked, **how)
        assert torch.equal(found[0, 4:], wanted[0][0])
        assert torch.equal(found[1], wanted[1][0])


def test_slots_are_numbered_densely() -> None:
    model = cut(dense("gpt_neo")[0], units("attn.0,attn.3"))
    found = [getattr(block.attn.attention, "layer_id", None) for block in model.transformer.h if leftover_free(block)]
    assert found == [0, 1, 2, 3]


def leftover_free(block: nn.Module) -> bool:
    return not leftovers(block)


# The layout of DeciLM, read as vLLM's class for it does: from block_configs alone, and with no code of ours.


def as_deci(folder: Path, ids: Tensor) -> Tensor:
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    size = config.get("head_dim") or hidden // heads
    base = config["rope_parameters"]["rope_theta"]
    angles = torch.arange(ids.shape[1])[:, None] * base ** (-torch.arange(0, size, 2) / size)[None, :]
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    bias = config.get("qkv_bias", config.get("attention_bias", False))
    mask = torch.full((ids.shape[1],) * 2, -math.inf).triu(1)
    unread = set(tensors)

    def take(name: str) -> Tensor:
        unread.discard(name)
        return tensors[name]

    def norm(x: Tensor, name: str) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).rsqrt() * take(f"{name}.weight")

    def linear(x: Tensor, name: str, with_bias: bool) -> Tensor:
        return x @ take(f"{name}.weight").T + (take(f"{name}.bias") if with_bias else 0)

    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    x = take("model.embed_tokens.weight")[ids]
    for index in range(config["num_hidden_layers"]):
        block, at = config["block_configs"][index], f"model.layers.{index}"
        if not block["attention"]["no_op"]:
            kv_heads = heads // block["attention"]["n_heads_in_group"]
            h = norm(x, f"{at}.input_layernorm")
            q, k, v = (
                linear(h, f"{at}.self_attn.{name}_proj", bias).unflatten(-1, (number, size)).transpose(1, 2)
                for name, number in (("q", heads), ("k", kv_heads), ("v", kv_heads))
            )
            k, v = (tensor.repeat_interleave(heads // kv_heads, dim=1) for tensor in (rotate(k), v))
            mixed = (rotate(q) @ k.transpose(-1, -2) / size**0.5 + mask).softmax(-1) @ v
            x = x + linear(
                mixed.transpose(1, 2).flatten(2), f"{at}.self_attn.o_proj", config.get("attention_bias", False)
            )
        if not block["ffn"]["no_op"]:
            h, mlp_bias = norm(x, f"{at}.post_attention_layernorm"), config.get("mlp_bias", False)
            gate, up = (linear(h, f"{at}.mlp.{name}_proj", mlp_bias) for name in ("gate", "up"))
            assert up.shape[-1] == block["ffn"]["intermediate_size"]
            x = x + linear(nn.functional.silu(gate) * up, f"{at}.mlp.down_proj", mlp_bias)
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    found = norm(x, "model.norm") @ take(head).T
    assert not unread, "vLLM refuses weights that it has no place for"
    return found


def shaped_like_llama(family: str) -> PreTrainedModel:
    config = tiny_config(family)
    config.sliding_window = None
    if family == "qwen2":
        config.use_sliding_window, config.layer_types = False, ["full_attention"] * config.num_hidden_layers
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", ["llama", "llama_bias", "mistral", "qwen2"])
def test_decilm(family: str, tmp_path: Path) -> None:
    whole = tiny_model(family) if family.startswith("llama") else shaped_like_llama(family)
    with torch.no_grad():
        for parameter in whole.parameters():  # biases that would show
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model = cut(dissect(whole), units(MIXED))
    folder = save(model, tmp_path / "out", plan=None)
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("nemotron-nas", ["DeciLMForCausalLM"])
    assert [block["attention"]["no_op"] for block in config["block_configs"]] == [False, True, False, False, False]
    assert [block["ffn"]["no_op"] for block in config["block_configs"]] == [False, False, False, True, False]
    assert close(as_deci(folder, IDS), logits(model), 1e-5)
    read = AutoConfig.from_pretrained(folder, trust_remote_code=True)  # what vLLM gets, with attributes
    assert read.block_configs[1].attention.no_op is True
    assert read.block_configs[0].attention.n_heads_in_group == 2
    assert not hasattr(read.block_configs[0].ffn, "ffn_mult")  # 48 is no multiple of 256
    assert "vLLM runs" in (folder / "README.md").read_text()


@pytest.mark.parametrize("family", ["mistral", "qwen2_mixed", "gemma"])
def test_what_decilm_cannot_say_is_generic(family: str, tmp_path: Path) -> None:
    for removed, said in (("attn.1", "vLLM cannot run it"), ("mlp.1", "vLLM has no class for it")):
        folder = save(cut(dense(family)[0], units(removed)), tmp_path / removed, plan=None)
        config = json.loads((folder / "config.json").read_text())
        assert config["model_type"].startswith("shallow_")
        assert said in (folder / "README.md").read_text()


def test_a_model_that_nothing_more_can_be_cut_out_of_is_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    smaller = cut(dense("llama")[0], units("attn.1"))
    monkeypatch.setattr(Ablator, "losses", lambda *_: pytest.fail("it was measured"))
    for asked in ({"remove": 1}, {"remove": "block.2"}, {"remove": 1, "units": "sublayer", "ordinary": True}):
        with pytest.raises(ModelError, match="this model lacks sublayers already"):
            search(smaller, calibration=sample_text(smaller), **asked)


@pytest.mark.parametrize("family", ["bloom", "llama4"])  # an attention of its own; no class without the head
def test_the_card_says_why_vllm_takes_no_other_class(family: str, tmp_path: Path) -> None:
    folder = save(cut(dense(family)[0], units("mlp.1")), tmp_path / "out", plan=None)
    assert "vLLM cannot run it" in (told := (folder / "README.md").read_text())
    assert "an attention in every block" not in told


def test_a_family_whose_attention_cannot_be_told_apart(tmp_path: Path) -> None:
    anatomy, _ = dense("dbrx")
    with passed_over(anatomy, units("mlp.2")):
        wanted = logits(anatomy.model)
    folder = save(cut(anatomy, units("mlp.2")), tmp_path / "out", plan=None)
    assert json.loads((folder / "config.json").read_text())["block_configs"][2]["attention"]["modules"] == {}
    for loaded in (load(folder), with_code(folder)):
        assert close(logits(loaded), wanted)
        assert close(decoded(loaded), wanted)


def test_the_card_warns_when_vllm_would_fail(tmp_path: Path) -> None:
    folder = save(cut(dense("llama")[0], units("attn.0")), tmp_path / "out", plan=None)
    assert "vLLM cannot run it" in (folder / "README.md").read_text()


@pytest.mark.parametrize(("intermediate", "hidden"), [(1536, 576), (14336, 4096), (11008, 4096), (48, 32)])
def test_ffn_mult(intermediate: int, hidden: int) -> None:
    found = ffn_mult(intermediate, hidden)
    if intermediate % 256:
        assert found is None
        return
    assert found is not None
    size = int(2 * found * hidden / 3)  # as vLLM reads it
    assert (size if size % 256 == 0 else size + 256 - size % 256) == intermediate


# Trust.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(cut(dense("llama")[0], units(MIXED)), tmp_path_factory.mktemp("saved") / "out", plan=None)


def test_no_code_of_a_folder_is_run(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        text = f"open({str(tmp_path / 'ran')!r}, 'w')\n" if file.suffix == ".py" else file.read_bytes()
        (copy / file.name).write_bytes(text.encode() if isinstance(text, str) else text)
    load(copy)
    shallower.load(copy, dtype="float32", device="cpu", trust_remote_code=True)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(copy, trust_remote_code=False)


@pytest.mark.parametrize(
    ("packaged", "says"),
    [
        ({"format": "shallower.packaged/9", "stock_class": "LlamaForCausalLM"}, "shallower.packaged/9"),
        ("yes", "'yes'"),
        ({"format": "shallower.packaged/1", "stock_class": "LlumaForCausalLM"}, "LlumaForCausalLM"),
        ({"format": "shallower.packaged/1", "stock_class": "AutoTokenizer"}, "AutoTokenizer"),
    ],
)
def test_other_formats_are_refused(folder: Path, tmp_path: Path, packaged: object, says: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "packaged": packaged}))
    with pytest.raises(ModelError, match=says):
        load(tmp_path)


def test_without_shallower(folder: Path) -> None:
    code = """
import sys
sys.modules["shallower"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = torch.arange(3, 15)[None]
print(model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0].tolist())
print(len(model(ids, use_cache=True).past_key_values.layers))
"""
    ran = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True, timeout=300)
    ids = torch.arange(3, 15)[None]
    wanted = load(folder).generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0].tolist()
    assert ran.stdout.split("\n")[:2] == [str(wanted), "4"]


def test_the_files_are_short_and_build_on_the_stock_class(tmp_path: Path) -> None:
    out = save(cut(dense("gemma2")[0], units("attn.1")), tmp_path / "out", plan=None)
    text = (out / "modeling_shallow.py").read_text()
    assert "from transformers import Gemma2ForCausalLM as StockModel" in text
    assert "Llama" not in text.split("import", 1)[1].split("MODULES")[0].replace("of Llama", "").replace("in Llama", "")
    assert "Apache" in text
    assert "from transformers import Gemma2Config as StockConfig" in (out / "configuration_shallow.py").read_text()


@pytest.mark.parametrize("family", ["gemma2", "mixtral", "qwen3_moe", "granitemoehybrid", "dots1", "falcon_h1"])
def test_a_model_that_was_read_from_disk_is_packaged(family: str, tmp_path: Path) -> None:
    dense(family)[0].model.save_pretrained(tmp_path / "dense")
    anatomy = dissect(load(tmp_path / "dense"))
    for unit in ("attn.1", "mlp.1")[family == "falcon_h1" :]:  # whose attention cannot be told apart
        model = cut(anatomy, units(unit))
        out = save(model, tmp_path / unit, plan=None)
        assert close(logits(with_code(out)), logits(model))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_what_was_loaded_is_saved_again(family: str, tmp_path: Path) -> None:
    first = save(cut(dense(family)[0], units(MIXED)), tmp_path / "first", plan=None)
    second = save(load(first), tmp_path / "second", plan=None)
    assert sorted(file.name for file in first.iterdir()) == sorted(file.name for file in second.iterdir())
    one, two = (json.loads((folder / "config.json").read_text()) for folder in (first, second))
    assert one == two
    stored = load_file(second / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in load_file(first / "model.safetensors").items())


# What cannot be.


def test_refusals(tmp_path: Path) -> None:
    anatomy, _ = dense("llama")
    model = cut(anatomy, units("attn.1"))
    with pytest.raises(ModelError, match=r"attn\.1.*--stock"):
        require_ordinary(model)
    with pytest.raises(UnknownName, match="packaged"):
        export(anatomy, units("attn.1"), model, "package")
    with pytest.raises(ModelError, match="prune the original"):
        cut(dissect(model), units("block.0"))
    assert export(anatomy, units("block.1"), cut(anatomy, units("block.1")), "packaged").form.name == "ordinary"

    class OwnForCausalLM(LlamaForCausalLM):
        pass

    own = dissect(OwnForCausalLM(tiny_config("llama")).eval())
    with pytest.raises(ModelError, match="OwnForCausalLM is not a class of transformers"):
        save(cut(own, units("attn.1")), tmp_path / "out", plan=None)
    assert list(tmp_path.iterdir()) == []


# Traps. Each is done the wrong way here, and what stands in its way must notice.


def test_trap_indices_that_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[cut.__module__], "_renumber", lambda *_, **__: None)
    with pytest.raises(ModelError, match=r"does not run|decodes wrongly"):
        cut(dense("llama")[0], units("block.0"))
    with pytest.raises(ModelError, match=r"does not run|decodes wrongly"):
        cut(dense("gemma3")[0], units("attn.0"))


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_trap_stale_layer_types(family: str, tmp_path: Path) -> None:
    anatomy, _ = dense(family)
    model = cut(anatomy, units("block.0,block.3"))
    out = write(model, tmp_path / "out", plan=None)
    config = json.loads((out / "config.json").read_text())
    kinds = anatomy.model.config.layer_types
    for wrong in (kinds, kinds[: len(config["layer_types"])]):  # too many; as many, of blocks that moved
        assert wrong != config["layer_types"]
        (out / "config.json").write_text(json.dumps({**config, "layer_types": wrong}))
        with pytest.raises(VerificationError, match=r"does not load|differ by"):
            verify_saved(out, model, IDS)
    del config["layer_types"]  # computed anew on loading
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(VerificationError, match="differ by"):
        verify_saved(out, model, IDS)


def test_trap_skip_is_accepted_and_ignored(tmp_path: Path) -> None:
    anatomy, before = dense("llama")
    anatomy.model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "per_layer_config": {"2": {"skip": ["mlp"]}}}))
    told = AutoModelForCausalLM.from_pretrained(tmp_path)
    model = cut(anatomy, units("mlp.2"))
    assert not close(logits(model), before)
    if close(logits(told), before):  # as 5.23 does
        assert skip_words(anatomy.model) == {}
        assert export(anatomy, units("mlp.2"), model).form.name == "packaged"
        with pytest.raises(VerificationError, match="differ by"):
            verify_saved(tmp_path, anatomy.model.__class__(cut(anatomy, ()).config).eval(), IDS)


class Obedient(LlamaForCausalLM):
    """A class that does what per_layer_config says."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        slot = 0
        for place, layer in enumerate(self.model.layers):
            skipped = getattr(config.per_layer_config[place], "skip", None) or []
            if "mlp" in skipped:
                layer.mlp, layer.post_attention_layernorm = Nothing(), nn.Identity()
            if "attention" in skipped:
                layer.self_attn, layer.input_layernorm = NoAttention(), nn.Identity()
            else:
                layer.self_attn.layer_idx = slot
                slot += 1


class ObedientConfig(LlamaConfig):
    model_type = "obedient"


Obedient.config_class = ObedientConfig


class Nothing(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return torch.zeros_like(hidden)


class NoAttention(nn.Module):
    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        return torch.zeros_like(hidden_states), None


def test_a_class_is_asked_whether_it_obeys(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def obeys(anatomy: Anatomy, unit: Unit, word: str) -> bool:
        asked.append(word)
        return False

    monkeypatch.setattr(sys.modules[skip_words.__module__], "_obeys", obeys)
    assert skip_words(tiny_model("cwm")) == {}  # its config takes no None for a token
    assert asked

    class Raising(LlamaForCausalLM):
        def __init__(self, config: LlamaConfig) -> None:
            raise failures.pop()

    failures: list[Exception] = [torch.OutOfMemoryError("CUDA out of memory"), AssertionError(64)]
    whole = tiny_model("llama")
    whole.__class__ = Raising
    assert skip_words(whole) == {}
    with pytest.raises(torch.OutOfMemoryError):
        skip_words(whole)


def test_native_where_it_is_obeyed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    AutoConfig.register("obedient", ObedientConfig, exist_ok=True)
    AutoModelForCausalLM.register(ObedientConfig, Obedient, exist_ok=True)
    whole = Obedient(ObedientConfig(**tiny_config("llama").to_diff_dict() | {"model_type": "obedient"})).eval()
    anatomy = dissect(whole)
    assert skip_words(whole) == {"attn": "attention", "mlp": "mlp"}
    removed = units(MIXED)
    model = cut(anatomy, removed)
    found = export(anatomy, removed, model)
    assert found.form.name == "native"
    out = write(found, tmp_path / "out", plan=None, verify_ids=IDS)
    assert not list(out.glob("*.py"))
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert close(logits(loaded), logits(model))
    assert close(decoded(loaded), logits(model))
    assert loaded.num_parameters() == model.num_parameters()
    assert export(anatomy, removed, model, "padded").form.name == "padded"


# Maps in the place of what was removed.


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox", "bloom"])
def test_maps_are_stored(family: str, tmp_path: Path) -> None:
    anatomy, _ = dense(family)
    model = cut(anatomy, units("attn.2,mlp.4"))
    plain = logits(model)
    width = model.config.hidden_size
    bias, mean, down, up = (torch.randn(*shape) / 4 for shape in ((width,), (width,), (width, 3), (3, width)))
    if family == "bloom":  # its norms are given to the residual, so that they stay
        with pytest.raises(ModelError, match="stream itself"):
            put_map(model, Unit(2, "attn"), bias=bias, down=down, up=up)
        assert torch.equal(logits(model), plain)
        return
    put_map(model, Unit(2, "attn"), bias=bias, mean=mean, down=down, up=up)
    put_map(model, Unit(4, "mlp"), bias=bias)
    wanted = mapped(anatomy.model, anatomy.path, bias, lambda x: (x - mean) @ down @ up + bias)
    assert close(logits(model), wanted)
    assert not close(plain, wanted)
    out = save(model, tmp_path / family, plan=None)
    for loaded in (load(out), with_code(out)):
        assert close(logits(loaded), wanted)
        assert close(decoded(loaded), wanted)
    with pytest.raises(ModelError, match="save it packaged"):
        export(anatomy, units("attn.2,mlp.4"), model, "padded")


def mapped(whole: PreTrainedModel, path: str, bias: Tensor, attention: Callable[[Tensor], Tensor]) -> Tensor:
    """The stock model whose block 2 has `attention` for its attention, and block 4 a bias for its MLP."""
    blocks = whole.get_submodule(path)
    names = {"attn": ("self_attn", "attention"), "mlp": ("mlp",)}
    handles = []

    def module(index: int, kind: str) -> nn.Module:
        return next(getattr(blocks[index], name) for name in names[kind] if hasattr(blocks[index], name))

    stream: dict[int, Tensor] = {}

    def enter(index: int) -> Any:
        return lambda _, args, kwargs: stream.update({index: args[0] if args else kwargs["hidden_states"]})

    post = getattr(blocks[2], "pre_feedforward_layernorm", None) is not None  # norms inside the branch
    spot = (blocks[2].post_attention_layernorm, blocks[4].post_feedforward_layernorm) if post else None
    first, second = spot or (module(2, "attn"), module(4, "mlp"))
    handles.append(blocks[2].register_forward_pre_hook(enter(2), with_kwargs=True))
    handles.append(
        first.register_forward_hook(
            lambda _, __, out: (attention(stream[2]), *out[1:]) if isinstance(out, tuple) else attention(stream[2])
        )
    )
    handles.append(second.register_forward_hook(lambda _, __, out: torch.zeros_like(out) + bias))
    try:
        return logits(whole)
    finally:
        for handle in handles:
            handle.remove()


def test_maps_that_do_not_fit() -> None:
    model = cut(dense("llama")[0], units("attn.2"))
    for given, says in (
        ({"bias": torch.zeros(31)}, r"shape \(31,\)"),
        ({"down": torch.zeros(32, 2)}, "down and up"),
        ({}, "down and up"),
        ({"mean": torch.zeros(32), "bias": torch.zeros(32)}, "down and up"),
    ):
        with pytest.raises(ModelError, match=says):
            put_map(model, Unit(2, "attn"), **given)
    with pytest.raises(ModelError, match=r"attn\.3"):
        put_map(model, Unit(3, "attn"), bias=torch.zeros(32))


# The verbs.


@pytest.mark.parametrize(("form", "code"), [("auto", True), ("padded", False)])
def test_prune_says_in_which_form(form: str, code: bool, tmp_path: Path) -> None:
    from shallower.testing.conformance import sample_text

    model = tiny_model("llama")
    done = shallower.prune(
        model,
        "attn.2,mlp.4",
        out=tmp_path / "out",
        calibration=sample_text(model, padded=False),
        form=form,
        speed=False,
    )
    assert done.report.form == ("packaged" if code else "padded")
    assert (tmp_path / "out" / "modeling_shallow.py").exists() is code
    assert (done.report.pruned.kv_bytes < done.report.dense.kv_bytes) is code
    page = (tmp_path / "out" / "report.html").read_text()
    assert ("trust_remote_code" in page) is code
    assert done.plan.removed == units("attn.2,mlp.4")
    assert [row.of for row in done.report.influence[0].rows] == [
        Unit(n, kind) for n in range(6) for kind in ("attn", "mlp")
    ]
    assert done.report.spans is None  # of blocks, of which none goes
    assert "Removed 1 attention sublayer and 1 MLP sublayer (" in page
    assert "0 of 6 blocks" not in page
    assert "`" not in page
    card = (tmp_path / "out" / "README.md").read_text()
    assert "\nAll 6 blocks and " in card
    assert "\n## Before and after\n" in card
    assert "\n| KV cache per token, float32 | " in card
    again = shallower.inspect(tmp_path / "out", device="cpu", dtype="float32")
    assert again.identity.blocks == 6
    if code:
        assert again.exports == {"packaged": "as it is; nothing more can be removed"}
        with pytest.raises(ModelError, match="prune the original"):
            shallower.prune(tmp_path / "out", 1)


@pytest.mark.parametrize("form", ["auto", "padded"])
def test_a_model_of_code_of_its_own_says_how_it_loads(form: str, tmp_path: Path) -> None:
    from shallower.testing.conformance import sample_text

    tiny_model("llama").save_pretrained(tmp_path / "own")
    (tmp_path / "own" / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n    model_type = 'own_llama'\n"
    )
    (tmp_path / "own" / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\n\nfrom .configuration_own import OwnConfig\n\n\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    code = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config |= {"model_type": "own_llama", "architectures": ["OwnForCausalLM"], "auto_map": code}
    (tmp_path / "own" / "config.json").write_text(json.dumps(config))
    done = shallower.prune(
        tmp_path / "own",
        "block.1" if form == "auto" else "attn.1",
        out=tmp_path / "out",
        calibration=sample_text(tiny_model("llama"), padded=False),
        form=form,
        speed=False,
        device="cpu",
        dtype="float32",
        trust_remote_code=True,
    )
    assert done.report.form == ("ordinary with its code" if form == "auto" else "padded with its code")
    assert (tmp_path / "out" / "modeling_own.py").exists()
    card = (tmp_path / "out" / "README.md").read_text()
    lines = card.partition("```python\n")[2].partition("```")[0].replace("path/to/this/folder", str(tmp_path / "out"))
    assert "shallower" not in lines
    found: dict[str, object] = {}
    exec(lines, found)
    assert type(found["model"]).__name__ == "OwnForCausalLM"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "trust_remote_code=True" in page
    assert "AutoTokenizer" not in page  # there is none


@pytest.mark.parametrize(("limit", "prompt"), [(100, 68), (33, 1), (32, None)])
def test_prune_times_what_fits_the_positions(limit: int, prompt: int | None) -> None:
    from shallower.testing.conformance import sample_text

    config = tiny_config("llama")
    config.max_position_embeddings = limit
    model = LlamaForCausalLM(config).eval()
    report = shallower.prune(model, "block.1", calibration=sample_text(model, padded=False)).report
    if prompt is None:
        assert report.speed_setting == ""
        assert any("Speed was not timed" in note and "has 32 positions" in note for note in report.notes)
    else:
        assert report.speed_setting.startswith(f"prompt {prompt}, generate 32, ")


def test_the_command_line_knows_the_forms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    (tmp_path / "text.txt").write_text(
        "\n\n".join(f"{n} times {n} is {n * n}, and not {n * n + 1}." * 9 for n in range(99))
    )
    asked = ["prune", tmp_path / "tiny", "--remove", "attn.3", "--out", tmp_path / "out", "--no-speed"]
    asked += ["--calibration", tmp_path / "text.txt", "--sequences", 2, "--length", 32, "--window", 32, "--windows", 1]
    for wrong, says in (
        (["--form", "package"], "did you mean 'packaged'"),
        (["--form", "packaged", "--stock"], "drop one of the two"),
    ):
        assert main.run([str(word) for word in asked + wrong]) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    for asked_for, says in ((["--stock", "--json"], '"form": "padded"'), (["--force"], "trust_remote_code=True")):
        assert main.run([str(word) for word in asked + asked_for]) == 0
        assert says in capsys.readouterr().out
    assert main.run(["eval", str(tmp_path / "out"), "--text", str(tmp_path / "text.txt"), "--window", "32"]) == 0
    assert main.run(["score", str(tmp_path / "out"), *map(str, asked[-10:-4]), "--quiet"]) == 0
    assert main.run(["prune", str(tmp_path / "out"), "--remove", "1", "--out", str(tmp_path / "twice")]) == 2
    assert "prune the original" in capsys.readouterr().err


def test_inspect_says_what_can_be_exported() -> None:
    found = shallower.inspect(tiny_model("llama"))
    assert "pair up" in found.exports["ordinary"]
    assert "DeciLM" in found.exports["packaged"]
    assert set(found.exports) == {"ordinary", "native", "packaged", "padded"}
    assert set(shallower.inspect(tiny_model("cwm")).exports) == set(found.exports)
    assert "pair up" not in shallower.inspect(tiny_model("gpt_neox")).exports["ordinary"]
    unlike = shallower.inspect(tiny_model("dbrx"))  # its attention gives the stream besides its output
    assert unlike.parts["attn"] == ()
    assert "pair up" not in unlike.exports["ordinary"]
    with pytest.raises(BudgetError, match="dbrx has no attn units that can be told apart"):
        shallower.search(tiny_model("dbrx"), "1", units="attn")
    with pytest.raises(BudgetError, match=r"attn\.3 does not exist: attn is not a part of block 3 .* told apart"):
        shallower.search(tiny_model("dbrx"), "attn.3")


def test_a_damaged_package_is_found(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="not loaded completely"):
        load(tmp_path)
