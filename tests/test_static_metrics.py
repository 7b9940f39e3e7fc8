"""Metrics that read the dense model once, against direct calculations and against the formulas that public code has
wrong; and several metrics in one file.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shallower.anatomy import dissect
from shallower.anatomy.dissect import Anatomy
from shallower.corpus import CalibrationSet
from shallower.engine import Ablator, StreamStatistic, WeightStatistic, gradients, stream_scores, weight_scores, workers
from shallower.engine.crossing import find_midpoints
from shallower.engine.stream import _directions
from shallower.engine.trace import trace
from shallower.errors import CorpusError, ModelError, UnknownName, UserError
from shallower.registry import metric
from shallower.reporting.ranks import rank_correlations
from shallower.scores import Scores, ScoreSheet
from shallower.testing.conformance import (
    check_identity_is_lowest,
    check_metric,
    sample_choices,
    sample_text,
    static_metrics,
)
from shallower.testing.families import tiny_model
from shallower.units import Span, Unit, sublayers_of
from shallower.verbs.prune import prune
from shallower.verbs.score import score, score_many
from shallower.verbs.search import search
from shallower.verbs.subject import open_subject

DISTANCES = ("cosine", "relative-l1", "relative-l2", "angular")
# sequential, learned positions, parallel, norm after the sublayer inside the branch, only after, experts, one row a
# token, attention that returns the stream, mixers that no unit names
SHAPES = ("llama", "gpt2", "gpt_neox", "falcon", "gemma2", "olmo2", "mixtral", "opt", "dbrx", "falcon_h1")


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_model("llama")


def streams(anatomy: Anatomy, text: CalibrationSet) -> tuple[list[Tensor], list[Tensor]]:
    """The stream at every depth, and between the sublayers of each block (Llama), float64."""
    depths: list[Tensor] = []
    middles: list[Tensor] = []
    handles = [
        module.register_forward_pre_hook(lambda m, args, kept=kept: kept.append(args[0].double()))
        for block in anatomy.blocks
        for module, kept in ((block.module, depths), (block.module.get_submodule("post_attention_layernorm"), middles))
    ]
    last = anatomy.blocks[-1].module
    handles.append(last.register_forward_hook(lambda m, args, out: depths.append(out.double())))
    with torch.no_grad():
        anatomy.model(input_ids=text.input_ids, attention_mask=text.attention_mask, use_cache=False)
    for handle in handles:
        handle.remove()
    return depths, middles


def distance(name: str, before: Tensor, after: Tensor) -> Tensor:
    """The definitions of the papers, pair by pair."""
    if name.startswith("relative"):
        order = int(name[-1])
        return (after - before).norm(p=order, dim=-1) / after.norm(p=order, dim=-1)
    first, second = (end / end.norm(dim=-1, keepdim=True) for end in (before, after))
    if name == "cosine":
        return 1 - (first * second).sum(-1)
    return 2 * torch.atan2((first - second).norm(dim=-1), (first + second).norm(dim=-1)) / math.pi


def ends_of(anatomy: Anatomy, text: CalibrationSet) -> dict[Unit | Span, tuple[Tensor, Tensor]]:
    depths, middles = streams(anatomy, text)
    ends: dict[Unit | Span, tuple[Tensor, Tensor]] = {
        Span(start, stop): (depths[start], depths[stop]) for start, stop in itertools.combinations(range(7), 2)
    }
    for index, middle in enumerate(middles):
        ends[Unit(index, "block")] = depths[index], depths[index + 1]
        ends[Unit(index, "attn")] = depths[index], middle
        ends[Unit(index, "mlp")] = middle, depths[index + 1]
    return ends


# One pass


def test_all_units_and_spans_of_all_distances_from_one_pass(llama: PreTrainedModel) -> None:
    anatomy = dissect(llama)
    text = sample_text(llama, sequences=30)  # more than one batch
    ends = ends_of(anatomy, text)
    real = text.attention_mask.bool()
    last = text.attention_mask.sum(1) - 1
    runs = 0

    def count(module: nn.Module, args: Any) -> None:
        nonlocal runs
        runs += len(args[0])

    statistics = [
        StreamStatistic(metric.get(name), {}, positions, spans=spans)
        for name in DISTANCES
        for positions, spans in (("all", True), ("all", False), ("last", True))
    ]
    handle = anatomy.blocks[3].module.register_forward_pre_hook(count)
    plain = stream_scores(anatomy, text, statistics[:1], anatomy.units)
    one, runs = runs, 0
    found = stream_scores(anatomy, text, statistics, anatomy.units)
    handle.remove()
    assert runs == one  # as many sequences for twelve statistics as for one
    assert found[0] == plain[0]
    for statistic, rows in zip(statistics, found, strict=True):
        assert len(rows) == len({row.of for row in rows}) == (18 + 21 if statistic.spans else 18)
        for row in rows:
            values = distance(statistic.metric.name, *ends[row.of])
            expected = values[real] if statistic.positions == "all" else values[torch.arange(30), last]
            assert row.value == pytest.approx(float(expected.mean()), rel=1e-5), (statistic, row)
            sums = torch.where(real, values, 0).sum(1) if statistic.positions == "all" else expected
            counts = last + 1 if statistic.positions == "all" else torch.ones(30)
            spread = (sums - expected.mean() * counts).square().sum() * 30 / 29
            assert row.error == pytest.approx(float(spread.sqrt() / counts.sum()), rel=1e-4)


def test_a_metric_of_the_stream_itself_sees_all_spans_too(llama: PreTrainedModel) -> None:
    """A third party's metric need not know of products."""

    def plain(before: Tensor, after: Tensor) -> Tensor:
        assert before.dtype == after.dtype == torch.float32
        return (after - before).norm(dim=-1) / after.norm(dim=-1)

    own = metric.get("relative-l2")
    generic = type(own)("metric", "plain", plain, "", {}, {})
    anatomy, text = dissect(llama), sample_text(llama)
    statistics = [StreamStatistic(method, {}, "all", spans=True) for method in (own, generic)]
    for first, second in zip(*stream_scores(anatomy, text, statistics, anatomy.units), strict=True):
        assert first.of == second.of
        assert first.value == pytest.approx(second.value, rel=1e-5)


