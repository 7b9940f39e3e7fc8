"""The most memory that a piece of work takes above what was held when it began.

On CUDA the allocator's own peak; of several devices the sum of their peaks, which need not be at the same time. On a
processor the peak of the process's resident memory, which Linux lets one reset (`/proc/self/clear_refs`); pages that
the C library kept from earlier work are given back first, or they would hide what the work takes. Elsewhere there is no
figure.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from torch import nn

_RESET = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_RESET_PEAK = "5"  # of all that clear_refs can do


def devices_of(model: nn.Module) -> list[torch.device]:
    """The devices that a model's weights are on, `meta` for those that wait in files or in the processor's memory."""
    return list(dict.fromkeys(parameter.device for parameter in model.parameters()))


def memory_source(devices: Collection[torch.device]) -> str | None:
    """What `peak_above` reads on these devices; None where it can read nothing, or not of all of them."""
    kinds = {device.type for device in devices}
    if kinds == {"cuda"}:
        return "torch's CUDA allocator"
    if kinds == {"cpu"} and os.access(_RESET, os.W_OK):
        return "resident memory of the process"
    return None


def peak_above(devices: Collection[torch.device], work: Callable[[], object]) -> int | None:
    """Do the work once; bytes that it held at its most, above what was held before. None where `memory_source` is."""
    if memory_source(devices) is None:
        work()
        return None
    if all(device.type == "cuda" for device in devices):
        before = 0
        for device in devices:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before += torch.cuda.memory_allocated(device)
        work()
        for device in devices:
            torch.cuda.synchronize(device)
        return sum(torch.cuda.max_memory_allocated(device) for device in devices) - before
    _give_back()
    _RESET.write_text(_RESET_PEAK)
    before = _resident("VmRSS")
    work()
    return max(0, _resident("VmHWM") - before)


def _resident(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def _give_back() -> None:
    """Return what the C library holds of freed memory to the system, where it can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
