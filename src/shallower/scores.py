"""The score file: one row a unit or span, value and standard error; higher always means keep. One metric or several."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from shallower.errors import UserError
from shallower.files import expanded
from shallower.plan import MadeBy, ModelIdentity, provenance_faults, read_made_by
from shallower.strict_json import finite, key_faults, record_faults, write_json
from shallower.units import DIGITS, Span, Unit

FORMAT = "shallower.scores/1"
SHEET_FORMAT = "shallower.scores/2"


@dataclass(frozen=True)
class Score:
    """Importance of one unit or span. `error` is the standard error of `value` over calibration sequences, or
    over orders of removal where the metric samples these (`shapley`). A file has null for what is no finite number: an
    overflow, which is read as infinite importance.
    """

    of: Unit | Span
    value: float
    error: float | None = None


def importance(value: float) -> float:
    """What a value says when units are ranked: a unit without which the model overflows matters more than any other."""
    return value if math.isfinite(value) else math.inf


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
        return sorted(self.units, key=lambda unit: (importance(self.units[unit]), -unit.index))

    def to_json(self) -> dict[str, Any]:
        rows = [{"of": str(row.of), "value": finite(row.value), "error": finite(row.error)} for row in self.rows]
        return {
            "format": FORMAT,
            "model": asdict(self.model),
            "metric": self.metric,
            "rows": rows,
            "made_by": {**asdict(self.made_by), "options": dict(self.made_by.options)},
        }

    @classmethod
    def from_json(cls, data: Any, where: str = "the scores") -> Scores:
        """Build from parsed JSON. Raises UserError naming every fault."""
        if not isinstance(data, dict):
            raise UserError(f"{where} does not hold scores: expected a JSON object.")
        if data.get("format") != FORMAT:
            raise UserError(
                f"{where} has format {data.get('format')!r}; this version of shallower reads {FORMAT!r}. "
                "Update shallower or make the scores again with `shallower score`."
            )
        faults = key_faults(where, data, ("format", "model", "metric", "rows", "made_by"))
        faults += provenance_faults(where, data)
        if not isinstance(metric := data.get("metric", ""), str):
            faults.append(f"'metric' of {where} is {metric!r}, not text")
        rows = data.get("rows", [])
        if not isinstance(rows, list):
            faults.append(f"'rows' of {where} is not a list")
        else:
            for number, row in enumerate(rows):
                faults += record_faults(f"row {number} of {where}", row, _Row)
        if faults:
            raise UserError("; ".join(faults) + ".")
        blocks = data["model"]["blocks"]
        try:
            parsed = tuple(
                Score(_parse(row["of"]), math.inf if row["value"] is None else row["value"], row["error"])
                for row in rows
            )
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if beyond := [str(row.of) for row in parsed if isinstance(row.of, Span) and row.of.stop > blocks]:
            raise UserError(
                f"{where}: there are scores of {beyond[0]}, but the model has {blocks} blocks; score it again."
            )
        if twice := [str(of) for of, count in Counter(row.of for row in parsed).items() if count > 1]:
            raise UserError(f"{where} scores {', '.join(twice)} more than once: leave one row of each, or score again.")
        return cls(ModelIdentity(**data["model"]), data["metric"], parsed, read_made_by(data))

    def save(self, path: str | os.PathLike[str]) -> None:
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str], metric: str | None = None) -> Scores:
        """Read a score file; `metric` names the one to take where it holds several.

        Raises UserError when it is missing, not JSON or malformed, or holds no such metric.
        """
        return ScoreSheet.load(path).pick(metric, str(path))


@dataclass(frozen=True)
class ScoreSheet:
    """What several metrics say of one model. A sheet of one is written as plain scores are.

    Raises UserError when there are none, a metric comes twice, or they are of different models.
    """

    scores: tuple[Scores, ...]

    def __post_init__(self) -> None:
        if not self.scores or len(set(self.metrics)) < len(self.scores):
            raise UserError(f"a sheet of scores holds each metric once, and at least one, not {list(self.metrics)}.")
        if len({scores.model.fingerprint for scores in self.scores}) > 1:
            raise UserError("a sheet of scores is of one model, not of several.")

    @property
    def model(self) -> ModelIdentity:
        return self.scores[0].model

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(scores.metric for scores in self.scores)

    def pick(self, metric: str | None = None, where: str = "the sheet") -> Scores:
        """The scores by one metric, which need not be named where there is only one.

        Raises UserError, listing what there is, when it is missing or must be named.
        """
        if metric is None and len(self.scores) == 1:
            return self.scores[0]
        for scores in self.scores:
            if scores.metric == metric:
                return scores
        known = ", ".join(self.metrics)
        if metric is None:
            raise UserError(f"{where} holds scores by several metrics; choose one with --metric: {known}.")
        raise UserError(f"{where} holds no scores by {metric!r}; it has {known}.")

    def to_json(self) -> dict[str, Any]:
        if len(self.scores) == 1:
            return self.scores[0].to_json()
        parts = [scores.to_json() for scores in self.scores]
        return {
            "format": SHEET_FORMAT,
            "model": asdict(self.model),
            "metrics": [{key: part[key] for key in ("metric", "rows", "made_by")} for part in parts],
        }

    @classmethod
    def from_json(cls, data: Any, where: str = "the scores") -> ScoreSheet:
        """Build from parsed JSON of one metric or several. Raises UserError naming every fault."""
        if not isinstance(data, dict) or data.get("format") != SHEET_FORMAT:
            return cls((Scores.from_json(data, where),))
        faults = key_faults(where, data, ("format", "model", "metrics"), ("correlations",))  # `score --json` says them
        metrics = data.get("metrics", [])
        if not isinstance(metrics, list) or not metrics:
            faults.append(f"'metrics' of {where} is not a list of at least one metric")
            metrics = []
        found = []
        for number, part in enumerate(metrics):
            what = f"metric {number} of {where}"
            if not isinstance(part, dict):
                faults.append(f"{what} is not an object")
                continue
            faults += [f"{what} has an unknown key {key!r}" for key in ("format", "model") if key in part]
            try:
                found.append(Scores.from_json({"format": FORMAT, "model": data.get("model"), **part}, what))
            except UserError as error:
                faults.append(str(error).removesuffix("."))
        if faults:
            raise UserError("; ".join(dict.fromkeys(faults)) + ".")
        return cls(tuple(found))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file. Raises OutputError when the place cannot be written."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ScoreSheet:
        """Read a score file. Raises UserError when it is missing, not JSON or malformed."""
        try:
            data = json.loads(expanded(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:  # of JSON and UTF-8, too
            raise UserError(
                f"{path} cannot be read as scores: {error}. Make them with `shallower score MODEL --out FILE`."
            ) from None
        return cls.from_json(data, str(path))


@dataclass(frozen=True)
class _Row:
    """A row as the file has it."""

    of: str
    value: float | None
    error: float | None


def _parse(text: str) -> Unit | Span:
    span = re.fullmatch(rf"\[({DIGITS})(\.5)?,({DIGITS})(\.5)?\)", text)
    return Span(_end(span[1], span[2]), _end(span[3], span[4])) if span else Unit.parse(text)


def _end(blocks: str, middle: str | None) -> float:
    """Of a span: between blocks, or in the middle of one."""
    return int(blocks) + 0.5 if middle else int(blocks)
