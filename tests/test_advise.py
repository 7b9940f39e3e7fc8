"""Calibration text chosen by what the model is for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import spearmanr

import shallower.verbs.advise
from shallower.cli import main
from shallower.corpus import build_calibration
from shallower.engine import Ablator
from shallower.errors import CorpusError, UserError
from shallower.verbs import recoveries
from shallower.verbs.advise import advise
from shallower.verbs.calibrate import calibrate
from shallower.verbs.measuring import make_ablator
from shallower.verbs.search import search
from shallower.verbs.subject import Subject, open_subject, units_of


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from shallower.testing.families import tiny_model, tiny_tokenizer

    folder = tmp_path_factory.mktemp("advise")
    tiny_model("llama", blocks=6).save_pretrained(folder / "tiny")
    tiny_tokenizer().save_pretrained(folder / "tiny")
    for name, line in (
        ("sums", "{n} plus {n} is twice {n}."),
        ("tale", "Once, {n} kings rode out to meet {n} dragons."),
    ):
        paragraphs = [" ".join(line.format(n=n + 7 * at) for n in range(9)) for at in range(60)]
        (folder / f"{name}.txt").write_text("\n\n".join(paragraphs))
    mine = [
        " ".join(f"{n} plus {n + 1} is less than twice {n + 2}." for n in range(at, at + 9)) for at in range(500, 560)
    ]
    (folder / "mine.txt").write_text("\n\n".join(mine))
    rows = [{"question": f"What is {n} plus 1?", "choices": [str(n + 1), str(n)], "gold": n % 2} for n in range(12)]
    (folder / "quiz.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def subject(place: Path) -> Subject:
    return open_subject(str(place / "tiny"), dtype="float32")


def test_the_source_that_ranks_as_the_target_does_is_taken(place: Path, subject: Subject) -> None:
    units = units_of(subject, "sublayer")
    sources = [str(place / "tale.txt"), str(place / "sums.txt")]
    told = advise(subject, f"auto:{','.join(sources)}", place / "mine.txt", units, sequences=8, length=32)

    def ranking(path: Path, part: str) -> list[float]:
        text = build_calibration(str(path), subject.tokenizer, sequences=8, length=32, part=part)  # type: ignore[arg-type]
        ablator = Ablator(subject.anatomy, text)
        return ablator.losses([frozenset({unit}) for unit in units])

    wanted = ranking(place / "mine.txt", "train")
    expected = {source: float(spearmanr(wanted, ranking(Path(source), "train")).statistic) for source in sources}
    assert {item.source: item.correlation for item in told.candidates} == pytest.approx(expected)
    assert told.candidates[0].source == max(expected, key=expected.__getitem__)
    assert told.text.spec.startswith(told.candidates[0].source)
    assert "mine.txt" in told.why


def test_a_target_of_questions_is_judged_by_answers(place: Path, subject: Subject) -> None:
    plan = search(
        subject,
        "1",
        calibration=f"auto:{place / 'tale.txt'},{place / 'sums.txt'}",
        target=place / "quiz.jsonl",
        sequences=8,
        length=32,
        search="one-shot",
    )
    assert plan.made_by.calibration is not None
    assert plan.made_by.calibration.spec.startswith(str(place))
    assert plan.made_by.options["target"] == "quiz.jsonl"
    assert re.fullmatch(r"(tale|sums)\.txt -?\d\.\d\d, (tale|sums)\.txt -?\d\.\d\d", plan.made_by.options["compared"])


def test_of_a_short_target_all_is_read(
    place: Path, subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    monkeypatch.setattr(shallower.verbs.advise.progress, "note", notes.append)
    (tmp_path / "brief.txt").write_text((place / "mine.txt").read_text()[:120])
    sources = f"auto:{place / 'tale.txt'},{place / 'sums.txt'}"
    advise(subject, sources, tmp_path / "brief.txt", units_of(subject, "block"), sequences=8, length=32)
    assert re.fullmatch(r"brief\.txt holds text for [1-7] of 8 sequences of 32 tokens: so many are read\.", notes[0])


def test_the_objective_is_asked_with_its_options(
    place: Path, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, dict[str, object]]] = []

    def noted(*args: object, **more: object) -> Ablator:
        ablator = make_ablator(*args, **more)  # type: ignore[arg-type]
        asked.append((ablator.objective.name, ablator.options))
        return ablator

    monkeypatch.setattr(shallower.verbs.advise, "make_ablator", noted)
    sources = f"auto:{place / 'tale.txt'},{place / 'sums.txt'}"
    options = {"temperature": 2.0}
    for target in ("mine.txt", "quiz.jsonl"):
        advise(
            subject,
            sources,
            place / target,
            units_of(subject, "block"),
            sequences=8,
            length=32,
            objective="kl",
            options=options,
        )
    assert asked[0] == ("kl", options)
    assert asked[3] == ("task", {"of": "margin", "normalise": "none"})
    assert asked[1:3] == asked[4:] == 2 * [("kl", options)]
    asked.clear()
    settings = {"temperature": "2"}
    shape = {"sequences": 8, "length": 32}
    search(subject, "1", calibration=sources, target=place / "mine.txt", objective="kl", settings=settings, **shape)  # type: ignore[arg-type]
    assert asked == 3 * [("kl", options)]


def test_a_search_behind_a_repair_reads_more_of_the_text_that_was_chosen(
    place: Path, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recoveries, "REPAIR_SEQUENCES", 12)
    monkeypatch.setattr(recoveries, "REPAIR_LENGTH", 32)
    sources = f"auto:{place / 'tale.txt'},{place / 'sums.txt'}"
    asked: dict[str, Any] = {"target": place / "mine.txt", "sequences": 8, "length": 32}
    chosen = search(subject, "1", calibration=sources, **asked).made_by.calibration
    read = search(subject, "1", calibration=sources, repair="emulated-update", **asked).made_by.calibration
    assert chosen is not None
    assert read is not None
    assert (chosen.tokens, read.tokens) == (8 * 32, (12 + 8) * 32)
    assert read.spec.partition("?")[0] == chosen.spec.partition("?")[0]


def test_with_one_unit_that_may_go_there_is_nothing_to_choose_by(place: Path, subject: Subject) -> None:
    sources = f"auto:{place / 'tale.txt'},{place / 'sums.txt'}"
    with pytest.raises(UserError, match=r"only block\.5 may: name the text \(--calibration\), or protect fewer"):
        search(subject, "1", calibration=sources, target=place / "mine.txt", protect="first:5")


def test_texts_that_rank_nothing_are_refused(place: Path, subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ablator, "differences", lambda self, candidates: [(0.0, None)] * len(candidates))
    sources = f"auto:{place / 'tale.txt'},{place / 'sums.txt'}"
    with pytest.raises(UserError, match="by nll all 6 units matter the same; use another objective"):
        advise(subject, sources, place / "mine.txt", units_of(subject, "block"), sequences=8, length=32)


def test_a_target_that_is_not_there_is_told_before_sources_are_read(
    place: Path, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[object] = []

    def noted(subject: Subject, spec: object, **given: Any) -> Any:
        read.append(spec)
        return calibrate(subject, spec, **given)  # type: ignore[arg-type]

    monkeypatch.setattr(shallower.verbs.advise, "calibrate", noted)
    missing = place / "typo.txt"
    with pytest.raises(CorpusError, match=r"typo\.txt"):
        advise(subject, f"auto:{place / 'tale.txt'}", missing, units_of(subject, "block"), sequences=8, length=32)
    assert not read


@pytest.mark.parametrize("calibration", ["auto", "auto:", "auto: ,"])
def test_of_sources_that_nobody_named_one_may_be_missing(
    place: Path, subject: Subject, monkeypatch: pytest.MonkeyPatch, calibration: str
) -> None:
    monkeypatch.setattr(shallower.verbs.advise, "DOMAINS", ("nowhere.jsonl", str(place / "tale.txt")))
    told = advise(subject, calibration, place / "mine.txt", units_of(subject, "block"), sequences=8, length=32)
    assert [item.source for item in told.candidates] == [str(place / "tale.txt")]


@pytest.mark.parametrize(("calibration", "target"), [("auto", None), ("tale.txt", "mine.txt"), (None, "mine.txt")])
def test_auto_and_for_belong_together(subject: Subject, calibration: str | None, target: str | None) -> None:
    with pytest.raises(UserError, match="--for"):
        search(subject, "1", calibration=calibration, target=target)


def test_a_source_that_is_not_there_is_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "search",
        place / "tiny",
        "--remove",
        1,
        "--calibration",
        "auto:nowhere.jsonl",
        "--for",
        place / "mine.txt",
    ]
    assert main.run([str(word) for word in words]) == 2
    assert "nowhere.jsonl" in capsys.readouterr().err


def test_what_is_advised_afterwards_names_the_text_that_was_chosen(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = f"auto:{place / 'tale.txt'},{place / 'sums.txt'}"
    chosen = ["--calibration", sources, "--for", place / "mine.txt", "--sequences", 4, "--length", 32]
    how = ["--dtype", "float32", "--trust-remote-code", "--out", tmp_path / "plan.json"]
    assert main.run([str(word) for word in ("search", place / "tiny", "--remove", 1, *chosen, *how)]) == 0
    [advice] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Next: ")]
    assert "auto:" not in advice
    text = r"--calibration '\S+(tale|sums)\.txt\?sequences=4&\S+'"
    assert re.search(f"{text} --dtype float32 --trust-remote-code$", advice)
