"""Perplexity against a slow computation, one window and one token at a time."""

from __future__ import annotations

import gzip
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from shallower.errors import CorpusError, UserError
from shallower.evaluation import Perplexity, context_limit, perplexity, read_evaluation_text
from shallower.evaluation.perplexity import cut_windows, first_ids
from shallower.testing.families import tiny_model, tiny_tokenizer

TEXT = " ".join(f"Sentence {number} of the text – with a dash." for number in range(12))


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", blocks=2)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def _naive(model: Any, ids: list[int], room: int, stride: int, bos: int | None) -> tuple[float, int, int]:
    """Mean loss, scored tokens and windows: every scored token predicted by its own forward pass."""
    total, scored, windows, start = 0.0, set(), 0, 0
    while True:
        stop = min(start + room, len(ids))
        new = [target for target in range(start + 1, stop) if target not in scored]
        windows += bool(new)
        for target in new:
            context = ([] if bos is None else [bos]) + ids[start:target]
            with torch.no_grad():
                logits = model(torch.tensor([context])).logits[0, -1].double()
            total -= float(logits.log_softmax(-1)[ids[target]])
            scored.add(target)
        if stop == len(ids):
            return total / len(scored), len(scored), windows
        start += stride


@pytest.mark.parametrize("stride", [None, 40, 39, 16, 1])
@pytest.mark.parametrize("bos", ["none", "each-sequence"])
def test_agrees_with_the_slow_computation(model: Any, tokenizer: Any, stride: int | None, bos: Any) -> None:
    text = TEXT[:150]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    room = 40 - (bos != "none")
    nll, tokens, windows = _naive(
        model, ids, room, min(stride or room, room), tokenizer.bos_token_id if bos != "none" else None
    )
    found = perplexity(model, tokenizer, text, window=40, stride=stride, bos=bos)
    assert (found.tokens, found.windows) == (tokens, windows)
    assert found.nll == pytest.approx(nll, abs=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nll), rel=1e-4)
    if stride is not None and stride < room:
        assert found.tokens == len(ids) - 1


@pytest.mark.parametrize("family", ["llama", "bloom", "gpt2"])
def test_padding_and_batches_change_nothing(family: str, tokenizer: Any) -> None:
    tiny = tiny_model(family, blocks=2)
    alone = perplexity(tiny, tokenizer, TEXT, window=50)
    for size in (2, 100):
        together = perplexity(tiny, tokenizer, TEXT, window=50, batch_size=size)
        assert together.nll == pytest.approx(alone.nll, abs=1e-5)
        assert (together.tokens, together.windows, together.bytes) == (alone.tokens, alone.windows, alone.bytes)


def test_bytes_are_those_of_the_scored_tokens(model: Any, tokenizer: Any) -> None:
    found = perplexity(model, tokenizer, TEXT, window=50, stride=25)
    first = tokenizer.decode(tokenizer(TEXT)["input_ids"][:1])
    assert found.bytes == len(TEXT.encode()) - len(first.encode())
    assert found.bits_per_byte == pytest.approx(found.nll * found.tokens / math.log(2) / found.bytes)
    by_ids = perplexity(model, tokenizer, tokenizer(TEXT, return_tensors="pt")["input_ids"], window=50, stride=25)
    assert by_ids.nll == found.nll
    assert by_ids.bytes == found.bytes