@pytest.mark.parametrize("family", SHAPES)
def test_every_static_metric_of_every_unit_in_every_shape_of_block(family: str) -> None:
    model = tiny_model(family)
    for scores in score_many(model, static_metrics(), calibration=sample_text(model), units="all").scores:
        assert set(scores.units) == set(dissect(model).units)
        assert all(math.isfinite(value) and value > 0 for value in scores.units.values()), scores.metric


@pytest.mark.parametrize("name", static_metrics())
@pytest.mark.parametrize("family", ["gpt_neox", "olmo2"])
def test_conformance_in_other_shapes(family: str, name: str) -> None:
    check_metric(name, tiny_model(family))
    check_identity_is_lowest(name, tiny_model(family))


def test_a_block_that_changes_its_input_in_place_is_scored_by_what_it_was_given() -> None:
    model = tiny_model("llama")
    anatomy, text = dissect(model), sample_text(model, padded=False)
    right = score_many(model, "cosine,angular", calibration=text, positions="all")
    for block in anatomy.blocks:
        own = block.module.forward

        def in_place(hidden_states: Tensor, *args: Any, own: Any = own, **kwargs: Any) -> Tensor:
            result = own(hidden_states.clone(), *args, **kwargs)
            with torch.no_grad():
                hidden_states.mul_(0).add_(1)
            return result

        block.module.forward = in_place
    found = score_many(model, "cosine,angular", calibration=text, positions="all")
    for first, second in zip(right.scores, found.scores, strict=True):
        for one, other in zip(first.rows, second.rows, strict=True):
            assert one.value == pytest.approx(other.value, rel=1e-5)


@pytest.mark.parametrize("family", ["gpt_neox", "falcon", "opt", "dbrx", "falcon_h1"])
def test_sublayers_are_told_apart_where_the_stream_between_them_is_hard_to_see(family: str) -> None:
    """The MLP's change is what the block returns, less what it returns without the MLP, whatever the block's shape."""
    model = tiny_model(family)
    anatomy, text = dissect(model), sample_text(model, padded=False)
    found = score(model, "relative-l2", calibration=text, units="mlp", settings={"below": "before"}).units
    parallel = {midpoint.parallel for midpoint in find_midpoints(anatomy).values()}
    assert parallel == {family in ("gpt_neox", "falcon")}
    block = anatomy.blocks[2]
    seen: dict[str, Tensor] = {}

    def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        with block.without("mlp"):
            without = type(module).forward(module, *args, **kwargs)
        half = without[0] if isinstance(without, tuple) else without
        seen.update(change=after - half, scale=before if parallel == {True} else half)

    handle = block.module.register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(input_ids=text.input_ids, use_cache=False)
    handle.remove()
    expected = (seen["change"].norm(dim=-1) / seen["scale"].norm(dim=-1)).mean()
    assert found[Unit(2, "mlp")] == pytest.approx(float(expected), rel=1e-5)


# Linear residual


def test_linear_residual_is_one_minus_r_squared(llama: PreTrainedModel) -> None:
    anatomy = dissect(llama)
    text = sample_text(llama, sequences=30)
    real = text.attention_mask.bool()
    for width in (0, 8):
        settings = {"width": str(width), "ridge": "1e-9"}
        found = score(llama, "linear-residual", calibration=text, units="all", settings=settings)
        assert len(found.spans) == 21
        assert all(row.error is None for row in found.rows)
        for of, ends in ends_of(anatomy, text).items():
            before, after = (end[real] for end in ends)
            if width:
                before, after = (end @ _directions(32, width).double() for end in (before, after))
            inputs, change = before - before.mean(0), (after - before) - (after - before).mean(0)
            left = change - inputs @ torch.linalg.lstsq(inputs, change).solution
            expected = float(left.square().sum() / change.square().sum())
            assert (found.units | found.spans)[of] == pytest.approx(expected, rel=1e-4), (width, of)


def test_linear_residual_of_sublayers_does_not_depend_on_what_is_scored_with_them(llama: PreTrainedModel) -> None:
    text = sample_text(llama, sequences=30)
    settings = {"width": "8"}
    whole = score(llama, "linear-residual", calibration=text, units="all", spans=False, settings=settings).units
    for units in ("block", "attn", "mlp"):
        alone = score(llama, "linear-residual", calibration=text, units=units, spans=False, settings=settings).units
        assert {unit: whole[unit] for unit in alone} == pytest.approx(alone, rel=1e-9)


def test_linear_residual_of_a_linear_block_is_nothing() -> None:
    """A block that only rescales the stream can be repaired by a map; its cosine is not nothing."""
    model = tiny_model("llama")
    block = dissect(model).blocks[2].module
    turn = torch.linalg.qr(torch.randn(32, 32)).Q
    block.forward = lambda hidden_states, *args, **kwargs: hidden_states @ turn + 1.0
    text = sample_text(model, sequences=30)
    found = score_many(model, "linear-residual,cosine", calibration=text)
    residual, cosine = (scores.units for scores in found.scores)
    assert residual[Unit(2, "block")] < 1e-4 < 0.1 < residual[Unit(1, "block")]
    assert cosine[Unit(2, "block")] > 0.1


