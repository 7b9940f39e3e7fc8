"""Recovery: closed forms against generic solvers, folds against hooks, patches, and what cannot be repaired."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel

import shallower
from shallower.anatomy import dissect
from shallower.anatomy.dissect import probe_ids
from shallower.anatomy.patch import Patch
from shallower.anatomy.writers import find_writers
from shallower.corpus.calibration import CalibrationSet
from shallower.engine import prove, twins
from shallower.engine.moments import Moments
from shallower.engine.twins import SINK_WEIGHT, Point, Reading, token_weights
from shallower.errors import CorpusError, ModelError
from shallower.exporters import save as save_any
from shallower.plan import MadeBy, PruningPlan
from shallower.recovery import Repair
from shallower.registry import recovery
from shallower.surgery import cut, save
from shallower.surgery.fold import fold_constant, fold_map, fold_scale
from shallower.surgery.mapping import mapped
from shallower.surgery.patch import attach, patches
from shallower.surgery.verify import cached_logits, full_logits
from shallower.testing.conformance import sample_text, with_identity_block
from shallower.testing.families import tiny_model, tiny_tokenizer
from shallower.units import Unit, parse_units
from shallower.verbs import recoveries
from shallower.verbs.prune import prune
from shallower.verbs.recover import recover
from shallower.verbs.recovery_steps import parse_recoveries
from shallower.verbs.subject import open_subject

EXACT = {"sinks": 0.0, "relative": False}
MAPS = (".down", ".up", ".bias", ".mean")
SPAN = frozenset(parse_units("block.2-3"))


def repair_of(model: PreTrainedModel, removed: frozenset[Unit], text: CalibrationSet) -> Repair:
    dense = dissect(model)
    return Repair(dissect(cut(dense, removed)), dense, removed, text)


def logits(model: PreTrainedModel, text: CalibrationSet) -> Tensor:
    """Of real tokens."""
    with torch.no_grad():
        found = model(input_ids=text.input_ids, attention_mask=text.attention_mask).logits
    return found if text.attention_mask is None else found[text.attention_mask.bool()]


def captured(model: PreTrainedModel, text: CalibrationSet, module: nn.Module) -> tuple[Tensor, Tensor]:
    """What a module is given and gives back for real tokens, in the model's own forward; float64."""
    seen: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = module.register_forward_hook(note, with_kwargs=True)
    with torch.no_grad():
        model(input_ids=text.input_ids, attention_mask=text.attention_mask)
    handle.remove()
    mask = torch.ones_like(text.input_ids) if text.attention_mask is None else text.attention_mask
    return seen[0][mask.bool()].double(), seen[1][mask.bool()].double()


def text_of(model: PreTrainedModel, sequences: int = 16) -> CalibrationSet:
    return sample_text(model, sequences=sequences)


# Least squares


def test_refit_is_the_least_squares_matrix() -> None:
    model = tiny_model("llama")
    text = text_of(model)
    repair = repair_of(model, SPAN, text)
    student, dense = repair.student.model.model.layers, model.model.layers
    inputs, _ = captured(repair.student.model, text, student[1].mlp.down_proj)
    _, stream = captured(repair.student.model, text, student[1])
    _, target = captured(model, text, dense[3])
    old = student[1].mlp.down_proj.weight.double()
    recovery.get("refit").function(repair, ridge=0.0, **EXACT)
    expected = old + torch.linalg.lstsq(inputs, target - stream).solution.T
    assert torch.allclose(student[1].mlp.down_proj.weight.double(), expected, atol=1e-3)
    assert not torch.allclose(old, expected, atol=1e-2)
    assert torch.equal(student[2].mlp.down_proj.weight, dense[4].mlp.down_proj.weight)


def test_refit_goes_on_to_the_end_each_on_what_the_one_before_left() -> None:
    model = tiny_model("llama")
    text = text_of(model)
    repair = repair_of(model, SPAN, text)
    student, dense = repair.student.model.model.layers, model.model.layers
    recovery.get("refit").function(repair, ridge=0.0, bias=True, reach="rest", **EXACT)
    # the last matrix leaves nothing that its inputs could explain, on the stream as it is now
    inputs, _ = captured(repair.student.model, text, student[3].mlp.down_proj)
    _, stream = captured(repair.student.model, text, student[3])
    _, target = captured(model, text, dense[5])
    lacking = target - stream
    left = inputs.T @ lacking / len(inputs)
    assert left.abs().max() < 1e-3 * (inputs.norm() * lacking.norm() / len(inputs))
    assert lacking.mean(0).abs().max() < 1e-3
    assert model.config.mlp_bias is False
    assert repair.student.model.config.mlp_bias is True


@pytest.mark.parametrize(("rank", "ridge"), [(32, 0.0), (5, 0.0), (5, 0.3), (1, 3.0)])
def test_low_rank_is_reduced_rank_regression(rank: int, ridge: float) -> None:
    model = tiny_model("llama")
    text = text_of(model)
    repair = repair_of(model, SPAN, text)
    layers = repair.student.model.model.layers
    _, stream = captured(repair.student.model, text, layers[1])
    _, target = captured(model, text, model.model.layers[3])
    recovery.get("low-rank").function(repair, rank=rank, ridge=ridge, **EXACT)
    [(_, patch)] = patches(repair.student.model)
    assert patch.rank == rank
    x, y = stream - stream.mean(0), target - stream - (target - stream).mean(0)
    # a penalty is as many tokens more, one a channel, of which nothing is wanted
    penalty = math.sqrt(ridge * len(x) * float(x.square().mean())) * torch.eye(32, dtype=torch.float64)
    x, y = torch.cat([x, penalty]), torch.cat([y, torch.zeros_like(penalty)])
    whole = torch.linalg.lstsq(x, y).solution
    fitted = x @ whole
    values = torch.linalg.svdvals(fitted)
    best = (y - fitted).square().sum() + values[rank:].square().sum()
    change = patch.down.detach().double() @ patch.up.detach().double()
    found = (y - x @ change).square().sum()
    assert float(found) == pytest.approx(float(best), rel=1e-4 if ridge else 1e-3)
    left = target - patch(stream.float()).detach().double()
    assert torch.allclose(left.mean(0), torch.zeros(32, dtype=torch.float64), atol=1e-3)


