"""`shallower bench`: several models at several sizes, what is told of them, and peak memory."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import shallower
from shallower.anatomy import dissect
from shallower.cli import main
from shallower.errors import ModelError, ModelTooLarge, UserError
from shallower.surgery import cut
from shallower.testing.families import BLOCKS, tiny_model, tiny_tokenizer
from shallower.timing import Speed, Spread, compare_speed, memory_source, peak_above
from shallower.units import parse_units
from shallower.verbs.bench import Bench
from shallower.verbs.subject import Subject, open_subject

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"generate": 2, "repeats": 2, "warmup": 0, "device": "cpu", "dtype": "float32"}


def without(text: str) -> Any:
    """A tiny llama without some units; sublayers that do not pair up leave holes."""
    return cut(dissect(tiny_model("llama")), parse_units(text))


def padded() -> Any:
    """The same model as without its first attention, in the form that loads anywhere."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
    return model


def test_every_model_at_every_size() -> None:
    found = shallower.bench(
        {"dense": tiny_model("llama"), "pruned": without("block.1,attn.3")}, prompt=[4, 8], batch=[1, 2], **SMALL
    )
    assert isinstance(found, Bench)
    assert [(timed.model, timed.blocks, timed.attns, timed.mlps) for timed in found.models] == [
        ("dense", BLOCKS, BLOCKS, BLOCKS),
        ("pruned", BLOCKS - 1, BLOCKS - 2, BLOCKS - 1),
    ]
    for timed in found.models:
        sizes = [(speed.batch, speed.prompt, speed.generate) for speed in timed.speeds]
        assert sizes == [(1, 4, 2), (1, 8, 2), (2, 4, 2), (2, 8, 2)]
        for speed in timed.speeds:
            # keys and values of 2 heads of 8 float32 numbers
            assert speed.kv_cache_bytes == timed.attns * 2 * 2 * 8 * 4 * speed.batch * (speed.prompt + 2)
    assert found.notes == ()
    data = json.loads(json.dumps(found.to_json()))
    assert [len(model["speeds"]) for model in data["models"]] == [4, 4]
    assert "decode_faster" not in data["models"][0]["speeds"][0]
    assert data["models"][1]["speeds"][0]["kv_cache_percent"] == pytest.approx(-100 * 2 / BLOCKS)


def test_one_process_takes_turns_at_each_size(monkeypatch: pytest.MonkeyPatch) -> None:
    models = {"a": tiny_model("llama", blocks=1), "b": tiny_model("llama", blocks=2)}
    prefilled: list[tuple[str, int]] = []
    for name, model in models.items():
        forward = model.forward

        def record(*args: Any, _name: str = name, _forward: Any = forward, **options: Any) -> Any:
            if options.get("use_cache") and options["input_ids"].shape == (3, 5):
                prefilled.append((_name, 5))
            return _forward(*args, **options)

        monkeypatch.setattr(model, "forward", record)
    shallower.bench(models, prompt=5, batch=3, **SMALL)
    assert [name for name, _ in prefilled] == ["a", "b"] * 3  # two timed runs, and one for memory


def test_differences_within_the_spread_are_not_significant() -> None:
    first, same, twice = Spread(2.0, 1.8, 2.2, 4), Spread(1.9, 1.7, 1.8 + 1e-9, 4), Spread(1.0, 0.9, 1.7, 4)
    assert same.overlaps(first)
    assert first.overlaps(same)
    assert not twice.overlaps(first)
    assert (same.differs_from(first), twice.differs_from(first)) == (False, True)
    assert replace(twice, runs=3).differs_from(first) is None  # apart by chance in one of ten
    assert twice.faster_than(first) == pytest.approx(100.0)
    assert first.faster_than(twice) == pytest.approx(-50.0)


@pytest.mark.skipif(memory_source([CPU]) is None, reason="this system does not tell peaks")
def test_peak_memory_is_what_the_work_held_at_once() -> None:
    # in a process of its own, as others' threads and allocators may hold what was freed
    ran = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True)
    first, again, nothing = (int(word) for word in ran.stdout.split())
    assert first == pytest.approx(40 * 2**20, rel=0.15)
    assert again == pytest.approx(40 * 2**20, rel=0.15)  # what was left behind does not hide what this work takes
    assert nothing == pytest.approx(0, abs=2**20)


