"""Both kinds of recovery under one verb: in closed form, then trained; saved, resumed, refused."""

from __future__ import annotations

import gc
import importlib.util
import json
import re
import sys
import weakref
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from shallower import evaluate, prune, recover, search
from shallower.anatomy import dissect
from shallower.cli.main import app
from shallower.defaults import TRAIN_SEQUENCES
from shallower.errors import CorpusError, ModelError, OutputError, PlanError, TooLittleText, UserError
from shallower.plan import MadeBy, PruningPlan
from shallower.reporting.data import ReportData
from shallower.surgery import cut
from shallower.surgery.patch import patches
from shallower.surgery.verify import full_logits
from shallower.testing.conformance import sample_text
from shallower.testing.families import tiny_model, tiny_tokenizer
from shallower.training import loop
from shallower.units import parse_units
from shallower.verbs import calibrate, recoveries
from shallower.verbs import recover as verb
from shallower.verbs.prune_checks import split_settings
from shallower.verbs.recoveries import Resume
from shallower.verbs.recovery_steps import parse_recoveries, require_launch
from shallower.verbs.subject import Subject, open_subject

SMALL = {"batch": "128", "at_once": "128", "compute": "float32", "lr": "0.003", "evaluations": "2"}


def asked(files: Path, *, trains: bool = True, **given: Any) -> dict[str, Any]:
    few = {"length": 32, "window": 64, "max_windows": 3, "dtype": "float32"}
    few |= {"train_sequences": 64, "settings": SMALL} if trains else {"sequences": 16}
    return {"calibration": str(files / "text.jsonl"), **few, **given}


