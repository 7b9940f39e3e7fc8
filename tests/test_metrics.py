"""Metrics against closed forms and against what public code gets wrong; every registered one through the conformance
checks.
"""

import itertools
import math

import pytest
import torch

from shallower.anatomy import dissect
from shallower.corpus import CalibrationSet
from shallower.engine.stream import _Chunk, _pairs
from shallower.registry import metric, objective
from shallower.testing.conformance import (
    check_identity_is_lowest,
    check_metric,
    sample_choices,
    sample_text,
    static_metrics,
)
from shallower.testing.families import CORE, tiny_model
from shallower.units import Span, Unit
from shallower.verbs.score import score


@pytest.mark.parametrize("name", [method.name for method in metric])
def test_conformance(name):
    check_metric(name, tiny_model("llama"))


@pytest.mark.parametrize("name", static_metrics())
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "falcon"])
def test_identity_is_lowest(name, family):
    check_identity_is_lowest(name, tiny_model(family))


def streams(model, ids):
    """The stream at every depth by hooks, before the final norm: the plain way."""
    states = []
    blocks = dissect(model).blocks
    handles = [
        block.module.register_forward_pre_hook(
            lambda m, a, k: states.append(a[0] if a else k["hidden_states"]), with_kwargs=True
        )
        for block in blocks
    ]
    handles.append(
        blocks[-1].module.register_forward_hook(lambda m, a, o: states.append(o[0] if isinstance(o, tuple) else o))
    )
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return states


@pytest.mark.parametrize("family", CORE)
def test_cosine_of_every_block_including_the_last(family):
    """`output_hidden_states[-1]` is after the final norm; a score made from it is wrong for the last block."""
    model = tiny_model(family)
    ids = torch.randint(3, 120, (4, 24), generator=torch.Generator().manual_seed(0))
    states = streams(model, ids)
    found = score(model, "cosine", calibration=CalibrationSet("x", ids, None, ()), units="all").units
    for index, (before, after) in enumerate(itertools.pairwise(states)):
        expected = float((1 - torch.cosine_similarity(before, after, dim=-1)).mean())
        assert found[Unit(index, "block")] == pytest.approx(expected, abs=1e-5)


def test_last_block_is_not_scored_after_the_norm():
    model = tiny_model("llama")
    ids = torch.randint(3, 120, (4, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    wrong = float((1 - torch.cosine_similarity(hidden[-2], hidden[-1], dim=-1)).mean())
    right = score(model, "cosine", calibration=CalibrationSet("x", ids, None, ())).units[Unit(5, "block")]
    assert abs(wrong - right) > 1e-3


def test_relative_norms():
    before, after = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    for p in (1, 2):
        method = metric.get(f"relative-l{p}")
        norms = {
            f"{name}_l{p}": tensor.norm(p=p, dim=-1)
            for name, tensor in (("before", before), ("after", after), ("change", after - before))
        }
        expected = (after - before).abs().pow(p).sum(-1).pow(1 / p) / after.abs().pow(p).sum(-1).pow(1 / p)
        assert torch.allclose(method.function(**norms), expected)
        assert torch.allclose(
            method.function(**norms, below="before"), (after - before).norm(p=p, dim=-1) / before.norm(p=p, dim=-1)
        )


def test_angular_of_every_span_at_the_last_token():
    model = tiny_model("llama")
    text = sample_text(model)
    found = score(model, "angular", calibration=text).spans
    assert set(found) == {Span(start, stop) for start in range(6) for stop in range(start + 1, 7)}
    last = text.attention_mask.sum(1) - 1
    ids = text.input_ids
    with torch.no_grad():
        states = [
            torch.stack([streams(model, ids[row : row + 1, : last[row] + 1])[depth][0, -1] for row in range(len(ids))])
            for depth in range(7)
        ]
    for span, value in found.items():
        cosines = torch.cosine_similarity(states[span.start].double(), states[span.stop].double(), dim=-1)
        assert value == pytest.approx(float((torch.arccos(cosines) / math.pi).mean()), abs=1e-5)


def test_angular_of_a_small_angle_keeps_its_digits():
    turn = 1e-5
    before = torch.tensor([[1.0, 0.0]])
    after = torch.tensor([[math.cos(turn), math.sin(turn)]])
    points = torch.stack([before, after], 1)
    chunk = _Chunk(points, _pairs((Span(0, 1),), (0,), (1,)))
    given = {name: chunk.supply(name) for name in metric.get("angular").parameters}
    assert float(metric.get("angular").function(**given)) == pytest.approx(turn / math.pi, rel=1e-3)
    # the textbook form cannot: float32 cosines next to 1 are 6e-8 apart
    textbook = torch.arccos(torch.cosine_similarity(before, after, dim=-1).clamp(-1, 1)) / math.pi
    assert float(textbook) != pytest.approx(turn / math.pi, rel=1e-3)


def test_errors_are_over_sequences():
    model = tiny_model("llama")
    text = sample_text(model, sequences=6, padded=False)
    rows = score(model, "cosine", calibration=text).rows
    singles = [score(model, "cosine", calibration=text.subset([index])) for index in range(6)]
    for place, row in enumerate(rows):
        values = torch.tensor([single.rows[place].value for single in singles], dtype=torch.float64)
        assert row.value == pytest.approx(float(values.mean()), abs=1e-6)
        assert row.error == pytest.approx(float(values.std() / math.sqrt(6)), abs=1e-6)
    assert singles[0].rows[0].error is None


def test_leave_one_out_is_a_difference_to_the_dense_model():
    model = tiny_model("llama")
    text = sample_text(model)
    from shallower.engine import Ablator

    ablator = Ablator(dissect(model), text)
    for row in score(model, "loss", calibration=text).rows:
        assert row.value == pytest.approx(ablator.losses([{row.of}])[0] - ablator.dense, abs=1e-9)
        without, dense = ablator.sums([{row.of}, frozenset()])
        counts, difference = ablator.counts, without - dense
        spread = difference - row.value * counts
        expected = math.sqrt((spread**2).sum() * len(counts) / (len(counts) - 1)) / counts.sum()
        assert row.error == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", [method.name for method in objective])
def test_objectives_are_finite_means_over_tokens_or_questions(name):
    from shallower.engine import Ablator
    from shallower.engine.scoring import needs_dense, reads_choices

    model = tiny_model("llama")
    text = sample_choices(model) if reads_choices(objective.get(name)) else sample_text(model)
    ablator = Ablator(dissect(model), text, name)
    dense, without = ablator.losses([frozenset(), {Unit(1, "block"), Unit(3, "block")}])
    assert math.isfinite(without)
    assert abs(without - dense) > 1e-6
    if needs_dense(objective.get(name)):
        assert dense == pytest.approx(0, abs=1e-6)
        assert without > 1e-3
    [sums] = ablator.sums([frozenset()])
    assert sums.shape == ablator.counts.shape
    assert sums.sum() / ablator.counts.sum() == dense


def test_kl_and_js_against_torch():
    logits, dense = torch.randn(4, 11), torch.randn(4, 11)
    p, q = torch.softmax(dense, -1), torch.softmax(logits, -1)
    kl = objective.get("kl").function(logits.logsumexp(-1), (p * logits).sum(-1), torch.special.entr(p).sum(-1))
    assert torch.allclose(kl, (p * (p / q).log()).sum(-1), atol=1e-6)
    m = (p + q) / 2
    expected = ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2
    assert torch.allclose(objective.get("js").function(logits, dense), expected, atol=1e-6)
