"""A low-rank affine map at each cut, by reduced-rank regression."""

from __future__ import annotations

from typing import Annotated

import torch

from shallower.engine.twins import Aim
from shallower.recovery import Repair, hidden_size
from shallower.registry import Above, AtLeast, recovery


@recovery("low-rank", source="arXiv:2407.16286", maps=True, inputs=hidden_size, plain={"aim": "cut"})
def low_rank(
    repair: Repair,
    *,
    rank: Annotated[int, AtLeast(0)] = 128,
    energy: Annotated[float, Above(0, 1)] = 1.0,
    ridge: Annotated[float, AtLeast(0)] = 0.001,
    aim: Aim = "dense",
    sinks: Annotated[float, AtLeast(0)] = 0.0,
    relative: bool = True,
) -> None:
    """At each cut x becomes x + (x − mean) A B + b, in closed form; saved packaged, as stock checkpoints have no place.

    x is the stream of the cut and so far repaired model; what is added is regressed on it.
    rank: of A B; 0 is no limit. energy: stop below that rank when the map explains this share of what the full-rank map
    explains. ridge: penalty, in units of x's mean variance. aim: bring the stream to where the dense model has it
    behind the missing units, or to where these take the cut model's stream. sinks, relative: as for emulated-update.
    """
    twins, hidden = repair.twins(), hidden_size(repair)
    for station in repair.cuts:
        moments = repair.moments(hidden, least="a map of the stream")
        for reading, weights in repair.samples(
            twins, station, None, sinks=sinks, relative=relative, aim=aim, label=f"map for {station.missing[0]}"
        ):
            moments.add(reading.stream, reading.target - reading.stream, weights)
        full = moments.ridge(ridge)
        # With the penalty λ the best of a rank keeps the first eigenvectors of fullᵀ (xx + λ) full, which is fullᵀ xy.
        values, vectors = torch.linalg.eigh(full.T @ moments.xy)  # increasing
        values, vectors = values.flip(0), vectors.flip(1)
        kept = hidden if rank == 0 else min(rank, hidden)
        if energy < 1:
            outputs = full @ vectors
            explained = (2 * values - (outputs * (moments.xx @ outputs)).sum(0)).clamp_min(0)
            reached = explained.cumsum(0) >= energy * explained.sum()
            kept = min(kept, int(reached.float().argmax()) + 1)
        up = vectors[:, :kept].T
        down = full @ up.T
        share = f"{100 * moments.explained(down @ up):.1f} %"
        repair.notes.append(f"behind {station.missing[0]}: rank {kept} explains {share} of what varies.")
        repair.add_patch(station, down, up, moments.x_mean, moments.y_mean)
