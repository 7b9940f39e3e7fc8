"""Small trained modules where units were cut out: x ↦ x + x A B + b on the residual stream."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shallower.anatomy.dissect import Anatomy, dissect
from shallower.anatomy.patch import Patch
from shallower.anatomy.writers import find_writers
from shallower.corpus.calibration import Batch
from shallower.engine.trace import Trace, trace
from shallower.engine.twins import Point, Station
from shallower.surgery.patch import attach_at
from shallower.training.feed import Portion
from shallower.training.head_loss import Guide


def attach_maps(student: PreTrainedModel, places: Sequence[Station], rank: int, seed: int) -> nn.ModuleList:
    """Put a patch that starts as the identity at each of these places. Raises ModelError where one cannot stand."""
    anatomy = dissect(student)
    halves = find_writers(anatomy)
    hidden = student.config.get_text_config().hidden_size  # embeddings may be narrower (OPT)
    generator = torch.Generator().manual_seed(seed)
    made = nn.ModuleList()
    for place in places:
        drawn = torch.randn(hidden, rank, generator=generator) / hidden**0.5
        patch = Patch(drawn, torch.zeros(rank, hidden), torch.zeros(hidden), torch.zeros(hidden)).to(student.device)
        attach_at(anatomy, place.here, patch, halves)
        made.append(patch)
    return made


class UnitObjective(nn.Module):
    """Each patch by itself: how far it is from doing what the units did that it stands for, in the dense model.

    The error of a token is relative to the length of its update, so that the few tokens with huge activations do not
    decide everything.
    """

    def __init__(self, dense: Anatomy, places: Sequence[Station], patches: nn.ModuleList) -> None:
        super().__init__()
        self.patches = patches
        self._dense = dense
        self._places = places

    def forward(self, portion: Portion, guide: Guide | None) -> tuple[Tensor, Tensor, Tensor]:
        """The mean over patches of |error|² / |update|²: of each sequence's mean as often as it has scored tokens; the
        same again, and 0. A sequence's first token counts, too: the models lean on it.
        """
        device = self._dense.model.device
        real = portion.attention_mask.bool().to(device)
        shares = portion.scored.sum(1).to(device) / real.sum(1)  # of a sequence's tokens, so that sequences add up
        weights = shares[:, None].expand(real.shape)[real]
        losses = []
        for patch, (before, after) in zip(self.patches, self._streams(portion), strict=True):
            before, after = before[real].float(), after[real].float()
            error = (patch(before) - after).square().sum(-1)
            losses.append((error / (after - before).square().sum(-1).clamp_min(1e-12) * weights).sum())
        total = torch.stack(losses).mean()
        return total, total.detach(), total.detach() * 0

    @torch.no_grad()
    def _streams(self, portion: Portion) -> list[tuple[Tensor, Tensor]]:
        """For each place the dense model's stream before and after what is missing."""
        replay = trace(self._dense, Batch(portion.input_ids, portion.attention_mask))
        streams = [replay.entry]
        for block in self._dense.blocks:
            streams.append(replay.run(block.index, streams[-1]))
        return [(_at(place.before, streams, replay), _at(place.after, streams, replay)) for place in self._places]


def _at(point: Point, streams: Sequence[Tensor], replay: Trace) -> Tensor:
    stream = streams[point.index]
    return replay.run(point.index, stream, point.without) if point.without else stream
