"""`shallower report`: the page again, from the numbers that are in the folder."""

from __future__ import annotations

import json
from pathlib import Path

from shallower import progress
from shallower.errors import OutputError, UserError
from shallower.filenames import PAGE, PLAN, RECOVERY, REPORT
from shallower.files import expanded, write_text
from shallower.plan import PruningPlan
from shallower.reporting.data import RecoveryData, ReportData
from shallower.reporting.page import render, render_recovery


def report(folder: str | Path) -> tuple[ReportData | RecoveryData, Path | None]:
    """Render `report.html` anew from `report.json` of a pruned checkpoint, or from `recovery.json` and `plan.json` of
    one that `recover` wrote; returns the data and the page, None where it cannot be written, which is noted.

    Raises UserError when the folder has neither, PlanError when the plan cannot be read.
    """
    folder = expanded(folder)
    page, source = folder / PAGE, folder / RECOVERY
    if source.is_file():
        try:
            content = json.loads(source.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{source} cannot be read as what a recovery tells: {error}.") from None
        repaired = RecoveryData.from_json(content, str(source))
        rendered = render_recovery(PruningPlan.load(folder / PLAN), repaired, folder.resolve().name)
        return repaired, _written(page, rendered)
    if not (folder / REPORT).is_file():
        raise UserError(
            f"{folder} holds no {REPORT} and no {RECOVERY}: give a folder that `shallower prune --out` or "
            "`shallower recover --out` wrote."
        )
    data = ReportData.load(folder / REPORT)
    return data, _written(page, render(data))


def _written(page: Path, rendered: str) -> Path | None:
    try:
        write_text(page, rendered)
    except OutputError as error:  # the numbers can still be shown
        progress.note(f"the page was not made anew: {error}")
        return None
    return page
