"""Rescale the stream at each cut to the length that it has in the dense model, folded into weights."""

from __future__ import annotations

from typing import Annotated, Literal

import torch

from shallower.recovery import Repair
from shallower.registry import AtLeast, recovery
from shallower.surgery.fold import fold_map, fold_scale


@recovery(
    "magnitude",
    source="arXiv:2507.18212, arXiv:2505.24680",
    published=("Prune&Comp", "LinearPatch"),
    folds={"per": "channel"},
)
def magnitude(
    repair: Repair,
    *,
    per: Literal["stream", "channel"] = "stream",
    sinks: Annotated[float, AtLeast(0)] = 0.0,
    relative: bool = True,
) -> None:
    """Rescale at each cut, so that what comes in has the length that the dense model's stream has behind the cut.

    per: `stream` multiplies the whole stream by one factor, folded into the embedding and all that writes to the stream
    before the cut (a tied embedding is untied); `channel` gives every channel of what the last sublayer writes its own
    factor, by least squares, folded into its matrix: no new parameters. sinks, relative: as for emulated-update.
    """
    if per == "stream":
        repair.require_no_maps()  # they know the stream as long as it was
    else:
        repair.require_writers()
    twins = repair.twins()
    for station in repair.cuts:
        writer = repair.require_writer(station) if per == "channel" else None
        products = torch.zeros((), dtype=torch.float64)
        squares = torch.zeros((), dtype=torch.float64)
        for reading, weights in repair.samples(
            twins, station, writer, sinks=sinks, relative=relative, aim="dense", label=f"scale at {station.missing[0]}"
        ):
            if writer is None:
                ratios = reading.target.norm(dim=-1) / reading.stream.norm(dim=-1).clamp_min(1e-30)
                products = products + (ratios * weights).sum(dtype=torch.float64)
                squares = squares + weights.sum(dtype=torch.float64)
            else:
                assert reading.inputs is not None
                written = reading.inputs @ writer.weight.float().T
                written = (written if writer.bias is None else written + writer.bias.float()) * writer.factor
                lacking = reading.target - reading.stream
                products = products + (written * lacking * weights[:, None]).sum(0, dtype=torch.float64)
                squares = squares + (written.square() * weights[:, None]).sum(0, dtype=torch.float64)
        if writer is None:
            factor = float(products / squares)
            fold_scale(repair.student, station.here, factor, repair.halves)
            repair.notes.append(f"at {station.missing[0]} the stream is made {factor:.3f} times as long.")
            twins.forget()
        else:
            fold_map(writer, torch.diag(1 + products / squares.clamp_min(1e-30)))