def test_low_rank_stops_at_the_share_that_was_asked_for() -> None:
    model = tiny_model("llama")
    ranks = []
    explained = []
    for energy in (0.5, 0.9, 1.0):
        repair = repair_of(model, SPAN, text_of(model))
        recovery.get("low-rank").function(repair, rank=0, energy=energy, ridge=1.0)
        ranks += [patch.rank for _, patch in patches(repair.student.model)]
        explained += [float(re.findall(r"explains ([\d.]+) %", note)[0]) for note in repair.notes]
    assert 0 < ranks[0] < ranks[1] < ranks[2] == 32
    assert explained[0] >= 0.5 * explained[2] - 0.1
    assert explained[1] >= 0.9 * explained[2] - 0.1


def test_linear_fold_is_least_squares_on_what_the_mlp_writes() -> None:
    model = tiny_model("llama")
    text = text_of(model)
    repair = repair_of(model, SPAN, text)
    layers = repair.student.model.model.layers
    _, written = captured(repair.student.model, text, layers[1].mlp)
    _, stream = captured(repair.student.model, text, layers[1])
    _, target = captured(model, text, model.model.layers[3])
    recovery.get("linear-fold").function(repair, ridge=0.0, **EXACT)
    # ReplaceMe's own form: M T + Y = L
    matrix = torch.linalg.lstsq(written, target - (stream - written)).solution
    expected = matrix.T @ model.model.layers[1].mlp.down_proj.weight.double()
    assert torch.allclose(layers[1].mlp.down_proj.weight.double(), expected, atol=1e-3)


def test_magnitude_per_channel_is_least_squares_of_each_channel() -> None:
    model = tiny_model("llama")
    text = text_of(model)
    repair = repair_of(model, SPAN, text)
    layers = repair.student.model.model.layers
    _, written = captured(repair.student.model, text, layers[1].mlp)
    _, stream = captured(repair.student.model, text, layers[1])
    _, target = captured(model, text, model.model.layers[3])
    recovery.get("magnitude").function(repair, per="channel", **EXACT)
    factors = [
        np.linalg.lstsq(written[:, [c]].numpy(), (target - stream + written)[:, c].numpy(), rcond=None)[0][0]
        for c in range(32)
    ]
    expected = torch.tensor(factors)[:, None] * model.model.layers[1].mlp.down_proj.weight
    assert torch.allclose(layers[1].mlp.down_proj.weight, expected.float(), atol=1e-4)


def test_magnitude_gives_the_stream_its_length() -> None:
    model = tiny_model("llama_bias")  # tied embeddings, biases
    text = text_of(model)
    repair = repair_of(model, SPAN, text)
    student = repair.student.model
    _, target = captured(model, text, model.model.layers[3])
    _, before = captured(student, text, student.model.layers[1])
    recovery.get("magnitude").function(repair, **EXACT)
    _, after = captured(student, text, student.model.layers[1])
    assert float((target.norm(dim=-1) / after.norm(dim=-1)).mean()) == pytest.approx(1, abs=1e-4)
    factor = float((after * before).sum() / before.square().sum())
    assert torch.allclose(after, factor * before, atol=1e-3)
    assert torch.equal(student.lm_head.weight, model.lm_head.weight)
    assert (student.config.tie_word_embeddings, model.config.tie_word_embeddings) == (False, True)


def test_emulated_update_is_the_mean_update() -> None:
    model = tiny_model("llama")
    text = text_of(model)
    removed = frozenset(parse_units("block.2,block.4"))
    for measured in ("dense", "cut"):
        repair = repair_of(model, removed, text)
        student, dense = repair.student.model.model.layers, model.model.layers
        recovery.get("emulated-update").function(repair, measured=measured, **EXACT)
        given, left = captured(model, text, dense[2])
        assert torch.allclose(student[1].mlp.down_proj.bias.double(), (left - given).mean(0), atol=1e-5)
        given, left = captured(model, text, dense[4])
        if measured == "cut":  # block 4 on the stream of the model that is already cut and repaired at block 2
            stream, _ = captured(repair.student.model, text, student[3])
            stream = stream - student[2].mlp.down_proj.bias.double()
            wide = torch.zeros(text.input_ids.numel(), 32)
            mask = text.attention_mask
            assert mask is not None
            wide[mask.flatten().bool()] = stream.float()
            with swapped(dense[4], wide.view(*text.input_ids.shape, 32)):
                given, left = captured(model, text, dense[4])
            given = stream
        assert torch.allclose(student[2].mlp.down_proj.bias.double(), (left - given).mean(0), atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "phi"])  # phi's halves run side by side
def test_two_halves_of_a_block_make_of_a_stream_what_the_block_does(family: str) -> None:
    model = tiny_model(family)
    made = []
    for units in ("block.3", "attn.3,mlp.3"):
        repair = repair_of(model, frozenset(parse_units(units)), text_of(model))
        [cut_at] = repair.cuts
        made.append(next(repair.twins().read(cut_at, aim="cut")).target)
    assert torch.allclose(*made, atol=1e-5)


