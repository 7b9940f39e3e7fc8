"""A text specification: a source and, after `?`, options, as in `c4.jsonl?sequences=64&length=256&part=train`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shallower.errors import CorpusError, UnknownName

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


def in_part(text: str, part: Part) -> bool:
    """Whether a document belongs to `part`: a tenth of all texts is held out, by a hash of the text."""
    if part == "all":
        return True
    held_out = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 10 == 0
    return held_out == (part == "held-out")
