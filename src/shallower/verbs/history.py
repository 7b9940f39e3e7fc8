"""What a checkpoint says of how it was repaired."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shallower.errors import UserError
from shallower.filenames import RECOVERY, REPORT
from shallower.plan import CalibrationIdentity
from shallower.reporting.data import RecoveryMadeBy, RecoveryStage


def told_before(folder: Path | None) -> dict[str, Any] | None:
    """What a checkpoint says of how it was repaired: its recovery.json, or the same of its report.json; None where it
    says nothing.

    Raises UserError when the file cannot be read.
    """
    for name, key in ((RECOVERY, "made_by"), (REPORT, "recovery_made_by")):
        if folder is None or not (folder / name).is_file():
            continue
        try:
            told = _told(json.loads((folder / name).read_text(encoding="utf-8")), key)
        except (OSError, ValueError, RecursionError, AttributeError, TypeError, UserError):
            raise UserError(
                f"{folder / name}, which tells how the model was repaired, cannot be read: restore it, or delete it."
            ) from None
        if told is not None:
            return told
    return None


def _told(data: Any, key: str) -> dict[str, Any] | None:
    """Of the content of such a file, and of each `before` in it; None where nothing was repaired.

    Raises UserError, AttributeError or TypeError for what is malformed.
    """
    told = {"made_by": data.get(key), "recovery": data.get("recovery", [])}
    stages = [RecoveryStage.from_json(stage) for stage in told["recovery"]]
    before = None if data.get("before") is None else _told(data["before"], "made_by")
    if not stages:
        return None
    return told if before is None else {**told, "before": before}


def methods_of(told: Mapping[str, Any] | None) -> list[str]:
    """The recoveries of `told_before`, in order, and those before them."""
    if told is None:
        return []
    return [*methods_of(told.get("before")), *(stage["method"] for stage in told["recovery"][1:])]


def texts_of(told: Mapping[str, Any] | None) -> Iterator[tuple[str, CalibrationIdentity]]:
    """What the recoveries of `told_before` read, and those before them, each with what to call it. Reports of early
    versions do not say it.

    Raises UserError when what is said of it cannot be read.
    """
    if told is None:
        return
    if told["made_by"] is not None:
        made = RecoveryMadeBy.from_json(told["made_by"], "'made_by' of the repair that the model had")
        if made.calibration is not None:
            yield "the text of its repair", made.calibration
        if made.training is not None:
            yield "its training text", made.training
    yield from texts_of(told.get("before"))
