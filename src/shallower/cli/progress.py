"""Progress on stderr: bars on a terminal, a line for each finished task elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

from shallower import progress
from shallower.progress import Listener, Reader, Step

REPORT_EVERY = 60.0
"""Seconds after which a task that is still at work says so, where there is no terminal."""

BRIEF = 0.5
"""Seconds that a task has to take for a terminal to keep a line of it."""


@contextlib.contextmanager
def working(*, quiet: bool) -> Iterator[None]:
    """Show the progress of what is done inside, and send what it prints to stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        if quiet:
            yield
        elif sys.stderr.isatty():
            with _bars() as (listener, reader), progress.listening(listener, reader):
                yield
        else:
            with progress.listening(lines(), _say):
                yield


@contextlib.contextmanager
def _bars() -> Iterator[tuple[Listener, Reader]]:
    """A bar for each task at work; a task that took a while leaves a line when it is done."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column

    console = Console(stderr=True, highlight=False)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    depth = 0
    with Progress(*columns, console=console, transient=True) as display:

        @contextlib.contextmanager
        def listener(description: str, total: int | None) -> Iterator[Step]:
            nonlocal depth
            start = time.monotonic()
            task = display.add_task("  " * depth + description, total=total)
            depth += 1
            try:
                yield lambda n=1: display.advance(task, n)
            finally:
                depth -= 1
                display.remove_task(task)
            seconds = time.monotonic() - start
            if seconds >= BRIEF:
                console.print(f"{'  ' * depth}{description}: {seconds:.1f} s", style="dim", markup=False)

        yield listener, lambda sentence: console.print(sentence, style="dim", markup=False)


def lines() -> Listener:
    """A listener that prints a line to stderr when a task is done, and every minute of a long one."""
    depth = 0

    @contextlib.contextmanager
    def listener(description: str, total: int | None) -> Iterator[Step]:
        nonlocal depth
        start = said = time.monotonic()
        done = 0
        indent = "  " * depth
        whole = "" if total is None else f" of {total}"

        def step(n: int = 1) -> None:
            nonlocal done, said
            done += n
            now = time.monotonic()
            if now - said >= REPORT_EVERY:
                said = now
                _say(f"{indent}{description}: {done}{whole} after {now - start:.0f} s")

        depth += 1
        try:
            yield step
        finally:
            depth -= 1
        _say(f"{indent}{description}: {time.monotonic() - start:.1f} s")

    return listener


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
