"""Value types and their files: what they hold comes back the same, and what they refuse they refuse with a sentence."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shallower import errors, files, progress
from shallower.budget import Amount, Budget, Limit, make_limit, parse_protect, parse_remove
from shallower.corpus import CalibrationSet
from shallower.errors import BudgetError, OutputError, PlanError, UnknownName, UserError
from shallower.plan import CalibrationIdentity, MadeBy, ModelIdentity, PruningPlan, source_and_options, text_name
from shallower.scores import Score, Scores
from shallower.studies.grid import read_study
from shallower.surgery import save
from shallower.testing.families import tiny_model
from shallower.units import KINDS, Span, Unit, listed, parse_units, require_distinct, runs, sublayers_of
from shallower.verbs.subject import require_place_for

MODEL = ModelIdentity("tiny", "main", "sha256:" + "a" * 64, 30)
OTHER = ModelIdentity("other", None, "sha256:" + "b" * 64, 12)
MADE_BY = MadeBy(
    "greedy", "nll", None, {"remove": "2"}, 7, CalibrationIdentity("python:docs?length=64", 2048, "sha256:c"), "0.1.0"
)
PLAN = PruningPlan(
    MODEL,
    (Unit(13, "block"), Unit(22, "attn")),
    ((Unit(22, "attn"), 3.241), (Unit(13, "block"), None)),
    3.187,
    MADE_BY,
)
SCORES = Scores(
    MODEL,
    "cosine",
    (Score(Unit(0, "block"), 0.5, 0.01), Score(Unit(1, "attn"), 0.25), Score(Span(0, 2), 0.75, 0.02)),
    MADE_BY,
)

units = st.builds(Unit, st.integers(0, 29), st.sampled_from(KINDS))
removals = st.dictionaries(st.integers(0, 29), st.sampled_from(KINDS), min_size=1).map(
    lambda chosen: [Unit(index, kind) for index, kind in chosen.items()]
)
losses = st.none() | st.floats(allow_nan=False, allow_infinity=False)


# Units and spans


def test_lists_are_read_as_they_are_written() -> None:
    text = "block.1,block.3-5,attn.7-8,mlp.2"
    assert listed(reversed(parse_units(text))) == text
    assert listed(parse_units("attn.9,block.4,block.1,block.2"), ", ") == "block.1-2, block.4, attn.9"


@given(removals)
def test_every_removal_can_be_typed_as_it_is_told(removed: list[Unit]) -> None:
    assert sorted(parse_units(listed(removed))) == sorted(parse_units(listed(removed, ", "))) == sorted(removed)


def test_runs_are_the_spans_of_one_kind() -> None:
    assert runs(parse_units("block.1,block.2,block.4,attn.9"), "block") == (range(1, 3), range(4, 5))


@given(units)
def test_unit_reads_what_it_writes(unit: Unit) -> None:
    assert Unit.parse(str(unit)) == unit
    assert Unit.parse(f"  {unit}\n") == unit


@pytest.mark.parametrize("text", ["", "block", "block.", "block.-1", "block.1.5", "layer.3", "Block.3", "block 3", "7"])
def test_what_is_not_a_unit_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(BudgetError, match=r"is not a unit: write block\.7, attn\.7 or mlp\.7"):
        Unit.parse(text)


def test_units_are_ordered_by_depth() -> None:
    assert sorted([Unit(2, "attn"), Unit(1, "mlp"), Unit(1, "block"), Unit(1, "attn")]) == [
        Unit(1, "attn"),
        Unit(1, "block"),
        Unit(1, "mlp"),
        Unit(2, "attn"),
    ]


def test_a_list_of_units_may_hold_inclusive_ranges() -> None:
    assert [str(unit) for unit in parse_units("block.3-5, attn.7 ,")] == ["block.3", "block.4", "block.5", "attn.7"]
    assert parse_units("mlp.4-4") == (Unit(4, "mlp"),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("block.7,block.7", "block.7 is named twice"),
        ("block.3-5,block.4", "block.4 is named twice"),
        ("attn.7,block.7", "attn.7 is part of block.7"),
        ("block.6-8,mlp.8", "mlp.8 is part of block.8"),
        ("block.8-6", "ends before it starts"),
        ("block.3-10000000000", "'block.3-10000000000' has 9,999,999,998 units, and at most 10,000"),
        ("block.7;block.8", "is not a unit"),
        (f"block.{'9' * 5000}", "'block.9{194}'… is not a unit"),
        (f"block.0-{'9' * 5000}", "is not a unit"),
    ],
)
def test_lists_of_units_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        parse_units(text)


def test_both_sublayers_of_a_block_may_go() -> None:
    require_distinct([Unit(3, "attn"), Unit(3, "mlp")])


@given(st.integers(0, 50), st.integers(1, 50))
def test_span(start: int, length: int) -> None:
    span = Span(start, start + length)
    assert span.blocks == length
    assert [unit.index for unit in span.units] == list(range(start, start + length))
    assert str(span) == f"[{start},{start + length})"


@given(st.integers(0, 99), st.integers(1, 99))
def test_a_span_of_sublayers(start: int, length: int) -> None:
    """Place 2l is `attn.l`, place 2l + 1 `mlp.l`."""
    span = Span(start / 2, (start + length) / 2)
    assert [unit.reach[0] for unit in span.sublayers] == list(range(start, start + length))
    assert sublayers_of(span.units) == set(span.sublayers)
    assert [unit.kind for unit in span.units].count("block") == (start + length) // 2 - (start + 1) // 2
    model = {**SCORES.to_json()["model"], "blocks": 99}
    row = Scores.from_json(
        {**SCORES.to_json(), "model": model, "rows": [{"of": str(span), "value": 1.0, "error": None}]}
    ).rows[0]
    assert row.of == span
    assert str(row.of) == str(span) == f"[{start / 2:g},{(start + length) / 2:g})"


def test_a_span_that_ends_nowhere_is_refused() -> None:
    with pytest.raises(BudgetError, match="neither between blocks nor in mid-block"):
        Span(0.25, 2)
    with pytest.raises(UserError, match=r"scores of \[29\.5,31\), but the model has 30 blocks; score it again"):
        Scores.from_json({**SCORES.to_json(), "rows": [{"of": "[29.5,31)", "value": 1.0, "error": None}]})
    with pytest.raises(UserError, match=r"'\[1\.25,3\)' is not a unit"):
        Scores.from_json({**SCORES.to_json(), "rows": [{"of": "[1.25,3)", "value": 1.0, "error": None}]})


@pytest.mark.parametrize(("start", "stop"), [(3, 3), (4, 3), (-1, 2)])
def test_empty_and_negative_spans_are_refused(start: int, stop: int) -> None:
    with pytest.raises(BudgetError, match="empty or negative"):
        Span(start, stop)


# The plan


@given(removals, st.randoms(use_true_random=False), st.data())
def test_plan_reads_what_it_writes(chosen: list[Unit], random: Any, data: st.DataObject) -> None:
    order = tuple((unit, data.draw(losses)) for unit in random.sample(chosen, len(chosen)))
    plan = PruningPlan(MODEL, tuple(sorted(chosen)), order, data.draw(losses), MADE_BY)
    assert PruningPlan.from_json(json.loads(json.dumps(plan.to_json(), allow_nan=False))) == plan


def test_a_path_that_begins_at_home_is_read_and_written_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    PLAN.save("~/plans/plan.json")
    assert PruningPlan.load("~/plans/plan.json") == PLAN
    SCORES.save("~/scores.json")
    assert Scores.load("~/scores.json") == SCORES
    text = CalibrationSet("ids", torch.arange(8).reshape(2, 4), None)
    text.save("~/text")
    assert CalibrationSet.load("~/text").digest == text.digest
    (home / "study.yaml").write_text("{models: m, texts: {a: python}, remove: 1}")
    assert read_study("~/study.yaml").models == ("m",)
    with files.replacing_folder(Path("~/folder")) as made:
        (made / "file").touch()
    with pytest.raises(OutputError, match="exists"):
        files.require_free(Path("~/folder"), "folder", force=False, replaceable=lambda _: True, what="a folder")
    save(tiny_model("llama", blocks=1), "~/model", plan=None)
    with pytest.raises(OutputError, match="is the model itself"):
        require_place_for("~/model", str(home / "model"), force=True)
    assert {path.name for path in home.iterdir()} == {"plans", "scores.json", "text", "study.yaml", "folder", "model"}
    assert not any(here.iterdir())


# What a kill leaves

WRITER = """
import os, shutil, sys, time
from pathlib import Path
from shallower import files

