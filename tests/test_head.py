"""The head in chunks against whole rows of logits, and what could spoil sums over the vocabulary."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from shallower.anatomy import dissect
from shallower.corpus import CalibrationSet
from shallower.engine import Ablator, Racing, evaluator
from shallower.engine.head import WORDS, Head, Reduced, _pieces
from shallower.engine.scoring import Scorer
from shallower.registry import objective
from shallower.testing.conformance import sample_text
from shallower.testing.families import tiny_model
from shallower.units import Unit

VOCABULARY = 4 * WORDS + 37


def head_of(bias: bool = False, **finish: float) -> Head:
    torch.manual_seed(0)
    return Head(nn.Linear(16, VOCABULARY, bias=bias), **finish)


@pytest.mark.parametrize("finish", [{}, {"scale": 0.3}, {"softcap": 2.0}])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@torch.no_grad()
def test_chunks_give_what_whole_rows_give(finish, temperature):
    head = head_of(bias=True, **finish)
    rows, targets = torch.randn(60, 16) * 5, torch.randint(0, VOCABULARY, (60,))
    probabilities = torch.softmax(torch.randn(20, VOCABULARY), -1)  # of three candidates with 20 rows each
    logits = (head.logits(rows) / temperature).double()
    found = head.reduce(rows, targets, probabilities, temperature)
    assert torch.allclose(found.log_normalizer.double(), logits.logsumexp(-1), atol=1e-5)
    assert torch.allclose(found.target_logits.double(), logits.gather(1, targets[:, None])[:, 0], atol=1e-5)
    expected = (logits * probabilities.double().repeat(3, 1)).sum(-1)
    assert found.mean_logit is not None
    assert torch.allclose(found.mean_logit.double(), expected, atol=1e-5)


@pytest.mark.parametrize("bias", [-1e4, -1e9, torch.finfo(torch.float32).min, -torch.inf])
@pytest.mark.parametrize("word", [0, WORDS, WORDS + 1, VOCABULARY - 1])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@torch.no_grad()
def test_a_word_that_is_ruled_out_spoils_nothing(bias, word, temperature):
    head = head_of(bias=True)
    head.output.bias[word] = bias
    rows, targets = torch.randn(5, 16), torch.tensor([1, 2, 3, 4, 5])
    probabilities = torch.softmax(head.logits(rows) / temperature, -1)
    found = head.reduce(rows, targets, probabilities, temperature)
    logits = (rows @ head.output.weight.T + head.output.bias).double() / temperature
    assert torch.allclose(found.log_normalizer.double(), logits.logsumexp(-1), atol=1e-5)
    kept = torch.arange(VOCABULARY) != word
    assert found.mean_logit is not None
    expected = (logits * probabilities.double())[:, kept].sum(-1)
    assert torch.allclose(found.mean_logit.double(), expected, atol=1e-5)


@pytest.mark.parametrize("bias", [2e3, -2e3, 1e6])
@pytest.mark.parametrize("word", [0, WORDS, (VOCABULARY - 1) // WORDS * WORDS])
@pytest.mark.parametrize("compared", [False, True])
@torch.no_grad()
def test_large_logits_at_the_beginning_of_a_chunk_lose_no_digits(bias, word, compared):
    """Also of the last, smaller chunk, whose targets are among those that are asked for."""
    head = head_of(bias=True)
    head.output.bias[word] = bias
    rows, targets = torch.randn(5, 16), torch.tensor([1, VOCABULARY - 1, word, VOCABULARY - 1, WORDS])
    probabilities = torch.softmax(torch.randn(5, VOCABULARY), -1) if compared else None
    found = head.reduce(rows, targets, probabilities)
    logits = rows.double() @ head.output.weight.T.double() + head.output.bias.double()
    assert torch.allclose(found.log_normalizer.double(), logits.logsumexp(-1), rtol=1e-7, atol=1e-5)
    assert torch.allclose(found.target_logits.double(), logits.gather(1, targets[:, None])[:, 0], rtol=1e-6, atol=1e-5)


@torch.no_grad()
def test_a_target_beyond_the_head_has_no_logit():
    found = head_of().reduce(torch.randn(3, 16), torch.tensor([1, VOCABULARY + 3, 2]))
    assert found.target_logits.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("name", ["kl", "js"])
@pytest.mark.parametrize("known", [True, False])
def test_no_temperature_makes_a_ruled_out_word_count(name, known, monkeypatch):
    """A low temperature divides what is almost too low for float32."""
    model = tiny_model("phi", blocks=3)
    anatomy, text, word = dissect(model), sample_text(model), 3
    model.lm_head.bias.data[word] = torch.finfo(torch.float32).min
    if not known:
        monkeypatch.setattr(evaluator, "find_head", lambda anatomy: None)
    without, sharp = [{Unit(1, "block")}], {"temperature": 0.5}
    ruled_out = Ablator(anatomy, text, name, sharp).losses(without)
    model.lm_head.bias.data[word] = -1e4
    assert ruled_out == pytest.approx(Ablator(anatomy, text, name, sharp).losses(without))


@torch.no_grad()
def test_candidates_scored_together_agree_with_candidates_alone():
    head = head_of()
    rows, targets = torch.randn(252, 16), torch.randint(0, VOCABULARY, (252,))
    alone = head.reduce(rows, targets)
    both = head.reduce(torch.cat([rows, rows]), targets.repeat(2))
    for part in both.log_normalizer.chunk(2):
        assert torch.allclose(part, alone.log_normalizer, atol=2e-6)


@pytest.mark.parametrize("most", [7, 20, 45])  # a part of a candidate, one, and two
@pytest.mark.parametrize("compared", [False, True])
@torch.no_grad()
def test_pieces_of_rows_give_what_all_rows_give(monkeypatch, most, compared):
    head = head_of(bias=True)
    rows, targets = torch.randn(60, 16) * 5, torch.randint(0, VOCABULARY, (60,))
    probabilities = torch.softmax(torch.randn(20, VOCABULARY), -1) if compared else None
    expected = head.reduce(rows, targets, probabilities)
    parts = list(_pieces(60, 20 if compared else 1, most))
    assert max(len(rows[part]) for part, _ in parts) <= most
    assert torch.cat([rows[part] for part, _ in parts]).equal(rows)
    monkeypatch.setattr(Head, "_rows_at_once", lambda self, rows, memory: most)
    found = head.reduce(rows, targets, probabilities)
    for name in ("log_normalizer", "target_logits", *(["mean_logit"] if compared else [])):
        assert torch.allclose(getattr(found, name), getattr(expected, name), atol=1e-5)


@pytest.mark.parametrize(("memory", "most"), [(1 << 40, 1_638), (50_000_000, 610), (0, 16)])
def test_buffers_of_an_accelerator_are_bounded(monkeypatch, memory, most):
    """8,192 words take 10 bytes each a row in bfloat16; a batch of 8,192 tokens would have 670 MB of them."""
    asked = []

    def reduced(self, rows, targets, probabilities, temperature):
        asked.append(len(rows))
        return Reduced(torch.arange(sum(asked) - len(rows), sum(asked)), torch.zeros(len(rows)), None)

    monkeypatch.setattr(Head, "_reduce", reduced)
    head = Head(nn.Linear(16, 49_152, bias=False))
    rows = torch.empty(8_190, 16, dtype=torch.bfloat16, device="meta")
    found = head.reduce(rows, torch.empty(8_190, dtype=torch.int64, device="meta"), memory=memory)
    assert max(asked) == most
    assert torch.equal(found.log_normalizer, torch.arange(8_190))
    asked.clear()
    head.reduce(torch.empty(8_190, 16), torch.zeros(8_190, dtype=torch.int64), memory=memory)
    assert asked == [8_190]  # few words at a time on a processor


@pytest.mark.parametrize(("memory", "most"), [(1 << 40, 1_365), (50_000_000, 25), (0, 16)])
def test_whole_rows_on_an_accelerator_keep_to_the_memory_that_was_given(memory, most):
    scorer = SimpleNamespace(targets=torch.empty(1, device="meta"), vocabulary=49_152, _memory=memory)
    assert Scorer._chunk(scorer) == most


@pytest.mark.parametrize("objective", ["nll", "kl", "js", "hidden-cosine"])
def test_documents_of_one_token_count_for_nothing(objective):
    anatomy = dissect(tiny_model("llama"))
    ids = torch.randint(3, 120, (3, 300), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 1:] = 0
    text = CalibrationSet("x", ids, mask, ())
    rest = CalibrationSet("x", ids[[0, 2]], None, ())
    candidates = [frozenset(), frozenset({Unit(1, "block")})]
    found, expected = (Ablator(anatomy, given, objective).losses(candidates) for given in (text, rest))
    assert found == pytest.approx(expected, abs=1e-6)


def test_many_copies_of_one_candidate_are_no_race():
    anatomy = dissect(tiny_model("llama"))
    ablator = Ablator(anatomy, sample_text(anatomy.model), racing=Racing())
    same = frozenset({Unit(1, "block")})
    first, second = ablator.losses([same, same], keep=1)
    assert first == second == Ablator(anatomy, ablator.calibration).losses([same])[0]


def test_an_overflow_is_no_answer():
    logits = torch.tensor([[torch.nan, torch.nan], [0.0, 1.0], [1.0, 0.0]])  # the first of several NaN is the largest
    dense = torch.tensor([[1.0, 0.0]] * 3)
    found = objective.get("top1").function(logits=logits, dense_logits=dense)
    assert torch.equal(found.nan_to_num(9), torch.tensor([9.0, 1.0, 0.0]))


def test_what_overflows_is_the_most_important(monkeypatch):
    anatomy = dissect(tiny_model("llama"))
    ablator = Ablator(anatomy, sample_text(anatomy.model))
    candidates = [frozenset({unit}) for unit in anatomy.of_kind("block")]
    own = ablator.sums

    def overflowing(asked):
        return [
            sums * (float("nan") if Unit(2, "block") in units else 1)
            for units, sums in zip(asked, own(asked), strict=True)
        ]

    monkeypatch.setattr(ablator, "sums", overflowing)
    found = ablator.differences(candidates)
    assert found[2] == (float("inf"), None)
    assert all(error is not None for _, error in itertools.chain(found[:2], found[3:]))
