"""Duplicates, near-duplicates, quality and overlap with evaluation sets, beside plain calculations."""

from __future__ import annotations

import errno
import json
import os
import random
import re
from collections.abc import Iterable, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shallower.cli import main
from shallower.corpus import EvaluationRuns, build_calibration, clean, open_source
from shallower.corpus.duplicates import Duplicates, Shingles, bands, jaccard, near_pairs, words_of
from shallower.corpus.quality import scorer, signals
from shallower.errors import CorpusError, OutputError, UnknownName, UserError
from shallower.registry import quality
from shallower.reporting.corpus import CleanReport, render
from shallower.testing.families import tiny_tokenizer
from shallower.verbs.corpus import clean as clean_file

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
WORDS = [f"{one}{two}" for one in ("stone", "river", "cloud", "paper", "light") for two in "abcdefghijklmnop"]
PROSE = "It was said that the house by the river had been built for a man who was not of this town. "

pytest.importorskip("datasketch")


def _text(seed: int, words: int = 60) -> str:
    pick = random.Random(seed)
    return " ".join(pick.choice(WORDS) for _ in range(words))


def _jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def _runs(text: str, size: int = 5) -> set[tuple[str, ...]]:
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {tuple(words[start : start + size]) for start in range(max(1, len(words) - size + 1))}


def _plain(one: str, two: str) -> float:
    return len(_runs(one) & _runs(two)) / len(_runs(one) | _runs(two))


# --- likeness ------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.sampled_from("abc"), min_size=1, max_size=40), st.lists(st.sampled_from("abc"), min_size=1, max_size=40)
)
@settings(max_examples=200, deadline=None)
def test_jaccard_of_hashed_runs_is_that_of_the_runs(one: list[str], two: list[str]) -> None:
    shingles = Shingles()
    found = jaccard(shingles.of(one), shingles.of(two))
    assert found == pytest.approx(_plain(" ".join(one), " ".join(two)))
    assert jaccard(shingles.of(one), shingles.of(one)) == 1


def test_the_order_of_words_matters_and_what_stands_between_them_does_not() -> None:
    shingles = Shingles()
    runs = {int(shingles.runs(words_of(text))[0]) for text in ("a b c d e", "b a c d e", "a b c d", "e d c b a")}
    assert len(runs) == 4
    assert words_of("Über_all: 3,5 Don't") == ["über", "all", "3", "5", "don", "t"]


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.97, 1.0])
def test_bands_find_pairs_at_the_threshold(threshold: float) -> None:
    count, rows = bands(threshold)
    assert count * rows <= 128
    assert 1 - (1 - threshold**rows) ** count >= 0.999
    more = 128 // (rows + 1)
    assert rows == 64 or 1 - (1 - threshold ** (rows + 1)) ** more < 0.999, "no candidates than needed"


def test_near_pairs_are_those_of_all_pairs() -> None:
    pick = random.Random(0)
    texts = []
    for seed in range(60):
        words = _text(seed, 80).split()
        texts.append(" ".join(words))
        if seed % 2:
            words[pick.randrange(80)] = "changed"
            texts.append(" ".join(words))
    found = {(one, two): alike for one, two, alike in near_pairs(texts, 0.8)}
    wanted = {
        pair: alike
        for pair in combinations(range(len(texts)), 2)
        if (alike := _plain(texts[pair[0]], texts[pair[1]])) >= 0.8
    }
    assert len(wanted) == 30
    assert found == pytest.approx(wanted)


def test_copies_differ_in_case_and_punctuation_alone() -> None:
    seen = Duplicates(0.9)
    for number, (text, first) in enumerate(
        [("One, two.", None), ("one TWO", 0), ("two one", None), ("!!!", None), ("???", None), ("!!!", 3)]
    ):
        assert seen.exact(number, words_of(text), text) == first
    with pytest.raises(CorpusError, match=r"dedup=1\.5 is not above 0"):
        Duplicates(1.5)


