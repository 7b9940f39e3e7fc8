"""What models answered before, on disk, so that an interrupted evaluation resumes at the item where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from shallower.store import Store

_SCHEMA = """
CREATE TABLE IF NOT EXISTS answered (
    context TEXT NOT NULL, request TEXT NOT NULL, answer TEXT NOT NULL, PRIMARY KEY (context, request)
) WITHOUT ROWID
"""
_AT_ONCE = 500  # fewer than the parameters that any SQLite takes


def digest(*parts: Any) -> str:
    """Of anything that JSON can say."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Answered:
    """Answers (anything that JSON can say) under (context, request). The context says which model answered, and how."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open or create the file; see Store, also for what is raised, here and by `read` and `write`."""
        self._store = Store(path, _SCHEMA, "answers")

    def read(self, context: str, requests: Iterable[str]) -> dict[str, Any]:
        """The answers that are known, by request."""
        asked = sorted(set(requests))
        found: dict[str, Any] = {}
        for start in range(0, len(asked), _AT_ONCE):
            part = asked[start : start + _AT_ONCE]
            marks = ", ".join("?" * len(part))
            question = f"SELECT request, answer FROM answered WHERE context = ? AND request IN ({marks})"
            rows = self._store.read(question, (context, *part))
            found |= {request: json.loads(answer) for request, answer in rows}
        return found

    def write(self, context: str, answers: Mapping[str, Any]) -> None:
        """Add answers in one transaction."""
        rows = [(context, request, json.dumps(answer)) for request, answer in answers.items()]
        self._store.write("INSERT OR REPLACE INTO answered VALUES (?, ?, ?)", rows)

    def close(self) -> None:
        self._store.close()
