"""One cell of a study, and what was found there."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any, Literal, TypeVar

from shallower.budget import parse_remove
from shallower.engine import reads_choices
from shallower.errors import UserError
from shallower.registry import Method
from shallower.registry import metric as metrics
from shallower.registry import objective as objectives
from shallower.registry import search as searches
from shallower.searches import search_before
from shallower.strict_json import record_faults, spelled
from shallower.units import Unit, sublayers_of

FACTORS = ("text", "format", "sequences", "length", "seed", "objective", "search")
"""What a cell varies, within a stratum: everything of the calibration set, then how the plan is chosen."""

CALIBRATION = FACTORS[:5]

Level = TypeVar("Level", bound=Hashable)

_WITHOUT_TEXT = frozenset({"units", "budget", "scores", "spans", "start", "rng", "weights"})
_ASKING = frozenset({"losses", "differences"})


@dataclass(frozen=True)
class Cell:
    """A point of the grid.

    text: name of a calibration text in the study. search: as `--search` takes it, with a metric to rank by after a
    colon (`one-shot:loss`) where it is not the search's own. remove: as `--remove` takes it.
    """

    model: str
    text: str
    format: str
    sequences: int
    length: int
    seed: int
    objective: str
    search: str
    remove: str

    @property
    def stratum(self) -> tuple[str, str]:
        """Cells are compared within one model and one ratio: between ratios everything differs, and says nothing."""
        return self.model, self.remove

    @property
    def draws(self) -> bool:
        """Whether the search, or the metric that it ranks by, draws at random: the seed decides that, too."""
        return any("rng" in method.parameters for method in self._methods)

    @cached_property
    def reads(self) -> frozenset[str]:
        """The factors that the set of removed units depends on, by what search and metric ask for; whatever the others
        are, the set is the same.
        """
        if isinstance(parse_remove(self.remove)[0], Unit):
            return frozenset()  # the units are named
        asked = {parameter for method in self._methods for parameter in method.parameters}
        found = {"search"}
        if asked - _WITHOUT_TEXT:
            found.update(CALIBRATION)
        if asked & _ASKING:
            found.add("objective")
        if "rng" in asked:
            found.add("seed")
        if self._of_questions:
            found.discard("format")
        return frozenset(found)

    @property
    def same_plan(self) -> Hashable:
        """Equal for cells whose plans are the same by what they read."""
        levels = tuple(self.level(factor) for factor in FACTORS)
        return self.stratum, levels, "text" in self.reads and self._of_questions

    @property
    def ordered(self) -> bool:
        """Whether cells of the same plan have the same removal order. That of a search that yields a set alone is
        measured by the objective on the text, whether or not the set depends on these.
        """
        return "objective" in self.reads or not any(method.traits.get("unordered") for method in self._methods)

    @property
    def _of_questions(self) -> bool:
        """Whether calibration is questions: for any search, an objective that reads these says so."""
        return reads_choices(objectives.get(self.objective))

    @property
    def _methods(self) -> list[Method]:
        """The searches, what they start from, and the metrics that they rank by."""
        name, metric = search_and_metric(self.search)
        methods = [searches.get(each.strip()) for each in name.split(",")]
        if start := search_before(methods[0]):
            methods.insert(0, searches.get(start))
        ranking = [metric] if metric else [method.traits["metric"] for method in methods if "metric" in method.traits]
        return [*methods, *map(metrics.get, ranking)]

    @property
    def calibrated_on(self) -> str:
        """In words, for lines that tell of a cell."""
        form = f" {self.format}" if self.format else ""
        return f"{self.text}{form} {self.sequences}×{self.length} seed {self.seed}"

    def level(self, factor: str) -> Hashable:
        """The level of a factor; None where the plan does not depend on it."""
        return getattr(self, factor) if factor in self.reads else None

    def compared(self, factor: str) -> Hashable:
        """The level at which plans are compared across a factor; None where the plan does not depend on it, and of the
        seed where the search draws, too: there it would be that of the calibration set and of the draws.
        """
        return None if factor == "seed" and self.draws else self.level(factor)

    def apart_from(self, *factors: str) -> Hashable:
        """All else: equal for cells that differ in these factors only."""
        return tuple(getattr(self, item.name) for item in fields(self) if item.name not in factors)


@dataclass(frozen=True)
class Result:
    """What a cell gave.

    order: the removed units in removal order. loss: the objective on the calibration text; dense: without removing.
    held_out: perplexity by text. tasks: accuracy by task. seconds: of the search.
    """

    cell: Cell
    order: tuple[Unit, ...]
    loss: float
    dense: float
    seconds: float
    held_out: Mapping[str, float] = field(default_factory=dict)
    tasks: Mapping[str, float] = field(default_factory=dict)

    @property
    def removed(self) -> frozenset[Unit]:
        return frozenset(self.order)

    @property
    def sublayers(self) -> frozenset[Unit]:
        """What is gone, the same for plans that leave the same model."""
        return sublayers_of(self.order)

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = spelled({**asdict(self), "order": [str(unit) for unit in self.order]})
        return data

    @classmethod
    def from_json(cls, data: Any, where: str) -> Result:
        """Raises UserError that lists all faults of the line."""
        faults = (
            record_faults(f"'cell' of {where}", data.get("cell"), Cell) if isinstance(data, dict) else ["no object"]
        )
        if faults:
            raise UserError(f"{where} cannot be read as a result of a study: {'; '.join(faults)}.")
        try:
            units = tuple(Unit.parse(text) for text in data["order"])
            loss, dense, seconds = (float(data[name]) for name in ("loss", "dense", "seconds"))
            held_out, tasks = (
                {name: float(value) for name, value in data[kind].items()} for kind in ("held_out", "tasks")
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{where} cannot be read as a result of a study: {error!r}.") from None
        return cls(Cell(**data["cell"]), units, loss, dense, seconds, held_out, tasks)


@dataclass(frozen=True)
class Failure:
    """A cell that could not be measured, and why, as a sentence."""

    cell: Cell
    why: str


def search_and_metric(asked: str) -> tuple[str, str | None]:
    """A study's `one-shot:loss` as the search and the metric it ranks by; None: the search's own."""
    name, _, metric = asked.partition(":")
    return name, metric or None


def grouped(results: Iterable[Result], key: Callable[[Result], Hashable]) -> dict[Hashable, list[Result]]:
    """Results by `key`, in the order in which the keys first appear."""
    groups: dict[Hashable, list[Result]] = {}
    for result in results:
        groups.setdefault(key(result), []).append(result)
    return groups


def distinct(results: Iterable[Result]) -> list[Result]:
    """One of those whose plans are the same by what they read, whatever else tells their cells apart."""
    return [group[0] for group in grouped(results, lambda result: result.cell.same_plan).values()]


def counterparts(
    levels: Mapping[Level, Iterable[Result]], outcome: Literal["held_out", "tasks"], *factors: str
) -> dict[Level, list[Result]]:
    """Of each level the results of finite perplexities, or accuracies, that have one at every other level, alike but
    for `factors`, so that means of these over levels are of the same cells. A level without any finite result has none,
    and takes none from the others.
    """
    finite = {
        level: [result for result in group if all(map(math.isfinite, getattr(result, outcome).values()))]
        for level, group in levels.items()
    }
    alike = [{result.cell.apart_from(*factors) for result in group} for group in finite.values() if group]
    shared = set.intersection(*alike) if alike else set()
    return {
        level: [result for result in group if result.cell.apart_from(*factors) in shared]
        for level, group in finite.items()
    }
