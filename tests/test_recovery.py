"""Recovery: closed forms against generic solvers, folds against hooks, patches, and what a user may get wrong."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel

import shallower
from shallower.anatomy import Anatomy, dissect
from shallower.anatomy.dissect import probe_ids
from shallower.anatomy.patch import Patch
from shallower.anatomy.writers import find_writers
from shallower.corpus.calibration import CalibrationSet
from shallower.engine import Ablator, prove, twins
from shallower.engine.moments import Moments
from shallower.engine.twins import SINK_WEIGHT, Point, Reading, Twins, token_weights
from shallower.errors import (
    CorpusError,
    ModelError,
    ModelTooLarge,
    OutputError,
    PlanError,
    TooLittleText,
    UnknownName,
    UserError,
)
from shallower.evaluation.perplexity import Perplexity
from shallower.exporters import save as save_any
from shallower.plan import MadeBy, PruningPlan
from shallower.recovery import Repair
from shallower.registry import recovery
from shallower.reporting.data import RecoveryMadeBy, ReportData
from shallower.surgery import cut, require_free, save
from shallower.surgery.adopt import adopt
from shallower.surgery.fold import fold_constant, fold_map, fold_scale
from shallower.surgery.mapping import mapped
from shallower.surgery.patch import attach, patches
from shallower.surgery.verify import cached_logits, full_logits
from shallower.testing.conformance import sample_text, with_identity_block
from shallower.testing.families import tiny_model, tiny_tokenizer
from shallower.units import Unit, parse_units
from shallower.verbs import recoveries, repaired, texts
from shallower.verbs.history import told_before
from shallower.verbs.prune import prune
from shallower.verbs.prune_checks import require_storable
from shallower.verbs.prune_texts import _Wanted, _wanted
from shallower.verbs.ratio_curve import ratio_curve
from shallower.verbs.recover import recover
from shallower.verbs.recovery_steps import parse_recoveries
from shallower.verbs.repairable import keep_repairable
from shallower.verbs.repaired import RepairedLosses, split
from shallower.verbs.request import resolve
from shallower.verbs.search import search
from shallower.verbs.subject import open_subject
from shallower.verbs.texts import held_out

save_module = sys.modules[save.__module__]  # the package's function `save` hides it
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


@pytest.mark.parametrize(
    ("method", "settings"),
    [("emulated-update", {"measured": "cut"}), ("low-rank", {"aim": "cut"}), ("linear-fold", {"aim": "cut"})],
)
def test_what_units_make_of_a_repaired_stream_is_not_added_to_it(
    method: str, settings: dict[str, str], files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [(name, value)] = settings.items()
    said = f"{name}={value} needs the cut model that nothing was repaired of"
    with pytest.raises(UserError, match=f"{said}, and in 'magnitude,{method}' magnitude comes before: let {method}"):
        parse_recoveries(f"magnitude,{method}", settings)
    with pytest.raises(UserError, match=f"{said}, and in 'magnitude,{method}'"):
        search(files / "dense", 1, repair=f"magnitude,{method}", settings=settings)
    recover(files / "pruned", method, teacher=files / "dense", settings=settings, **asked(files))
    recover(files / "pruned", "refit", teacher=files / "dense", out=files / "once", **asked(files))

    def computed(*_: Any, **__: Any) -> None:
        raise AssertionError("something was computed")

    monkeypatch.setattr(sys.modules["shallower.verbs.recover"], "perplexities", computed)
    with pytest.raises(UserError, match=f"{said}, and weights of once are others than in dense: .*--plan plan"):
        recover(files / "once", method, teacher=files / "dense", settings=settings, **asked(files))


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


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """`dense` and `pruned` checkpoints and a text."""
    model = tiny_model("llama")
    save(model, tmp_path / "dense", plan=None, tokenizer=tiny_tokenizer())
    plan = plan_for(model)
    save(cut(dissect(model), plan.removed), tmp_path / "pruned", plan=plan, tokenizer=tiny_tokenizer())
    rows = [{"text": f"The {n} cat sat on the mat and said that {n * 7} is more than {n}. " * 24} for n in range(60)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan.save(tmp_path / "plan.json")
    return tmp_path


def asked(files: Path, **given: Any) -> dict[str, Any]:
    return {
        "calibration": str(files / "text.jsonl"),
        "sequences": 16,
        "length": 32,
        "window": 64,
        "max_windows": 3,
        "dtype": "float32",
        **given,
    }


def test_a_pruned_checkpoint_is_recovered_into_an_ordinary_one(files: Path) -> None:
    found = recover(
        files / "pruned", "emulated-update,refit", teacher=files / "dense", out=files / "out", **asked(files)
    )
    assert [stage.method for stage in found.stages] == ["cut", "emulated-update", "refit"]
    assert [stage.parameters > 0 for stage in found.stages] == [False, True, False]
    assert found.stages[1].tokens == 16 * 32
    text = sample_text(found.model, sequences=2)
    loaded = AutoModelForCausalLM.from_pretrained(files / "out", dtype=torch.float32)
    assert torch.allclose(logits(loaded, text), logits(found.model, text), atol=1e-5)
    assert PruningPlan.load(files / "out" / "plan.json") == found.plan
    written = json.loads((files / "out" / "recovery.json").read_text())
    assert [row["method"] for row in written["recovery"]] == ["cut", "emulated-update", "refit"]
    assert written["recovery"][2]["options"] == {
        name: option.default for name, option in recovery.get("refit").options.items()
    }
    made = RecoveryMadeBy.from_json(written["made_by"])
    assert made == found.made_by
    assert made.teacher.fingerprint == found.plan.model.fingerprint
    assert (made.seed, made.version) == (0, shallower.__version__)
    assert made.calibration is not None
    assert (made.calibration.tokens, made.training) == (16 * 32, None)
    assert (made.dtype, made.device, made.window, made.windows) == ("float32", "cpu", 64, 3)
    older = {key: value for key, value in written["made_by"].items() if key not in ("device", "window", "windows")}
    assert RecoveryMadeBy.from_json(older) == replace(made, device=None, window=None, windows=None)
    assert str(files / "text.jsonl") in made.calibration.spec
    card = (files / "out" / "README.md").read_text()
    assert "What is left was then changed by emulated-update, refit" in card
    assert "not changed" not in card
    assert "\n- Repaired on text.jsonl" in card
    how = "float32 on cpu, the first 3 windows of 64 tokens of each text"
    assert f"\n- Seed 0\n- Measured: {how}" in card
    assert how in (files / "out" / "report.html").read_text()
    again = recover(files / "dense", "emulated-update,refit", plan=files / "plan.json", **asked(files))
    assert torch.allclose(logits(again.model, text), logits(found.model, text), atol=1e-4)


def test_a_repair_of_what_was_repaired_tells_of_both(files: Path) -> None:
    prune(files / "dense", "block.2", recover="refit", out=files / "once", speed=False, **asked(files))
    recover(files / "once", "magnitude", teacher=files / "dense", out=files / "twice", **asked(files))
    found = recover(files / "twice", "refit", teacher=files / "dense", out=files / "out", **asked(files))
    assert [stage.method for stage in found.stages] == ["repaired", "refit"]
    written = json.loads((files / "out" / "recovery.json").read_text())
    twice = written["before"]
    once = twice["before"]
    assert [[row["method"] for row in told["recovery"]] for told in (once, twice)] == [
        ["cut", "refit"],
        ["repaired", "magnitude"],
    ]
    assert once["made_by"]["seed"] == 0
    assert "then changed by refit, magnitude, refit" in (files / "out" / "README.md").read_text()
    page = (files / "out" / "report.html").read_text()
    assert "repaired by refit, magnitude and refit" in page
    assert page.index("What had been repaired before") < page.index(">magnitude<") < page.index("What was removed")
    for before in ("x", {**once, "recovery": ["refit"]}, {**once, "before": [1]}):
        (files / "twice" / "recovery.json").write_text(json.dumps({**twice, "before": before}))
        with pytest.raises(UserError, match=r"recovery\.json, which tells how the model was repaired, cannot be read"):
            told_before(files / "twice")
    (files / "twice" / "recovery.json").write_text("{")
    with pytest.raises(UserError, match=r"recovery\.json, which tells how the model was repaired, cannot be read"):
        recover(files / "twice", "refit", teacher=files / "dense", **asked(files))


def test_a_plain_cut_in_another_number_format_is_a_plain_cut(files: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(files / "pruned", dtype=torch.float32)
    given = {"teacher": files / "dense", "plan": files / "plan.json", **asked(files), "dtype": "bfloat16"}
    assert [stage.method for stage in recover(model, "refit", **given).stages] == ["cut", "refit"]
    with pytest.raises(UserError, match=r"aim=cut runs units of dense \(bfloat16\) .* \(float32\): load both in one"):
        recover(model, "refit", **given, settings={"aim": "cut"})


@pytest.mark.parametrize("method", ["refit", "magnitude", "low-rank", "full", "lora", "low-rank-trained"])
def test_a_model_in_memory_stays_as_it_was(method: str, files: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(files / "pruned", dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config, grads = model.config.to_dict(), [parameter.requires_grad for parameter in model.parameters()]
    given = asked(files)
    if recovery.get(method).trained:
        given |= {"train_sequences": 16, "settings": {"batch": "128", "at_once": "128", "lr": "0.003"}}
        del given["sequences"]
    for subject in (model, open_subject(model)):
        found = recover(subject, method, teacher=files / "dense", plan=files / "plan.json", **given)
        assert [stage.method for stage in found.stages] == ["cut", method]
        text = sample_text(model, sequences=2)
        assert not torch.equal(logits(found.model, text), logits(model, text))
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        assert model.config.to_dict() == config
        assert [parameter.requires_grad for parameter in model.parameters()] == grads
        assert not any(patches(model))
    given = asked(files)
    if not any(patches(found.model)):  # of which a second repair could be made
        again = recover(found.model, "refit", teacher=files / "dense", plan=files / "plan.json", **given)
        assert [stage.method for stage in again.stages] == ["repaired", "refit"]


def test_a_packaged_checkpoint_is_recovered_as_the_plan_it_was_cut_by(files: Path) -> None:
    plan = prune(files / "dense", "attn.1-2", out=files / "packaged", speed=False, **asked(files)).plan
    assert open_subject(files / "packaged").anatomy.family == "llama"  # as error messages name it
    assert len(plan.removed) == 2
    found = recover(files / "packaged", "refit", teacher=files / "dense", out=files / "out", **asked(files))
    recover(files / "packaged", "low-rank", teacher=files / "dense", settings={"aim": "cut"}, **asked(files))  # plain
    again = recover(files / "dense", "refit", plan=plan, **asked(files))
    text = sample_text(again.model, sequences=2)
    assert torch.allclose(logits(found.model, text), logits(again.model, text), atol=1e-4)
    loaded = AutoModelForCausalLM.from_pretrained(files / "out", trust_remote_code=True)
    assert torch.allclose(logits(loaded, text), logits(found.model, text), atol=1e-5)


def test_what_is_stored_keeps_the_precision_of_the_checkpoint(files: Path) -> None:
    found = recover(
        files / "pruned", "refit", teacher=files / "dense", out=files / "out", **asked(files, dtype="bfloat16")
    )
    loaded = AutoModelForCausalLM.from_pretrained(files / "out")
    assert loaded.dtype == torch.float32
    dense = tiny_model("llama").model.layers
    assert torch.equal(loaded.model.layers[0].mlp.down_proj.weight, dense[0].mlp.down_proj.weight)
    changed = loaded.model.layers[1].mlp.down_proj.weight
    assert torch.equal(changed.bfloat16(), found.model.model.layers[1].mlp.down_proj.weight)


def test_what_is_made_of_float64_is_stored_in_float32(files: Path) -> None:
    tiny_model("llama").double().save_pretrained(files / "dense")
    for dtype in ("bfloat16", "float32"):
        prune(files / "dense", "block.2", out=files / dtype, speed=False, **asked(files, dtype=dtype))
        stored = load_file(files / dtype / "model.safetensors")
        assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
        card = (files / dtype / "README.md").read_text()
        assert "Weights that the original holds in float64 were rounded to float32." in card


@pytest.mark.parametrize("by", ["name", "amount", "plan", "pruned", "cut"])
def test_a_disk_that_is_too_small_is_told_of_before_the_work(
    files: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """And one that is just large enough is not. What is written is float32, as the checkpoint that is read."""
    out, plan = files / "new" / "out", files / "plan.json"
    given = asked(files, dtype="bfloat16", max_windows=1, out=out)
    if by in ("pruned", "cut"):
        models = {"teacher": files / "dense"} if by == "pruned" else {"plan": plan}
        run = partial(recover, files / ("pruned" if by == "pruned" else "dense"), "refit", **models, **given)
    else:
        remove = {"name": {"remove": "block.2"}, "amount": {"remove": "1", "search": "last"}, "plan": {"plan": plan}}
        run = partial(prune, files / "dense", speed=False, **remove[by], **given)
    run()
    tensors = load_file(out / "model.safetensors")
    needed = save_module._BESIDES_WEIGHTS + sum(tensor.nbytes for tensor in tensors.values())
    shutil.rmtree(out.parent)
    block = sum(tensor.nbytes for name, tensor in tensors.items() if ".layers.0." in name)
    buffers = 1000  # are counted in the end, and not before

    def free(amount: int) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": amount}))

    def measured(*args: object, **kwargs: object) -> None:
        raise AssertionError("text was read")

    with monkeypatch.context() as patched:
        for module in ("prune_texts", "recover"):
            patched.setattr(f"shallower.verbs.{module}.calibrate", measured)
        free(needed - 1 - (block if by == "amount" else 0))  # a search may remove more than it is asked for, by a block
        with pytest.raises(OutputError, match=r"out needs 0\.07 GB and 0\.07 GB are free on that disk; make room"):
            run()
        assert not out.parent.exists()
    free(needed + buffers)
    run()
    shutil.rmtree(out.parent)
    if by == "amount":
        free(needed - 1)
        with pytest.raises(OutputError, match="are free on that disk"):
            run()


def test_a_plan_is_applied_on_the_text_that_it_was_made_with(files: Path) -> None:
    text = files / "text.jsonl"
    shape = {"sequences": 6, "length": 40, "dtype": "float32"}
    plan = search(files / "dense", "attn.2", calibration=f"{text}?max_chars=1200", seed=3, **shape)
    apply = partial(prune, files / "dense", window=32, max_windows=1, speed=False, dtype="float32")

    def read(**given: Any) -> tuple[ReportData, str, list[str]]:
        report = apply(**{"plan": plan, **given}).report
        [scores] = report.influence
        return report, scores.made_by.calibration.spec, notes_on_text(report.notes)

    def notes_on_text(notes: Sequence[str]) -> list[str]:
        return [note for note in notes if "--calibration" in note]

    report, measured, notes = read()
    assert report.influence[0].made_by.calibration == plan.made_by.calibration
    assert list(report.pruned.perplexity) == ["text.jsonl?part=held-out"]
    assert notes == ["The calibration text is the plan's own, text.jsonl: name other text with --calibration."]
    assert read(seed=3)[1:] == (measured, notes)
    _, by_other_seed, notes = read(seed=0)
    assert by_other_seed == measured.replace("seed=3", "seed=0")
    assert notes[0].startswith("The calibration text is the plan's own, text.jsonl (by seed 0, not 3): name other")
    report, measured, _ = read(recover="low-rank", sequences=4)
    own = plan.made_by.calibration.spec
    assert measured == own.replace("sequences=6", "sequences=4")
    assert report.recovery_made_by.calibration.spec == own.replace("sequences=6&length=40", "sequences=128&length=256")
    _, measured, notes = read(calibration=str(text), sequences=2)
    assert "?sequences=2&length=128&seed=0&pack=true&bos=auto&part=train&max_chars=100000" in measured
    assert notes == []
    single = search(files / "dense", "attn.2", calibration=f"{text}?pack=false", **shape)
    with pytest.raises(
        TooLittleText, match=r"50 documents, .* can do with less\. The calibration text is the plan's own"
    ):
        read(plan=single, recover="low-rank")
    mend = partial(recover, files / "dense", "low-rank", window=32, max_windows=1, dtype="float32")
    mended = mend(plan=plan, sequences=4, length=40)
    assert mended.made_by.calibration.spec == own.replace("sequences=6", "sequences=4")
    assert notes_on_text(mended.notes) == notes_on_text(read()[0].notes) != []
    others = [mend(plan=plan, sequences=4, length=40, seed=seed).made_by for seed in (1, 2)]
    assert [made.seed for made in others] == [1, 2]
    assert len({made.calibration.digest for made in (mended.made_by, *others)}) == 3
    with pytest.raises(TooLittleText, match=r"50 documents, .*\. The calibration text is the plan's own"):
        mend(plan=single)


def test_of_a_plan_whose_text_cannot_be_had_the_usual_one_is_read(files: Path, notes: list[str]) -> None:
    dense = open_subject(files / "dense", dtype="float32")
    plan = search(dense, "attn.2", calibration=f"{files / 'text.jsonl'}?sequences=6&length=40")

    def asked_for(objective: str = "nll", repairs: bool = False, **recorded: str) -> _Wanted:
        calibration = replace(plan.made_by.calibration, **recorded)
        made_by = replace(plan.made_by, calibration=calibration, objective=objective)
        given = (dense, replace(plan, made_by=made_by), None, "nll", None, None, None)
        return _wanted(*given, repairs=repairs, has_held_out=False)

    for change, why in (
        ({"digest": "sha256:0"}, "text.jsonl, is not read (it is not what it was)"),
        ({"spec": "gone.jsonl?part=train"}, "gone.jsonl, is not read (no text at 'gone.jsonl'"),
        ({"spec": "ids of mine"}, "ids of mine, is not read ("),
        ({"objective": "task"}, "text.jsonl, is not read (it holds questions, which are no text to measure on)"),
        (
            {"spec": "self?sequences=6"},
            "self, is not read (the model wrote it, and nothing of it is held out to measure on)",
        ),
        ({"spec": f"{files / 'python'}?part=train"}, "python, is not read (no text at"),
    ):
        notes.clear()
        asked = asked_for(**change)
        assert (asked.calibration, asked.sequences, asked.length) == (None, 32, 128)
        assert list(asked.notes) == notes
        assert notes[0].startswith(f"The plan's own text, {why}")
        assert notes[0].endswith("), but the default, python: name other text with --calibration.")
        with pytest.raises(
            CorpusError, match=r"is not what the model would be repaired or trained on .* name .*--calib"
        ):
            asked_for(**change, repairs=True)
    of_another_python = asked_for(spec="python?part=train&sequences=2", repairs=True)
    assert (of_another_python.calibration, of_another_python.notes) == (None, ())


def test_a_plan_of_all_of_a_text_is_repaired_on_it_where_other_text_is_measured(files: Path) -> None:
    text = f"{files / 'text.jsonl'}?part=all"
    plan = search(files / "dense", "attn.2", calibration=text, sequences=6, length=40, dtype="float32")
    few = {"plan": plan, "sequences": 16, "length": 32, "window": 32, "max_windows": 1, "dtype": "float32"}
    mended = recover(files / "dense", "low-rank", texts=files / "text.jsonl", **few)
    pruned = prune(files / "dense", recover="low-rank", texts=files / "text.jsonl", speed=False, **few).report
    for read in (mended.made_by, pruned.recovery_made_by):
        assert (read.calibration.source, "part=all" in read.calibration.spec) == ("text.jsonl", True)
    for verb in (partial(recover, methods="low-rank"), partial(prune, recover="low-rank", speed=False)):
        with pytest.raises(CorpusError, match=r"is held out to measure on\): name text to measure on \(--text\), or "):
            verb(files / "dense", **few)


def test_what_a_family_keeps_in_float32_is_stored_in_it(tmp_path: Path) -> None:
    tiny_model("ernie4_5_moe").save_pretrained(tmp_path)
    stored, repaired = (shallower.load(tmp_path, dtype=dtype, device="cpu") for dtype in ("bfloat16", "float32"))
    before = list(repaired.parameters())
    found, changed = ([model.model.layers[3].mlp.gate, model.lm_head] for model in (stored, repaired))
    for module in changed:
        module.weight = nn.Parameter(module.weight * 1.001)
    adopt(stored, repaired, before)
    for module, wanted, dtype in zip(found, changed, (torch.float32, torch.bfloat16), strict=True):
        assert torch.equal(module.weight, wanted.weight.to(dtype))
        assert module.weight.dtype is dtype


@pytest.mark.parametrize("said", [None, "bfloat16"])
def test_the_precision_that_is_kept_is_the_weights_not_the_configs(files: Path, said: str | None) -> None:
    config = files / "dense" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": said}))
    prune(files / "dense", "block.2", out=files / "out", speed=False, **asked(files, dtype="bfloat16"))
    stored, dense = (load_file(files / name / "model.safetensors") for name in ("out", "dense"))
    assert all(torch.equal(stored[name], dense[name]) for name in stored if ".layers.0." in name)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_of_its_own_code_is_saved_with_it(
    files: Path, dtype: str, notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, config = files / "dense", files / "dense" / "config.json"
    (dense / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n    model_type = 'own_llama'\n"
    )
    (dense / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\n\nfrom .configuration_own import OwnConfig\n\n\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    modules = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    changed = {"model_type": "own_llama", "architectures": ["OwnForCausalLM"], "auto_map": modules}
    config.write_text(json.dumps({**json.loads(config.read_text()), **changed}))
    given = asked(files, dtype=dtype, trust_remote_code=True)
    found = prune(dense, "block.2", out=files / "out", speed=False, **given)
    loaded = AutoModelForCausalLM.from_pretrained(files / "out", dtype=found.model.dtype, trust_remote_code=True)
    assert type(loaded).__name__ == "OwnForCausalLM"
    assert torch.allclose(logits(loaded, text_of(loaded)), logits(found.model, text_of(loaded)))
    assert "trust_remote_code=True" in (files / "out" / "README.md").read_text()
    require_free(files / "out", force=True)
    if dtype == "bfloat16":
        return
    with monkeypatch.context() as patch:
        patch.setattr("shallower.verbs.prune.texts_of_prune", None)  # nothing is read before
        with pytest.raises(ModelError, match=r"OwnForCausalLM is not a class of transformers itself"):
            prune(dense, "20%", units="attn", speed=False, **given)
    subject = open_subject(dense, dtype=dtype, trust_remote_code=True)
    for kind, impossible in (("block", []), ("sublayer", ["attn.3", "mlp.3"]), ("all", ["attn.3", "mlp.3"])):
        notes.clear()
        require_storable(subject, resolve(subject, 1, units=kind), [], "auto", saved=True)
        assert [re.search(r"the model without (\S+) is: OwnFor", note)[1] for note in notes] == impossible


def test_whole_periods_can_go_though_no_single_block_can(files: Path, notes: list[str]) -> None:
    save(tiny_model("jamba", blocks=12), files / "jamba", plan=None, tokenizer=tiny_tokenizer())
    given = asked(files, sequences=2, max_windows=1, search="contiguous", protect="0-2", speed=False)
    found = prune(files / "jamba", 6, out=files / "out", **given)
    assert found.report.pruned.blocks == 6
    assert "may be impossible to store, as the model without block.7 is: jamba says" in " ".join(notes)


def test_card_and_report_count_a_map_alike(files: Path) -> None:
    found = prune(files / "dense", "block.1-2", recover="low-rank", out=files / "out", speed=False, **asked(files))
    card = (files / "out" / "README.md").read_text()
    held = sum(tensor.numel() for tensor in load_file(files / "out" / "model.safetensors").values())
    assert found.report.pruned.parameters == held
    blocks = found.report.pruned.blocks
    assert f"\n{blocks} blocks, 1 more that holds only a map, and {held:,} parameters are left of " in card
    assert f"| {found.report.dense.blocks} | {blocks} |" in card
    assert ", repaired by low-rank: perplexity" in (files / "out" / "report.html").read_text().replace("\u00a0", " ")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_maps_at_cuts_are_saved_packaged(files: Path, dtype: str) -> None:
    found = recover(
        files / "pruned", "refit,low-rank", teacher=files / "dense", out=files / "out", **asked(files, dtype=dtype)
    )
    text = sample_text(found.model, sequences=2)
    loaded = AutoModelForCausalLM.from_pretrained(files / "out", trust_remote_code=True)
    assert loaded.dtype == torch.float32
    allowed = 1e-5 if dtype == "float32" else 0.03

    def away(one: PreTrainedModel, other: PreTrainedModel) -> float:
        return float((logits(one, text) - logits(other, text).float()).abs().mean())

    assert away(loaded, found.model) < allowed
    pruned = prune(
        files / "dense",
        "block.2-3",
        recover="refit,low-rank",
        out=files / "again",
        speed=False,
        **asked(files, dtype=dtype),
    )
    assert pruned.report.form == "packaged"
    again = AutoModelForCausalLM.from_pretrained(files / "again", trust_remote_code=True)
    assert away(again, pruned.model) < allowed
    assert "trust_remote_code" in (files / "again" / "report.html").read_text()
    told = json.loads((files / "again" / "report.json").read_text())["notes"]
    [of_vllm] = [note for note in told if "vLLM" in note]
    assert of_vllm in (files / "again" / "README.md").read_text(), "of what is stored, and not of the cut before it"


@pytest.mark.parametrize(
    ("units", "recover_by", "settings", "kept"),
    [
        ("all", "refit", {}, "attn.0"),
        ("block", "linear-fold", {}, "block.0"),
        ("all", "magnitude", {"per": "channel"}, "attn.0"),
        ("all", "magnitude", {}, ""),
        ("all", "refit", {"reach": "rest"}, ""),
    ],
)
def test_a_search_keeps_what_could_not_be_repaired(
    files: Path, units: str, recover_by: str, settings: dict[str, str], kept: str, notes: list[str]
) -> None:
    """The first block's weights are the smallest, so that it would go first."""
    wanted = {"remove": "50%:blocks", "units": units, "search": "one-shot", "metric": "magnitude"}
    done = prune(
        first_light(files / "light"), recover=recover_by, settings=settings, speed=False, **wanted, **asked(files)
    )
    assert (Unit.parse(kept or "attn.0") in done.plan.removed) is not bool(kept)
    assert any(kept in note and "as --protect first:1 does" in note for note in notes) is bool(kept)
    assert done.plan.made_by.options["protect"] == ("first:1" if kept else "")


