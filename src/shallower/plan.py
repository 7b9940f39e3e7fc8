"""The plan file: which units go, in which order, chosen how, for which model."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from shallower.errors import PlanError, UserError
from shallower.files import expanded
from shallower.strict_json import finite, is_number, key_faults, record_faults, write_json
from shallower.units import Unit, require_distinct

FORMAT = "shallower.plan/1"


@dataclass(frozen=True)
class ModelIdentity:
    """What a plan or a score file was made for. `fingerprint` is of the weights and does not depend on the name."""

    name: str
    revision: str | None
    fingerprint: str
    blocks: int


@dataclass(frozen=True)
class CalibrationIdentity:
    """Which text was read: the specification, the number of real tokens, and the digest of the token ids."""

    spec: str
    tokens: int
    digest: str

    @property
    def title(self) -> str:
        """The specification without the folder that the text lies in: fit to be published."""
        return text_name(self.spec)

    @property
    def source(self) -> str:
        """The same without options."""
        return without_folders(source_and_options(self.spec)[0])


def source_and_options(spec: str, folder: str | os.PathLike[str] = "") -> tuple[str, str, str]:
    """What a text is read from, the `?` that its options stand behind, and these; both empty where there are none.

    The last `?` is that mark. A text that exists under the whole name, here or in `folder`, has no options.
    """
    source, mark, options = spec.rpartition("?")
    # os.path: a mixture may be longer than a name can be, which is an OSError of Path.exists
    return (spec, "", "") if not mark or os.path.exists(os.path.join(folder, spec)) else (source, mark, options)


def text_name(spec: str) -> str:
    """What to call a text in a table: the file's own name with its options, not its folder."""
    source, mark, options = source_and_options(spec)
    return without_folders(source) + mark + options


def without_folders(source: str) -> str:
    """The names of a text, or of the texts of a mixture, without their folders."""
    return "+".join(os.path.basename(re.sub(r"/+(?=\*|$)", "", part)) for part in source.split("+"))


@dataclass(frozen=True)
class MadeBy:
    """Everything needed to make the same file again."""

    search: str | None
    objective: str | None
    metric: str | None
    options: Mapping[str, Any]
    seed: int
    calibration: CalibrationIdentity | None
    version: str

    @property
    def repair(self) -> str:
        """The recoveries behind which candidates were judged (`search --repair`); empty when as they were cut."""
        return str(self.options.get("repair") or "")

    @property
    def measure(self) -> str:
        """What the losses of a plan are: `nll`, `nll after linear-fold`."""
        return (self.objective or "objective") + (f" after {self.repair}" if self.repair else "")


@dataclass(frozen=True)
class Gone:
    """How many parameters go: of how many that the model has, and of how many in its blocks, where that is known."""

    parameters: int
    of_model: int
    of_blocks: int | None = None


