"""A calibration specification: sources with weights, and options, as one string or as a YAML file.

    c4.jsonl?sequences=64&length=256&part=train
    c4.jsonl*0.7+books.jsonl*0.3?sequences=64&dedup=0.8
    spec.yaml?seed=1                                     options after `?` win over those of the file

A `+` or `*` in a path that exists is the path's own. The same as YAML, with paths relative to the file's own folder:

    sources:
      - c4.jsonl*0.7
      - {source: books.jsonl, weight: 0.3}
    sequences: 64
    dedup: 0.8
"""

from __future__ import annotations

import difflib
import hashlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from shallower.errors import CorpusError, UnknownName, UserError
from shallower.plan import source_and_options
from shallower.registry import Option
from shallower.strict_json import fault_in_yaml

Part = Literal["all", "train", "held-out"]

YAML = (".yaml", ".yml")


@dataclass(frozen=True)
class Term:
    """One source of a mixture. `source` is for open_source; weights are relative to the sum of all."""

    source: str
    weight: float = 1.0


@dataclass(frozen=True)
class Specification:
    """`source` names it; `terms` are what it is mixed of; `options` are texts, checked but not yet parsed."""

    source: str
    options: dict[str, str]
    terms: tuple[Term, ...]


def parse_specification(text: str, known: Iterable[str]) -> Specification:
    """Read `source*weight+source*weight?name=value&name=value`, or the YAML file before the `?`.

    known: the options that may be named; a mapping to Option says which values fit, too. A path that exists under the
    whole text has no options, one that exists under all before the `?` is one source.

    Raises CorpusError or UnknownName for one fault; CorpusError that tells all of them for several.
    """
    source, _, tail = source_and_options(text)
    if not source.strip():
        raise CorpusError(f"{text!r} names no text: write a path, hf:owner/name or python:docs before the '?'.")
    allowed: Mapping[str, Option | None] = known if isinstance(known, Mapping) else dict.fromkeys(known)
    faults: list[UserError] = []
    options: dict[str, str] = {}
    path = Path(os.path.expanduser(source))
    if path.suffix in YAML and os.path.isfile(path):
        terms, options, found = _read_yaml(path, allowed)
    else:
        terms, found = _terms(source)
    faults += found
    given: dict[str, str] = {}
    for item in filter(None, tail.split("&")):
        name, equals, value = item.partition("=")
        name, value = name.strip().replace("-", "_"), value.strip()
        if not equals or not value:
            missing = CorpusError(f"option {name!r} of {source} has no value: write {name}=… .")
            faults.append(missing if name in allowed else UnknownName("option", name, allowed, of=source))
        elif name in given:
            faults.append(
                CorpusError(f"option {name!r} of {source} is given twice ({given[name]} and {value}); give it once.")
            )
        else:
            faults += _option_faults(source, name, value, allowed)
            given[name] = value
    raise_all(faults)
    return Specification(source, options | given, terms)


def located(text: str, folder: Path) -> str:
    """The same specification, each source that is a path relative to `folder` as one that opens from here."""
    source, mark, tail = source_and_options(text, folder)
    terms = (_name_and_weight(item, folder) for item in _items(source, folder))
    return "+".join(_located(name, folder) + weight for name, weight in terms) + mark + tail


def raise_all(faults: Sequence[UserError]) -> None:
    """Raise the only fault as it is, or one CorpusError that tells all of them."""
    if len(faults) == 1:
        raise faults[0]
    if faults:
        raise CorpusError(" ".join(f"({number}) {fault}" for number, fault in enumerate(faults, 1)))