def first_light(folder: Path) -> Path:
    """A model of whose first block the weights are so small that by their magnitude it goes first."""
    model = tiny_model("llama")
    for parameter in model.model.layers[0].parameters():
        parameter.data *= 0.01
    save(model, folder, plan=None, tokenizer=tiny_tokenizer())
    return folder


def test_what_no_recovery_can_repair_is_told_before_the_search(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tiny_model("gemma2"), files / "normed", plan=None, tokenizer=tiny_tokenizer())  # behind a norm, everywhere
    monkeypatch.setattr("shallower.verbs.prune.search_plan", pytest.fail)
    for remove, folder in (("2", "normed"), ("attn.0", "dense")):
        with pytest.raises(ModelError, match=r"use emulated-update or low-rank"):
            prune(files / folder, remove, recover="refit", speed=False, **asked(files))


@pytest.mark.parametrize("error", [ModelError, OutputError])
def test_a_refusal_after_the_search_names_what_was_chosen(
    error: type[UserError], files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise error("No.")

    monkeypatch.setattr("shallower.verbs.prune.require_place", refused)
    given = asked(files, out=files / "out", recover="low-rank", speed=False)
    with pytest.raises(error, match=r"^No\. The search had chosen block\.2-4: --remove block\.2-4 takes that"):
        prune(files / "dense", "3", search="last", **given)
    with pytest.raises(error, match=r"^No\.$"):
        prune(files / "dense", "block.2", **given)


def test_prune_recovers_in_one_command(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []
    measure = texts.perplexity

    def noted(*args: Any, label: str, **given: Any) -> Perplexity:
        measured.append(label)
        return measure(*args, label=label, **given)

    monkeypatch.setattr(texts, "perplexity", noted)
    pruned = prune(
        files / "dense",
        "block.2-3",
        recover="emulated-update,refit",
        settings={"ridge": "0.1"},
        out=files / "out",
        speed=False,
        **asked(files),
    )
    assert [stage.method for stage in pruned.report.recovery] == ["cut", "emulated-update", "refit"]
    last = pruned.report.recovery[-1].perplexity
    assert last == pytest.approx(dict(pruned.report.pruned.perplexity))
    assert len(measured) == 4  # the dense model, the cut one, and what each of the recoveries made of it
    written = open_subject(files / "out", dtype="float32")
    found = texts.perplexities(written, held_out(asked(files)["calibration"]), 64, 3)
    assert last == pytest.approx(texts.values(found), rel=1e-5)
    report = ReportData.load(files / "out" / "report.json")
    assert report.recovery == pruned.report.recovery
    assert report.recovery[2].options["ridge"] == 0.1
    assert report.recovery_made_by == pruned.report.recovery_made_by
    assert report.recovery_made_by is not None
    assert report.recovery_made_by.teacher == report.plan.model
    card = (files / "out" / "README.md").read_text()
    assert "What is left was then changed by emulated-update, refit" in card
    assert "not changed" not in card
    assert "\n| refit | " in card
    assert re.search(r"\n- `refit`: .*ridge = 0.1", card)
    assert "Recovery" in (files / "out" / "report.html").read_text()
    old = json.loads((files / "out" / "report.json").read_text())
    for stage in old["recovery"]:
        del stage["options"]
    assert [old[key] for key in ("dtype", "device", "window", "windows")] == ["float32", "cpu", 64, 3]
    for key in ("recovery_made_by", "device", "window", "windows"):
        del old[key]
    assert [stage.options for stage in ReportData.from_json(old).recovery] == [{}, {}, {}]
    faulty = {**json.loads((files / "out" / "report.json").read_text()), "recovery_made_by": {"seed": "0"}}
    with pytest.raises(UserError, match=r"'recovery_made_by' of the report lacks 'teacher'.*'seed' of .* is '0'"):
        ReportData.from_json(faulty)
    del old["recovery"]
    assert ReportData.from_json(old).recovery == ()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"methods": "refitt"}, UnknownName, "did you mean 'refit'"),
        ({"methods": ","}, UserError, "no recovery is named"),
        ({"settings": {"rigde": "1"}}, UnknownName, "did you mean 'ridge'"),
        ({"settings": {"reach": "far"}}, UserError, "cuts or rest"),
        ({"teacher": "other"}, ModelError, "cannot teach pruned: its model_type is 'gpt2', not 'llama'"),
        ({"teacher": "sibling"}, PlanError, "was made for"),
        ({"teacher": "pruned"}, PlanError, "was made for"),
        ({"teacher": None}, UserError, "--teacher MODEL"),
        ({"model": "dense"}, PlanError, "has no plan.json"),
        (
            {"plan": "other-plan.json"},
            PlanError,
            "plan.json says that pruned lacks block.2-3, and --plan .*other-plan.json removes block.2-4: leave",
        ),
        ({"sequences": 1}, CorpusError, "32 tokens of calibration text cannot fit"),
    ],
)
def test_what_a_user_may_get_wrong(files: Path, change: dict[str, Any], error: type[Exception], message: str) -> None:
    save(tiny_model("gpt2"), files / "other", plan=None, tokenizer=tiny_tokenizer())
    save(tiny_model("llama", seed=1), files / "sibling", plan=None, tokenizer=tiny_tokenizer())
    plan_for(tiny_model("llama"), "block.2-4").save(files / "other-plan.json")
    given: dict[str, Any] = {"model": "pruned", "teacher": "dense", "methods": "refit", **change}
    for name in ("model", "teacher", "plan", "out"):
        if given.get(name) is not None:
            given[name] = files / given[name]
    before = sorted(path.name for path in files.iterdir())
    with pytest.raises(error, match=message):
        recover(given.pop("model"), given.pop("methods"), **asked(files, **given))
    assert sorted(path.name for path in files.iterdir()) == before


