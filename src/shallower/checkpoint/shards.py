"""The weight files of a checkpoint folder, checked before anything is loaded from them. Torch-free."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shallower.checkpoint.locate import CONVERT, PICKLES, read_config
from shallower.errors import ModelError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_FLOATING = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_LENGTH_BYTES = 8
_LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors format


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a checkpoint, in the order of their names.

    Every header is read and compared with the file's size, and the index with the headers; no tensor is read.

    Raises ModelError when there are none, when they are pickled, and for a file that is missing, truncated or damaged.
    """
    if (folder / SINGLE).is_file():
        tensor_names(folder / SINGLE)
        return (folder / SINGLE,)
    if not (folder / INDEX).is_file():
        raise ModelError(_no_weights(folder))
    placed = _read_index(folder / INDEX)
    files = tuple(folder / name for name in sorted(set(placed.values())))
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise ModelError(
            f"{folder} lacks {len(absent)} of its {len(files)} weight files ({', '.join(absent[:3])}"
            f"{', …' if len(absent) > 3 else ''}). Copy or download them again."
        )
    for file in files:
        missing = {name for name, home in placed.items() if home == file.name} - tensor_names(file)
        if missing:
            raise ModelError(
                f"{file} does not hold {min(missing)!r}, which {INDEX} places there: the files are of different "
                "checkpoints. Download them again."
            )
    return files


def stored_dtype(folder: Path) -> str | None:
    """The number format that most of a folder's floating weights are in, such as `bfloat16`, by the headers of its
    files: a config may name none, or another. Where they hold no such weights, what the config says; None if nothing.

    Raises ModelError as `weight_files` does.
    """
    numbers: Counter[str] = Counter()
    for file in weight_files(folder):
        for tensor in _header(file).values():
            if tensor.get("dtype") in _FLOATING:
                numbers[_FLOATING[tensor["dtype"]]] += math.prod(tensor.get("shape", ()))
    if numbers:
        return max(numbers, key=numbers.__getitem__)
    config = read_config(folder)
    found = config.get("dtype") or config.get("torch_dtype")
    return found if found in _FLOATING.values() else None


def rounded_formats(folder: Path, kept: Mapping[str, str]) -> tuple[str, ...]:
    """The number formats of floating weights in a folder, by the headers of its files, that a model holds in a format
    that rounds them. None of a quantized checkpoint, whose scales are no weights.

    kept: the format of each tensor of the model, by name. Blocks may have other numbers in the files.

    Raises ModelError as `weight_files` does.
    """
    if "quantization_config" in read_config(folder):
        return ()
    held = {_of_any_block(name): number_format for name, number_format in kept.items()}
    rounded = set()
    finer = {"float64": ("float64",)}  # what rounds nothing of a format; for the others float32, too
    for file in weight_files(folder):
        for name, tensor in _header(file).items():
            stored, now = _FLOATING.get(tensor.get("dtype", "")), held.get(_of_any_block(name))
            if stored is not None and now not in (None, stored, *finer.get(stored, ("float32", "float64"))):
                rounded.add(stored)
    return tuple(sorted(rounded))


def _of_any_block(name: str) -> str:
    return re.sub(r"\d+", "N", name)


def tensor_names(file: Path) -> frozenset[str]:
    """Names of the tensors in a safetensors file, from its header.

    Raises ModelError when the header does not parse or the file is shorter or longer than the header says.
    """
    return frozenset(_header(file))


def _header(file: Path) -> Mapping[str, Mapping[str, Any]]:
    """What the header of a safetensors file says of each tensor, compared with the file's size; raises ModelError."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(_LENGTH_BYTES)
            length = int.from_bytes(prefix, "little")
            raw = stream.read(length) if length <= _LONGEST_HEADER else b""
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}.") from None
    if prefix.startswith(b"version"):
        raise ModelError(f"{file} is a git-lfs pointer, not the weights. Fetch them with `git lfs pull`.")
    if len(prefix) < _LENGTH_BYTES or not 2 <= length <= _LONGEST_HEADER:
        raise ModelError(f"{file} is not a safetensors file ({size} bytes). Copy or download it again.")
    if len(raw) < length:
        raise ModelError(_truncated(file, size, _LENGTH_BYTES + length, " at least"))
    try:
        header = json.loads(raw)
        tensors: dict[str, dict[str, Any]] = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        raise ModelError(f"{file} has a damaged header. Copy or download it again.") from None
    expected = _LENGTH_BYTES + length + end
    if size < expected:
        raise ModelError(_truncated(file, size, expected, ""))
    if size > expected:
        raise ModelError(f"{file} has {size - expected} bytes too many. Copy or download it again.")
    return tensors


def _read_index(file: Path) -> dict[str, str]:
    try:
        data: Any = json.loads(file.read_text(encoding="utf-8"))
        placed = {str(tensor): str(home) for tensor, home in data["weight_map"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise ModelError(f"{file} is not an index of weight files. Copy or download it again.") from None
    if not placed:
        raise ModelError(f"{file} names no weight files. Copy or download it again.")
    return placed


def _no_weights(folder: Path) -> str:
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES and file.stem != "training_args")
    if pickled:
        return f"{folder} has only pickled weights ({pickled[0]}). {CONVERT}"
    named = f"no {SINGLE} and no {INDEX}"
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    if others:
        return f"{folder} has {others[0]}, but {named}: weight files are missing or renamed. Download them again."
    return f"{folder} holds no weights ({named}). Copy or download them."


def _truncated(file: Path, size: int, expected: int, bound: str) -> str:
    return f"{file} is truncated: {size} bytes of{bound} {expected}. Copy or download it again."
