"""One pass of the dense model past every metric that compares the residual stream before and after a unit or span.

The model's own forward runs once a batch, up to its head. Hooks see the stream enter each block; sublayers are seen at
the block's midpoint, found by a probe. All metrics, all units and all spans of one run share that pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from shallower import progress
from shallower.anatomy.dissect import Anatomy, Block, probe_ids, unpack
from shallower.corpus.calibration import Batch, CalibrationSet
from shallower.engine.head import forward_to_head
from shallower.engine.trace import prove, trace
from shallower.registry import Method
from shallower.scores import Score
from shallower.units import Span, Unit

Positions = Literal["all", "last"]
TOKENS_A_BATCH = 2048


@dataclass(frozen=True)
class StreamStatistic:
    """A stream metric with what to apply it to.

    positions: every real token, or only the last real one of each sequence. spans: every span of blocks, besides the
    units.
    """

    metric: Method
    options: Mapping[str, Any] = field(default_factory=dict)
    positions: Positions = "all"
    spans: bool = False


class _Sums:
    """Running sums over tokens for each sequence, so that a mean and its standard error exist in the end."""

    def __init__(self, sequences: int) -> None:
        self.sequences = sequences
        self.totals: dict[Unit | Span, NDArray[np.float64]] = {}

    def add(self, of: Unit | Span, first: int, values: NDArray[np.float64]) -> None:
        row = self.totals.setdefault(of, np.zeros(self.sequences))
        row[first : first + len(values)] += values

    def scores(self, counts: NDArray[np.int64]) -> tuple[Score, ...]:
        return tuple(Score(of, *mean_and_error(row, counts)) for of, row in sorted(self.totals.items(), key=_depth))


def mean_and_error(totals: NDArray[np.float64], counts: NDArray[np.int64]) -> tuple[float, float | None]:
    """Mean over tokens and its standard error over sequences, from sums and counts of each sequence.

    The error is None for a single sequence.
    """
    tokens = counts.sum()
    mean = totals.sum() / tokens
    sequences = len(counts)
    if sequences < 2:
        return float(mean), None
    variance = ((totals - mean * counts) ** 2).sum() * sequences / (sequences - 1)
    return float(mean), float(np.sqrt(variance) / tokens)


def _depth(item: tuple[Unit | Span, object]) -> tuple[int, int, str]:
    of = item[0]
    return (of.start, len(of), "") if isinstance(of, Span) else (-1, of.index, of.kind)


def stream_scores(
    anatomy: Anatomy, calibration: CalibrationSet, statistics: Sequence[StreamStatistic], units: Sequence[Unit]
) -> list[tuple[Score, ...]]:
    """Scores of `units` (and of all spans where asked) by each statistic, from one forward pass without the head.

    Raises ModelError when the model's blocks do not pass one residual stream on.
    """
    batches = list(calibration.batches(max(1, TOKENS_A_BATCH // calibration.length)))
    prove(anatomy, batches[0])
    wanted = set(units)
    middles = _midpoints(anatomy) if any(unit.kind != "block" for unit in units) else {}
    sums = [_Sums(calibration.sequences) for _ in statistics]
    counts: dict[Positions, list[NDArray[np.int64]]] = {"all": [], "last": []}
    first = 0
    with progress.task("reading the residual stream", len(batches)) as step, torch.no_grad():
        for batch in batches:
            view = _View(batch, anatomy.model.device)
            counts["all"].append(view.counts)
            counts["last"].append(np.ones_like(view.counts))
            states = _States(statistics, view)

            def compare(unit: Unit, before: Tensor, after: Tensor, *, view: _View = view, first: int = first) -> None:
                if unit not in wanted:
                    return
                for statistic, total in zip(statistics, sums, strict=True):
                    total.add(unit, first, view.apply(statistic, before, after))

            _pass(anatomy, batch, middles, compare, states)
            for statistic, total in zip(statistics, sums, strict=True):
                if statistic.spans:
                    for span, values in states.spans(statistic):
                        total.add(span, first, values)
            first += len(view.counts)
            step()
    joined = {positions: np.concatenate(parts) for positions, parts in counts.items()}
    return [total.scores(joined[statistic.positions]) for statistic, total in zip(statistics, sums, strict=True)]


class _View:
    """Which positions of a batch are real, and which is the last of each sequence."""

    def __init__(self, batch: Batch, device: torch.device) -> None:
        mask = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
        self.real = mask.bool().to(device)
        self.counts: NDArray[np.int64] = mask.sum(1).cpu().numpy().astype(np.int64)
        self.sequence = torch.arange(len(mask), device=device)[:, None].expand_as(mask)[self.real]
        positions = torch.arange(mask.shape[1], device=device).expand_as(self.real)
        self.last = torch.where(self.real, positions, -1).amax(1)

    def select(self, positions: Positions, hidden: Tensor) -> Tensor:
        """float32 [tokens, hidden]."""
        if positions == "last":
            return hidden[torch.arange(len(hidden), device=hidden.device), self.last].float()
        return hidden[self.real].float()

    def by_sequence(self, positions: Positions, values: Tensor) -> NDArray[np.float64]:
        """Sum of [tokens] values over each sequence, float64."""
        if positions == "last":
            return values.double().cpu().numpy()
        sums = torch.zeros(len(self.counts), dtype=torch.float64, device=values.device)
        return sums.index_add_(0, self.sequence, values.double()).cpu().numpy()

    def apply(self, statistic: StreamStatistic, before: Tensor, after: Tensor) -> NDArray[np.float64]:
        values = statistic.metric.function(
            self.select(statistic.positions, before), self.select(statistic.positions, after), **statistic.options
        )
        return self.by_sequence(statistic.positions, values)


class _States:
    """The stream at every depth of one batch, kept for the positions that span statistics read."""

    def __init__(self, statistics: Sequence[StreamStatistic], view: _View) -> None:
        self.view = view
        self.kept: dict[Positions, list[Tensor]] = {item.positions: [] for item in statistics if item.spans}

    def add(self, hidden: Tensor) -> None:
        for positions, kept in self.kept.items():
            kept.append(self.view.select(positions, hidden))

    def spans(self, statistic: StreamStatistic) -> list[tuple[Span, NDArray[np.float64]]]:
        kept = self.kept[statistic.positions]
        found = []
        for start in range(len(kept) - 1):
            for stop in range(start + 1, len(kept)):
                values = statistic.metric.function(kept[start], kept[stop], **statistic.options)
                found.append((Span(start, stop), self.view.by_sequence(statistic.positions, values)))
        return found


def _pass(anatomy: Anatomy, batch: Batch, middles: Mapping[int, str | None], compare: Any, states: _States) -> None:
    """Run the dense model once; call `compare(unit, before, after)` at every unit and `states.add` at every depth."""
    entering: dict[int, Tensor] = {}
    middle: dict[int, Tensor] = {}

    def enter(block: Block, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        entering[block.index] = hidden
        states.add(hidden)
        if block.index in middles and middles[block.index] is None and block.attn is not None and block.mlp is not None:
            with block.without("mlp"):
                middle[block.index] = unpack(type(module).forward(module, *args, **kwargs))

    def pause(index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        middle[index] = args[0] if args else next(iter(kwargs.values()))

    def leave(block: Block, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        before, after = entering.pop(block.index), unpack(output)
        compare(Unit(block.index, "block"), before, after)
        if block.index in middles:
            half = middle.pop(block.index, None)
            if half is None:  # a block of one sublayer: the sublayer is the block
                compare(Unit(block.index, "attn" if block.attn is not None else "mlp"), before, after)
            else:
                compare(Unit(block.index, "attn"), before, half)
                if middles[block.index] is None:  # parallel: the MLP reads the same stream as the attention
                    compare(Unit(block.index, "mlp"), before, before + (after - half))
                else:
                    compare(Unit(block.index, "mlp"), half, after)
        if block.index == len(anatomy.blocks) - 1:
            states.add(after)

    handles = []
    for block in anatomy.blocks:
        handles.append(block.module.register_forward_pre_hook(partial(enter, block), with_kwargs=True))
        handles.append(block.module.register_forward_hook(partial(leave, block)))
        name = middles.get(block.index)
        if name is not None:
            child = block.module.get_submodule(name)
            handles.append(child.register_forward_pre_hook(partial(pause, block.index), with_kwargs=True))
    ids = batch.input_ids.to(anatomy.model.device)
    mask = torch.ones_like(ids) if batch.attention_mask is None else batch.attention_mask.to(ids.device)
    try:
        forward_to_head(anatomy, lambda: anatomy.model(input_ids=ids, attention_mask=mask, use_cache=False))
    finally:
        for handle in handles:
            handle.remove()


def _midpoints(anatomy: Anatomy) -> dict[int, str | None]:
    """For each block the child that is given the stream between attention and MLP; None where there is no such point.

    A child qualifies when its input equals what the block returns without its MLP, on a few tokens.
    """
    with torch.no_grad():
        replay = trace(anatomy, Batch(probe_ids(anatomy.model), None))
        hidden = replay.entry
        found: dict[int, str | None] = {}
        for block in anatomy.blocks:
            seen: dict[str, Tensor] = {}
            handles = [
                child.register_forward_pre_hook(partial(_note, seen, name), with_kwargs=True)
                for name, child in block.module.named_children()
            ]
            try:
                after = replay.run(block.index, hidden)
            finally:
                for handle in handles:
                    handle.remove()
            found[block.index] = None
            if block.attn is not None and block.mlp is not None:
                half = replay.run(block.index, hidden, ("mlp",))
                for name, given in seen.items():
                    if given.shape == half.shape and torch.allclose(given, half, rtol=1e-4, atol=1e-5):
                        found[block.index] = name
                        break
            hidden = after
    return found


def _note(seen: dict[str, Tensor], name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if tensors:
        seen.setdefault(name, tensors[0])