@pytest.mark.parametrize("method", ["refit", "full"])
def test_a_plan_that_the_model_was_not_cut_by_is_refused(method: str, files: Path) -> None:
    given = {"teacher": files / "dense", **asked(files)}
    given |= {"sequences": None} if method == "full" else {}
    as_large, smaller = (plan_for(tiny_model("llama"), removed) for removed in ("block.4-5", "block.2-4"))
    with pytest.raises(
        PlanError, match=r"pruned lacks block\.2-3, and the plan removes block\.4-5: leave the plan out"
    ):
        recover(files / "pruned", method, plan=as_large, **given)
    (files / "pruned" / "plan.json").unlink()
    for model in (files / "pruned", AutoModelForCausalLM.from_pretrained(files / "pruned", dtype=torch.float32)):
        with pytest.raises(
            PlanError, match="the model has 4 blocks, which is not what is left of the 6 of its teacher"
        ):
            recover(model, method, plan=smaller, **given)


def test_a_search_behind_repairs_keeps_to_the_memory_that_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int | None] = []

    def spy(kind: type) -> None:
        make = kind.__init__  # type: ignore[misc]

        def noted(self: Any, *args: Any, **more: Any) -> None:
            given.append(more.get("memory"))
            make(self, *args, **more)

        monkeypatch.setattr(kind, "__init__", noted)

    spy(Repair)
    spy(Ablator)
    model = tiny_model("llama")
    search(model, 1, calibration=sample_text(model, sequences=8), repair="low-rank", memory="1MB")
    assert len(given) > 2 * 6  # a repair and a judge for each block
    assert set(given) == {1_000_000, 500_000}  # the dense model's streams have the other half


