"""Processes that `accelerate launch` or `torchrun` started together to train one model: which of them this is."""

from __future__ import annotations

import atexit
import os
import sys
from typing import TYPE_CHECKING

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
