"""Least squares for whole matrices: what writes to the stream is fitted to the dense model's stream."""

from __future__ import annotations

from typing import Literal

from shallower.engine.statistics import Aim
from shallower.recovery import Repair
from shallower.registry import recovery
from shallower.surgery.fold import fold_constant


@recovery("refit")
def refit(
    repair: Repair,
    *,
    ridge: float = 0.01,
    spread: int = 0,
    reach: Literal["cuts", "rest"] = "rest",
    sublayers: Literal["both", "attn", "mlp"] = "both",
    bias: bool = False,
    aim: Aim = "dense",
    sinks: float = 4.0,
    relative: bool = True,
) -> None:
    """Fit `down_proj` and `o_proj` from the first cut on to the dense model's stream; no new parameters.

    Like linear-fold, but on what the matrix is fed with (the MLP's inner activations), which are more and say more than
    what it writes. One matrix after another, each on the stream that the ones before it left.
    ridge: penalty on the matrix's change, in units of the mean variance of what it is fed with. reach: only the matrix
    in front of each cut, or all from the first cut to the end. sublayers: which ones, besides those in front of a cut.
    spread: so many blocks more, in front of the block before a cut, take over a part of what is missing.
    bias: fit a bias, too, where the family has or can have one. aim, sinks, relative: as for low-rank.
    """
    if not any(repair.writer(station) for station in repair.stations):
        repair.require_writer(repair.cuts[0])
    twins = repair.twins()
    started = False
    for plain, station in zip(repair.stations, repair.spread(spread), strict=True):
        moved = bool(station.missing) or station.after != plain.after
        started = started or bool(station.missing)
        writer = repair.writer(station)
        follows = started and reach == "rest" and sublayers in ("both", writer.kind if writer else "both")
        if writer is None or not (moved or follows):
            continue
        moments = repair.moments(writer.weight.shape[1], least=f"{writer.path} of block {writer.block.index}")
        for reading, weights in repair.samples(
            twins,
            station,
            writer,
            sinks=sinks,
            relative=relative,
            aim=aim,
            label=f"refitting {writer.kind} of block {writer.block.index}",
        ):
            assert reading.inputs is not None
            moments.add(reading.inputs, (reading.target - reading.stream) / writer.factor, weights)
        change = moments.ridge(ridge, centred=bias)
        writer.replace(writer.weight.double() + change.T)
        if bias:
            fold_constant(repair.student, writer, (moments.y_mean - moments.x_mean @ change) * writer.factor)
