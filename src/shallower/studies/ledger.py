"""Results on disk, a line a cell: written as soon as a cell is done, read again when a study goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shallower.errors import OutputError, UserError
from shallower.strict_json import spelled
from shallower.studies.result import Result


class Ledger:
    """A file of lines, each one result under the key of everything that it depends on, and with that in words."""

    def __init__(self, path: Path) -> None:
        """Read the file, where there is one; `add` makes it. A last line that a kill cut short is dropped.

        Raises UserError for a file that is no ledger.
        """
        self.path = path
        self._known: dict[str, Result] = {}
        if path.exists():
            self._read()

    def _read(self) -> None:
        whole = self.path.read_bytes()
        lines = whole.split(b"\n")
        if lines[-1]:
            with self.path.open("r+b") as file:
                file.truncate(len(whole) - len(lines[-1]))
        for number, line in enumerate(lines[:-1], 1):
            where = f"line {number} of {self.path}"
            try:
                data = json.loads(line)
            except ValueError:
                raise UserError(f"{where} is not JSON; move the file away, and the study begins anew.") from None
            if not isinstance(data, dict) or not isinstance(data.get("key"), str):
                raise UserError(f"{where} is no result of a study; move the file away, and the study begins anew.")
            self._known[data["key"]] = Result.from_json(data, where)

    def get(self, key: str) -> Result | None:
        return self._known.get(key)

    def add(self, key: str, result: Result, made_by: Mapping[str, Any]) -> None:
        """Write a result, to the disk and not only to its cache. made_by: what the key is of, for a reader.

        Raises OutputError when it cannot be written.
        """
        line = json.dumps(
            {"key": key, "made_by": spelled(made_by), **result.to_json()}, ensure_ascii=False, allow_nan=False
        )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # as strict_json.write_text: a name may hold bytes that are no UTF-8
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(line + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror}. Free some room and run it again.") from None
        self._known[key] = result
