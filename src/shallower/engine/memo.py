"""What was measured before, on disk: an interrupted search resumes where it was, and searches share what others
computed.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers import PreTrainedModel

from shallower.store import Store

Values = NDArray[np.float64]

NOT_OF_THE_MODEL = frozenset(
    {"_name_or_path", "name_or_path", "_commit_hash", "auto_map", "architectures"}
    | {"dtype", "torch_dtype", "transformers_version"}
)
"""Entries of a config, at any depth, that two copies of one model may differ in."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS measured (
    context TEXT NOT NULL, route TEXT NOT NULL, batch INTEGER NOT NULL, sums BLOB NOT NULL,
    PRIMARY KEY (context, route, batch)
) WITHOUT ROWID
"""


def context_key(parts: Mapping[str, Any]) -> str:
    """Digest of everything besides the removed set that a measurement depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def beside_weights(model: PreTrainedModel) -> str:
    """Digest of what a model computes with besides its weights and buffers (see `checksum`): its config, but for names,
    places, number formats and versions. The same in every process and for every place it is loaded from.
    """
    return hashlib.sha256(json.dumps(_plain(model.config.to_dict()), sort_keys=True).encode()).hexdigest()


def code_of_model(model: PreTrainedModel) -> list[str]:
    """What runs the model: the version of transformers, and a digest of each file of code that came with a model.

    A model computes otherwise under another version or once its own code is edited, with the same config and weights.
    """
    own = {sys.modules[type(module).__module__] for module in model.modules() if _is_remote(type(module))}
    sources = sorted(inspect.getsource(module) for module in own)
    return [transformers.__version__, *(hashlib.sha256(source.encode()).hexdigest() for source in sources)]


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


class Memo:
    """Per-sequence sums under (context, route, batch)."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open or create the file; see Store, also for what is raised, here and by `read` and `write`."""
        self._store = Store(path, SCHEMA, "measurements")

    def read(self, context: str) -> dict[tuple[str, int], Values]:
        """Everything measured in a context: {(route, batch): float64 [sequences of the batch]}."""
        rows = self._store.read("SELECT route, batch, sums FROM measured WHERE context = ?", (context,))
        return {(route, batch): np.frombuffer(sums, dtype="<f8") for route, batch, sums in rows}

    def write(self, context: str, measured: Iterable[tuple[str, int, Values]]) -> None:
        """Add measurements in one transaction."""
        rows = [(context, route, batch, values.astype("<f8").tobytes()) for route, batch, values in measured]
        self._store.write("INSERT OR REPLACE INTO measured VALUES (?, ?, ?, ?)", rows)

    def close(self) -> None:
        self._store.close()
