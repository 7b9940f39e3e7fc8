"""Training of a cut model against plain loops and formulas; resuming, divergence, and what is said of bad input."""

from __future__ import annotations

import copy
import errno
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from shallower.anatomy import Anatomy, dissect
from shallower.anatomy.writers import find_writers
from shallower.corpus import CalibrationSet
from shallower.corpus.calibration import tokens_digest
from shallower.corpus.instructions import InstructionSet, build_instructions
from shallower.engine.head import Head
from shallower.errors import CorpusError, ModelError, OutputError, UnknownName, UserError
from shallower.recovery import Repair
from shallower.registry import recovery
from shallower.surgery import cut
from shallower.surgery.patch import patches
from shallower.surgery.stations import cuts
from shallower.testing.conformance import sample_text
from shallower.testing.families import tiny_config, tiny_model, tiny_tokenizer
from shallower.training import loop, state, teacher
from shallower.training.adapters import adapt, merge, projections, quantise
from shallower.training.answers import answer_perplexity, split
from shallower.training.divergence import LossTrend
from shallower.training.feed import Feed, Portion
from shallower.training.head_loss import Guide, head_losses
from shallower.training.heal import block_of, own_parameters
from shallower.training.maps_at_cuts import UnitObjective, attach_maps
from shallower.training.objective import shared_blocks
from shallower.training.recipe import Recipe, Task
from shallower.units import parse_units

SMALL = {"batch": 96, "at_once": 48, "compute": "float32", "lr": 1e-3, "evaluations": 0}


def run(name: str, model: PreTrainedModel, text: CalibrationSet | None = None, **options: Any) -> PreTrainedModel:
    """Heal the model without block 2."""
    anatomy, removed = dissect(model), frozenset(parse_units(options.pop("remove", "block.2")))
    supplied = {
        "student": options.pop("student", None) or cut(anatomy, removed),
        "anatomy": anatomy,
        "removed": removed,
        "calibration": sample_text(model, sequences=40) if text is None else text,
        "held_out": options.pop("held_out", None),
        "folder": options.pop("folder", None),
        "seed": options.pop("seed", 0),
    }
    method = recovery.get(name)
    return method.function(**{key: supplied[key] for key in method.parameters}, **{**SMALL, **options})


def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.arange(3, 27)[None]
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def largest(model: PreTrainedModel) -> float:
    """In place of a perplexity."""
    return float(logits(model).abs().max())


# The losses and their gradients