@pytest.mark.parametrize(
    ("positions", "settings", "says"),
    [
        ("all", {}, r"18 tokens .* cannot fit the map of linear-residual, which has 32 inputs: .* \(--set width=8\)"),
        ("all", {"width": "18"}, r"which has 18 inputs"),
        ("last", {"width": "8"}, r"3 tokens .* has 8 inputs: .* read every position \(--positions all\)"),
    ],
)
def test_linear_residual_wants_more_tokens_than_directions(
    llama: PreTrainedModel, positions: Any, settings: dict[str, str], says: str
) -> None:
    text = sample_text(llama, sequences=3, length=6, padded=False)
    with pytest.raises(CorpusError, match=says):
        score(llama, "linear-residual", calibration=text, positions=positions, settings=settings)
    score(llama, "linear-residual", calibration=text, settings={"width": "17"})


@pytest.mark.parametrize("option", ["ridge=-1", "ridge=nan", "ridge=0", "width=-5"])
def test_linear_residual_refuses_what_is_no_penalty_or_width(llama: PreTrainedModel, option: str) -> None:
    name, value = option.split("=")
    with pytest.raises(
        UserError, match=f"option {name}='{value}' does not fit: it takes a .*number (above|of at least)"
    ):
        score(llama, "linear-residual", calibration=sample_text(llama), settings={name: value})


def test_linear_residual_is_all_where_the_stream_is_the_same_everywhere(llama: PreTrainedModel) -> None:
    """As that of last tokens is ahead of block 0 when all sequences end in the same one."""
    text = sample_text(llama, sequences=20, padded=False)
    text.input_ids[:, -1] = 2
    found = score(llama, "linear-residual", calibration=text, positions="last", settings={"width": "4"}).units
    assert found[Unit(0, "block")] == 1
    assert 0 < found[Unit(1, "block")] < 1


# Weights and gradients


def loss_of(model: PreTrainedModel, text: CalibrationSet, *, sums: bool = False) -> Tensor:
    """Mean next-token loss over real tokens; with `sums`, summed for each sequence."""
    logits = model(input_ids=text.input_ids, attention_mask=text.attention_mask, use_cache=False).logits
    mask = torch.ones_like(text.input_ids) if text.attention_mask is None else text.attention_mask
    kept = mask[:, 1:] * mask[:, :-1]
    losses = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), text.input_ids[:, 1:], reduction="none") * kept
    return losses.sum(1) if sums else losses.sum() / kept.sum()


def gradients_of(model: PreTrainedModel, loss: Tensor) -> dict[nn.Parameter, Tensor]:
    parameters = list(model.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return {p: torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)}


