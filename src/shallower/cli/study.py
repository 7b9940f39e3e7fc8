"""`shallower study`: what decides which blocks go, calibration or search?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from shallower.cli import options
from shallower.cli.output import say
from shallower.cli.verb import Answer, verb
from shallower.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console


@verb
def study(
    file: Annotated[Path, Argument(metavar="STUDY", help="A YAML file that says what to vary; see docs/study.md.")],
    out: Annotated[
        Path | None,
        Option(
            "--out",
            metavar="FOLDER",
            help="Write results and page here; resumes an interrupted study. Default: STUDY without .yaml.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        Option("--dry-run", help="Estimate the cost from a few timed sets; search nothing. Default: run it."),
    ] = False,
    memory: options.Memory = None,
    workers: options.MeasuredBy = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    trust_remote_code: options.RemoteCode = False,
) -> Answer:
    """Compare calibration sets, objectives and searches on a grid.

    Each cell gives a plan, its loss, held-out perplexities and task accuracies; the page says what they depend on.
    """
    if file.is_dir():
        raise UserError(f"{file} is a folder; name a study, which is a YAML file.")
    folder = file.with_suffix("") if out is None else out
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file; name a folder.")
    from shallower.verbs.study import study as run
    from shallower.verbs.study_cost import estimate

    if dry_run:
        if memory is not None or workers is not None:
            raise UserError(
                "--dry-run times some sets in this process, in the memory that is free: leave --memory and --workers "
                "out, or run the study with them."
            )
        cost = estimate(file, folder, device=device, dtype=dtype, trust_remote_code=trust_remote_code)

        def tell(console: Console) -> None:
            failing = f" and {cost.failing:,} that cannot be measured" if cost.failing else ""
            ratio = f", {cost.alone / cost.seconds:.1f} times less than cell by cell" if cost.seconds else ""
            say(
                console,
                f"{cost.cells:,} cells, {cost.done:,} of them done{failing}. The rest needs {cost.candidates:,} "
                f"candidate sets: about {_spoken(cost.seconds)} if no race ends early{ratio}. Held-out texts are "
                "extra.",
            )

        return Answer(vars(cost), tell)
    finished = run(
        file,
        folder,
        memory=memory,
        workers=workers,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    from shallower.reporting.study import agreements_table, failures_table, shares_table, write_pages

    pages = write_pages(finished.folder, finished.results, finished.findings)

    def show(console: Console) -> None:
        if finished.findings.agreements:
            console.print(agreements_table(finished.findings))
        if finished.findings.decompositions:
            console.print(shares_table(finished.findings))
        say(console, finished.findings.answer)
        if finished.findings.failures:
            console.print(failures_table(finished.results, finished.findings))
        console.print(f"\nPage:    {pages[0]}\nNumbers: {pages[1]}", soft_wrap=True)

    return Answer({"folder": str(finished.folder), **finished.findings.to_json()}, show)


def _spoken(seconds: float) -> str:
    """`40 seconds`, `12 minutes`, `2.5 hours`."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
