"""All that decides what a model computes, as digests: results that are kept belong to it, not to a name or a place."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from shallower.checkpoint.fingerprint import checksum

NOT_OF_THE_MODEL = frozenset(
    {"_name_or_path", "name_or_path", "_commit_hash", "auto_map", "architectures"}
    | {"dtype", "torch_dtype", "transformers_version"}
)
"""Entries of a config, at any depth, that two copies of one model may differ in."""


def determinants(model: PreTrainedModel) -> list[str]:
    """Digests of the weights to the last bit, of the config and of the code that runs the model, its number format
    and kind of device. The same in every process and for every place it is loaded from.

    Raises ModelError when weights are not in memory (meta device).
    """
    # checksum, as a fingerprint takes models for one that differ in single weights
    return [checksum(model), beside_weights(model), *code_of_model(model), str(model.dtype), model.device.type]


def beside_weights(model: PreTrainedModel) -> str:
    """Digest of what a model computes with besides its weights and buffers (see `checksum`): its config, but for names,
    places, number formats and versions. The same in every process and for every place it is loaded from.
    """
    return hashlib.sha256(json.dumps(_plain(model.config.to_dict()), sort_keys=True).encode()).hexdigest()


def code_of_model(model: PreTrainedModel) -> list[str]:
    """What runs the model: the version of transformers, and a digest of each file of code that came with a model.

    A model computes otherwise under another version or once its own code is edited, with the same config and weights.
    """
    # all that was imported of a checkpoint's package, as helpers define no module; tokenizers may not be imported yet
    kinds = {type(module) for module in model.modules()}
    packages = tuple(f"{kind.__module__.rpartition('.')[0]}." for kind in kinds if _is_remote(kind))
    files = {getattr(module, "__file__", None) for name, module in [*sys.modules.items()] if name.startswith(packages)}
    paths = (Path(file) for file in files if file)
    sources = sorted(path.read_bytes() for path in paths if not path.name.startswith("tokenization"))
    return [transformers.__version__, *(hashlib.sha256(source).hexdigest() for source in sources)]


def _is_remote(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "transformers_modules"


def _plain(value: Any) -> Any:
    """What JSON can say of a value of a config."""
    if isinstance(value, Mapping):
        return {str(key): _plain(held) for key, held in value.items() if key not in NOT_OF_THE_MODEL}
    if isinstance(value, (list, tuple)):
        return [_plain(held) for held in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if value is None or isinstance(value, (str, int, float)):
        return value
    return str(value) if isinstance(value, torch.dtype) else type(value).__qualname__  # not where it is in memory
