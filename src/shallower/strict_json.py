"""JSON and YAML files that hold exactly the keys we know. Torch-free."""

from __future__ import annotations

import difflib
import json
import math
import os
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from shallower.errors import UserError
from shallower.files import write_text


def key_faults(what: str, data: Mapping[str, Any], required: Iterable[str], optional: Iterable[str] = ()) -> list[str]:
    """Faults of `data`: missing keys, and unknown ones with the nearest known key."""
    required, known = tuple(required), (*required, *optional)
    faults = [f"{what} lacks {key!r}" for key in required if key not in data]
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)  # a key of YAML may be a number
            faults.append(f"{what} has an unknown key {key!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    return faults


def record_faults(what: str, data: Any, record: type) -> list[str]:
    """Faults of `data` as the fields of the dataclass `record`: missing and unknown keys, values of another type."""
    if not isinstance(data, dict):
        return [f"{what} is not an object"]
    hints = typing.get_type_hints(record)
    faults = key_faults(what, data, hints)
    for name, kind in hints.items():
        kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
        if name in data and not any(_fits(data[name], kind) for kind in kinds):
            faults.append(f"{name!r} of {what} is {data[name]!r}, not {' or '.join(map(_called, kinds))}")
    return faults


def read_yaml(path: Path, what: str, otherwise: str) -> dict[str, Any]:
    """The keys and values of a YAML file. what: it should be. otherwise: what to do where there is none.

    Raises UserError when it is missing, cannot be read, or holds no keys.
    """
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no {what} at {path}; {otherwise}.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as a {what}: {fault_in_yaml(error)}.") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} is not a {what}, which has keys and values.")
    return data


def fault_in_yaml(error: Exception) -> str:
    """Why a YAML file cannot be read: line, column and problem, without the excerpt that PyYAML draws a caret under."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or problem is None:
        return " ".join(str(error).split()).rstrip(".")
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"


def is_number(value: Any) -> bool:
    """Whether JSON calls it a number (`true` is none)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def finite(value: float | None) -> float | None:
    """The value, or None where JSON has no word for it."""
    return value if value is not None and math.isfinite(value) else None


def spelled(value: Any) -> Any:
    """The same as JSON: it has no infinity, which a broken model's perplexity can be, so that becomes a string (`inf`,
    `-inf` or `nan`, which `float` reads).
    """
    if isinstance(value, Mapping):
        return {str(key): spelled(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [spelled(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _fits(value: Any, kind: Any) -> bool:
    if kind is float:
        return is_number(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind in (str, types.NoneType):
        return isinstance(value, kind)
    return isinstance(value, dict)


def _called(kind: Any) -> str:
    names = {str: "text", int: "a whole number", float: "a number", types.NoneType: "null"}
    return names.get(kind, "an object")


def write_json(path: str | os.PathLike[str], data: Mapping[str, Any]) -> None:
    """Write `data` to a file that is there whole or not at all. Raises OutputError when it cannot be written."""
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")