def test_what_a_ranking_kept_in_memory_is_gone_when_candidates_are_repaired() -> None:
    model = tiny_model("llama")
    text = sample_text(model, sequences=8)
    ablator = Ablator(dissect(model), split(text).judged, memory=1_000_000, threads=1)
    asked = {"search": "one-shot,swap", "metric": "loss", "settings": {"rounds": "1"}, "repair": "low-rank"}
    search(model, 1, calibration=text, ablator=ablator, **asked)
    assert ablator.spent.tokens > 0
    assert ablator._workers._first.states.left == 500_000  # type: ignore[attr-defined]


def test_a_search_judges_candidates_behind_their_repair() -> None:
    """Block 3 is linear and large: as it is cut its loss is worst, behind a full-rank map it costs nothing."""
    matrix = 0.6 * torch.randn(32, 32, generator=torch.Generator().manual_seed(3))
    model = linear_block(tiny_model("llama"), 3, matrix)
    text = text_of(model, 32)
    judge = RepairedLosses(open_subject(model), split(text), parse_recoveries("low-rank", {"rank": "0", "ridge": "0"}))
    dense, linear, other = judge.losses([frozenset(), parse_units("block.3"), parse_units("block.2")])
    assert linear == pytest.approx(dense, abs=1e-3)
    with closing(Ablator(dissect(model), judge.judged, "nll")) as ablator:
        assert dense == pytest.approx(ablator.losses([frozenset()])[0], abs=1e-6)
        assert abs(ablator.losses([parse_units("block.3")])[0] - dense) > 0.01
    assert abs(other - dense) > 0.001
    assert judge.fitted.sequences + judge.judged.sequences == 32
    plan = search(model, 1, calibration=text, repair="low-rank")
    assert (plan.made_by.options["repair"], len(plan.remove)) == ("low-rank", 1)
    assert plan.made_by.options["exact"]
    with pytest.raises(UserError, match="drop --objective"):
        search(model, 1, calibration=text, repair="low-rank", objective="kl")