PEAKS = """
import torch
from shallower.timing.memory import peak_above

def work():
    for _ in range(3):
        torch.ones(40 * 2**20, dtype=torch.uint8).add_(1)

print(*(peak_above([torch.device("cpu")], done) for done in (work, work, lambda: None)))
"""


@pytest.mark.skipif(memory_source([CPU]) is None, reason="this system does not tell peaks")
def test_peak_holds_weights_and_cache() -> None:
    model = tiny_model("llama")
    [speed] = compare_speed({"": model}, prompt=200, generate=4, batch=64, warmup=1, repeats=1, memory=True).values()
    assert speed.working_bytes is not None
    assert speed.working_bytes > speed.kv_cache_bytes  # 20 MB of cache, and what a forward takes
    assert speed.peak_bytes == speed.parameter_bytes + speed.working_bytes


def test_peak_of_several_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    held, most = {first: 5, second: 7}, {first: 5, second: 7}

    def work() -> None:
        most.update({first: 25, second: 37})

    monkeypatch.setattr("torch.cuda.synchronize", lambda device: None)
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda device: most.update({device: held[device]}))
    monkeypatch.setattr("torch.cuda.memory_allocated", held.__getitem__)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", most.__getitem__)
    assert peak_above([first, second], work) == 20 + 30
    assert memory_source([first, second]) == "torch's CUDA allocator"
    assert memory_source([first, CPU]) is None  # neither source tells of both
    assert memory_source([first, torch.device("meta")]) is None


def test_no_peak_where_it_is_not_asked_for_or_cannot_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", blocks=1)
    [speed] = compare_speed({"": model}, prompt=4, generate=1, repeats=1).values()
    assert speed.working_bytes is None
    assert speed.peak_bytes is None
    monkeypatch.setattr("shallower.timing.memory._RESET", Path("/nowhere"))
    done: list[int] = []
    assert peak_above([CPU], lambda: done.append(1)) is None
    assert done == [1]
    found = shallower.bench([model], prompt=4, **SMALL)
    assert found.memory is None
    assert found.models[0].speeds[0].peak_bytes is None


def test_why_a_model_is_no_faster() -> None:
    dense, other = tiny_model("llama"), tiny_model("llama", seed=1)
    found = shallower.bench(
        {"dense": dense, "padded": padded(), "other": other, "cut": without("attn.0")}, prompt=4, **SMALL
    )
    told = dict(note.split(" ", 1) for note in found.notes)
    assert set(told) == {"padded:", "other"}
    assert told["padded:"].startswith("1 sublayer of 12 have a matrix of zeros")
    assert "runs as many sublayers as dense (6 attention, 6 MLP)" in told["other"]


def test_narrower_models_and_other_number_formats_are_no_puzzle() -> None:
    wide, half = tiny_model("llama"), tiny_model("llama").to(torch.bfloat16)
    config = copy.deepcopy(wide.config)
    config.intermediate_size //= 2
    narrow = type(wide)(config)
    found = shallower.bench({"wide": wide, "narrow": narrow, "half": half}, prompt=4, **SMALL)
    assert found.notes == ()
    assert found.dtype == "float32, bfloat16"
    assert found.setting.startswith("wide in float32, narrow in float32, half in bfloat16, cpu")
    assert [model["dtype"] for model in found.to_json()["models"]] == ["float32", "float32", "bfloat16"]


