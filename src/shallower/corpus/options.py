"""What may be said of a text besides its sources, and what a specification says itself."""

from __future__ import annotations

import math
import os
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from shallower.corpus.bos import Bos
from shallower.corpus.calibration import is_saved
from shallower.corpus.formats import Format
from shallower.corpus.specification import Part, check_options, joined, parse_specification
from shallower.defaults import BUILT_LENGTH, SEQUENCES
from shallower.plan import source_and_options
from shallower.registry import Option

Position = Literal["auto", "start", "random", "end"]


@dataclass(frozen=True)
class BuildOptions:
    """What may stand after the `?` of a specification, or in a YAML file; `build_calibration` explains them."""

    sequences: int = SEQUENCES
    length: int = BUILT_LENGTH
    seed: int = 0
    pack: bool = True
    bos: Bos = "auto"
    part: Part = "all"
    max_chars: int = 100_000
    position: Position = "auto"
    format: Format = "text"
    shots: int = 5
    dedup: float = 0.0
    min_quality: float = 0.0
    quality: str = "rules"

    def __post_init__(self) -> None:
        least = {"sequences": 1, "length": 2, "seed": 0, "max_chars": 1, "shots": 1}
        shares = dict.fromkeys(("dedup", "min_quality"), (0.0, 1.0))
        check_options(self, OPTIONS, {name: (smallest, math.inf) for name, smallest in least.items()} | shares)


OPTIONS: Mapping[str, Option] = {
    name: Option(name, kind, getattr(BuildOptions, name)) for name, kind in typing.get_type_hints(BuildOptions).items()
}
NAMED = (*OPTIONS, "questions")  # of texts, or of sets of questions
# What a written-out specification does not repeat where it does nothing
LATER = ("position", "format", "shots", "dedup", "min_quality", "quality")


def text_of(spec: str) -> str:
    """The sources of a specification without its options: what stands before the `?`, or is listed in its file.

    Raises CorpusError or UnknownName when it cannot be read.
    """
    return joined(parse_specification(source_and_options(spec)[0], OPTIONS).terms)


def named_options(spec: str) -> dict[str, str]:
    """The options that a specification of text or of questions names itself, as texts.

    Raises CorpusError or UnknownName when it cannot be read.
    """
    return parse_specification(spec, NAMED).options


def asks_model(spec: str) -> bool:
    """Whether a specification wants text that the model itself writes (`self`).

    Raises as `named_options`.
    """
    parsed = parse_specification(spec, NAMED)
    return not is_saved(os.path.expanduser(parsed.source)) and any(
        term.source.partition("#")[0].partition(":")[0] == "self" for term in parsed.terms
    )


def with_options(spec: str, options: Mapping[str, str]) -> str:
    """The specification with `options` where it does not name them itself; of a finished set, as it is.

    Raises as `named_options`.
    """
    parsed = parse_specification(spec, NAMED)
    if is_saved(os.path.expanduser(parsed.source)):
        return spec
    return _with(parsed.source, {**options, **parsed.options})


def without_options(spec: str, names: Collection[str]) -> str:
    """The specification of a text without the options of these names, as if it left them to others.

    Raises as `named_options`.
    """
    parsed = parse_specification(spec, NAMED)
    return _with(parsed.source, {name: value for name, value in parsed.options.items() if name not in names})


def _with(source: str, options: Mapping[str, str]) -> str:
    return f"{source}?" + "&".join(f"{name}={value}" for name, value in options.items())
