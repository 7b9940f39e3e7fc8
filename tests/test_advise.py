"""Calibration text chosen by what the model is for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scipy.stats import spearmanr

from shallower.cli import main
from shallower.corpus import build_calibration
from shallower.engine import Ablator
from shallower.errors import UserError
from shallower.verbs.advise import advise
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