target, where = Path(sys.argv[1]), sys.argv[2]
rename = os.rename

def wait(*_, **__):
    print(flush=True)
    time.sleep(60)

def rename_or_wait(source, to):
    if where == "between" and Path(to) == target:
        wait()
    rename(source, to)

os.rename = rename_or_wait
if where == "behind":
    shutil.rmtree = wait  # what was replaced
with (files.replacing if where == "file" else files.replacing_folder)(target) as made:
    (made if where == "file" else made / "file").write_text("new")
    if where in ("file", "before"):
        wait()
"""


@contextmanager
def _writing(target: Path, where: str) -> Iterator[Callable[[], None]]:
    """Another process writes `target`, and waits where it is told to; yields what kills it."""
    command = [sys.executable, "-c", WRITER, str(target), where]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:

        def kill() -> None:
            process.kill()
            process.wait()

        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield kill
        finally:
            kill()


def _settled(folder: Path) -> list[str]:
    """What is said when `folder` is about to be written."""
    notes: list[str] = []
    with progress.listening(lambda *_: nullcontext(lambda *_: None), notes.append):
        files.require_free(folder, "folder", force=True, replaceable=lambda _: True, what="a folder")
    return notes


def _replaced(folder: Path) -> Path:
    """A folder that is there, and hidden neighbours that nobody may touch."""
    for path in (
        folder,
        folder.with_name(f".{folder.name}.training"),
        folder.with_name(f".{folder.name}.s_others.part"),
    ):
        path.mkdir()
        (path / "file").write_text("old")
    return folder


@pytest.mark.parametrize("where", ["before", "between", "behind"])
def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path, where: str) -> None:
    out = _replaced(tmp_path / "out")
    there = set(os.listdir(tmp_path))
    with _writing(out, where) as kill, _writing(tmp_path / "out.d", "before"):
        meanwhile = set(os.listdir(tmp_path))
        assert len(meanwhile) == len(there) + (1 if where == "between" else 2)
        assert _settled(out) == []
        assert set(os.listdir(tmp_path)) == meanwhile
        kill()
        assert set(os.listdir(tmp_path)) == meanwhile
        again = [f"{out} is again what it was before a replacement of it that did not end."]
        assert _settled(out) == (again if where == "between" else [])
        assert {name for name in os.listdir(tmp_path) if not name.startswith(".out.d.")} == there
    assert (out / "file").read_text() == ("new" if where == "behind" else "old")


def test_what_was_replaced_is_told_of_where_another_has_its_name(tmp_path: Path) -> None:
    out = _replaced(tmp_path / "out")
    with _writing(out, "between") as kill:
        kill()
    out.mkdir()
    for _ in range(2):
        [note] = _settled(out)
        old = Path(note.partition(" is what ")[0])
        assert (old / "file").read_text() == "old"
    shutil.rmtree(old.parent)
    assert _settled(out) == []


def test_what_was_replaced_outlives_two_renames_that_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, rename = _replaced(tmp_path / "out"), os.rename

    def fail(source: Path, to: Path) -> None:
        if to == out:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, to)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", fail)
        with pytest.raises(OSError, match="Input/output"), files.replacing_folder(out):
            pass
    assert not out.exists()
    assert len(_settled(out)) == 1
    assert (out / "file").read_text() == "old"


def test_of_two_that_replace_one_folder_the_one_that_comes_late_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rename = _replaced(tmp_path / "out"), os.rename
    there = set(os.listdir(tmp_path))

    def another_is_first(source: Path, to: Path) -> None:
        rename(source, to)
        if source == out:
            out.mkdir()
            (out / "file").write_text("another's")

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", another_is_first)
        with pytest.raises(OSError, match="not empty"), files.replacing_folder(out):
            pass
    assert set(os.listdir(tmp_path)) == there
    assert (out / "file").read_text() == "another's"


def test_ctrl_c_while_the_old_folder_is_deleted_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, remove = _replaced(tmp_path / "out"), files.remove
    there = set(os.listdir(tmp_path))
    asked: list[Path] = []

    def interrupted(path: Path) -> None:
        asked.append(path)
        if len(asked) == 1:
            raise KeyboardInterrupt
        remove(path)

    monkeypatch.setattr(files, "remove", interrupted)
    with pytest.raises(KeyboardInterrupt), files.replacing_folder(out) as made:
        (made / "file").write_text("new")
    assert set(os.listdir(tmp_path)) == there
    assert (out / "file").read_text() == "new"


def test_a_name_that_is_too_long_is_told_of_before_the_work(tmp_path: Path) -> None:
    for length in (240, 241):
        told = pytest.raises(OutputError, match="File name too long") if length > 240 else nullcontext()
        with told:
            files.require_writable(tmp_path / ("x" * length), "the folder")
    files.require_writable(tmp_path / "y" / "deeper", "the folder")
    assert os.listdir(tmp_path) == []


def test_of_a_file_that_was_being_written_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "file.json"
    with _writing(out, "file") as kill:
        [part] = os.listdir(tmp_path)
        files.write_text(out, "mine")
        assert set(os.listdir(tmp_path)) == {part, out.name}
        kill()
    with monkeypatch.context() as patched:
        patched.setattr("platform.node", lambda: "another")
        files.write_text(out, "mine")
    assert set(os.listdir(tmp_path)) == {part, out.name}
    files.write_text(out, "mine")
    assert os.listdir(tmp_path) == [out.name]


def test_plan_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "plan.json"
    PLAN.save(path)
    assert PruningPlan.load(path) == PLAN
    assert PLAN.removed == {Unit(13, "block"), Unit(22, "attn")}


def test_a_plan_in_the_home_folder_and_of_a_model_whose_name_is_no_utf_8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    plan = replace(PLAN, model=replace(PLAN.model, name=os.fsdecode(b"caf\xe9")))
    plan.save(tmp_path / "plan.json")
    assert PruningPlan.load("~/plan.json") == plan


def test_a_plan_without_calibration_or_losses(tmp_path: Path) -> None:
    made_by = MadeBy(None, None, None, {}, 0, None, "0.1.0")
    plan = PruningPlan(MODEL, (Unit(1, "mlp"),), ((Unit(1, "mlp"), None),), None, made_by)
    plan.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == plan


def test_losses_that_json_cannot_hold_become_null() -> None:
    plan = PruningPlan(MODEL, (Unit(1, "mlp"),), ((Unit(1, "mlp"), math.inf),), math.nan, MADE_BY)
    assert plan.to_json()["order"] == [["mlp.1", None]]
    assert plan.to_json()["dense"] is None


def test_a_prefix_of_a_plan_is_a_plan() -> None:
    assert PLAN.at(1).remove == (Unit(22, "attn"),)
    assert PLAN.at(2) == PLAN
    for count in (0, 3):
        with pytest.raises(PlanError, match="it holds 2"):
            PLAN.at(count)


def test_a_prefix_says_how_much_it_removes() -> None:
    made_by = replace(MADE_BY, options={"remove": "25%", "units": "all"})
    plan = replace(PLAN, made_by=made_by)
    assert plan.at(1).made_by.options == {"remove": "1", "units": "all"}
    assert plan.at(2) == plan
    assert replace(PLAN, made_by=replace(MADE_BY, options={})).at(1).made_by.options == {}


def test_a_prefix_of_units_that_were_named_names_its_own() -> None:
    made_by = replace(MADE_BY, search=None, options={"remove": "attn.22,block.13"})
    plan = replace(PLAN, made_by=made_by)
    assert plan.at(1).made_by.options["remove"] == "attn.22"
    assert plan.at(2) == plan


@pytest.mark.parametrize("spec", ["a?b.txt?sequences=4", "deep/a?b.txt?sequences=4"])
def test_the_last_question_mark_begins_the_options(spec: str) -> None:
    assert source_and_options(spec) == (spec.removesuffix("?sequences=4"), "?", "sequences=4")
    text = CalibrationIdentity(spec, 4, "sha256:c")
    assert (text.title, text.source, text_name(spec)) == ("a?b.txt?sequences=4", "a?b.txt", text.title)


def test_a_text_that_exists_has_no_options(tmp_path: Path) -> None:
    (tmp_path / "what?.txt").touch()
    assert text_name(str(tmp_path / "what?.txt")) == "what?.txt"
    assert source_and_options("what?.txt", tmp_path) == ("what?.txt", "", "")
    assert source_and_options("python") == ("python", "", "")


def test_a_prefix_parts_no_pair_of_an_ordinary_plan() -> None:
    chosen = [Unit(3, "mlp"), Unit(4, "attn"), Unit(9, "block"), Unit(7, "mlp"), Unit(8, "attn")]
    made_by = replace(MADE_BY, options={"remove": "10%", "ordinary": True})
    plan = PruningPlan(MODEL, tuple(sorted(chosen)), tuple((unit, None) for unit in chosen), None, made_by)
    with pytest.raises(PlanError, match=r"cut the plan to 1 units: mlp\.3 and attn\.4 go together.* cut it to 2\."):
        plan.at(1)
    with pytest.raises(PlanError, match=r"mlp\.7 and attn\.8 go together \(--ordinary\); cut it to 5 or 3\."):
        plan.at(4)
    assert [plan.at(count).made_by.options["remove"] for count in (2, 3, 5)] == ["1", "2", "10%"]
    assert len(replace(plan, made_by=MADE_BY).at(4).remove) == 4


def test_a_plan_for_another_model_is_refused_naming_both() -> None:
    PLAN.require_for(ModelIdentity("renamed", None, MODEL.fingerprint, 30))
    with pytest.raises(PlanError, match=r"made for tiny .* not for other .* or search again"):
        PLAN.require_for(OTHER)
    with pytest.raises(PlanError, match=r"or search again .* loaded as float16"):
        PLAN.require_for(replace(MODEL, fingerprint=OTHER.fingerprint))


def _at(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for parent in parents:
            data = data[parent]
        data[last] = value

    return change


def _without(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda data: data.pop(key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_at("format", "shallower.plan/2"), r"'shallower.plan/2'; .* reads 'shallower.plan/1'. Update shallower or"),
        (_without("format"), "has format None"),
        (_at("remov", []), "unknown key 'remov' .did you mean 'remove'"),
        (_at("model.fingerprnt", "x"), "'model' of .* unknown key 'fingerprnt' .did you mean 'fingerprint'"),
        (_at("made_by.sead", 1), "unknown key 'sead' .did you mean 'seed'"),
        (_at("made_by.calibration.token", 1), "unknown key 'token' .did you mean 'tokens'"),
        (_without("dense"), "lacks 'dense'"),
        (_at("model", None), "'model' of .* is not an object"),
        (_at("model.blocks", "30"), "'blocks' of .* is '30', not a whole number"),
        (_at("model.revision", 5), "'revision' of .* is 5, not text or null"),
        (_at("made_by.options", []), "'options' of .* not an object"),
        (_at("made_by.seed", True), "'seed' of .* is True, not a whole number"),
        (_at("made_by.calibration", "text"), "'calibration' of .* is 'text', not an object or null"),
        (_at("remove", "block.13"), "'remove' of .* is not a list"),
        (_at("order", None), "'order' of .* is not a list"),
        (_at("dense", "3.2"), "'3.2' is not a number or null"),
        (_at("order", [["block.13", "low"]]), "'low' is not a number or null"),
        (_at("order", ["block.13"]), "wrong type"),
        (_at("remove", [13]), "wrong type"),
        (_at("remove", ["block.13"]), "'order' does not list the same units"),
        (_at("remove", ["layer.13", "attn.22"]), "'layer.13' is not a unit"),
        (_at("remove", ["block.13", "block.13"]), "block.13 is named twice"),
        (_at("remove", ["block.22", "attn.22"]), "attn.22 is part of block.22"),
        (_at("model.blocks", 20), "removes attn.22, but its model has blocks 0 to 19"),
    ],
)
def test_plans_that_are_refused(change: Callable[[dict[str, Any]], None], message: str) -> None:
    data = json.loads(json.dumps(PLAN.to_json()))
    change(data)
    with pytest.raises(PlanError, match=message):
        PruningPlan.from_json(data, "plan.json")


def test_all_faults_of_a_plan_are_reported_together() -> None:
    data = PLAN.to_json()
    data["model"]["nmae"] = data["model"].pop("name")
    data["made_by"]["seed"] = "7"
    data["note"] = "hello"
    with pytest.raises(PlanError) as caught:
        PruningPlan.from_json(data, "plan.json")
    for part in ("'nmae'", "lacks 'name'", "'seed'", "'note'"):
        assert part in str(caught.value)


NESTED = b"[" * 100_000  # deeper than Python can follow
LONG = b'{"seed": ' + b"9" * 5000 + b"}"  # more digits than Python reads


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[]", b"null", b'"plan"', NESTED, LONG])
def test_files_that_are_no_plan(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(PlanError, match=r"plan\.json"):
        PruningPlan.load(path)


def test_a_missing_plan_names_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"make one with `shallower search MODEL --remove 25% --out .*`"):
        PruningPlan.load(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="cannot be read as a plan"):
        PruningPlan.load(tmp_path)


# Scores


def test_scores_read_what_they_write(tmp_path: Path) -> None:
    SCORES.save(tmp_path / "scores.json")
    assert Scores.load(tmp_path / "scores.json") == SCORES
    assert SCORES.units == {Unit(0, "block"): 0.5, Unit(1, "attn"): 0.25}
    assert SCORES.spans == {Span(0, 2): 0.75}


def test_a_score_that_is_no_number_is_written_as_null() -> None:
    scores = Scores(MODEL, "cosine", (Score(Unit(0, "block"), math.inf, math.nan),), MADE_BY)
    row = scores.to_json()["rows"][0]
    assert row == {"of": "block.0", "value": None, "error": None}
    assert Scores.from_json(scores.to_json()).rows[0].value == math.inf  # without it the model overflows


def test_ranking_is_from_least_important_and_ties_go_to_the_deeper() -> None:
    values = {0: 0.5, 1: 0.1, 2: 0.5, 3: 0.9}
    scores = Scores(MODEL, "cosine", tuple(Score(Unit(i, "block"), value) for i, value in values.items()), MADE_BY)
    assert [unit.index for unit in scores.ranked()] == [1, 2, 0, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_at("format", "shallower.scores/9"), "has format 'shallower.scores/9'"),
        (_at("row", []), "unknown key 'row' .did you mean 'rows'"),
        (_without("metric"), "lacks 'metric'"),
        (_at("rows", {}), "'rows' of .* is not a list"),
        (_at("rows", [{"of": "block.0", "vlue": 1.0, "error": None}]), "row 0 of .* lacks 'value'.*'vlue'"),
        (_at("rows", [{"of": "block.0", "value": "high", "error": None}]), "'value' of row 0 .* 'high', not a number"),
        (_at("rows", ["block.0"]), "row 0 of .* is not an object"),
        (_at("rows", [{"of": "layer.0", "value": 1.0, "error": None}]), "'layer.0' is not a unit"),
        (_at("rows", [{"of": "[3,2)", "value": 1.0, "error": None}]), "is empty or negative"),
        (_at("rows", [{"of": "[x,2)", "value": 1.0, "error": None}]), "is not a unit"),
        (_at("model.blocks", None), "'blocks' of .* is None"),
        (_at("made_by", []), "'made_by' of .* is not an object"),
        (_at("metric", ["cosine"]), r"'metric' of .* is \['cosine'\], not text"),
        (_at("metric", 5), "'metric' of .* is 5, not text"),
        (_at("metric", None), "'metric' of .* is None, not text"),
        (
            _at("rows", [{"of": of, "value": 1.0, "error": None} for of in ("block.1", "block.01", "attn.1")]),
            r"scores block\.1 more than once: leave one row of each",
        ),
        (_at("rows", [{"of": f"[0,{'9' * 5000})", "value": 1.0, "error": None}]), "is not a unit"),
    ],
)
def test_scores_that_are_refused(change: Callable[[dict[str, Any]], None], message: str) -> None:
    data = json.loads(json.dumps(SCORES.to_json()))
    change(data)
    with pytest.raises(UserError, match=message):
        Scores.from_json(data, "scores.json")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[]", b"null", NESTED, LONG])
def test_files_that_are_no_scores(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "scores.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"scores\.json"):
        Scores.load(path)
    with pytest.raises(UserError, match="shallower score"):
        Scores.load(tmp_path / "missing.json")


# Writing


@pytest.mark.parametrize("failing", ["fsync", "replace"])
@pytest.mark.parametrize("existing", [True, False])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, existing: bool
) -> None:
    path = tmp_path / "plan.json"
    if existing:
        path.write_text("old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, failing, full)
    with pytest.raises(OutputError, match=r"cannot write .*plan\.json: No space left on device"):
        PLAN.save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == (["plan.json"] if existing else [])
    assert not existing or path.read_text() == "old"


def test_an_interrupt_while_writing_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        PLAN.save(tmp_path / "plan.json")
    assert list(tmp_path.iterdir()) == []


def test_the_file_appears_only_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    seen: list[bool] = []
    fsync = os.fsync

    def watch(handle: int) -> None:
        seen.append(path.exists())
        fsync(handle)

    monkeypatch.setattr(files.os, "fsync", watch)
    PLAN.save(path)
    assert seen == [False]
    assert path.read_text(encoding="utf-8").endswith("}\n")


def test_written_files_have_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "ordinary").write_text("")
    PLAN.save(tmp_path / "plan.json")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ordinary", "plan.json")]
    assert modes[0] == modes[1]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="choose another place"):
        PLAN.save(tmp_path / "file" / "plan.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="choose another place"):
        PLAN.save(tmp_path / "folder")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder"]


# Budgets


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8", (Amount(8, False, "units"),)),
        (" 25% ", (Amount(25, True, "parameters"),)),
        ("12.5%", (Amount(12.5, True, "parameters"),)),
        ("33%:kv_bytes", (Amount(33, True, "kv_bytes"),)),
        ("20%:units", (Amount(20, True, "units"),)),
        ("20%:blocks", (Amount(20, True, "blocks"),)),
        ("1.5:blocks", (Amount(1.5, False, "blocks"),)),
        ("1000000:parameters", (Amount(1e6, False, "parameters"),)),
        ("20%, 33%:kv_bytes", (Amount(20, True, "parameters"), Amount(33, True, "kv_bytes"))),
        ("block.3,attn.5", (Unit(3, "block"), Unit(5, "attn"))),
        ("block.3-5", (Unit(3, "block"), Unit(4, "block"), Unit(5, "block"))),
    ],
)
def test_remove(text: str, expected: object) -> None:
    assert parse_remove(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0", "removes nothing"),
        ("0%", "removes nothing"),
        ("-3", "removes nothing"),
        ("100%", "would remove every block; give less than 100%"),
        ("130%", "would remove every block; give less than 100%"),
        ("2.5", "is not a whole number of units"),
        ("", "cannot be read: give a number of units"),
        ("%", "cannot be read"),
        ("10%,", "cannot be read"),
        ("10%,130%", "would remove every block"),
        ("10%,block.3", "cannot be read"),
        ("1e3", "cannot be read"),
        ("abc", "'abc' is not a unit"),
        ("nan", "'nan' is not a unit"),
        ("block.3,block.3", "block.3 is named twice"),
        ("block.3,mlp.3", "mlp.3 is part of block.3"),
        ("9" * 400, "--remove 9{12}… is more than any model holds"),
        ("9" * 5000 + ":parameters", "is more than any model holds"),
    ],
)
def test_removals_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        parse_remove(text)


def test_an_unknown_quantity_gets_a_suggestion() -> None:
    with pytest.raises(UnknownName, match="unknown quantity 'parameter'; did you mean 'parameters'"):
        parse_remove("10%:parameter")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", set()),
        ("first:2", {0, 1}),
        ("last:2", {8, 9}),
        ("first:1, last:1, block.5, 6", {0, 5, 6, 9}),
        ("block.4-6,8-9", {4, 5, 6, 8, 9}),
        ("first:10", set(range(10))),
        ("first:0", set()),
    ],
)
def test_protect(text: str, expected: set[int]) -> None:
    assert parse_protect(text, 10) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("block.10", "does not exist: the model has blocks 0 to 9"),
        ("12", "does not exist"),
        ("first:11", "more than the model's 10 blocks"),
        ("block.8-10", "does not exist: the model has blocks 0 to 9"),
        ("block.6-4", "ends before it starts"),
        ("block.0-99999999999", "at most 10,000 can be named"),
        ("attn.3", "cannot be read: write first:4, last:2, block.7 or block.4-9"),
        ("middle:2", "cannot be read"),
        ("first:-1", "cannot be read"),
        ("first", "cannot be read"),
        (f"first:{'9' * 5000}", "cannot be read"),
        (f"block.{'9' * 5000}", "cannot be read"),
    ],
)
def test_protections_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        parse_protect(text, 10)


def _blocks(*costs: float) -> dict[Unit, float]:
    return {Unit(index, "block"): cost for index, cost in enumerate(costs)}


def test_a_share_is_met_by_at_least_that_much() -> None:
    costs = _blocks(*[1.0] * 30)
    limit = make_limit(Amount(20, True, "parameters"), costs, 30.0)
    chosen = list(costs)
    assert not limit.met(chosen[:5])
    assert limit.met(chosen[:6])
    assert not make_limit(Amount(21, True, "parameters"), costs, 30.0).met(chosen[:6])


@given(st.integers(2, 80), st.integers(1, 99), st.integers(1, 10**9))
def test_a_share_of_equal_blocks_rounds_up_and_never_by_the_last_bit(blocks: int, percent: int, cost: int) -> None:
    costs = _blocks(*[cost / 7] * blocks)
    needed = -(-blocks * percent // 100)
    limit = make_limit(Amount(percent, True, "parameters"), costs, math.fsum(costs.values()))
    assert [limit.met(list(costs)[:count]) for count in (needed - 1, needed)] == [False, True]


@pytest.mark.parametrize(
    ("amount", "costs", "total", "message"),
    [
        (Amount(4, False, "units"), _blocks(1, 1, 1, 1), 4, "something must stay"),
        (Amount(9, False, "units"), _blocks(1, 1, 1, 1), 4, "something must stay"),
        (Amount(3, False, "units"), _blocks(1, 1), 4, "the 2 units that may go hold 2 of 4"),
        (Amount(60, True, "parameters"), _blocks(1, 1), 4, r"Protect fewer or remove less\.$"),
        (
            Amount(25, True, "parameters"),
            dict.fromkeys((Unit(0, "attn"), Unit(1, "attn")), 13_250_000.0),
            106_000_008,
            r"hold 26,500,000 of 106,000,008\. .* remove less; for a share of these units write 25%:units\.$",
        ),
        (Amount(10, True, "kv_bytes"), {Unit(0, "mlp"): 0.0}, 4, "hold no kv_bytes; choose other --units"),
        (Amount(10, True, "parameters"), {}, 4, "hold no parameters"),
    ],
)
def test_budgets_that_are_refused(amount: Amount, costs: dict[Unit, float], total: float, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        make_limit(amount, costs, total)


def test_a_block_and_its_sublayers_count_once() -> None:
    costs = {Unit(0, "block"): 3.0, Unit(0, "attn"): 1.0, Unit(0, "mlp"): 1.5}
    with pytest.raises(BudgetError, match="hold 3 of 6"):
        make_limit(Amount(75, True, "parameters"), costs, 6.0)


def test_what_a_budget_admits() -> None:
    block, attn, mlp, other = Unit(3, "block"), Unit(3, "attn"), Unit(3, "mlp"), Unit(4, "block")
    budget = Budget((Limit("parameters", 8.0, 9.0, {block: 3.0, attn: 1.0, mlp: 2.0, other: 3.0}),))
    assert budget.admits([], block)
    assert budget.admits([attn], mlp)
    assert budget.admits([block], other)
    assert not budget.admits([block], block)
    assert not budget.admits([block], attn)
    assert not budget.admits([attn], block)


def test_every_limit_is_to_be_met_and_only_what_helps_is_admitted() -> None:
    attn, mlp, more = Unit(0, "attn"), Unit(0, "mlp"), Unit(1, "mlp")
    parameters = Limit("parameters", 2.0, 9.0, {attn: 1.0, mlp: 2.0, more: 2.0})
    cache = Limit("kv_bytes", 1.0, 4.0, {attn: 1.0, mlp: 0.0, more: 0.0})
    assert not Budget((cache,)).admits([], mlp)
    both = Budget((parameters, cache))
    assert both.admits([], mlp)
    assert not both.met([mlp])
    assert not both.admits([mlp], more)
    assert both.admits([mlp], attn)
    assert both.met([mlp, attn])
    assert str(both) == "0.222 of the parameters in blocks and 0.25 of the kv_bytes in blocks"


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 9)), min_size=1, max_size=12),
    st.integers(1, 99),
    st.randoms(use_true_random=False),
)
def test_no_set_without_a_superfluous_unit_weighs_more_than_is_said(
    blocks: list[tuple[int, int, int]], percent: int, random: Any
) -> None:
    costs = [_blocks(*map(float, one)) for one in zip(*blocks, strict=True)]
    limits = [Limit("flops", math.fsum(cost.values()) * percent / 100, 0.0, cost) for cost in costs[:2]]
    for budget in (Budget(tuple(limits[:1])), Budget(tuple(limits))):
        chosen = set(costs[0])
        while spare := budget.superfluous(chosen):
            chosen.remove(random.choice(spare))
        assert sum(costs[2][unit] for unit in chosen) <= budget.heaviest(costs[2]) * (1 + 1e-9)


def test_what_goes_at_most_is_little_more_than_was_asked_for() -> None:
    costs = _blocks(*[2.0] * 30)
    assert Budget((Limit("parameters", 12.0, 60.0, costs),)).heaviest(costs) == 14
    assert Budget((Limit("units", 30.0, 30.0, dict.fromkeys(costs, 1.0)),)).heaviest(costs) == 60


def test_budgets_say_what_they_ask_for() -> None:
    assert str(Budget((Limit("units", 6, 30, {}),))) == "6 units"
    assert str(Budget((Limit("blocks", 1.5, 30, {}),))) == "1.5 blocks"
    assert str(Amount(20, True, "parameters")) == "20% of the parameters"


# Errors


def test_every_user_error_exits_with_2_and_is_in_the_tree() -> None:
    tree = errors.__doc__ or ""
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, errors.ShallowerError):
            assert kind.__name__ in tree
            assert kind.exit_code == (2 if issubclass(kind, UserError) else 1)


def test_a_package_that_is_missing() -> None:
    errors.require_package("json", "data", "reading rows")
    with pytest.raises(UserError) as told:
        errors.require_package("no_such_package", "eval", "asking tasks", UserError)
    assert str(told.value) == (
        "asking tasks needs the package `no-such-package`, which is not installed: pip install 'shallower[eval]'."
    )


def test_a_folder_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows_of_mine").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="which is not installed"):
        errors.require_package("rows_of_mine", "data", "reading rows")


def test_the_first_line_of_an_error() -> None:
    for said, line in (("\n one. \ntwo", "one."), ("one:\n", "one."), (" \n", "ValueError.")):
        assert errors.first_line(ValueError(said)) == line


def test_unknown_names() -> None:
    assert str(UnknownName("metric", "cosin", ["cosine", "loss"], "See `x`.")) == (
        "unknown metric 'cosin'; did you mean 'cosine'? Known: cosine, loss. See `x`."
    )
    assert str(UnknownName("metric", "zzz", ["cosine"])) == "unknown metric 'zzz'. Known: cosine."
    assert str(UnknownName("metric", "zzz", [])) == "unknown metric 'zzz'. None is registered."


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="needs a folder in which nothing can be made, even by root")
def test_a_place_is_tried_before_any_work(tmp_path: Path) -> None:
    files.require_writable(tmp_path / "a" / "b" / "file", "--out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "link").symlink_to("/proc")
    for place in ("/proc/out", tmp_path / "link" / "a" / "out"):
        with pytest.raises(OutputError, match=r"^--out cannot be written: in .* nothing can be made \(.*\); choose"):
            files.require_writable(place, "--out")
