"""`prune --recover`: the text that is read, what is kept and stored, and what is told of it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from shallower.anatomy import dissect
from shallower.errors import CorpusError, ModelError, OutputError, TooLittleText, UserError
from shallower.evaluation.perplexity import Perplexity
from shallower.reporting.data import ReportData
from shallower.surgery import save
from shallower.testing.families import tiny_model, tiny_tokenizer
from shallower.units import Unit
from shallower.verbs import texts
from shallower.verbs.prune import prune
from shallower.verbs.prune_texts import _Wanted, _wanted
from shallower.verbs.ratio_curve import ratio_curve
from shallower.verbs.recover import recover
from shallower.verbs.recovery_steps import parse_recoveries
from shallower.verbs.repairable import keep_repairable
from shallower.verbs.search import search
from shallower.verbs.subject import open_subject
from shallower.verbs.texts import held_out
from test_recover_verb import asked


def test_a_plan_is_applied_on_the_text_that_it_was_made_with(files: Path) -> None:
    text = files / "text.jsonl"
    shape = {"sequences": 6, "length": 40, "dtype": "float32"}
    plan = search(files / "dense", "attn.2", calibration=f"{text}?max_chars=1200", seed=3, **shape)
    apply = partial(prune, files / "dense", window=32, max_windows=1, speed=False, dtype="float32")

    def read(**given: Any) -> tuple[ReportData, str, list[str]]:
        report = apply(**{"plan": plan, **given}).report
        [scores] = report.influence
        return report, scores.made_by.calibration.spec, notes_on_text(report.notes)

    def notes_on_text(notes: Sequence[str]) -> list[str]:
        return [note for note in notes if "--calibration" in note]

    report, measured, notes = read()
    assert report.influence[0].made_by.calibration == plan.made_by.calibration
    assert list(report.pruned.perplexity) == ["text.jsonl?part=held-out"]
    assert notes == ["The calibration text is the plan's own, text.jsonl: name other text with --calibration."]
    assert read(seed=3)[1:] == (measured, notes)
    _, by_other_seed, notes = read(seed=0)
    assert by_other_seed == measured.replace("seed=3", "seed=0")
    assert notes[0].startswith("The calibration text is the plan's own, text.jsonl (by seed 0, not 3): name other")
    report, measured, _ = read(recover="low-rank", sequences=4)
    own = plan.made_by.calibration.spec
    assert measured == own.replace("sequences=6", "sequences=4")
    assert report.recovery_made_by.calibration.spec == own.replace("sequences=6&length=40", "sequences=128&length=256")
    _, measured, notes = read(calibration=str(text), sequences=2)
    assert "?sequences=2&length=128&seed=0&pack=true&bos=auto&part=train&max_chars=100000" in measured
    assert notes == []
    single = search(files / "dense", "attn.2", calibration=f"{text}?pack=false", **shape)
    with pytest.raises(
        TooLittleText, match=r"50 documents, .* can do with less\. The calibration text is the plan's own"
    ):
        read(plan=single, recover="low-rank")
    mend = partial(recover, files / "dense", "low-rank", window=32, max_windows=1, dtype="float32")
    mended = mend(plan=plan, sequences=4, length=40)
    assert mended.made_by.calibration.spec == own.replace("sequences=6", "sequences=4")
    assert notes_on_text(mended.notes) == notes_on_text(read()[0].notes) != []
    others = [mend(plan=plan, sequences=4, length=40, seed=seed).made_by for seed in (1, 2)]
    assert [made.seed for made in others] == [1, 2]
    assert len({made.calibration.digest for made in (mended.made_by, *others)}) == 3
    with pytest.raises(TooLittleText, match=r"50 documents, .*\. The calibration text is the plan's own"):
        mend(plan=single)


def test_of_a_plan_whose_text_cannot_be_had_the_usual_one_is_read(files: Path, notes: list[str]) -> None:
    dense = open_subject(files / "dense", dtype="float32")
    plan = search(dense, "attn.2", calibration=f"{files / 'text.jsonl'}?sequences=6&length=40")

    def asked_for(objective: str = "nll", repairs: bool = False, **recorded: str) -> _Wanted:
        calibration = replace(plan.made_by.calibration, **recorded)
        made_by = replace(plan.made_by, calibration=calibration, objective=objective)
        given = (dense, replace(plan, made_by=made_by), None, "nll", None, None, None)
        return _wanted(*given, repairs=repairs, has_held_out=False)

    for change, why in (
        ({"digest": "sha256:0"}, "text.jsonl, is not read (it is not what it was)"),
        ({"spec": "gone.jsonl?part=train"}, "gone.jsonl, is not read (no text at 'gone.jsonl'"),
        ({"spec": "ids of mine"}, "ids of mine, is not read ("),
        ({"objective": "task"}, "text.jsonl, is not read (it holds questions, which are no text to measure on)"),
        (
            {"spec": "self?sequences=6"},
            "self, is not read (the model wrote it, and nothing of it is held out to measure on)",
        ),
        ({"spec": f"{files / 'python'}?part=train"}, "python, is not read (no text at"),
    ):
        notes.clear()
        asked = asked_for(**change)
        assert (asked.calibration, asked.sequences, asked.length) == (None, 32, 128)
        assert list(asked.notes) == notes
        assert notes[0].startswith(f"The plan's own text, {why}")
        assert notes[0].endswith("), but the default, python: name other text with --calibration.")
        with pytest.raises(
            CorpusError, match=r"is not what the model would be repaired or trained on .* name .*--calib"
        ):
            asked_for(**change, repairs=True)
    of_another_python = asked_for(spec="python?part=train&sequences=2", repairs=True)
    assert (of_another_python.calibration, of_another_python.notes) == (None, ())


def test_a_plan_of_all_of_a_text_is_repaired_on_it_where_other_text_is_measured(files: Path) -> None:
    text = f"{files / 'text.jsonl'}?part=all"
    plan = search(files / "dense", "attn.2", calibration=text, sequences=6, length=40, dtype="float32")
    few = {"plan": plan, "sequences": 16, "length": 32, "window": 32, "max_windows": 1, "dtype": "float32"}
    mended = recover(files / "dense", "low-rank", texts=files / "text.jsonl", **few)
    pruned = prune(files / "dense", recover="low-rank", texts=files / "text.jsonl", speed=False, **few).report
    for read in (mended.made_by, pruned.recovery_made_by):
        assert (read.calibration.source, "part=all" in read.calibration.spec) == ("text.jsonl", True)
    for verb in (partial(recover, methods="low-rank"), partial(prune, recover="low-rank", speed=False)):
        with pytest.raises(CorpusError, match=r"is held out to measure on\): name text to measure on \(--text\), or "):
            verb(files / "dense", **few)


def test_whole_periods_can_go_though_no_single_block_can(files: Path, notes: list[str]) -> None:
    save(tiny_model("jamba", blocks=12), files / "jamba", plan=None, tokenizer=tiny_tokenizer())
    given = asked(files, sequences=2, max_windows=1, search="contiguous", protect="0-2", speed=False)
    found = prune(files / "jamba", 6, out=files / "out", **given)
    assert found.report.pruned.blocks == 6
    assert "may be impossible to store, as the model without block.7 is: jamba says" in " ".join(notes)


def test_card_and_report_count_a_map_alike(files: Path) -> None:
    found = prune(files / "dense", "block.1-2", recover="low-rank", out=files / "out", speed=False, **asked(files))
    card = (files / "out" / "README.md").read_text()
    held = sum(tensor.numel() for tensor in load_file(files / "out" / "model.safetensors").values())
    assert found.report.pruned.parameters == held
    blocks = found.report.pruned.blocks
    assert f"\n{blocks} blocks, 1 more that holds only a map, and {held:,} parameters are left of " in card
    assert f"| {found.report.dense.blocks} | {blocks} |" in card
    assert ", repaired by low-rank: perplexity" in (files / "out" / "report.html").read_text().replace("\u00a0", " ")


@pytest.mark.parametrize(
    ("units", "recover_by", "settings", "kept"),
    [
        ("all", "refit", {}, "attn.0"),
        ("block", "linear-fold", {}, "block.0"),
        ("all", "magnitude", {"per": "channel"}, "attn.0"),
        ("all", "magnitude", {}, ""),
        ("all", "refit", {"reach": "rest"}, ""),
    ],
)
def test_a_search_keeps_what_could_not_be_repaired(
    files: Path, units: str, recover_by: str, settings: dict[str, str], kept: str, notes: list[str]
) -> None:
    """The first block's weights are the smallest, so that it would go first."""
    wanted = {"remove": "50%:blocks", "units": units, "search": "one-shot", "metric": "magnitude"}
    done = prune(
        first_light(files / "light"), recover=recover_by, settings=settings, speed=False, **wanted, **asked(files)
    )
    assert (Unit.parse(kept or "attn.0") in done.plan.removed) is not bool(kept)
    assert any(kept in note and "as --protect first:1 does" in note for note in notes) is bool(kept)
    assert done.plan.made_by.options["protect"] == ("first:1" if kept else "")


