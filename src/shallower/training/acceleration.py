"""What makes a training step take less time: another implementation of attention, and compiled blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from shallower import progress
from shallower.anatomy.dissect import find_blocks
from shallower.errors import UserError

RECOMPILATIONS = 64  # blocks differ in what they lack and in what is trained; torch's 8 would leave some uncompiled


@contextmanager
def attending(student: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Inside the `with`, the student computes attention by this implementation of transformers; by its own one if it is
    empty.

    Raises UserError where there is none of that name for this model.
    """
    before = student.config._attn_implementation
    if implementation:
        try:
            student.set_attn_implementation(implementation)
        except (ValueError, ImportError) as error:
            raise UserError(f"{_cannot_attend(student, implementation, before)} ({error})") from error
        if student.config._attn_implementation != implementation:
            raise UserError(_cannot_attend(student, implementation, before))
    try:
        yield
    finally:
        if implementation:
            student.set_attn_implementation(before)


def _cannot_attend(student: PreTrainedModel, implementation: str, own: str | None) -> str:
    return (
        f"attention={implementation} is nothing that {type(student).__name__} can compute attention by here: give "
        f"eager or sdpa, or leave it out (the model's own is {own})."
    )


@contextmanager
def compiled(student: PreTrainedModel, first: int, once: Callable[[], None]) -> Iterator[None]:
    """Inside the `with`, what a student's blocks compute with gradients is compiled, but for those before `first`.

    once: a forward and backward pass, in which the compiling takes place. Without gradients the blocks compute as
    before: to measure a few windows of another length, compiling again would take longer than it saves.

    Raises UserError where the compiler fails.
    """
    blocks = list(find_blocks(student)[1])[first:]
    before = [block.__dict__.get("forward") for block in blocks]
    try:
        with torch._dynamo.config.patch(recompile_limit=RECOMPILATIONS):
            for block in blocks:
                block.forward = _with_gradients(torch.compile(block.forward), block.forward)
            with progress.task("compiling blocks"):
                _compile(once)
            yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            _put_back(block, own)


def _with_gradients(fast: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return (fast if torch.is_grad_enabled() else plain)(*args, **kwargs)

    return forward


def _compile(once: Callable[[], None]) -> None:
    try:
        once()
    except torch._dynamo.exc.TorchDynamoException as error:
        first_line = str(error).strip().partition("\n")[0]
        raise UserError(
            f"compile=true: torch.compile cannot translate the blocks of this model here ({first_line}): leave it out. "
            "On a processor it needs a C++ compiler."
        ) from error


def _put_back(block: nn.Module, forward: Callable[..., Any] | None) -> None:
    """A block's forward as it was: its class's, or one that somebody had put over it."""
    if forward is None:
        del block.forward
    else:
        block.forward = forward
