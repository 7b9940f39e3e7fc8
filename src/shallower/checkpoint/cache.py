"""The cache folder, and how something appears in it: whole or not at all. Torch-free."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from shallower.errors import OutputError

_ABANDONED_AFTER = 24 * 3600  # seconds; no download or conversion takes a day


def cache_root() -> Path:
    """`$SHALLOWER_CACHE`, else `$XDG_CACHE_HOME/shallower`, else `~/.cache/shallower`. The folder may not exist yet.

    Raises OutputError where no home is known, as of a user in a container.
    """
    if chosen := os.environ.get("SHALLOWER_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base).expanduser() if base else Path.home() / ".cache") / "shallower"
    except RuntimeError:
        raise OutputError(
            "no home folder is known here: set SHALLOWER_CACHE to a folder that can be written."
        ) from None


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Yield an empty folder inside the cache that is removed afterwards; what a kill leaves, a later call removes.

    Raises OutputError when the cache cannot be written or is full.
    """
    place = cache_root() / ".scratch"
    try:
        place.mkdir(parents=True, exist_ok=True)
        for leftover in place.iterdir():
            with contextlib.suppress(OSError):
                if time.time() - leftover.stat().st_mtime > _ABANDONED_AFTER:
                    shutil.rmtree(leftover, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(dir=place))
    except OSError as error:
        raise _unwritable(error) from None
    try:
        yield folder
    except OSError as error:
        raise _unwritable(error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def staging(target: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `target`, a path in the cache, when the block ends without an exception.

    Of two processes that make the same target, the first to finish wins and the other's work is dropped.

    Raises OutputError when the cache cannot be written or is full.
    """
    with scratch() as folder:
        made = folder / target.name
        made.mkdir()  # of ordinary permissions, unlike `folder` itself
        yield made
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            made.rename(target)
        except OSError:
            if not target.is_dir():
                raise


def _unwritable(error: OSError) -> OutputError:
    return OutputError(
        f"cannot write the cache {cache_root()}: {error.strerror or error}. "
        "Free some room, or set SHALLOWER_CACHE to another folder."
    )