def first_light(folder: Path) -> Path:
    """A model of whose first block the weights are so small that by their magnitude it goes first."""
    model = tiny_model("llama")
    for parameter in model.model.layers[0].parameters():
        parameter.data *= 0.01
    save(model, folder, plan=None, tokenizer=tiny_tokenizer())
    return folder


def test_what_no_recovery_can_repair_is_told_before_the_search(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tiny_model("gemma2"), files / "normed", plan=None, tokenizer=tiny_tokenizer())  # behind a norm, everywhere
    monkeypatch.setattr("shallower.verbs.prune.search_plan", pytest.fail)
    for remove, folder in (("2", "normed"), ("attn.0", "dense")):
        with pytest.raises(ModelError, match=r"use emulated-update or low-rank"):
            prune(files / folder, remove, recover="refit", speed=False, **asked(files))


@pytest.mark.parametrize("error", [ModelError, OutputError])
def test_a_refusal_after_the_search_names_what_was_chosen(
    error: type[UserError], files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise error("No.")

    monkeypatch.setattr("shallower.verbs.prune.require_place", refused)
    given = asked(files, out=files / "out", recover="low-rank", speed=False)
    with pytest.raises(error, match=r"^No\. The search had chosen block\.2-4: --remove block\.2-4 takes that"):
        prune(files / "dense", "3", search="last", **given)
    with pytest.raises(error, match=r"^No\.$"):
        prune(files / "dense", "block.2", **given)


def test_prune_recovers_in_one_command(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []
    measure = texts.perplexity

    def noted(*args: Any, label: str, **given: Any) -> Perplexity:
        measured.append(label)
        return measure(*args, label=label, **given)

    monkeypatch.setattr(texts, "perplexity", noted)
    pruned = prune(
        files / "dense",
        "block.2-3",
        recover="emulated-update,refit",
        settings={"ridge": "0.1"},
        out=files / "out",
        speed=False,
        **asked(files),
    )
    assert [stage.method for stage in pruned.report.recovery] == ["cut", "emulated-update", "refit"]
    last = pruned.report.recovery[-1].perplexity
    assert last == pytest.approx(dict(pruned.report.pruned.perplexity))
    assert len(measured) == 4  # the dense model, the cut one, and what each of the recoveries made of it
    written = open_subject(files / "out", dtype="float32")
    found = texts.perplexities(written, held_out(asked(files)["calibration"]), 64, 3)
    assert last == pytest.approx(texts.values(found), rel=1e-5)
    report = ReportData.load(files / "out" / "report.json")
    assert report.recovery == pruned.report.recovery
    assert report.recovery[2].options["ridge"] == 0.1
    assert report.recovery_made_by == pruned.report.recovery_made_by
    assert report.recovery_made_by is not None
    assert report.recovery_made_by.teacher == report.plan.model
    card = (files / "out" / "README.md").read_text()
    assert "What is left was then changed by emulated-update, refit" in card
    assert "not changed" not in card
    assert "\n| refit | " in card
    assert re.search(r"\n- `refit`: .*ridge = 0.1", card)
    assert "Recovery" in (files / "out" / "report.html").read_text()
    old = json.loads((files / "out" / "report.json").read_text())
    for stage in old["recovery"]:
        del stage["options"]
    assert [old[key] for key in ("dtype", "device", "window", "windows")] == ["float32", "cpu", 64, 3]
    for key in ("recovery_made_by", "device", "window", "windows"):
        del old[key]
    assert [stage.options for stage in ReportData.from_json(old).recovery] == [{}, {}, {}]
    faulty = {**json.loads((files / "out" / "report.json").read_text()), "recovery_made_by": {"seed": "0"}}
    with pytest.raises(UserError, match=r"'recovery_made_by' of the report lacks 'teacher'.*'seed' of .* is '0'"):
        ReportData.from_json(faulty)
    del old["recovery"]
    assert ReportData.from_json(old).recovery == ()


def test_a_cut_by_a_plan_that_was_chosen_behind_a_repair_says_that_none_was_made(files: Path) -> None:
    given = asked(files)
    text = {key: given[key] for key in ("calibration", "sequences", "length", "dtype")}
    told = {}
    for repair, recover_by in (("", ""), ("low-rank", ""), ("low-rank", "low-rank")):
        plan = search(files / "dense", "block.2", repair=repair, **text)
        notes = prune(files / "dense", plan=plan, recover=recover_by, speed=False, **given).report.notes
        told[repair, recover_by] = [note for note in notes if "was not repaired" in note]
    assert [len(notes) for notes in told.values()] == [0, 1, 0]
    assert told["low-rank", ""][0].endswith("Add --recover low-rank.")
    text_file = str(files / "text.jsonl")
    curve = ratio_curve(files / "dense", plan, texts=text_file, window=32, max_windows=1, dtype="float32")
    [note] = [note for note in curve.notes if "not repaired" in note]
    assert note.startswith("The plan was chosen by what low-rank makes of the cut (--repair), and its prefixes are not")
    assert "`shallower prune --recover low-rank` makes them." in note


def test_a_search_keeps_one_half_of_a_first_block_whose_halves_run_side_by_side() -> None:
    """Each alone leaves the other to be folded into, and a set of both leaves nothing."""
    dense, steps = dissect(tiny_model("gpt_neox")), parse_recoveries("refit", {})
    units = {kind: dense.of_kind(*kind) for kind in (("attn",), ("mlp",), ("attn", "mlp"))}
    assert [keep_repairable(dense, each, steps, "") for each in units.values()] == ["", "", "first:1"]
