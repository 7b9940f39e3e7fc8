"""JSON files that hold exactly the keys we know. Torch-free."""

from __future__ import annotations

import difflib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from shallower.errors import OutputError


def key_faults(what: str, data: Mapping[str, Any], required: Iterable[str], optional: Iterable[str] = ()) -> list[str]:
    """Faults of `data`: missing keys, and unknown ones with the nearest known key."""
    required, known = tuple(required), (*required, *optional)
    faults = [f"{what} lacks {key!r}" for key in required if key not in data]
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            faults.append(f"{what} has an unknown key {key!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    return faults


def write_json(path: str | os.PathLike[str], data: Mapping[str, Any]) -> None:
    """Write `data` to a temporary name beside `path`, then rename, so that `path` is never half-written.

    Raises OutputError when the place cannot be written.
    """
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` (UTF-8) to a temporary name beside `path`, then rename.

    Raises OutputError when the place cannot be written.
    """
    path = Path(path)
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        raise OutputError(f"cannot write {path}: {error.strerror}. Free some room or choose another place.") from None
