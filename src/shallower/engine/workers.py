"""Who measures: threads of this process, each with a replica of the model's modules over the same weights.

On a processor one thread a batch beats all threads on one batch: small operations and waiting for the slowest thread
cost a fifth (measured on 2 cores: 27 µs a token and block with two threads on one batch, 23 with one thread on each).
"""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from shallower.anatomy.dissect import Anatomy
from shallower.anatomy.streamed import is_streamed
from shallower.checkpoint.determinants import is_untouched
from shallower.engine.evaluator import Evaluator, Job, Measured, shares

SHARE_OF_FREE_MEMORY = 0.25
CGROUP = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
MOST_THREADS = 8  # beyond this Python itself, of which one thread runs at a time, holds them up


class Workers(Protocol):
    """Runs jobs, in any order and on anything."""

    @property
    def count(self) -> int:
        """How many jobs run at a time."""

    def run(self, jobs: Sequence[Job], tick: Callable[[], None]) -> Iterator[Measured]:
        """Yield each job's result when it is there; `tick` is called for each route that is done."""

    def close(self) -> None:
        """Let go of what was started and kept for `run`. Nothing runs afterwards, until `run` is called again."""


class _Stopped(Exception):
    """Work that nobody waits for any more."""


class Threads:
    """Evaluators in threads that share weights and kept states."""

    def __init__(self, evaluator: Evaluator, count: int) -> None:
        """count: replicas; the threads of torch are divided among them."""
        self.count = count
        self._first = evaluator
        self._idle: queue.SimpleQueue[Evaluator] = queue.SimpleQueue()
        self._lock = threading.Lock()

    def run(self, jobs: Sequence[Job], tick: Callable[[], None]) -> Iterator[Measured]:
        if not jobs:
            return
        if self.count == 1:
            for job in jobs:
                yield self._first.measure(job, tick)
            return
        if self._idle.empty():  # made here, as a model cannot be copied while it runs
            for evaluator in (self._first, *(self._first.replica() for _ in range(self.count - 1))):
                self._idle.put(evaluator)
        idle = self._idle  # a thread that still runs when this is closed gives back to those that are let go
        jobs = shares(jobs, self._first.states, self.count)
        whole = torch.get_num_threads()
        share = max(1, whole // min(self.count, len(jobs)))
        stopped = threading.Event()

        def step() -> None:
            if stopped.is_set():
                raise _Stopped
            with self._lock:
                tick()

        def work(job: Job) -> Measured:
            evaluator = idle.get()
            try:
                return evaluator.measure(job, step)
            finally:
                idle.put(evaluator)

        pool = ThreadPoolExecutor(self.count, "shallower", initializer=torch.set_num_threads, initargs=(share,))
        try:
            for future in as_completed([pool.submit(work, job) for job in jobs]):
                yield future.result()
        finally:
            stopped.set()
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(whole)  # the number that threads made later begin with

    def close(self) -> None:
        """Let replicas and kept states go; the threads live only as long as `run`."""
        self._idle = queue.SimpleQueue()
        self._first.forget()


class Sweeps:
    """One evaluator that takes all batches through a block before the next: for a model whose blocks are streamed.

    Nothing is known of any route before all have passed the last block, so a sweep that is interrupted is lost.
    """

    count = 1

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator

    def run(self, jobs: Sequence[Job], tick: Callable[[], None]) -> Iterator[Measured]:
        for portion in self._evaluator.sweeps(jobs):
            yield from self._evaluator.sweep(portion, tick)

    def close(self) -> None:
        self._evaluator.forget()


def thread_count(anatomy: Anatomy) -> int:
    """How many threads are best: one a core on a processor, one for an accelerator, and for a model that is spread out
    or streamed.

    One, too, for a model that is not `is_untouched`: autocast is a thread's own, and what hooks on to a module or was
    put over its forward may call the modules it was made of, not a replica's.
    """
    model = anatomy.model
    if model.device.type != "cpu" or getattr(model, "hf_device_map", None) or is_streamed(model):
        return 1
    if not is_untouched(model):
        return 1
    return max(1, min(torch.get_num_threads(), MOST_THREADS))


def free_memory(device: torch.device) -> int:
    """Bytes of memory that are free on a device; on a processor, what can be had without swapping."""
    if device.type == "cuda":
        # what torch has from the device and does not use at the moment is as good as free
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return min(_available(), _allowed())


def free_beside(model: nn.Module) -> int:
    """Bytes that are free where a model is; of several devices, on the fullest one."""
    return min(free_memory(device) for device in {weight.device for weight in model.parameters()})


def usual_memory(model: nn.Module) -> int:
    """Bytes that the engine keeps besides a model unless told otherwise: a share of what is free where it is."""
    return int(free_beside(model) * SHARE_OF_FREE_MEMORY)


def place_for(needed: int, device: torch.device) -> torch.device:
    """The device where it has room for so many bytes, else the processor."""
    return device if needed <= free_memory(device) else torch.device("cpu")


def _available() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux
        return 8 << 30


def _allowed() -> int:
    """What limits of a container, a job or a service (cgroups) leave: the smallest of this process's group and of those
    that it is in.
    """
    free = sys.maxsize
    try:
        lines = OWN_GROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return free
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            root, files = CGROUP, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root, files = CGROUP / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = root / path.lstrip("/")  # in a container it may be one of the host's, and `root` is the container's
        for folder in (group, *group.parents):
            if folder.is_relative_to(root):
                free = min(free, _left(folder, *files))
    return free


def _left(group: Path, limit: str, used: str, unread: str) -> int:
    """Bytes that a group may still take. Pages of files that were not read lately count as free: they make way."""
    try:
        most, now = (int((group / name).read_text()) for name in (limit, used))
        held = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such limit
        return sys.maxsize
    return most - now + int(held.get(unread, 0))
