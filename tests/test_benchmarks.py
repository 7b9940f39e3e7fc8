"""Benchmarks at a size that says nothing: that their rows can be run, and what they print."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch

from shallower.testing.conformance import sample_choices, sample_text, with_identity_block
from shallower.testing.families import tiny_model, tiny_tokenizer
from shallower.units import Unit, parse_units
from shallower.verbs.recovery_steps import parse_recoveries
from shallower.verbs.repaired import RepairedLosses, split
from shallower.verbs.score import score
from shallower.verbs.search import search
from shallower.verbs.subject import open_subject


@pytest.fixture
def script(root: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # which they set for themselves
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    return importlib.import_module


def test_searches_that_look_at_nothing_are_compared_too(script: Callable[[str], ModuleType]) -> None:
    searches = script("searches")
    model = tiny_model("llama")
    text = sample_text(model, padded=False)
    for row in ("random nll", "last nll", "milp loss"):
        assert row in searches.ROWS
        found = searches.run(row, open_subject(model), text, [], 0)
        assert [len(removed) for removed in found.removed] == [1, 2, 2]


def test_rows_by_questions_and_by_runs_of_sublayers(script: Callable[[str], ModuleType]) -> None:
    searches = script("searches")
    model = tiny_model("llama")
    text, questions = sample_text(model, padded=False), sample_choices(model)
    by_questions, by_run = "greedy task", "contiguous angular sublayer"
    assert {by_questions, by_run} <= {*searches.ROWS}
    assert [row for row in searches.ROWS if searches.asks_questions(row)] == [by_questions]
    found = searches.run(by_questions, open_subject(model), text, [], 0, questions)
    expected = search(model, "30%", objective="task", calibration=questions).removed
    assert found.removed[-1] == [str(unit) for unit in sorted(expected)]
    places = [
        unit.reach[0]
        for unit in sorted(map(Unit.parse, searches.run(by_run, open_subject(model), text, [], 0).removed[-1]))
    ]
    assert places == list(range(places[0], places[0] + len(places)))


def test_what_is_chosen_behind_a_repair_is_judged_behind_its_options(
    script: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    recovery = script("recovery")
    subject = open_subject(tiny_model("llama"))
    text = sample_text(subject.model, padded=False)
    recovery.choose(subject, text, 2, "block", "linear-fold:ridge=1000000+magnitude")
    told = [line.split() for line in capsys.readouterr().out.splitlines()]
    judge = RepairedLosses(subject, split(text), parse_recoveries("linear-fold,magnitude", {"ridge": "1e6"}))
    spans = [frozenset(parse_units(line[1])) for line in told if line[1].startswith("block.")]
    losses = judge.losses(spans)
    plain = [float(line[2]) for line in told if line[1].startswith("block.")]
    assert [float(line[3]) for line in told if line[1].startswith("block.")] == pytest.approx(losses, abs=1e-4)
    [correlation] = [float(line[-1]) for line in told if "(Spearman)" in line]
    ranks = [torch.tensor(values).argsort().argsort().double() for values in (plain, losses)]
    assert correlation == pytest.approx(float(torch.corrcoef(torch.stack(ranks))[0, 1]), abs=1e-3)


def test_windows_are_spread_evenly_over_a_text(script: Callable[[str], ModuleType]) -> None:
    evenly, ids = script("windows").evenly, torch.arange(105)
    assert evenly(ids, 3, 10)[::10].tolist() == [0, 30, 60]
    assert evenly(ids, 4, 10)[::10].tolist() == [0, 20, 50, 70]  # and not the first four of every second one
    assert all(len(evenly(ids, count, 10)) == 105 for count in (None, 0, 10, 99))


def test_every_set_is_counted_once(script: Callable[[str], ModuleType]) -> None:
    exhaustive = script("exhaustive")
    everything = list(exhaustive.sets(9, 3, None))
    assert len(set(everything)) == len(everything) == math.comb(7, 3)
    assert {min(units).index for units in everything} >= {1}
    assert {max(units).index for units in everything} >= {7}
    assert len(list(exhaustive.sets(9, 3, 1))) == 5  # block.1-3 to block.5-7
    assert len(list(exhaustive.sets(9, 3, 2))) == math.comb(7, 3) - math.comb(5, 3)  # but those of three lone blocks
    assert list(exhaustive.sets(9, 3, 3)) == everything


def test_the_reference_of_contiguous_reads_the_stream_in_front_of_the_final_norm(
    script: Callable[[str], ModuleType],
) -> None:
    subject = open_subject(with_identity_block(tiny_model("llama"), 5))
    norm = subject.model.model.norm.weight
    with torch.no_grad():  # behind it the last block, which adds nothing, would look far away
        norm.copy_(torch.linspace(-4, 4, len(norm)))
    text = sample_text(subject.model, padded=False)
    for count in (1, 2):
        spans = score(subject, "angular", calibration=text).spans
        nearest = min((span for span in spans if span.blocks == count), key=spans.__getitem__)
        found = script("study").deeper_layers(script("selection").Reference(subject, text, 2048), subject, count)
        assert found == frozenset(nearest.units)
        assert Unit(5, "block") in found


def _select(
    selection: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, tasks: Sequence[str], *options: str
) -> None:
    """Run tasks of `selection` on a tiny model."""
    tiny_model("llama", blocks=10).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    lines = (json.dumps({"text": " ".join(str(n * n) for n in range(i, i + 60))}) for i in range(200))
    (folder / "text.jsonl").write_text("\n".join(lines))
    asked = ["selection", "--model", str(folder / "model"), "--text", str(folder / "text.jsonl"), "--json"]
    chosen = [word for task in tasks for word in ("--task", task)]
    monkeypatch.setattr(sys, "argv", [*asked, "--dtype", "float32", *chosen, *options])
    selection.main()


def test_selection_races_and_repeats(
    script: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    selection = script("selection")
    monkeypatch.setattr(selection, "OFFSPRING", 4)
    tasks = ["greedy-blocks", "evolutionary"]
    _select(selection, tmp_path, monkeypatch, tasks, "--tokens", "512", "--repeats", "2")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["task"] for row in rows] == tasks
    assert [row["tokens_reference"] // 512 for row in rows] == [sum(range(3, 11)), 1 + 12 * 4]
    for row in rows:
        assert row["speedup"] == row["reference_s"] / row["ours_s"]
        assert 0 < row["tokens_ours"] < row["tokens_reference"]
        assert row["loss_gap"] == 0 or not row["same_plan"]


def test_selection_tells_what_each_objective_takes(
    script: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    selection = script("selection")
    model = tiny_model("llama", blocks=2)
    text = sample_text(model, padded=False)
    monkeypatch.setattr(selection, "build_calibration", lambda *_, **__: text)
    [told] = selection.head_memory(open_subject(model, tiny_tokenizer()), "text.jsonl")
    for objective in ("hidden-cosine", "nll", "kl", "js", "logit-l2", "top1"):
        assert told[f"above_model_{objective}_mb"] >= 0
    assert told["model_mb"] > 0


def test_selection_prints_one_object_a_task(
    script: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tasks = ["growth", "one-shot", "greedy-blocks-exact", "greedy-sublayers-exact", "evolutionary-exact"]
    _select(script("selection"), tmp_path, monkeypatch, tasks, "--tokens", "128")
    growth, *rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["task"] for line in (growth, *rows)] == tasks
    assert all(line["threads"] > 0 for line in (growth, *rows))
    assert [row["tokens"] for row in growth["rows"]] == [512, 1024, 2048, 4096]
    for row in rows:
        sizes = {"ours_s", "reference_s", "speedup", "tokens_ours", "tokens_reference"}
        assert row.keys() == {"task", "threads", "same_plan", "loss_gap"} | sizes
        assert row["speedup"] == row["reference_s"] / row["ours_s"]
        assert row["same_plan"]
        assert row["loss_gap"] == pytest.approx(0, abs=1e-6)
        assert 0 < row["tokens_ours"] <= row["tokens_reference"]
    read = [row["tokens_reference"] // 128 for row in rows]  # candidates that the published algorithms measure
    assert read == [10, sum(range(3, 11)), sum(range(6, 21)), 1 + 12 * 16]
