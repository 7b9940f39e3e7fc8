"""Text in, the same tokens out: sources, packing, parts, digests, overlap, and what is said of bad text."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from shallower.corpus import CalibrationSet, adds_bos, build_calibration, build_choices, open_source, overlap
from shallower.corpus.pieces import pieces
from shallower.errors import CorpusError, OutputError, UnknownName, UserError
from shallower.evaluation.text import read_evaluation_text
from shallower.testing.families import tiny_tokenizer

WORDS = [
    "the",
    "of",
    "river",
    "stone",
    "light",
    "under",
    "seven",
    "green",
    "window",
    "carries",
    "slowly",
    "between",
    "house",
    "and",
    "paper",
]


def _prose(words: int, seed: int) -> str:
    pick = random.Random(seed)
    lines = [" ".join(pick.choice(WORDS) for _ in range(12)) for _ in range(words // 12)]
    return f"document {seed}\n\n" + "\n\n".join(lines) + "\n"


def _jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def bos_tokenizer() -> PreTrainedTokenizerFast:
    made = tiny_tokenizer()
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.bos_token_id)]
    )
    return made


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    return _jsonl(tmp_path / "prose.jsonl", ({"text": _prose(60, seed)} for seed in range(200)))


# --- the set -------------------------------------------------------------------------------------------------------


def test_same_specification_same_bytes_and_other_seed_other_bytes(corpus: str, tokenizer: Any) -> None:
    first = build_calibration(corpus, tokenizer, sequences=6, length=64)
    again = build_calibration(corpus, tokenizer, sequences=6, length=64)
    other = build_calibration(corpus, tokenizer, sequences=6, length=64, seed=1)
    assert first.digest == again.digest != other.digest
    assert torch.equal(first.input_ids, again.input_ids)
    assert first.input_ids.dtype == torch.int64
    assert first.input_ids.shape == (6, 64)
    assert first.attention_mask is None
    assert first.tokens == 6 * 64
    assert build_calibration(first.spec, tokenizer).digest == first.digest, "the written-out spec is complete"


def test_location_of_the_file_does_not_matter(corpus: str, tokenizer: Any, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / "prose.jsonl"
    copy.parent.mkdir()
    copy.write_bytes(Path(corpus).read_bytes())
    one, two = (build_calibration(str(path), tokenizer, sequences=2, length=32) for path in (corpus, copy))
    assert one.digest == two.digest
    assert one.sources == two.sources


def test_options_in_the_specification_win(corpus: str, tokenizer: Any) -> None:
    by_spec = build_calibration(
        f"{corpus}?sequences=3&length=40&seed=2&part=held-out", tokenizer, sequences=9, length=50
    )
    by_argument = build_calibration(corpus, tokenizer, sequences=3, length=40, seed=2, part="held-out")
    assert by_spec.input_ids.shape == (3, 40)
    assert by_spec.digest == by_argument.digest
    assert by_spec.spec == by_argument.spec


def test_batches_cover_the_set_and_leave_the_digest_alone(corpus: str, tokenizer: Any) -> None:
    made = build_calibration(corpus, tokenizer, sequences=7, length=32)
    for size in (1, 3, 7, 100):
        batches = list(made.batches(size))
        assert torch.equal(torch.cat([batch.input_ids for batch in batches]), made.input_ids)
        rebuilt = CalibrationSet("x", torch.cat([batch.input_ids for batch in batches]), None)
        assert rebuilt.digest == made.digest
    assert made.subset([2, 0]).input_ids.tolist() == made.input_ids[[2, 0]].tolist()
    assert made.subset([2, 0]).digest != made.digest
    assert (made.identity.spec, made.identity.tokens, made.identity.digest) == (made.spec, made.tokens, made.digest)


def test_digest_sees_shape_and_mask_but_not_a_mask_of_ones() -> None:
    ids = torch.arange(12)
    mask = torch.ones(3, 4, dtype=torch.int64)
    plain = CalibrationSet("x", ids.view(3, 4), None)
    assert CalibrationSet("x", ids.view(3, 4), mask).digest == plain.digest
    assert CalibrationSet("x", ids.view(4, 3), None).digest != plain.digest
    short = mask.clone()
    short[1, 3] = 0
    padded = CalibrationSet("x", ids.view(3, 4), short)
    assert padded.digest != plain.digest
    assert padded.tokens == 11


@pytest.mark.parametrize(
    ("ids", "mask"),
    [
        (torch.zeros(2, 3), None),
        (torch.zeros(6, dtype=torch.int64), None),
        (torch.zeros(0, 3, dtype=torch.int64), None),
        (torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 2, dtype=torch.int64)),
        (torch.zeros(1, 3, dtype=torch.int64), torch.tensor([[0, 1, 1]])),
        (torch.zeros(1, 3, dtype=torch.int64), torch.tensor([[2, 1, 1]])),
        (torch.zeros(1, 3, dtype=torch.int64), torch.tensor([[0, 0, 0]])),
    ],
)
def test_malformed_tensors_are_refused(ids: torch.Tensor, mask: torch.Tensor | None) -> None:
    with pytest.raises(CorpusError, match="must be"):
        CalibrationSet("x", ids, mask)


def test_save_and_load_byte_for_byte(corpus: str, tokenizer: Any, tmp_path: Path) -> None:
    made = build_calibration(corpus, tokenizer, sequences=4, length=2000, pack=False)
    made.save(tmp_path / "set")
    loaded = CalibrationSet.load(tmp_path / "set")
    assert loaded.to_json() == made.to_json()
    assert loaded.attention_mask is not None
    assert torch.equal(loaded.attention_mask, made.attention_mask)  # type: ignore[arg-type]
    assert build_calibration(str(tmp_path / "set"), tokenizer).digest == made.digest, "a saved set is a specification"
    loaded.save(tmp_path / "again")
    for name in ("manifest.json", "calibration.safetensors"):
        assert (tmp_path / "set" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    with pytest.raises(CorpusError, match="finished"):
        build_calibration(f"{tmp_path / 'set'}?length=3", tokenizer)


def test_changed_or_malformed_saved_sets_are_refused(corpus: str, tokenizer: Any, tmp_path: Path) -> None:
    made = build_calibration(corpus, tokenizer, sequences=2, length=16)
    made.save(tmp_path)
    manifest = tmp_path / "manifest.json"
    good = json.loads(manifest.read_text())
    made.subset([1, 0]).save(tmp_path)
    manifest.write_text(json.dumps(good))
    with pytest.raises(CorpusError, match="was changed after"):
        CalibrationSet.load(tmp_path)
    manifest.write_text(json.dumps({**good, "digset": 1, "format": "shallower.calibration/9"}))
    with pytest.raises(CorpusError, match=r"calibration/9.*did you mean 'digest'"):
        CalibrationSet.load(tmp_path)
    for content, message in (
        ([], "is not an object, but list"),
        ("x", "is not an object, but str"),
        ({**good, "sources": None}, "'sources' of .* is null, not a list"),
        ({**good, "sources": [1]}, "source 0 is not an object"),
    ):
        manifest.write_text(json.dumps(content))
        with pytest.raises(CorpusError, match=message):
            CalibrationSet.load(tmp_path)
    manifest.write_text("1" * 5000)
    with pytest.raises(CorpusError, match="cannot be read"):
        CalibrationSet.load(tmp_path)
    (tmp_path / "calibration.safetensors").write_bytes(b"no")
    with pytest.raises(CorpusError, match="cannot be read"):
        CalibrationSet.load(tmp_path)
    with pytest.raises(CorpusError, match="cannot be read"):
        CalibrationSet.load(tmp_path / "nowhere")
    with pytest.raises(OutputError):
        made.save(manifest / "below-a-file")


def test_a_set_of_another_vocabulary_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    CalibrationSet("x", torch.full((1, 4), 10**6), None).save(tmp_path)
    with pytest.raises(CorpusError, match="another model"):
        build_calibration(str(tmp_path), tokenizer)


# --- packing, BOS, parts -------------------------------------------------------------------------------------------


def test_packing_joins_documents_with_eos(tokenizer: Any, tmp_path: Path) -> None:
    texts = ["alpha beta", "gamma", "delta epsilon"]
    spec = _jsonl(tmp_path / "a.jsonl", ({"text": text} for text in texts))
    total = sum(len(tokenizer(text)["input_ids"]) for text in texts) + 2
    row = build_calibration(spec, tokenizer, sequences=1, length=total).input_ids[0].tolist()
    assert row.count(tokenizer.eos_token_id) == 2
    assert sorted(tokenizer.decode(row).split(tokenizer.eos_token)) == sorted(texts)
    with pytest.raises(CorpusError, match=rf"holds {total} tokens.* need {total + 1}"):
        build_calibration(spec, tokenizer, sequences=1, length=total + 1)


def test_bos_is_where_the_tokenizer_wants_it(corpus: str, tokenizer: Any, bos_tokenizer: Any) -> None:
    bos = tokenizer.bos_token_id
    assert not adds_bos(tokenizer)
    assert adds_bos(bos_tokenizer)
    assert bos not in build_calibration(corpus, tokenizer, sequences=4, length=64).input_ids
    auto = build_calibration(corpus, bos_tokenizer, sequences=4, length=64)
    assert (auto.input_ids == bos).nonzero().tolist() == [[row, 0] for row in range(4)]
    asked = build_calibration(corpus, tokenizer, sequences=4, length=64, bos="each-sequence")
    assert asked.digest == auto.digest
    assert bos not in build_calibration(corpus, bos_tokenizer, sequences=4, length=64, bos="none").input_ids
    documents = build_calibration(corpus, tokenizer, sequences=1, length=4000, bos="each-document").input_ids[0]
    after_eos = (documents[:-1] == tokenizer.eos_token_id).nonzero()[:, 0] + 1
    assert len(after_eos) > 2
    assert (documents == bos).nonzero()[:, 0].tolist() == [0, *after_eos.tolist()]


def test_bos_that_the_tokenizer_lacks(corpus: str) -> None:
    without = tiny_tokenizer()
    without.bos_token = None
    assert build_calibration(corpus, without, sequences=1, length=8).tokens == 8
    with pytest.raises(CorpusError, match="no BOS"):
        build_calibration(corpus, without, sequences=1, length=8, bos="each-sequence")


def test_one_document_a_sequence(tokenizer: Any, tmp_path: Path) -> None:
    spec = _jsonl(tmp_path / "a.jsonl", [{"text": "xy" * 3}, {"text": "  "}, {"text": "pq" * 50}])
    made = build_calibration(spec, tokenizer, sequences=2, length=20, pack=False, bos="each-sequence")
    assert made.attention_mask is not None
    assert sorted(made.attention_mask.sum(dim=1).tolist()) == [7, 20]
    assert made.input_ids[:, 0].tolist() == [tokenizer.bos_token_id] * 2
    short = made.input_ids[made.attention_mask.sum(dim=1).argmin()]
    assert short[7:].tolist() == [tokenizer.pad_token_id] * 13
    with pytest.raises(CorpusError, match="holds 2 documents"):
        build_calibration(spec, tokenizer, sequences=3, length=20, pack=False)


def test_train_and_held_out_share_no_document(corpus: str, tokenizer: Any) -> None:
    def documents(part: Any, seed: int, max_chars: int) -> set[str]:
        made = build_calibration(
            corpus, tokenizer, sequences=4, length=20, part=part, seed=seed, pack=False, max_chars=max_chars
        )
        return {tokenizer.decode(row[:12]) for row in made.input_ids}

    train = set().union(*(documents("train", seed, 100_000) for seed in range(8)))
    held_out = set().union(*(documents("held-out", seed, 50) for seed in range(8)))
    assert len(train) > 10
    assert held_out
    assert not train & held_out


def test_a_huge_document_does_not_fill_the_set(tokenizer: Any, tmp_path: Path) -> None:
    huge = {"text": _prose(60_000, 999)}
    spec = _jsonl(tmp_path / "a.jsonl", [huge, *({"text": _prose(1_500, seed)} for seed in range(12))])
    made = build_calibration(spec, tokenizer, sequences=100, length=512)
    assert made.sources[0].documents > 3
    capped = build_calibration(spec, tokenizer, sequences=1, length=64, pack=False, max_chars=20, seed=3)
    assert capped.tokens <= 20


def test_sources_are_recorded(corpus: str, tokenizer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / "b.txt").write_text(_prose(300, 1))
    _jsonl(folder / "deep" / "a.jsonl", [{"question": "How?", "answer": "So."}])
    (folder / ".hidden" / "c.txt").write_text("hidden")
    (folder / "notes.md").write_text("# not read")
    made = build_calibration(str(folder), tokenizer, sequences=1, length=500)
    assert [record.name for record in made.sources] == ["b.txt", "deep/a.jsonl"]
    weights = [record.weight for record in made.sources]
    tokens = [record.tokens for record in made.sources]
    assert weights == pytest.approx([count / sum(tokens) for count in tokens])
    for bos in ("each-sequence", "each-document", "none"):
        for pack in (True, False):
            made = build_calibration(str(folder), tokenizer, sequences=2, length=100, bos=bos, pack=pack)
            assert sum(record.tokens or 0 for record in made.sources) == made.tokens
    other_seed = build_calibration(str(folder), tokenizer, sequences=1, length=500, seed=5)
    assert [record.sha256 for record in other_seed.sources] == [record.sha256 for record in made.sources]


# --- sources -------------------------------------------------------------------------------------------------------


def test_fields_of_a_record(tmp_path: Path) -> None:
    def texts(record: dict[str, Any], field: str = "") -> list[str]:
        return [document.text for document in open_source(_jsonl(tmp_path / "r.jsonl", [record]) + field).read()]

    assert texts({"text": "a", "question": "b"}) == ["a"]
    assert texts({"instruction": "Do.", "input": "", "output": "Done."}) == ["Do.\n\nDone."]
    assert texts({"question": "Why?", "answer": "Because."}) == ["Why?\n\nBecause."]
    assert texts({"text": "a", "body": "b"}, "#body") == ["b"]
    assert texts({"text": "half \ud800 pair"}) == ["half ? pair"]
    turns = [{"role": "user", "content": "Half \ud800."}, {"role": "assistant", "content": None, "tool_calls": []}]
    turns += [{"role": "assistant", "tool_calls": []}, {"role": "user", "content": [{"type": "image"}]}]
    assert texts({"messages": [*turns, {"role": "assistant", "content": "So."}]}) == ["Half ?.\n\nSo."]
    with pytest.raises(CorpusError, match=r"line 1 has no field .* only title, id: name one"):
        texts({"title": "a", "id": 3})
    with pytest.raises(CorpusError, match=r"no field 'bdy'.*did you mean 'body'"):
        texts({"body": "a"}, "#bdy")
    with pytest.raises(CorpusError, match="field 'text' holds 3, not text"):
        texts({"text": 3})


def test_pieces_join_to_the_text() -> None:
    text = _prose(3_000, 4) + "x" * 5_000 + "\n" + _prose(500, 5)
    cut = list(pieces(text.splitlines(keepends=True), 1_000))
    assert "".join(cut) == text
    assert max(map(len, cut)) <= 1_000
    assert cut[0].endswith("\n\n"), "cut at a paragraph's end"


def test_python_is_always_there(tokenizer: Any) -> None:
    made = build_calibration("python:docs?part=held-out", tokenizer, sequences=8, length=256)
    assert made.digest == build_calibration("python:docs?part=held-out", tokenizer, sequences=8, length=256).digest
    assert next(iter(open_source("python:source").read())).text
    with pytest.raises(CorpusError, match="python:docs"):
        open_source("python:poems")


def test_docstrings_are_held_out_with_the_source_that_they_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    files = [(f"m{number}.py", f'"""Documented {number}."""\n\nvalue = {number}\n') for number in range(40)]
    monkeypatch.setattr("shallower.corpus.sources._python_source", lambda: iter(files))
    ids = [document.id for document in open_source("python").read()]
    assert len(set(ids)) == len(ids) == 80
    held, train = (read_evaluation_text(f"python?part={part}") for part in ("held-out", "train"))
    times = [(held.count(f"Documented {number}."), train.count(f"Documented {number}.")) for number in range(40)]
    assert set(times) == {(0, 2), (2, 0)}
    assert next(iter(open_source("python:docs").read())).id == ids[0] == "python:docs:m0.py:0"


def test_hub_data_sets(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    calls = []

    def load_dataset(path: str, **options: Any) -> Iterable[dict[str, str]]:
        calls.append((path, options["name"], options["split"], options["streaming"]))
        return ({"text": _prose(60, seed)} for seed in range(5_000))

    monkeypatch.setitem(
        sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset, __spec__=ModuleSpec("datasets", None))
    )
    specs = ("owner/name", "hf:owner/name:test", "hf:owner/name:en", "hf:owner/name:en:validation", "owner/name:en:odd")
    for spec in specs:
        made = build_calibration(f"{spec}?sequences=2&length=32", tokenizer)
        assert made.sources[0].name.startswith("hf:owner/name")
    assert calls == [
        ("owner/name", None, "train", True),
        ("owner/name", None, "test", True),
        ("owner/name", "en", "train", True),
        ("owner/name", "en", "validation", True),
        ("owner/name", "en", "odd", True),
    ]


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host\nlong trace")

    monkeypatch.setitem(
        sys.modules, "datasets", SimpleNamespace(load_dataset=fail, __spec__=ModuleSpec("datasets", None))
    )
    with pytest.raises(CorpusError, match=r"hf:a/b:train cannot be read from the Hub: no route to host\. Check"):
        list(open_source("a/b").read())
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CorpusError, match="pip install"):
        list(open_source("a/b").read())
    with pytest.raises(CorpusError, match="not a Hub data set"):
        open_source("hf:plain")


def test_arrow_folder(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"passage": ["one", "one", "two", "one"], "label": [1, 2, 3, 4]})
    with (
        pyarrow.OSFile(str(tmp_path / "data-0.arrow"), "wb") as file,
        pyarrow.ipc.new_stream(file, table.schema) as writer,
    ):
        writer.write_table(table)
    assert [document.text for document in open_source(f"arrow:{tmp_path}#passage").read()] == ["one", "two"]
    with pytest.raises(CorpusError, match="arrow:"):
        open_source(str(tmp_path))
    (tmp_path / "data-0.arrow").write_bytes(b"junk")
    with pytest.raises(CorpusError, match="cannot be read as an Arrow stream"):
        list(open_source(f"arrow:{tmp_path}#passage").read())
    with pytest.raises(CorpusError, match="no Arrow data"):
        open_source(f"arrow:{tmp_path / 'none'}")


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "is empty"),
        ("blank.jsonl", b"\n\n", "is empty"),
        ("blank.txt", b" \n \n", "is empty"),
        ("binary.txt", b"a\nb\0c", "line 2 has a NUL byte"),
        ("latin.txt", "caf\u00e9".encode("latin-1"), "byte 0xe9"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("list.jsonl", b'["a"]\n', "not a JSON object"),
        ("digits.jsonl", b'{"text": "a", "id": ' + b"1" * 5000 + b"}\n", "line 1 has a number of too many digits"),
        ("deep.jsonl", b'{"text": ' + b"[" * 200_000 + b"]" * 200_000 + b"}\n", "line 1 is nested too deeply"),
        ("null.jsonl", b'{"instruction": "a", "input": null, "output": 5}\n', "field 'output' holds 5, not text"),
        ("page.pdf", b"text", "extension '.pdf'"),
        ("short.txt", b"a few words", r"holds \d+ tokens.* need 16,384"),
    ],
)
def test_bad_files_are_one_sentence(tmp_path: Path, tokenizer: Any, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=message) as caught:
        build_calibration(str(path), tokenizer)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tail", "kind", "message"),
    [
        ("?sequnces=3", UnknownName, "did you mean 'sequences'"),
        ("?length=long", UserError, "a whole number"),
        ("?part=test", UserError, "held-out"),
        ("?length=1", CorpusError, "at least 2"),
        ("?sequences=0", CorpusError, "at least 1"),
        ("?seed", CorpusError, "no value"),
        ("?seed=1&seed=2", CorpusError, "twice"),
        ("#body", CorpusError, "no field 'body'"),
    ],
)
def test_bad_options(corpus: str, tokenizer: Any, tail: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        build_calibration(corpus + tail, tokenizer)


def test_columns_that_are_not_text(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    content = pyarrow.array([b"fine", b"\xff\xfe"]).buffers()
    table = pyarrow.table({"text": pyarrow.Array.from_buffers(pyarrow.string(), 2, content)})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    for spec, kind in ((f"{tmp_path / 'a.parquet'}", "parquet"), (f"arrow:{tmp_path / 'a.arrow'}", "an Arrow stream")):
        with pytest.raises(CorpusError, match=f"cannot be read as {kind}: 'utf-8' codec"):
            list(open_source(spec).read())


def test_missing_text(tmp_path: Path, tokenizer: Any) -> None:
    nobodys = "~a-user-that-is-not-there/a.txt"
    with pytest.raises(CorpusError, match="no Arrow data at '~a-user"):
        open_source(f"arrow:{nobodys}")
    with pytest.raises(CorpusError, match="is no file"):
        build_choices(nobodys, tokenizer)
    with pytest.raises(CorpusError, match="no such file"):
        read_evaluation_text(nobodys)
    for spec in (tmp_path / "none.txt", "some/none.jsonl", "none", "", nobodys, f"{nobodys}*0.5+{nobodys}"):
        with pytest.raises(CorpusError, match=r"no such file|names no text"):
            build_calibration(str(spec), tokenizer)
    with pytest.raises(CorpusError, match="holds no"):
        build_calibration(str(tmp_path), tokenizer)
    with pytest.raises(CorpusError, match="bos='never'"):
        build_calibration("python", tokenizer, bos="never")  # type: ignore[arg-type]


# --- overlap -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 13])
def test_overlap_is_exact(n: int) -> None:
    draw = np.random.default_rng(n)
    known = draw.integers(0, 3, (4, 40))
    asked = draw.integers(0, 3, 60)
    mask = np.ones_like(known)
    mask[1, 25:] = 0
    grams = {
        tuple(row[start : start + n])
        for row, real in zip(known, mask.sum(axis=1), strict=True)
        for start in range(real - n + 1)
    }
    expected = sum(tuple(asked[start : start + n]) in grams for start in range(60 - n + 1))
    calibration = CalibrationSet("x", torch.from_numpy(known), torch.from_numpy(mask))
    found = overlap(calibration, torch.from_numpy(asked), n=n)
    assert (found.shared, found.total) == (expected, 60 - n + 1)


def test_overlap_at_the_edges() -> None:
    ids = torch.arange(50)
    assert overlap(ids, ids).shared == overlap(ids, ids).total == 50 - 12
    assert overlap(ids, ids + 100).shared == 0
    assert overlap(ids[:5], ids) == overlap(ids[:12], ids), "a text shorter than a run shares nothing"
    assert overlap(ids, ids[:12]).total == 0
    assert overlap(ids[:3], ids[:3]).total == 0
    assert overlap(ids, ids.view(2, 25)).total == 2 * 13, "runs do not cross sequences"
    with pytest.raises(ValueError, match="at least one"):
        overlap(ids, ids, n=0)
