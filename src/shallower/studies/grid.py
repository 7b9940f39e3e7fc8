"""STUDY.yaml: which cells there are.

    models: demo                      # one or a list, as MODEL everywhere
    texts:                            # calibration texts by name: what the study varies first
      web: c4.jsonl
      books: books.jsonl
    format: [text, chat]              # optional: `format` of the calibration specification; one or a list
    sequences: [16, 32]               # one or a list
    length: 128
    seeds: [0, 1]
    objectives: [nll, kl]
    searches: [one-shot, one-shot:loss, greedy]   # with a metric to rank by where it is not the search's own
    remove: [10%, 20%]                # ratios, as --remove takes them
    held_out:                         # texts for perplexity; of a longer one documents in the order of seed 0
      wikitext: wikitext2.test.txt
    tasks:                            # questions (.jsonl of question, choices, gold) for accuracy
      arc_easy: arc_easy/test.jsonl

Further keys: `units`, `protect`, `settings` (options of searches, metrics and objectives), `exact`,
`held_out_sequences`, `held_out_length`, `questions`. Paths are relative to the file's folder.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from shallower.corpus.specification import located
from shallower.defaults import LENGTH, SEQUENCES
from shallower.errors import UserError
from shallower.files import expanded
from shallower.strict_json import key_faults, read_yaml
from shallower.studies.result import Cell

Names = tuple[str, ...]


@dataclass(frozen=True)
class Study:
    """A grid with what is measured in each of its cells; see the module."""

    models: Names
    texts: Mapping[str, str]
    remove: Names
    format: Names = ("",)
    sequences: tuple[int, ...] = (SEQUENCES,)
    length: tuple[int, ...] = (LENGTH,)
    seeds: tuple[int, ...] = (0,)
    objectives: Names = ("nll",)
    searches: Names = ("greedy",)
    held_out: Mapping[str, str] = field(default_factory=dict)
    tasks: Mapping[str, str] = field(default_factory=dict)
    units: str = "block"
    protect: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)
    exact: bool = False
    held_out_sequences: int = 16
    held_out_length: int = 512
    questions: int = 100

    @property
    def cells(self) -> list[Cell]:
        """All points of the grid: cells of one model and calibration set stand together, the ratio varies fastest."""
        axes = (
            self.models,
            self.texts,
            self.format,
            self.sequences,
            self.length,
            self.seeds,
            self.objectives,
            self.searches,
            self.remove,
        )
        return [Cell(*point) for point in itertools.product(*axes)]


_REQUIRED = ("models", "texts", "remove")
_WHOLE = ("sequences", "length", "seeds")
_SINGLE_WHOLE = ("held_out_sequences", "held_out_length", "questions")


def read_study(path: str | os.PathLike[str]) -> Study:
    """Read STUDY.yaml. Raises UserError that lists all faults of the file at once."""
    path = expanded(path)
    data = read_yaml(path, "study", "write one as docs/study.md shows")
    return parse_study(data, str(path), path.parent)


def parse_study(data: Mapping[str, Any], where: str, folder: Path = Path()) -> Study:
    """Check the keys and values of a study. folder: what relative paths start from."""
    known = [item.name for item in fields(Study)]
    faults = key_faults(where, data, _REQUIRED, [name for name in known if name not in _REQUIRED])
    given: dict[str, Any] = {}
    for name, value in data.items():
        if name not in known:
            continue
        try:
            given[name] = _value(name, value, folder)
        except UserError as error:
            faults.append(f"{name!r} of {where} {error}")
    if faults:
        raise UserError("; ".join(faults) + ".")
    return Study(**given)


def _value(name: str, value: Any, folder: Path) -> Any:
    if name in ("texts", "held_out", "tasks", "settings"):
        if not isinstance(value, dict) or (name == "texts" and not value):
            raise UserError(f"is {value!r}, not a list of names with a value each (`web: c4.jsonl`)")
        texts = {_word(key): _word(item) for key, item in value.items()}
        return texts if name == "settings" else {key: located(item, folder) for key, item in texts.items()}
    if name == "exact":
        if not isinstance(value, bool):
            raise UserError(f"is {value!r}, not true or false")
        return value
    if name in ("units", "protect"):
        return _word(value)
    if name in _SINGLE_WHOLE:
        return _whole(value)
    items = value if isinstance(value, list) else [value]
    if not items:
        raise UserError("is empty: give at least one")
    if len(set(map(str, items))) < len(items):
        raise UserError(f"names something twice: {value!r}")
    if name in _WHOLE:
        return tuple(_whole(item, least=0 if name == "seeds" else 1) for item in items)
    if name == "models":
        return tuple(_located_model(_word(item), folder) for item in items)
    return tuple(_word(item) for item in items)


def _word(value: Any) -> str:
    """One value as text."""
    if value is None or isinstance(value, (list, dict)):
        raise UserError(f"holds {value!r} where a word or number belongs; write one, or leave the key out")
    return str(value)


def _whole(value: Any, least: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"holds {value!r}, not a whole number of at least {least}")
    return value


def _located_model(path: str, folder: Path) -> str:
    """A path relative to the study's folder becomes one that opens from here; all else stays as it is, and `demo`, as
    which demo.yaml names its results.
    """
    return str(folder / path) if path.strip() and path != "demo" and os.path.exists(folder / path) else path