@pytest.mark.parametrize("p", [1, 2])
def test_magnitude_is_a_sum_over_the_weights_of_a_unit(llama: PreTrainedModel, p: int) -> None:
    found = score(llama, "magnitude", units="all", settings={"p": str(p)})
    assert found.made_by.calibration is None  # no text was read
    for unit, value in found.units.items():
        modules = dissect(llama).blocks[unit.index].modules_of(unit.kind)
        weights = [parameter.detach().double() for module in modules for parameter in module.parameters()]
        assert value == pytest.approx(float(sum((weight.abs() ** p).sum() for weight in weights)), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_weights_that_are_quantised_are_not_read(dtype: torch.dtype) -> None:
    anatomy = dissect(tiny_model("llama", blocks=2))
    anatomy.model.model.layers[1].mlp.down_proj.weight = nn.Parameter(torch.ones(32, 24).to(dtype), requires_grad=False)
    with pytest.raises(ModelError, match=rf"{dtype} \(block\.1\) are quantised, .* metric of the stream"):
        weight_scores(anatomy, None, [WeightStatistic(metric.get("magnitude"))], anatomy.of_kind("block"))


def test_reductions_are_over_outputs_and_then_over_matrices(llama: PreTrainedModel) -> None:
    mlp = dissect(llama).blocks[4].module.mlp
    rows = [layer.weight.detach().double().abs().sum(1) for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
    expected = {
        ("mean", "sum"): sum(float(row.mean()) for row in rows),
        ("max", "mean"): sum(float(row.max()) for row in rows) / 3,
        ("sum", "max"): max(float(row.sum()) for row in rows),
        ("sum", "prod"): math.prod(float(row.sum()) for row in rows),
    }
    for (weights, block), value in expected.items():
        settings = {"weight_reduction": weights, "block_reduction": block}
        assert score(llama, "magnitude", units="mlp", settings=settings).units[Unit(4, "mlp")] == pytest.approx(value)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_taylor_of_both_orders(family: str) -> None:
    model = tiny_model(family)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)  # sure of itself and wrong: the second order shows
    text = sample_text(model, sequences=30)  # more than one batch
    gradients = gradients_of(model, loss_of(model, text))
    sums, counts = loss_of(model, text, sums=True), (text.attention_mask.sum(1) - 1)
    fisher = {parameter: torch.zeros_like(parameter) for parameter in gradients}
    for total, count in zip(sums, counts, strict=True):
        for parameter, gradient in gradients_of(model, total / count).items():
            fisher[parameter] += gradient**2 * count / counts.sum()
    for parameter in model.parameters():
        parameter.requires_grad_(False)  # as of a model that someone froze: stays so
    first = score(model, "taylor", calibration=text, units="all").units
    second = score(model, "taylor", calibration=text, units="all", settings={"order": "2"}).units
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    for unit in first:
        weights = [w for module in dissect(model).blocks[unit.index].modules_of(unit.kind) for w in module.parameters()]
        expected = sum((w * gradients[w]).abs().sum() for w in weights)
        assert first[unit] == pytest.approx(float(expected), rel=1e-5)
        curved = sum((w * gradients[w] - w**2 * fisher[w] / 2).abs().sum() for w in weights)
        assert second[unit] == pytest.approx(float(curved), rel=1e-5)
        assert abs(first[unit] - second[unit]) > 3e-5 * first[unit]


def test_the_second_order_takes_each_choice_of_a_question_for_a_sequence(llama: PreTrainedModel) -> None:
    questions = sample_choices(llama)
    rows = CalibrationSet("x", questions.input_ids, questions.attention_mask)
    found, expected = (
        score(llama, "taylor", calibration=text, settings={"order": "2"}).units for text in (questions, rows)
    )
    assert found == pytest.approx(expected)


def test_gradients_are_added_up_one_at_a_time(llama: PreTrainedModel) -> None:
    """All of them at once would be as large as the model."""
    text = sample_text(llama)
    expected = score(llama, "taylor", calibration=text).rows
    seen: list[weakref.ref[Tensor]] = []
    most = 0

    def note(gradient: Tensor) -> None:
        nonlocal most
        seen.append(weakref.ref(gradient))
        most = max(most, sum(one() is not None for one in seen))

    weights = list(dissect(llama).blocks[3].module.parameters())
    handles = [weight.register_hook(note) for weight in weights]
    weights[0].grad = kept = torch.ones_like(weights[0])  # as a training leaves it
    try:
        assert score(llama, "taylor", calibration=text).rows == expected
        assert weights[0].grad is kept
    finally:
        weights[0].grad = None
        for handle in handles:
            handle.remove()
    assert len(seen) >= len(weights)
    assert most <= 2


def test_sums_that_do_not_fit_beside_a_model_are_on_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [nn.Parameter(torch.empty(10, device="meta")), nn.Parameter(torch.empty(10, device="meta"))]
    for free, place in ((200, "cpu"), (220, "meta")):
        monkeypatch.setattr(workers, "free_memory", lambda device, free=free: free)
        assert {found.type for found in gradients._places(weights, 2).values()} == {place}


def test_taylor_is_of_the_loss_over_tokens_not_of_a_mean_over_batches(llama: PreTrainedModel) -> None:
    """Gradients of each batch's mean, added up, as public code has it: weighs tokens of short sequences more."""
    text = sample_text(llama, sequences=2)
    text = CalibrationSet("x", text.input_ids, torch.tensor([[1] * 24, [1] * 4 + [0] * 20]), ())
    right = gradients_of(llama, loss_of(llama, text))
    halves = [gradients_of(llama, loss_of(llama, text.subset([row]))) for row in (0, 1)]
    found = score(llama, "taylor", calibration=text).units[Unit(3, "block")]
    weights = list(dissect(llama).blocks[3].module.parameters())
    wrong = float(sum((w.detach() * (halves[0][w] + halves[1][w]) / 2).abs().sum() for w in weights))
    assert found == pytest.approx(float(sum((w.detach() * right[w]).abs().sum() for w in weights)), rel=1e-4)
    assert abs(found - wrong) > 0.05 * found


GATED = {  # modules that give what a sublayer adds to the stream, where that is not the sublayer itself
    "gemma2": {"attn": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"},
    "olmo2": {"attn": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"},
}


@contextmanager
def gate(anatomy: Anatomy, family: str, unit: Unit, factor: Tensor) -> Iterator[None]:
    """Inside the `with`, what the unit adds to the stream is multiplied by `factor`."""
    block = anatomy.blocks[unit.index]
    inner = GATED.get(family, {}).get(unit.kind)
    modules = [block.module.get_submodule(inner)] if inner else list(block.modules_of(unit.kind))

    def scale(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        stream = (args[0] if args else kwargs["hidden_states"]) if unit.kind == "block" else torch.zeros_like(hidden)
        rows = factor if hidden.dim() == 3 else factor.repeat_interleave(len(hidden) // len(factor), 0)[:, 0]
        scaled = stream + rows * (hidden - stream)
        return (scaled, *output[1:]) if isinstance(output, tuple) else scaled

    handle = modules[-1].register_forward_hook(scale, with_kwargs=True)  # OPT's MLP ends with its second map
    yield
    handle.remove()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "falcon", "gemma2", "olmo2", "mixtral", "opt"])
def test_gate_gradient_is_the_derivative_of_a_gate(family: str) -> None:
    model = tiny_model(family)
    anatomy, text = dissect(model), sample_text(model, sequences=6)
    found = score(model, "gate-gradient", calibration=text, units="all")
    squares = score(model, "gate-gradient", calibration=text, units="all", settings={"power": "2"}).units
    counts = text.attention_mask.sum(1) - 1
    for row in found.rows:
        factors = torch.ones(6, 1, 1, requires_grad=True)
        with gate(anatomy, family, row.of, factors):
            sums = loss_of(model, text, sums=True)
        [slopes] = torch.autograd.grad(sums.sum(), [factors])
        slopes = slopes.flatten().double()
        expected = float((slopes.sum() / counts.sum()).abs())
        assert row.value == pytest.approx(expected, rel=1e-3, abs=1e-6), row
        assert squares[row.of] == pytest.approx(expected**2, rel=2e-3, abs=1e-9)
        without = ((slopes.sum() - slopes) / (counts.sum() - counts)).abs()
        jackknife = ((without - without.mean()).square().mean() * 5).sqrt()
        assert row.error == pytest.approx(float(jackknife), rel=1e-2, abs=1e-6)


def test_a_gate_on_a_module_before_a_norm_says_nothing() -> None:
    """Where a norm follows the sublayer inside the branch, a factor on the sublayer's own output is normalised away."""
    model = tiny_model("olmo2")
    anatomy, text = dissect(model), sample_text(model)
    factor = torch.ones((), requires_grad=True)
    with gate(anatomy, "no norm known", Unit(2, "mlp"), factor):
        [wrong] = torch.autograd.grad(loss_of(model, text), [factor])
    found = score(model, "gate-gradient", calibration=text, units="mlp").units[Unit(2, "mlp")]
    assert abs(float(wrong)) < 1e-4 * found


def test_weights_and_gradients_share_one_backward(llama: PreTrainedModel) -> None:
    anatomy, text = dissect(llama), sample_text(llama)
    statistics = [WeightStatistic(metric.get(name)) for name in ("taylor", "gate-gradient", "magnitude")]
    runs = 0

    def count(module: nn.Module, args: Any) -> None:
        nonlocal runs
        runs += len(args[0]) > 2  # a few short sequences prove the replay

    handle = anatomy.model.lm_head.register_forward_pre_hook(count)
    together = weight_scores(anatomy, text, statistics, anatomy.units)
    assert runs == 1
    handle.remove()
    for statistic, rows in zip(statistics, together, strict=True):
        assert weight_scores(anatomy, text, [statistic], anatomy.units)[0] == rows


def test_weights_alone_beside_gates(llama: PreTrainedModel) -> None:
    """Something flows back, but no gradient of a weight."""
    anatomy, text = dissect(llama), sample_text(llama)
    statistics = [WeightStatistic(metric.get(name)) for name in ("magnitude", "gate-gradient")]
    rows, _ = weight_scores(anatomy, text, statistics, anatomy.units)
    assert [rows] == weight_scores(anatomy, None, statistics[:1], anatomy.units)


# Traps


def test_spans_end_where_the_stream_has_passed_their_last_block(llama: PreTrainedModel) -> None:
    """[l, l + n) compares the streams entering l and l + n; off by one is the span with one block more or less."""
    anatomy, text = dissect(llama), sample_text(llama, padded=False)
    found = score(llama, "angular", calibration=text, positions="all")
    depths, _ = streams(anatomy, text)
    for span, value in found.spans.items():
        assert value == pytest.approx(
            float(distance("angular", depths[span.start], depths[span.stop]).mean()), rel=1e-5
        )
        for wrong in (span.stop - 1, span.stop + 1):
            if span.start < wrong <= 6:
                other = float(distance("angular", depths[span.start], depths[wrong]).mean())
                assert abs(other - value) > 1e-3 * value
    for unit, value in found.units.items():
        assert value == found.spans[Span(unit.index, unit.index + 1)]


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2", "opt", "gpt_neox"])
@pytest.mark.parametrize("units", ["sublayer", "all", "attn", "block"])
def test_spans_of_sublayers_begin_and_end_in_mid_block(family: str, units: str) -> None:
    """Where both kinds are scored and no blocks, and follow one another; the stream there is that of the block without
    its MLP.
    """
    subject = open_subject(tiny_model(family))
    anatomy, text = subject.anatomy, sample_text(subject.model, padded=False)
    halves = units == "sublayer" and family != "gpt_neox"
    points: dict[float, Tensor] = {}
    with torch.no_grad():
        replay = trace(anatomy, next(text.batches(text.sequences)))
        hidden = points[0] = replay.entry
        for block in anatomy.blocks:
            if halves:
                points[block.index + 0.5] = replay.run(block.index, hidden, ("mlp",))
            hidden = points[block.index + 1] = replay.run(block.index, hidden)
    found = score(subject, "angular", units=units, calibration=text, positions="all", spans=True)
    assert set(found.spans) == {Span(*ends) for ends in itertools.combinations(sorted(points), 2)}
    for span, value in found.spans.items():
        expected = float(distance("angular", points[span.start], points[span.stop]).mean())
        assert value == pytest.approx(expected, rel=1e-4), span
    if halves:
        ends = {span.units[0]: value for span, value in found.spans.items() if span.blocks == 0.5}
        assert ends == pytest.approx({unit: found.units[unit] for unit in anatomy.of_kind("attn", "mlp")}, rel=1e-12)
    assert Scores.from_json(json.loads(json.dumps(found.to_json()))).spans == found.spans


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "jamba"])
@pytest.mark.parametrize("units", ["block", "sublayer", "all", "attn", "mlp"])
def test_contiguous_removes_a_run_in_every_shape_of_block(family: str, units: str) -> None:
    subject = open_subject(tiny_model(family))
    text = sample_text(subject.model, padded=False)
    plan = search(subject, 3, search="contiguous", units=units, calibration=text)
    assert plan.spent["tokens"] <= (1 + len(plan.order)) * text.tokens  # those for the plan: no other set is measured
    if units in ("attn", "mlp"):
        places = sorted(unit.index for unit in plan.remove)
    else:
        places = sorted(unit.reach[0] for unit in sublayers_of(plan.remove))
    assert places == [*range(places[0], places[0] + len(places))]
    assert len(plan.remove) == 3


def test_scores_of_spans_of_blocks_are_refused_for_runs_of_sublayers() -> None:
    model, parallel = tiny_model("llama"), tiny_model("gpt_neox")
    text = sample_text(model, padded=False)
    for units in ("sublayer", "all"):
        blocks = score(model, "angular", calibration=text, spans=True)
        with pytest.raises(UserError, match=f"no spans that end in mid-block, as --units {units} needs: score with"):
            search(model, 3, search="contiguous", units=units, scores=blocks, calibration=text)
        halves = score(model, "angular", units="sublayer", calibration=text, spans=True)
        found = search(model, 3, search="contiguous", units=units, scores=halves, calibration=text)
        assert found.remove == search(model, 3, search="contiguous", units=units, calibration=text).remove
        both = score(parallel, "angular", units="all", calibration=text, spans=True)
        search(parallel, 3, search="contiguous", units=units, scores=both, calibration=text)
    none = score(model, "cosine", units="all", calibration=text)
    with pytest.raises(UserError, match="make them with `shallower score MODEL --units sublayer --spans --out FILE`"):
        search(model, 3, search="contiguous", units="all", scores=none, calibration=text)


def test_the_last_block_and_the_spans_that_end_with_it_are_not_scored_after_the_norm(llama: PreTrainedModel) -> None:
    text = sample_text(llama, padded=False)
    with torch.no_grad():
        hidden = llama(input_ids=text.input_ids, output_hidden_states=True, use_cache=False).hidden_states
    for name in DISTANCES:
        found = score(llama, name, calibration=text, spans=True, positions="all").spans
        for start in range(6):
            wrong = float(distance(name, hidden[start].double(), hidden[-1].double()).mean())
            assert abs(found[Span(start, 6)] - wrong) > 3e-4 * wrong, (name, start)


def test_no_product_is_made_of_tokens_with_other_tokens(llama: PreTrainedModel) -> None:
    """Cosines of all pairs of tokens, to read the diagonal: memory grows with the square of the tokens."""

    def largest(length: int) -> int:
        text = sample_text(llama, sequences=1, length=length, padded=False)
        sizes = [0]

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                result = function(*args, **(kwargs or {}))
                sizes.append(result.numel() if isinstance(result, Tensor) else 0)
                return result

        with Watch():
            score(llama, "cosine", calibration=text, spans=True)
        return max(sizes)

    def all_pairs(before: Tensor, after: Tensor) -> Tensor:  # as in public code
        return nn.functional.normalize(before, dim=-1) @ nn.functional.normalize(after, dim=-1).T

    before, after = torch.randn(200, 32), torch.randn(200, 32)
    assert torch.allclose(all_pairs(before, after).diagonal(), torch.cosine_similarity(before, after), atol=1e-5)
    assert all_pairs(before, after).numel() == 200 * 200
    # the stream of all depths is the largest: 7 * 32 numbers a token
    assert largest(240) <= 240 * 7 * 32
    assert largest(240) <= 2.1 * largest(120)


def test_a_mean_over_tokens_is_not_a_mean_of_means(llama: PreTrainedModel) -> None:
    ids = sample_text(llama, sequences=2, padded=False).input_ids
    text = CalibrationSet("x", ids, torch.tensor([[1] * 24, [1] * 3 + [0] * 21]), ())
    depths, _ = streams(dissect(llama), text)
    values = distance("cosine", depths[2], depths[3])
    right = float((values[0].sum() + values[1, :3].sum()) / 27)
    wrong = float((values[0].mean() + values[1, :3].mean()) / 2)
    padded = float(values.mean())
    found = score(llama, "cosine", calibration=text).units[Unit(2, "block")]
    assert found == pytest.approx(right, rel=1e-6)
    assert min(abs(found - wrong), abs(found - padded)) > 1e-3 * found

    losses, counts = loss_of(llama, text, sums=True).detach(), torch.tensor([23, 2])
    from shallower.engine import Ablator

    dense = Ablator(dissect(llama), text).dense
    assert dense == pytest.approx(float(losses.sum() / counts.sum()), rel=1e-5)
    assert abs(dense - float((losses / counts).mean())) > 1e-3 * dense


def test_a_score_is_not_measured_on_what_another_score_left_behind(llama: PreTrainedModel) -> None:
    """Cutting in place, unit after unit, measures later units on a smaller model and telescopes away what the first
    ones did.
    """
    anatomy, text = dissect(llama), sample_text(llama)
    found = score(llama, "loss", calibration=text, units="block")
    reverse = {}
    with torch.no_grad():
        dense = float(loss_of(llama, text))
        for unit in reversed(list(found.units)):
            block = anatomy.blocks[unit.index].module
            own = block.forward
            block.forward = lambda hidden_states, *args, **kwargs: hidden_states
            reverse[unit] = float(loss_of(llama, text)) - dense
            block.forward = own
        previous, in_place, blocks = dense, {}, [block.module for block in anatomy.blocks]
        for unit, block in zip(found.units, blocks, strict=True):
            block.forward = lambda hidden_states, *args, **kwargs: hidden_states
            after = float(loss_of(llama, text))
            in_place[unit], previous = after - previous, after
        for block in blocks:
            del block.forward
    for unit, value in found.units.items():
        assert value == pytest.approx(reverse[unit], abs=1e-4)
    assert sum(abs(in_place[unit] - found.units[unit]) > 1e-3 for unit in found.units) >= 5
    assert sum(in_place.values()) == pytest.approx(after - dense, abs=1e-5)  # telescopes: says nothing of the parts


def test_calibration_is_counted_in_tokens_not_in_lines(tmp_path: Path) -> None:
    """`nsamples` lines of a file may be a word or a book."""
    from shallower.corpus import build_calibration
    from shallower.testing.families import tiny_tokenizer

    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(["a b"] * 40 + ["word " * 400] * 4))
    text = build_calibration(str(path), tiny_tokenizer(), sequences=8, length=24)
    assert (text.sequences, text.length) == (8, 24)
    assert text.tokens == 8 * 24
    model = tiny_model("llama")
    assert score(model, "cosine", calibration=text).made_by.calibration.tokens == 192


