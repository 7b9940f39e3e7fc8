"""The score file: one row a unit or span, value and standard error; higher always means keep."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shallower.errors import UserError
from shallower.plan import CalibrationIdentity, MadeBy, ModelIdentity
from shallower.strict_json import key_faults, write_json
from shallower.units import Span, Unit

FORMAT = "shallower.scores/1"


@dataclass(frozen=True)
class Score:
    """Importance of one unit or span. `error` is the standard error of `value` over calibration sequences."""

    of: Unit | Span
    value: float
    error: float | None = None


@dataclass(frozen=True)
class Scores:
    """What one metric says of a model."""

    model: ModelIdentity
    metric: str
    rows: tuple[Score, ...]
    made_by: MadeBy = field(repr=False)

    @property
    def units(self) -> dict[Unit, float]:
        return {row.of: row.value for row in self.rows if isinstance(row.of, Unit)}

    @property
    def spans(self) -> dict[Span, float]:
        return {row.of: row.value for row in self.rows if isinstance(row.of, Span)}

    def ranked(self) -> list[Unit]:
        """Units from least to most important; ties go to the deeper one, which disturbs less of what follows."""
        return sorted(self.units, key=lambda unit: (self.units[unit], -unit.index))

    def to_json(self) -> dict[str, Any]:
        rows = [{"of": str(row.of), "value": _number(row.value), "error": row.error} for row in self.rows]
        return {
            "format": FORMAT,
            "model": asdict(self.model),
            "metric": self.metric,
            "rows": rows,
            "made_by": {**asdict(self.made_by), "options": dict(self.made_by.options)},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str = "the scores") -> Scores:
        """Build from parsed JSON. Raises UserError naming every fault."""
        faults = key_faults(where, data, ("format", "model", "metric", "rows", "made_by"))
        if data.get("format") != FORMAT:
            faults.insert(0, f"{where} has format {data.get('format')!r}, not {FORMAT!r}")
        if faults:
            raise UserError("; ".join(faults) + ".")
        made_by = dict(data["made_by"])
        if made_by["calibration"] is not None:
            made_by["calibration"] = CalibrationIdentity(**made_by["calibration"])
        rows = tuple(
            Score(_parse(row["of"]), math.nan if row["value"] is None else row["value"], row["error"]) for row in data["rows"]
        )
        return cls(ModelIdentity(**data["model"]), data["metric"], rows, MadeBy(**made_by))

    def save(self, path: str | os.PathLike[str]) -> None:
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Scores:
        """Read a score file. Raises UserError when it is missing, not JSON or malformed."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(f"{path} cannot be read as scores: {error}. Make them with `shallower score MODEL`.") from None
        return cls.from_json(data, str(path))


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _parse(text: str) -> Unit | Span:
    if text.startswith("["):
        start, stop = text.strip("[)").split(",")
        return Span(int(start), int(stop))
    return Unit.parse(text)
