"""What training minimises, as one module, so that data-parallel and sharding wrappers see one forward."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shallower.engine.head import Head
from shallower.training.feed import Portion
from shallower.training.head_loss import Guide, head_losses
from shallower.training.teacher import head_input


class TextObjective(nn.Module):
    """Next-token loss of a student, divergence from a teacher, and distance of their last hidden states."""

    def __init__(
        self,
        student: PreTrainedModel,
        head: Head | None,
        compute: torch.dtype,
        *,
        distill: float = 0.0,
        temperature: float = 1.0,
        hidden: float = 0.0,
    ) -> None:
        """head: the dense model's (`find_head`); the student's output embedding takes the place of its own."""
        super().__init__()
        self.student = student
        self._no_split_modules = student._no_split_modules  # where FSDP cuts
        self.head = None if head is None else dataclasses.replace(head, output=nn.Identity())
        self.compute = compute
        self.distill, self.temperature, self.hidden = distill, temperature, hidden

    def forward(self, portion: Portion, guide: Guide | None) -> tuple[Tensor, Tensor, Tensor]:
        """Sums over the portion's scored tokens: the loss, and of it the next-token loss and the divergence."""
        device = next(self.student.parameters()).device
        with torch.autocast(device.type, self.compute, enabled=self.compute != torch.float32):
            rows = head_input(self.student, self.head, portion)
        if self.head is not None:
            rows = rows.to(self.compute)
        targets = portion.input_ids[:, 1:][portion.scored[:, 1:]].to(device)
        output = nn.Identity() if self.head is None else self.student.get_output_embeddings()
        head = Head(output) if self.head is None else dataclasses.replace(self.head, output=output)
        losses = head_losses(rows, targets, head, guide, self.distill, self.temperature)
        total = losses.total
        if self.hidden:
            assert guide is not None
            assert guide.rows is not None
            away = 1 - torch.cosine_similarity(rows.float(), guide.rows.float(), dim=-1)
            total = total + self.hidden * away.sum()
        return total, losses.nll, losses.kl