@dataclass(frozen=True)
class PruningPlan:
    """The chosen set with its provenance.

    order: the units of `remove` in removal order with the objective after each, or where candidates were judged behind
    a repair the loss after that; None where it was not measured, and as read from a file where it overflowed.
    dense: the objective of the dense model, None in the same cases.
    spent: what a search just cost, else None. `tokens` were read (calibration tokens times candidate sets), in place of
    the `exhaustive` ones that it would have read if nobody had been dropped before the end of the text; `recalled`
    measurements were kept from before. No part of the plan or its file: the same search again costs less.
    gone: of a plan that was just made, how many parameters its units have, else None. No part of its file, either.
    """

    model: ModelIdentity
    remove: tuple[Unit, ...]
    order: tuple[tuple[Unit, float | None], ...]
    dense: float | None
    made_by: MadeBy = field(repr=False)
    spent: Mapping[str, int] | None = field(default=None, repr=False, compare=False)
    gone: Gone | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        require_distinct(self.remove)
        if sorted(self.remove) != sorted(unit for unit, _ in self.order):
            raise PlanError("the plan's 'order' does not list the same units as its 'remove'.")
        for unit in self.remove:
            if unit.index >= self.model.blocks:
                raise PlanError(f"the plan removes {unit}, but its model has blocks 0 to {self.model.blocks - 1}.")

    @property
    def removed(self) -> frozenset[Unit]:
        return frozenset(self.remove)

    def at(self, count: int) -> PruningPlan:
        """The plan's first `count` removals. It says of itself that as many units were to be removed; where units were
        named, that it is these.

        Raises PlanError when the plan holds fewer, or when a pair of a plan made with `ordinary` would be parted.
        """
        if not 1 <= count <= len(self.order):
            raise PlanError(f"cannot cut the plan to {count} units: it holds {len(self.order)}.")
        if count == len(self.order):
            return self
        order = self.order[:count]
        options = dict(self.made_by.options)
        if options.get("ordinary"):
            (last, _), (following, _) = self.order[count - 1 : count + 1]
            if (last.kind, following) == ("mlp", Unit(last.index + 1, "attn")):
                raise PlanError(
                    f"cannot cut the plan to {count} units: {last} and {following} go together (--ordinary); cut it to "
                    f"{count + 1}{f' or {count - 1}' if count > 1 else ''}."
                )
        if "remove" in options:  # the amount that was asked for is no longer met
            pairs = sum(unit.kind == "attn" for unit, _ in order) if options.get("ordinary") else 0
            named = ",".join(str(unit) for unit, _ in order)
            options["remove"] = named if self.made_by.search is None else str(count - pairs)
        return PruningPlan(
            self.model,
            tuple(sorted(unit for unit, _ in order)),
            order,
            self.dense,
            replace(self.made_by, options=options),
        )

    def require_for(self, model: ModelIdentity) -> None:
        """Raise PlanError, naming both models, unless the plan was made for `model`."""
        if self.model.fingerprint != model.fingerprint:
            mine = self.model
            same = (mine.name, mine.blocks) == (model.name, model.blocks)
            rounded = " Or one of them was loaded as float16, whose rounding can show: try --dtype float32."
            raise PlanError(
                f"this plan was made for {mine.name} ({mine.blocks} blocks, {mine.fingerprint[:19]}…), "
                f"not for {model.name} ({model.blocks} blocks, {model.fingerprint[:19]}…). Name "
                "the model that it was made for, or search again for this one."
                f"{rounded if same else ''}"
            )

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "model": asdict(self.model),
            "remove": [str(unit) for unit in self.remove],
            "order": [[str(unit), finite(loss)] for unit, loss in self.order],
            "dense": finite(self.dense),
            "made_by": {**asdict(self.made_by), "options": dict(self.made_by.options)},
        }

    @classmethod
    def from_json(cls, data: Any, where: str = "the plan") -> PruningPlan:
        """Build a plan from parsed JSON. Raises PlanError that lists all faults at once."""
        if not isinstance(data, dict):
            raise PlanError(f"{where} is not a plan: expected a JSON object.")
        if data.get("format") != FORMAT:
            raise PlanError(
                f"{where} has format {data.get('format')!r}; this version of shallower reads {FORMAT!r}. "
                "Update shallower or make the plan again with `shallower search`."
            )
        required = ("format", "model", "remove", "order", "dense", "made_by")
        faults = key_faults(where, data, required, ("spent",))  # `search --json` says it besides
        faults += provenance_faults(where, data)
        for key in ("remove", "order"):
            if not isinstance(data.get(key, []), list):
                faults.append(f"{key!r} of {where} is not a list")
        if faults:
            raise PlanError("; ".join(faults) + ".")
        try:
            return cls(
                ModelIdentity(**data["model"]),
                tuple(Unit.parse(text) for text in data["remove"]),
                tuple((Unit.parse(text), _loss(loss)) for text, loss in data["order"]),
                _loss(data["dense"]),
                read_made_by(data),
            )
        except PlanError:
            raise
        except UserError as error:
            raise PlanError(f"{where}: {error}") from None
        except (TypeError, ValueError, AttributeError) as error:
            raise PlanError(f"{where} holds a value of the wrong type ({error}).") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PruningPlan:
        """Read a plan file. Raises PlanError when it is missing, not JSON, of another format or malformed."""
        try:
            data = json.loads(expanded(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise PlanError(
                f"there is no plan at {path}; make one with `shallower search MODEL --remove 25% --out {path}`."
            ) from None
        except (OSError, ValueError, RecursionError) as error:  # of JSON and UTF-8, too
            raise PlanError(f"{path} cannot be read as a plan: {error}.") from None
        return cls.from_json(data, str(path))


def provenance_faults(where: str, data: Mapping[str, Any]) -> list[str]:
    """Faults of the parts 'model' and 'made_by' that plan and score files share."""
    faults = []
    if "model" in data:
        faults += record_faults(f"'model' of {where}", data["model"], ModelIdentity)
    if "made_by" in data:
        faults += record_faults(f"'made_by' of {where}", data["made_by"], MadeBy)
        calibration = data["made_by"].get("calibration") if isinstance(data["made_by"], dict) else None
        if isinstance(calibration, dict):
            faults += record_faults(f"'calibration' of {where}", calibration, CalibrationIdentity)
    return faults


def read_made_by(data: Mapping[str, Any]) -> MadeBy:
    """The part 'made_by' of a file without faults."""
    made_by = dict(data["made_by"])
    if made_by["calibration"] is not None:
        made_by["calibration"] = CalibrationIdentity(**made_by["calibration"])
    return MadeBy(**made_by)


def _loss(value: Any) -> float | None:
    if value is not None and not is_number(value):
        raise TypeError(f"{value!r} is not a number or null")
    loss: float | None = value
    return loss


def options_in_words(options: Mapping[str, Any]) -> str:
    """`name = value, …`, with values as JSON has them."""
    return ", ".join(f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in options.items())
