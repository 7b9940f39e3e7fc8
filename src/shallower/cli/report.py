"""`shallower report`: the page again, from the numbers that are in the folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument

from shallower.cli.prune import pruned_answer
from shallower.cli.recover import recovered_answer
from shallower.cli.verb import Answer, verb
from shallower.filenames import PLAN
from shallower.plan import PruningPlan


@verb
def report(
    folder: Annotated[
        Path,
        Argument(
            metavar="FOLDER", help="A checkpoint that 'shallower prune --out' or 'shallower recover --out' wrote."
        ),
    ],
) -> Answer:
    """Show what a removal or a repair did, and rebuild its page."""
    from shallower.reporting.data import ReportData
    from shallower.verbs.report import report as run

    data, page = run(folder)
    if isinstance(data, ReportData):
        return pruned_answer(data, folder, page)
    return recovered_answer(PruningPlan.load(folder / PLAN), data, folder, page)
