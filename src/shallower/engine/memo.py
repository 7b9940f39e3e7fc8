"""What was measured before, on disk: an interrupted search resumes where it was, and searches share what others
computed.

One SQLite file in write-ahead mode: safe against several processes and against a kill at any moment.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shallower.errors import OutputError

Values = NDArray[np.float64]

SCHEMA = """
CREATE TABLE IF NOT EXISTS measured (
    context TEXT NOT NULL, route TEXT NOT NULL, batch INTEGER NOT NULL, sums BLOB NOT NULL,
    PRIMARY KEY (context, route, batch)
) WITHOUT ROWID
"""
WAIT_SECONDS = 60


def context_key(parts: Mapping[str, Any]) -> str:
    """Digest of everything besides the removed set that a measurement depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Memo:
    """Per-sequence sums under (context, route, batch)."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open or create the file. A file that is not a memo, or is damaged, is set aside and begun anew.

        Raises OutputError, as `write` does, when the disk is full or the place cannot be written.
        """
        self.path = Path(path)
        with self._room():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._open()
            except sqlite3.DatabaseError as error:
                if isinstance(error, sqlite3.OperationalError):
                    raise
                self._set_aside()

    @contextmanager
    def _room(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.OperationalError) as error:
            raise OutputError(
                f"cannot keep measurements in {self.path}: {error}. Free some room there, or set SHALLOWER_CACHE to a "
                "folder on another disk."
            ) from error

    def _set_aside(self) -> None:
        self.path.replace(self.path.with_suffix(".damaged"))
        for companion in ("-wal", "-shm"):
            Path(f"{self.path}{companion}").unlink(missing_ok=True)
        self._open()

    def _open(self) -> None:
        self._connection = sqlite3.connect(self.path, timeout=WAIT_SECONDS, isolation_level=None)
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = NORMAL")
        self._connection.execute(SCHEMA)

    def read(self, context: str) -> dict[tuple[str, int], Values]:
        """Everything measured in a context: {(route, batch): float64 [sequences of the batch]}."""
        question = "SELECT route, batch, sums FROM measured WHERE context = ?"
        with self._room():
            try:
                rows = self._connection.execute(question, (context,)).fetchall()
            except sqlite3.DatabaseError as error:
                if isinstance(error, sqlite3.OperationalError):
                    raise
                self._connection.close()
                self._set_aside()
                rows = []
        return {(route, batch): np.frombuffer(sums, dtype="<f8") for route, batch, sums in rows}

    def write(self, context: str, measured: Iterable[tuple[str, int, Values]]) -> None:
        """Add measurements in one transaction."""
        rows = [(context, route, batch, values.astype("<f8").tobytes()) for route, batch, values in measured]
        with self._room(), self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.executemany("INSERT OR REPLACE INTO measured VALUES (?, ?, ?, ?)", rows)

    def close(self) -> None:
        self._connection.close()