def test_one_command_repairs_trains_and_writes_an_ordinary_checkpoint(files: Path) -> None:
    given = ["recover", files / "pruned", "--teacher", files / "dense", "--with", "refit,full", "--out", files / "out"]
    given += ["--calibration", files / "text.jsonl", "--sequences", 16, "--length", 32, "--train-sequences", 64]
    given += ["--window", 64, "--windows", 3, "--dtype", "bfloat16", "--json", "--distill", 0.5]
    for name, value in {**SMALL, "compute": "auto"}.items():
        given += ["--set", f"{name}={value}"]
    ran = CliRunner().invoke(app, [str(item) for item in given])
    assert ran.exit_code == 0, ran.output
    told = json.loads(ran.stdout)
    before, repaired, trained = told["recovery"]
    assert (before["method"], repaired["method"], trained["method"]) == ("cut", "refit", "full")
    assert trained["tokens"] == 64 * 32
    assert trained["options"]["distill"] == 0.5
    assert trained["options"]["compute"] == "bfloat16"  # what auto chose
    measured = {"dtype": "bfloat16", "device": "cpu", "window": 64, "windows": 3}
    assert {key: told["made_by"][key] for key in measured} == measured
    [text] = trained["perplexity"]
    assert trained["perplexity"][text] <= min(repaired["perplexity"][text], before["perplexity"][text])
    assert any("16 steps of training" in note for note in told["notes"])
    loaded = AutoModelForCausalLM.from_pretrained(files / "out")
    assert type(loaded).__name__ == "LlamaForCausalLM"
    assert loaded.dtype == torch.float32
    dense = tiny_model("llama").model
    assert torch.equal(loaded.model.embed_tokens.weight, dense.embed_tokens.weight)  # not rounded on the way
    assert not torch.equal(loaded.model.layers[0].self_attn.q_proj.weight, dense.layers[0].self_attn.q_proj.weight)
    assert not list(files.glob(".*"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_from_before_a_training_go_unless_they_are_compared_later(
    files: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    run, left = verb.run_recoveries, []

    def watched(student: Subject, *given: Any, **named: Any) -> Any:
        before = [weakref.ref(parameter) for parameter in student.model.parameters()]
        done = run(student, *given, **named)
        gc.collect()
        left.append(sum(one() is not None for one in before))
        return done

    monkeypatch.setattr(verb, "run_recoveries", watched)
    given = asked(files, dtype=dtype, settings={**SMALL, "compute": "auto"}, out=files / "out")
    verb.recover(files / "pruned", "full", teacher=files / "dense", **given)
    assert (left == [0]) == (dtype == "float32")  # as it is stored


@pytest.mark.parametrize(
    ("methods", "settings", "message"),
    [
        ("refit,full", ["distill=0.5"], r"--distill 0.9 and --set distill=0.5 differ: drop one of the two"),
        ("full", ["distill=much"], r"--distill 0.9 and --set distill=much differ"),
        (
            "refit,low-rank",
            [],
            r"0.9 is for full, lora and qlora, and refit,low-rank has none of them: add .*,full",
        ),
        ("low-rank-trained", [], r"--distill 0.9 is for full, lora and qlora, and low-rank-trained has none"),
        ("fulll", [], r"did you mean 'full'"),
        ("full", ["distill=0.90", "lr=-1"], r"lr=-1.0 is not above 0"),
    ],
)
def test_the_share_that_is_distilled_is_refused_where_it_cannot_be(
    methods: str, settings: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _forbid_loading(monkeypatch)
    given = [word for setting in settings for word in ("--set", setting)] + ["--distill", "0.9"]
    for command in (
        ["recover", "m", "--teacher", "t", "--with"],
        ["prune", "m", "--remove", "1", "--out", "o", "--recover"],
    ):
        ran = CliRunner().invoke(app, [*command, methods, *given])
        assert isinstance(ran.exception, UserError)
        assert re.search(message, str(ran.exception)), ran.exception
    ran = CliRunner().invoke(app, ["prune", "m", "--remove", "1", "--out", "o", "--distill", "0.9"])
    assert "--distill 0.9 is for a recovery that trains: add one, as in --recover full" in str(ran.exception)


def test_a_command_that_trains_and_keeps_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _forbid_loading(monkeypatch)
    ran = CliRunner().invoke(app, ["recover", "m", "--teacher", "t", "--with", "refit,full"])
    assert isinstance(ran.exception, UserError)
    assert str(ran.exception).startswith("--with refit,full trains (full), and without --out nothing would be left")


@pytest.mark.parametrize(("method", "package"), [("lora", "peft"), ("qlora", "bitsandbytes")])
def test_a_package_that_is_missing_is_told_before_a_model_is_loaded(
    method: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _forbid_loading(monkeypatch)
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else found(name))
    said = rf"{method} needs the package `{package}`, which is not installed: pip install 'shallower\[heal\]'"
    with pytest.raises(UserError, match=said):
        recover("m", f"refit,{method}", teacher="t")
    with pytest.raises(UserError, match=said):
        prune("m", 1, recover=method)


def test_pruning_distils_as_the_setting_says(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, str]] = []

    def noted(*_: Any, settings: dict[str, str], **__: Any) -> None:
        seen.append(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["shallower.verbs.prune"], "prune", noted)
    for given in (["--distill", "0.9"], ["--set", "distill=0.9"], ["--distill", "0.9", "--set", "distill=0.9"]):
        CliRunner().invoke(app, ["prune", "m", "--remove", "1", "--out", "o", "--recover", "full", *given])
    assert seen == [{"distill": "0.9"}] * 3


def test_processes_that_were_launched_together_give_what_one_gives(files: Path, start_together: Any) -> None:
    words = ["recover", files / "pruned", "--teacher", files / "dense", "--with", "refit,full", "--json"]
    words += ["--calibration", files / "text.jsonl", "--sequences", 16, "--length", 32, "--train-sequences", 64]
    words += ["--window", 64, "--windows", 3, "--dtype", "float32", "--set", "distill=0.5"]
    words += [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
    words = [str(word) for word in words]
    one, other = start_together("-m", "shallower", *words, "--out", str(files / "together"))
    assert (one[0], other[0]) == (0, 0), (one, other)
    assert other[1:] == ("", "")  # one speaks for all
    assert json.loads(one[1])["recovery"][-1]["tokens"] == 64 * 32
    assert CliRunner().invoke(app, [*words, "--out", str(files / "alone")]).exit_code == 0
    alone, together = (AutoModelForCausalLM.from_pretrained(files / name) for name in ("alone", "together"))
    for mine, theirs in zip(alone.parameters(), together.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert not list(files.glob(".*"))


def test_processes_do_not_train_what_they_cannot_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recoveries, "world_size", lambda: 2)
    given: dict[str, Any] = {"training": None, "resume": None, "measure": lambda _: {}, "seed": 0, "memory": None}
    model = tiny_model("llama", blocks=2)
    model.__class__ = type("Typed", (type(model),), {"__module__": "typed_in"})
    asked: Any = SimpleNamespace(trained=True)
    with pytest.raises(ModelError, match=r"cannot be compared: hooks, .* adapters of peft, .* a class without a file"):
        recoveries.run_recoveries(
            open_subject(model), open_subject(model), frozenset(), [(asked, {})], sample_text(model), **given
        )


def test_a_kill_in_the_training_after_a_repair_resumes(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def command(out: str, **changed: str) -> torch.Tensor:
        settings = {**SMALL, "save_minutes": "0", "evaluations": "0", **changed}
        found = recover(
            files / "dense", "refit,full", plan=files / "plan.json", out=files / out, **asked(files, settings=settings)
        )
        return full_logits(found.model, torch.arange(3, 27)[None])

    whole = command("whole")
    taken: list[int] = []
    step = loop._Loop._step

    def interrupted(self: Any, share: float) -> str:
        taken.append(self.state.step)
        if len(taken) == 10:
            raise KeyboardInterrupt
        return step(self, share)

    monkeypatch.setattr(loop._Loop, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command("out")
    assert not (files / "out").exists()
    command("other", lr="0.001")  # another command does not go on with this one's state
    assert taken[10] == 0
    del taken[10:]
    assert torch.equal(command("out"), whole)
    assert taken[10:] == list(range(9, 16))
    assert not list(files.glob(".*"))


def test_an_unfinished_training_in_another_number_format_is_told_of(
    files: Path, monkeypatch: pytest.MonkeyPatch, notes: list[str]
) -> None:
    settings = {**SMALL, "compute": "auto", "save_minutes": "0", "evaluations": "0"}
    given = {"plan": files / "plan.json", "out": files / "out", **asked(files, settings=settings)}
    taken = _steps(monkeypatch, dies_at=5)
    for _ in range(2):
        taken.clear()
        with pytest.raises(KeyboardInterrupt):
            recover(files / "dense", "full", **{**given, "dtype": "bfloat16"})
    assert not any("begins anew" in note for note in notes)
    taken.clear()
    with pytest.raises(KeyboardInterrupt):
        recover(files / "dense", "full", **{**given, "dtype": "float32"})
    [note] = [note for note in notes if "begins anew" in note]
    assert "another number format" in note


def _steps(monkeypatch: pytest.MonkeyPatch, dies_at: int = 0) -> list[int]:
    """Numbers of the steps that trainings take from now on; the one with this number, counted from 1, is not taken."""
    taken: list[int] = []
    step = loop._Loop._step

    def counted(self: Any, share: float) -> str:
        taken.append(self.state.step)
        if len(taken) == dies_at:
            raise KeyboardInterrupt
        return step(self, share)

    monkeypatch.setattr(loop._Loop, "_step", counted)
    return taken


def test_a_disk_that_is_full_at_the_end_costs_no_training(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def command() -> torch.Tensor:
        found = recover(files / "pruned", "refit,full", teacher=files / "dense", out=files / "out", **asked(files))
        return full_logits(found.model, torch.arange(3, 27)[None])

    def full(*_: Any, **__: Any) -> None:
        raise OutputError("the disk is full.")

    with monkeypatch.context() as patch:
        patch.setattr(verb, "save", full)
        with pytest.raises(OutputError):
            command()
    taken = _steps(monkeypatch)
    again = command()
    assert not taken
    assert not list(files.glob(".*"))
    whole = recover(files / "pruned", "refit,full", teacher=files / "dense", **asked(files))
    assert torch.equal(again, full_logits(whole.model, torch.arange(3, 27)[None]))


def test_of_two_trainings_the_first_is_not_done_again(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def command(out: str) -> torch.Tensor:
        settings = {**SMALL, "save_minutes": "0", "rank": "2"}
        given = asked(files, settings=settings)
        found = recover(files / "pruned", "full,lora", teacher=files / "dense", out=files / out, **given)
        return full_logits(found.model, torch.arange(3, 27)[None])

    whole = command("whole")
    with monkeypatch.context() as patch:
        _steps(patch, dies_at=16 + 5)
        with pytest.raises(KeyboardInterrupt):
            command("out")
    taken = _steps(monkeypatch)
    assert torch.equal(command("out"), whole)
    assert taken == list(range(4, 16))


@pytest.mark.parametrize(
    ("methods", "settings", "said"),
    [
        ("full", {"temperature": "2"}, "nothing reads temperature without distill"),
        ("refit,lora", {"teacher_cache": "1MB"}, "nothing reads teacher_cache without distill"),
        ("low-rank-trained", {"by": "mse", "hidden": "0.5"}, "nothing reads hidden with by=mse"),
        ("low-rank-trained", {"by": "mse", "recompute": "true"}, "nothing reads recompute with by=mse"),
        ("low-rank-trained", {"by": "nll", "temperature": "2"}, "nothing reads temperature with by=nll"),
        ("lora", {"patience": "2", "evaluations": "0"}, "nothing reads patience with evaluations=0"),
        ("low-rank-trained", {"by": "mse", "patience": "2", "evaluations": "0"}, "nothing reads patience with eval"),
        ("refit", {"sublayers": "attn"}, "nothing reads sublayers with reach=cuts: leave it out, or change that"),
        ("refit,full", {"sublayers": "mlp"}, "nothing reads sublayers with reach=cuts"),
    ],
)
def test_a_setting_that_nothing_reads_is_refused(methods: str, settings: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_recoveries(methods, settings)


def test_a_setting_that_one_of_several_reads_or_that_is_the_default_is_not_refused() -> None:
    parse_recoveries("low-rank-trained,full", {"temperature": "2"})
    parse_recoveries("full", {"temperature": "2", "distill": "0.5"})
    parse_recoveries("low-rank-trained", {"by": "mse", "temperature": "1"})
    parse_recoveries("refit", {"sublayers": "attn", "reach": "rest"})
    parse_recoveries("full", {"patience": "2"})


def test_a_setting_that_the_repair_of_a_search_does_not_read_is_refused(files: Path) -> None:
    with pytest.raises(UserError, match="nothing reads sublayers with reach=cuts"):
        search(files / "dense", 1, repair="refit", settings={"sublayers": "attn"})


def test_where_nothing_is_held_out_a_note_says_so_and_nothing_can_stop_by_it(files: Path) -> None:
    given = asked(files, settings={**SMALL, "epochs": "0.2"})
    ready = sample_text(tiny_model("llama"), sequences=16, padded=False)
    for text, name in ((f"{files / 'text.jsonl'}?part=all", r"text\.jsonl\?part=all"), (ready, "the calibration set")):
        sequences = {} if text is ready else {"train_sequences": 16}
        few = {**given, "calibration": text, "train_sequences": None, **sequences}
        found = recover(files / "pruned", "full", teacher=files / "dense", **few)
        said = f"^all of {name} may be trained on, as nothing of it is held out .* weights are those that the training"
        assert any(re.match(said, note) for note in found.notes)
        few["settings"] = {**SMALL, "patience": "1"}
        with pytest.raises(UserError, match=r"patience=1 stops full when .* and nothing is held out: leave it out"):
            recover(files / "pruned", "full", teacher=files / "dense", **few)
    few = recover(files / "pruned", "full", teacher=files / "dense", **given)
    assert not any("held out to measure by" in note for note in few.notes)


def test_an_option_that_search_and_recovery_have_is_for_both() -> None:
    steps, others = split_settings("full", {"temperature": "2", "lr": "0.1"}, "greedy", "kl")
    assert (steps[0][1]["temperature"], steps[0][1]["lr"], others) == (2.0, 0.1, {"temperature": "2"})


@pytest.mark.parametrize("method", ["low-rank", "low-rank-trained"])
def test_maps_that_could_not_be_saved_are_refused_before_they_are_made(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = _steps(monkeypatch)

    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("a map was fitted")

    monkeypatch.setattr("shallower.recovery.Repair.samples", read)
    model, text = tiny_model("gpt_neox"), sample_text(tiny_model("gpt_neox"), sequences=8)
    made = MadeBy(None, None, None, {}, 0, None, "0")
    removed = parse_units("attn.2")
    plan = PruningPlan(open_subject(model).identity, removed, ((removed[0], None),), None, made)
    with pytest.raises(ModelError, match="could not be saved"):
        recover(model, method, plan=plan, calibration=text, tokenizer=tiny_tokenizer(), out=tmp_path / "out")
    assert not taken


def test_prune_trains_what_it_cut(files: Path) -> None:
    pruned = prune(
        files / "dense",
        "block.2-3",
        recover="refit,lora",
        settings={**SMALL, "rank": "4", "ridge": "0.1"},
        out=files / "out",
        speed=False,
        **{key: value for key, value in asked(files).items() if key != "settings"} | {"train_sequences": 40},
    )
    assert [stage.method for stage in pruned.report.recovery] == ["cut", "refit", "lora"]
    assert [row["step"] for row in pruned.report.recovery[2].curve] == [0, 20, 40]
    assert all(row["held_out"] > 1 for row in pruned.report.recovery[2].curve)
    page = (files / "out" / "report.html").read_text()
    assert "While lora trained" in page
    again = ReportData.from_json(json.loads((files / "out" / "report.json").read_text()))
    assert again.recovery == pruned.report.recovery
    assert again.recovery[2].options["rank"] == 4
    made = again.recovery_made_by
    assert made is not None
    assert made.calibration is not None
    assert made.training is not None
    assert made.training.digest != made.calibration.digest
    assert any(note.startswith("lora: ") for note in pruned.report.notes)
    loaded = AutoModelForCausalLM.from_pretrained(files / "out", dtype=torch.float32)
    ids = torch.arange(3, 27)[None]
    assert torch.allclose(full_logits(loaded, ids), full_logits(pruned.model, ids), atol=1e-5)


@pytest.mark.parametrize(
    ("methods", "settings", "kind", "added"),
    [
        ("linear-fold", ["ridge=0.1"], "LlamaForCausalLM", [0]),
        ("low-rank,lora", ["rank=3", "lr=0.003", "batch=128", "at_once=128"], "ShallowForCausalLM", [256, 0]),
    ],
)
def test_what_prune_repairs_is_in_the_folder(
    files: Path, methods: str, settings: list[str], kind: str, added: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where adapters were trained on a model with maps at its cuts."""
    kept = []
    verb = sys.modules["shallower.verbs.prune"]
    monkeypatch.setattr(verb, "prune", lambda *args, **how: kept.append(prune(*args, **how)) or kept[0])
    given = ["prune", files / "dense", "--remove", "block.2-3", "--recover", methods, "--out", files / "out", "--quiet"]
    given += ["--calibration", files / "text.jsonl", "--sequences", 16, "--length", 32]
    given += ["--train-sequences", 4] if "lora" in methods else []
    given += ["--window", 64, "--windows", 2, "--no-speed", "--dtype", "float32"]
    for setting in settings:
        given += ["--set", setting]
    ran = CliRunner().invoke(app, [str(item) for item in given])
    assert ran.exit_code == 0, ran.output
    [pruned] = kept
    assert [stage.method for stage in pruned.report.recovery] == ["cut", *methods.split(",")]
    assert [stage.parameters for stage in pruned.report.recovery[1:]] == added
    loaded = AutoModelForCausalLM.from_pretrained(files / "out", dtype=torch.float32, trust_remote_code=True)
    assert type(loaded).__name__ == kind
    ids = torch.arange(3, 27)[None]
    found = full_logits(loaded, ids)
    assert torch.allclose(found, full_logits(pruned.model, ids), atol=1e-5)
    dense = dissect(tiny_model("llama"))
    assert not torch.allclose(found, full_logits(cut(dense, parse_units("block.2-3")), ids), atol=1e-3)
    before, own = dense.model.model.layers[0].self_attn.q_proj.weight, loaded.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(own, before) == ("lora" not in methods)


def test_text_that_was_read_and_is_evaluated_is_noted_and_texts_of_one_name_are_told_apart(files: Path) -> None:
    (files / "other").mkdir()
    (files / "other" / "text.jsonl").write_text(json.dumps({"text": "Nobody has seen one of these dogs before. " * 40}))
    texts = [str(files / "text.jsonl"), str(files / "other" / "text.jsonl")]
    given = {**asked(files), "train_sequences": 40, "texts": texts, "settings": {**SMALL, "epochs": "0.1"}}
    found = recover(files / "pruned", "refit,full", teacher=files / "dense", **given)
    pruned = prune(files / "dense", plan=files / "plan.json", recover="refit,full", speed=False, **given)
    for stage in (*found.stages, *pruned.report.recovery):
        assert list(stage.perplexity) == [f"{files.name}/text.jsonl", "other/text.jsonl"]
    assert set(pruned.report.pruned.perplexity) == set(stage.perplexity)
    seen, _ = stage.perplexity
    for notes, model in ((found.notes, "repaired"), (pruned.report.notes, "pruned")):
        told = [note for note in notes if "runs of 13 tokens" in note]
        assert all(note.startswith(f"{seen} shares ") and note.endswith(f"the {model} model.") for note in told)
        assert [note for note in told if "with the text of the repair" in note]
        assert [note for note in told if "with the training text" in note]
    by_training = recover(files / "pruned", "full", teacher=files / "dense", **given).notes
    assert not any("text of the repair" in note for note in by_training)  # which nothing was fitted on
    assert [note for note in by_training if "with the training text" in note]


def test_evaluating_what_was_healed_tells_of_overlap_with_all_that_its_repairs_read(files: Path) -> None:
    rows = [
        json.dumps({"text": f"A dog ran past {n} old barns and found {n * 3} bones there. " * 24}) for n in range(60)
    ]
    (files / "first.jsonl").write_text("\n".join(rows))
    (files / "fresh.txt").write_text("Nobody has seen one of these dogs before. " * 40)
    settings = {**SMALL, "epochs": "0.1"}
    earlier = asked(files, trains=False, calibration=str(files / "first.jsonl"))
    recover(files / "pruned", "refit", teacher=files / "dense", out=files / "once", **earlier)
    recover(files / "once", "refit,full", teacher=files / "dense", out=files / "out", **asked(files, settings=settings))

    def notes() -> list[str]:
        texts = [str(files / name) for name in ("first.jsonl", "text.jsonl", "fresh.txt")]
        return list(evaluate([files / "out"], texts, window=64, max_windows=20, dtype="float32").notes)

    shared = [re.sub(r"\d+ of \d+", "some", note) for note in notes()]
    assert shared == [
        f"{text} shares some runs of 13 tokens with {what} {text}: its perplexity flatters what was made with it."
        for text, what in (
            ("first.jsonl", "the text of its repair"),
            ("text.jsonl", "the text of its repair"),
            ("text.jsonl", "its training text"),
        )
    ]
    (files / "first.jsonl").write_text("\n".join(reversed(rows)).replace("dog", "wolf"))
    kept = (files / "text.jsonl").read_bytes()
    (files / "text.jsonl").write_text(json.dumps({"text": "No cat."}))
    unknown = [note for note in notes() if "is in what is evaluated is not known" in note]
    assert [note.partition("?")[0] for note in unknown] == [
        "out: whether the text of its repair text.jsonl",
        "out: whether its training text text.jsonl",
        "out: whether the text of its repair first.jsonl",
    ]
    assert unknown[2].endswith("(it is not what it was).")
    (files / "text.jsonl").write_bytes(kept)
    assert len([note for note in notes() if "shares" in note]) == 2


def test_where_the_weights_were_chosen_by_what_is_shown_a_note_says_so(files: Path) -> None:
    (files / "other.txt").write_text("Nobody has seen one of these dogs before. " * 400)
    given = {**asked(files), "train_sequences": 40, "settings": {**SMALL, "epochs": "0.1", "rank": "2"}}
    note = (
        "the weights kept of full and lora were chosen by perplexity on text.jsonl?part=held-out, so it flatters them"
    )

    def told(notes: Sequence[str]) -> list[str]:
        return [found for found in notes if "chosen by perplexity" in found]

    found = recover(files / "pruned", "full,lora", teacher=files / "dense", out=files / "out", **given)
    assert told(found.notes) == [f"{note}: measure on other text (--text)."]
    assert told(json.loads((files / "out" / "recovery.json").read_text())["notes"]) == told(found.notes)
    pruned = prune(files / "dense", plan=files / "plan.json", recover="full,lora", speed=False, **given)
    assert told(pruned.report.notes) == told(found.notes)
    elsewhere = {**given, "texts": [str(files / "other.txt")]}
    assert not told(recover(files / "pruned", "full,lora", teacher=files / "dense", **elsewhere).notes)
    named = {**given, "texts": [*elsewhere["texts"], f"{files / 'text.jsonl'}?part=held-out"]}
    assert told(recover(files / "pruned", "full,lora", teacher=files / "dense", **named).notes) == told(found.notes)
    assert not told(recover(files / "pruned", "refit", teacher=files / "dense", **asked(files, trains=False)).notes)


def test_sublayers_that_are_missing_alone_are_repaired_and_trained_too(files: Path) -> None:
    pruned = prune(
        files / "dense",
        "attn.2,mlp.4",
        recover="refit,full",
        settings={**SMALL, "reach": "cuts"},
        out=files / "out",
        speed=False,
        **{key: value for key, value in asked(files).items() if key != "settings"} | {"train_sequences": 40},
    )
    assert pruned.report.form == "packaged"
    loaded = AutoModelForCausalLM.from_pretrained(files / "out", dtype=torch.float32, trust_remote_code=True)
    ids = torch.arange(3, 27)[None]
    assert torch.allclose(full_logits(loaded, ids), full_logits(pruned.model, ids), atol=1e-5)


def test_conversations_are_trained_on_and_measured_by(files: Path) -> None:
    rows = [{"instruction": f"Say {n}.", "output": f"It is {n}."} for n in range(80)]
    (files / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = asked(files, train_sequences=80, length=96) | {"instructions": files / "chat.jsonl"}
    [_, stage] = recover(files / "pruned", "full", teacher=files / "dense", out=files / "out", **given).stages
    first, *_, last = stage.curve
    assert last["held_out"] < first["held_out"]
    assert stage.tokens < 76 * 96
    (files / "fresh.txt").write_text("Nobody has seen one of these dogs before. " * 40)
    (files / "out" / "report.json").write_text("[]")  # of something else; recovery.json is what is asked

    def unknown() -> list[str]:
        notes = evaluate([files / "out"], [str(files / "fresh.txt")], window=64, max_windows=20, dtype="float32").notes
        return [note for note in notes if "is not known" in note]

    [note] = unknown()
    assert note.startswith("out: whether its training text chat.jsonl?instructions=true")
    assert note.endswith("(conversations that trained a model are not read again).")
    (files / "out" / "recovery.json").unlink()
    [note] = unknown()
    assert re.search(r"whether what is evaluated was trained on is not known \(.*report.json.*cannot be read", note)


def test_calibration_text_that_conversations_leave_unread_is_refused(files: Path) -> None:
    (files / "fresh.txt").write_text("Nobody has seen one of these dogs before. " * 40)

    def healed(conversations: int, methods: str = "full", **given: Any) -> Any:
        rows = [{"instruction": f"Say {n}.", "output": f"It is {n}."} for n in range(conversations)]
        (files / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        few = asked(files, train_sequences=conversations, length=96, settings={**SMALL, "epochs": "0.2"}, **given)
        few |= {"instructions": files / "chat.jsonl", "texts": [str(files / "fresh.txt")]}
        return recover(files / "pruned", methods, teacher=files / "dense", **few)

    with pytest.raises(UserError, match=r"nothing reads the calibration text none\.jsonl: conversations"):
        healed(80, calibration="none.jsonl")
    healed(80, calibration=None)
    healed(79)  # too few to keep some: the weights are chosen by what calibration left out
    healed(80, "refit,full")


def test_it_is_said_how_many_conversations_are_used(files: Path) -> None:
    words = {3: "A long story. " * 40, 60: "Another. " * 90}
    rows = [{"instruction": f"Say {n}.", "output": words.get(n, f"It is {n}.")} for n in range(70)]

    def write() -> None:
        (files / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    write()
    settings = {**SMALL, "epochs": "0.1"}

    def notes(most: int, length: int) -> list[str]:
        given = asked(files, train_sequences=most, length=length, settings=settings)
        told = recover(
            files / "pruned", "full", teacher=files / "dense", instructions=files / "chat.jsonl", **given
        ).notes
        assert any(
            re.match(r"all \d+ conversations are trained on, as 80 or more, not all alike,", note) for note in told
        )
        return [note for note in told if "are used" in note]

    assert notes(80, 1000) == []
    assert notes(80, 96) == [
        "68 of the first 70 conversations of chat.jsonl are used; longer than 96 tokens (--length): 2."
    ]
    assert notes(20, 96) == [
        "20 of the first 21 conversations of chat.jsonl are used; longer than 96 tokens (--length): 1; what follows is "
        "not read (--train-sequences 20)."
    ]
    rows.insert(1, {"instruction": "Say nothing.", "output": ""})
    write()
    assert notes(80, 96) == [
        "68 of the first 71 conversations of chat.jsonl are used; longer than 96 tokens (--length): 2; without an "
        "answer: 1."
    ]


def test_pruning_repairs_and_trains_on_longer_text_where_asked(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, int]] = []
    build = calibrate.build_calibration

    def noted(spec: str, tokenizer: Any, **given: Any) -> Any:
        read.append((given["sequences"], given["length"]))
        return build(spec, tokenizer, **given)

    monkeypatch.setattr(calibrate, "build_calibration", noted)

    def sizes(sequences: int, length: int) -> list[tuple[int, int]]:
        given = asked(files, sequences=sequences, length=length, train_sequences=4, settings={**SMALL, "epochs": "0.1"})
        read.clear()
        prune(files / "dense", plan=files / "plan.json", recover="refit,full", speed=False, **given)
        return list(read)

    assert sizes(16, 32) == [(16, 32), (128, 256), (4, 256)]
    assert sizes(130, 260) == [(130, 260), (130, 260), (4, 260)]
    narrow = json.loads((files / "dense" / "config.json").read_text()) | {"max_position_embeddings": 200}
    (files / "dense" / "config.json").write_text(json.dumps(narrow))
    assert sizes(16, 32) == [(16, 32), (128, 200), (4, 200)]
    (files / "text.jsonl").write_text("".join(json.dumps({"text": "A cat and a dog. " * 40}) + "\n" for _ in range(9)))
    with pytest.raises(
        TooLittleText,
        match=r"but 128 sequences of 200 need .*, as a repair in prune reads: "
        r"write .*text\.jsonl\?sequences=21, or repair with 'shallower recover', which can do with less\.$",
    ):
        sizes(1, 32)
    given = asked(files, trains=False, calibration=f"{files / 'text.jsonl'}?sequences=21")
    assert prune(files / "dense", plan=files / "plan.json", recover="refit", speed=False, **given).report.recovery


def test_trained_maps_are_saved_in_place_of_a_block(files: Path) -> None:
    found = recover(files / "pruned", "low-rank-trained", teacher=files / "dense", out=files / "out", **asked(files))
    loaded = AutoModelForCausalLM.from_pretrained(files / "out", dtype=torch.float32, trust_remote_code=True)
    ids = torch.arange(3, 27)[None]
    assert torch.allclose(full_logits(loaded, ids), full_logits(found.model, ids), atol=1e-5)
    assert loaded.config.num_hidden_layers == found.model.config.num_hidden_layers + 1


def test_a_bias_alone_is_trained_and_saved(files: Path) -> None:
    few = asked(files, settings={**SMALL, "rank": "0", "lr": "0.01"}, train_sequences=64)
    found = recover(files / "pruned", "low-rank-trained", teacher=files / "dense", out=files / "out", **few)
    [(_, patch)] = patches(found.model)
    assert patch.rank == 0
    assert float(patch.bias.detach().abs().max()) > 0.01, found.stages[1].curve
    hidden = found.model.config.hidden_size
    assert found.stages[1].parameters == hidden
    loaded = AutoModelForCausalLM.from_pretrained(files / "out", dtype=torch.float32, trust_remote_code=True)
    ids = torch.arange(3, 27)[None]
    assert torch.allclose(full_logits(loaded, ids), full_logits(found.model, ids), atol=1e-5)
    assert sum(p.numel() for p in loaded.parameters()) == hidden + sum(
        p.numel() for p in cut(dissect(tiny_model("llama")), parse_units("block.2-3")).parameters()
    )


def test_a_checkpoint_with_maps_is_trained_further_but_not_repaired_again(files: Path) -> None:
    few = asked(files, trains=False)
    prune(files / "dense", "attn.2", recover="low-rank", out=files / "mapped", speed=False, **few)
    for again in ("refit", "low-rank", "low-rank-trained", "full,refit"):
        with pytest.raises(PlanError, match=r"has maps .* trained further .* not repaired again by (refit|low-rank)"):
            recover(files / "mapped", again, teacher=files / "dense", **{**few, "sequences": None})
    found = recover(files / "mapped", "full", teacher=files / "dense", out=files / "out", **asked(files))
    loaded = AutoModelForCausalLM.from_pretrained(files / "out", dtype=torch.float32, trust_remote_code=True)
    ids = torch.arange(3, 27)[None]
    assert torch.allclose(full_logits(loaded, ids), full_logits(found.model, ids), atol=1e-5)


def test_all_of_a_text_is_trained_on_where_it_is_shorter_than_usual(files: Path) -> None:
    given = asked(files, train_sequences=None, length=128, settings={**SMALL, "epochs": "0.01"})
    given["calibration"] = f"{files / 'text.jsonl'}*0.75+{files / 'text.jsonl'}*0.25?part=train"
    done = recover(files / "pruned", "full", teacher=files / "dense", **given)
    [told] = [note for note in done.notes if "all that the text holds" in note]
    most = int(re.match(r"training reads ([\d,]+) sequences of 128 tokens", told)[1].replace(",", ""))
    assert 1 < most < TRAIN_SEQUENCES
    recover(files / "pruned", "full", teacher=files / "dense", **{**given, "train_sequences": most})
    with pytest.raises(UserError, match="use --train-sequences"):
        recover(files / "pruned", "full", teacher=files / "dense", **{**given, "train_sequences": most + 4})


def test_what_is_not_there_or_not_shown_is_said(files: Path) -> None:
    with pytest.raises(ModelError, match="no-such-folder"):
        recover(files / "no-such-folder", "refit", teacher=files / "dense", **asked(files, trains=False))
    whole = str(files / "text.jsonl") + "?part=all"
    done = recover(files / "pruned", "refit", teacher=files / "dense", **asked(files, trains=False, calibration=whole))
    assert any(re.search(r"no perplexity: nothing of text\.jsonl\?part=all is held out", note) for note in done.notes)


def test_what_only_trains_needs_no_text_of_a_repair(files: Path) -> None:
    given = asked(files, train_sequences=None, settings={**SMALL, "epochs": "0.01"})
    done = recover(files / "pruned", "full", teacher=files / "dense", **given)
    assert done.made_by.calibration is None
    with pytest.raises(UserError, match=r"holds .* tokens, but 1,000,000 sequences"):
        recover(files / "pruned", "refit,full", teacher=files / "dense", sequences=10**6, **given)


def test_what_another_training_left_stays_where_nothing_is_trained(tmp_path: Path) -> None:
    left = tmp_path / ".out.training" / "another" / "state-3"
    left.mkdir(parents=True)
    Resume(tmp_path / "out").clear()
    assert left.is_dir()
    resume = Resume(tmp_path / "out")
    resume.folder("one that trains")
    resume.clear()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"methods": "refit", "instructions": "text.jsonl"}, UserError, "--instructions is for recoveries that train"),
        (
            {"methods": "refit", "train_sequences": 4096},
            UserError,
            "--train-sequences is for recoveries that train, such as full or lora: name one, or drop it",
        ),
        (
            {"methods": "refit", "train_sequences": 9, "instructions": "text.jsonl"},
            UserError,
            "--train-sequences and --instructions are for recoveries that train, .*: name one, or drop them",
        ),
        (
            {"methods": "full", "sequences": 16},
            UserError,
            "--sequences is for recoveries in closed form, .*, and all that are named train: .* by --train-sequences",
        ),
        ({"methods": "full", "memory": "1GB"}, UserError, "--memory is for recoveries in closed"),
        ({"methods": "refit,full", "train_sequences": 10**6}, UserError, "use --train-sequences"),
        ({"methods": "full", "dtype": "bfloat16"}, UserError, "compute=float32 needs the model in float32"),
        ({"methods": "full", "settings": {**SMALL, "lr": "-1"}}, UserError, "lr=-1.0 is not above 0"),
    ],
)
def test_what_a_user_may_get_wrong(files: Path, change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"trains": change["methods"] != "refit", **change}
    for name in ("instructions", "out"):
        if name in given:
            given[name] = files / given[name]
    with pytest.raises(error, match=message):
        recover(files / "pruned", given.pop("methods"), teacher=files / "dense", **asked(files, **given))
    assert not (files / "out").exists()
    with pytest.raises(UserError, match="full is trained"):
        search(files / "dense", 1, repair="full", dtype="float32")
    with pytest.raises(UserError, match="a padded checkpoint has no place"):
        prune(files / "dense", "attn.2", recover="refit", form="padded")
    with pytest.raises(UserError, match="--train-sequences is for recoveries that train"):
        prune(files / "dense", "attn.2", train_sequences=9)
    prune(files / "dense", "attn.2", form="padded", out=files / "padded", speed=False, dtype="float32")
    for method in ("full", "refit"):
        with pytest.raises(ModelError, match=r"padded is padded: attn.2 are in it with .*the plan instead \(--plan"):
            recover(files / "padded", method, teacher=files / "dense", **asked(files, trains=method == "full"))
    with pytest.raises(UserError, match="--memory is for recoveries in closed form"):
        prune(files / "dense", plan=files / "plan.json", recover="full", memory="1MB")
    with pytest.raises(UserError, match="the settings ridge would change nothing"):
        prune(files / "dense", plan=files / "plan.json", settings={"ridge": "0.1"})


@pytest.mark.parametrize(
    ("methods", "settings", "error", "said"),
    [
        ("refit,full", {"batch": "100000"}, CorpusError, "too few for one step of batch=100000"),
        ("refit,full", {"first": "6"}, UserError, "first=6, but the model has only"),
        ("refit,lora", {"rank": "0"}, UserError, "rank='0' does not fit: it takes a whole number above 0"),
        ("refit,lora", {"dropout": "1"}, UserError, "dropout='1' .* a finite number of at least 0 and below 1"),
        ("refit,full", {"distill": "0.5", "teacher_cache": "1kB"}, UserError, "teacher_cache of 0.0 MB holds 0 words"),
        ("refit,full", {"temperature": "2"}, UserError, "nothing reads temperature without distill"),
        ("refit,full", {"ridge": "-1"}, UserError, "ridge='-1' does not fit"),
        ("refit,full", {"sinks": "-1"}, UserError, "sinks='-1' does not fit"),
        ("low-rank,full", {"rank": "-1"}, UserError, "rank='-1' does not fit"),
        ("low-rank,full", {"energy": "2"}, UserError, "energy='2' does not fit"),
        ("refit,full", {"first": "-2"}, UserError, "first='-2' does not fit"),
        ("refit,full", {"weight_decay": "inf"}, UserError, "weight_decay='inf' does not fit"),
        ("refit,lora", {"alpha": "nan"}, UserError, "alpha='nan' does not fit"),
        (
            "refit,full",
            {"distill": "0.9", "hidden": "0.5", "teacher_cache": "1MB"},
            UserError,
            "teacher_cache=1MB holds no hidden states, which hidden=0.5 compares",
        ),
        (
            "refit,low-rank-trained",
            {"by": "mse"},
            UserError,
            "by=mse needs the cut model that nothing was repaired of, and in .* refit comes before",
        ),
    ],
)
@pytest.mark.parametrize("pruning", [False, True])
def test_what_cannot_be_trained_is_refused_before_anything_is_computed(
    pruning: bool,
    methods: str,
    settings: dict[str, str],
    error: type[Exception],
    said: str,
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def computed(*_: Any, **__: Any) -> None:
        raise AssertionError("something was computed")

    given = asked(files, settings={**SMALL, **settings})
    monkeypatch.setattr("shallower.verbs.prune._stream_metrics", computed)
    monkeypatch.setattr("shallower.recovery.Repair.samples", computed)
    monkeypatch.setattr(verb, "perplexities", computed)
    cut_first = {"recover": methods, "out": files / "out", **given}
    repairs = (
        partial(prune, files / "dense", 2, **cut_first)
        if pruning
        else partial(recover, files / "pruned", methods, teacher=files / "dense", **given)
    )
    with pytest.raises(error, match=said):
        repairs()


@pytest.mark.parametrize("cuts", [{"remove": 2}, {"remove": "33%"}, {"remove": "block.2-3"}, {"plan": "plan.json"}])
@pytest.mark.parametrize(
    ("methods", "settings", "said"),
    [
        ("refit,full", {"first": "4"}, "first=4, but the model has only 4 blocks"),
        ("refit,lora", {"first": "5"}, "first=5, but the model has only 4 blocks"),
    ],
)
def test_a_first_block_that_the_search_would_remove_is_refused_before_it(
    methods: str,
    settings: dict[str, str],
    said: str,
    cuts: dict[str, Any],
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def computed(*_: Any, **__: Any) -> None:
        raise AssertionError("something was computed")

    monkeypatch.setattr("shallower.verbs.prune._stream_metrics", computed)
    cuts = {**cuts, "plan": files / "plan.json"} if "plan" in cuts else cuts
    with pytest.raises(UserError, match=said):
        prune(files / "dense", recover=methods, **cuts, **asked(files, settings={**SMALL, **settings}))


@pytest.mark.parametrize("method", ["full", "lora", "low-rank-trained"])
@pytest.mark.parametrize("remove", ["2", "block.2-3"])
def test_a_disk_too_small_for_what_a_training_keeps_is_told_of_before_the_search(
    method: str, remove: str, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    early, late = list[int](), list[int]()
    given = asked(files, settings={**SMALL, "epochs": "0.1"}, max_windows=1)
    given |= {"sequences": 4, "recover": f"refit,{method}", "search": "last", "speed": False}
    with monkeypatch.context() as patched:
        patched.setattr("shallower.verbs.recoveries.require_room", lambda _, trained: early.append(trained))
        patched.setattr(loop, "require_room", lambda _, trained, unwritten: late.append(trained))
        prune(files / "dense", remove, **given)
    before_search, before_repair = early
    assert before_repair == late[0]
    if remove == "2" and method != "low-rank-trained":  # a search may remove more than it is asked for, by a block
        assert late[0] * 3 // 4 <= before_search < late[0]
    else:
        assert before_search == late[0]
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 1000}))
    for module in ("prune.search_plan", "prune._stream_metrics", "recoveries.Repair.samples"):
        monkeypatch.setattr(f"shallower.verbs.{module}", pytest.fail)
    said = r"needs 0\.\d\d GB for the state of the training and 0\.00 GB are free on that disk"
    with pytest.raises(OutputError, match=said):
        prune(files / "dense", remove, **given)
    if remove != "2":
        with pytest.raises(OutputError, match=said):
            recover(files / "pruned", f"refit,{method}", teacher=files / "dense", **asked(files))


def test_a_text_too_short_for_one_of_several_repairs_is_refused_before_the_first(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def computed(*_: Any, **__: Any) -> None:
        raise AssertionError("something was computed")

    monkeypatch.setattr("shallower.recovery.Repair.samples", computed)
    text = sample_text(
        tiny_model("llama"), sequences=2, padded=False
    )  # 48 tokens: enough for the stream, not for the MLP
    given = asked(files, trains=False, calibration=text)
    for repairs in (
        partial(recover, files / "pruned", "emulated-update,refit", teacher=files / "dense"),
        partial(prune, files / "dense", recover="emulated-update,refit", plan=files / "plan.json"),
    ):
        with pytest.raises(CorpusError, match=r"cannot fit the widest map of refit, which has \d+ inputs"):
            repairs(**given)


def _forbid_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded first")

    for module in ("recover", "prune"):
        monkeypatch.setattr(sys.modules[f"shallower.verbs.{module}"], "open_subject", loaded)


@pytest.mark.parametrize(
    ("methods", "version", "settings", "message"),
    [
        (
            "refit,full",
            None,
            {},
            r"spreads the model by FSDP 1, and full trains with FSDP 2 only: add --fsdp_version 2",
        ),
        ("lora", "1", {}, r"spreads the model by FSDP 1, and lora trains"),
        ("refit,full,qlora", "2", {}, r"qlora needs the whole model in every process, and --use_fsdp spreads it"),
        ("low-rank-trained,full", "2", {"by": "mse"}, r"by=mse needs the whole model in every process"),
    ],
)
def test_what_cannot_train_on_spread_weights_is_refused_before_anything_is_done(
    files: Path,
    methods: str,
    version: str | None,
    settings: dict[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _forbid_loading(monkeypatch)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.delenv("FSDP_VERSION", raising=False)
    if version is not None:
        monkeypatch.setenv("FSDP_VERSION", version)
    given = asked(files, settings=settings)
    with pytest.raises(UserError, match=message):
        prune(files / "dense", 1, recover=methods, **given)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=message):
        recover(files / "pruned", methods, teacher=files / "dense", **given)


@pytest.mark.parametrize(("methods", "version"), [("refit", "1"), ("full,lora,low-rank-trained", "2")])
def test_what_trains_on_spread_weights_or_not_at_all_is_not_refused(
    methods: str, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", version)
    require_launch(parse_recoveries(methods, {}))


@pytest.mark.parametrize("place", ["pruned", "dense"])
def test_a_model_that_is_read_is_not_written_over(files: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _forbid_loading(monkeypatch)
    given = {"out": files / place, "force": True, **asked(files)}
    with pytest.raises(OutputError, match="is the model itself"):
        recover(files / "pruned", "full", teacher=files / "dense", **given)
    with pytest.raises(OutputError, match="is the model itself"):
        prune(files / place, 1, recover="full", **given)
