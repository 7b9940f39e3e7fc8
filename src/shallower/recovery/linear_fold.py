"""Least squares on what the last sublayer before a cut writes, folded into its matrix."""

from __future__ import annotations

from typing import Annotated

import torch

from shallower.engine.twins import Aim
from shallower.recovery import Repair, hidden_size
from shallower.registry import AtLeast, recovery
from shallower.surgery.fold import fold_map


@recovery(
    "linear-fold",
    source="arXiv:2505.02819",
    published=("ReplaceMe",),
    inputs=hidden_size,
    folds={},
    plain={"aim": "cut"},
)
def linear_fold(
    repair: Repair,
    *,
    ridge: Annotated[float, AtLeast(0)] = 0.001,
    aim: Aim = "dense",
    sinks: Annotated[float, AtLeast(0)] = 0.0,
    relative: bool = True,
) -> None:
    """A map on the last MLP's (or attention's) output before each cut, folded into its matrix; no new parameters.

    With m what that sublayer writes, T minimises |stream − m + T m − target|² (ReplaceMe); `down_proj` becomes
    T `down_proj`. ridge: penalty on T − 1, in units of m's mean square. aim, sinks, relative: as for low-rank.
    """
    repair.require_writers()
    twins = repair.twins()
    for station in repair.cuts:
        writer = repair.require_writer(station)
        matrix = writer.weight.float()
        moments = repair.moments(len(matrix), least="a map of what a sublayer writes")
        for reading, weights in repair.samples(
            twins, station, writer, sinks=sinks, relative=relative, aim=aim, label=f"map before {station.missing[0]}"
        ):
            assert reading.inputs is not None
            written = reading.inputs @ matrix.T
            if writer.bias is not None:
                written += writer.bias.float()
            moments.add(written * writer.factor, reading.target - reading.stream, weights)
        change = moments.ridge(ridge, centred=False)
        fold_map(writer, torch.eye(len(matrix), dtype=torch.float64, device=change.device) + change.T)
