"""A text specification: a source and, after `?`, options, as in `c4.jsonl?sequences=64&length=256&part=train`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from shallower.errors import CorpusError, UnknownName
from shallower.registry import Option

Part = Literal["all", "train", "held-out"]


@dataclass(frozen=True)
class Specification:
    """`source` is for open_source; `options` are the texts after `?`, not yet parsed."""

    source: str
    options: dict[str, str]


def parse_specification(text: str, known: Iterable[str]) -> Specification:
    """Split `source?name=value&name=value`. A path that exists under the whole text has no options.

    Raises CorpusError for an option without a value or named twice, UnknownName for one that is not in `known`.
    """
    source, _, tail = (text, "", "") if Path(text).exists() else text.rpartition("?") if "?" in text else (text, "", "")
    if not source.strip():
        raise CorpusError(f"{text!r} names no text: write a path, hf:owner/name or python:docs before the '?'.")
    known = tuple(known)
    options: dict[str, str] = {}
    for item in filter(None, tail.split("&")):
        name, equals, value = item.partition("=")
        name = name.strip().replace("-", "_")
        if name not in known:
            raise UnknownName(f"option of {source}", name, known)
        if not equals or not value.strip():
            raise CorpusError(f"option {name!r} of {source} has no value: write {name}=… .")
        if name in options:
            raise CorpusError(
                f"option {name!r} of {source} is given twice ({options[name]} and {value}); give it once."
            )
        options[name] = value.strip()
    return Specification(source, options)


def check_options(options: Any, known: Mapping[str, Option], least: Mapping[str, int]) -> None:
    """Raises CorpusError when an option is below its least value, or is not one of its choices."""
    for name, smallest in least.items():
        value = getattr(options, name)
        if value < smallest:
            raise CorpusError(f"{name}={value} is too small: it must be at least {smallest}.")
    for name, option in known.items():
        allowed = get_args(option.annotation) if get_origin(option.annotation) is Literal else ()
        if allowed and getattr(options, name) not in allowed:
            raise CorpusError(f"{name}={getattr(options, name)!r} is not one of {', '.join(allowed)}.")


def written_out(source: str, options: Any) -> str:
    """The specification with every option, those that were not given, too."""

    def text(value: object) -> str:
        return str(value).lower() if isinstance(value, bool) else str(value)

    return f"{source}?" + "&".join(f"{name}={text(value)}" for name, value in vars(options).items())


def in_part(text: str, part: Part) -> bool:
    """Whether a document belongs to `part`: a tenth of all texts is held out, by a hash of the text."""
    if part == "all":
        return True
    held_out = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 10 == 0
    return held_out == (part == "held-out")