def test_a_cut_by_a_plan_that_was_chosen_behind_a_repair_says_that_none_was_made(files: Path) -> None:
    given = asked(files)
    text = {key: given[key] for key in ("calibration", "sequences", "length", "dtype")}
    told = {}
    for repair, recover_by in (("", ""), ("low-rank", ""), ("low-rank", "low-rank")):
        plan = search(files / "dense", "block.2", repair=repair, **text)
        notes = prune(files / "dense", plan=plan, recover=recover_by, speed=False, **given).report.notes
        told[repair, recover_by] = [note for note in notes if "was not repaired" in note]
    assert [len(notes) for notes in told.values()] == [0, 1, 0]
    assert told["low-rank", ""][0].endswith("Add --recover low-rank.")
    text_file = str(files / "text.jsonl")
    curve = ratio_curve(files / "dense", plan, texts=text_file, window=32, max_windows=1, dtype="float32")
    [note] = [note for note in curve.notes if "not repaired" in note]
    assert note.startswith("The plan was chosen by what low-rank makes of the cut (--repair), and its prefixes are not")
    assert "`shallower prune --recover low-rank` makes them." in note


@pytest.mark.parametrize(
    ("family", "how"), [("gemma2", "greedy"), ("gemma2", "annealing"), ("gemma2", "last,swap"), ("mixtral", "beam")]
)
def test_a_search_says_why_nothing_can_be_repaired(family: str, how: str) -> None:
    """Also one that asks about one set at a time, or after another; and so do units that are named."""
    model = tiny_model(family)
    text = sample_text(model, sequences=8)
    steps = {"steps": "2"} if how == "annealing" else {}
    reason = f"^{family} has no matrix .* use emulated-update or low-rank"
    with pytest.raises(ModelError, match=reason):
        search(model, 2, search=how, calibration=text, repair="linear-fold", settings=steps)
    with pytest.raises(ModelError, match=reason):
        search(model, "block.1", calibration=text, repair="linear-fold")


