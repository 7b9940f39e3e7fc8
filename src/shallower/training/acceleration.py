"""What makes a training step take less time or memory: another attention, compiled blocks, recomputed activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from shallower import progress
from shallower.anatomy.dissect import find_blocks
from shallower.checkpoint.stock import quiet
from shallower.errors import ModelError, UserError

RECOMPILATIONS = 64  # blocks differ in what they lack and in what is trained; torch's 8 would leave some uncompiled


def attend(student: PreTrainedModel, implementation: str | None) -> str | None:
    """Let the student compute attention by this implementation of transformers, or one that transformers takes in its
    place; empty for the one that it has. Returns the name of that.

    Raises UserError where the model cannot be trained with it here; it then has its own as before.
    """
    own: str | None = student.config._attn_implementation
    if not implementation or implementation == own:
        return own
    cannot = f"attention={implementation} is no way in which {type(student).__name__} can be trained here"
    instead = f"leave it out (the model's own is {own})."
    if implementation == "flex_attention" and student.device.type == "cpu":
        raise UserError(f"{cannot}, as it has no gradients on a processor: {instead}")
    try:
        with quiet():  # it warns of what is refused here
            student.set_attn_implementation(implementation)
    except (ValueError, ImportError) as error:
        raise UserError(f"{cannot}: {instead} ({error})") from error
    if student.config._attn_implementation == own:
        raise UserError(f"{cannot}: {instead}")
    return own


def recompute(student: PreTrainedModel, wanted: bool) -> None:
    """Let a student keep no activations inside of blocks for the way back, but compute them again; or no more."""
    # the newer name of two; transformers warns of the older one
    what = "activation" if hasattr(student, "activation_checkpointing_enable") else "gradient"
    if not wanted:
        getattr(student, f"{what}_checkpointing_disable")()
        return
    getattr(student, f"{what}_checkpointing_enable")({"use_reentrant": False})
    student.disable_input_require_grads()  # else blocks that are not trained would be gone through on the way back, too


@contextmanager
def compiled(student: PreTrainedModel, first: int) -> Iterator[None]:
    """Inside the `with`, what a student's blocks compute with gradients is compiled when it is first computed, but for
    those before `first`.

    Without gradients they compute as before: to measure a few windows of another length, compiling again would take
    longer than it saves.

    Raises ModelError where the compiler fails.
    """
    blocks = list(find_blocks(student)[1])[first:]
    before = [vars(block).get("forward") for block in blocks]
    progress.note("compile=true: the first step compiles the blocks, which takes half a minute or more")
    try:
        with torch._dynamo.config.patch(cache_size_limit=RECOMPILATIONS):
            for block in blocks:
                block.forward = _with_gradients(torch.compile(block.forward), block.forward)
            yield
    except torch._dynamo.exc.TorchDynamoException as error:
        why = " ".join(str(error).split("\n")[:2])  # who raised, and what
        raise ModelError(
            f"compile=true: torch.compile cannot translate the blocks of this model here ({why}): leave it out. "
            "On a processor it needs a C++ compiler."
        ) from error
    finally:
        for block, forward in zip(blocks, before, strict=True):
            vars(block).pop("forward", None)
            if forward is not None:  # somebody had put it over the class's
                block.forward = forward


def _with_gradients(fast: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return (fast if torch.is_grad_enabled() else plain)(*args, **kwargs)

    return forward
