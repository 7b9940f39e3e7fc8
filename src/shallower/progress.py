"""Progress of long work, reported to whoever listens.

The library is silent unless a listener is installed; the command line installs a rich one. Code that takes long writes

    with progress.task("measuring", total=30) as step:
        for unit in units:
            ...
            step()
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

Step = Callable[..., None]  # step(n=1)
Listener = Callable[[str, int | None], AbstractContextManager[Step]]

Reader = Callable[[str], None]


class Parts(int):
    """A total of steps that are parts of work which goes on until its time is over, and no pieces of it."""


PARTS = Parts(1000)

_listener: ContextVar[Listener | None] = ContextVar("progress_listener", default=None)
_reader: ContextVar[Reader | None] = ContextVar("progress_reader", default=None)


@contextmanager
def listening(listener: Listener, reader: Reader | None = None) -> Iterator[None]:
    """Send progress inside the `with` to `listener(description, total)`, and notes to `reader(sentence)`."""
    tokens = _listener.set(listener), _reader.set(reader)
    try:
        yield
    finally:
        _listener.reset(tokens[0])
        _reader.reset(tokens[1])


@contextmanager
def silent() -> Iterator[None]:
    """Tell nobody of what is done inside the `with`: for many small pieces of one work that reports as a whole."""
    tokens = _listener.set(None), _reader.set(None)
    try:
        yield
    finally:
        _listener.reset(tokens[0])
        _reader.reset(tokens[1])


def note(sentence: str) -> None:
    """Tell whoever listens something about the work that is not in its result, such as what it cost."""
    reader = _reader.get()
    if reader is not None:
        reader(sentence)


@contextmanager
def task(description: str, total: int | None = None) -> Iterator[Step]:
    """Announce a piece of work of `total` steps; yields `step(n=1)` to report advance."""
    listener = _listener.get()
    if listener is None:
        yield lambda n=1: None
        return
    with listener(description, total) as step:
        yield step


def amount(done: int, total: int | None, between: str = " of ") -> str:
    """`3 of 30`, or the share of what is counted in parts."""
    if isinstance(total, Parts):
        return f"{100 * done // total} %"
    return f"{done}" if total is None else f"{done}{between}{total}"
