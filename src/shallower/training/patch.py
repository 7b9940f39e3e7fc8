"""Small trained modules where units were cut out: x ↦ x + x A B + b on the residual stream."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shallower.anatomy.dissect import Anatomy, dissect
from shallower.anatomy.patch import Patch
from shallower.anatomy.writers import find_writers
from shallower.corpus.calibration import Batch
from shallower.engine.trace import trace
from shallower.errors import ModelError
from shallower.surgery.pairing import Layer, re_pair
from shallower.surgery.patch import attach as put
from shallower.training.feed import Portion
from shallower.training.head_loss import Guide
from shallower.units import Unit


@dataclass(frozen=True)
class Gap:
    """A place of the student where units are missing.

    block: number of the student's block at whose beginning it is; exit: at its end instead. before, after: points of
    the dense model's stream between which the missing units stand: 2·l enters block l, 2·l + 1 follows its attention.
    """

    block: int
    exit: bool
    before: int
    after: int


def gaps(anatomy: Anatomy, removed: frozenset[Unit]) -> list[Gap]:
    """Where the student that `cut` makes lacks something, in order of depth.

    anatomy: of the dense model.

    Raises ModelError where sublayers of two blocks were joined to one, so that a gap lies inside of a block.
    """
    layers, _ = re_pair(anatomy, removed)
    found: list[Gap] = []
    reached = 0
    for place, layer in enumerate(layers):
        _require_plain(layer)
        begins = 2 * layer.home + (layer.attn is None)
        if begins > reached:
            found.append(Gap(place, False, reached, begins))
        reached = 2 * layer.home + 2 - (layer.mlp is None)
    if reached < 2 * len(anatomy.blocks):
        found.append(Gap(len(layers) - 1, True, reached, 2 * len(anatomy.blocks)))
    return found


def attach(student: PreTrainedModel, places: list[Gap], rank: int, seed: int) -> nn.ModuleList:
    """Put a patch that starts as the identity at each gap of the student."""
    anatomy = dissect(student)
    halves = find_writers(anatomy)
    hidden = student.get_input_embeddings().weight.shape[1]
    generator = torch.Generator().manual_seed(seed)
    made = nn.ModuleList()
    for gap in places:
        drawn = torch.randn(hidden, rank, generator=generator) / hidden**0.5
        patch = Patch(drawn, torch.zeros(rank, hidden), torch.zeros(hidden), torch.zeros(hidden)).to(student.device)
        put(anatomy, gap.block, "exit" if gap.exit else "entry", patch, halves[gap.block])
        made.append(patch)
    return made


class UnitObjective(nn.Module):
    """Each patch by itself: how far it is from doing what the units did that it stands for, in the dense model.

    The error of a token is relative to the length of its update, so that the few tokens with huge activations do not
    decide everything.
    """

    def __init__(self, dense: Anatomy, places: list[Gap], patches: nn.ModuleList) -> None:
        super().__init__()
        self.patches = patches
        self._dense = dense
        self._places = places

    def forward(self, portion: Portion, guide: Guide | None) -> tuple[Tensor, Tensor, Tensor]:
        """Sums over scored tokens: the mean over patches of |error|² / |update|², the same again, and 0."""
        device = self._dense.model.device
        scored = portion.scored.to(device)
        losses = []
        for patch, (before, after) in zip(self.patches, self._streams(portion), strict=True):
            before, after = before[scored].float(), after[scored].float()
            error = (patch(before) - after).square().sum(-1)
            losses.append((error / (after - before).square().sum(-1).clamp_min(1e-12)).sum())
        total = torch.stack(losses).mean()
        return total, total.detach(), total.detach() * 0

    @torch.no_grad()
    def _streams(self, portion: Portion) -> list[tuple[Tensor, Tensor]]:
        """For each gap the dense model's stream before and after what is missing."""
        replay = trace(self._dense, Batch(portion.input_ids, portion.attention_mask))
        streams = [replay.entry]
        for block in self._dense.blocks:
            streams.append(replay.run(block.index, streams[-1]))

        def point(number: int) -> Tensor:
            index, half = divmod(number, 2)
            return replay.run(index, streams[index], ("mlp",)) if half else streams[index]

        return [(point(gap.before), point(gap.after)) for gap in self._places]


def _require_plain(layer: Layer) -> None:
    if layer.mlp is not None and layer.attn is not None and layer.mlp != layer.home:
        raise ModelError(
            f"the attention of block {layer.attn} was joined with the MLP of block {layer.mlp}, and what is missing "
            "between them cannot be patched here: use emulated-update or low-rank."
        )
