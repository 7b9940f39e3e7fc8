"""What training on text minimises."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shallower.anatomy.dissect import Anatomy, find_blocks
from shallower.engine.head import Head
from shallower.surgery.plain import equal
from shallower.training.feed import Portion
from shallower.training.head_loss import Guide, head_losses
from shallower.training.teacher import half, head_input


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
        shared: int = 0,
    ) -> None:
        """head: the dense model's (`find_head`); the student's output embedding takes the place of its own. shared: the
        first blocks that are not run, as the guide has their result.
        """
        super().__init__()
        self.student = student
        self.head = None if head is None else dataclasses.replace(head, output=nn.Identity())
        self.compute = compute
        self.distill, self.temperature, self.hidden = distill, temperature, hidden
        self._blocks = list(find_blocks(student)[1])[:shared]

    def forward(self, portion: Portion, guide: Guide | None) -> tuple[Tensor, Tensor, Tensor]:
        """Sums over the portion's scored tokens: the loss, and of it the next-token loss and the divergence."""
        device = next(self.student.parameters()).device
        with self._begun(guide), torch.autocast(device.type, self.compute, enabled=half(self.compute)):
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

    @contextmanager
    def _begun(self, guide: Guide | None) -> Iterator[None]:
        """Inside the `with`, the shared blocks do not compute; what leaves the last of them is the guide's stream."""
        stream = None if guide is None else guide.stream
        blocks = [] if stream is None else self._blocks
        for block in blocks:
            block.forward = lambda *args, **kwargs: stream
        try:
            yield
        finally:
            for block in blocks:
                del block.forward


def shared_blocks(student: PreTrainedModel, anatomy: Anatomy) -> int:
    """How many first blocks give the same in the student and in the dense model, whatever is trained.

    That is so as long as their parameters are the dense model's own, or equal to them, and take no gradients, and so
    do the embeddings; and as long as nothing is dropped out at random, as it is in a student that trains.
    """
    path, blocks = find_blocks(student)
    dense = dict(anatomy.model.named_parameters(remove_duplicate=False))

    def same(name: str, parameter: nn.Parameter) -> bool:
        other = dense.get(name)
        return other is not None and not parameter.requires_grad and equal(parameter, other)

    for name, parameter in student.named_parameters(remove_duplicate=False):
        if name.startswith(f"{path}."):
            break
        if not same(name, parameter):
            return 0
    inside = set(blocks.modules())
    if any(_drops(module) for module in student.modules() if module not in inside):
        return 0
    count = 0
    for index, (block, other) in enumerate(zip(blocks, anatomy.blocks, strict=False)):
        names = [name for name, _ in block.named_parameters()]
        if names != [name for name, _ in other.module.named_parameters()] or other.arity is not None:
            break
        if not all(same(f"{path}.{index}.{name}", parameter) for name, parameter in block.named_parameters()):
            break
        if any(map(_drops, block.modules())):
            break
        count += 1
    return count


def _drops(module: nn.Module) -> bool:
    """Whether a module drops activations at random in training, or adds noise to them: torch's own does, or it holds
    the share to drop, or the noise of a router.
    """
    if isinstance(module, nn.Dropout):
        return module.p > 0
    held = ((name, value) for name, value in vars(module).items() if isinstance(value, float))
    return any(value > 0 and ("drop" in name or "jitter" in name) for name, value in held)