@pytest.mark.parametrize("text", [TEXT * 200, "aab" * 30_000, "木の葉🍂" * 30_000, " \n" * 40_000], ids=len)
@pytest.mark.parametrize("stride", [None, 30])
def test_of_a_long_text_only_the_beginning_that_is_read_is_encoded(
    model: Any, tokenizer: Any, text: str, stride: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = cut_windows(model, tokenizer, text, window=50, stride=stride)
    encode, encoded = type(tokenizer).__call__, []

    def counting(self: Any, given: str, **options: Any) -> Any:
        encoded.append(len(given))
        return encode(self, given, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", counting)
    found = cut_windows(model, tokenizer, text, window=50, stride=stride, max_windows=12)
    assert max(encoded) <= len(text) / 2
    assert found.windows == whole.windows[:12]
    stop = found.windows[-1].stop
    assert torch.equal(found.ids, whole.ids[:stop])
    _, ends = first_ids(tokenizer, text, None)
    before = [len(text[: ends[place - 1]].encode()) for part in found.windows for place in (part.scored, part.stop)]
    assert found.bytes == sum(before[1::2]) - sum(before[::2])


def test_auto_bos_follows_the_tokenizer(model: Any, tokenizer: Any) -> None:
    adding = tiny_tokenizer()
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", adding.bos_token_id)]
    )
    assert perplexity(model, adding, TEXT, window=50) == perplexity(
        model, tokenizer, TEXT, window=50, bos="each-sequence"
    )
    assert perplexity(model, tokenizer, TEXT, window=50) == perplexity(model, adding, TEXT, window=50, bos="none")


def test_windows_spread_and_limits(model: Any, tokenizer: Any) -> None:
    few = perplexity(model, tokenizer, TEXT, window=50, max_windows=3)
    assert (few.windows, few.tokens) == (3, 3 * 49)
    assert few.stderr is not None
    assert few.stderr > 0
    assert perplexity(model, tokenizer, TEXT, window=50, max_windows=1).stderr is None
    assert Perplexity(1e4, None, 1, 1, 0).perplexity == math.inf
    assert math.isnan(Perplexity(math.nan, None, 1, 1, 0).perplexity)
    assert math.isnan(Perplexity(1.0, None, 1, 1, 0).bits_per_byte)


def test_the_model_is_left_as_it_was(tokenizer: Any) -> None:
    tiny = tiny_model("llama", blocks=1)
    tiny.train()
    frozen = tiny.model.layers[0].mlp.eval()
    perplexity(tiny, tokenizer, TEXT, window=50, max_windows=1)
    assert tiny.training
    assert not frozen.training
    assert tiny.model.layers[0].self_attn.training
    assert all(parameter.requires_grad for parameter in tiny.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 100_000}, "positions the model has"),
        ({"window": 1}, "room for 1"),
        ({"window": 50, "stride": 51}, "between 1 and the window"),
        ({"window": 50, "stride": 0}, "between 1 and the window"),
        ({"window": 50, "batch_size": 0}, "batch_size=0"),
        ({"window": 50, "max_windows": 0}, "max_windows=0"),
    ],
)
def test_bad_windows(model: Any, tokenizer: Any, options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        perplexity(model, tokenizer, TEXT, **options)  # type: ignore[arg-type]


def test_bad_text(model: Any, tokenizer: Any) -> None:
    with pytest.raises(CorpusError, match="0 tokens"):
        perplexity(model, tokenizer, "", window=50)
    with pytest.raises(CorpusError, match="another model"):
        perplexity(model, tokenizer, torch.tensor([1, 10**6]), window=50)
    with pytest.raises(CorpusError, match="must be int64"):
        perplexity(model, tokenizer, torch.zeros(2, 3, dtype=torch.int64), window=50)


def test_context_limit(model: Any) -> None:
    assert context_limit(model) == model.config.max_position_embeddings
    assert context_limit(tiny_model("bloom", blocks=1)) is None


def test_reading_evaluation_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    monkeypatch.setattr("shallower.evaluation.text.progress.note", notes.append)
    rows = " \n = Title = \n \n One . \n"
    (tmp_path / "wikitext2.test.txt").write_text(rows)
    (tmp_path / "plain.txt").write_text(rows)
    (tmp_path / "some.jsonl").write_text('{"text": "a"}\n{"text": " "}\n{"text": "b"}\n')
    (tmp_path / "empty.txt").write_text("\n")
    assert read_evaluation_text(str(tmp_path / "wikitext2.test.txt")) == "\n\n = Title = \n\n\n\n\n One . \n"
    assert read_evaluation_text(str(tmp_path / "plain.txt")) == rows
    assert [note.partition(" is read as WikiText")[0] for note in notes] == ["wikitext2.test.txt"]
    assert read_evaluation_text(str(tmp_path / "some.jsonl")) == "a\n\nb"
    for name in ("wikitext2.test.txt", "plain.txt"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
        assert read_evaluation_text(str(tmp_path / f"{name}.gz")) == read_evaluation_text(str(tmp_path / name))
    parts = {part: read_evaluation_text(f"python:docs?part={part}") for part in ("train", "held-out")}
    assert len(parts["train"]) > 5 * len(parts["held-out"]) > 0
    with pytest.raises(CorpusError, match="no text"):
        read_evaluation_text(str(tmp_path / "empty.txt"))
    with pytest.raises(CorpusError, match="no such file"):
        read_evaluation_text(str(tmp_path / "none.txt"))
    with pytest.raises(UserError, match="unknown option"):
        read_evaluation_text(f"{tmp_path / 'plain.txt'}?length=3")


def test_a_misspelt_name_is_answered_with_those_of_texts_that_papers_report() -> None:
    with pytest.raises(CorpusError, match=r"no text at 'wikitext2x'.* Text to evaluate on is also wikitext2, c4\.$"):
        read_evaluation_text("wikitext2x")