def check_options(options: Any, known: Mapping[str, Option], ranges: Mapping[str, tuple[float, float]]) -> None:
    """Raises CorpusError, for all options together, when one is out of its range or is not one of its choices."""
    faults: list[UserError] = []
    for name, (least, most) in ranges.items():
        value = getattr(options, name)
        if not least <= value <= most:
            small = f"too small: it must be at least {least}" if most == math.inf else f"not from {least} to {most}"
            faults.append(CorpusError(f"{name}={value} is {small}."))
    for name, option in known.items():
        choices = get_args(option.annotation) if get_origin(option.annotation) is Literal else ()
        if choices and getattr(options, name) not in choices:
            faults.append(CorpusError(f"{name}={getattr(options, name)!r} is not one of {', '.join(choices)}."))
    raise_all(faults)


def written_out(source: str, options: Any, unless_default: Iterable[str] = ()) -> str:
    """The specification with every option, those that were not given, too; some only where they say anything."""
    silent = {name for name in unless_default if getattr(options, name) == getattr(type(options), name)}
    told = (f"{name}={_text(value)}" for name, value in vars(options).items() if name not in silent)
    return f"{source}?" + "&".join(told)


def joined(terms: Sequence[Term]) -> str:
    """The mixture as it stands before the `?`; of one source, its name."""
    if len(terms) == 1:
        return terms[0].source
    return "+".join(f"{term.source}*{_digits(term.weight)}" for term in terms)


def _digits(weight: float) -> str:
    """All its digits, and no exponent, whose + would begin another source."""
    written = format(Decimal(repr(weight)), "f")
    return written.rstrip("0").rstrip(".") if "." in written else written


def in_part(text: str, part: Part) -> bool:
    """Whether a document belongs to `part`: a tenth is held out, by a hash of the text, or of what it is a piece of."""
    if part == "all":
        return True
    held_out = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 10 == 0
    return held_out == (part == "held-out")


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _option_faults(where: str, name: str, value: str, allowed: Mapping[str, Option | None]) -> list[UserError]:
    if name not in allowed:
        return [UnknownName("option", name, allowed, of=where)]
    option = allowed[name]
    if option is not None:
        try:
            option.parse(value)
        except UserError as fault:
            return [fault]
    return []


def _terms(text: str) -> tuple[tuple[Term, ...], list[UserError]]:
    """The sources of a mixture with their weights, and what is wrong with them."""
    if _exists(text):
        return (Term(text),), []
    terms, faults = [], []
    for item in _items(text):
        try:
            terms.append(_term(item, text))
        except CorpusError as fault:
            faults.append(fault)
    return _weighed(terms, text, faults)


def _items(text: str, folder: Path = Path()) -> list[str]:
    """What stands between the + of a mixture, but for a + in a path that exists, here or in `folder`."""
    parts = text.split("+")
    items: list[str] = []
    while parts:
        count = next((count for count in range(len(parts), 1, -1) if _holds_path("+".join(parts[:count]), folder)), 1)
        items.append("+".join(parts[:count]))
        del parts[:count]
    return items


def _holds_path(item: str, folder: Path) -> bool:
    """Whether the item is a path, here or in `folder`, perhaps with a field and a weight."""
    item = item.strip()
    places = (place for whole in (item, item.rpartition("*")[0]) for place in (whole, whole.partition("#")[0]))
    return any(_exists(place, folder) for place in places if place and "+" not in item.removeprefix(place))


def _term(item: str, where: str, folder: Path = Path()) -> Term:
    """A source with its weight."""
    name, weight = _name_and_weight(item, folder)
    if not name:
        raise CorpusError(f"a source of the mixture {where!r} has no name: write SOURCE*WEIGHT+SOURCE*WEIGHT.")
    return Term(name, _weight(weight.removeprefix("*") if weight else 1, name))


def _name_and_weight(item: str, folder: Path) -> tuple[str, str]:
    """A source, and its weight with the * before it, empty where it has none; a * is the path's own where that exists,
    here or in `folder`.
    """
    item = item.strip()
    name, star, weight = item.rpartition("*")
    places = (item, item.partition("#")[0]) if "#" in weight else (item,)
    if not star or any(_exists(place, folder) for place in places):
        return item, ""
    return name.strip(), star + weight


