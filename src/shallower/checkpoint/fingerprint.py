"""What a model is, told from its weights: the same for every name, place and storage format it is loaded from."""

from __future__ import annotations

import functools
import hashlib

import torch
from transformers import PreTrainedModel

from shallower.checkpoint.load import LoadedModel
from shallower.errors import ModelError
from shallower.plan import ModelIdentity

_SAMPLES = 64  # values read of each tensor


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
        if parameter.is_meta:
            raise ModelError(f"the weights {name!r} are not in memory; load the whole model to identify it.")
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        index = torch.tensor(_spread(parameter.numel()), dtype=torch.long, device=parameter.device)
        samples.append(parameter.detach().reshape(-1)[index].to(torch.bfloat16))
    # One transfer for all of them, not one a tensor.
    together = torch.cat([sample.to(samples[0].device) for sample in samples]).cpu()
    digest.update(together.view(torch.int16).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def identity(loaded: LoadedModel) -> ModelIdentity:
    """What a plan or score file records of the model it was made for.

    Raises ModelError when weights are not in memory (meta device).
    """
    blocks = int(loaded.model.config.get_text_config().num_hidden_layers)
    return ModelIdentity(loaded.name, loaded.revision, fingerprint(loaded.model), blocks)


@functools.lru_cache(maxsize=256)
def _spread(count: int) -> list[int]:
    """Up to 64 indices from 0 to count - 1, both included. The stride is not a power of two even where the shape is."""
    if count <= _SAMPLES:
        return list(range(count))
    return [step * (count - 1) // (_SAMPLES - 1) for step in range(_SAMPLES)]
