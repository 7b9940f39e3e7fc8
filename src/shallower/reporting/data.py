"""The report files of `prune` and `recover`: everything that their pages and tables show. Torch-free."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from shallower.errors import UserError
from shallower.forms import FORMS
from shallower.plan import CalibrationIdentity, ModelIdentity, PruningPlan
from shallower.scores import Scores
from shallower.strict_json import key_faults, record_faults, spelled, write_json

FORMAT = "shallower.report/1"
RECOVERY_FORMAT = "shallower.recovery/1"

_MEASURED = ("dtype", "device", "window", "windows")  # how perplexity was measured

_RANGES = ("prefill_range", "decode_range")  # which early versions did not write

_T = TypeVar("_T")
_Reader = Callable[[Any, str], Any]  # (value, where it stands) → what it means; raises UserError


@dataclass(frozen=True)
class Side:
    """What was measured of one model, the dense or the pruned one. None and absent names mean: not measured.

    flops and kv_bytes are per token. perplexity, perplexity_tokens: by name of the text. prefill_range, decode_range:
    tokens a second in the slowest and the fastest of the runs, of which the speeds are medians. tasks: by name of the
    task.
    """

    blocks: int
    parameters: int
    bytes: int
    flops: int
    kv_bytes: int
    perplexity: Mapping[str, float] = field(default_factory=dict)
    perplexity_tokens: Mapping[str, int] = field(default_factory=dict)
    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    prefill_range: tuple[float, ...] | None = None
    decode_range: tuple[float, ...] | None = None
    tasks: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {key: spelled(getattr(self, key)) for key in _SIDE}

    @classmethod
    def from_json(cls, data: Any, where: str = "the side") -> Side:
        """Build from parsed JSON. Raises UserError naming every fault."""
        return cls(**_fields(data, where, _SIDE, optional=_RANGES))


@dataclass(frozen=True)
class RecoveryStage:
    """The model behind one recovery, or ahead of the first: with the method `cut`, or `repaired` where that was done
    before.

    options: of the method, also those that nobody gave. perplexity: by name of the text. parameters: that the model
    gained. tokens: of calibration text read, counted once a pass. curve: of a training, a row for each measurement:
    `step`, `tokens`, `minutes`, the step's `loss`, and `held_out` perplexity where it was measured.
    """

    method: str
    perplexity: Mapping[str, float]
    parameters: int = 0
    tokens: int = 0
    seconds: float = 0.0
    curve: tuple[Mapping[str, float], ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {key: spelled(getattr(self, key)) for key in _STAGE}

    @classmethod
    def from_json(cls, data: Any, where: str = "the stage") -> RecoveryStage:
        """Build from parsed JSON. Raises UserError naming every fault."""
        return cls(**_fields(data, where, _STAGE, optional=("curve", "options")))


@dataclass(frozen=True)
class RecoveryMadeBy:
    """What the recoveries of a model worked with, besides their options. calibration: what those in closed form read,
    training: what those that train read; None where there was none of that kind. dtype, device: what the dense model
    was computed in and on (`cpu`, `cuda`). window, windows: tokens of a window of held-out text, and how many of each
    text were measured, None for all. In files of early versions, dtype, device and window are None.
    """

    teacher: ModelIdentity
    calibration: CalibrationIdentity | None
    training: CalibrationIdentity | None
    seed: int
    version: str
    dtype: str | None = None
    device: str | None = None
    window: int | None = None
    windows: int | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any, where: str = "the recovery") -> RecoveryMadeBy:
        """Build from parsed JSON. Raises UserError naming every fault."""
        if isinstance(data, dict):
            data = {**dict.fromkeys(_MEASURED), **data}  # older reports
        faults = record_faults(where, data, cls)
        if not faults:
            faults += record_faults(f"'teacher' of {where}", data["teacher"], ModelIdentity)
            for key in ("calibration", "training"):
                if data[key] is not None:
                    faults += record_faults(f"{key!r} of {where}", data[key], CalibrationIdentity)
        if faults:
            raise UserError("; ".join(faults) + ".")
        texts = {key: data[key] and CalibrationIdentity(**data[key]) for key in ("calibration", "training")}
        return cls(**{**data, **texts, "teacher": ModelIdentity(**data["teacher"])})


@dataclass(frozen=True)
class ReportData:
    """One removal, told whole.

    influence: scores of units, one entry a metric. spans: angular distance of every span of blocks.
    base_model: what the dense model is called. folder: what the pruned one is loaded from. form: how it is stored
    there, a name of `shallower.forms`. recovery: the cut model, and the model behind each recovery, in order; none
    where nothing was repaired. recovery_made_by: what these worked with.
    dtype: the number format that was measured in, in which bytes are counted; the folder may be in another. device,
    window, windows: as in RecoveryMadeBy. tokenizer: whether the folder has one.
    speed_setting: how speed was measured, in one line. seconds: by stage. notes: what the reader must know.
    """

    plan: PruningPlan
    dense: Side
    pruned: Side
    base_model: str
    folder: str
    influence: tuple[Scores, ...] = ()
    spans: Scores | None = None
    speed_setting: str | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    machine: str | None = None
    notes: tuple[str, ...] = ()
    form: str = "ordinary"
    recovery: tuple[RecoveryStage, ...] = ()
    recovery_made_by: RecoveryMadeBy | None = None
    dtype: str | None = None
    device: str | None = None
    window: int | None = None
    windows: int | None = None
    tokenizer: bool = True

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "base_model": self.base_model,
            "folder": self.folder,
            "plan": self.plan.to_json(),
            "dense": self.dense.to_json(),
            "pruned": self.pruned.to_json(),
            "influence": [scores.to_json() for scores in self.influence],
            "spans": None if self.spans is None else self.spans.to_json(),
            "speed_setting": self.speed_setting,
            "seconds": spelled(self.seconds),
            "machine": self.machine,
            "notes": list(self.notes),
            "form": self.form,
            "recovery": [stage.to_json() for stage in self.recovery],
            "recovery_made_by": None if self.recovery_made_by is None else self.recovery_made_by.to_json(),
            **{key: getattr(self, key) for key in _MEASURED},
            "tokenizer": self.tokenizer,
        }

    @classmethod
    def from_json(cls, data: Any, where: str = "the report") -> ReportData:
        """Build from parsed JSON. Raises UserError naming every fault."""
        if not isinstance(data, Mapping):
            raise UserError(f"{where} is not a report: expected a JSON object.")
        if data.get("format") != FORMAT:
            raise UserError(
                f"{where} has format {data.get('format')!r}; this version of shallower reads {FORMAT!r}. "
                "Update shallower or prune again with `shallower prune`."
            )
        older = ("recovery_made_by", *_MEASURED, "tokenizer")
        fields = _fields({"recovery": [], **data}, where, _REPORT, optional=older)
        del fields["format"]
        return cls(**fields)

    def save(self, path: str | os.PathLike[str]) -> None:
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ReportData:
        """Read a report file. Raises UserError when it is missing, not JSON, of another format or malformed."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"there is no report at {path}; `shallower prune MODEL --remove 25% --out FOLDER` makes one."
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path} cannot be read as a report: {error}.") from None
        return cls.from_json(data, str(path))