@pytest.mark.parametrize(
    ("first", "options"), [("emulated-update", {}), ("low-rank", {"rank": 4}), ("refit", {"bias": True})]
)
def test_what_a_repair_has_brought_on_average_is_not_added_again(first: str, options: dict[str, Any]) -> None:
    model = tiny_model("llama")
    text = text_of(model)
    repair = repair_of(model, frozenset(parse_units("block.2,block.4")), text)
    recovery.get(first).function(repair, **options)
    once = logits(repair.student.model, text)
    recovery.get("emulated-update").function(repair)
    twice = logits(repair.student.model, text)
    if first == "emulated-update":  # behind the first cut the dense model's own update, where the stream was another
        deepest = repair.cuts[-1]
        reading = next(repair.twins().read(deepest))
        lacking = (token_weights(reading, 0.0, True)[:, None] * (reading.target - reading.stream)).sum(0)
        assert float(lacking.abs().max()) < 1e-2
    else:
        assert torch.allclose(twice, once, atol=1e-3)
    recovery.get("emulated-update").function(repair)
    assert torch.allclose(logits(repair.student.model, text), twice, atol=1e-3)


@contextmanager
def swapped(block: nn.Module, stream: Tensor) -> Iterator[None]:
    """Inside the `with`, the block is given another stream."""
    handle = block.register_forward_pre_hook(
        lambda module, args, kwargs: ((stream, *args[1:]), kwargs), with_kwargs=True, prepend=True
    )
    yield
    handle.remove()


def test_moments_are_those_of_weighted_data() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.normal(3, 2, (50, 4)), generator.normal(-1, 1, (50, 3))
    weights = generator.random(50)
    moments = Moments()
    for part in np.array_split(np.arange(50), 3):
        moments.add(*(torch.tensor(a[part], dtype=torch.float32) for a in (x, y, weights)))
    joint = np.cov(np.hstack([x, y]).T, aweights=weights, ddof=0)
    assert np.allclose(moments.xx, joint[:4, :4], atol=1e-4)
    assert np.allclose(moments.xy, joint[:4, 4:], atol=1e-4)
    assert moments.y_variance == pytest.approx(np.trace(joint[4:, 4:]), rel=1e-4)
    assert np.allclose(moments.x_mean, np.average(x, axis=0, weights=weights), atol=1e-5)
    matrix = moments.ridge(0.5)
    penalty = 0.5 * np.trace(joint[:4, :4]) / 4
    assert np.allclose(matrix, np.linalg.solve(joint[:4, :4] + penalty * np.eye(4), joint[:4, 4:]), atol=1e-4)


def test_products_are_of_all_bits_where_the_caller_chose_fewer() -> None:
    settings = torch.backends.cuda.matmul
    seen: list[bool] = []

    def fewer() -> bool:
        return settings.fp32_precision == "tf32" if hasattr(settings, "fp32_precision") else settings.allow_tf32

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.ops.aten.mm.default:
                seen.append(fewer())
            return function(*args, **(kwargs or {}))

    torch.set_float32_matmul_precision("high")
    try:
        with Watch():
            Moments().add(torch.ones(4, 3), torch.ones(4, 2), torch.ones(4))
        assert seen == [False, False]
        assert fewer()
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_fit_makes_no_copy_that_it_does_not_need() -> None:
    """Of a large model's inner activations one matrix of products has gigabytes."""
    x, y = torch.randn(50, 6), torch.randn(50, 3)
    moments = Moments()
    for _ in range(2):
        moments.add(x, y, torch.ones(50))
    square, product = moments._sums[2] / moments.weight, moments._sums[3] / moments.weight
    wanted = square + 0.5 * square.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    made = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal made
            found = function(*args, **(kwargs or {}))
            given = {one.data_ptr() for one in args if isinstance(one, Tensor)}
            results = found if isinstance(found, (tuple, list)) else (found,)
            made += sum(
                isinstance(one, Tensor) and one.shape == (6, 6) and one.data_ptr() not in given for one in results
            )
            return found

    with Count():
        found = moments.ridge(0.5, centred=False)
    assert made == 2  # the matrix that is solved, and its factors
    assert torch.equal(found, torch.linalg.solve(wanted, product))
    assert torch.equal(found, moments.ridge(0.5, centred=False))


def test_moments_keep_what_other_tokens_say_beside_a_massive_activation() -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(0, 1, (2048, 6)).astype(np.float32)
    x[::256, 2:4] = (21532, 15000)  # first tokens, in two channels at once
    y = (x.astype(np.float64) @ generator.normal(0, 1, (6, 3))).astype(np.float32)
    moments = Moments()
    for part in np.array_split(np.arange(len(x)), 2):
        moments.add(torch.tensor(x[part]), torch.tensor(y[part]), torch.ones(len(part)))
    expected = np.linalg.lstsq(x - x.mean(0, dtype=np.float64), y - y.mean(0, dtype=np.float64), rcond=None)[0]
    assert np.allclose(moments.ridge(0.0), expected, atol=1e-5)


# What must hold for every recovery


CLOSED = tuple(method.name for method in recovery if not method.trained)


@pytest.mark.parametrize("name", CLOSED)
@pytest.mark.parametrize("units", ["block.2", "attn.2", "mlp.2"])
def test_nothing_is_to_repair_where_the_removed_unit_did_nothing(name: str, units: str) -> None:
    model = with_identity_block(tiny_model("llama"), 2)
    removed = frozenset(parse_units(units))
    if units != "block.2":
        base = tiny_model("llama")
        model = silenced(base, removed)
    repair = repair_of(model, removed, text_of(model))
    before = full_logits(repair.student.model, repair.calibration.input_ids)
    recovery.get(name).function(repair)
    after = full_logits(repair.student.model, repair.calibration.input_ids)
    assert torch.allclose(before, after, atol=2e-4)


def silenced(model: PreTrainedModel, units: frozenset[Unit]) -> PreTrainedModel:
    """The model with writing matrices of zeros, so that these sublayers add nothing."""
    halves = find_writers(dissect(model))
    for unit in units:
        writer = halves[unit.index].writer(unit.kind)
        assert writer is not None
        writer.replace(torch.zeros_like(writer.weight))
    return model


