"""`shallower report`: the page again, from the numbers that are in the folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument

from shallower.cli.prune import pruned_answer
from shallower.cli.verb import Answer, verb


@verb
def report(
    folder: Annotated[
        Path, Argument(metavar="FOLDER", help="A pruned checkpoint, as 'shallower prune --out' writes it.")
    ],
) -> Answer:
    """Show what a removal cost, and rebuild its page."""
    from shallower.verbs.report import report as run

    data, _ = run(folder)
    return pruned_answer(data, folder)
