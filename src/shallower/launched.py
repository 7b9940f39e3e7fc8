"""Processes that `accelerate launch` or `torchrun` started together to train one model: which of them this is."""

from __future__ import annotations

import os


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


def wait() -> None:
    """Return when all processes have come here. Does nothing before they trained together."""
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
