"""What a model is, told from its weights: the same for every name, place and storage format it is loaded from."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from shallower.checkpoint.shards import weight_files
from shallower.errors import ModelError

_SAMPLES = 64  # values read of each tensor
_WORDS = 1024  # of 8 bytes, in a row of those whose sums make the checksum


def fingerprint(model: PreTrainedModel, folder: Path | None = None) -> str:
    """`sha256:…` over the model type and, of each parameter, its name, shape and 64 evenly spaced values.

    The values are rounded to bfloat16 first, so a float32 checkpoint and its bfloat16 load agree. Tied parameters count
    once, under the name that sorts first. A sample, not a checksum: it tells models, fine-tunes and cuts apart, and
    does not notice a change of a few single weights.

    folder: the checkpoint that `model` was loaded from. What is in memory as float16, which rounds off what bfloat16
    would keep, is read there where it has the same name and shape, so that float16 agrees with the others, too.

    Raises ModelError when weights are not in memory (meta device).
    """
    digest = hashlib.sha256(f"{model.config.model_type}\n".encode())
    parameters = sorted(model.named_parameters(remove_duplicate=False), key=lambda item: item[0])
    names: dict[int, list[str]] = {}
    for name, parameter in parameters:
        names.setdefault(id(parameter), []).append(name)
    samples = []
    with contextlib.ExitStack() as stack:
        halved = any(parameter.dtype == torch.float16 for _, parameter in parameters)
        stored = _open(folder, stack) if folder is not None and halved else {}
        for name, parameter in parameters:
            if name != names[id(parameter)][0]:
                continue
            _require_in_memory(name, parameter)
            digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
            values = parameter.detach()
            known = [other for other in names[id(parameter)] if other in stored]
            if parameter.dtype == torch.float16 and known:
                values = _as_stored(stored[known[0]].get_tensor(known[0]), values)
            index = torch.tensor(_spread(values.numel()), dtype=torch.long, device=values.device)
            samples.append(values.reshape(-1)[index].to(torch.bfloat16))
    # One transfer for all of them, not one a tensor.
    together = torch.cat([sample.to(samples[0].device) for sample in samples]).cpu()
    digest.update(together.view(torch.int16).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def checksum(model: PreTrainedModel) -> str:
    """`sha256:…` over all bits of all parameters and buffers, with their names, number formats and shapes, and of the
    scales of quantized weights: for results that are kept, which one changed weight or another rounding makes those of
    another model.

    What is digested are sums of the bits over rows and over columns, made where the weights are: SHA-256 of the weights
    themselves would take most of a minute for 8B parameters.

    Raises ModelError when weights are not in memory (meta device).
    """
    digest = hashlib.sha256()
    held = [*model.named_parameters(), *model.named_buffers(), *_scales(model)]
    for name, tensor in sorted(held, key=lambda item: item[0]):
        _require_in_memory(name, tensor)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        for part in _sums(tensor.detach()):
            digest.update(part.cpu().numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def stored(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers, by name. `state_dict` will not do: for it bitsandbytes makes new tensors, and
    unpacks weights of four bits in place, which rounds them.
    """
    return {
        f"{path}.{name}": tensor
        for path, part in module.named_modules(remove_duplicate=False)
        for name, tensor in (*part._parameters.items(), *part._buffers.items())
        if tensor is not None and name not in part._non_persistent_buffers_set
    }


def _scales(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """What bitsandbytes keeps beside its weights of four or eight bits, which are others without it."""
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            holders = [getattr(parameter, "quant_state", None)]
            holders.append(getattr(holders[0], "state2", None))  # by which scales themselves are quantized
            if hasattr(parameter, "SCB"):  # which the first forward takes to the module's state
                holders += [parameter, getattr(module, "state", None)]
            held = (getattr(holder, key, None) for holder in holders for key in ("absmax", "code", "offset", "SCB"))
            scales = [tensor for tensor in held if isinstance(tensor, Tensor)]
            yield from ((f"{path}.{name} {number}", tensor) for number, tensor in enumerate(scales))


def _open(folder: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """For each tensor of a checkpoint the open file that holds it."""
    files = [stack.enter_context(safe_open(file, framework="pt")) for file in weight_files(folder)]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118


def _as_stored(tensor: Tensor, loaded: Tensor) -> Tensor:
    """The tensor of a file, unless what was loaded is not simply that: of another shape, or once quantized."""
    plain = tensor.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    return tensor if plain and tensor.shape == loaded.shape else loaded


def _require_in_memory(name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise ModelError(f"the weights {name!r} are not in memory; load the whole model to identify it.")


def _sums(tensor: Tensor) -> Iterator[Tensor]:
    """Sums of a tensor's bits, read as words of 8 bytes in rows of 1,024, over rows and over columns (int64, they may
    wrap), and the bits that fill no row. Rows tell what moved between them, columns what moved within them.
    """
    bits = tensor.contiguous().reshape(-1).view(torch.uint8)
    if bits.storage_offset() % 8:  # a part of another tensor that begins within a word
        bits = bits.clone()
    size = 8 * _WORDS
    whole = len(bits) // size * size
    rows = bits[:whole].view(torch.int64).view(-1, _WORDS)
    yield rows.sum(0)
    yield rows.sum(1)
    yield bits[whole:]


@functools.lru_cache(maxsize=256)
def _spread(count: int) -> list[int]:
    """Up to 64 indices from 0 to count - 1, both included. The stride is not a power of two even where the shape is."""
    if count <= _SAMPLES:
        return list(range(count))
    return [step * (count - 1) // (_SAMPLES - 1) for step in range(_SAMPLES)]
