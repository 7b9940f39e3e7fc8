"""Progress on stderr: bars on a terminal, a line for each finished task elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

from shallower import progress
from shallower.progress import Listener, Step, amount

REPORT_EVERY = 60.0
"""Seconds after which a task that is still at work says so, where there is no terminal."""


@contextlib.contextmanager
def working(*, quiet: bool) -> Iterator[None]:
    """Show the progress of what is done inside, and send what it prints to stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        if quiet:
            yield
        elif sys.stderr.isatty():
            from shallower.cli.bars import bars

            with bars() as (listener, reader), progress.listening(listener, reader):
                yield
        else:
            with progress.listening(lines(), _say):
                yield


def lines() -> Listener:
    """A listener that prints a line to stderr when a task is done, and every minute of a long one."""
    depth = 0

    @contextlib.contextmanager
    def listener(description: str, total: int | None) -> Iterator[Step]:
        nonlocal depth
        start = said = time.monotonic()
        done = 0
        indent = "  " * depth

        def step(n: int = 1) -> None:
            nonlocal done, said
            done += n
            now = time.monotonic()
            if now - said >= REPORT_EVERY:
                said = now
                _say(f"{indent}{description}: {amount(done, total)} after {now - start:.0f} s")

        depth += 1
        try:
            yield step
        finally:
            depth -= 1
        _say(f"{indent}{description}: {time.monotonic() - start:.1f} s")

    return listener


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
