"""Processes that share the tasks of a folder. No other command works there meanwhile, and none outlives its own.

Whoever works in the folder shares a lock on a file in it; a command begins only when nobody does. So it is refused
also while a process of a command that was killed has not ended yet.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import multiprocess

from shallower.errors import CorpusError

LOCK = "work.lock"
_LOOK_SECONDS = 2.0

Each = Callable[[Callable[[int], None], Sequence[int]], Iterable[None]]


@contextlib.contextmanager
def processes(workers: int, folder: Path) -> Iterator[Each]:
    """Yields what calls a function with each of some numbers, in so many processes; in this one when they are 1.

    Raises CorpusError when another command works in `folder`, or a process was killed.
    """
    with (folder / LOCK).open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # not atomic: another may have come between
        except BlockingIOError:
            raise CorpusError(
                f"another command works in {folder}: wait until it has ended, or name another folder."
            ) from None
        if workers == 1:
            yield map
            return
        # not by fork: torch has threads
        context = multiprocess.get_context("spawn")
        with context.Pool(workers, initializer=_join, initargs=(folder / LOCK,)) as pool:
            yield _shared_among(pool)


def _shared_among(pool: multiprocess.pool.Pool) -> Each:
    first = {process.pid for process in pool._pool}

    def each(function: Callable[[int], None], numbers: Sequence[int]) -> Iterator[None]:
        results = pool.imap_unordered(function, numbers)
        for _ in numbers:
            while True:
                try:
                    results.next(timeout=_LOOK_SECONDS)
                    break
                except multiprocess.TimeoutError:
                    # a pool replaces a process that was killed, but what it worked on never comes
                    if first != {process.pid for process in pool._pool}:
                        raise CorpusError(
                            "a process was killed, as for its memory: run the same command again with fewer "
                            "--workers; what is done is kept."
                        ) from None
            yield

    return each


def _join(lock: Path) -> None:
    """What a process does first: it holds the lock until it ends, which it does with the first process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends the others, and says so
    fcntl.flock(os.open(lock, os.O_RDWR), fcntl.LOCK_SH | fcntl.LOCK_NB)
    threading.Thread(target=_end_with, args=(multiprocess.parent_process(),), daemon=True).start()


def _end_with(parent: multiprocess.Process) -> None:
    parent.join()
    os._exit(1)