@pytest.mark.parametrize("finish", [{}, {"scale": 0.5}, {"softcap": 3.0}])
@pytest.mark.parametrize(("distill", "temperature"), [(0.0, 1.0), (0.3, 1.0), (1.0, 2.0), (0.6, 0.7)])
@pytest.mark.parametrize("known", [True, False])  # else the rows are logits
def test_chunked_losses_are_what_autograd_finds_on_whole_logits(
    finish: dict[str, float], distill: float, temperature: float, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shallower.training.head_loss.ROW_CHUNK_BYTES", 4 * 50 * 7)  # chunks of 7 rows
    torch.manual_seed(0)
    width = 12 if known else 50
    own, dense = (nn.Linear(12, 50) if known else nn.Identity() for _ in range(2))
    rows, dense_rows = torch.randn(30, width, requires_grad=True), torch.randn(30, width)
    learning = [rows, *own.parameters()]
    targets = torch.randint(0, 50, (30,))
    guide = Guide(dense_rows, Head(dense, **finish)) if distill else None
    found = head_losses(rows, targets, Head(own, **finish), guide, distill, temperature)
    (3 * found.total).backward()
    gradients = [each.grad for each in learning]

    def plain(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
        raw: torch.Tensor = module(inputs) * finish.get("scale", 1.0)
        return torch.tanh(raw / finish["softcap"]) * finish["softcap"] if "softcap" in finish else raw

    for each in learning:
        each.grad = None
    nll = nn.functional.cross_entropy(plain(own, rows), targets, reduction="sum")
    with torch.no_grad():
        aim = torch.softmax(plain(dense, dense_rows) / temperature, -1)
    mine = torch.log_softmax(plain(own, rows) / temperature, -1)
    kl = (aim * (aim.log() - mine)).sum()
    total = (1 - distill) * nll + distill * temperature**2 * kl
    (3 * total).backward()
    torch.testing.assert_close(found.total, total, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.nll, nll, rtol=1e-5, atol=1e-5)
    if distill:
        torch.testing.assert_close(found.kl, kl, rtol=1e-4, atol=1e-5)
    for one, each in zip(gradients, learning, strict=True):
        torch.testing.assert_close(one, each.grad, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kept", [5, 50])
def test_the_most_probable_words_and_the_rest_as_one_word(kept: int) -> None:
    torch.manual_seed(1)
    own, dense = nn.Linear(12, 50, bias=False), torch.log_softmax(2 * torch.randn(20, 50), -1)
    rows = torch.randn(20, 12, requires_grad=True)
    top = dense.topk(kept)
    guide = Guide(log_probabilities=top.values, words=top.indices.int())
    found = head_losses(rows, torch.zeros(20, dtype=torch.int64), Head(own), guide, 1.0, 1.0)
    found.total.backward()
    gradient, rows.grad = rows.grad, None
    mine, aim = torch.log_softmax(own(rows), -1).exp(), dense.exp()
    inside = torch.zeros(20, 50, dtype=torch.bool).scatter(1, top.indices, True)
    kl = (aim * (aim / mine).log())[inside].sum()
    if kept < 50:
        out = ~inside
        rest, left = (aim * out).sum(1), (mine * out).sum(1)
        kl = kl + (rest * (rest / left).log()).sum()
    kl.backward()
    torch.testing.assert_close(found.kl, kl, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(gradient, rows.grad, rtol=1e-3, atol=1e-4)


# The loop


class _Plain(torch.optim.SGD):
    """In place of AdamW, so that what was learned is the sum of gradients."""

    def __init__(self, groups: Any, betas: Any, fused: bool) -> None:
        super().__init__([{**group, "lr": 0.0, "weight_decay": 0.0} for group in groups])


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])  # gemma2 caps its logits, gpt2 has Conv1D and biases
@pytest.mark.parametrize("at_once", [24, 96])
def test_a_step_is_one_of_a_plain_loop_however_it_is_split(
    family: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.optim, "AdamW", _Plain)
    model = tiny_model(family)
    text = sample_text(model, sequences=12)  # with padding
    anatomy = dissect(model)
    student, expected = (cut(anatomy, parse_units("block.2")) for _ in range(2))
    own_parameters(expected, lambda name: True)
    for module in (*student.modules(), *expected.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    weights = list(expected.parameters())
    feed = Feed(text, 96, 96, seed=0)
    mask = torch.ones_like(text.input_ids) if text.attention_mask is None else text.attention_mask
    for number in range(3):
        rows = list(feed.step(number))
        labels = text.input_ids[rows].masked_fill(mask[rows] == 0, -100)
        out = expected(input_ids=text.input_ids[rows], attention_mask=mask[rows], use_cache=False).logits
        nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        with torch.no_grad():
            for weight in weights:
                assert weight.grad is not None
                weight -= 0.3 * loop.rate((number + 0.5) / 3, 0.05) * weight.grad
                weight.grad = None
    healed = recovery.get("full").function(
        student,
        anatomy,
        frozenset(parse_units("block.2")),
        text,
        None,
        None,
        0,
        **{**SMALL, "lr": 0.3, "at_once": at_once, "embeddings": True},
    )
    for one, other in zip(healed.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_rate_rises_in_a_line_and_falls_along_a_cosine() -> None:
    assert [loop.rate(share, 0.1) for share in (0.0, 0.05, 0.1, 0.55, 1.0)] == pytest.approx([0, 0.5, 1, 0.5, 0])


KILLED = """
import os, signal
from shallower.training import state
import test_training
write, writes = state._write, [0]
def dies(path, tensors):
    writes[0] += 1
    if writes[0] == {at}:
        path.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, tensors)
state._write = dies
from shallower.testing.families import tiny_model
test_training.run({name!r}, tiny_model("llama"), folder={folder!r}, **{options!r})
"""


@pytest.mark.parametrize(("name", "killed"), [("full", True), ("lora", False)])
def test_after_a_kill_training_goes_on_as_if_nothing_had_happened(
    name: str, killed: bool, tmp_path: Path, notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"save_minutes": 0.0, "epochs": 1.5, "distill": 0.5}
    expected = run(name, tiny_model("llama"), **options)
    at = 2 + 2 * 6  # weights are kept at the start, and each step writes two files: this is the first of the seventh
    if killed:
        program = KILLED.format(at=at, name=name, folder=str(tmp_path / "run"), options=options)
        path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        ran = subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
        )
        assert ran.returncode == -signal.SIGKILL, ran.stderr
    else:
        with monkeypatch.context() as patch:
            patch.setattr(state, "_write", _interrupted(state._write, at))
            with pytest.raises(KeyboardInterrupt):
                run(name, tiny_model("llama"), folder=tmp_path / "run", **options)
    states = [path.name for path in (tmp_path / "run").glob("state-*")]
    assert states == ["state-00000006"]
    resumed = run(name, tiny_model("llama"), folder=tmp_path / "run", **options)
    assert any("resumed after step 6" in note for note in notes)
    for one, other in zip(resumed.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"training.json", "good.safetensors"}
    told = json.loads((tmp_path / "run" / "training.json").read_text())
    text = sample_text(tiny_model("llama"), sequences=40)
    feed = Feed(text, 96, 96, seed=0)
    assert text.attention_mask is not None
    read = [int(text.attention_mask[list(feed.step(number))].sum()) for number in range(15)]
    assert (told["step"], told["tokens"]) == (15, sum(read))


@pytest.mark.parametrize("name", ["full", "lora"])
def test_a_training_at_its_end_is_not_done_again(name: str, tmp_path: Path, notes: list[str]) -> None:
    first = run(name, tiny_model("llama"), folder=tmp_path)
    again = run(name, tiny_model("llama"), folder=tmp_path)
    assert any("trained already, for 10 steps" in note for note in notes)
    for one, other in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    notes.clear()
    other_start = cut(dissect(tiny_model("llama", seed=1)), parse_units("block.2"))
    run(name, tiny_model("llama"), folder=tmp_path, student=other_start)  # of another student it is another training
    assert not any("already" in note for note in notes)


def test_a_training_whose_folder_another_one_took_is_done_again(
    tmp_path: Path, notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run("full", tiny_model("llama"), folder=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(loop._Loop, "_step", _stop)
        with pytest.raises(KeyboardInterrupt):  # it has kept the weights that it began with
            run("full", tiny_model("llama"), folder=tmp_path, lr=2e-3)
    notes.clear()
    again = run("full", tiny_model("llama"), folder=tmp_path)
    assert not any("already" in note for note in notes)
    for one, other in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_resumed_training_computes_as_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        monkeypatch.setattr(loop, "choose_dtype", lambda device, dtype=dtype: dtype)
        run("full", tiny_model("llama"), folder=tmp_path, compute="auto")
        assert json.loads((tmp_path / "training.json").read_text())["settings"]["options"]["compute"] == "bfloat16"


class _Rare(nn.Module):
    """Has a weight that not every step uses, as that of an expert which no token meets."""

    def __init__(self, student: PreTrainedModel) -> None:
        super().__init__()
        self.student = student
        self.rare, self.often = (nn.Parameter(torch.ones(4, 4)) for _ in range(2))

    def forward(self, portion: Portion, guide: Guide | None) -> tuple[torch.Tensor, ...]:
        used = [self.often, self.rare] if portion.rows[0] % 3 == 0 else [self.often]
        total = torch.stack([(each - 0.5).square().sum() for each in used]).sum() * portion.scored.sum()
        return total, total.detach(), total.detach() * 0


def test_weights_that_some_steps_do_not_use_resume_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    anatomy, removed = dissect(model), frozenset(parse_units("block.2"))
    recipe = Recipe(batch=24, at_once=24, compute="float32", lr=1e-2, evaluations=0, save_minutes=0.0)

    def learned(folder: Path | None) -> list[torch.Tensor]:
        student = cut(anatomy, removed)
        own_parameters(student)
        objective = _Rare(student)
        task = Task(anatomy, removed, sample_text(model, sequences=40), None, folder, 0, recipe)
        loop.train(objective, student, task, None)
        return [objective.rare, objective.often]

    expected = learned(None)
    with monkeypatch.context() as patch:
        patch.setattr(state, "_write", _interrupted(state._write, 1 + 2 * 20))
        with pytest.raises(KeyboardInterrupt):
            learned(tmp_path)
    for one, other in zip(learned(tmp_path), expected, strict=True):
        assert torch.equal(one, other)


def test_norms_and_biases_do_not_decay_nor_do_those_of_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[Any] = []

    class Seen(torch.optim.AdamW):
        def __init__(self, given: Any, **settings: Any) -> None:
            groups.extend(given)
            assert settings["betas"] == (0.9, 0.95)
            super().__init__(given, **settings)

    monkeypatch.setattr(torch.optim, "AdamW", Seen)
    healed = run("full", tiny_model("gpt_oss"), epochs=0.1)
    decaying = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    biases = [parameter for name, parameter in healed.named_parameters() if name.endswith("bias")]
    assert any(parameter.ndim == 2 for parameter in biases)
    assert not any(id(parameter) in decaying for parameter in biases)
    assert any(id(parameter) in decaying for parameter in healed.parameters())
    assert not any(parameter.ndim == 1 and id(parameter) in decaying for parameter in healed.parameters())


def test_what_the_launch_says_of_mixed_precision_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    rounded: list[bool] = []

    def held_out(model: PreTrainedModel) -> float:
        rounded.append(torch.is_autocast_enabled("cpu"))
        return largest(model)

    run("full", tiny_model("llama"), held_out=held_out)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert rounded == [False, False]


def test_what_the_environment_says_of_gradients_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = logits(run("full", tiny_model("llama"), clip=1e-3))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4096")
    assert torch.equal(logits(run("full", tiny_model("llama"), clip=1e-3)), expected)


def test_weights_that_are_no_numbers_are_not_trained(tmp_path: Path) -> None:
    model = tiny_model("llama")
    next(model.model.layers[1].mlp.parameters()).data[0, 0] = math.nan
    for folder in (None, tmp_path):
        with pytest.raises(ModelError, match="are no finite numbers, so nothing can be learned with them"):
            run("full", model, folder=folder)


def test_parameters_without_gradients_resume_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"remove": "attn.2,mlp.4", "save_minutes": 0.0}
    expected = run("full", tiny_model("bloom"), **options)
    with monkeypatch.context() as patch:
        patch.setattr(state, "_write", _interrupted(state._write, 1 + 2 * 6))
        with pytest.raises(KeyboardInterrupt):
            run("full", tiny_model("bloom"), folder=tmp_path, **options)
    resumed = run("full", tiny_model("bloom"), folder=tmp_path, **options)
    for one, other in zip(resumed.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)


def _interrupted(write: Callable[..., None], at: int) -> Callable[..., None]:
    calls = []

    def interrupted(*given: Any) -> None:
        calls.append(given)
        if len(calls) == at:
            raise KeyboardInterrupt
        write(*given)

    return interrupted


SHARDING = """
import json
import os
import sys
import sysconfig
import test_training
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import save_file
from shallower.testing.families import tiny_model
from shallower.training import loop


class Sharding(loop.Accelerator):  # accelerate itself shards on accelerators only
    def __init__(self, **given):
        super().__init__(**given)
        self.state.distributed_type = DistributedType.FSDP
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        assert self.is_fsdp2


if "ACCELERATE_USE_FSDP" in os.environ:
    loop.Accelerator = Sharding
"""

SPREAD = f"""{SHARDING}
model = tiny_model("llama")
options = {{"epochs": 0.5, "distill": 0.5, "first": 2}}
healed = test_training.run("full", model, folder=sys.argv[1] + "/state", **options)
own = dict(model.named_parameters())
for name, parameter in healed.named_parameters():  # what was not trained are the tensors that there were
    untouched = any(part in name for part in ("embed", "lm_head", "layers.0.", "layers.1."))
    assert (parameter.data_ptr() == own[name].data_ptr()) == untouched, name
healed = test_training.run("lora", model, student=healed, dropout=0.0, **options)
weights = {{name: p.detach().clone() for name, p in healed.named_parameters()}}
save_file(weights, f"{{sys.argv[1]}}/{{os.environ['RANK']}}.safetensors")
"""


# what `accelerate launch --use_fsdp --fsdp_version 2` sets
SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}


@pytest.mark.parametrize("sharded", [{}, SHARDED], ids=["whole", "spread"])
def test_weights_that_processes_share_or_spread_learn_as_those_of_one(
    sharded: dict[str, str], tmp_path: Path, start_together: Any
) -> None:
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    ended = start_together("-c", SPREAD, str(tmp_path), PYTHONPATH=path, **sharded)
    assert [code for code, _, _ in ended] == [0, 0], ended
    options = {"epochs": 0.5, "distill": 0.5, "first": 2}
    expected = run("full", tiny_model("llama"), **options)
    expected = run("lora", tiny_model("llama"), student=expected, dropout=0.0, **options)
    for rank in "01":
        weights = load_file(tmp_path / f"{rank}.safetensors")
        for name, parameter in expected.named_parameters():
            torch.testing.assert_close(weights[name], parameter, rtol=1e-4, atol=1e-5)


TOGETHER = f"""{SHARDING}
folder, cases = sys.argv[1], json.loads(sys.argv[2])
for number, (name, family, measured, options) in enumerate(cases):
    held_out = test_training.largest if measured else None
    healed = test_training.run(name, tiny_model(family), held_out=held_out, **options)
    weights = {{key: p.detach().clone() for key, p in healed.named_parameters(remove_duplicate=False)}}
    save_file(weights, f"{{folder}}/{{number}}-{{os.environ['RANK']}}.safetensors")
"""

# method, family, whether something is measured on the way, options
Case = tuple[str, str, bool, dict[str, Any]]
UNUSED: list[Case] = [  # norms of missing halves, and biases by which experts are only chosen
    ("full", "bloom", False, {"remove": "attn.2,mlp.4", "epochs": 0.5}),
    ("full", "ernie4_5_moe", False, {"epochs": 0.5}),
]
UNEVEN: list[Case] = [  # a tied embedding that learns, buffers that are saved, maps; measured before the first step
    ("full", "llama_bias", True, {"embeddings": True, "hidden": 0.5, "epochs": 0.5}),
    ("full", "deepseek_v3", False, {"epochs": 0.5}),
    ("low-rank-trained", "llama", False, {"epochs": 0.5}),
]


@pytest.mark.parametrize(("cases", "sharded"), [(UNUSED, {}), (UNEVEN, SHARDED)], ids=["whole", "spread"])
def test_processes_train_what_is_not_plain(
    cases: list[Case], sharded: dict[str, str], tmp_path: Path, start_together: Any
) -> None:
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    ended = start_together("-c", TOGETHER, str(tmp_path), json.dumps(cases), PYTHONPATH=path, **sharded)
    assert [code for code, _, _ in ended] == [0, 0], ended
    for number, (name, family, measured, options) in enumerate(cases):
        expected = run(name, tiny_model(family), held_out=largest if measured else None, **options)
        weights = load_file(tmp_path / f"{number}-0.safetensors")
        for key, parameter in expected.named_parameters(remove_duplicate=False):
            if key.endswith("query_key_value.bias"):  # that of the keys changes nothing, and Adam moves it by rounding
                continue
            torch.testing.assert_close(weights[key], parameter, rtol=1e-4, atol=1e-5, msg=f"{family} {key}")


APART = """
import os
import sys
import test_training
from shallower.testing.families import tiny_model

test_training.run("full", tiny_model("llama"), folder=f"{sys.argv[1]}/{os.environ['RANK']}", epochs=0.5)
"""


def test_processes_that_share_no_disk_are_refused_before_the_first_step(tmp_path: Path, start_together: Any) -> None:
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    for code, _, said in start_together("-c", APART, str(tmp_path), PYTHONPATH=path):
        assert code == 1
        assert "OutputError: only 1 of 2 processes see what the first one writes in" in said
    assert not [each for each in tmp_path.rglob("*") if each.is_file()]


def test_a_student_that_was_spread_comes_back_to_its_device() -> None:
    student = cut(dissect(tiny_model("llama")), parse_units("block.2"))
    student.model.embed_tokens.weight.requires_grad_(False)  # what is not trained is not spread
    plain = loop._untrained(student)
    assert {parameter.device.type for parameter in plain.parameters()} == {"cpu", "meta"}
    filled = loop._filled(plain, student, torch.device("cpu"))
    for one, other in zip(filled.parameters(), student.parameters(), strict=True):
        assert torch.equal(one, other)
    elsewhere = loop._filled(loop._untrained(student), student, torch.device("meta"))
    assert {parameter.device.type for parameter in elsewhere.parameters()} == {"meta"}
    student.model.lock = threading.Lock()
    with pytest.raises(ModelError, match="cannot be copied"):
        loop._untrained(student)


class _Elsewhere(loop.Accelerator):
    """Of a process whose devices accelerate counts from another one than the model is on."""

    @property
    def device(self) -> torch.device:
        return torch.device("meta")


def test_a_model_is_trained_on_the_device_that_it_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run("full", tiny_model("llama"), held_out=largest)
    monkeypatch.setattr(loop, "Accelerator", _Elsewhere)
    found = run("full", tiny_model("llama"), held_out=largest)
    for one, other in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)


def test_another_training_in_the_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop._Loop, "_end", _stop)
    with pytest.raises(KeyboardInterrupt):
        run("full", tiny_model("llama"), folder=tmp_path, save_minutes=0.0, lr=1e-3)
    with pytest.raises(UserError, match=r"unfinished training of another kind .lr 0.001 instead of 0.002"):
        run("full", tiny_model("llama"), folder=tmp_path, save_minutes=0.0, lr=2e-3)


def _stop(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("held_out", [None, largest])
def test_a_training_that_diverges_goes_back_to_what_was_good(
    held_out: Callable[[PreTrainedModel], float] | None, notes: list[str], tmp_path: Path
) -> None:
    model = tiny_model("llama")
    anatomy = dissect(model)
    start = [parameter.clone() for parameter in cut(anatomy, parse_units("block.2")).parameters()]
    healed = run("full", model, lr=100.0, warmup=0.0, epochs=5.0, held_out=held_out, folder=tmp_path)
    [note] = [note for note in notes if "diverged" in note]
    assert re.search(r"stopped early: it diverged: at step \d+ .* the weights of step 0 are kept", note)
    assert json.loads((tmp_path / "training.json").read_text())["stopped"].startswith("it diverged")
    for one, other in zip(healed.parameters(), start, strict=True):
        assert torch.equal(one, other)


def _stops(losses: Iterable[float]) -> int | None:
    """The step at which a training with these losses is given up."""
    seen = LossTrend()
    for number, loss in enumerate(losses, 1):
        seen = seen.after(loss)
        if seen.spoiled:
            return number
    return None


def _mixed(generator: random.Random, sequences: int, steps: int) -> list[float]:
    """Losses of steps on text of two kinds, half at 1.0 nats and half at 2.8."""
    draws = [[generator.gauss(generator.choice((1.0, 2.8)), 0.35) for _ in range(sequences)] for _ in range(steps)]
    return [sum(each) / sequences for each in draws]


@pytest.mark.parametrize("sequences", [1, 2, 4])
def test_text_of_two_kinds_is_no_divergence(sequences: int) -> None:
    runs = [_stops(_mixed(random.Random(seed), sequences, 2048 // sequences)) for seed in range(60)]
    assert runs == [None] * 60


def test_short_answers_are_no_divergence() -> None:
    runs = [_stops(random.Random(seed).expovariate(1 / 1.9) for _ in range(1000)) for seed in range(20)]
    assert runs == [None] * 20


@pytest.mark.parametrize("begun", [3, 15, 60, 500])
@pytest.mark.parametrize(("level", "deviation"), [(8.0, 0.3), (25.0, 10.0)])
def test_divergence_is_seen_within_some_steps(begun: int, level: float, deviation: float) -> None:
    for seed in range(20):
        generator = random.Random(seed)
        losses = _mixed(generator, 2, begun) + [abs(generator.gauss(level, deviation)) for _ in range(60)]
        found = _stops(losses)
        assert found is not None
        assert begun < found <= begun + 50, seed


def test_without_held_out_text_spoiled_weights_are_not_kept(notes: list[str]) -> None:
    run("full", tiny_model("llama"), lr=100.0, warmup=0.0, epochs=5.0, evaluations=25)
    [note] = [note for note in notes if "diverged" in note]
    assert "the weights of step 0 are kept" in note


def test_a_perplexity_that_is_not_a_number_is_not_the_best(notes: list[str]) -> None:
    found = iter([50.0, float("nan"), 60.0])
    run("full", tiny_model("llama"), held_out=lambda model: next(found), evaluations=2)
    assert any("the weights of step 0 are kept" in note for note in notes)


def test_a_gradient_that_is_not_a_number_stops_before_the_weights_are_spoiled(
    monkeypatch: pytest.MonkeyPatch, notes: list[str]
) -> None:
    calls: list[float] = []
    step = loop._Loop._step

    def poisoned(self: Any, share: float) -> str:
        calls.append(share)
        if len(calls) == 4:
            with torch.no_grad():
                next(iter(self.trained.values())).fill_(torch.nan)
        return step(self, share)

    monkeypatch.setattr(loop._Loop, "_step", poisoned)
    healed = run("full", tiny_model("llama"), evaluations=10)
    assert any("at step 4 the loss was nan" in note and "the weights of step 3 are kept" in note for note in notes)
    assert all(bool(parameter.isfinite().all()) for parameter in healed.parameters())


def test_the_best_weights_are_kept_and_patience_ends_it(notes: list[str]) -> None:
    perplexities = iter([50.0, 40.0, 30.0, 31.0, 32.0, 29.0])
    seen: list[list[torch.Tensor]] = []

    def held_out(model: PreTrainedModel) -> float:
        assert not model.training
        seen.append([parameter.detach().clone() for parameter in model.parameters()])
        return next(perplexities)

    healed = run("full", tiny_model("llama"), held_out=held_out, evaluations=10, patience=2)
    assert len(seen) == 5
    assert any("2 measurements in a row brought nothing better" in note for note in notes)
    for one, best in zip(healed.parameters(), seen[2], strict=True):
        assert torch.equal(one, best)
    assert any(not torch.equal(one, last) for one, last in zip(healed.parameters(), seen[4], strict=True))


def test_a_time_limit_ends_it_at_rate_zero(monkeypatch: pytest.MonkeyPatch, notes: list[str]) -> None:
    clock = iter(range(10**6))
    shares: list[float] = []
    rate = loop.rate
    monkeypatch.setattr(loop.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(loop, "rate", lambda share, warmup: rate(shares.append(share) or share, warmup))
    run("full", tiny_model("llama"), epochs=1000.0, minutes=1.0)
    assert shares == sorted(shares)
    assert 0.8 < shares[-1] <= 1
    [note] = [note for note in notes if "trained for" in note]
    found = re.search(r"for (\d+) steps.* the weights of step (\d+) are kept", note)
    assert found is not None
    assert 3 <= int(found[1]) <= 30
    assert found[1] == found[2]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("full", {}),
        ("lora", {}),
        ("qlora", {}),
        ("low-rank-trained", {"by": "nll"}),
        ("low-rank-trained", {"by": "kl"}),
    ],
)
def test_it_learns_and_the_dense_model_stays_as_it_is(name: str, options: dict[str, Any]) -> None:
    if name == "qlora":
        pytest.importorskip("bitsandbytes")
    model = tiny_model("llama")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    text = CalibrationSet("one", torch.arange(3, 27).repeat(40, 1), None)
    by_teacher = options.get("by") == "kl"
    losses = []
    for lr in (1e-9, 1e-2):  # the first does all but learn: rounds, puts in maps or adapters, and takes steps
        healed = run(name, model, text, epochs=3.0, lr=lr, **options)
        ids = text.input_ids[:1]
        with torch.no_grad():
            teacher = model(input_ids=ids).logits.log_softmax(-1)
            found = healed(input_ids=ids, labels=ids)
            away = nn.functional.kl_div(found.logits.log_softmax(-1), teacher, log_target=True, reduction="batchmean")
        losses.append(float(away if by_teacher else found.loss))
        assert not healed.training
        assert all(parameter.requires_grad for parameter in healed.parameters())
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[key]), key
        assert all(parameter.requires_grad for parameter in model.parameters())
    assert losses[1] < 0.8 * losses[0]


def test_blocks_before_the_first_and_embeddings_stay() -> None:
    model = tiny_model("llama")
    healed = run("full", model, first=2)
    start = cut(dissect(model), parse_units("block.2")).state_dict()
    changed = {
        name.split(".")[2] for name, tensor in healed.state_dict().items() if not torch.equal(tensor, start[name])
    }
    changed.discard("weight")  # the final norm
    assert changed == {"2", "3", "4"}


def test_embeddings_that_are_experts_learn() -> None:
    config = tiny_config("doge")
    config.is_moe, config.num_experts, config.num_experts_per_tok = True, 4, 2
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    start = {name: p.detach().clone() for name, p in cut(dissect(model), parse_units("block.2")).named_parameters()}
    same = [name for name, p in run("full", model).named_parameters() if torch.equal(p, start[name])]
    assert [name for name in same if "embed" in name] == ["model.embed_tokens.weight"]


def test_recomputing_activations_changes_nothing() -> None:
    model = tiny_model("llama")
    healed, counted = {}, {}
    for again in (False, True):
        student = cut(dissect(model), parse_units("block.2"))
        ran = counted[again] = {0: 0, 3: 0}
        for place in ran:

            def count(*_: Any, ran: dict[int, int] = ran, place: int = place) -> None:
                ran[place] += torch.is_grad_enabled()

            student.model.layers[place].mlp.register_forward_pre_hook(count)
        healed[again] = run("full", model, student=student, first=1, recompute=again)
        assert not student.model.embed_tokens._forward_hooks
    assert counted[True] == {0: counted[False][0], 3: 2 * counted[False][3]}  # block 0 is not trained
    assert counted[False][3]
    for one, other in zip(healed[False].parameters(), healed[True].parameters(), strict=True):
        torch.testing.assert_close(one, other)


def learn_the_same() -> None:
    """Compiled blocks and another attention; also a teacher's student, whose first blocks are the teacher's."""
    ways = ({}, {"attention": "eager"}, {"compile": True, "attention": "eager", "recompute": True})
    for options in ({"distill": 0.0}, {"distill": 0.5, "first": 1}):
        plain, *others = (run("full", tiny_model("llama"), **options, **way) for way in ways)
        for other in others:
            assert other.config._attn_implementation == "sdpa"
            assert not any("forward" in module.__dict__ for module in other.modules())
            for one, same in zip(plain.parameters(), other.parameters(), strict=True):
                torch.testing.assert_close(one, same, atol=2e-4, rtol=1e-3)


@pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++")))
    or not Path(sysconfig.get_path("include"), "Python.h").is_file(),
    reason="torch.compile needs a C++ compiler and Python's headers",
)
def test_compiled_blocks_and_another_attention_learn_the_same() -> None:
    """In a process of its own: torch's compiler fails where something else imported distutils before setuptools."""
    code = "import test_training; test_training.learn_the_same()"
    ran = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_what_is_compiled_computes_only_where_gradients_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def fake(function: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            ran.append(torch.is_grad_enabled())
            return function(*args, **kwargs)

        return forward

    monkeypatch.setattr(torch, "compile", fake)
    run("full", tiny_model("llama"), compile=True, held_out=largest, evaluations=1)
    assert ran
    assert all(ran)


def test_a_compiler_that_fails_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            raise torch._dynamo.exc.BackendCompilerFailed(broken, RuntimeError("no g++"), None)

        return forward

    monkeypatch.setattr(torch, "compile", broken)
    model = tiny_model("llama")
    with pytest.raises(ModelError, match=r"compile=true: torch.compile cannot .*leave it out.* C\+\+ compiler"):
        run("full", model, compile=True)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_an_attention_that_there_is_not_is_refused() -> None:
    for name in ("flash", "flex_attention"):
        model = tiny_model("llama")
        with pytest.raises(UserError, match=rf"attention={name} is no way in which LlamaForCausalLM can .*own is sdpa"):
            run("full", model, attention=name)
        assert model.config._attn_implementation == "sdpa"
    with pytest.raises(UserError, match=r"attention=eager is no way in which FalconForCausalLM can .*own is sdpa"):
        run("full", tiny_model("falcon"), attention="eager")


def test_bfloat16_students_stay_bfloat16_and_learn_small_steps() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    healed = run("full", model, compute="bfloat16", lr=1e-5, epochs=3.0, embeddings=True)
    assert {parameter.dtype for parameter in healed.parameters()} == {torch.bfloat16}
    start = cut(dissect(model), parse_units("block.2"))
    # half the distance between two of these numbers is six steps: one step alone would be rounded away
    pairs = zip(healed.parameters(), start.parameters(), strict=True)
    assert any(bool((a != b)[b.abs() > 0.02].any()) for a, b in pairs)


# Adapters


def _moved(student: PreTrainedModel) -> None:
    """Adapters start as zero; give them something to merge."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "qwen3_moe", "deepseek_v3", "llama4", "falcon_h1"])
def test_merged_adapters_are_what_they_were_beside_the_weights(family: str) -> None:
    model = tiny_model(family)
    dense = logits(model)
    student = cut(dissect(model), parse_units("block.2"))
    start, names = logits(student), set(student.state_dict())
    own_parameters(student)
    adapt(student, projections(student), rank=4, alpha=8.0, dropout=0.3, seed=0)
    _moved(student)
    beside = logits(student.eval())
    merge(student)
    torch.testing.assert_close(logits(student), beside, rtol=1e-4, atol=1e-4)
    assert float((beside - start).abs().max()) > 0.01
    assert set(student.state_dict()) == names
    assert torch.equal(logits(model), dense)


def test_experts_that_are_one_tensor_are_left_out_and_named(notes: list[str]) -> None:
    assert not any("experts" in name for name in projections(cut(dissect(tiny_model("mixtral")), ())))
    assert notes == ["experts that are one tensor have no adapters, and stay as they are: full trains them"]


@pytest.mark.parametrize(
    ("family", "left_out"),
    [
        ("jetmoe", "router.layer"),
        ("dbrx", "ffn.router.layer"),
        ("afmoe", "mlp.router.gate"),
        ("hunyuan_v1_moe", "mlp.gate.wg"),
        ("falcon_h1", "mamba.out_proj"),
        ("jamba", "mamba.out_proj"),
        ("jamba", "mamba.x_proj"),
        ("mamba", "mixer.dt_proj"),
    ],
)
def test_routers_and_what_is_read_past_the_product_have_no_adapters(family: str, left_out: str) -> None:
    student = cut(dissect(tiny_model(family)), ())
    assert any(name.endswith(left_out) for name, _ in student.named_modules())
    assert not any(name.endswith(left_out) for name in projections(student))


def test_what_is_gated_has_adapters() -> None:
    names = projections(cut(dissect(tiny_model("qwen3_next")), ()))  # their module is a GatedDeltaNet
    assert any(name.endswith("linear_attn.in_proj_qkvz") for name in names)
    assert any(name.endswith("linear_attn.out_proj") for name in names)


def test_adapters_go_on_every_linear_map_of_the_blocks_and_nowhere_else() -> None:
    student = cut(dissect(tiny_model("llama")), parse_units("block.2"))
    maps = [name for name, module in student.named_modules() if isinstance(module, nn.Linear)]
    assert sorted(projections(student)) == sorted(name for name in maps if name != "lm_head")
    assert {name.split(".")[2] for name in projections(student, 3)} == {"3", "4"}


@pytest.mark.parametrize("family", ["llama", "gpt2", "olmoe"])
def test_adapters_go_on_one_kind_of_sublayer(family: str) -> None:
    student = cut(dissect(tiny_model(family)), parse_units("block.2"))
    attn, mlp = projections(student, 0, "attn"), projections(student, 0, "mlp") if family != "olmoe" else []
    assert attn
    assert sorted([*attn, *mlp]) == sorted(projections(student))
    assert all("attn" in name for name in attn)
    assert not any("attn" in name for name in mlp)
    if family == "olmoe":
        with pytest.raises(ModelError, match=r"no linear maps .* \(maps=mlp;"):
            projections(student, 0, "mlp")


def test_four_bits_train_on_a_processor_and_merge_into_what_they_stand_for(recwarn: pytest.WarningsRecorder) -> None:
    pytest.importorskip("bitsandbytes")
    model = tiny_model("llama")
    dense = logits(model)
    student = cut(dissect(model), parse_units("block.2"))
    start = logits(student)
    own_parameters(student)
    names = projections(student)
    weights = {name: student.get_submodule(name).weight.detach().clone() for name in names}
    for name in names:
        student.get_submodule(name).weight = nn.Parameter(weights[name], requires_grad=False)
    held = [weakref.ref(student.get_submodule(name).weight) for name in names]
    plain = quantise(student, names)
    assert not any(reference() is not None for reference in held)  # no weights of full precision are kept
    assert float((logits(student) - start).abs().max()) > 0
    adapt(student, names, rank=4, alpha=8.0, dropout=0.0, seed=0)
    _moved(student)
    beside = logits(student.eval())
    merge(student, plain)
    torch.testing.assert_close(logits(student), beside, rtol=1e-3, atol=1e-3)
    assert {type(student.get_submodule(name)) for name in names} == {nn.Linear}
    healed = run("qlora", model, lr=1e-2)
    assert {parameter.dtype for parameter in healed.parameters()} == {torch.float32}
    assert torch.equal(logits(model), dense)


# Patches at cuts


@pytest.mark.parametrize(
    ("family", "removed", "where"),
    [
        ("llama", "block.0,attn.2,mlp.4,block.5", ["0.entry_patch", "0.exit_patch", "3.exit_patch"]),
        ("llama", "mlp.2,attn.3", ["2.self_attn.middle_patch"]),
        ("gpt_neox", "attn.2", ["2.exit_patch"]),  # its halves read the same stream, so a map stands behind both
    ],
)
def test_patches_stand_where_units_are_missing(family: str, removed: str, where: list[str]) -> None:
    anatomy, units = dissect(tiny_model(family)), frozenset(parse_units(removed))
    student = cut(anatomy, units)
    places = cuts(dissect(student), anatomy, units, find_writers(anatomy))
    attach_maps(student, places, rank=1, seed=0)
    found = [name.rpartition("layers.")[2].rpartition(".")[0] for name, _ in patches(student)]
    assert sorted(found) == where


def test_a_patch_that_does_nothing_has_an_error_of_one_and_learns_a_constant() -> None:
    model = tiny_model("llama")
    anatomy, removed = dissect(model), frozenset(parse_units("attn.1,block.3"))
    student = cut(anatomy, removed)
    own_parameters(student)
    places = cuts(dissect(student), anatomy, removed, find_writers(anatomy))
    start = logits(student)
    made = attach_maps(student, places, rank=3, seed=0)
    assert torch.equal(logits(student), start)
    text = sample_text(model, sequences=6)
    feed = Feed(text, 144, 144, seed=0)
    rows = tuple(range(6))
    objective = UnitObjective(anatomy, places, made)
    total = objective(feed.portion(rows), None)[0].detach()
    assert float(total) == pytest.approx(feed.scored(rows), rel=1e-5)
    for by in ("mse", "kl", "nll"):
        healed = run("low-rank-trained", model, text, remove="attn.1,block.3", by=by, lr=1e-2, epochs=20.0, batch=48)
        learned = [module for module in healed.modules() if type(module).__name__ == "Patch"]
        assert len(learned) == 2
        if by == "mse":
            after = UnitObjective(anatomy, places, nn.ModuleList(learned))(feed.portion(rows), None)[0].detach()
            assert float(after) < 0.9 * float(total)


def test_what_maps_learn_of_conversations_is_the_same_together_and_apart(tmp_path: Path) -> None:
    text = build_instructions(_jsonl(tmp_path / "rows.jsonl", ROWS), tiny_tokenizer(), length=120)
    anatomy, removed = dissect(tiny_model("llama")), frozenset(parse_units("block.2"))
    student = cut(anatomy, removed)
    places = cuts(dissect(student), anatomy, removed, find_writers(anatomy))
    made = attach_maps(student, places, rank=3, seed=0)
    for parameter in made.parameters():
        parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
    objective, feed = UnitObjective(anatomy, places, made), Feed(text, 1, 1000, seed=0)
    found = []
    for portions in ([(0, 1)], [(0,), (1,)]):
        total = torch.stack([objective(feed.portion(rows), None)[0] for rows in portions]).sum()
        total.backward()
        found.append([total.detach(), *(parameter.grad.clone() for parameter in made.parameters())])
        made.zero_grad()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_maps_that_learn_what_a_repaired_model_has_already_are_refused() -> None:
    model = tiny_model("llama")
    anatomy, removed = dissect(model), frozenset(parse_units("block.2"))
    student = cut(anatomy, removed)
    repair = Repair(dissect(student), anatomy, removed, sample_text(model, sequences=8))
    recovery.get("emulated-update").function(repair)
    with pytest.raises(UserError, match=r"by=mse teaches all .* repaired before: use by=kl, or let"):
        run("low-rank-trained", model, student=student, by="mse")


# The teacher


def test_a_teacher_with_other_words_is_refused() -> None:
    model, other = tiny_model("llama"), tiny_model("llama")
    other.resize_token_embeddings(other.config.vocab_size + 8)
    method = recovery.get("full")
    student = cut(dissect(other), parse_units("block.2"))
    with pytest.raises(ModelError, match=r"vocabulary of 128 words and the student one of 136"):
        method.function(
            student, dissect(model), frozenset(), sample_text(model, sequences=40), None, None, 0, distill=1.0, **SMALL
        )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_what_the_teacher_said_is_asked_once(
    temperature: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notes: list[str]
) -> None:
    asked: list[tuple[int, ...]] = []
    guide = teacher.Teacher.guide

    def counted(self: teacher.Teacher, portion: Any) -> Guide:
        asked.append(portion.rows)
        return guide(self, portion)

    listed: list[str] = []
    monkeypatch.setattr("shallower.files.settle", lambda path: listed.append(path.parent.name))
    monkeypatch.setattr(teacher.Teacher, "guide", counted)
    monkeypatch.setattr(torch.optim, "AdamW", _Plain)  # which makes no step of a gradient that is all rounding
    given: dict[str, Any] = {"distill": 1.0, "temperature": temperature, "lr": 0.1}
    told = [
        run("full", tiny_model("llama"), folder=tmp_path / cache, epochs=2.0, teacher_cache=cache, **given)
        for cache in ("", "1MB")
    ]
    assert len(asked) == 40 + 20
    assert listed  # but not for each of as many files as there are sequences
    assert not [name for name in listed if name.startswith("teacher-")]
    assert any("holds 128 words a token, 100.0% of the probability" in note for note in notes)
    for one, other in zip(*(model.parameters() for model in told), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-4)  # the cache is float16
    folder = tmp_path / "1MB"
    assert len([*folder.glob("teacher-*")]) == 1
    model, given = tiny_model("llama"), {"folder": folder, "epochs": 0.2, "teacher_cache": "1MB", **given}
    run("full", model, **{**given, "temperature": 3.0})
    assert len([*folder.glob("teacher-*")]) == 2
    run("full", model, sample_text(model, sequences=20), **given)
    assert len([*folder.glob("teacher-*")]) == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"teacher_cache": "1kB", "folder": "run"},
            r"holds 0 words for each .* say too little: give",
        ),
        ({"teacher_cache": "1MB"}, "needs a folder"),
        ({"teacher_cache": "1MB", "folder": "run", "hidden": 0.5}, "holds no hidden states"),
        ({"distill": 1.5, "lr": 0.0}, "distill=1.5 is not between 0 and 1; lr=0.0 is not above 0"),
    ],
)
def test_what_cannot_be_distilled_is_said(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    if "folder" in options:
        options = {**options, "folder": tmp_path / options["folder"]}
    with pytest.raises(UserError, match=said):
        run("full", tiny_model("llama"), **{"distill": 1.0, **options})


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_blocks_that_student_and_teacher_share_are_run_once(compute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"distill": 0.5, "hidden": 0.1, "first": 2, "compute": compute, "remove": "block.3"}
    runs: list[PreTrainedModel] = []
    passes: list[int] = []
    for shares in (True, False):
        if not shares:
            monkeypatch.setattr("shallower.training.heal.shared_blocks", lambda student, anatomy: 0)
        model = tiny_model("llama")
        calls: list[bool] = []
        model.model.layers[1].mlp.register_forward_hook(lambda *_, calls=calls: calls.append(True))  # a cut copies it
        runs.append(run("full", model, **options))
        passes.append(len(calls))
    assert passes[1] - passes[0] == 40 // 2  # portions of two sequences
    for one, other in zip(*(healed.parameters() for healed in runs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_what_is_shared_ends_where_weights_differ() -> None:
    model = tiny_model("llama")
    anatomy = dissect(model)
    for removed, trained, expected in (
        ("block.3", "none", 3),
        ("block.3", "model.layers.1.mlp", 1),
        ("block.3", "model.norm", 3),
        ("block.3", "embed_tokens", 0),
        ("attn.2", "none", 2),
    ):
        student = cut(anatomy, parse_units(removed))
        own_parameters(student, lambda name, trained=trained: trained in name)
        assert shared_blocks(student, anatomy) == expected, (removed, trained)
        read_again = copy.deepcopy(student)  # as one from a checkpoint, with storage of its own
        assert shared_blocks(read_again, anatomy) == expected, (removed, trained)
    with torch.no_grad():
        read_again.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    assert shared_blocks(read_again, anatomy) == 1


@pytest.mark.parametrize(
    ("family", "shares", "outside"),
    [
        ("gpt2", ("embd_pdrop", "resid_pdrop", "attn_pdrop"), "embd_pdrop"),
        ("opt", ("dropout", "attention_dropout", "layerdrop"), "layerdrop"),
    ],
)
def test_what_is_shared_ends_where_something_is_dropped_at_random(
    family: str, shares: tuple[str, ...], outside: str
) -> None:
    """Or the student would learn to make up for noise that the teacher's blocks have not."""
    weights = tiny_model(family).state_dict()

    def made(dropped: str) -> tuple[PreTrainedModel, Anatomy]:
        config = tiny_config(family)
        config.update({name: 0.1 * (name == dropped) for name in shares})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        model.load_state_dict(weights)
        student = cut(dissect(model), parse_units("block.3"))
        own_parameters(student)
        return student, dissect(model)

    assert shared_blocks(*made("")) == 3
    for dropped in shares:
        student, anatomy = made(dropped)
        assert shared_blocks(student, anatomy) == 0, dropped
        if dropped != outside:
            mixed, anatomy = made("")
            mixed.get_submodule(anatomy.path)[2] = student.get_submodule(anatomy.path)[2]
            assert shared_blocks(mixed, anatomy) == 2, dropped


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # gemma2 caps its logits
def test_where_only_a_models_own_forward_gives_its_logits_it_learns_the_same(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"distill": 0.5, "temperature": 2.0, "first": 1, "epochs": 0.5}
    expected = run("full", tiny_model(family), **options)
    for module in ("heal", "teacher"):
        monkeypatch.setattr(f"shallower.training.{module}.find_head", lambda anatomy: None)
    found = run("full", tiny_model(family), **options)
    for one, other in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


class _Bent(LlamaForCausalLM):
    """Does more to its logits than scale or cap them."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.sinh()
        return output


def test_hidden_states_are_not_compared_where_they_are_not_at_hand() -> None:
    model = tiny_model("llama")
    model.__class__ = _Bent
    with pytest.raises(UserError, match=r"hidden=0.5 compares .* of _Bent, .*: leave hidden out"):
        run("full", model, distill=0.5, hidden=0.5)
    run("full", model, distill=0.5, epochs=0.1)


def test_hidden_states_draw_near_the_teachers() -> None:
    model = tiny_model("llama")
    ids = torch.arange(3, 27)[None]

    def away(one: PreTrainedModel) -> float:
        with torch.no_grad():
            states = [m(input_ids=ids, output_hidden_states=True).hidden_states[-1] for m in (one, model)]
        return float((1 - torch.cosine_similarity(*states, dim=-1)).mean())

    plain, drawn = (run("full", model, hidden=hidden, epochs=4.0) for hidden in (0.0, 20.0))
    assert away(drawn) < away(plain)


# Text


def test_a_text_too_short_for_a_step_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(
        CorpusError, match=r"3 sequences of 24 tokens, too few for one step of batch=96 .* batch=72 or less"
    ):
        run("full", model, sample_text(model, sequences=3))


def test_sequences_of_one_token_are_left_out() -> None:
    ids, mask = torch.randint(3, 128, (8, 24)), torch.ones(8, 24, dtype=torch.int64)
    mask[3, 1:] = 0
    text = CalibrationSet("one", ids, mask)
    feed = Feed(text, 24, 24, seed=0)
    assert sorted(row for step in range(feed.steps) for row in feed.step(step)) == [0, 1, 2, 4, 5, 6, 7]
    run("full", tiny_model("llama"), text, batch=24)
    with pytest.raises(CorpusError, match="no sequence of the text has two tokens"):
        Feed(text.subset([3]), 24, 24, seed=0)


def test_every_epoch_reads_every_sequence_once_in_another_order() -> None:
    feed = Feed(sample_text(tiny_model("llama"), sequences=12), 96, 24, seed=5)
    epochs = [[row for step in range(3) for row in feed.step(epoch * 3 + step)] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(12))
    assert epochs[0] != epochs[1]
    assert [portion.rows for portion in feed.portions(feed.step(0))] == [(row,) for row in feed.step(0)]


ROWS = [
    {"instruction": "Name a river.", "input": "", "output": "The Rhine, or another."},
    {"instruction": "Add the numbers.", "input": "2 and 3", "output": "5"},
    {"instruction": "Say nothing short.", "output": "word " * 60},
]


def _jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_only_answers_are_learned(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    text = build_instructions(_jsonl(tmp_path / "rows.jsonl", ROWS), tokenizer, length=120)
    assert text.sequences == 2  # the third is too long
    answers = [tokenizer.decode(ids[scored]) for ids, scored in zip(text.input_ids, text.scored, strict=True)]
    assert answers == ["The Rhine, or another.</s>\n", "5</s>\n"]
    text = build_instructions(_jsonl(tmp_path / "rows.jsonl", ROWS), tokenizer, length=120, sequences=2)
    assert text.attention_mask is not None
    wholes = [tokenizer.decode(ids[mask.bool()]) for ids, mask in zip(text.input_ids, text.attention_mask, strict=True)]
    assert wholes[1] == "<s>[user] Add the numbers.\n\n2 and 3</s>\n[assistant] 5</s>\n"
    portion = Feed(text, 1, 1000, 0).portion((1,))
    assert portion.input_ids.shape[1] == int(text.attention_mask[1].sum())  # no padding that is not needed
    assert torch.equal(portion.scored[0], text.scored[1, : portion.scored.shape[1]])
    text.save(tmp_path / "saved")
    assert InstructionSet.load(tmp_path / "saved").tokenizer == tokens_digest(tokenizer, text.input_ids)
    assert torch.equal(InstructionSet.load(tmp_path / "saved").scored, text.scored)
    assert text.digest != CalibrationSet(text.spec, text.input_ids, text.attention_mask).digest


def test_of_messages_the_last_answer_is_learned(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    said = ["Name a river.", "The Rhine.", "And one in Asia?", "The Ganges."]
    messages = [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(said)]
    rows = [{"messages": messages}, {"question": "2 and 3?", "answer": "5"}]
    text = build_instructions(_jsonl(tmp_path / "rows.jsonl", rows), tokenizer, length=120)
    assert tokenizer.decode(text.input_ids[0][text.scored[0]]) == "The Ganges.</s>\n"
    assert tokenizer.decode(text.input_ids[1][text.scored[1]]) == "5</s>\n"


def test_the_loss_is_that_of_the_answers_alone(tmp_path: Path) -> None:
    tokenizer, model = tiny_tokenizer(), tiny_model("llama")
    text = build_instructions(_jsonl(tmp_path / "rows.jsonl", ROWS), tokenizer, length=120)

    def loss(one: PreTrainedModel) -> float:
        labels = text.input_ids.masked_fill(~text.scored, -100)
        with torch.no_grad():
            return float(one(input_ids=text.input_ids, labels=labels).loss)

    feed = Feed(text, 1, 1000, seed=0)
    assert feed.scored((0, 1)) == int(text.scored.sum())
    assert feed.real((0, 1)) > feed.scored((0, 1))
    run("full", model, text, batch=text.length * 2, at_once=10**4, folder=tmp_path / "run")
    [_, only] = json.loads((tmp_path / "run" / "training.json").read_text())["curve"]
    assert only["nll"] == pytest.approx(loss(cut(dissect(model), parse_units("block.2"))), rel=1e-5)


def test_every_twentieth_conversation_measures_by_its_answers(tmp_path: Path) -> None:
    rows = [{"instruction": f"Say {n}.", "output": f"It is {n}."} for n in range(80)]
    whole = build_instructions(_jsonl(tmp_path / "rows.jsonl", rows), tiny_tokenizer(), length=120)
    train, held = split(whole)
    assert held is not None
    assert (train.sequences, held.sequences) == (76, 4)
    assert torch.equal(held.input_ids[0], whole.input_ids[19])
    model = tiny_model("llama")
    labels = held.input_ids.masked_fill(~held.scored, -100)
    with torch.no_grad():
        loss = model(input_ids=held.input_ids, attention_mask=held.attention_mask, labels=labels).loss
    assert answer_perplexity(model, held) == pytest.approx(float(loss.exp()), rel=1e-4)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(3e4)
    assert answer_perplexity(model, held) == math.inf
    assert split(whole.subset(range(79)))[1] is None


def test_no_copy_of_a_conversation_that_measures_is_trained_on(tmp_path: Path) -> None:
    rows = [{"instruction": f"Say {n // 2}.", "output": f"It is {n // 2}."} for n in range(80)]
    train, held = split(build_instructions(_jsonl(tmp_path / "rows.jsonl", rows), tiny_tokenizer(), length=120))
    assert held is not None
    assert (train.sequences, held.sequences) == (72, 4)
    measured = {tuple(ids) for ids in held.input_ids.tolist()}
    assert not measured & {tuple(ids) for ids in train.input_ids.tolist()}
    same = build_instructions(_jsonl(tmp_path / "same.jsonl", rows[:20] * 4), tiny_tokenizer(), length=120)
    assert split(same)[1] is None, "one conversation, four times, is not four"


UNANSWERED: list[dict[str, Any]] = [
    {"instruction": "a", "output": " "},
    {"instruction": "a", "output": None},
    {"messages": [{"role": "user", "content": "a"}]},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]},
    {"messages": [{"role": "assistant", "content": "a"}]},
]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"instruction": "a", "output": 3}], "line 1 holds no question with its answer, but instruction, output"),
        (UNANSWERED, "none of the 5 conversations .* has a question with its answer: write rows such as"),
        ([{"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "a"}]}], "line 1 holds no"),
        ([{"instruction": "a"}], "line 1 holds no question with its answer, but instruction"),
        ([{"messages": ["a"]}], "line 1 holds no question with its answer, but messages"),
        ([{"text": "a"}], "line 1 holds no question with its answer, but text"),
        ([*ROWS[2:], *UNANSWERED], "none of the 1 answered conversations .* fits length=120"),
    ],
)
def test_rows_that_are_no_instructions_are_refused(rows: list[dict[str, Any]], said: str, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=said):
        build_instructions(_jsonl(tmp_path / "rows.jsonl", rows), tiny_tokenizer(), length=120)


def test_a_template_that_refuses_a_row_is_told_with_its_line(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(CorpusError, match=r"line 1: .* refuses a conversation of user, assistant .System role not"):
        build_instructions(_jsonl(tmp_path / "rows.jsonl", ROWS), tokenizer, length=120)


def test_whatever_a_template_raises_is_told_with_its_line(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] + 1 }}"
    with pytest.raises(CorpusError, match=r"line 1: .* refuses a conversation of user"):
        build_instructions(_jsonl(tmp_path / "rows.jsonl", ROWS), tokenizer, length=120)


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(CorpusError, match=r"chat template"):
        build_instructions(_jsonl(tmp_path / "rows.jsonl", ROWS), tokenizer)


# The disk


def test_too_little_room_is_said_before_anything_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state.shutil, "disk_usage", lambda path: _Usage)
    with pytest.raises(OutputError, match=r"needs 0.00 GB for the state of the training and 0.00 GB are free"):
        run("full", tiny_model("llama"), folder=tmp_path)


class _Usage:
    free = 1000


def test_the_teachers_cache_and_the_state_have_to_fit_the_disk_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"folder": tmp_path, "distill": 1.0, "teacher_cache": "10MB", "epochs": 0.1}
    student = cut(dissect(tiny_model("llama")), parse_units("block.2"))
    state_needs = 28 * sum(p.numel() for n, p in student.named_parameters() if "embed" not in n and "lm_head" not in n)

    class Usage:
        free = state_needs + 1000

    monkeypatch.setattr(state.shutil, "disk_usage", lambda path: Usage)
    assert state_needs > 40 * 32 * 8 * 6  # so that the cache alone fits, too
    with pytest.raises(OutputError, match=r"for the state of the training and the teacher's cache and 0.00 GB are"):
        run("full", tiny_model("llama"), **options)
    Usage.free = 10 * state_needs
    run("full", tiny_model("llama"), **options)
    (tmp_path / "good.safetensors").unlink()
    [cache] = tmp_path.glob("teacher-*")
    taken = sum(path.stat().st_size for path in cache.iterdir())
    assert taken > 1000
    Usage.free = state_needs - 1000  # what the cache holds is not given back
    with pytest.raises(OutputError, match=r"for the state of the training and 0.00 GB are"):
        run("full", tiny_model("llama"), folder=tmp_path)


def test_what_was_kept_after_the_last_state_is_known_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def held_out(*values: float) -> Callable[[PreTrainedModel], float]:
        each = iter(values)
        return lambda model: next(each)

    save, step = state.StateStore.save, loop._Loop._step
    given: dict[str, Any] = {"folder": tmp_path, "save_minutes": 0.0, "evaluations": 20, "patience": 2}

    def killed(self: Any, share: float) -> str:
        if self.state.step == 4:
            raise KeyboardInterrupt
        return step(self, share)

    with monkeypatch.context() as patch:  # a state behind the first step only, and the best weights behind the third
        patch.setattr(
            state.StateStore, "save", lambda self, found, *rest: save(self, found, *rest) if found.step < 2 else 0
        )
        patch.setattr(loop._Loop, "_step", killed)
        with pytest.raises(KeyboardInterrupt):
            run("full", tiny_model("llama"), held_out=held_out(10.0, 9.0, 8.0, 5.0, 6.0), **given)
    kept = load_file(tmp_path / "good.safetensors")
    # what is measured up to the kept step is no loss of patience
    run("full", tiny_model("llama"), held_out=held_out(9.5, 9.5, 9.5, 9.5), **given)
    told = json.loads((tmp_path / "training.json").read_text())
    assert (told["kept"], told["best"], told["step"]) == (3, 5.0, 5)
    assert told["stopped"] == "2 measurements in a row brought nothing better"
    for name, tensor in load_file(tmp_path / "good.safetensors").items():
        assert torch.equal(tensor, kept[name])


def test_the_weights_given_are_those_recorded_as_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a kill came behind the last measurement, the best, and the resumed last step differs from it."""
    save, measured = state.StateStore.save, itertools.count(0, -1)
    given: dict[str, Any] = {"folder": tmp_path, "save_minutes": 0.0, "evaluations": 20}

    def killed(self: Any, stopped: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(
            state.StateStore, "save", lambda self, found, *rest: save(self, found, *rest) if found.step < 2 else 0
        )
        patch.setattr(loop._Loop, "_end", killed)
        with pytest.raises(KeyboardInterrupt):
            run("full", tiny_model("llama"), held_out=lambda model: float(next(measured)), **given)
    good = load_file(tmp_path / "good.safetensors")
    save_file({name: each + 0.01 * (name != state.KEPT) for name, each in good.items()}, tmp_path / "good.safetensors")
    resumed = run("full", tiny_model("llama"), held_out=lambda model: 50.0, **given)
    told = json.loads((tmp_path / "training.json").read_text())
    assert told["kept"] == told["step"]
    assert torch.equal(logits(resumed), logits(run("full", tiny_model("llama"), **given)))


def test_what_another_process_deleted_first_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = [tmp_path / ".state-00000001.7", tmp_path / ".good.safetensors.7"]
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(gone))
    state.StateStore(tmp_path, {})


def test_a_disk_that_fills_up_leaves_the_state_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, calls = state.save_file, []

    def full(tensors: Any, path: Path) -> None:
        calls.append(path)
        if len(calls) == 7:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path)

    monkeypatch.setattr(state, "save_file", full)
    with pytest.raises(OutputError, match=r"the disk is full: .*state-00000003 was not written"):
        run("full", tiny_model("llama"), folder=tmp_path, save_minutes=0.0)
    assert [path.name for path in tmp_path.iterdir() if "state" in path.name] == ["state-00000002"]
    assert set(load_file(tmp_path / "state-00000002" / "weights.safetensors"))
    for write in (state.write_tensors, state.write_one_of_many):
        del calls[6:]
        with pytest.raises(OutputError, match=r"the disk is full: .*part.safetensors was not written; .* resumes"):
            write(tmp_path / "part.safetensors", {"x": torch.ones(2)})
        assert not [path for path in tmp_path.iterdir() if "part" in path.name]


# What a user may get wrong


@pytest.mark.parametrize(
    ("family", "embedding", "norm"),
    [("bloom", "word_embeddings_layernorm", "ln_f"), ("opt_post_norm", "project_", ""), ("gpt2", "wpe", "ln_f")],
)
def test_what_makes_the_stream_of_words_is_embeddings(family: str, embedding: str, norm: str) -> None:
    for embeddings in (False, True):
        model = tiny_model(family)
        own = dict(model.named_parameters())
        healed = run("full", model, first=2, embeddings=embeddings, epochs=0.2, remove="block.3")
        place = block_of(healed)
        outside = {name: parameter for name, parameter in healed.named_parameters() if place(name) is None}
        changed = {name for name, parameter in outside.items() if not torch.equal(parameter, own[name])}
        assert any(embedding in name for name in changed) == embeddings
        assert {name for name in outside if norm and norm in name} <= changed
        assert embeddings or all(norm and norm in name for name in changed)


def test_a_number_format_of_products_is_refused_where_weights_stay_in_half_precision() -> None:
    half = tiny_model("llama").bfloat16()
    for name, options in (("full", {}), ("full", {"embeddings": True, "first": 2}), ("lora", {})):
        with pytest.raises(UserError, match=r"compute=float32 needs the model in float32, and it is in bfloat16"):
            run(name, half, **options)
    run("full", half, embeddings=True, epochs=0.1)  # of which all weights are trained, and so float32


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("full", {"epochs": float("inf")}, r"epochs=inf has no end"),
        ("full", {"first": 5}, r"first=5, but the model has only 5 blocks"),
    ],
)
def test_options_that_make_no_sense_are_refused(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        run(name, tiny_model("llama"), **options)


def test_recomputing_is_refused_where_a_model_cannot() -> None:
    with pytest.raises(UserError, match=r"recompute=true needs a model that can .* JetMoeForCausalLM cannot"):
        run("full", tiny_model("jetmoe"), recompute=True)


def test_any_seed_will_do() -> None:
    run("full", tiny_model("llama"), seed=1_790_000_000, epochs=0.2)


# Options


def test_trained_methods_take_the_recipes_options_and_their_own() -> None:
    method = recovery.get("lora")
    assert method.parse_options({"lr": "0.01", "rank": "4", "compute": "float32"}) == {
        "lr": 0.01,
        "rank": 4,
        "compute": "float32",
    }
    assert set(Recipe.__dataclass_fields__) < set(method.options)
    assert method.options["weight_decay"].default == 0.0
    assert recovery.get("full").options["weight_decay"].default == 0.1
    assert "temperature" in (method.function.__doc__ or "")
    with pytest.raises(UnknownName, match=r"did you mean 'rank'"):
        method.parse_options({"rnak": "4"})
