"""What models answered before, on disk, so that an interrupted evaluation resumes at the item where it was.

One SQLite file in write-ahead mode: safe against several processes and against a kill at any moment.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shallower.errors import OutputError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS answered (
    context TEXT NOT NULL, request TEXT NOT NULL, answer TEXT NOT NULL, PRIMARY KEY (context, request)
) WITHOUT ROWID
"""
_WAIT_SECONDS = 60
_AT_ONCE = 500  # fewer than the parameters that any SQLite takes


def digest(*parts: Any) -> str:
    """Of anything that JSON can say."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Answered:
    """Answers (anything that JSON can say) under (context, request). The context says which model answered, and how."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open or create the file; one that is damaged is set aside and begun anew.

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
                self.path.replace(self.path.with_suffix(".damaged"))
                for companion in ("-wal", "-shm"):
                    Path(f"{self.path}{companion}").unlink(missing_ok=True)
                self._open()

    def _open(self) -> None:
        self._connection = sqlite3.connect(self.path, timeout=_WAIT_SECONDS, isolation_level=None)
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = NORMAL")
        self._connection.execute(_SCHEMA)

    def read(self, context: str, requests: Iterable[str]) -> dict[str, Any]:
        """The answers that are known, by request."""
        asked = sorted(set(requests))
        found: dict[str, Any] = {}
        with self._room():
            for start in range(0, len(asked), _AT_ONCE):
                part = asked[start : start + _AT_ONCE]
                marks = ", ".join("?" * len(part))
                question = f"SELECT request, answer FROM answered WHERE context = ? AND request IN ({marks})"
                rows: Sequence[tuple[str, str]] = self._connection.execute(question, (context, *part)).fetchall()
                found |= {request: json.loads(answer) for request, answer in rows}
        return found

    def write(self, context: str, answers: Mapping[str, Any]) -> None:
        """Add answers in one transaction."""
        rows = [(context, request, json.dumps(answer)) for request, answer in answers.items()]
        with self._room(), self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.executemany("INSERT OR REPLACE INTO answered VALUES (?, ?, ?)", rows)

    def close(self) -> None:
        self._connection.close()

    @contextmanager
    def _room(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.OperationalError) as error:
            raise OutputError(
                f"cannot keep answers in {self.path}: {error}. Free some room there, or set SHALLOWER_CACHE to a "
                "folder on another disk."
            ) from error