@pytest.mark.skipif(not DATA.exists(), reason="no ../shared")
def test_known_pairs_of_real_text_are_found() -> None:
    records, listed = (
        [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").strip().split("\n")]
        for name in ("text/reuters.jsonl", "neardup/reuters.pairs.jsonl")
    )
    known = {frozenset((pair["a"], pair["b"])): pair["jaccard"] for pair in listed}
    texts = {record["id"]: record["text"] for record in records}
    found = {
        frozenset((records[one]["id"], records[two]["id"])): alike
        for one, two, alike in near_pairs(list(texts.values()), 0.9)
    }
    wanted = {pair for pair, alike in known.items() if alike >= 0.9}
    assert len(wanted & set(found)) >= 0.95 * len(wanted)
    for pair, alike in found.items():
        assert alike == pytest.approx(_plain(*(texts[name] for name in pair)))
        assert known[pair] == pytest.approx(alike, abs=1e-4)


def test_short_texts_are_alike_only_as_copies() -> None:
    date = "Reuters, London, March 3. To the editors:"
    assert list(near_pairs([date, date, f"{date} see below", f"{_text(1, 30)} {date}"], 0.5)) == []
    assert [pair[:2] for pair in near_pairs([date, _text(1, 30), f"{date} {_text(1, 30)}"], 0.5)] == [(1, 2)]


# --- clusters ------------------------------------------------------------------------------------------------------


def _killed(*_: Any) -> None:
    raise KeyboardInterrupt


def test_clusters_keep_their_best_and_rows_stay_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = PROSE * 2 + "He left it to his children, and they were not in the town at that time, but it had a garden."
    records = [
        {"id": "alone", "text": _text(1), "label": 3},
        {"id": "poor", "text": good.replace("said", "### said") + " ###" * 40, "label": [1]},
        {"id": "good", "text": good + " Nobody knew it.", "label": {"a": 1}},
        {"id": "copy", "text": good.upper() + " nobody knew it!", "label": None},
        {"id": "blank", "text": "  "},
    ]
    path = _jsonl(tmp_path / "a.jsonl", records)
    out, folder = tmp_path / "out.jsonl", tmp_path / "report"
    assert main.run(["corpus", "clean", path, "--out", str(out), "--report", str(folder), "--quiet"]) == 0
    assert [json.loads(line) for line in out.read_text().splitlines()] == [records[0], records[2]]
    written = json.loads((folder / "clusters.json").read_text())
    assert written["cluster_sizes"] == {"1": 1, "3": 1}
    assert (written["documents"], written["blank"], written["kept"], written["exact_duplicates"]) == (5, 1, 2, 1)
    (cluster,) = written["clusters"]
    assert cluster["kept"] == "good"
    assert [member["id"] for member in cluster["members"]] == ["poor", "good", "copy"]
    assert [member["exact"] for member in cluster["members"]] == [False, False, True]
    assert cluster["members"][1]["jaccard"] == pytest.approx(_plain(records[1]["text"], records[2]["text"]), abs=1e-4)
    assert [member["to"] for member in cluster["members"]] == [None, "poor", "good"]
    assert (folder / "clusters.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "report.html").read_text()
    assert "2 of 5 documents of a.jsonl stay, without 2 documents that say what another says." in page.replace(
        "\u00a0", " "
    )
    assert "<svg" in page
    assert main.run(["corpus", "clean", path, "--out", str(out), "--quiet"]) == 2, "nothing is overwritten"
    with pytest.raises(OutputError, match="report exists; choose another folder"):
        clean_file(path, report=folder)
    with monkeypatch.context() as patch:
        patch.setattr("shallower.verbs.corpus.cluster_png", _killed)
        with pytest.raises(KeyboardInterrupt):
            clean_file(path, report=folder, dedup=None, force=True)
    assert json.loads((folder / "clusters.json").read_text()) == written, "what was there stays whole"
    clean_file(path, report=folder, dedup=None, force=True)
    assert sorted(os.listdir(folder)) == ["clusters.json", "report.html"], "of the one before, nothing"
    (folder / "mine.jsonl").touch()  # such as the text that is cleaned
    only = r"is not a report \(clusters\.json, clusters\.png, report\.html\) and nothing else, so --force does"
    with pytest.raises(OutputError, match=only):
        clean_file(path, report=folder, force=True)
    assert (folder / "mine.jsonl").exists()
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "report.html").touch()
    with pytest.raises(OutputError, match=only):
        clean_file(path, report=tmp_path / "page", force=True)
    for result in (tmp_path / "new", tmp_path / "new" / "part" / "of.jsonl"):
        with pytest.raises(OutputError, match=r"is, or is inside of, --report .*new, a folder that is written whole"):
            clean_file(path, result, report=tmp_path / "new")


def test_nothing_is_written_into_the_folder_that_is_read(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    _jsonl(tmp_path / "texts" / "a.jsonl", [{"text": _text(1)}])
    with pytest.raises(OutputError, match=r"clean\.jsonl is in .*texts, where it would be read as text the next time"):
        clean_file(tmp_path / "texts", tmp_path / "texts" / "clean.jsonl")
    assert os.listdir(tmp_path / "texts") == ["a.jsonl"]


def test_the_next_command_is_printed_as_it_is_typed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = _jsonl(tmp_path / "a.jsonl", [{"text": _text(1)}]), tmp_path / "what stays.jsonl"
    assert main.run(["corpus", "clean", path, "--out", str(out), "--quiet"]) == 0
    assert capsys.readouterr().out.rstrip().endswith(f"--calibration '{out}'")


def test_a_cluster_of_low_quality_stays_nowhere(tmp_path: Path) -> None:
    records = [{"id": f"n{number}", "text": "### " * 40 + _text(1) + f" word{number}"} for number in range(5)]
    good = PROSE * 2 + "He left it to his children, and they were not in the town at that time, but it had a garden."
    path, folder = _jsonl(tmp_path / "a.jsonl", [*records, {"text": good}]), tmp_path / "report"
    args = ["corpus", "clean", path, "--out", str(tmp_path / "out.jsonl"), "--min-quality", "0.6", "--report"]
    assert main.run([*args, str(folder), "--quiet"]) == 0
    (cluster,) = json.loads((folder / "clusters.json").read_text())["clusters"]
    assert cluster["kept"] is None
    page = (folder / "report.html").read_text()
    assert ": stays" not in page
    assert page.count("leaves: low quality") == 1
    assert re.search(r"leaves; Jaccard 0\.\d\d to n0;", page)
    assert "And 2 more in clusters.json." in page


def test_rows_of_parquet_files_keep_all_their_fields(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    records = [{"id": number, "body": _text(number), "label": f"kind {number}"} for number in range(3)]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    clean_file(f"{tmp_path / 'a.parquet'}#body", tmp_path / "out.jsonl", dedup=None)
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == records


def test_rows_with_half_a_surrogate_pair_stay_as_they_were(tmp_path: Path) -> None:
    records = [{"text": _text(1), "title": "half \ud83d pair"}, {"text": "é \ud83d\ude00 \udc00 " + _text(2)}]
    clean_file(_jsonl(tmp_path / "a.jsonl", records), tmp_path / "out.jsonl", dedup=None)
    lines = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [json.loads(json.dumps(record)) for record in records]
    assert "é 😀 \\udc00" in lines[1]


def test_a_chain_of_pairs_is_one_cluster(tmp_path: Path) -> None:
    words = _text(0, 100).split()
    texts = []
    for step in range(4):
        texts.append(" ".join([*(f"new{place}" for place in range(6 * step)), *words[6 * step :]]))
    path = _jsonl(tmp_path / "a.jsonl", ({"text": text} for text in texts))
    assert _plain(texts[0], texts[1]) > 0.8 > _plain(texts[0], texts[3])
    found = clean(open_source(path), dedup=0.8)
    assert found.sizes == {1: 0, 4: 1} or found.sizes == {4: 1}
    assert len(found.kept) == 1
    assert clean(open_source(path), dedup=None).kept == frozenset(range(4))


def test_many_copies_of_a_template_are_compared_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr("shallower.corpus.duplicates.jaccard", lambda *sets: calls.append(None) or jaccard(*sets))
    base = _text(0, 200)
    path = _jsonl(tmp_path / "a.jsonl", ({"text": f"{base} number {number}"} for number in range(60)))
    (cluster,) = clean(open_source(path)).clusters
    assert len(cluster.members) == 60
    assert len(calls) == 59


def test_texts_on_the_page_are_escaped(tmp_path: Path) -> None:
    text = "<script>alert(1)</script> " + _text(3)
    found = clean(open_source(_jsonl(tmp_path / "a.jsonl", [{"text": text}, {"text": text}])))
    page = render(CleanReport(found, (), {0: text, 1: text}))
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


# --- quality -------------------------------------------------------------------------------------------------------


def test_signals_are_what_their_names_say() -> None:
    found = signals("The cat sat.\nThe cat sat.\n42 {}")
    assert found.words == 7
    assert found.mean_word == pytest.approx((3 * 6 + 2) / 7)
    assert found.symbols == pytest.approx(2 / 7)
    assert found.alphabetic == pytest.approx(6 / 7)
    assert found.duplicate_lines == pytest.approx(12 / 24)
    assert found.stop_words == pytest.approx(2 / 7)
    assert found.repeated_runs == 0
    assert signals("a b c d e x a b c d e").repeated_runs == pytest.approx(5 / 11)
    assert signals("").words == 0


def test_prose_scores_above_what_is_none() -> None:
    prose = PROSE + "They were all from her family, and it is not known which of them will be there on that day " * 1
    prose += "when the work is done, as he has no other house but this one, and you would have to ask at the office."
    judge = scorer("rules")
    texts = {
        "prose": prose,
        "repeated": PROSE * 40,
        "short": "Stock up.",
        "table": "1.25 3.50 17 42 " * 40,
        "code": "for (i = 0; i < n; i++) { x[i] = {y: [a, b, c]}; } " * 10,
        "letters": "q w e r t z u i o p " * 20,
        "empty": "",
    }
    scores = {name: judge(text, signals(text)) for name, text in texts.items()}
    assert scores.pop("prose") == 1
    assert max(scores.values()) < 0.2, scores


@given(st.text(max_size=400))
@settings(max_examples=100, deadline=None)
def test_every_text_has_a_score(text: str) -> None:
    found = signals(text)
    assert 0 <= scorer("rules")(text, found) <= 1
    assert all(
        0 <= share <= 1 for share in (found.alphabetic, found.duplicate_lines, found.repeated_runs, found.stop_words)
    )


def test_a_scorer_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quality.get("rules")  # the built-in ones are there before
    monkeypatch.setattr(quality, "_methods", dict(quality._methods))

    @quality("has-river")
    def has_river(text: str, signals: Any) -> float:
        return float("river" in text)

    @quality("wild")
    def wild(text: str, signals: Any) -> float:
        return 7

    path = _jsonl(tmp_path / "a.jsonl", [{"text": "the river " * 9}, {"text": "the house " * 9}])
    assert clean(open_source(path), min_quality=0.5, quality="has-river").kept == {0}
    made = build_calibration(f"{path}?min_quality=0.5&quality=has-river&sequences=1&length=8", tiny_tokenizer())
    assert (made.sources[0].low_quality, made.sources[0].documents) == (1, 1)
    with pytest.raises(UserError, match="from 0 to 1"):
        clean(open_source(path), min_quality=0.5, quality="wild")
    with pytest.raises(UnknownName, match="did you mean 'rules'"):
        clean(open_source(path), quality="rule")
    with pytest.raises(CorpusError, match=r"no document of a\.jsonl stays"):
        clean_file(path, min_quality=1.0)


# --- overlap -------------------------------------------------------------------------------------------------------


def test_rows_of_an_evaluation_set_are_found_in_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [_text(seed, 50) for seed in range(6)]
    rows = [
        {"question": "Who? " + texts[0], "choices": ["a", "b"], "gold": 0},
        {"question": "Short one", "choices": ["yes", "no"], "gold": 1},
        {"goal": "?", "choices": ["b", {"deep": " ".join(texts[1].split()[10:23]).upper()}], "gold": 1},
        {"question": " ".join(texts[2].split()[:12]) + " else", "choices": ["a", "b"], "gold": 1},
    ]
    runs = EvaluationRuns(_jsonl(tmp_path / "test.jsonl", rows))
    for text in texts[1:]:
        runs.look(text)
    found = runs.found()
    assert (found.rows, found.long_enough, found.shared, found.documents) == (4, 3, 1, 1)
    assert found.examples == (" ".join(texts[1].split()[10:23]),)
    runs.look(texts[0])
    assert (runs.found().shared, runs.found().documents) == (2, 2)
    passages = Path(_jsonl(tmp_path / "passages.jsonl", [{"text": text} for text in texts]))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("shallower.verbs.supply.demo_text", lambda name: passages)
    (shared,) = clean_file(passages, dedup=None, against=("wiki",)).overlaps
    assert (shared.rows, shared.shared) == (6, 6), "a domain is there as for calibration"
    with pytest.raises(CorpusError, match="no row with 13 words"):
        EvaluationRuns(_jsonl(tmp_path / "short.jsonl", rows[1:2]))
    with pytest.raises(CorpusError, match="no such file"):
        EvaluationRuns(str(tmp_path / "none.jsonl"))


@pytest.mark.skipif(not DATA.exists(), reason="no ../shared")
def test_known_overlap_of_real_text(tmp_path: Path) -> None:
    runs = EvaluationRuns(str(DATA / "tasks/boolq/validation.jsonl"))
    for document in open_source(str(DATA / "text/c4.jsonl")).read():
        runs.look(document.text)
    assert runs.found().shared == 2


def test_a_page_that_cannot_be_written_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = _text(1)
    path = _jsonl(tmp_path / "a.jsonl", [{"text": text}, {"text": text}, {"text": _text(2)}])

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("shallower.verbs.corpus.cluster_png", full)
    with pytest.raises(OutputError, match=r"--report .*report cannot be written: No space left on device"):
        clean_file(path, report=tmp_path / "report")
    assert os.listdir(tmp_path) == ["a.jsonl"]
