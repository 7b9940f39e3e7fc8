"""What goes to stdout, and files that a verb may write. Imports rich inside functions only."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shallower.defaults import LENGTH, SEQUENCES
from shallower.errors import OutputError
from shallower.files import require_writable
from shallower.plan import Gone, ModelIdentity
from shallower.strict_json import spelled
from shallower.units import Unit, listed

if TYPE_CHECKING:
    from rich.console import Console

PIPED_WIDTH = 160
"""Columns of a table that does not go to a terminal."""


def screen() -> Console:
    """Where a person reads: as wide as the terminal, or wide where there is none, so that no table is cut in a file."""
    from rich.console import Console

    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=PIPED_WIDTH if piped else None, highlight=False, markup=False, emoji=False)


def say(console: Console, sentences: str) -> None:
    """Print sentences: on a terminal broken between words, elsewhere, where programs may read them, unbroken."""
    console.print(sentences, soft_wrap=not console.is_terminal)


def print_json(data: Mapping[str, Any]) -> None:
    """Print one JSON document. JSON has no infinity: what is not finite becomes the string `inf`, `-inf` or `nan`."""
    sys.stdout.write(json.dumps(spelled(data), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def require_free(path: Path | None, *, force: bool) -> None:
    """Refuse an output file before any work is done.

    Raises OutputError when it exists and `force` is off, or when nothing can be written there.
    """
    if path is None:
        return
    if path.is_dir():
        raise OutputError(f"--out {path} is a folder; name a file.")
    if path.exists() and not force:
        raise OutputError(f"--out {path} exists; name another file, or add --force to replace it.")
    require_writable(path, f"--out {path}")


def typed(word: object) -> str:
    """A word as it is typed in a shell, in quotes where it needs them."""
    return shlex.quote(str(word))


def typed_again(text: str | None, size: tuple[int, int], seed: int, dtype: str, *, trust_remote_code: bool) -> str:
    """Options of a verb that its next step needs, too, with a blank before each; none where it is the default.

    text: what was read. size: how many sequences of it, of how many tokens.
    """
    given = {
        "--calibration": (text, None),
        "--sequences": (size[0], SEQUENCES),
        "--length": (size[1], LENGTH),
        "--seed": (seed, 0),
        "--dtype": (dtype, "auto"),
    }
    told = "".join(f" {name} {typed(value)}" for name, (value, default) in given.items() if value != default)
    return told + " --trust-remote-code" * trust_remote_code


def print_written(
    console: Console, path: Path | None, what: str, next_step: str = "", *, metavar: str = "FILE"
) -> None:
    """Say where a file is and what to type next, or how to get the file. metavar: what --out names."""
    if path is None:
        console.print(f"\nNothing was written; add --out {metavar} to keep {what}.")
        return
    console.print(f"\nWrote {what} to {path}", soft_wrap=True)
    if next_step:
        console.print(f"Next: {next_step}", soft_wrap=True)


def print_places(console: Console, folder: Path, page: Path | None) -> None:
    """Print where a checkpoint and its page are. page: None where it could not be written."""
    console.print(f"\nModel: {folder}" + (f"\nPage:  {page}" if page is not None else ""), soft_wrap=True)


def print_removed(console: Console, removed: Sequence[Unit], model: ModelIdentity, gone: Gone | None = None) -> None:
    """Print which blocks and sublayers go. gone: None where no model was loaded."""
    from shallower.reporting.wording import by_kind, percent, plural

    parts = []
    for amount, units in by_kind(removed).items():
        told = f"{len(units)} of {plural(model.blocks, 'block')}" if units[0].kind == "block" else amount
        parts.append(f"{told}: {listed(units, ', ')}")
    console.print(f"Removes {'; '.join(parts) or 'nothing'}{' (numbered from 0)' if parts else ''}.")
    if gone is not None:
        share = percent(gone.parameters, gone.of_model)
        told = ", embeddings counted" if gone.of_blocks is None else ""
        told = told or f"; {percent(gone.parameters, gone.of_blocks or 0)} of those in blocks"
        console.print(f"That is {gone.parameters:,} of {gone.of_model:,} parameters ({share}{told}).")
