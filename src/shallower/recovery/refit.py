"""Least squares for whole matrices: what writes to the stream is fitted to the dense model's stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from shallower.anatomy.writers import Writer
from shallower.engine.twins import Aim, Station
from shallower.recovery import Repair
from shallower.registry import AtLeast, recovery
from shallower.surgery.fold import can_have_bias, fold_constant


def _fitted(repair: Repair, reach: str, sublayers: str) -> Iterator[tuple[Station, Writer]]:
    """Each matrix that is fitted and the place behind it, in order of depth."""
    started = False
    for station in repair.stations:
        started = started or bool(station.missing)
        writer = repair.writer(station)
        follows = started and reach == "rest" and sublayers in ("both", writer.kind if writer else "both")
        if writer is not None and (station.missing or follows):
            yield station, writer


def _inputs(repair: Repair, options: Mapping[str, Any]) -> int:
    fitted = _fitted(repair, options["reach"], options["sublayers"])
    return max((writer.weight.shape[1] for _, writer in fitted), default=0)


def _unread(options: Mapping[str, Any]) -> dict[str, str]:
    return {"sublayers": "with reach=cuts"} if options["reach"] == "cuts" else {}


@recovery("refit", inputs=_inputs, folds={"reach": "cuts"}, plain={"aim": "cut"}, unread=_unread)
def refit(
    repair: Repair,
    *,
    ridge: Annotated[float, AtLeast(0)] = 0.01,
    reach: Literal["cuts", "rest"] = "cuts",
    sublayers: Literal["both", "attn", "mlp"] = "both",
    bias: bool = False,
    aim: Aim = "dense",
    sinks: Annotated[float, AtLeast(0)] = 0.0,
    relative: bool = True,
) -> None:
    """Fit the whole matrix in front of each cut to the dense model's stream behind it; no new parameters.

    Like linear-fold, but on what the matrix is fed with (the MLP's inner activations), which are more and say more than
    what it writes. One matrix after another, each on the stream that the ones before it left.
    ridge: penalty on the matrix's change, in units of the mean variance of what it is fed with. reach: only the matrix
    in front of each cut (`cuts`), or every `down_proj` and `o_proj` from the first cut to the end (`rest`). sublayers:
    which ones of the rest, besides those in front of a cut. bias: fit a bias, too, where the family has or can have
    one. aim, sinks, relative: as for low-rank.
    """
    if reach == "cuts" or not any(repair.writer(station) for station in repair.stations):
        repair.require_writers()
    twins = repair.twins()
    without = list[str]()
    for station, writer in _fitted(repair, reach, sublayers):
        has_bias = bias and can_have_bias(repair.student, writer)
        if bias and not has_bias:
            without.append(f"{writer.kind}.{writer.block.index}")
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
        change = moments.ridge(ridge, centred=has_bias)
        writer.replace(writer.weight.double() + change.T)
        if has_bias:
            fold_constant(repair.student, writer, (moments.y_mean - moments.x_mean @ change) * writer.factor)
    if without:
        repair.notes.append(f"{repair.dense.family} has no bias at {', '.join(without)}, which were fitted without.")