# Several metrics


def test_all_is_every_static_metric_and_loss(llama: PreTrainedModel, tmp_path: Path) -> None:
    text = sample_text(llama)
    sheet = score_many(llama, "all", calibration=text, units="all")
    assert sheet.metrics == tuple(sorted([*static_metrics(), "loss"]))
    assert {"magnitude", "taylor", "gate-gradient", "linear-residual", *DISTANCES} <= set(sheet.metrics)
    assert "shapley" not in sheet.metrics
    for scores in sheet.scores:
        assert set(scores.units) == set(dissect(llama).units)
        assert scores == score(llama, scores.metric, calibration=text, units="all")
    sheet.save(tmp_path / "sheet.json")
    assert ScoreSheet.load(tmp_path / "sheet.json") == sheet
    assert Scores.load(tmp_path / "sheet.json", "taylor") == sheet.pick("taylor")
    with pytest.raises(UserError, match=r"sheet\.json holds scores by several metrics; choose one with --metric: ang"):
        Scores.load(tmp_path / "sheet.json")
    with pytest.raises(UserError, match=r"holds no scores by 'cosin'; it has angular, cosine"):
        Scores.load(tmp_path / "sheet.json", "cosin")


def test_options_go_to_every_metric_that_has_them(llama: PreTrainedModel) -> None:
    text = sample_text(llama)
    settings = {"below": "before", "p": "2", "positions": "all"}
    with pytest.raises(UnknownName, match="positions"):
        score_many(llama, "cosine,magnitude,relative-l1", calibration=text, settings=settings)
    del settings["positions"]
    sheet = score_many(llama, "cosine,magnitude,relative-l1", calibration=text, settings=settings, positions="last")
    options = {scores.metric: scores.made_by.options for scores in sheet.scores}
    assert options == {
        "cosine": {"positions": "last", "dtype": "float32"},
        "magnitude": {"p": 2, "dtype": "float32"},
        "relative-l1": {"below": "before", "positions": "last", "dtype": "float32"},
    }