@pytest.mark.parametrize("name", CLOSED)
def test_padding_batches_and_memory_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    text = text_of(model)
    ids = sample_text(model, sequences=2).input_ids
    mask = text.attention_mask
    assert mask is not None
    longer = CalibrationSet("x", nn.functional.pad(text.input_ids, (0, 7), value=5), nn.functional.pad(mask, (0, 7)))

    def repaired(calibration: CalibrationSet, memory: int | None) -> Tensor:
        repair = repair_of(model, frozenset(parse_units("block.2,attn.4")), calibration)
        repair.memory = memory
        recovery.get(name).function(repair)
        return full_logits(repair.student.model, ids)

    first = repaired(text, None)
    assert torch.allclose(repaired(text, 0), first, atol=1e-4)
    assert torch.allclose(repaired(longer, None), first, atol=1e-4)
    monkeypatch.setattr(twins, "TOKENS_A_BATCH", 24)
    assert torch.allclose(repaired(text, None), first, atol=1e-4)


PLANS = ("block.1,block.3-4", "attn.2,attn.4", "mlp.1,attn.2", "mlp.3,block.5", "block.0")


@pytest.mark.parametrize("name", CLOSED)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "granite", "opt"])
@pytest.mark.parametrize("units", PLANS)
def test_it_brings_logits_nearer_to_the_dense_ones(name: str, family: str, units: str) -> None:
    model = tiny_model(family)
    removed = frozenset(parse_units(units))
    text = text_of(model, 24)
    expected = logits(model, text)
    repair = repair_of(model, removed, text)
    before = float((logits(repair.student.model, text) - expected).square().mean())
    options = {"per": "channel"} if name == "magnitude" else {}  # one factor for all channels need not: see below
    if units == "block.0" and name in ("linear-fold", "refit", "magnitude"):  # nothing writes before the first block
        with pytest.raises(ModelError, match=r"has no matrix in front of block\.0 .* \(--protect first:1\)"):
            recovery.get(name).function(repair, **options)
        return
    recovery.get(name).function(repair, **options)
    after = float((logits(repair.student.model, text) - expected).square().mean())
    assert after < (0.995 if name == "magnitude" else 0.99) * before
    assert torch.equal(logits(model, text), expected)
    prove(dissect(repair.student.model))


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "opt"])
@pytest.mark.parametrize("units", PLANS)
def test_magnitude_gives_the_stream_its_length_behind_each_of_several_cuts(family: str, units: str) -> None:
    """With random weights that may take logits away; what it does promise is lengths, which the norms behind later cuts
    see as they are.
    """
    model = tiny_model(family)
    text = text_of(model)
    expected = logits(model, text)
    repair = repair_of(model, frozenset(parse_units(units)), text)
    recovery.get("magnitude").function(repair)
    factors = [float(re.findall(r"made ([\d.]+) times", note)[0]) for note in repair.notes]
    assert len(factors) == len(repair.cuts)
    twins = repair.twins()
    for place, station in enumerate(repair.cuts):
        total = weight = 0.0
        for reading, weights in repair.samples(
            twins, station, None, sinks=0.0, relative=True, aim="dense", label="", start=False
        ):
            ratios = reading.stream.norm(dim=-1) / reading.target.norm(dim=-1)
            total += float((weights / ratios).sum())
            weight += float(weights.sum())
        later = math.prod(factors[place + 1 :])  # a cut rescales all in front of it
        assert total * later / weight == pytest.approx(1, abs=2e-3)
    assert torch.equal(logits(model, text), expected)
    prove(dissect(repair.student.model))


@pytest.mark.parametrize("family", ["olmo2", "gemma2"])
def test_where_norms_stand_behind_the_sublayers_only_patches_help(family: str) -> None:
    model = tiny_model(family)
    text = text_of(model)
    for name in ("refit", "linear-fold", "magnitude"):
        with pytest.raises(ModelError, match=r"use emulated-update or low-rank|cannot be rescaled"):
            recovery.get(name).function(repair_of(model, SPAN, text))
    repair = repair_of(model, SPAN, text)
    recovery.get("emulated-update").function(repair)
    assert [patch.rank for _, patch in patches(repair.student.model)] == [0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("family", "sequential"),
    [("olmo2", True), ("gemma2", True), ("exaone4", True), ("bloom", True), ("llama", True), ("gpt_neox", False)],
)
def test_whether_an_mlp_reads_what_the_attention_wrote_is_seen_in_every_precision(
    family: str, sequential: bool, dtype: torch.dtype
) -> None:
    """A norm behind the attention takes the length out of what it gives, and rounding the rest."""
    model = tiny_model(family).to(dtype)
    assert {half.sequential for half in find_writers(dissect(model))} == {sequential}


@pytest.mark.parametrize("family", ["olmo2", "gemma2"])
def test_half_precision_repairs_what_is_missing_behind_norms(family: str) -> None:
    model = tiny_model(family).to(torch.bfloat16)
    repair = repair_of(model, frozenset(parse_units("mlp.2,attn.3")), text_of(model))
    [station] = repair.cuts
    assert (station.here, station.missing) == (Point(2, ("mlp",)), parse_units("mlp.2,attn.3"))
    repair = repair_of(model, frozenset(parse_units("attn.3")), text_of(model))
    recovery.get("emulated-update").function(repair, measured="cut")
    mapped(repair.student.model, repair.dense, repair.removed)


@pytest.mark.parametrize("scale", [1, 300, 3000])
def test_a_gate_is_no_factor_though_one_token_outweighs_all_others(scale: float) -> None:
    """Qwen's shared expert is multiplied by a gate that differs from token to token."""
    model = tiny_model("qwen2_moe")
    with torch.no_grad():
        model.get_input_embeddings().weight[0] *= scale
    halves = find_writers(dissect(model.to(torch.bfloat16)))
    assert [half.mlp is None for half in halves] == [hasattr(b.mlp, "experts") for b in model.model.layers]


