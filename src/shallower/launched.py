"""Processes that `accelerate launch` or `torchrun` started together to train one model: which of them this is."""

from __future__ import annotations

import atexit
import os
import secrets
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from shallower.errors import OutputError

if TYPE_CHECKING:
    import torch


def world_size() -> int:
    """How many were started together; 1 where this one was started alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def leads() -> bool:
    """Whether this is the process that writes, and speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def local_rank() -> int:
    """Number of this process among those on its machine, which is that of its device."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def spreads() -> int:
    """The version of FSDP by which they spread the weights of what they train (`--use_fsdp`); 0 where each of them
    holds all.
    """
    spread = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1")
    return int(os.environ.get("FSDP_VERSION", "1")) if spread else 0


def agreed(value: float, device: torch.device) -> float:
    """The first process's value, which all follow: all of them have to come here. device: that they compute on."""
    if world_size() == 1:
        return value
    import torch
    from accelerate import PartialState

    PartialState(cpu=device.type == "cpu")  # brings them together, where that is not done yet
    shared = torch.tensor(value, dtype=torch.float64, device=device)
    torch.distributed.broadcast(shared, 0)
    return float(shared)


def require_shared(folder: Path, device: torch.device) -> None:
    """Raise OutputError unless all processes see what the first one writes in `folder`, which is there: all of them
    have to come here. device: that they compute on.
    """
    if world_size() == 1:
        return
    import torch

    mark = folder / f".shared-{int(agreed(secrets.randbits(48), device)):012x}"  # of this very moment
    if leads():
        with suppress(OSError):  # then nobody sees it
            mark.touch()
    wait()
    seeing = torch.tensor(float(mark.exists()), device=device)
    torch.distributed.all_reduce(seeing)
    if leads():
        mark.unlink(missing_ok=True)
    if seeing < world_size():
        raise OutputError(
            f"only {int(seeing)} of {world_size()} processes see what the first one writes in {folder}, and all read "
            "there how far the training is: name a place on a disk that their machines share (--out, and "
            "SHALLOWER_CACHE for what is kept in the cache), or train on one machine."
        )


def wait() -> None:
    """Return when all processes have come here. Does nothing before they agreed on something, or trained together."""
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def _part() -> None:
    """Leave the others: threads of the group that are still there when Python ends abort the process now and then."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


if world_size() > 1:
    atexit.register(_part)