@pytest.mark.parametrize(
    ("steps", "settings"),
    [
        ("linear-fold", {}),
        ("low-rank", {"aim": "cut"}),
        ("magnitude,refit", {"reach": "rest"}),  # the first changes all that is ahead of a cut
        ("refit,low-rank", {"bias": "true"}),
        ("emulated-update", {"measured": "cut"}),
    ],
)
@pytest.mark.parametrize(("depths", "share"), [(0, 1.0), (2, 0.85), (100, 0.6)])
def test_candidates_share_what_the_dense_model_computes(
    steps: str, settings: dict[str, str], depths: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses are those of repairs that share nothing, and less is run; with memory for none, two, or all depths."""
    model = tiny_model("llama", blocks=8)
    subject, text = open_subject(model), split(sample_text(model, sequences=20))
    twins: list[Twins] = []
    make = Twins.__init__

    def noted(self: Twins, *args: Any, **more: Any) -> None:
        twins.append(self)
        make(self, *args, **more)

    monkeypatch.setattr(Twins, "__init__", noted)
    sets = (*(f"block.{index}" for index in range(1, 8)), "block.5-6", "block.3,mlp.6", "attn.3", "block.1,attn.7")
    chosen = [frozenset(parse_units(units)) for units in sets]
    memory = 2 * depths * text.fitted.input_ids.numel() * 32 * 4
    found: list[list[float]] = []
    spent: list[int] = []
    for shares in (False, True):
        twins.clear()
        judge = RepairedLosses(subject, text, parse_recoveries(steps, settings), memory=memory)
        if not shares:
            monkeypatch.setattr(judge, "_streams", None)
        found.append(judge.losses(chosen))
        spent.append(sum(pair.tokens for pair in twins))
    assert found[1] == pytest.approx(found[0], abs=1e-6)
    assert len(set(found[0])) == len(chosen)
    assert spent[1] <= share * spent[0]
    batches = len(twins[0].batches)
    assert len(judge._streams._kept) <= batches * depths


@pytest.mark.parametrize("how", ["one-shot", "milp", "contiguous", "random", "last"])
def test_a_search_that_judges_nothing_is_not_judged_behind_repairs(how: str) -> None:
    model = tiny_model("llama")
    text = sample_text(model, sequences=8)
    with pytest.raises(UserError, match=rf"^search '{how}' judges no candidates.*annealing, beam.*swap\), alone"):
        search(model, 2, search=how, calibration=text, repair="low-rank")
    plan = search(model, 2, search=f"{how},swap", calibration=text, repair="low-rank")
    assert len(plan.remove) == 2


def test_options_reach_the_repair_that_judges() -> None:
    model = tiny_model("llama")
    text = sample_text(model, sequences=8)
    plans = [
        search(model, "block.2,block.4", calibration=text, repair="emulated-update,linear-fold", settings=settings)
        for settings in ({}, {"ridge": "1"}, {"ridge": "1", "measured": "cut"})
    ]
    assert len({plan.order[-1][1] for plan in plans}) == 3
    assert plans[2].made_by.options.items() >= {"ridge": 1, "measured": "cut"}.items()
    walk = {"steps": "2", "rank": "1"}
    assert search(model, 1, search="annealing", calibration=text, repair="low-rank", settings=walk)
    with pytest.raises(
        UnknownName, match=r"option 'rnk' of search 'greedy', objective 'nll' or repair 'low-rank'; .*rank"
    ):
        search(model, 1, calibration=text, repair="low-rank", settings={"rnk": "1"})


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ("", (24, 8 + 2)),
        ("?length=8", (34 - 20, 20)),
        ("?sequences=16", (12, 4)),
        ("?sequences=5&length=8", (3, 2)),
    ],
)
def test_candidates_are_judged_on_other_text_than_repairs_need(
    options: str, rows: tuple[int, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Twenty sequences of eight tokens judge, in sequences as long as a repair's; more are read for the repair."""
    monkeypatch.setattr(recoveries, "REPAIR_SEQUENCES", 24)
    monkeypatch.setattr(recoveries, "REPAIR_LENGTH", 16)
    given: list[RepairedLosses] = []
    make = RepairedLosses.__init__

    def noted(self: RepairedLosses, *args: Any, **more: Any) -> None:
        given.append(self)
        make(self, *args, **more)

    monkeypatch.setattr(RepairedLosses, "__init__", noted)
    (tmp_path / "text.txt").write_text("\n\n".join(f"{n} and {n * n} are words of a text." for n in range(2000)))
    asked: dict[str, Any] = {"tokenizer": tiny_tokenizer(), "sequences": 20, "length": 8, "repair": "emulated-update"}
    plan = search(tiny_model("llama"), 1, calibration=f"{tmp_path / 'text.txt'}{options}", **asked)
    [judge] = given
    assert (judge.fitted.sequences, judge.judged.sequences) == rows
    fitted, judged = ({tuple(row.tolist()) for row in text.input_ids} for text in (judge.fitted, judge.judged))
    assert not fitted & judged
    assert plan.made_by.calibration is not None
    assert plan.made_by.calibration.tokens == judge.fitted.tokens + judge.judged.tokens
    assert plan.spent["tokens"] == 6 * judge.fitted.tokens + 7 * judge.judged.tokens
    assert plan.spent["exhaustive"] == plan.spent["tokens"]
    few = {**asked, "sequences": 10**5}
    with pytest.raises(
        TooLittleText,
        match=r"on 100000 sequences of 16 .* judged on 50000 others: write (.*\?sequences=\d+), or use more",
    ) as told:
        search(tiny_model("llama"), 1, calibration=tmp_path / "text.txt", **few)
    advised = re.search(r"write (.*\?sequences=\d+),", str(told.value))
    assert advised is not None
    assert search(tiny_model("llama"), 1, calibration=advised[1], **few).remove
    with pytest.raises(CorpusError, match=r"typo\.txt") as refused:
        search(tiny_model("llama"), 1, calibration=tmp_path / "typo.txt", **asked)
    assert "--repair" not in str(refused.value)  # it is not too little text that is wrong
    with pytest.raises(UserError, match="in two parts is for a search with a repair"):
        search(tiny_model("llama"), 1, calibration=split(sample_text(tiny_model("llama"), sequences=8)))


def test_prune_searches_behind_the_repair_that_it_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As search does, on the same text; an option that the repair shares with the recovery is for both."""
    monkeypatch.setattr(recoveries, "REPAIR_SEQUENCES", 24)
    monkeypatch.setattr(recoveries, "REPAIR_LENGTH", 16)
    (tmp_path / "text.txt").write_text("\n\n".join(f"{n} and {n * n} are words of a text." for n in range(2000)))
    model, text = tiny_model("llama"), tmp_path / "text.txt"
    asked: dict[str, Any] = {"tokenizer": tiny_tokenizer(), "calibration": text, "sequences": 20, "length": 8}
    asked |= {"repair": "low-rank", "settings": {"rank": "2", "aim": "cut"}}
    done = prune(model, 1, recover="refit", speed=False, window=16, max_windows=1, **asked)
    assert done.plan == search(model, 1, protect="first:1", **asked)  # as nothing in front could be refitted
    assert done.plan.made_by.options.items() >= {"repair": "low-rank", "rank": 2, "aim": "cut"}.items()
    assert {**done.report.recovery[1].options}["aim"] == "cut"
    plan = PruningPlan(done.plan.model, done.plan.remove, done.plan.order, None, done.plan.made_by)
    with pytest.raises(UserError, match=r"--repair low-rank would change nothing: drop it, or .*--recover low-rank"):
        prune(model, plan=plan, repair="low-rank")


@pytest.mark.parametrize(("recover_by", "warned"), [("", True), ("refit", False)])
def test_that_a_repair_only_judges_is_said_before_anything_is_loaded(
    recover_by: str, warned: bool, notes: list[str]
) -> None:
    with pytest.raises(ModelError):
        prune("nowhere", 1, repair="low-rank", recover=recover_by)
    assert ["not repaired: add --recover low-rank" in note for note in notes] == [True] * warned


def test_a_set_that_cannot_be_repaired_is_only_passed_over() -> None:
    model = tiny_model("llama")
    text = split(sample_text(model, sequences=8))
    judge = RepairedLosses(open_subject(model), text, parse_recoveries("linear-fold", {"ridge": "1"}))
    first, second = parse_units("block.0"), parse_units("block.1")
    assert judge.losses([first]) == [math.inf]  # one alone may be a step of a walk
    assert math.isfinite(judge.losses([first, second])[1])
    assert judge.losses([first, first]) == [math.inf] * 2
    third = parse_units("block.2")
    assert judge.losses([[*first, *third], [*first, *third, *second]])[0] == math.inf  # a parent and its only child
    with pytest.raises(ModelError, match=r"in front of block\.0"):
        judge.require_possible(first)
    judge.require_possible(second)


def test_a_student_without_room_is_told_of_the_way_without_it(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, opened = sys.modules[recover.__module__], []

    def open_one(model: Any, *args: Any, **how: Any) -> Any:
        opened.append(model)
        if len(opened) > 1:
            raise ModelTooLarge("the weights of pruned do not fit into memory; choose another --device.")
        return open_subject(model, *args, **how)

    monkeypatch.setattr(module, "open_subject", open_one)
    with pytest.raises(ModelTooLarge, match=r"do not fit .* beside its teacher.* give the dense model and the plan"):
        recover(files / "pruned", "refit", teacher=files / "dense", **asked(files))


def test_a_set_without_room_for_its_repair_is_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = tiny_model("llama")
    judge = RepairedLosses(open_subject(model), split(sample_text(model, sequences=8)), parse_recoveries("refit", {}))
    monkeypatch.setattr(sys.modules[cut.__module__], "cached_logits", no_room)
    with pytest.raises(torch.OutOfMemoryError):
        judge.losses([parse_units("block.2")])


def test_a_search_behind_repairs_goes_on_where_it_was_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SHALLOWER_CACHE", str(tmp_path))
    asked: list[frozenset[Unit]] = []

    def run(until: int = 100, repair: str = "low-rank", **changed: Any) -> PruningPlan:
        def noted(dense: Anatomy, removed: frozenset[Unit]) -> PreTrainedModel:
            if len(asked) == until:
                raise KeyboardInterrupt
            asked.append(removed)
            return cut(dense, removed)

        asked.clear()
        monkeypatch.setattr(repaired, "cut", noted)
        model = changed.pop("model", tiny_model("llama"))
        text = sample_text(model, sequences=changed.pop("sequences", 8))
        return search(model, 2, calibration=text, repair=repair, **changed)

    with pytest.raises(KeyboardInterrupt):
        run(until=7)
    first = list(asked)
    plan = run()
    assert len(first) == 7
    assert set(first).isdisjoint(asked)
    assert len(first) + len(asked) == 1 + 6 + 5
    assert run() == plan
    assert asked == []
    for other in (
        {"model": tiny_model("llama", seed=1)},
        {"sequences": 12},
        {"repair": "emulated-update"},
        {"dtype": "bfloat16", "model": tiny_model("llama").bfloat16()},
    ):
        run(**other)
        assert len(asked) == 1 + 6 + 5


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


def test_a_search_keeps_one_half_of_a_first_block_whose_halves_run_side_by_side() -> None:
    """Each alone leaves the other to be folded into, and a set of both leaves nothing."""
    dense, steps = dissect(tiny_model("gpt_neox")), parse_recoveries("refit", {})
    units = {kind: dense.of_kind(*kind) for kind in (("attn",), ("mlp",), ("attn", "mlp"))}
    assert [keep_repairable(dense, each, steps, "") for each in units.values()] == ["", "", "first:1"]