@pytest.mark.parametrize(
    ("name", "options"), [("linear-fold", {}), ("magnitude", {"per": "channel"}), ("refit", {})], ids=str
)
def test_a_cut_that_nothing_can_be_folded_in_front_of_is_refused_before_another_is_repaired(
    name: str, options: dict[str, Any]
) -> None:
    model = tiny_model("qwen3_moe")  # the MLP of block 0 is one matrix, that of block 3 several experts
    repair = repair_of(model, frozenset(parse_units("block.1,block.4")), text_of(model))
    assert [repair.writer(station) is None for station in repair.cuts] == [False, True]
    before = dict(repair.student.model.named_parameters())
    with pytest.raises(ModelError, match=r"no matrix in front of block\.4 whose output"):
        recovery.get(name).function(repair, **options)
    assert not repair.tokens
    assert all(parameter is before[path] for path, parameter in repair.student.model.named_parameters())


def test_first_tokens_with_massive_activations_do_not_count() -> None:
    model = tiny_model("llama")
    text = text_of(model)
    text.input_ids[:, 0] = 1
    with torch.no_grad():
        model.model.embed_tokens.weight[1] *= 500
    means = {}
    for sinks in (0.0, 4.0):
        repair = repair_of(model, SPAN, text)
        recovery.get("emulated-update").function(repair, sinks=sinks, relative=False)
        means[sinks] = repair.student.model.model.layers[1].mlp.down_proj.bias
    mask = text.attention_mask
    assert mask is not None
    others = mask.clone()
    others[:, 0] = 0
    given, _ = captured(model, text, model.model.layers[2])
    _, end = captured(model, text, model.model.layers[3])
    keep = others[mask.bool()].bool()
    assert torch.allclose(means[4.0].double(), (end - given)[keep].mean(0), atol=1e-4)
    assert not torch.allclose(means[0.0], means[4.0], atol=1e-3)
    with pytest.raises(CorpusError, match="no token"):
        recovery.get("emulated-update").function(repair_of(model, SPAN, text), sinks=1e-6)


def test_sinks_that_the_missing_units_make_are_made_by_the_repair() -> None:
    length, sink = 24, 1
    stream = torch.randn(length, 8)
    target = stream.clone()
    target[sink] *= 1e4
    reading = Reading(stream, target, None, None, torch.zeros(length, dtype=torch.int64))
    weights = token_weights(reading, 0.0, True)
    plain = (target.norm(dim=-1).median() / target.norm(dim=-1)).square()
    expected = torch.ones(length)
    expected[sink] = SINK_WEIGHT
    torch.testing.assert_close(weights / plain, expected)
    assert torch.equal(token_weights(reading, 0.0, False), torch.ones(length))
    assert token_weights(reading, 4.0, True)[sink] == 0  # left out where that is asked for


# Exact recovery


def linear_block(model: PreTrainedModel, index: int, matrix: Tensor) -> PreTrainedModel:
    """Block `index` becomes x ↦ x + matrix x."""
    layer = with_identity_block(model, index).model.layers[index]
    layer.post_attention_layernorm = nn.Identity()
    layer.mlp = nn.Sequential(nn.Linear(32, 32, bias=False))
    layer.mlp[0].weight.data.copy_(matrix)
    model.model.layers[index] = layer
    return model


def test_a_linear_block_comes_back_exactly() -> None:
    matrix = 0.3 * torch.randn(32, 32, generator=torch.Generator().manual_seed(3))
    model = linear_block(tiny_model("llama"), 2, matrix)
    text = text_of(model)
    repair = repair_of(model, frozenset(parse_units("block.2")), text)
    assert not torch.allclose(logits(repair.student.model, text), logits(model, text), atol=1e-2)
    recovery.get("low-rank").function(repair, rank=0, ridge=0.0)
    assert torch.allclose(logits(repair.student.model, text), logits(model, text), atol=1e-3)


@pytest.mark.parametrize("name", ["linear-fold", "refit"])
def test_a_linear_block_of_what_the_mlp_wrote_is_folded_exactly(name: str) -> None:
    """The embedding lives in the first 16 channels, block 0 writes the others, and block 1 maps those linearly."""
    matrix = torch.zeros(32, 32)
    matrix[16:, 16:] = 0.3 * torch.randn(16, 16, generator=torch.Generator().manual_seed(3))
    model = linear_block(tiny_model("llama"), 1, matrix)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 16:] = 0
        model.model.layers[0].mlp.down_proj.weight[:16] = 0
        model.model.layers[0].self_attn.o_proj.weight[16:] = 0
    text = text_of(model)
    repair = repair_of(model, frozenset(parse_units("block.1")), text)
    assert not torch.allclose(logits(repair.student.model, text), logits(model, text), atol=1e-2)
    recovery.get(name).function(repair, ridge=0.0)
    assert torch.allclose(logits(repair.student.model, text), logits(model, text), atol=1e-3)


# Folding

BIASED = [
    "llama",
    "llama_bias",
    "granite",
    "smollm3",
    "seed_oss",
    "gpt2",
    "opt",
    "gpt_neox",
    "phi",
    "bloom",
    "starcoder2",
]


@pytest.mark.parametrize("family", BIASED)
@pytest.mark.parametrize("kind", ["attn", "mlp"])
def test_a_constant_is_folded_exactly_and_survives_saving(family: str, kind: Any, tmp_path: Path) -> None:
    model = tiny_model(family)
    anatomy = dissect(cut(dissect(model), parse_units("block.2")))
    constant = torch.randn(32, generator=torch.Generator().manual_seed(1))
    ids = sample_text(model, sequences=2).input_ids
    writer = find_writers(anatomy)[1].writer(kind)
    assert writer is not None
    handle = writer.module.register_forward_hook(lambda module, args, output: output + constant / writer.factor)
    expected = full_logits(anatomy.model, ids)
    handle.remove()
    before = sum(parameter.numel() for parameter in anatomy.model.parameters())
    fold_constant(anatomy, writer, constant)
    after = sum(parameter.numel() for parameter in anatomy.model.parameters())
    assert (after > before) == (family in ("llama", "granite", "smollm3", "seed_oss"))
    found = full_logits(anatomy.model, ids)
    assert torch.allclose(found, expected, atol=1e-5)
    folder = save(anatomy.model, tmp_path / "saved", plan=None)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.allclose(full_logits(loaded, ids), found, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "granite"])
