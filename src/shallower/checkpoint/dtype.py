"""On which device and in which number format a model runs, chosen by a measurement where that is not known."""

from __future__ import annotations

import functools
import hashlib
import platform
import time
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from shallower.checkpoint.cache import cache_root
from shallower.errors import OutputError, UnknownName, UserError
from shallower.files import write_text
from shallower.launched import agreed, local_rank, world_size

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WORTHWHILE = 1.3  # half precision has to be this many times faster than float32 to be worth its rounding


def dtype_name(dtype: torch.dtype) -> str:
    """What a number format is called in options and files, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def require_float64(device: str, instead: str = "use --device cpu") -> None:
    """Raise UserError for a device without float64, in which all is summed (Apple's GPUs). instead: what to do."""
    if device.partition(":")[0] == "mps":
        raise UserError(f"device {device!r} has no float64, in which losses and fits are summed: {instead}.")


def parse_device(name: str) -> torch.device:
    """`auto` (cuda, else cpu) or a torch device such as `cpu` or `cuda:1`. Of processes that were launched
    together, `auto` gives each its own cuda device.

    Raises UserError when this machine has no such device, or it has no float64, in which all is summed (Apple's GPUs).
    """
    require_float64(name)
    there = ["cpu"]
    if torch.cuda.is_available():
        there = ["cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count())), *there]
    if name == "auto":
        together = there[0] == "cuda" and world_size() > 1
        return torch.device(f"cuda:{local_rank()}" if together else there[0])
    if name.partition(":")[0] == "cuda" and "cuda" not in there:
        raise UserError(
            f"device {name!r} is not there: torch sees no CUDA (built for processors, or no driver): use --device cpu."
        )
    if name not in there:
        raise UnknownName("device", name, ("auto", *there))
    return torch.device(name)


def parse_dtype(name: str, device: torch.device) -> torch.dtype:
    """`float32`, `bfloat16`, `float16`, or `auto` for `choose_dtype(device)`.

    Raises UnknownName for anything else.
    """
    if name == "auto":
        return choose_dtype(device)
    if name not in DTYPES:
        raise UnknownName("dtype", name, ("auto", *DTYPES))
    return DTYPES[name]


def choose_dtype(device: torch.device) -> torch.dtype:
    """The format in which `device` multiplies matrices fastest; bfloat16 only where it is clearly faster than float32.

    CUDA: bfloat16 where the hardware has it, else float16. On a processor measured once, which takes half a second
    with the threads that this process has, and kept in the cache's folder `dtype` for its kind and this torch, so that
    what is resumed goes on in the same format: delete the folder to measure again. Of processes that were launched
    together all follow the first one. Never float16 there: several families overflow in it.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return _chosen(device)


@functools.cache
def _chosen(device: torch.device) -> torch.dtype:
    kept = _kept(device)
    half = agreed((kept or _measured(device)) == torch.bfloat16, device)  # two measurements may not come to the same
    chosen = torch.bfloat16 if half else torch.float32
    if kept is None:
        with suppress(OutputError):  # it only serves a later process
            write_text(_place(device), dtype_name(chosen))
    return chosen


def _kept(device: torch.device) -> torch.dtype | None:
    """What was chosen before; None where nothing is known of that."""
    with suppress(OSError, OutputError):
        return DTYPES.get(_place(device).read_text(encoding="utf-8", errors="replace"))
    return None


def _place(device: torch.device) -> Path:
    """Where the choice is kept for processors of this kind, which machines that share a cache may differ in."""
    told = {platform.machine(), platform.processor()}
    with suppress(OSError):  # not Linux
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        told |= {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    key = "\n".join([str(device), torch.__version__, *sorted(told)])
    return cache_root() / "dtype" / hashlib.sha256(key.encode()).hexdigest()[:16]


def _measured(device: torch.device) -> torch.dtype:
    # Without hardware support bfloat16 can be a hundred times slower: the small product finds that out cheaply.
    for size in (256, 1024):
        try:
            plain, half = _seconds(device, size)
        except (RuntimeError, TypeError):  # a device without bfloat16
            return torch.float32
        if half * _WORTHWHILE > plain and (size == 1024 or half > 3 * plain):
            return torch.float32
    return torch.bfloat16


def _seconds(device: torch.device, size: int) -> tuple[float, float]:
    """Seconds of the fastest of nine `size`-cubed products in float32 and in bfloat16, measured in turns: what other
    programs take for a moment must not decide what is kept.
    """
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    operands: dict[torch.dtype, Tensor] = {dtype: torch.ones(size, size, dtype=dtype, device=device) for dtype in best}
    with torch.inference_mode():
        for turn in range(10):
            for dtype, matrix in operands.items():
                start = time.perf_counter()
                linear(matrix, matrix)
                if turn:  # the first turn warms up
                    best[dtype] = min(best[dtype], time.perf_counter() - start)
    return best[torch.float32], best[torch.bfloat16]
