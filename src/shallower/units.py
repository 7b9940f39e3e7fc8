"""Removable parts of a model: units (`block.7`, `attn.7`, `mlp.7`) and spans of neighbours."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from shallower.errors import BudgetError

Kind = Literal["block", "attn", "mlp", "pair"]
KINDS: tuple[Kind, ...] = ("block", "attn", "mlp")
"""What a model is made of. A `pair` is two halves of neighbours, and exists only while a search looks for ordinary
plans."""

_LONGEST_RANGE = 10_000  # more than any model has, and few enough to be listed
_LONGEST_SHOWN = 200  # characters

DIGITS = r"\d{1,18}"  # of a number in a pattern: more than any model needs, and few enough for `int`

_UNIT = re.compile(rf"({'|'.join(KINDS)})\.({DIGITS})")


@dataclass(frozen=True, order=True)
class Unit:
    """One removable thing. Ordered by depth, then `attn` < `block` < `mlp` < `pair`.

    `pair.3` is `mlp.3` with `attn.4`: without them `attn.3` and `mlp.4` are an ordinary block.
    """

    index: int
    kind: Kind

    def __str__(self) -> str:
        return f"{self.kind}.{self.index}"

    @property
    def sublayers(self) -> tuple[Unit, ...]:
        """The attention and MLP sublayers that go with it, in depth order."""
        if self.kind == "block":
            return Unit(self.index, "attn"), Unit(self.index, "mlp")
        if self.kind == "pair":
            return Unit(self.index, "mlp"), Unit(self.index + 1, "attn")
        return (self,)

    @property
    def reach(self) -> tuple[int, int]:
        """The places `start, …, stop - 1` that it takes where `attn.l` has place 2l and `mlp.l` place 2l + 1."""
        start = 2 * self.index + (self.kind in ("mlp", "pair"))
        return start, start + (2 if self.kind in ("block", "pair") else 1)

    def overlaps(self, other: Unit) -> bool:
        """Whether both hold one and the same sublayer."""
        (start, stop), (others_start, others_stop) = self.reach, other.reach
        return start < others_stop and others_start < stop

    @classmethod
    def parse(cls, text: str) -> Unit:
        """Read `block.7`, `attn.7` or `mlp.7`.

        Raises BudgetError for anything else.
        """
        match = _UNIT.fullmatch(text.strip())
        if match is None:
            raise BudgetError(
                f"{shown(text)} is not a unit: write block.7, attn.7 or mlp.7 (0-based), or a range such as "
                "block.13-18."
            )
        kind: Kind = match[1]  # type: ignore[assignment]
        return cls(int(match[2]), kind)


@dataclass(frozen=True, order=True)
class Span:
    """Blocks `start, …, stop - 1`, as in Python's ranges. As text in files: `[13,19)`.

    An end may lie in the middle of a block, between its attention and its MLP: `[13.5,19)` is `mlp.13` with blocks 14
    to 18.
    """

    start: float
    stop: float

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise BudgetError(f"the span [{self.start}, {self.stop}) is empty or negative.")
        for name in ("start", "stop"):
            twice = 2 * getattr(self, name)
            if twice != int(twice):
                raise BudgetError(f"the span [{self.start}, {self.stop}) ends neither between blocks nor in mid-block.")
            if twice % 2 == 0:
                object.__setattr__(self, name, int(twice) // 2)

    def __str__(self) -> str:
        return f"[{self.start},{self.stop})"

    @property
    def blocks(self) -> float:
        """How many blocks it is long."""
        return self.stop - self.start

    @property
    def sublayers(self) -> tuple[Unit, ...]:
        """The attention and MLP sublayers in it, in depth order."""
        places = range(round(2 * self.start), round(2 * self.stop))
        return tuple(Unit(place // 2, "mlp" if place % 2 else "attn") for place in places)

    @property
    def units(self) -> tuple[Unit, ...]:
        """Its blocks, with a sublayer at an end that lies in mid-block."""
        whole = range(math.ceil(self.start), math.floor(self.stop))
        first, last = self.sublayers[:1] if self.start % 1 else (), self.sublayers[-1:] if self.stop % 1 else ()
        return (*first, *(Unit(index, "block") for index in whole), *last)


def parse_units(text: str) -> tuple[Unit, ...]:
    """Read a comma-separated list of units; `block.13-18` is an inclusive range (13, 14, …, 18).

    Raises BudgetError when an item cannot be read or is named twice, or a range is longer than any model.
    """
    units: list[Unit] = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        span = re.fullmatch(rf"({'|'.join(KINDS)})\.({DIGITS})-({DIGITS})", item)
        if span is None:
            units.append(Unit.parse(item))
            continue
        first, last = int(span[2]), int(span[3])
        if last < first:
            raise BudgetError(f"the range {item!r} ends before it starts.")
        if last - first >= _LONGEST_RANGE:
            raise BudgetError(
                f"the range {item!r} has {last - first + 1:,} units, and at most {_LONGEST_RANGE:,} can be named: "
                "'shallower inspect MODEL' says how many there are."
            )
        units += [Unit.parse(f"{span[1]}.{index}") for index in range(first, last + 1)]
    require_distinct(units)
    return tuple(units)


def shown(text: str) -> str:
    """What a user typed, in quotes; of very much of it the beginning."""
    return repr(text) if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]!r}…"


def runs(units: Iterable[Unit], kind: Kind) -> tuple[range, ...]:
    """The indices of the units of one kind, in as few ranges as possible."""
    found: list[range] = []
    for index in sorted(unit.index for unit in units if unit.kind == kind):
        if found and found[-1].stop == index:
            found[-1] = range(found[-1].start, index + 1)
        else:
            found.append(range(index, index + 1))
    return tuple(found)


def of_one_sublayer(units: Iterable[Unit]) -> bool:
    """Whether the units are attentions alone, or MLPs alone."""
    return {unit.kind for unit in units} in ({"attn"}, {"mlp"})


def neighbours(units: Iterable[Unit]) -> list[tuple[Unit, ...]]:
    """The units in lines of neighbours, each as long as can be: with its units all that is between its ends goes.

    A block is in a line whole, if it is among the units, else as its two sublayers, if both are; one of which only a
    part may go ends the line. Pairs are in lines of their own. Of attentions alone, or MLPs alone, those of blocks that
    follow one another are neighbours.
    """
    there = frozenset(units)
    alone = of_one_sublayer(there)
    steps: dict[bool, dict[int, tuple[Unit, ...]]] = {False: {}, True: {}}  # by whether they are pairs
    for unit in sorted(there):
        block = Unit(unit.index, "block")
        if alone or unit.kind == "pair":
            steps[unit.kind == "pair"][unit.index] = (unit,)
        elif block in there:
            steps[False][unit.index] = (block,)
        elif there.issuperset(block.sublayers):
            steps[False][unit.index] = block.sublayers
    lines: list[tuple[Unit, ...]] = []
    for found in steps.values():
        for place, index in enumerate(found):
            goes_on = place and index - 1 in found
            lines.append((lines.pop() if goes_on else ()) + found[index])
    return lines


def listed(units: Iterable[Unit], separator: str = ",") -> str:
    """The units as `parse_units` reads them, each run of one kind as a range: `block.13-18,attn.22`."""
    chosen = tuple(units)
    return separator.join(
        f"{kind}.{run.start}" + (f"-{run.stop - 1}" if len(run) > 1 else "")
        for kind in get_args(Kind)
        for run in runs(chosen, kind)
    )


def plain(units: Iterable[Unit]) -> list[Unit]:
    """The units with each pair as its two sublayers: what a model can go without, and a plan lists."""
    return [part for unit in units for part in (unit.sublayers if unit.kind == "pair" else (unit,))]


def sublayers_of(units: Iterable[Unit]) -> frozenset[Unit]:
    """All that goes with the units: `block.7` is the same as `attn.7` with `mlp.7`."""
    return frozenset(part for unit in units for part in unit.sublayers)


def require_distinct(units: Iterable[Unit]) -> None:
    """Raise BudgetError when a unit is named twice, or a sublayer together with the block that holds it."""
    seen: set[Unit] = set()
    for unit in units:
        if unit in seen:
            raise BudgetError(f"{unit} is named twice; name each unit once.")
        seen.add(unit)
    for unit in sorted(seen):
        if unit.kind in ("attn", "mlp") and Unit(unit.index, "block") in seen:
            raise BudgetError(f"{unit} is part of block.{unit.index}, which is removed too; name only one of the two.")
    for one, other in pairwise(sorted(seen, key=lambda unit: unit.reach)):
        if one.overlaps(other):
            raise BudgetError(f"{one} and {other} have a sublayer in common; name only one of the two.")
