"""Calibration specifications: mixtures, YAML, domains, positions, chats, few-shot prompts, the model's own text."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.utils import chat_template_utils

from shallower.cli import main
from shallower.corpus import CalibrationSet, Supply, build_calibration, build_choices, open_source, text_of
from shallower.corpus.build import _shares
from shallower.corpus.instructions import build_instructions
from shallower.corpus.options import OPTIONS
from shallower.corpus.specification import Term, parse_specification
from shallower.errors import CorpusError, TooLittleText, UnknownName, UserError
from shallower.evaluation import text as evaluation_text
from shallower.evaluation.text import read_evaluation_text
from shallower.plan import MadeBy, PruningPlan, without_folders
from shallower.testing.families import tiny_model, tiny_tokenizer
from shallower.units import Unit
from shallower.verbs.calibrate import calibrate, calibrate_most
from shallower.verbs.contamination import _calibration_of
from shallower.verbs.corpus import build
from shallower.verbs.subject import open_subject
from shallower.verbs.supply import sample
from shallower.verbs.texts import held_out, nothing_held_out

SMALL: dict[str, Any] = {"sequences": 4, "length": 16}


def _jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def _texts(path: Path, word: str, count: int = 40, words: int = 60) -> str:
    pick = random.Random(word)
    return _jsonl(
        path, ({"text": " ".join(f"{word}{pick.randrange(1000)}" for _ in range(words))} for _ in range(count))
    )


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture
def two(tmp_path: Path) -> tuple[str, str]:
    return _texts(tmp_path / "a.jsonl", "x"), _texts(tmp_path / "b.jsonl", "y")


# --- mixtures ------------------------------------------------------------------------------------------------------


def test_a_mixture_gives_each_source_its_share(two: tuple[str, str], tokenizer: Any) -> None:
    made = build_calibration(f"{two[0]}*0.7+{two[1]}*0.3?sequences=10&length=32", tokenizer)
    kinds = ["y" in tokenizer.decode(row) for row in made.input_ids]
    assert sum(kinds) == 3
    assert sum(kinds[:5]) in (1, 2), "sources take turns"
    first, second = made.sources
    assert (first.weight, second.weight, first.tokens, second.tokens) == (0.7, 0.3, 7 * 32, 3 * 32)
    assert (first.read, second.read) == (40, 40)
    assert build_calibration(made.spec, tokenizer).digest == made.digest
    assert made.identity.title.startswith("a.jsonl*0.7+b.jsonl*0.3?sequences=10"), "no folders"
    assert without_folders("texts/") == "texts"
    assert without_folders("my/a/*0.7+b//*0.3") == "a*0.7+b*0.3"
    alone = build_calibration(f"{two[0]}?sequences=7&length=32", tokenizer)
    rows = {tuple(row) for row in made.input_ids.tolist()}
    assert {tuple(row) for row in alone.input_ids.tolist()} <= rows, "a source's sequences are what it gives alone"


def test_a_mixture_may_be_longer_than_the_name_of_a_file(
    two: tuple[str, str], tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    spec = "+".join(["a.jsonl*0.5", "b.jsonl*0.5"] * 16)
    assert len(spec) > 255
    for options in ("", "?seed=1"):
        assert build_calibration(spec + options, tokenizer, sequences=32, length=8).sequences == 32
        assert text_of(spec + options) == spec
    (text,) = held_out(spec).values()
    assert text == read_evaluation_text(f"{spec}?part=held-out")
    with pytest.raises(CorpusError, match="is no file: questions"):
        build_choices(spec.replace("*0.5", "") + "+c.jsonl", tokenizer)
    with pytest.raises(CorpusError, match="there is no such file"):
        open_source("x" * 300)


@pytest.mark.parametrize(("count", "words"), [(400, 60), (60, 6_000)])
def test_the_beginning_of_a_held_out_mixture_is_mixed_by_the_weights(tmp_path: Path, count: int, words: int) -> None:
    """Perplexity is measured on some windows from the start, and the name of the text is that of the whole mixture."""
    one = _texts(tmp_path / "a.jsonl", "x", count, words)
    other = _texts(tmp_path / "b.jsonl", "y", count, words)
    (text,) = held_out(f"{one}*0.25+{other}*0.75").values()
    (whole, others) = (read_evaluation_text(f"{path}?part=held-out") for path in (one, other))
    beginning = text[: len(others) // 2]
    assert 0.7 < beginning.count("y") / (beginning.count("x") + beginning.count("y")) < 0.8
    assert (text.count("x"), text.count("y")) == (whole.count("x"), others.count("y"))
    assert text == read_evaluation_text(f"{one}*0.25+{other}*0.75?part=held-out")


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(100_000, 10**6))
def test_shares_are_exact_to_one_sequence(weights: list[float], sequences: int) -> None:
    shares = _shares([Term(str(place), weight) for place, weight in enumerate(weights)], sequences)
    assert sum(shares) == sequences
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - weight / sum(weights) * sequences) < 1


def test_paths_that_hold_a_plus_are_read_again(tmp_path: Path, tokenizer: Any) -> None:
    folder = tmp_path / "c++"
    folder.mkdir()
    paths = [_texts(folder / "a+b.jsonl", "x"), _texts(folder / "a.jsonl", "y"), _texts(folder / "1+2+3.jsonl", "z")]
    listed = {
        "one.yaml": ["a+b.jsonl#text"],
        "two.yaml": ["a+b.jsonl*0.5", "a.jsonl*0.5"],
        "three.yaml": ["a.jsonl", {"source": "1+2+3.jsonl#text", "weight": 2}, "a+b.jsonl"],
    }
    for name, sources in listed.items():
        file = folder / name
        file.write_text(json.dumps({"sources": sources, **SMALL}))
        made = build_calibration(str(file), tokenizer, part="train")
        assert build_calibration(made.spec, tokenizer).digest == made.digest
        assert len(made.sources) == len(sources)
        assert held_out(file)
    terms = parse_specification("+".join(paths), ()).terms
    assert [term.source for term in terms] == paths


def test_weights_that_cannot_be(two: tuple[str, str], tokenizer: Any) -> None:
    one, other = two
    assert len(parse_specification(f"{one}*0+{other}", ()).terms) == 1
    for spec, message in (
        (f"{one}*0+{other}*0", "sum to zero"),
        (f"{one}*-1+{other}", "weight '-1'"),
        (f"{one}*many", "weight 'many'"),
        (f"{one}*nan", "weight 'nan'"),
        (f"{one}+*2", "has no name"),
        (f"{one}*1000+{other}", "which is none"),
        (f"{one}+{one}x.jsonl", "no such file"),
    ):
        with pytest.raises(CorpusError, match=message):
            build_calibration(spec, tokenizer, **SMALL)


def test_great_and_small_weights_are_written_so_that_they_can_be_read(two: tuple[str, str], tokenizer: Any) -> None:
    weights = {"3000000": "1000000", "0.33333334": "0.66666666", "0.0000001": "0.0000001", "3": "0.7"}
    for one, other in weights.items():
        spec = f"{two[0]}*{one}+{two[1]}*{other}"
        assert text_of(spec) == spec
    made = build_calibration(f"{two[0]}*3e6+{two[1]}*1e6", tokenizer, **SMALL)
    assert build_calibration(made.spec, tokenizer).digest == made.digest
    assert held_out(f"{two[0]}*3000000+{two[1]}*1000000")


def test_all_faults_are_told_together(two: tuple[str, str], tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(CorpusError) as caught:
        build_calibration(f"{two[0]}*lots?sequnces=3&length=long&part=none&seed=", tokenizer)
    for part in ("'lots'", "did you mean 'sequences'", "length='long'", "part='none'", "option 'seed'"):
        assert part in str(caught.value)
    with pytest.raises(CorpusError, match=r"length=1 is too small.*dedup=2.0 is not from 0.0 to 1.0"):
        build_calibration(f"{two[0]}?length=1&dedup=2", tokenizer)
    with pytest.raises(CorpusError, match=r"nowhere\.txt.*nothing\.txt"):
        build_calibration("nowhere.txt+nothing.txt", tokenizer)


def test_paths_in_yaml_are_those_beside_it(
    two: tuple[str, str], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    folder = tmp_path / "deep"
    (folder / "data").mkdir(parents=True)
    _jsonl(folder / "a*b+c.jsonl", [{"body": "of a star " * 20}])
    _jsonl(folder / "e#f.jsonl", [{"text": "of a hash " * 20}])
    table = pyarrow.table({"body": ["of an arrow " * 20]})
    with (
        pyarrow.OSFile(str(folder / "data" / "d.arrow"), "wb") as file,
        pyarrow.ipc.new_stream(file, table.schema) as writer,
    ):
        writer.write_table(table)
    monkeypatch.chdir(tmp_path)
    spec = folder / "spec.yaml"
    for listed, terms in {
        "a*b+c.jsonl#body": [Term("deep/a*b+c.jsonl#body")],
        "a*b+c.jsonl": [Term("deep/a*b+c.jsonl")],
        "e#f.jsonl": [Term("deep/e#f.jsonl")],
        "a*b+c.jsonl#body*3": [Term("deep/a*b+c.jsonl#body", 3)],
        "arrow:data#body": [Term("arrow:deep/data#body")],
        "arrow:data#body*0.5": [Term("arrow:deep/data#body", 0.5)],
        "{source: 'arrow:data/d.arrow#body', weight: 2}": [Term("arrow:deep/data/d.arrow#body", 2)],
        "a.jsonl*2": [Term("a.jsonl", 2)],
        "arrow:elsewhere#body": [Term("arrow:elsewhere#body")],
    }.items():
        quoted = listed if listed.startswith("{") else f"'{listed}'"
        spec.write_text(f"sources:\n  - {quoted}\n")
        assert [*parse_specification("deep/spec.yaml", ()).terms] == terms
    spec.write_text("sources:\n  - 'a*b+c.jsonl#body'\n  - 'arrow:data#body'\n")
    made = build_calibration("deep/spec.yaml?sequences=2&length=16", tokenizer)
    assert [record.name for record in made.sources] == ["a*b+c.jsonl", "deep/data"]


def test_yaml_is_the_same_specification(two: tuple[str, str], tokenizer: Any, tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        "sources:\n  - a.jsonl*3\n  - {source: b.jsonl, weight: 1}\nsequences: 8\nlength: 24\npack: false\n"
    )
    by_file = build_calibration(str(spec), tokenizer)
    by_text = build_calibration(f"{two[0]}*3+{two[1]}?sequences=8&length=24&pack=false", tokenizer)
    assert (by_file.digest, by_file.spec) == (by_text.digest, by_text.spec)
    assert build_calibration(f"{spec}?seed=5", tokenizer).digest != by_file.digest
    assert read_evaluation_text(f"{two[0]}+{two[1]}").count("\n\n") == 79
    spec.write_text("sources:\n  - {sorce: a.jsonl}\n  - 7\nsequences: [1]\nlenght: 3\ndedup: often\n")
    with pytest.raises(CorpusError) as caught:
        build_calibration(str(spec), tokenizer)
    for part in ("did you mean 'source'", "source 2 of", "'sequences' of", "did you mean 'length'", "dedup='often'"):
        assert part in str(caught.value)
    for content, message in (
        ("- a\n", "holds no specification"),
        ("seed: 1\n", "lacks 'sources'"),
        ("a: [", "as YAML"),
    ):
        spec.write_text(content)
        with pytest.raises(CorpusError, match=message):
            build_calibration(str(spec), tokenizer)


# --- sources -------------------------------------------------------------------------------------------------------


def test_compressed_and_parquet_files_read_as_plain_ones(two: tuple[str, str], tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    plain = [document.text for document in open_source(two[0]).read()]
    content = Path(two[0]).read_bytes()
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(content))
    (tmp_path / "c.jsonl.zst").write_bytes(pyarrow.compress(content, codec="zstd", asbytes=True))
    parquet.write_table(pyarrow.table({"body": plain, "text": ["no"] * len(plain)}), tmp_path / "c.parquet")
    for name in ("c.jsonl.gz", "c.jsonl.zst", "c.parquet#body"):
        assert [document.text for document in open_source(str(tmp_path / name)).read()] == plain
    with pytest.raises(CorpusError, match="no field 'bdy'"):
        next(open_source(f"{tmp_path / 'c.parquet'}#bdy").read())
    for name in ("broken.jsonl.gz", "broken.jsonl.zst", "broken.parquet", "broken.txt.gz"):
        (tmp_path / name).write_bytes(b"this is none")
        with pytest.raises(CorpusError, match=f"{name} cannot be read"):
            list(open_source(str(tmp_path / name)).read())
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(content)[:-20])
    with pytest.raises(CorpusError, match="cannot be read"):
        list(open_source(str(tmp_path / "cut.txt.gz")).read())


def test_files_are_read_only_as_far_as_needed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wt") as file:
        for _ in range(10):
            file.write('{"text": "fine"}\n')
        file.write("not json\n")
    documents = open_source(str(path)).read()
    assert [next(documents).text for _ in range(10)] == ["fine"] * 10
    with pytest.raises(CorpusError, match="line 11"):
        next(documents)


def test_of_what_is_held_out_no_more_is_read_than_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(_texts(tmp_path / "a.jsonl", "z", 120))
    whole = read_evaluation_text(f"{path}?part=held-out")
    monkeypatch.setattr(evaluation_text, "_MOST_CHARACTERS", len(whole) // 2, raising=False)
    with path.open("a") as file:
        file.write("not json\n")
    (some,) = held_out(path).values()
    assert len(whole) // 2 < len(some) < len(whole)
    assert whole.startswith(some)
    with pytest.raises(CorpusError, match="line 121"):
        read_evaluation_text(str(path))


def test_a_folder_beside_the_file_is_not_what_a_reserved_name_says(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "spec.yaml").write_text("sources: [python, books, demo, hf, arrow:python]\nsequences: 2\nlength: 16\n")
    for name in ("python", "books", "demo", "hf"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("some text of a folder " * 40)
    python, *others, arrow = (term.source for term in parse_specification(str(tmp_path / "spec.yaml"), OPTIONS).terms)
    assert python == "python"
    assert others == [str(tmp_path / name) for name in ("books", "demo", "hf")]
    assert arrow == f"arrow:{tmp_path / 'python'}"


def test_a_file_s_name_may_be_no_utf_8(tmp_path: Path, tokenizer: Any) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    try:
        path = Path(_texts(folder / os.fsdecode(b"caf\xe9.jsonl"), "x"))
    except OSError:
        pytest.skip("the file system takes no such name")
    for spec in (str(folder), str(path), f"{folder}?position=random"):
        made = build_calibration(spec, tokenizer, **SMALL)
        made.save(tmp_path / "set")
        assert CalibrationSet.load(tmp_path / "set").sources == made.sources
        shutil.rmtree(tmp_path / "set")
    row = {"question": "Why?", "choices": ["So.", "Not."], "gold": 0}
    questions = _jsonl(folder / os.fsdecode(b"\xe9.jsonl"), [row])
    assert build_choices(questions, tokenizer, questions=1).questions == 1


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("c4", "unknown text or domain 'c4', which is called 'web' here"),
        ("wikitext2", "which is called 'hf:Salesforce/wikitext:wikitext-2-raw-v1:train' here"),
        ("auto", "only 'shallower search' chooses texts (--calibration auto --for TEXT): name a text here"),
        ("auto:web", "only 'shallower search' chooses texts"),
    ],
)
def test_names_that_mean_a_text_elsewhere(name: str, said: str, tokenizer: Any, tmp_path: Path) -> None:
    for spec in (name, f"{name}*0.5+{_texts(tmp_path / 'a.jsonl', 'x', 8)}"):
        with pytest.raises(UserError, match=re.escape(said)):
            build_calibration(spec, tokenizer, **SMALL)
    with pytest.raises(UserError) as told:
        read_evaluation_text(f"{name}*0.5+{tmp_path / 'a.jsonl'}")
    assert ("Text to evaluate on is also" in str(told.value)) == (name == "auto")


def test_domains(monkeypatch: pytest.MonkeyPatch, tokenizer: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    wiki = _texts(tmp_path / "passages.jsonl", "w")
    supply = Supply(texts={"wiki": lambda: Path(wiki)})
    made = build_calibration("wiki*0.5+code*0.5", tokenizer, supply=supply, **SMALL)
    assert made.spec.startswith("demo:wiki*0.5+python:source*0.5?"), "says what was found"
    assert build_calibration(made.spec, tokenizer, supply=supply).digest == made.digest
    rows = _jsonl(tmp_path / "fields.jsonl", [{"text": "of the text", "passage": "of the field " * 20}])
    supply = Supply(texts={"wiki": lambda: Path(rows)})
    field = build_calibration("wiki#passage", tokenizer, sequences=1, length=16, supply=supply)
    assert field.spec.startswith("demo:wiki#passage?"), "says the field, too"
    assert build_calibration(field.spec, tokenizer, supply=supply).digest == field.digest
    with pytest.raises(CorpusError, match=r"'books' is hf:emozilla/pg19.*HF_HUB_OFFLINE is set.*Without a hub"):
        open_source("books")
    with monkeypatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "0")
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        with pytest.raises(CorpusError, match="HF_DATASETS_OFFLINE is set"):
            open_source("books")
    with pytest.raises(CorpusError, match="domain 'wiki'"):
        open_source("wiki")
    with pytest.raises(UnknownName, match="did you mean 'science'"):
        open_source("sciense")
    with pytest.raises(UnknownName, match="did you mean 'math'"):
        open_source("domain:maths")
    with pytest.raises(UnknownName, match="demo text 'poems'"):
        open_source("demo:poems", supply)
    (tmp_path / "code").mkdir()
    _texts(tmp_path / "code" / "c.jsonl", "mine")
    assert next(open_source("code").read()).text.startswith("mine"), "a path of that name comes first"
    assert "mine" not in next(open_source("domain:code").read()).text


def test_a_domain_is_the_hub_s_where_it_can_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class HfApi:
        def dataset_info(self, name: str, timeout: float) -> None:
            asked.append(name)
            if name == "openai/gsm8k":
                raise ConnectionError("no route")

    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.HfApi", HfApi)
    assert open_source("code").spec == "hf:codeparrot/codeparrot-clean-valid:train#content"
    assert open_source("code#license").spec == "hf:codeparrot/codeparrot-clean-valid:train#license"
    assert open_source("web").name == "hf:allenai/c4:en:train"
    with pytest.raises(CorpusError, match="ConnectionError"):
        open_source("math")
    assert asked == [*["codeparrot/codeparrot-clean-valid"] * 2, "allenai/c4", "openai/gsm8k"]


# --- positions and formats -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [True, False])
def test_positions_in_a_document(pack: bool, tokenizer: Any, tmp_path: Path) -> None:
    words = [f"w{number}" for number in range(6_000)]
    spec = _jsonl(tmp_path / "a.jsonl", [{"text": " ".join(words)}])

    def first_word(position: str, seed: int = 0) -> int:
        made = build_calibration(
            f"{spec}?position={position}&seed={seed}&max_chars=1000000", tokenizer, sequences=1, length=64, pack=pack
        )
        return int(tokenizer.decode(made.input_ids[0]).replace("w", " ").split()[1])

    assert first_word("start") <= 1
    assert first_word("end") > 5_900
    places = {first_word("random", seed) for seed in range(6)}
    assert len(places) == 6
    assert first_word("random", 3) == first_word("random", 3)
    assert all(10 < place < 5_990 for place in places)


TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


def test_chats_use_the_model_s_template(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    records = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"question": "Why?", "answer": "Because."},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi \ud800"}]},
        {"text": "Plain."},
    ]
    spec = _jsonl(tmp_path / "a.jsonl", records)
    tokenizer.chat_template = None
    with pytest.raises(CorpusError, match="tokenizer has none"):
        build_calibration(spec, tokenizer, format="chat", **SMALL)
    tokenizer.chat_template = TEMPLATE.replace("{{ bos_token }}", "")
    made = build_calibration(spec, tokenizer, format="chat", sequences=4, length=60, pack=False)
    texts = {tokenizer.decode(row, skip_special_tokens=True).strip() for row in made.input_ids}
    assert texts == {
        "[user]Add.\n\n1 and 2[assistant]3",
        "[user]Why?[assistant]Because.",
        "[system]Be brief.[user]Hi ?",
        "Plain.",
    }
    with pytest.raises(CorpusError, match="no row for format=chat"):
        build_calibration(_jsonl(tmp_path / "b.jsonl", records[3:]), tokenizer, format="chat", sequences=1, length=2)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(CorpusError, match="roles must alternate"):
        build_calibration(spec, tokenizer, format="chat", **SMALL)


def test_chats_are_the_same_on_any_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if strftime_now is defined %}{% set day = strftime_now('%d %b %Y') %}{% endif %}"
        '{{ day }} {{ strftime_now( format="%Y-%m-%d") }} {% for m in messages %}[{{ m.role }}]{{ m.content }}'
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    spec = _jsonl(tmp_path / "a.jsonl", [{"instruction": "Add.", "output": "3"}])

    def sets() -> list[CalibrationSet]:
        return [
            build_calibration(spec, tokenizer, format="chat", sequences=1, length=80, pack=False),
            build_instructions(spec, tokenizer, length=80),
        ]

    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls(2033, 5, 1)

    before = sets()
    monkeypatch.setattr(chat_template_utils, "datetime", Later)
    assert [text.digest for text in sets()] == [text.digest for text in before]
    read = tokenizer.decode(before[0].input_ids[0], skip_special_tokens=True)
    assert read == "26 Jul 2024 2024-07-26 [user]Add.[assistant]3"


def test_few_shot_prompts_are_solved_questions_in_order(tokenizer: Any, tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [
        {"question": f"Q{number}", "choices": [f"no{number}", f"yes{number}"], "gold": 1} for number in range(7)
    ]
    spec = _jsonl(tmp_path / "a.jsonl", records)
    made = build_calibration(f"{spec}?format=few-shot&shots=2&pack=false", tokenizer, sequences=2, length=200)
    texts = sorted(tokenizer.decode(row, skip_special_tokens=True).strip() for row in made.input_ids)
    assert texts[0] == "\n\n".join(f"Question: Q{number}\nAnswer: yes{number}" for number in range(3))
    assert texts[1].startswith("Question: Q3")
    assert made.sources[0].documents == 6, "the seventh is too few for a prompt"
    mixed = [{"question": "Is it", "answer": True}, {"question": "1+1?", "answer": "2"}, {"text": "Plain."}]
    mixed[2] |= {"sentence": "A _ b.", "option1": "c", "option2": "d", "answer": "2"}  # no question of ours: text
    spec = _jsonl(tmp_path / "b.jsonl", mixed)
    made = build_calibration(f"{spec}?format=few-shot&shots=1&pack=false", tokenizer, sequences=2, length=200)
    texts = sorted(tokenizer.decode(row, skip_special_tokens=True).strip() for row in made.input_ids)
    assert texts == ["Plain.", "Question: Is it?\nAnswer: yes\n\nQuestion: 1+1?\nAnswer: 2"]
    with pytest.raises(CorpusError, match="holds 2 questions, but a prompt of 5 shots needs 6"):
        build_calibration(f"{spec}?format=few-shot", tokenizer, **SMALL)
    with pytest.raises(CorpusError, match="no row for format=few-shot"):
        build_calibration(_texts(tmp_path / "c.jsonl", "z"), tokenizer, format="few-shot", **SMALL)


def test_duplicates_leave_before_there_are_tokens(tokenizer: Any, tmp_path: Path) -> None:
    pytest.importorskip("datasketch")
    lines = [json.loads(line) for line in Path(_texts(tmp_path / "a.jsonl", "x", 5)).read_text().splitlines()]
    text = lines[0]["text"]
    spec = _jsonl(tmp_path / "b.jsonl", [*lines, {"text": text.upper()}, {"text": text + " more"}])
    made = build_calibration(f"{spec}?dedup=0.8&pack=false", tokenizer, sequences=5, length=8)
    record = made.sources[0]
    assert "low_quality" not in record.to_json()  # nobody looked
    assert (record.read, record.documents, record.exact_duplicates, record.near_duplicates) == (7, 5, 1, 1)
    assert len({tuple(row) for row in made.input_ids.tolist()}) == 5
    with pytest.raises(CorpusError, match="without 2 documents that dedup and min_quality leave out"):
        build_calibration(f"{spec}?dedup=0.8&pack=false", tokenizer, sequences=6, length=8)


def test_copies_in_two_sources_of_a_mixture_leave(tokenizer: Any, tmp_path: Path) -> None:
    pytest.importorskip("datasketch")
    one = Path(_texts(tmp_path / "a.jsonl", "x", 8))
    rows = [json.loads(line) for line in one.read_text().splitlines()]
    own = [json.loads(line) for line in Path(_texts(tmp_path / "own.jsonl", "y", 4)).read_text().splitlines()]
    near = [{"text": row["text"] + " more"} for row in rows[4:]]
    other = _jsonl(tmp_path / "b.jsonl", [*rows[:4], *near, *own])
    spec = f"{one}+{other}?sequences=8&length=64&pack=false&dedup=0.8"
    made = build_calibration(spec, tokenizer)
    assert [(r.exact_duplicates, r.near_duplicates, r.documents) for r in made.sources] == [(0, 0, 4), (4, 4, 4)]
    assert sorted(tokenizer.decode(row).startswith("y") for row in made.input_ids) == [False] * 4 + [True] * 4
    with pytest.raises(TooLittleText, match="without 8 documents that dedup and min_quality leave out"):
        build_calibration(spec.replace("sequences=8", "sequences=10"), tokenizer)


def test_all_of_a_text_is_found_in_few_builds(
    two: tuple[str, str], model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    subject = open_subject(model)
    asked: list[int] = []

    def counted(*given: Any, **named: Any) -> CalibrationSet:
        asked.append(named["sequences"])
        assert len(asked) < 4, f"built {len(asked)} times"
        return build_calibration(*given, **named)

    monkeypatch.setattr("shallower.verbs.calibrate.build_calibration", counted)
    text, sequences = calibrate_most(subject, two[0], sequences=1000, length=16, seed=0)
    assert 50 < text.sequences == sequences < 1000
    asked.clear()
    with pytest.raises(TooLittleText, match=rf"use --sequences {sequences}"):
        calibrate(subject, two[0], sequences=sequences + 1, length=16, seed=0)
    # what a specification names itself, wins over the argument: fewer would be asked for in vain
    (tmp_path / "spec.yaml").write_text("sources: [a.jsonl]\nsequences: 999\n")
    for spec in (f"{two[0]}?sequences=999", str(tmp_path / "spec.yaml")):
        asked.clear()
        with pytest.raises(TooLittleText, match="but 999 sequences of 16 need"):
            calibrate_most(subject, spec, sequences=4096, length=16, seed=0)
        assert asked == [4096]
    few, sequences = calibrate_most(subject, f"{two[0]}?sequences=5", sequences=4096, length=16, seed=0)
    assert (few.sequences, sequences) == (5, 4096)


# --- the model's own text ------------------------------------------------------------------------------------------


def test_the_model_s_own_text(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = open_subject(tiny_model("llama"), tokenizer)
    asked = []
    generate = subject.model.generate
    monkeypatch.setattr(subject.model, "generate", lambda *a, **k: asked.append(None) or generate(*a, **k))
    made = calibrate(subject, "self", **SMALL, seed=0)
    assert made.input_ids.shape == (4, 16)
    assert made.spec.startswith("self?")
    assert made.sources[0].name == "self"
    assert len(asked) == 1, "no more is sampled than needed"
    assert calibrate(subject, "self", **SMALL, seed=0).digest == made.digest
    assert calibrate(subject, "self", **SMALL, seed=1).digest != made.digest
    state = torch.get_rng_state()
    calibrate(subject, "self:bos", **SMALL, seed=0)
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(CorpusError, match="write self, self:bos, self:token"):
        calibrate(subject, "self:here", **SMALL, seed=0)
    with pytest.raises(CorpusError, match="there is no model here"):
        build_calibration("self", tokenizer)


def test_the_model_s_own_text_is_as_long_as_the_specification_says(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    subject = open_subject(model, tokenizer)
    limit = model.config.n_positions
    with pytest.raises(CorpusError, match=rf"of {limit + 4} tokens are longer than the {limit} positions"):
        calibrate(subject, f"self?sequences=2&length={limit + 4}", sequences=2, length=16, seed=0)
    found = calibrate(subject, "self?length=8", sequences=2, length=2 * limit, seed=0)
    assert found.input_ids.shape == (2, 8)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for spec in ("self", f"self?length={2 * limit}"):
        with pytest.raises(CorpusError, match=rf"of {2 * limit} tokens are longer than the {limit} positions"):
            build(spec, str(tmp_path / "model"), sequences=2, length=2 * limit)


@pytest.mark.parametrize("option", ["min_quality=0.9", "dedup=0.8"])
def test_own_text_of_which_nothing_is_worth_reading_comes_to_an_end(option: str, tokenizer: Any) -> None:
    if option.startswith("dedup"):
        pytest.importorskip("datasketch")
    said: list[str] = []

    def says(start: str, *, tokens: int, seed: int) -> Iterator[str]:
        while len(said) < 3000:
            said.append("qzx")
            yield "qzx"
        raise AssertionError("no end")

    with pytest.raises(CorpusError, match=f"{option} left out the last 1,000 documents of self, .* do without"):
        build_calibration(f"self?sequences=2&length=16&{option}", tokenizer, supply=Supply(sample=says))
    assert 1000 <= len(said) <= 1001


def test_own_text_is_sampled_from_the_whole_distribution(tokenizer: Any) -> None:
    model = tiny_model("llama")
    plain = next(sample(model, tokenizer, "auto", tokens=32, seed=0))
    own = model.generation_config
    own.repetition_penalty, own.suppress_tokens, own.min_p = 3.0, list(range(20, 90)), 0.2
    assert next(sample(model, tokenizer, "auto", tokens=32, seed=0)) == plain
    assert model.generation_config is own
    assert own.repetition_penalty == 3.0


def test_own_text_begins_with_bos_or_a_random_token() -> None:
    begun: list[list[int]] = []

    class Model:
        generation_config = None
        device = torch.device("cpu")

        def generate(self, prompt: torch.Tensor, **_: Any) -> torch.Tensor:
            begun.append(prompt[:, 0].tolist())
            return prompt.repeat(1, 3)

    tokenizer = tiny_tokenizer()
    next(sample(Model(), tokenizer, "token", tokens=8, seed=0))  # type: ignore[arg-type]
    assert len(set(begun[0])) > 4
    assert not set(begun[0]) & set(tokenizer.all_special_ids)
    with pytest.raises(CorpusError, match="says nothing"):
        next(sample(Model(), tokenizer, "bos", tokens=8, seed=0))  # type: ignore[arg-type]
    assert set(begun[-1]) == {tokenizer.bos_token_id}
    tokenizer.bos_token = None
    with pytest.raises(CorpusError, match="no BOS token: use self:token"):
        next(sample(Model(), tokenizer, "bos", tokens=8, seed=0))  # type: ignore[arg-type]


# --- the verbs -----------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> str:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def _json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main.run([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def _killed(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_set_is_built_shown_and_used_again(
    two: tuple[str, str],
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = str(tmp_path / "set")
    spec = f"{two[0]}+{two[1]}*3?sequences=8&length=24"
    built = _json(capsys, "corpus", "build", spec, "--model", model, "--out", out)
    assert [source["tokens"] for source in built["sources"]] == [2 * 24, 6 * 24]
    assert main.run(["corpus", "build", spec, "--model", model, "--out", out]) == 2
    assert "exists; choose another folder, or add --force to replace it." in capsys.readouterr().err
    Path(out, ".DS_Store").touch()
    assert (
        _json(capsys, "corpus", "build", spec, "--model", model, "--out", out, "--force")["digest"] == built["digest"]
    )
    assert sorted(os.listdir(out)) == ["calibration.safetensors", "manifest.json"]
    Path(out, "mine.txt").touch()
    assert main.run(["corpus", "build", spec, "--model", model, "--out", out, "--force"]) == 2
    told = "is not a calibration set (calibration.safetensors, manifest.json) and nothing else, so --force does not"
    assert told in capsys.readouterr().err
    Path(out, "mine.txt").unlink()
    assert main.run(["corpus", "build", spec, "--model", model, "--out", model, "--force"]) == 2
    assert told in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr("shallower.corpus.calibration.write_json", _killed)
        with pytest.raises(KeyboardInterrupt):
            build(spec, model, out=tmp_path / "half")
    assert not list(tmp_path.glob("*half*"))
    assert _json(capsys, "corpus", "show", out)["digest"] == built["digest"]
    shown = _json(capsys, "corpus", "show", out, "--model", model, "--texts", "2")
    assert shown["beginnings"] == built["beginnings"][:2]
    assert main.run(["corpus", "show", spec]) == 2
    assert "add --model" in capsys.readouterr().err
    assert main.run(["corpus", "show", out, "--texts", "5"]) == 2
    assert "--texts is read only with a --model: name one" in capsys.readouterr().err
    assert main.run(["corpus", "show", out, "--model", model, "--sequences", "8", "--seed", "1"]) == 2
    assert "is a saved set, and shown as it is: leave out --sequences, --seed." in capsys.readouterr().err
    scores = _json(capsys, "score", model, "--calibration", out)
    assert scores["made_by"]["calibration"]["digest"] == built["digest"]
    own = _json(capsys, "corpus", "build", "self?sequences=2&length=8", "--model", model)
    assert own["sources"][0]["name"] == "self"
    assert main.run(["corpus", "build", "self?sequences=2&length=8", "--model", model]) == 0
    assert "Nothing was written; add --out FOLDER to keep the set." in capsys.readouterr().out
    assert main.run(["corpus", "show", out, "--model", model]) == 0
    told = capsys.readouterr().out
    assert "75.0%" in told
    assert built["digest"] in told


def test_a_set_of_another_tokenizer_is_refused(two: tuple[str, str], tokenizer: Any, tmp_path: Path) -> None:
    build_calibration(two[0], tokenizer, **SMALL).save(tmp_path / "set")
    assert build_calibration(str(tmp_path / "set"), tokenizer).tokenizer is not None

    class Other:
        def __len__(self) -> int:
            return len(tokenizer)

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return [f"other{id}" for id in ids]

    with pytest.raises(CorpusError, match="stand for other tokens"):
        build_calibration(str(tmp_path / "set"), Other())  # type: ignore[arg-type]
    row = {"question": "Why?", "choices": ["So.", "Not."], "gold": 0}
    build_choices(_jsonl(tmp_path / "q.jsonl", [row]), tokenizer, questions=1).save(tmp_path / "questions")
    with pytest.raises(CorpusError, match="stand for other tokens"):
        build_choices(str(tmp_path / "questions"), Other())  # type: ignore[arg-type]
    manifest = tmp_path / "set" / "manifest.json"
    data = json.loads(manifest.read_text())
    del data["tokenizer"]
    for key in ("read", "tokens", "weight"):
        del data["sources"][0][key]
    manifest.write_text(json.dumps(data))
    assert CalibrationSet.load(tmp_path / "set").sources[0].read is None, "sets of older versions load"


def test_nothing_is_held_out_of_what_reads_all(two: tuple[str, str], tmp_path: Path) -> None:
    (texts,) = held_out(two[0]).values()
    assert texts == read_evaluation_text(f"{two[0]}?part=held-out")
    for tail in ("?sequences=4&part=train", "?questions=4"):
        assert list(held_out(two[0] + tail).values()) == [texts]
    assert not held_out(f"{two[0]}?part=all&sequences=4")
    assert not held_out(f"{two[0]}?part=held-out")
    (tmp_path / "spec.yaml").write_text("sources: [a.jsonl]\npart: all\n")
    assert not held_out(tmp_path / "spec.yaml")
    assert held_out(f"{tmp_path / 'spec.yaml'}?part=train")


def test_what_a_built_set_leaves_out_is_held_out_as_long_as_its_text_is_there(
    two: tuple[str, str], model: str, tmp_path: Path
) -> None:
    named = [two[0], f"{two[0]}?part=all", "self?length=8"]
    sets = [tmp_path / str(number) for number in range(len(named))]
    for spec, folder in zip(named, sets, strict=True):
        build(spec, model, sequences=4, length=24, out=folder)
    assert held_out(sets[0]) == held_out(two[0]) != {}
    assert (
        CalibrationSet.load(sets[0]).digest
        == calibrate(open_subject(model), two[0], sequences=4, length=24, seed=0).digest
    )
    assert held_out(sets[1]) == held_out(sets[2]) == {}
    Path(two[0]).unlink()
    assert held_out(sets[0]) == {}


def test_a_built_sets_text_is_read_from_the_hub_with_a_word_or_not_at_all(
    two: tuple[str, str], model: str, tmp_path: Path, notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    built = tmp_path / "set"
    (tmp_path / "my").mkdir()
    shutil.copy(two[0], tmp_path / "my" / "texts.jsonl")
    monkeypatch.chdir(tmp_path)
    build("my", model, sequences=4, length=24, out=built)
    manifest = json.loads((built / "manifest.json").read_text())
    read: list[str] = []

    def loaded(path: str, **_: object) -> list[dict[str, str]]:
        read.append(path)
        return [{"text": f"Row {number} of the Hub."} for number in range(200)]

    hub = SimpleNamespace(load_dataset=loaded, __spec__=ModuleSpec("datasets", None))
    monkeypatch.setitem(sys.modules, "datasets", hub)
    notes.clear()
    assert held_out(built)
    (tmp_path / "away").mkdir()
    for spec in ("my", "my/texts.jsonl", "my/texts"):
        (built / "manifest.json").write_text(json.dumps({**manifest, "spec": manifest["spec"].replace("my", spec)}))
        with monkeypatch.context() as elsewhere:
            elsewhere.chdir(tmp_path / "away")
            assert held_out(built) == {}
    assert (read, notes) == ([], [])
    (built / "manifest.json").write_text(json.dumps({**manifest, "spec": "hf:my/texts?part=train"}))
    assert "of the Hub." in next(iter(held_out(built).values()))
    assert read == ["my/texts"]
    assert [re.sub(" again.*", "", note) for note in notes] == [
        "set was built from hf:my/texts, which is read from the Hub"
    ]
    assert nothing_held_out({}, built) == ("no perplexity: nothing of set is held out; name other text with --text.",)


def test_a_text_that_eval_names_is_read_as_the_search_read_it(model: str, tmp_path: Path) -> None:
    subject = open_subject(model)
    spec = _texts(tmp_path / "a.jsonl", "z", 60)
    small = calibrate(subject, f"{spec}?seed=3", **SMALL, seed=0)
    unit = Unit(0, "block")
    made_by = MadeBy("greedy", "nll", None, {}, 0, small.identity, "0")
    plan = PruningPlan(subject.identity, (unit,), ((unit, None),), None, made_by)

    def read(plan: PruningPlan | None, named: str) -> CalibrationSet:
        found, _ = _calibration_of(subject, plan, named, Supply())
        assert found is not None
        return found

    assert read(None, spec).digest == calibrate(subject, spec, sequences=32, length=128, seed=0).digest
    assert read(plan, spec).digest == small.digest
    own = read(plan, f"{spec}?length=8&part=held-out&sequences=2")
    assert (
        own.digest
        == build_calibration(f"{spec}?seed=3", subject.tokenizer, length=8, part="held-out", sequences=2).digest
    )
    small.save(tmp_path / "set")
    assert read(None, str(tmp_path / "set")).digest == small.digest


def test_cleaning_a_stream_or_nothing_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from shallower.verbs.corpus import clean

    def rows(*_: Any, **__: Any) -> Iterator[dict[str, str]]:
        yield {"text": "a"}

    monkeypatch.setitem(sys.modules, "datasets", type(sys)("datasets"))
    with pytest.raises(CorpusError, match="is streamed"):
        clean("hf:a/b")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="is empty"):
        clean(tmp_path / "empty.jsonl", tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_tokenizer_that_is_given_takes_the_place_of_the_model_s(tokenizer: Any, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "without")
    assert open_subject(tmp_path / "without", tokenizer).tokenizer is tokenizer
    other = open_subject(tmp_path / "without")
    assert open_subject(other) is other
    assert open_subject(other, tokenizer).tokenizer is tokenizer