@dataclass(frozen=True)
class RecoveryData:
    """What `recover` made of a cut model, told whole.

    dense: perplexities of the dense model, by name of the text. recovery: the cut model, and the model behind each
    recovery, in order. form: how it is stored, a name of `shallower.forms`; None in files of early versions. before:
    `made_by` and `recovery` of what had been repaired already, and its `before`. tokenizer: whether one is stored, too.
    """

    made_by: RecoveryMadeBy
    dense: Mapping[str, float]
    recovery: tuple[RecoveryStage, ...]
    notes: tuple[str, ...] = ()
    form: str | None = None
    before: Mapping[str, Any] | None = None
    tokenizer: bool = True

    @property
    def stages_before(self) -> tuple[tuple[RecoveryStage, ...], ...]:
        """Stages of earlier repairs, the first repair first."""
        found, told = [], self.before
        while told is not None:
            found.append(tuple(RecoveryStage.from_json(stage, "a stage of 'before'") for stage in told["recovery"]))
            told = told.get("before")
        return tuple(found[::-1])

    def to_json(self) -> dict[str, Any]:
        return {
            "format": RECOVERY_FORMAT,
            "made_by": self.made_by.to_json(),
            "dense": spelled(self.dense),
            "recovery": [stage.to_json() for stage in self.recovery],
            "notes": list(self.notes),
            "form": self.form,
            "tokenizer": self.tokenizer,
            **({} if self.before is None else {"before": self.before}),
        }

    @classmethod
    def from_json(cls, data: Any, where: str = "the recovery") -> RecoveryData:
        """Build from parsed JSON. Raises UserError naming every fault."""
        fields = _fields(data, where, _RECOVERY, optional=("form", "before", "tokenizer"))
        if fields.pop("format") != RECOVERY_FORMAT:
            raise UserError(
                f"{where} has another format than {RECOVERY_FORMAT!r}, which this version of shallower reads."
            )
        made = cls(**fields)
        if not made.recovery:
            raise UserError(f"'recovery' of {where} is empty.")
        try:
            _ = made.stages_before
        except (AttributeError, KeyError, TypeError):
            raise UserError(f"'before' of {where} does not tell of a repair.") from None
        return made


