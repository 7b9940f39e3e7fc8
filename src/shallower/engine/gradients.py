"""One backward pass of the dense model past every metric that reads weights or gradients.

What the signature of a metric may ask for, and who pays for it:

    weights       parameters of one unit, float32; no pass at all if nothing else is asked for
    gradients     of the mean next-token loss of the calibration text with respect to these, float32
    fisher        mean over sequences, by their tokens, of the squared gradient of a sequence's mean loss, float32; None
                  unless the metric's option `order` is 2, as it takes a pass for every single sequence (of questions
                  each choice is one) and as much memory again
    gate          derivative of the loss with respect to a factor 1 on what the unit adds to the stream, float64

Gates need no gradients of weights: the derivative is the scalar product of the stream's gradient after a unit and the
unit's update, so it comes for all units, and each sequence apart, from what flows back through the stream anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from shallower import progress
from shallower.anatomy.dissect import Anatomy
from shallower.corpus.calibration import Batch, CalibrationSet
from shallower.engine.crossing import Crossing, crossings, find_midpoints
from shallower.engine.trace import prove
from shallower.engine.workers import place_for
from shallower.errors import ModelError
from shallower.registry import Method
from shallower.scores import Score
from shallower.units import Unit

BACKWARD = frozenset({"gradients", "fisher", "gate"})
WEIGHTS = frozenset({"weights"}) | BACKWARD
READABLE = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
TOKENS_A_BATCH = {"cpu": 512}
TOKENS_A_BATCH_ELSEWHERE = 2048
SUMS = 0.75  # of the free memory at most; the rest is for what a batch leaves on its way through the model


@dataclass(frozen=True)
class WeightStatistic:
    """A metric of weights or gradients with its options."""

    metric: Method
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def asked(self) -> frozenset[str]:
        """What has to be worked out for the metric."""
        second = self.metric.option("order", self.options) == 2
        return frozenset(self.metric.parameters) - (frozenset() if second else {"fisher"})


def reads_weights(metric: Method) -> bool:
    """Whether a metric reads weights or gradients."""
    return not WEIGHTS.isdisjoint(metric.parameters)


def needs_backward(metric: Method) -> bool:
    """Whether a metric needs text and a backward pass."""
    return not BACKWARD.isdisjoint(metric.parameters)


def weight_scores(
    anatomy: Anatomy, calibration: CalibrationSet | None, statistics: Sequence[WeightStatistic], units: Sequence[Unit]
) -> list[tuple[Score, ...]]:
    """Scores of `units` by each statistic, from at most one forward and backward pass over the text.

    calibration: None where no statistic needs a backward pass. Gradients are taken of the model as it computes, in its
    own number format; sums over batches are float32.

    Raises ModelError when the model's blocks do not pass one residual stream on, or no gradient flows through it.
    """
    units = sorted(units, key=lambda unit: (unit.index, unit.kind))
    asked = frozenset().union(*(statistic.asked for statistic in statistics))
    flow = None
    if asked & BACKWARD:
        assert calibration is not None
        flow = _backward(anatomy, calibration, asked, units)
    return [_scores(anatomy, statistic, units, flow) for statistic in statistics]


@dataclass(eq=False)
class _Flow:
    """What flowed back. gates: the derivative of the summed loss of each sequence, float64 [sequences, units].

    counts: tokens with a next token in each sequence. gradients, fisher: float32, by parameter, where there is room.
    """

    gates: Tensor
    counts: NDArray[np.int64]
    gradients: dict[Tensor, Tensor] = field(default_factory=dict)
    fisher: dict[Tensor, Tensor] = field(default_factory=dict)

    def add(self, parameter: Tensor, gradient: Tensor, share: float) -> None:
        """Add a batch's gradient of a parameter. share: the batch's part of the text."""
        if parameter in self.gradients:
            total = self.gradients[parameter]
            total.add_(gradient.to(total.device), alpha=share)
        if parameter in self.fisher:
            total = self.fisher[parameter]
            total.add_(gradient.to(total.device).float().square_(), alpha=share)


def _scores(
    anatomy: Anatomy, statistic: WeightStatistic, units: Sequence[Unit], flow: _Flow | None
) -> tuple[Score, ...]:
    names, function = statistic.metric.parameters, partial(statistic.metric.function, **statistic.options)
    if "gate" in names:
        assert flow is not None
        return _gate_scores(function, flow, units)
    rows = []
    for unit in units:
        parameters = _parameters(anatomy, unit)
        supply: dict[str, Any] = {"weights": [parameter.detach().float() for parameter in parameters], "fisher": None}
        if flow is not None:  # with what others asked for, perhaps
            for name, kept in (("gradients", flow.gradients), ("fisher", flow.fisher)):
                if name in statistic.asked:
                    supply[name] = [kept[parameter].to(parameter.device) for parameter in parameters]
        rows.append(Score(unit, float(function(**{name: supply[name] for name in names}))))
    return tuple(rows)


def _gate_scores(function: Any, flow: _Flow, units: Sequence[Unit]) -> tuple[Score, ...]:
    """The metric of the mean derivative, with the jackknife's standard error over sequences."""
    counts = torch.as_tensor(flow.counts, device=flow.gates.device)[:, None]
    total, tokens = flow.gates.sum(0), counts.sum()
    values = function(total / tokens)
    if len(counts) < 2:
        return tuple(Score(unit, float(value)) for unit, value in zip(units, values, strict=True))
    without = function((total - flow.gates) / (tokens - counts).clamp_min(1))
    errors = ((without - without.mean(0)).square().mean(0) * (len(counts) - 1)).sqrt()
    return tuple(
        Score(unit, float(value), float(error)) for unit, value, error in zip(units, values, errors, strict=True)
    )


