"""What was measured before, on disk: an interrupted search resumes where it was, and searches share what others
computed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shallower.store import Store

Values = NDArray[np.float64]

SCHEMA = """
CREATE TABLE IF NOT EXISTS measured (
    context TEXT NOT NULL, route TEXT NOT NULL, batch INTEGER NOT NULL, sums BLOB NOT NULL,
    PRIMARY KEY (context, route, batch)
) WITHOUT ROWID
"""


def context_key(parts: Mapping[str, Any]) -> str:
    """Digest of everything besides the removed set that a measurement depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


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