def test_a_head_that_dominates_is_named() -> None:
    small = tiny_model("llama", blocks=1)
    vocabulary = 2000
    small.resize_token_embeddings(vocabulary, mean_resizing=False)
    [note] = shallower.bench({"small": small}, prompt=4, **SMALL).notes
    assert note.startswith("small: ")
    assert "outside the blocks" in note


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": 0}, "prompt=0 is too small"),
        ({"batch": [1, -2]}, "batch=-2 is too small"),
        ({"batch": []}, "no batch size"),
        ({"prompt": [4, 255]}, "prompt=255 and generate=2 need 257 positions, but the model LlamaForCausalLM has 256"),
    ],
)
def test_sizes_are_refused_before_anything_is_timed(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shallower.verbs.bench.compare_speed", lambda *_, **__: pytest.fail("timed"))
    with pytest.raises(UserError, match=message):
        shallower.bench([tiny_model("llama", blocks=1)], **{**SMALL, **options})
    with pytest.raises(UserError, match="no model"):
        shallower.bench([])


def test_the_last_model_is_looked_for_before_the_first_is_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shallower.verbs.bench.open_subject", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ModelError, match="gone"):
        shallower.bench([folder / "dense", tmp_path / "gone"], **SMALL)
    with pytest.raises(UserError, match="unknown dtype 'fp16'"):
        shallower.bench([folder / "dense"], **{**SMALL, "dtype": "fp16"})


@pytest.mark.parametrize(
    ("together", "advised"), [(["smaller", "dense"], True), (["dense", "smaller"], False), (["dense"], False)]
)
def test_models_that_do_not_fit_together_are_to_be_timed_alone(
    together: list[str], advised: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_one(model: Path, *args: Any, **how: Any) -> Subject:
        if model.name == "dense":
            raise ModelTooLarge("the weights of dense do not fit into memory.")
        return open_subject(model, *args, **how)

    monkeypatch.setattr("shallower.verbs.bench.open_subject", open_one)
    with pytest.raises(ModelTooLarge, match="of dense do not fit") as told:
        shallower.bench([folder / name for name in together], **SMALL)
    assert ("All 2 models are held at once" in str(told.value)) == advised


# The command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    for name, blocks in (("dense", 4), ("smaller", 2)):
        tiny_model("llama", blocks=blocks).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    return folder


def run(*arguments: object) -> int:
    words = ["bench", *arguments, "--device", "cpu", "--dtype", "float32", "--quiet"]
    return main.run([str(word) for word in words])


def test_table_and_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    sizes = ("--prompt", "4,8", "--batch", 2, "--generate", 3, "--repeats", 2)
    assert run(folder / "dense", folder / "smaller", *sizes, "--out", out) == 0
    printed = capsys.readouterr().out
    for told in (
        "prompt 4, batch 2",
        "3 tokens decoded",
        "tokens/s",
        "−50.0 %",
        "float32, cpu",
        str(out),
    ):
        assert told in printed
    data = json.loads(out.read_text())
    assert data["format"] == "shallower.bench/1"
    assert [(model["model"], model["blocks"]) for model in data["models"]] == [("dense", 4), ("smaller", 2)]
    speed = data["models"][1]["speeds"][1]
    assert speed["decode_tokens_per_s"] == pytest.approx(3 * 2 / speed["decode_s"]["median"])
    assert speed["kv_cache_percent"] == -50
    assert speed["decode_s"]["runs"] == 2
    assert speed["decode_faster"]["significant"] is None
    assert "? marks all, as fewer than 4 runs say little" in " ".join(printed.split())
    assert data["models"][0]["speeds"][1]["kv_cache_bytes"] == 2 * speed["kv_cache_bytes"]
    assert run(folder / "dense", *sizes, "--out", out) == 2
    assert "exists" in capsys.readouterr().err


def test_one_model_twice(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder / "dense", folder / "dense", "--prompt", 4, "--generate", 1, "--repeats", 1, "--json") == 0
    names = [model["model"] for model in json.loads(capsys.readouterr().out)["models"]]
    assert len(set(names)) == 2


def test_one_model_need_not_stand_in_a_list(folder: Path) -> None:
    for one in (folder / "dense", str(folder / "dense"), tiny_model("llama"), open_subject(folder / "dense")):
        assert len(shallower.bench(one, prompt=4, **SMALL).models) == 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--prompt", "12,x"), "--prompt '12,x' cannot be read: write whole numbers"),
        (("--batch", "0"), "--batch '0' cannot be read"),
        (("--prompt", "1000"), "need 1032 positions, but the model dense has 256"),
        (("--generate", "0"), "generate"),
    ],
)
def test_mistakes(folder: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], complaint: str) -> None:
    assert run(folder / "dense", *arguments) == 2
    assert complaint in capsys.readouterr().err


def test_speeds_know_their_peak() -> None:
    spread = Spread(1.0, 1.0, 1.0, 4)
    assert Speed(spread, spread, 1, 100, 20, 1, 1, 1).peak_bytes == 120
