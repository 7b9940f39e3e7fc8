"""What a model is, told from its weights: the same for every name, place and storage format it is loaded from."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shallower.checkpoint.load import LoadedModel
from shallower.errors import ModelError
from shallower.plan import ModelIdentity

_SAMPLES = 64  # values read of each tensor
_WORDS = 1024  # of 8 bytes, in a row of those whose sums make the checksum


def fingerprint(model: PreTrainedModel) -> str:
    """`sha256:…` over the model type and, of each parameter, its name, shape and 64 evenly spaced values.

    The values are rounded to bfloat16 first, so a float32 checkpoint and its bfloat16 load agree. Tied parameters count
    once, under the name that sorts first. A sample, not a checksum: it tells models, fine-tunes and cuts apart, and
    does not notice a change of a few single weights.

    Raises ModelError when weights are not in memory (meta device).
    """
    digest = hashlib.sha256(f"{model.config.model_type}\n".encode())
    seen: set[int] = set()
    samples = []
    for name, parameter in sorted(model.named_parameters(remove_duplicate=False), key=lambda item: item[0]):
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        _require_in_memory(name, parameter)
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        index = torch.tensor(_spread(parameter.numel()), dtype=torch.long, device=parameter.device)
        samples.append(parameter.detach().reshape(-1)[index].to(torch.bfloat16))
    # One transfer for all of them, not one a tensor.
    together = torch.cat([sample.to(samples[0].device) for sample in samples]).cpu()
    digest.update(together.view(torch.int16).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def checksum(model: PreTrainedModel) -> str:
    """`sha256:…` over all bits of all parameters and buffers, with their names, number formats and shapes: for results
    that are kept, which one changed weight or another rounding makes those of another model.

    What is digested are sums of the bits over rows and over columns, made where the weights are: SHA-256 of the weights
    themselves would take most of a minute for 8B parameters.

    Raises ModelError when weights are not in memory (meta device).
    """
    digest = hashlib.sha256()
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()], key=lambda item: item[0]):
        _require_in_memory(name, tensor)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        for part in _sums(tensor.detach()):
            digest.update(part.cpu().numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def identity(loaded: LoadedModel) -> ModelIdentity:
    """What a plan or score file records of the model it was made for.

    Raises ModelError when weights are not in memory (meta device).
    """
    blocks = int(loaded.model.config.get_text_config().num_hidden_layers)
    return ModelIdentity(loaded.name, loaded.revision, fingerprint(loaded.model), blocks)


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