def _exists(source: str, folder: Path = Path()) -> bool:
    """Whether the source is a path, here or in `folder`."""
    place = os.path.expanduser(source.removeprefix("arrow:"))
    return os.path.exists(place) or os.path.exists(folder / place)


def _weight(given: object, source: str) -> float:
    try:
        weight = math.nan if isinstance(given, bool) else float(given)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        weight = math.nan
    if not math.isfinite(weight) or weight < 0:
        raise CorpusError(f"the weight {given!r} of {source} is not a number from 0 up: write {source}*0.5.")
    return weight


def _weighed(
    terms: Sequence[Term], where: str, faults: Sequence[UserError]
) -> tuple[tuple[Term, ...], list[UserError]]:
    """Sources of weight 0 are left out."""
    kept = tuple(term for term in terms if term.weight > 0)
    if not kept and not faults:
        return kept, [CorpusError(f"the weights of {where} sum to zero: give at least one source a weight above 0.")]
    return kept, list(faults)


def _read_yaml(
    path: Path, allowed: Mapping[str, Option | None]
) -> tuple[tuple[Term, ...], dict[str, str], list[UserError]]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CorpusError(f"{path} cannot be read as YAML: {fault_in_yaml(error)}.") from None
    if not isinstance(content, dict):
        raise CorpusError(f"{path} holds no specification: write `sources:` with a list, and options below it.")
    faults: list[UserError] = []
    options: dict[str, str] = {}
    listed = content.pop("sources", None)
    if listed is None:
        faults.append(CorpusError(f"{path} lacks 'sources', a list of texts."))
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in allowed:
            faults.append(UnknownName("key", name, ["sources", *allowed], of=str(path)))
        elif not isinstance(value, (bool, int, float, str)):
            faults.append(CorpusError(f"{name!r} of {path} holds {value!r}, which is neither a number nor a word."))
        else:
            faults += _option_faults(str(path), name, _text(value), allowed)
            options[name] = _text(value)
    terms = []
    for number, item in enumerate(listed if isinstance(listed, list) else [listed] if listed is not None else [], 1):
        try:
            terms.append(_yaml_term(item, path, f"source {number} of {path}"))
        except CorpusError as fault:
            faults.append(fault)
    if listed is not None:
        kept, faults = _weighed(terms, str(path), faults)
        return kept, options, faults
    return (), options, faults


def _yaml_term(item: object, path: Path, where: str) -> Term:
    if isinstance(item, str):
        term = _term(item, where, path.parent)
    elif isinstance(item, dict):
        wrong = []
        for key in item:
            if key not in ("source", "weight"):
                near = difflib.get_close_matches(str(key), ("source", "weight"), n=1)
                wrong.append(f"{where} has an unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else "."))
        if not isinstance(item.get("source"), str):
            wrong.append(f"{where} lacks 'source', the name of a text.")
        if wrong:
            raise CorpusError(" ".join(wrong))
        term = Term(item["source"].strip(), _weight(item.get("weight", 1), item["source"]))
    else:
        raise CorpusError(f"{where} is {item!r}: write a text, or source: and weight:.")
    return Term(_located(term.source, path.parent), term.weight)


def _located(source: str, folder: Path) -> str:
    """A path relative to `folder` as one that opens from here; all else as it is."""
    arrow = "arrow:" if source.startswith("arrow:") else ""
    place = source.removeprefix(arrow)
    beside = any(path and os.path.exists(folder / path) for path in (place, place.partition("#")[0]))
    return f"{arrow}{folder / place}" if beside and (arrow or not _is_reserved(place)) else source


def _is_reserved(source: str) -> bool:
    """Whether `open_source` reads the name as a text of its own, also where there is a path of that name."""
    name, colon, _ = source.partition("#")[0].partition(":")
    return name in (("python", "self", "hf", "demo") if colon else ("python", "self"))