def _fields(data: Any, where: str, readers: Mapping[str, _Reader], *, optional: Collection[str] = ()) -> dict[str, Any]:
    """Read every key of `data`; all faults are raised together."""
    if not isinstance(data, Mapping):
        raise UserError(f"{where} is not an object.")
    faults = key_faults(where, data, [key for key in readers if key not in optional], optional)
    values: dict[str, Any] = {}
    for key, read in readers.items():
        if key not in data:
            continue
        try:
            values[key] = read(data[key], f"{key!r} of {where}")
        except UserError as error:
            faults.append(str(error).removesuffix("."))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            faults.append(f"{key!r} of {where} is malformed ({type(error).__name__}: {error})")
    if faults:
        raise UserError("; ".join(faults) + ".")
    return values


def _integer(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"{where} is {value!r}, not a whole number.")
    return value


def _number(value: Any, where: str) -> float:
    if value in ("inf", "-inf", "nan"):
        return float(value)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise UserError(f"{where} is {value!r}, not a number.")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where} is {value!r}, not a string.")
    return value


def _yes_or_no(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise UserError(f"{where} is {value!r}, not true or false.")
    return value


def _form(value: Any, where: str) -> str:
    if value not in FORMS:
        raise UserError(f"{where} is {value!r}, not one of {', '.join(FORMS)}.")
    return str(value)


def _or_none(read: Callable[[Any, str], _T]) -> Callable[[Any, str], _T | None]:
    return lambda value, where: None if value is None else read(value, where)


def _many(read: Callable[[Any, str], _T]) -> Callable[[Any, str], tuple[_T, ...]]:
    def items(value: Any, where: str) -> tuple[_T, ...]:
        if not isinstance(value, list):
            raise UserError(f"{where} is {type(value).__name__}, not a list.")
        return tuple(read(item, f"entry {index} in {where}") for index, item in enumerate(value))

    return items


def _named(read: Callable[[Any, str], _T]) -> Callable[[Any, str], dict[str, _T]]:
    def items(value: Any, where: str) -> dict[str, _T]:
        if not isinstance(value, Mapping):
            raise UserError(f"{where} is {type(value).__name__}, not an object.")
        return {name: read(item, f"{name!r} in {where}") for name, item in value.items()}

    return items


def _range(value: Any, where: str) -> tuple[float, ...]:
    ends = _many(_number)(value, where)
    if len(ends) != 2 or not ends[0] <= ends[1]:
        raise UserError(f"{where} is {value!r}, not the least and the most.")
    return ends


_SIDE: dict[str, _Reader] = {
    "blocks": _integer,
    "parameters": _integer,
    "bytes": _integer,
    "flops": _integer,
    "kv_bytes": _integer,
    "perplexity": _named(_number),
    "perplexity_tokens": _named(_integer),
    "prefill_tokens_per_s": _or_none(_number),
    "decode_tokens_per_s": _or_none(_number),
    "prefill_range": _or_none(_range),
    "decode_range": _or_none(_range),
    "tasks": _named(_number),
}
_STAGE: dict[str, _Reader] = {
    "method": _text,
    "perplexity": _named(_number),
    "parameters": _integer,
    "tokens": _integer,
    "seconds": _number,
    "curve": _many(_named(_number)),
    "options": _named(lambda value, where: value),
}
_REPORT: dict[str, _Reader] = {
    "format": _text,
    "base_model": _text,
    "folder": _text,
    "plan": PruningPlan.from_json,
    "dense": Side.from_json,
    "pruned": Side.from_json,
    "influence": _many(Scores.from_json),
    "spans": _or_none(Scores.from_json),
    "speed_setting": _or_none(_text),
    "seconds": _named(_number),
    "machine": _or_none(_text),
    "notes": _many(_text),
    "form": _form,
    "recovery": _many(RecoveryStage.from_json),
    "recovery_made_by": _or_none(RecoveryMadeBy.from_json),
    "dtype": _or_none(_text),
    "device": _or_none(_text),
    "window": _or_none(_integer),
    "windows": _or_none(_integer),
    "tokenizer": _yes_or_no,
}
_RECOVERY: dict[str, _Reader] = {
    "format": _text,
    "made_by": RecoveryMadeBy.from_json,
    "dense": _named(_number),
    "recovery": _many(RecoveryStage.from_json),
    "notes": _many(_text),
    "form": _or_none(_form),
    "before": _or_none(lambda value, where: value),
    "tokenizer": _yes_or_no,
}