def _parameters(anatomy: Anatomy, unit: Unit) -> list[nn.Parameter]:
    """A unit's own parameters, each once. Raises ModelError where they are quantised: what is stored is no weight."""
    modules = anatomy.blocks[unit.index].modules_of(unit.kind)
    parameters = list(dict.fromkeys(parameter for module in modules for parameter in module.parameters()))
    for parameter in parameters:
        if parameter.dtype not in READABLE:
            raise ModelError(
                f"weights of type {parameter.dtype} ({unit}) are quantised, so neither they nor their gradients can "
                "be read: take a metric of the stream, or load the model without quantisation."
            )
    return parameters


def _backward(anatomy: Anatomy, calibration: CalibrationSet, asked: Collection[str], units: Sequence[Unit]) -> _Flow:
    calibration.require_next()
    _require_gradients(anatomy)
    device = anatomy.model.device
    tokens = TOKENS_A_BATCH.get(device.type, TOKENS_A_BATCH_ELSEWHERE)
    if "fisher" in asked:
        batches = list(CalibrationSet.batches(calibration, 1))  # one sequence each, where a ChoiceSet gives questions
    else:
        batches = list(calibration.batches(max(1, tokens // calibration.length)))
    prove(anatomy, batches[0])
    sublayers = "gate" in asked and any(unit.kind != "block" for unit in units)
    midpoints = find_midpoints(anatomy) if sublayers else {}
    parameters: list[nn.Parameter] = []
    if {"gradients", "fisher"} & set(asked):
        parameters = list(dict.fromkeys(parameter for unit in units for parameter in _parameters(anatomy, unit)))
    counts = np.concatenate([batch.with_next.sum(1).numpy() for batch in batches]).astype(np.int64)
    total = int(counts.sum())
    flow = _Flow(torch.zeros(len(counts), len(units), dtype=torch.float64, device=device), counts)
    wanted = [kept for kept, name in ((flow.gradients, "gradients"), (flow.fisher, "fisher")) if name in asked]
    for parameter, place in _places(parameters, len(wanted)).items():
        for kept in wanted:
            kept[parameter] = torch.zeros_like(parameter, dtype=torch.float32, device=place)
    first = 0
    with (
        progress.task("reading gradients", len(batches)) as step,
        torch.enable_grad(),
        _needing_gradients(anatomy, parameters) as entry,
    ):
        for batch in batches:
            share = int(batch.with_next.sum())  # the mean over the batch flows back: a sum could overflow float16
            gates = flow.gates[first : first + len(batch.input_ids)]

            def watch(crossing: Crossing, *, gates: Tensor = gates, share: int = share) -> None:
                _watch_gates(crossing, units, gates, share)

            visit = watch if "gate" in asked else lambda crossing: None
            with crossings(anatomy, midpoints, visit, gates=True):
                loss = _mean_loss(anatomy, batch)
            if share:  # else no document of the batch has two tokens
                with _taking(parameters, partial(flow.add, share=share / total)):
                    loss.backward(inputs=[entry[-1], *parameters])  # type: ignore[no-untyped-call]
            entry.clear()
            first += len(batch.input_ids)
            step()
    return flow


def _places(parameters: Sequence[nn.Parameter], sums: int) -> dict[nn.Parameter, torch.device]:
    """Where so many float32 sums of a parameter's gradients are kept: beside it, or on the processor where they would
    take more than `SUMS` of what is free on its device.
    """
    needed: dict[torch.device, int] = {}
    for parameter in parameters:
        needed[parameter.device] = needed.get(parameter.device, 0) + 4 * sums * parameter.numel()
    places = {device: place_for(int(size / SUMS), device) for device, size in needed.items()}
    return {parameter: places[parameter.device] for parameter in parameters}


@contextmanager
def _taking(parameters: Sequence[nn.Parameter], take: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
    """Inside the `with`, what flows back to a parameter is given to `take` and let go at once: all gradients together
    would be as large as the model.
    """

    def note(parameter: Tensor) -> None:
        assert parameter.grad is not None
        take(parameter, parameter.grad)
        parameter.grad = None

    before = [(parameter, parameter.grad) for parameter in parameters]
    handles = [parameter.register_post_accumulate_grad_hook(note) for parameter in parameters]  # type: ignore[no-untyped-call]
    try:
        for parameter in parameters:
            parameter.grad = None
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, gradient in before:
            parameter.grad = gradient


def _require_gradients(anatomy: Anatomy) -> None:
    """Raise ModelError where torch.inference_mode lets no gradient flow."""
    if torch.is_inference_mode_enabled():
        raise ModelError("no gradient flows inside torch.inference_mode(), and this metric reads gradients: leave it.")
    if any(parameter.is_inference() for parameter in anatomy.model.parameters()):
        raise ModelError(
            f"the weights of this {anatomy.family} model were made inside torch.inference_mode(), so no gradient flows "
            "through them, and this metric reads gradients: load the model outside of it."
        )


def _watch_gates(crossing: Crossing, units: Sequence[Unit], gates: Tensor, share: int) -> None:
    """Have the gradient of the stream after each unit of a block note the derivative of that unit's gate."""
    for unit, (before, after) in crossing.changes().items():
        if unit not in units:
            continue
        update = (after - before).detach()
        target = crossing.after
        if unit.kind == "attn" and crossing.given is not None:
            target = crossing.given
        elif unit.kind == "attn" and crossing.without_attention is not None:
            update = (crossing.after - crossing.without_attention).detach()
        column = gates[:, units.index(unit)]

        def note(gradient: Tensor, *, update: Tensor = update, column: Tensor = column) -> None:
            products = gradient.reshape(update.shape).float() * update.float()
            column.add_(products.sum((1, 2), dtype=torch.float64).to(column.device), alpha=share)

        target.register_hook(note)  # type: ignore[no-untyped-call]


def _mean_loss(anatomy: Anatomy, batch: Batch) -> Tensor:
    ids = batch.input_ids.to(anatomy.model.device)
    mask = torch.ones_like(ids) if batch.attention_mask is None else batch.attention_mask.to(ids.device)
    logits = anatomy.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    scored = batch.with_next.to(logits.device)
    targets = ids[:, 1:].to(logits.device)[scored]
    return nn.functional.cross_entropy(logits[:, :-1][scored].float(), targets)


@contextmanager
def _needing_gradients(anatomy: Anatomy, parameters: Sequence[nn.Parameter]) -> Iterator[list[Tensor]]:
    """Inside the `with`, gradients flow to the stream entering block 0, which is put in the list that is yielded, and
    to `parameters`, and to nothing else.
    """
    entry: list[Tensor] = []

    def enter(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        entry.append((args[0] if args else kwargs["hidden_states"]).detach().requires_grad_())
        return ((entry[-1], *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": entry[-1]})

    flags = {parameter: parameter.requires_grad for parameter in anatomy.model.parameters()}
    handle = anatomy.blocks[0].module.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        for parameter in flags:
            parameter.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield entry
    finally:
        handle.remove()
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