def test_a_bias_is_switched_on_beside_a_missing_attention(family: str, tmp_path: Path) -> None:
    """There the config gives caches a copy of itself, which is not what is stored."""
    model = tiny_model(family)
    repair = repair_of(model, frozenset(parse_units("attn.3")), text_of(model))
    recovery.get("emulated-update").function(repair)
    recovery.get("refit").function(repair, bias=True)
    student = repair.student.model
    assert not repair.notes
    assert not any(patches(student))
    assert student.config.mlp_bias
    folder = save_any(student, tmp_path / "out", plan=None)
    ids = probe_ids(model)
    loaded = shallower.load(folder, dtype="float32", device="cpu")
    assert torch.allclose(full_logits(loaded, ids), full_logits(student, ids), atol=1e-4)


@pytest.mark.parametrize("first", ["emulated-update", "refit"])
def test_biases_followed_by_maps_are_saved(first: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    repair = repair_of(model, frozenset(parse_units("block.3")), text_of(model))
    recovery.get(first).function(repair, **({"bias": True} if first == "refit" else {}))
    recovery.get("low-rank").function(repair, rank=4)
    found = mapped(repair.student.model, repair.dense, repair.removed)
    folder = save_any(found, tmp_path / "out", plan=None)
    assert json.loads((folder / "config.json").read_text())["mlp_bias"]
    ids = probe_ids(model)
    loaded = shallower.load(folder, dtype="float32", device="cpu")
    assert torch.allclose(full_logits(loaded, ids), full_logits(repair.student.model, ids), atol=1e-4)


def test_a_switch_that_gives_other_parts_a_bias_is_left_off(tmp_path: Path) -> None:
    """ERNIE's `use_bias` gives the head one, too."""
    model = tiny_model("ernie4_5_moe")
    repair = repair_of(model, frozenset(parse_units("block.2")), text_of(model))
    recovery.get("refit").function(repair, bias=True)
    assert "has no bias at mlp.1" in repair.notes[0]
    assert not repair.student.model.config.use_bias
    save(repair.student.model, tmp_path / "out", plan=None)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "phi3", "gemma"])
def test_a_family_without_a_bias_says_so_and_gets_a_patch(family: str) -> None:
    model = tiny_model(family)
    anatomy = dissect(cut(dissect(model), parse_units("block.2")))
    writer = find_writers(anatomy)[1].mlp
    assert writer is not None
    with pytest.raises(ModelError, match=r"has no bias at mlp.down_proj"):
        fold_constant(anatomy, writer, torch.ones(32))
    repair = repair_of(model, SPAN, text_of(model))
    recovery.get("emulated-update").function(repair)
    assert len(list(patches(repair.student.model))) == 1
    assert "stands at the cut" in repair.notes[0]
    with pytest.raises(ModelError, match="maps at cuts"):
        save(repair.student.model, "never-written", plan=None)


