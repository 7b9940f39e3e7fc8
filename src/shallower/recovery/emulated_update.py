"""Add, at each cut, what the missing units used to add on average."""

from __future__ import annotations

from typing import Annotated, Literal

import torch

from shallower.recovery import Repair
from shallower.registry import AtLeast, recovery
from shallower.surgery.plain import is_plain


@recovery("emulated-update", source="arXiv:2407.16286", maps="constant", plain={"measured": "cut"})
def emulated_update(
    repair: Repair,
    *,
    measured: Literal["dense", "cut"] = "dense",
    sinks: Annotated[float, AtLeast(0)] = 0.0,
    relative: bool = True,
) -> None:
    """Add the missing units' mean update at each cut, as a bias where the family has one.

    measured: in the dense model, or by running the missing units on the stream of the cut and so far repaired model.
    Of a model that was repaired before, `dense` adds what its stream still lacks of the dense model's.
    sinks: tokens whose stream is more than so many times as long as their sequence's median do not count (0: all do).
    relative: weight tokens by the inverse square of the stream's length.
    """
    twins, repaired = repair.twins(), not is_plain(repair.student.model, repair.dense, repair.removed)
    for station in repair.cuts:
        total = torch.zeros((), dtype=torch.float64)
        weight = 0.0
        label = f"mean update of {station.missing[0]}"
        for reading, weights in repair.samples(
            twins, station, None, sinks=sinks, relative=relative, aim=measured, start=not repaired, label=label
        ):
            # behind an earlier repair, a part of the update is in the stream already
            begun = reading.stream if repaired else reading.start
            assert begun is not None
            total = total + ((reading.target - begun) * weights[:, None]).sum(0, dtype=torch.float64)
            weight += float(weights.sum(dtype=torch.float64))
        repair.add_constant(station, total / weight)
