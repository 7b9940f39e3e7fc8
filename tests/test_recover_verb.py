"""`recover`: what it makes of a pruned checkpoint, stores and refuses."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import shallower
from shallower.errors import CorpusError, ModelError, ModelTooLarge, OutputError, PlanError, UnknownName, UserError
from shallower.plan import PruningPlan
from shallower.registry import recovery
from shallower.reporting.data import RecoveryMadeBy
from shallower.surgery import require_free, save
from shallower.surgery.adopt import adopt
from shallower.surgery.patch import patches
from shallower.testing.conformance import sample_text
from shallower.testing.families import tiny_model, tiny_tokenizer
from shallower.verbs.history import told_before
from shallower.verbs.prune import prune
from shallower.verbs.prune_checks import require_storable
from shallower.verbs.recover import recover
from shallower.verbs.recovery_steps import parse_recoveries
from shallower.verbs.request import resolve
from shallower.verbs.search import search
from shallower.verbs.subject import open_subject
from test_recovery import logits, plan_for, text_of

save_module = sys.modules[save.__module__]  # the package's function `save` hides it


def asked(files: Path, **given: Any) -> dict[str, Any]:
    return {
        "calibration": str(files / "text.jsonl"),
        "sequences": 16,
        "length": 32,
        "window": 64,
        "max_windows": 3,
        "dtype": "float32",
        **given,
    }


@pytest.mark.parametrize(
    ("method", "settings"),
    [("emulated-update", {"measured": "cut"}), ("low-rank", {"aim": "cut"}), ("linear-fold", {"aim": "cut"})],
)
def test_what_units_make_of_a_repaired_stream_is_not_added_to_it(
    method: str, settings: dict[str, str], files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [(name, value)] = settings.items()
    said = f"{name}={value} needs the cut model that nothing was repaired of"
    with pytest.raises(UserError, match=f"{said}, and in 'magnitude,{method}' magnitude comes before: let {method}"):
        parse_recoveries(f"magnitude,{method}", settings)
    with pytest.raises(UserError, match=f"{said}, and in 'magnitude,{method}'"):
        search(files / "dense", 1, repair=f"magnitude,{method}", settings=settings)
    recover(files / "pruned", method, teacher=files / "dense", settings=settings, **asked(files))
    recover(files / "pruned", "refit", teacher=files / "dense", out=files / "once", **asked(files))

    def computed(*_: Any, **__: Any) -> None:
        raise AssertionError("something was computed")

    monkeypatch.setattr(sys.modules["shallower.verbs.recover"], "perplexities", computed)
    with pytest.raises(UserError, match=f"{said}, and weights of once are others than in dense: .*--plan plan"):
        recover(files / "once", method, teacher=files / "dense", settings=settings, **asked(files))


def test_a_pruned_checkpoint_is_recovered_into_an_ordinary_one(files: Path) -> None:
    found = recover(
        files / "pruned", "emulated-update,refit", teacher=files / "dense", out=files / "out", **asked(files)
    )
    assert [stage.method for stage in found.stages] == ["cut", "emulated-update", "refit"]
    assert [stage.parameters > 0 for stage in found.stages] == [False, True, False]
    assert found.stages[1].tokens == 16 * 32
    text = sample_text(found.model, sequences=2)
    loaded = AutoModelForCausalLM.from_pretrained(files / "out", dtype=torch.float32)
    assert torch.allclose(logits(loaded, text), logits(found.model, text), atol=1e-5)
    assert PruningPlan.load(files / "out" / "plan.json") == found.plan
    written = json.loads((files / "out" / "recovery.json").read_text())
    assert [row["method"] for row in written["recovery"]] == ["cut", "emulated-update", "refit"]
    assert written["recovery"][2]["options"] == {
        name: option.default for name, option in recovery.get("refit").options.items()
    }
    made = RecoveryMadeBy.from_json(written["made_by"])
    assert made == found.made_by
    assert made.teacher.fingerprint == found.plan.model.fingerprint
    assert (made.seed, made.version) == (0, shallower.__version__)
    assert made.calibration is not None
    assert (made.calibration.tokens, made.training) == (16 * 32, None)
    assert (made.dtype, made.device, made.window, made.windows) == ("float32", "cpu", 64, 3)
    older = {key: value for key, value in written["made_by"].items() if key not in ("device", "window", "windows")}
    assert RecoveryMadeBy.from_json(older) == replace(made, device=None, window=None, windows=None)
    assert str(files / "text.jsonl") in made.calibration.spec
    card = (files / "out" / "README.md").read_text()
    assert "What is left was then changed by emulated-update, refit" in card
    assert "not changed" not in card
    assert "\n- Repaired on text.jsonl" in card
    how = "float32 on cpu, the first 3 windows of 64 tokens of each text"
    assert f"\n- Seed 0\n- Measured: {how}" in card
    assert how in (files / "out" / "report.html").read_text()
    again = recover(files / "dense", "emulated-update,refit", plan=files / "plan.json", **asked(files))
    assert torch.allclose(logits(again.model, text), logits(found.model, text), atol=1e-4)


def test_a_repair_of_what_was_repaired_tells_of_both(files: Path) -> None:
    prune(files / "dense", "block.2", recover="refit", out=files / "once", speed=False, **asked(files))
    recover(files / "once", "magnitude", teacher=files / "dense", out=files / "twice", **asked(files))
    found = recover(files / "twice", "refit", teacher=files / "dense", out=files / "out", **asked(files))
    assert [stage.method for stage in found.stages] == ["repaired", "refit"]
    written = json.loads((files / "out" / "recovery.json").read_text())
    twice = written["before"]
    once = twice["before"]
    assert [[row["method"] for row in told["recovery"]] for told in (once, twice)] == [
        ["cut", "refit"],
        ["repaired", "magnitude"],
    ]
    assert once["made_by"]["seed"] == 0
    assert "then changed by refit, magnitude, refit" in (files / "out" / "README.md").read_text()
    page = (files / "out" / "report.html").read_text()
    assert "repaired by refit, magnitude and refit" in page
    assert page.index("What had been repaired before") < page.index(">magnitude<") < page.index("What was removed")
    for before in ("x", {**once, "recovery": ["refit"]}, {**once, "before": [1]}):
        (files / "twice" / "recovery.json").write_text(json.dumps({**twice, "before": before}))
        with pytest.raises(UserError, match=r"recovery\.json, which tells how the model was repaired, cannot be read"):
            told_before(files / "twice")
    (files / "twice" / "recovery.json").write_text("{")
    with pytest.raises(UserError, match=r"recovery\.json, which tells how the model was repaired, cannot be read"):
        recover(files / "twice", "refit", teacher=files / "dense", **asked(files))


def test_a_plain_cut_in_another_number_format_is_a_plain_cut(files: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(files / "pruned", dtype=torch.float32)
    given = {"teacher": files / "dense", "plan": files / "plan.json", **asked(files), "dtype": "bfloat16"}
    assert [stage.method for stage in recover(model, "refit", **given).stages] == ["cut", "refit"]
    with pytest.raises(UserError, match=r"aim=cut runs units of dense \(bfloat16\) .* \(float32\): load both in one"):
        recover(model, "refit", **given, settings={"aim": "cut"})


@pytest.mark.parametrize("method", ["refit", "magnitude", "low-rank", "full", "lora", "low-rank-trained"])
def test_a_model_in_memory_stays_as_it_was(method: str, files: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(files / "pruned", dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config, grads = model.config.to_dict(), [parameter.requires_grad for parameter in model.parameters()]
    given = asked(files)
    if recovery.get(method).trained:
        given |= {"train_sequences": 16, "settings": {"batch": "128", "at_once": "128", "lr": "0.003"}}
        del given["sequences"]
    for subject in (model, open_subject(model)):
        found = recover(subject, method, teacher=files / "dense", plan=files / "plan.json", **given)
        assert [stage.method for stage in found.stages] == ["cut", method]
        text = sample_text(model, sequences=2)
        assert not torch.equal(logits(found.model, text), logits(model, text))
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        assert model.config.to_dict() == config
        assert [parameter.requires_grad for parameter in model.parameters()] == grads
        assert not any(patches(model))
    given = asked(files)
    if not any(patches(found.model)):  # of which a second repair could be made
        again = recover(found.model, "refit", teacher=files / "dense", plan=files / "plan.json", **given)
        assert [stage.method for stage in again.stages] == ["repaired", "refit"]


def test_a_packaged_checkpoint_is_recovered_as_the_plan_it_was_cut_by(files: Path) -> None:
    plan = prune(files / "dense", "attn.1-2", out=files / "packaged", speed=False, **asked(files)).plan
    assert open_subject(files / "packaged").anatomy.family == "llama"  # as error messages name it
    assert len(plan.removed) == 2
    found = recover(files / "packaged", "refit", teacher=files / "dense", out=files / "out", **asked(files))
    recover(files / "packaged", "low-rank", teacher=files / "dense", settings={"aim": "cut"}, **asked(files))  # plain
    again = recover(files / "dense", "refit", plan=plan, **asked(files))
    text = sample_text(again.model, sequences=2)
    assert torch.allclose(logits(found.model, text), logits(again.model, text), atol=1e-4)
    loaded = AutoModelForCausalLM.from_pretrained(files / "out", trust_remote_code=True)
    assert torch.allclose(logits(loaded, text), logits(found.model, text), atol=1e-5)


def test_what_is_stored_keeps_the_precision_of_the_checkpoint(files: Path) -> None:
    found = recover(
        files / "pruned", "refit", teacher=files / "dense", out=files / "out", **asked(files, dtype="bfloat16")
    )
    loaded = AutoModelForCausalLM.from_pretrained(files / "out")
    assert loaded.dtype == torch.float32
    dense = tiny_model("llama").model.layers
    assert torch.equal(loaded.model.layers[0].mlp.down_proj.weight, dense[0].mlp.down_proj.weight)
    changed = loaded.model.layers[1].mlp.down_proj.weight
    assert torch.equal(changed.bfloat16(), found.model.model.layers[1].mlp.down_proj.weight)


def test_what_is_made_of_float64_is_stored_in_float32(files: Path) -> None:
    tiny_model("llama").double().save_pretrained(files / "dense")
    for dtype in ("bfloat16", "float32"):
        prune(files / "dense", "block.2", out=files / dtype, speed=False, **asked(files, dtype=dtype))
        stored = load_file(files / dtype / "model.safetensors")
        assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
        card = (files / dtype / "README.md").read_text()
        assert "Weights that the original holds in float64 were rounded to float32." in card


@pytest.mark.parametrize("by", ["name", "amount", "plan", "pruned", "cut"])
def test_a_disk_that_is_too_small_is_told_of_before_the_work(
    files: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """And one that is just large enough is not. What is written is float32, as the checkpoint that is read."""
    out, plan = files / "new" / "out", files / "plan.json"
    given = asked(files, dtype="bfloat16", max_windows=1, out=out)
    if by in ("pruned", "cut"):
        models = {"teacher": files / "dense"} if by == "pruned" else {"plan": plan}
        run = partial(recover, files / ("pruned" if by == "pruned" else "dense"), "refit", **models, **given)
    else:
        remove = {"name": {"remove": "block.2"}, "amount": {"remove": "1", "search": "last"}, "plan": {"plan": plan}}
        run = partial(prune, files / "dense", speed=False, **remove[by], **given)
    run()
    tensors = load_file(out / "model.safetensors")
    needed = save_module._BESIDES_WEIGHTS + sum(tensor.nbytes for tensor in tensors.values())
    shutil.rmtree(out.parent)
    block = sum(tensor.nbytes for name, tensor in tensors.items() if ".layers.0." in name)
    buffers = 1000  # are counted in the end, and not before

    def free(amount: int) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": amount}))

    def measured(*args: object, **kwargs: object) -> None:
        raise AssertionError("text was read")

    with monkeypatch.context() as patched:
        for module in ("prune_texts", "recover"):
            patched.setattr(f"shallower.verbs.{module}.calibrate", measured)
        free(needed - 1 - (block if by == "amount" else 0))  # a search may remove more than it is asked for, by a block
        with pytest.raises(OutputError, match=r"out needs 0\.07 GB and 0\.07 GB are free on that disk; make room"):
            run()
        assert not out.parent.exists()
    free(needed + buffers)
    run()
    shutil.rmtree(out.parent)
    if by == "amount":
        free(needed - 1)
        with pytest.raises(OutputError, match="are free on that disk"):
            run()


def test_what_a_family_keeps_in_float32_is_stored_in_it(tmp_path: Path) -> None:
    tiny_model("ernie4_5_moe").save_pretrained(tmp_path)
    stored, repaired = (shallower.load(tmp_path, dtype=dtype, device="cpu") for dtype in ("bfloat16", "float32"))
    before = list(repaired.parameters())
    found, changed = ([model.model.layers[3].mlp.gate, model.lm_head] for model in (stored, repaired))
    for module in changed:
        module.weight = nn.Parameter(module.weight * 1.001)
    adopt(stored, repaired, before)
    for module, wanted, dtype in zip(found, changed, (torch.float32, torch.bfloat16), strict=True):
        assert torch.equal(module.weight, wanted.weight.to(dtype))
        assert module.weight.dtype is dtype


@pytest.mark.parametrize("said", [None, "bfloat16"])
def test_the_precision_that_is_kept_is_the_weights_not_the_configs(files: Path, said: str | None) -> None:
    config = files / "dense" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": said}))
    prune(files / "dense", "block.2", out=files / "out", speed=False, **asked(files, dtype="bfloat16"))
    stored, dense = (load_file(files / name / "model.safetensors") for name in ("out", "dense"))
    assert all(torch.equal(stored[name], dense[name]) for name in stored if ".layers.0." in name)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_of_its_own_code_is_saved_with_it(
    files: Path, dtype: str, notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, config = files / "dense", files / "dense" / "config.json"
    (dense / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n    model_type = 'own_llama'\n"
    )
    (dense / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\n\nfrom .configuration_own import OwnConfig\n\n\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    modules = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    changed = {"model_type": "own_llama", "architectures": ["OwnForCausalLM"], "auto_map": modules}
    config.write_text(json.dumps({**json.loads(config.read_text()), **changed}))
    given = asked(files, dtype=dtype, trust_remote_code=True)
    found = prune(dense, "block.2", out=files / "out", speed=False, **given)
    loaded = AutoModelForCausalLM.from_pretrained(files / "out", dtype=found.model.dtype, trust_remote_code=True)
    assert type(loaded).__name__ == "OwnForCausalLM"
    assert torch.allclose(logits(loaded, text_of(loaded)), logits(found.model, text_of(loaded)))
    assert "trust_remote_code=True" in (files / "out" / "README.md").read_text()
    require_free(files / "out", force=True)
    if dtype == "bfloat16":
        return
    with monkeypatch.context() as patch:
        patch.setattr("shallower.verbs.prune.texts_of_prune", None)  # nothing is read before
        with pytest.raises(ModelError, match=r"OwnForCausalLM is not a class of transformers itself"):
            prune(dense, "20%", units="attn", speed=False, **given)
    subject = open_subject(dense, dtype=dtype, trust_remote_code=True)
    for kind, impossible in (("block", []), ("sublayer", ["attn.3", "mlp.3"]), ("all", ["attn.3", "mlp.3"])):
        notes.clear()
        require_storable(subject, resolve(subject, 1, units=kind), [], "auto", saved=True)
        assert [re.search(r"the model without (\S+) is: OwnFor", note)[1] for note in notes] == impossible


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_maps_at_cuts_are_saved_packaged(files: Path, dtype: str) -> None:
    found = recover(
        files / "pruned", "refit,low-rank", teacher=files / "dense", out=files / "out", **asked(files, dtype=dtype)
    )
    text = sample_text(found.model, sequences=2)
    loaded = AutoModelForCausalLM.from_pretrained(files / "out", trust_remote_code=True)
    assert loaded.dtype == torch.float32
    allowed = 1e-5 if dtype == "float32" else 0.03

    def away(one: PreTrainedModel, other: PreTrainedModel) -> float:
        return float((logits(one, text) - logits(other, text).float()).abs().mean())

    assert away(loaded, found.model) < allowed
    pruned = prune(
        files / "dense",
        "block.2-3",
        recover="refit,low-rank",
        out=files / "again",
        speed=False,
        **asked(files, dtype=dtype),
    )
    assert pruned.report.form == "packaged"
    again = AutoModelForCausalLM.from_pretrained(files / "again", trust_remote_code=True)
    assert away(again, pruned.model) < allowed
    assert "trust_remote_code" in (files / "again" / "report.html").read_text()
    told = json.loads((files / "again" / "report.json").read_text())["notes"]
    [of_vllm] = [note for note in told if "vLLM" in note]
    assert of_vllm in (files / "again" / "README.md").read_text(), "of what is stored, and not of the cut before it"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"methods": "refitt"}, UnknownName, "did you mean 'refit'"),
        ({"methods": ","}, UserError, "no recovery is named"),
        ({"settings": {"rigde": "1"}}, UnknownName, "did you mean 'ridge'"),
        ({"settings": {"reach": "far"}}, UserError, "cuts or rest"),
        ({"teacher": "other"}, ModelError, "cannot teach pruned: its model_type is 'gpt2', not 'llama'"),
        ({"teacher": "sibling"}, PlanError, "was made for"),
        ({"teacher": "pruned"}, PlanError, "was made for"),
        ({"teacher": None}, UserError, "--teacher MODEL"),
        ({"model": "dense"}, PlanError, "has no plan.json"),
        (
            {"plan": "other-plan.json"},
            PlanError,
            "plan.json says that pruned lacks block.2-3, and --plan .*other-plan.json removes block.2-4: leave",
        ),
        ({"sequences": 1}, CorpusError, "32 tokens of calibration text cannot fit"),
    ],
)
def test_what_a_user_may_get_wrong(files: Path, change: dict[str, Any], error: type[Exception], message: str) -> None:
    save(tiny_model("gpt2"), files / "other", plan=None, tokenizer=tiny_tokenizer())
    save(tiny_model("llama", seed=1), files / "sibling", plan=None, tokenizer=tiny_tokenizer())
    plan_for(tiny_model("llama"), "block.2-4").save(files / "other-plan.json")
    given: dict[str, Any] = {"model": "pruned", "teacher": "dense", "methods": "refit", **change}
    for name in ("model", "teacher", "plan", "out"):
        if given.get(name) is not None:
            given[name] = files / given[name]
    before = sorted(path.name for path in files.iterdir())
    with pytest.raises(error, match=message):
        recover(given.pop("model"), given.pop("methods"), **asked(files, **given))
    assert sorted(path.name for path in files.iterdir()) == before


@pytest.mark.parametrize("method", ["refit", "full"])
def test_a_plan_that_the_model_was_not_cut_by_is_refused(method: str, files: Path) -> None:
    given = {"teacher": files / "dense", **asked(files)}
    given |= {"sequences": None} if method == "full" else {}
    as_large, smaller = (plan_for(tiny_model("llama"), removed) for removed in ("block.4-5", "block.2-4"))
    with pytest.raises(
        PlanError, match=r"pruned lacks block\.2-3, and the plan removes block\.4-5: leave the plan out"
    ):
        recover(files / "pruned", method, plan=as_large, **given)
    (files / "pruned" / "plan.json").unlink()
    for model in (files / "pruned", AutoModelForCausalLM.from_pretrained(files / "pruned", dtype=torch.float32)):
        with pytest.raises(
            PlanError, match="the model has 4 blocks, which is not what is left of the 6 of its teacher"
        ):
            recover(model, method, plan=smaller, **given)


def test_a_student_without_room_is_told_of_the_way_without_it(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, opened = sys.modules[recover.__module__], []

    def open_one(model: Any, *args: Any, **how: Any) -> Any:
        opened.append(model)
        if len(opened) > 1:
            raise ModelTooLarge("the weights of pruned do not fit into memory; choose another --device.")
        return open_subject(model, *args, **how)

    monkeypatch.setattr(module, "open_subject", open_one)
    with pytest.raises(ModelTooLarge, match=r"do not fit .* beside its teacher.* give the dense model and the plan"):
        recover(files / "pruned", "refit", teacher=files / "dense", **asked(files))