@pytest.mark.parametrize("family", ["llama", "granite", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("kind", ["attn", "mlp"])
def test_a_map_is_folded_exactly(family: str, kind: Any) -> None:
    anatomy = dissect(tiny_model(family))
    matrix = torch.randn(32, 32, generator=torch.Generator().manual_seed(1)).double()
    ids = sample_text(anatomy.model, sequences=2).input_ids
    writer = find_writers(anatomy)[2].writer(kind)
    assert writer is not None
    handle = writer.module.register_forward_hook(lambda module, args, output: output @ matrix.T.float())
    expected = full_logits(anatomy.model, ids)
    handle.remove()
    fold_map(writer, matrix)
    assert torch.allclose(full_logits(anatomy.model, ids), expected, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_refit_has_a_bias_only_where_the_family_can_have_one(family: str) -> None:
    model, removed = tiny_model(family), frozenset(parse_units("block.2,mlp.4"))
    with_bias, without = (repair_of(model, removed, text_of(model)) for _ in range(2))
    recovery.get("refit").function(with_bias, bias=True)
    recovery.get("refit").function(without, bias=False)
    mine, other = (repair.student.model.model.layers for repair in (with_bias, without))
    assert torch.equal(mine[1].mlp.down_proj.weight, other[1].mlp.down_proj.weight)
    assert (mine[3].self_attn.o_proj.bias is not None) == (family == "qwen3")
    places = "mlp.1" if family == "qwen3" else "mlp.1, attn.3"
    assert with_bias.notes == [f"{family} has no bias at {places}, which were fitted without."]


@pytest.mark.parametrize("family", ["llama", "llama_bias", "gpt_neox", "opt", "gpt2"])
def test_a_rescaled_stream_is_the_same_model_in_other_numbers(family: str) -> None:
    """Rescaled at its end, all of the stream is twice as long, and the final norm takes it out again."""
    anatomy = dissect(cut(dissect(tiny_model(family)), ()))
    ids = sample_text(anatomy.model, sequences=2).input_ids
    expected = full_logits(anatomy.model, ids)
    fold_scale(anatomy, Point(6), 2.0, find_writers(anatomy))
    assert torch.allclose(full_logits(anatomy.model, ids), expected, atol=2e-3)


def test_a_stream_that_cannot_be_rescaled_stays_as_it_was() -> None:
    anatomy = dissect(cut(dissect(tiny_model("bloom")), ()))  # a norm behind the embedding
    ids = sample_text(anatomy.model, sequences=2).input_ids
    expected = full_logits(anatomy.model, ids)
    with pytest.raises(ModelError, match="cannot be rescaled"):
        fold_scale(anatomy, Point(3), 2.0, find_writers(anatomy))
    assert torch.equal(full_logits(anatomy.model, ids), expected)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("scale", [1, 1000])
def test_a_stream_that_only_a_massive_token_would_let_be_rescaled_is_refused(family: str, scale: float) -> None:
    """Experts in one tensor are not found as what writes to the stream."""
    model = tiny_model(family)
    with torch.no_grad():
        model.get_input_embeddings().weight[0] *= scale
    anatomy = dissect(cut(dissect(model), ()))
    with pytest.raises(ModelError, match="cannot be rescaled"):
        fold_scale(anatomy, Point(6), 2.0, find_writers(anatomy))


# Patches


@pytest.mark.parametrize("family", ["llama", "granite", "gpt2", "falcon_alibi", "bloom"])  # bloom's give the stream
@pytest.mark.parametrize("where", ["entry", "middle", "exit"])
def test_a_patch_changes_the_stream_where_it_stands(family: str, where: Any) -> None:
    anatomy = dissect(cut(dissect(tiny_model(family)), ()))
    generator = torch.Generator().manual_seed(1)
    down, up, mean, bias = (0.2 * torch.randn(*s, generator=generator) for s in ((32, 3), (3, 32), (32,), (32,)))
    ids = sample_text(anatomy.model, sequences=2).input_ids

    def change(x: Tensor) -> Tensor:
        return x + (x - mean) @ down @ up + bias

    block, halves = anatomy.blocks[2].module, find_writers(anatomy)[2]
    entering: list[Tensor] = []

    def arrive(module: nn.Module, args: tuple[Any, ...]) -> Any:
        entering.append(args[0])
        return (change(args[0]), *args[1:]) if where == "entry" else None

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    def between(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        assert halves.attn is not None
        middle = entering[-1] + halves.attn.factor * output
        return output + (change(middle) - middle) / halves.attn.factor

    handles = [block.register_forward_pre_hook(arrive)]
    if where == "exit":
        handles.append(block.register_forward_hook(leave))
    if where == "middle":
        assert halves.attn is not None
        handles.append(halves.attn.module.register_forward_hook(between))
    expected = full_logits(anatomy.model, ids)
    for handle in handles:
        handle.remove()
    attach(anatomy, 2, where, Patch(down, up, mean, bias), halves)
    assert torch.allclose(full_logits(anatomy.model, ids), expected, atol=1e-4)
    assert torch.allclose(cached_logits(anatomy.model, ids), expected, atol=1e-3)
    again = dissect(anatomy.model)
    assert again.units == anatomy.units
    assert [(block.attn, block.mlp) for block in again.blocks] == [(b.attn, b.mlp) for b in anatomy.blocks]
    prove(again)
    with again.blocks[2].without("attn"):
        assert bool(full_logits(anatomy.model, ids).isfinite().all())
    smaller = cut(again, parse_units("block.4"))
    assert len(list(patches(smaller))) == 1


MAPPED = ("block.2-3", "block.0", "block.5", "block.0,block.3", "attn.2", "mlp.2,attn.3", "attn.1,mlp.4,block.5")


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "olmo2", "gpt2", "phi3", "mixtral", "granite"])
@pytest.mark.parametrize("plan", MAPPED)
def test_maps_at_cuts_are_saved_in_place_of_what_is_missing(family: str, plan: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    removed = frozenset(parse_units(plan))
    repair = repair_of(model, removed, text_of(model))
    if plan == "mlp.2,attn.3" and find_writers(repair.student)[2].attn is None:
        with pytest.raises(ModelError, match="no point between attention and MLP"):
            recovery.get("low-rank").function(repair, rank=5)
        return
    recovery.get("low-rank").function(repair, rank=5)
    student = repair.student.model
    plain = full_logits(cut(repair.dense, removed), probe_ids(model))
    found = mapped(student, repair.dense, removed)
    ids = probe_ids(model)
    expected = full_logits(student, ids)
    assert not torch.allclose(plain, expected, atol=1e-3)
    assert {p.data_ptr() for p in found.parameters()} <= {
        p.data_ptr() for m in (student, found) for n, p in m.named_parameters() if m is student or n.endswith(MAPS)
    }
    folder = save_any(found, tmp_path / "out", plan=None)
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    for one in (loaded, shallower.load(folder, dtype="float32", device="cpu")):
        assert torch.allclose(full_logits(one, ids), expected, atol=1e-4)
        assert torch.allclose(cached_logits(one, ids), expected, atol=1e-3)


@pytest.mark.parametrize("units", ["block.0", "block.2"])
def test_a_second_map_repairs_what_the_first_one_left(units: str) -> None:
    """Also where it stands ahead of all that is left, inside the first block."""
    model = tiny_model("llama")
    repair = repair_of(model, frozenset(parse_units(units)), text_of(model))
    recovery.get("emulated-update").function(repair)
    recovery.get("low-rank").function(repair, rank=0, ridge=0.0, **EXACT)
    once = logits(repair.student.model, repair.calibration)
    [station] = repair.cuts
    reading = next(repair.twins().read(station))
    assert torch.allclose(reading.stream.mean(0), reading.target.mean(0), atol=1e-4)
    recovery.get("low-rank").function(repair, rank=0, ridge=0.0, **EXACT)
    assert torch.allclose(logits(repair.student.model, repair.calibration), once, atol=1e-3)


TWO_CUTS = "mlp.2,attn.3,block.4"  # in the middle of one block and at its end


def test_a_stream_is_read_in_front_of_the_maps_behind_it() -> None:
    model = tiny_model("mistral")  # no biases, so that constants are maps, too
    text = text_of(model)
    repair = repair_of(model, frozenset(parse_units(TWO_CUTS)), text)
    recovery.get("emulated-update").function(repair)
    middle, _ = repair.cuts
    between, _ = captured(repair.student.model, text, repair.student.model.model.layers[2].post_attention_layernorm)
    assert torch.allclose(next(repair.twins().read(middle)).stream.double(), between, atol=1e-4)


def test_maps_stand_on_the_maps_of_one_block() -> None:
    model = tiny_model("llama")
    first = repair_of(model, frozenset(parse_units(TWO_CUTS)), text_of(model))
    recovery.get("low-rank").function(first, rank=2)
    second = Repair(dissect(first.student.model), first.dense, first.removed, first.calibration)
    recovery.get("low-rank").function(second, rank=3)
    assert [patch.rank for _, patch in patches(second.student.model)] == [2, 3, 2, 3]
    mapped(second.student.model, second.dense, second.removed)


def test_a_place_holds_as_many_maps_as_sublayers_are_missing() -> None:
    model = tiny_model("llama")
    removed = frozenset(parse_units("attn.2"))
    repair = repair_of(model, removed, text_of(model))
    for _ in range(2):
        recovery.get("low-rank").function(repair, rank=2)
    with pytest.raises(ModelError, match="2 maps stand where 1 sublayers are missing"):
        mapped(repair.student.model, repair.dense, removed)
    repair = repair_of(model, SPAN, text_of(model))
    for name, options in (("low-rank", {"rank": 2}), ("refit", {"bias": True}), ("low-rank", {"rank": 3})):
        recovery.get(name).function(repair, **options)
    found = mapped(repair.student.model, repair.dense, SPAN)
    ids = probe_ids(model)
    assert torch.allclose(full_logits(found, ids), full_logits(repair.student.model, ids), atol=1e-4)


# What can go wrong


@pytest.mark.parametrize("per", ["stream", "channel"])
def test_a_stream_behind_maps_is_not_rescaled(per: str) -> None:
    model = tiny_model("llama")
    repair = repair_of(model, frozenset(parse_units("block.2")), text_of(model))
    recovery.get("low-rank").function(repair, rank=2)
    again = Repair(dissect(repair.student.model), repair.dense, repair.removed, repair.calibration)
    with pytest.raises(ModelError, match=r"maps of an earlier recovery stand at the cuts"):
        recovery.get("magnitude").function(again, per=per)


@pytest.mark.parametrize(
    ("family", "units", "methods", "says"),
    [
        ("hyperclovax", "block.3", "emulated-update,full", "what emulated-update makes could not be saved"),
        ("opt_post_norm", "block.3", "emulated-update", "what emulated-update makes could not be saved"),
        ("mistral", "attn.3", "emulated-update,low-rank", "emulated-update and low-rank make .* 2 maps stand where 1"),
        ("mistral", "block.3", "emulated-update,low-rank", None),
        ("llama", "attn.3", "emulated-update,low-rank", None),  # a bias, and a map
    ],
)
def test_constants_that_could_not_be_saved_are_refused_before_they_are_fitted(
    family: str, units: str, methods: str, says: str | None
) -> None:
    model = tiny_model(family)
    steps, removed = parse_recoveries(methods, {}), frozenset(parse_units(units))
    if says is not None:
        with pytest.raises(ModelError, match=says):
            recover(model, methods, plan=plan_for(model, units), calibration=text_of(model), out="never-written")
        if "full" not in methods:  # what is not to be written is made all the same
            asked = {"calibration": text_of(model), "texts": (), "speed": False, "tokenizer": tiny_tokenizer()}
            assert prune(model, units, recover=methods, **asked).report.form == "packaged"
        return
    repair = repair_of(model, removed, text_of(model))
    recoveries.require_place(steps, repair.dense, removed)
    for method, _ in steps:
        method.function(repair)
    mapped(repair.student.model, repair.dense, removed)


@pytest.mark.parametrize("family", ["olmo", "phi", "gptj", "cohere", "stablelm_parallel", "doge", "bloom"])
def test_families_without_a_place_for_maps_say_so_at_once(family: str) -> None:
    dense = dissect(tiny_model(family))
    with pytest.raises(ModelError, match=r"low-rank makes could not be saved: .* does not see the stream itself"):
        recoveries.require_place(parse_recoveries("low-rank", {}), dense, frozenset(parse_units("block.2")))


def test_a_family_that_does_not_run_with_maps_says_so_at_once() -> None:
    dense = dissect(tiny_model("mamba"))  # its block reads the type of a norm that went with its mixer
    with pytest.raises(ModelError, match="low-rank makes could not be saved: mamba does not run without these units"):
        recoveries.require_place(parse_recoveries("low-rank", {}), dense, frozenset(parse_units("attn.2")))


def plan_for(model: PreTrainedModel, units: str = "block.2-3") -> PruningPlan:
    identity = open_subject(model).identity
    removed = parse_units(units)
    made = MadeBy(None, None, None, {}, 0, None, "0")
    return PruningPlan(identity, removed, tuple((unit, None) for unit in removed), None, made)


def test_every_recovery_is_listed_with_what_it_does() -> None:
    found = {method.name: method for method in recovery}
    assert {"emulated-update", "linear-fold", "low-rank", "magnitude", "refit"} <= set(CLOSED)
    assert {"full", "lora", "qlora", "low-rank-trained"} <= set(found) - set(CLOSED)
    assert all(method.summary for method in found.values())
    assert set(found["emulated-update"].options) == {"measured", "sinks", "relative"}


@pytest.mark.model
def test_the_demo_model_gains() -> None:
    """Six of thirty blocks; a few thousand tokens are enough to see the direction."""
    subject = open_subject("demo")
    from shallower.corpus import build_calibration

    text = build_calibration("python", subject.tokenizer, sequences=32, length=128, part="train")
    held = build_calibration("python", subject.tokenizer, sequences=4, length=128, part="held-out")
    removed = frozenset(parse_units("block.13-18"))
    repair = Repair(dissect(cut(subject.anatomy, removed)), subject.anatomy, removed, text)

    def loss() -> float:
        with torch.no_grad():
            return float(repair.student.model(input_ids=held.input_ids, labels=held.input_ids).loss)

    before = loss()
    recovery.get("refit").function(repair)
    assert loss() < before - 0.1
