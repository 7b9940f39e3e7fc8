"""`shallower corpus`: build calibration sets, look at them, and clean text."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option, Typer

from shallower.cli import options
from shallower.cli.output import print_written, require_free, typed
from shallower.cli.verb import Answer, verb
from shallower.defaults import LENGTH, SEQUENCES
from shallower.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from shallower.corpus import CalibrationSet

app = Typer(help="Build and show calibration sets, and clean text.", rich_markup_mode=None)

_SHOWN_TEXTS = 3

TokenizerModel = Annotated[
    str, Option("--model", metavar="MODEL", help="Whose tokenizer makes the tokens: as MODEL of 'shallower score'.")
]


@app.command("build")
@verb
def build(
    spec: Annotated[
        str,
        Argument(metavar="SPEC", help="Text, a mixture (a.jsonl*0.7+b.jsonl*0.3?dedup=0.8), or a .yaml specification."),
    ],
    model: TokenizerModel,
    out: Annotated[
        Path | None,
        Option("--out", metavar="FOLDER", help="Write the set here, for --calibration. Default: only show it."),
    ] = None,
    sequences: options.TextSequences = SEQUENCES,
    length: options.Length = LENGTH,
    force: options.Force = False,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    trust_remote_code: options.RemoteCode = False,
) -> Answer:
    """Build the calibration set that a specification describes, and save it for reuse byte for byte."""
    from shallower.verbs.corpus import beginnings
    from shallower.verbs.corpus import build as run

    made, tokenizer = run(
        spec,
        model,
        sequences=sequences,
        length=length,
        seed=seed,
        out=out,
        force=force,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    first = beginnings(made, tokenizer, _SHOWN_TEXTS)

    def show(console: Console) -> None:
        _show_set(console, made, first)
        print_written(
            console,
            out,
            "the set",
            f"shallower search {typed(model)} --remove 25% --calibration {typed(out)}",
            metavar="FOLDER",
        )

    return Answer(made.to_json() | {"beginnings": first}, show)


@app.command("show")
@verb
def show(
    spec: Annotated[str, Argument(metavar="SET", help="A folder from 'shallower corpus build', or a specification.")],
    model: Annotated[
        str | None,
        Option("--model", metavar="MODEL", help="Decode with this model's tokenizer. Default: show no texts of a set."),
    ] = None,
    texts: Annotated[int, Option("--texts", metavar="N", min=0, help="How many sequences to show.")] = _SHOWN_TEXTS,
    sequences: options.TextSequences = SEQUENCES,
    length: options.Length = LENGTH,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    trust_remote_code: options.RemoteCode = False,
) -> Answer:
    """Show where the tokens of a set come from, and its first texts."""
    from shallower.corpus import CalibrationSet, is_saved

    folder = os.path.expanduser(spec)
    of_building = {
        "--sequences": None if sequences == SEQUENCES else sequences,
        "--length": None if length == LENGTH else length,
        "--seed": seed or None,
        "--device": None if device == "auto" else device,
        "--dtype": None if dtype == "auto" else dtype,
    }
    given = [name for name, value in of_building.items() if value is not None]
    if given and is_saved(folder):
        raise UserError(f"{spec} is a saved set, and shown as it is: leave out {', '.join(given)}.")
    if model is None:
        of_texts = {
            "--texts": None if texts == _SHOWN_TEXTS else texts,
            "--trust-remote-code": trust_remote_code or None,
        }
        options.require_reader(of_texts, "a --model")
        if not is_saved(folder):
            raise UserError(f"{spec} is no saved set, and building it takes a tokenizer: add --model MODEL.")
        made, first = CalibrationSet.load(folder), list[str]()
    else:
        from shallower.verbs.corpus import beginnings
        from shallower.verbs.corpus import build as run

        made, tokenizer = run(
            spec,
            model,
            sequences=sequences,
            length=length,
            seed=seed,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )
        first = beginnings(made, tokenizer, texts)
    return Answer(made.to_json() | {"beginnings": first}, lambda console: _show_set(console, made, first))


@app.command("clean")
@verb
def clean(
    text: Annotated[str, Argument(metavar="TEXT", help="A .txt, .jsonl or .parquet file, a folder, or a data set.")],
    out: Annotated[
        Path | None,
        Option(
            "--out", metavar="FILE", help="Write the rows that stay here, as JSON lines. Default: only show findings."
        ),
    ] = None,
    dedup: Annotated[
        float,
        Option(
            "--dedup",
            metavar="SIMILARITY",
            min=0,
            max=1,
            help="Documents are duplicates if their five-word runs are at least this alike (Jaccard); 0 keeps them.",
        ),
    ] = 0.8,
    min_quality: Annotated[
        float, Option("--min-quality", metavar="SCORE", min=0, max=1, help="Drop documents of lower quality.")
    ] = 0.0,
    quality: options.Quality = "rules",
    against: Annotated[
        list[str] | None,
        Option(
            "--against",
            metavar="FILE",
            help="An evaluation set to look for in what stays, by runs of 13 words; repeatable. Default: none.",
        ),
    ] = None,
    report: Annotated[
        Path | None,
        Option("--report", metavar="FOLDER", help="Write a page, a figure and all clusters here. Default: none."),
    ] = None,
    datatrove: Annotated[
        Path | None,
        Option(
            "--datatrove",
            metavar="FOLDER",
            help="For text that does not fit in memory: work in this folder, with datatrove; the same command resumes "
            "there. Default: in memory.",
        ),
    ] = None,
    workers: Annotated[
        int | None, Option("--workers", metavar="N", min=1, help="Processes for --datatrove. Default: 1.")
    ] = None,
    force: options.Force = False,
) -> Answer:
    """Leave out duplicates, near-duplicates and text of low quality."""
    require_free(out, force=force)
    if datatrove is not None:
        return _clean_on_disk(text, datatrove, out, dedup, min_quality, quality, against, report, workers or 1)
    if workers is not None:
        raise UserError("--workers are processes of --datatrove FOLDER, and without it there is one: add it.")
    from shallower.verbs.corpus import PAGE
    from shallower.verbs.corpus import clean as run

    found = run(
        text,
        out,
        dedup=dedup or None,
        min_quality=min_quality,
        quality=quality,
        against=against or (),
        report=report,
        force=force,
    )

    def show(console: Console) -> None:
        from shallower.reporting.corpus import OVERLAP_HEAD, clean_table, overlap_rows, summary

        console.print(clean_table(summary(found.cleaning.counts)))
        if found.overlaps:
            console.print(clean_table(overlap_rows(found.overlaps), OVERLAP_HEAD))
        if report is not None:
            console.print(f"\nThe page is {report / PAGE}", soft_wrap=True)
        _print_kept(console, out)

    return Answer(found.to_json(), show)


def _clean_on_disk(
    text: str,
    folder: Path,
    out: Path | None,
    dedup: float,
    min_quality: float,
    quality: str,
    against: list[str] | None,
    report: Path | None,
    workers: int,
) -> Answer:
    if against or report is not None:
        raise UserError(
            f"{'--against' if against else '--report'} is not there with --datatrove: write --out FILE first, then run "
            "this on that file, with --dedup 0 and without --datatrove."
        )
    if not dedup:
        raise UserError("--dedup 0 looks for no duplicates, which takes no memory: leave --datatrove out.")
    from shallower.verbs.corpus import clean_on_disk

    counts = clean_on_disk(text, folder, out, dedup=dedup, min_quality=min_quality, quality=quality, workers=workers)

    def show(console: Console) -> None:
        from shallower.reporting.corpus import clean_table, summary

        console.print(clean_table(summary(counts)))
        _print_kept(console, out)

    return Answer(counts.to_json(), show)


def _print_kept(console: Console, out: Path | None) -> None:
    print_written(console, out, "what stays", f"shallower search MODEL --remove 25% --calibration {typed(out)}")


def _show_set(console: Console, made: CalibrationSet, first: list[str]) -> None:
    from shallower.reporting.corpus import source_table

    console.print(f"{made.sequences} sequences of {made.length}, {made.tokens:,} tokens, {made.digest}", soft_wrap=True)
    console.print(f"Specification: {made.spec}", soft_wrap=True)
    console.print(source_table(made))
    for number, text in enumerate(first):
        console.print(f"[{number}] {text}", soft_wrap=True)
