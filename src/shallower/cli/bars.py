"""Progress bars on a terminal. Imports rich, so it is imported only where there is one."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task
from rich.text import Text

from shallower.progress import Listener, Reader, Step, amount

BRIEF = 0.5
"""Seconds that a task has to take for a terminal to keep a line of it."""

_SPINNER, _BAR, _AMOUNT, _TIMES = 1, 16, 9, 19  # columns: of amounts and times what most take
_LEAST = 16  # columns of a description on the narrowest terminal


class Description(ProgressColumn):
    """What is done, shortened in the middle to what a terminal of `width` columns leaves to it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        gaps = 4
        self.most = max(_LEAST, width - _SPINNER - _BAR - _AMOUNT - _TIMES - gaps)

    def render(self, task: Task) -> Text:
        return Text(shortened(task.description, self.most), no_wrap=True)


class Done(ProgressColumn):
    """How much is done: nothing as long as there is nothing to tell."""

    def render(self, task: Task) -> Text:
        done, total = int(task.completed), task.total
        if not isinstance(total, int | None):  # Parts stay what they are
            total = int(total)
        told = "" if total is None and not done else amount(done, total, "/")
        return Text(told, style="progress.download", no_wrap=True)


class Times(ProgressColumn):
    """Time since the start and, where there is an end to come, about how long until then."""

    def render(self, task: Task) -> Text:
        told = _clock(task.elapsed or 0)
        if task.total is not None and task.time_remaining is not None:
            told += f", ~{_clock(task.time_remaining)} left"
        return Text(told, style="progress.elapsed", no_wrap=True)


@contextlib.contextmanager
def bars() -> Iterator[tuple[Listener, Reader]]:
    """A bar for each task at work; a task that took a while leaves a line when it is done."""
    console = Console(stderr=True, highlight=False)
    columns = (SpinnerColumn(), Description(console.width), BarColumn(bar_width=_BAR), Done(), Times())
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


def shortened(text: str, most: int) -> str:
    """At most so many characters, with `…` for what is left out of the middle."""
    if len(text) <= most:
        return text
    tail = (most - 1) // 2
    return f"{text[: most - 1 - tail]}…{text[len(text) - tail :]}"


def _clock(seconds: float) -> str:
    """`0:07`, `12:30`, `1:02:03`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