@pytest.mark.parametrize(
    ("names", "message"),
    [("", "must name metrics"), ("cosine,cosine", "each once"), ("cosine,cosin", "did you mean 'cosine'")],
)
def test_lists_of_metrics_that_are_refused(llama: PreTrainedModel, names: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        score_many(llama, names, calibration=sample_text(llama))


def test_spans_of_metrics_that_have_none(llama: PreTrainedModel) -> None:
    with pytest.raises(UserError, match="'magnitude' has no span scores"):
        score(llama, "magnitude", spans=True)
    sheet = score_many(llama, "magnitude,cosine", calibration=sample_text(llama), spans=True)
    assert [len(scores.spans) for scores in sheet.scores] == [0, 21]


@pytest.mark.parametrize(
    ("metric", "options", "message"),
    [
        ("magnitude", {"positions": "last"}, "magnitude never averages over positions, so --positions"),
        ("cosine", {"objective": "kl"}, "cosine never runs the model without units, so --objective"),
        ("cosine", {"workers": 2}, "cosine never runs the model without units"),
        ("cosine,taylor", {"memory": "1GB"}, "cosine, taylor never runs the model without units"),
        ("magnitude", {"calibration": "/nonexistent.txt"}, "magnitude never reads text, so --calibration, .*cosine"),
        ("magnitude", {"sequences": 3}, "magnitude never reads text"),
        ("magnitude", {"length": 64}, "magnitude never reads text"),
    ],
)
def test_options_that_no_metric_looks_at(llama: PreTrainedModel, metric: str, options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        score_many(llama, metric, **options)


def test_a_file_of_one_metric_is_what_it_was(llama: PreTrainedModel, tmp_path: Path) -> None:
    one = score_many(llama, "cosine", calibration=sample_text(llama))
    one.save(tmp_path / "one.json")
    assert json.loads((tmp_path / "one.json").read_text())["format"] == "shallower.scores/1"
    assert Scores.load(tmp_path / "one.json") == one.scores[0]
    assert ScoreSheet.load(tmp_path / "one.json") == one


def test_sheets_that_are_refused(llama: PreTrainedModel) -> None:
    sheet = score_many(llama, "cosine,magnitude", calibration=sample_text(llama))
    data = json.loads(json.dumps(sheet.to_json()))
    assert ScoreSheet.from_json(data) == sheet
    for change, message in (
        ({"metrics": []}, "not a list of at least one metric"),
        ({"metrics": [data["metrics"][0]] * 2}, "each metric once"),
        (
            {"metrics": [{**data["metrics"][0], "row": []}, 7]},
            "metric 0 of x has an unknown key 'row'.*metric 1 of x is",
        ),
        ({"metric": "cosine"}, "unknown key 'metric' .did you mean 'metrics'"),
        ({"format": "shallower.scores/3"}, "has format 'shallower.scores/3'"),
    ):
        with pytest.raises(UserError, match=message):
            ScoreSheet.from_json({**data, **change}, "x")


def test_search_picks_one_metric_of_a_sheet(llama: PreTrainedModel, tmp_path: Path) -> None:
    text = sample_text(llama)
    sheet = score_many(llama, "cosine,taylor,angular", calibration=text)
    sheet.save(tmp_path / "sheet.json")
    for name in sheet.metrics:
        for given in (sheet, tmp_path / "sheet.json"):
            plan = search(llama, 2, search="one-shot", metric=name, scores=given, calibration=text)
            assert plan.made_by.metric == name
            assert set(plan.remove) == set(sheet.pick(name).ranked()[:2])
    with pytest.raises(UserError, match="several metrics; choose one with --metric"):
        search(llama, 2, search="one-shot", scores=sheet, calibration=text)


def test_scores_that_cannot_rank_are_refused_before_text_is_read(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = sample_text(llama)
    attentions = score(llama, "cosine", units="attn", calibration=text)
    others = score(tiny_model("llama", seed=1), "cosine", calibration=text)
    monkeypatch.setattr("shallower.verbs.search._text", lambda *_, **__: pytest.fail("went on"))
    with pytest.raises(UserError, match=r"do not cover what may go: block\.0 \(one of"):
        search(llama, 2, search="one-shot", scores=attentions, calibration=text)
    with pytest.raises(UserError, match="the scores are of"):
        search(llama, 2, search="one-shot", scores=others, calibration=text)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [("taylor", "order", 2), ("relative-l1", "below", "before"), ("magnitude", "p", 2), ("shapley", "samples", 4)],
)
def test_a_search_passes_options_on_to_the_metric_it_ranks_by(
    llama: PreTrainedModel, name: str, key: str, value: object
) -> None:
    asked: dict[str, Any] = {"calibration": sample_text(llama), "settings": {key: str(value)}}
    scores = score(llama, name, **asked)
    assert scores.made_by.options[key] == value
    plan = search(llama, 2, search="one-shot", metric=name, exact=True, **asked)
    assert plan.made_by.options[key] == value
    assert set(plan.remove) == set(scores.ranked()[:2])
    given = search(llama, 2, search="one-shot", metric=name, scores=scores, exact=True, **asked)
    assert (given.order, given.made_by) == (plan.order, plan.made_by)
    other = score(llama, name, calibration=asked["calibration"])
    with pytest.raises(UserError, match=rf"--set {key}={value} and --scores that were measured with {key}=.* contrad"):
        search(llama, 2, search="one-shot", metric=name, scores=other, **asked)
    pruned = prune(llama, 2, search="one-shot", metric=name, recover="emulated-update", speed=False, **asked)
    assert (pruned.plan.remove, pruned.plan.made_by.options[key]) == (plan.remove, value)
    with pytest.raises(UnknownName, match=f"option '{key}' of search 'one-shot', metric 'cosine' or objective 'nll'"):
        search(llama, 2, search="one-shot", **asked)


def test_a_plan_tells_of_scores_that_were_measured_otherwise(llama: PreTrainedModel) -> None:
    text, other = sample_text(llama), sample_text(llama, sequences=8)
    assert text.digest != other.digest
    scores = score(llama, "relative-l1", calibration=other, settings={"below": "before"}, positions="last", seed=3)
    options = search(llama, 2, search="one-shot", scores=scores, calibration=text).made_by.options
    assert (options["below"], options["positions"]) == ("before", "last")
    assert re.fullmatch(rf".* \({other.digest}\), seed 3", options["scores"])
    judged = score(llama, "loss", objective="kl", calibration=text)
    options = search(llama, 2, search="one-shot", scores=judged, calibration=text).made_by.options
    assert options["scores"].endswith(f"({text.digest}), seed 0, kl")
    unknown = replace(scores, metric="of a package that is not here", made_by=replace(scores.made_by, seed=0))
    options = search(llama, 2, search="one-shot", scores=unknown, calibration=text).made_by.options
    assert "positions=last" in options["scores"]
    harder = score(llama, "loss", objective="kl", settings={"temperature": "2"}, calibration=text)
    for settings, same in ((None, False), ({"temperature": "2"}, True)):
        asked = {"objective": "kl", "settings": settings}
        plan = search(llama, 2, search="one-shot", metric="loss", scores=harder, calibration=text, **asked)
        assert ("scores" in plan.made_by.options) is not same
    own = score(llama, "loss", calibration=text)
    assert "scores" not in search(llama, 2, search="one-shot", scores=own, calibration=text).made_by.options


def test_blocks_that_stay_are_not_taken_away_to_rank_the_others(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[frozenset[Unit]]()

    def recorded(own: Callable[..., Any]) -> Callable[..., Any]:
        def record(self: Ablator, candidates: Any, *args: Any, **given: Any) -> Any:
            asked.extend(map(frozenset, candidates))
            return own(self, candidates, *args, **given)

        return record

    for name in ("losses", "differences"):
        monkeypatch.setattr(Ablator, name, recorded(getattr(Ablator, name)))
    for name in ("loss", "shapley"):
        asked.clear()
        search(llama, 2, search="one-shot", metric=name, protect="first:1", calibration=sample_text(llama))
        assert asked
        assert not any(Unit(0, "block") in candidate for candidate in asked)


@pytest.mark.parametrize("name", ["loss", "shapley"])
def test_a_model_that_overflows_is_not_scored(
    llama: PreTrainedModel, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ablator, "losses", lambda self, candidates, keep=None, race=True: [math.inf] * len(candidates))
    with pytest.raises(ModelError, match="the model itself gives no finite losses on this text"):
        score(llama, name, calibration=sample_text(llama))


def test_rank_correlations_are_those_of_the_textbook(llama: PreTrainedModel) -> None:
    sheet = score_many(llama, "cosine,taylor,magnitude", calibration=sample_text(llama))
    found = rank_correlations(sheet)
    assert [(row.first, row.second) for row in found] == [
        ("cosine", "taylor"),
        ("cosine", "magnitude"),
        ("taylor", "magnitude"),
    ]
    for row in found:
        first, second = (
            [sheet.pick(name).ranked().index(Unit(index, "block")) for index in range(6)]
            for name in (row.first, row.second)
        )
        gaps = sum((a - b) ** 2 for a, b in zip(first, second, strict=True))
        assert row.spearman == pytest.approx(1 - 6 * gaps / (6 * 35))
        agree = [(first[a] - first[b]) * (second[a] - second[b]) > 0 for a, b in itertools.combinations(range(6), 2)]
        assert row.kendall == pytest.approx((2 * sum(agree) - 15) / 15)


def test_positions_are_named_before_anything_is_read():
    with pytest.raises(UnknownName, match=r"unknown choice of positions 'lost'; did you mean 'last'.*auto, all, last"):
        score("no such model", positions="lost")  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [-1, 10**4])
def test_ids_that_the_model_does_not_know_are_refused(wrong):
    model = tiny_model("llama", blocks=2)
    ids = torch.full((2, 8), 3)
    ids[1, 4] = wrong
    with pytest.raises(CorpusError, match=f"ids has the token id {wrong}, and the model knows 0 to "):
        score(model, calibration=CalibrationSet("ids", ids, None))


@pytest.mark.parametrize("name", ["taylor", "gate-gradient"])
def test_gradients_are_not_asked_of_inference_mode(name):
    with torch.inference_mode():
        made_in_it = tiny_model("llama", blocks=2)
    text = sample_text(made_in_it)
    with pytest.raises(ModelError, match=r"were made inside torch\.inference_mode"):
        score(made_in_it, name, calibration=text)
    model = tiny_model("llama", blocks=2)
    with torch.inference_mode(), pytest.raises(ModelError, match=r"no gradient flows inside torch\.inference_mode"):
        score(model, name, calibration=text)
