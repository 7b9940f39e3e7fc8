"""One SQLite file: safe against several processes and against a kill at any moment.

Where machines may share it there is no write-ahead log, whose readers share memory.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from shallower.errors import OutputError
from shallower.files import alone

WAIT_SECONDS = 60
MOUNTS = Path("/proc/self/mounts")
# kinds of file systems, or how their names begin, that several machines may have mounted
_SHARED = ("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "afs", "gfs2", "ocfs2", "9p", "virtiofs", "fuse.")


class Store:
    """A table that only grows. A file that is no store, or is damaged, is set aside and begun anew."""

    def __init__(self, path: str | os.PathLike[str], schema: str, what: str) -> None:
        """Open or create the file. schema: makes the table unless it is there. what: is kept, for the error.

        Raises OutputError, as `read` and `write` do, when the disk is full or the place cannot be written.
        """
        self.path = Path(path)
        self._schema = schema
        self._what = what
        with self._room():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._open()
            except sqlite3.DatabaseError as error:
                if not _is_damage(error):
                    raise
                self._set_aside()

    def read(self, question: str, parameters: Sequence[Any]) -> list[tuple[Any, ...]]:
        """Rows that answer a SELECT; none from a file that turns out to be damaged."""
        with self._room():
            try:
                return self._connection.execute(question, parameters).fetchall()
            except sqlite3.DatabaseError as error:
                if not _is_damage(error):
                    raise
                self._connection.close()
                self._set_aside()
                return []

    def write(self, statement: str, rows: Iterable[Sequence[Any]]) -> None:
        """Run an INSERT for each row, in one transaction; into a new file when this one turns out to be damaged."""
        kept = list(rows)
        with self._room():
            try:
                self._insert(statement, kept)
            except sqlite3.DatabaseError as error:
                if not _is_damage(error):
                    raise
                self._connection.close()
                self._set_aside()
                self._insert(statement, kept)

    def close(self) -> None:
        self._connection.close()

    def _insert(self, statement: str, rows: Sequence[Sequence[Any]]) -> None:
        with self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.executemany(statement, rows)

    def _open(self) -> None:
        while True:  # until it is certain which file was opened, though another process may set one aside
            before = _inode(self.path)
            self._connection = sqlite3.connect(self.path, timeout=WAIT_SECONDS, isolation_level=None)
            self._inode = _inode(self.path)
            if before in (None, self._inode):
                break
            self._connection.close()
        if _is_shared(self.path):
            self._set_mode("DELETE")
        else:
            self._set_mode("WAL")
            self._connection.execute("PRAGMA synchronous = NORMAL")
        self._connection.execute(self._schema)

    def _set_mode(self, mode: str) -> None:
        """SQLite does not wait, whatever its timeout, when several processes change the mode of a new file at once."""
        until = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                self._connection.execute(f"PRAGMA journal_mode = {mode}")  # no change where another process was first
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > until:
                    raise
                time.sleep(0.01)

    def _set_aside(self) -> None:
        """Begin anew; with the new file of another process where that met the damage first."""
        with alone(self.path):
            if _inode(self.path) == self._inode:
                for companion in ("-wal", "-shm", "-journal"):
                    Path(f"{self.path}{companion}").unlink(missing_ok=True)
                with suppress(FileNotFoundError):  # no locks here, and the other process did it just now
                    self.path.replace(self.path.with_suffix(".damaged"))
        self._open()

    @contextmanager
    def _room(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.OperationalError) as error:
            way = "Free some room there, or set SHALLOWER_CACHE to a folder on another disk."
            if "locked" in str(error):
                way = f"Another process held it for {WAIT_SECONDS} s: let it end, and run the same command again."
            elif isinstance(error, PermissionError) or "readonly" in str(error) or "unable to open" in str(error):
                way = "Set SHALLOWER_CACHE to a folder that can be written."
            raise OutputError(f"cannot keep {self._what} in {self.path}: {error}. {way}") from error


def _inode(path: Path) -> tuple[int, int] | None:
    """What tells the file from another of its name; None where there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _is_shared(path: Path) -> bool:
    """Whether other machines may write the file, too: it is on a file system of the network."""
    try:
        text = MOUNTS.read_text(encoding="utf-8", errors="surrogateescape")  # as paths are spelled
        mounts = [line.split() for line in text.splitlines()]
    except OSError:  # not Linux
        return False
    kinds = {Path(place.replace(r"\040", " ")): kind for _, place, kind, *_ in mounts}  # a later one lies over others
    return next((kinds[folder] for folder in path.resolve().parents if folder in kinds), "").startswith(_SHARED)


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    """Whether the file is damaged or no store. Whatever else may be wrong has a class of its own."""
    return type(error) is sqlite3.DatabaseError
