"""`shallower report`: the page again, from the numbers that are in the folder."""

from __future__ import annotations

from pathlib import Path

from shallower.errors import UserError
from shallower.files import expanded, write_text
from shallower.reporting.data import ReportData
from shallower.reporting.page import render


def report(folder: str | Path) -> tuple[ReportData, Path]:
    """Render `report.html` anew from `report.json` of a pruned checkpoint; returns the data and the page.

    Raises UserError when the folder has no report.
    """
    folder = expanded(folder)
    source = folder / "report.json"
    if not source.is_file():
        raise UserError(f"{folder} holds no report.json: give the folder that `shallower prune --out` wrote.")
    data = ReportData.load(source)
    page = folder / "report.html"
    write_text(page, render(data))
    return data, page
