"""Workers in processes of their own, on one machine or many: Ray actors, each with a replica of the model.

A batch has a home, the worker that measures it while it lives, because the states that it kept are there. A worker that
is lost is replaced; until the new one has its model, workers that have nothing left to do take its jobs. Who measures a
job changes nothing in its result.
"""

from __future__ import annotations

import hashlib
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from shallower import progress
from shallower.anatomy.dissect import dissect
from shallower.checkpoint.determinants import beside_weights, code_of_model, round_as, rounding
from shallower.checkpoint.fingerprint import checksum
from shallower.checkpoint.load import load_model
from shallower.checkpoint.own_code import own_code
from shallower.checkpoint.stock import copied
from shallower.corpus.calibration import Batch
from shallower.engine.evaluator import Evaluator, Job, Measured, Order, shares
from shallower.engine.method_code import is_ours
from shallower.engine.ray_session import Session, connect
from shallower.engine.states import States
from shallower.engine.workers import usual_memory
from shallower.errors import ModelTooLarge, ShallowerError, UserError
from shallower.registry import Method, source_of
from shallower.version import __version__

MOST_DEATHS = 3  # of one worker in a row, with nothing measured in between
PATIENCE = 600  # seconds that nothing happens while no worker has its model


@dataclass(frozen=True)
class Checkpoint:
    """Where the weights can be read on another machine. `checksum` tells whether they are the same ones, and `config`,
    their `beside_weights`, whether the model computes the same with them.
    """

    folder: str
    name: str
    revision: str | None
    checksum: str
    config: str
    dtype: str
    trust_remote_code: bool

    def load(self, device: str) -> PreTrainedModel | None:
        """The model, or None where it is not to be had.

        Raises ModelTooLarge where it is, and there is no room for it: none would come of being sent it, either.
        """
        places: list[tuple[str, str | None]] = [(self.folder, None)] if Path(self.folder).is_dir() else []
        if self.revision is not None:
            places.append((self.name, self.revision))
        for place, revision in places:
            try:
                loaded = load_model(
                    place,
                    dtype=self.dtype,
                    device=device,
                    trust_remote_code=self.trust_remote_code,
                    revision=revision,
                )
            except ModelTooLarge as error:
                ours = ", and the first GPU also holds that of this process" if device == "cuda" else ""
                raise ModelTooLarge(f"{error} Each worker holds a copy{ours}: give fewer --workers.") from error
            except ShallowerError:
                continue
            if (checksum(loaded.model), beside_weights(loaded.model)) == (self.checksum, self.config):
                return loaded.model
        return None


@dataclass(frozen=True)
class Setup:
    """All that a worker needs besides the model. memory: bytes on each machine, which `neighbours` workers divide; None
    for a share of what is free on its device, which `sharing` workers divide.

    rounding: of products, see `rounding`.
    """

    batches: Sequence[Batch]
    objective: Method
    options: Mapping[str, Any]
    order: Order | None
    device: str
    threads: int
    memory: int | None
    neighbours: int
    sharing: int
    rounding: str | tuple[str, str] = field(default_factory=rounding)

    def memory_of_one(self, model: PreTrainedModel) -> int:
        """Bytes for one worker, which holds `model`."""
        if self.memory is not None:
            return self.memory // self.neighbours
        return usual_memory(model) // self.sharing


class Worker:
    """What runs in an actor's process."""

    def __init__(self) -> None:
        self._evaluator: Evaluator | None = None

    def prepare(self, setup: Setup, source: PreTrainedModel | Checkpoint) -> list[str] | None:
        """Get ready to measure, and tell with what `_code`; None when the checkpoint is not to be had here."""
        torch.set_num_threads(setup.threads)
        round_as(setup.rounding)
        model = source.load(setup.device) if isinstance(source, Checkpoint) else source.to(setup.device)
        if model is None:
            return None
        share = setup.memory_of_one(model)
        self._evaluator = Evaluator(
            dissect(model),
            setup.batches,
            setup.objective,
            setup.options,
            states=States(share // 2),
            memory=share // 2,
            order=setup.order,
        )
        objective = setup.objective
        return _code(model) + _code_of(objective, source_of(objective.function) if _is_imported(objective) else None)

    def measure(self, job: Job) -> Measured:
        """Measure the job's routes on its batch."""
        assert self._evaluator is not None
        return self._evaluator.measure(job)


@dataclass(eq=False)
class _Place:
    """Where a worker is, or will be again. waiting: what Ray was asked last, None when it is idle or given up."""

    actor: Any = None
    waiting: Any = None
    ready: bool = False
    job: Job | None = None
    queue: deque[Job] = field(default_factory=deque)
    deaths: int = 0


class RayWorkers:
    """Evaluators in Ray actors. Connects and starts them when first needed."""

    def __init__(
        self,
        evaluator: Evaluator,
        asked: int | str,
        *,
        memory: int | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        """evaluator: what to copy. asked: how many on this machine, or the address of a cluster, all of which is used
        where it has no limit (`auto:4`).

        memory: bytes on each machine. checkpoint: where workers read the weights; without it they are sent.
        """
        self._evaluator = evaluator
        self._asked = asked
        self._memory = memory
        self._checkpoint = checkpoint
        self._places: list[_Place] = []

    @cached_property
    def _session(self) -> Session:
        return connect(self._asked, self._evaluator.anatomy.model.device)

    @property
    def count(self) -> int:
        return self._session.count

    def run(self, jobs: Sequence[Job], tick: Callable[[], None]) -> Iterator[Measured]:
        """Yield each job's result when it is there; `tick` is called for each of its routes then.

        Raises UserError when every worker dies again and again.
        """
        if not jobs:
            return
        if all(place.actor is None for place in self._places):  # none yet, or all were given up
            self._places = [_Place() for _ in range(self.count)]
            for place in self._places:
                self._start(place)
        left = self._assign(jobs)
        try:
            while left:
                for place in self._places:
                    self._feed(place)
                for place in self._next():
                    measured = self._receive(place)
                    if measured is not None:
                        left -= 1
                        for _ in measured.sums:
                            tick()
                        yield measured
        finally:  # what is under way, if this is left early, nobody asks for any more
            for place in self._places:
                place.queue.clear()
                place.job = None

    def close(self) -> None:
        """End the workers, and Ray where it was started for them."""
        if "_session" not in self.__dict__:
            return
        session = self.__dict__.pop("_session")
        for name in ("_setup", "_model"):
            self.__dict__.pop(name, None)
        places, self._places = self._places, []
        if session.ray.is_initialized():
            for place in places:
                if place.actor is not None:
                    session.ray.kill(place.actor)
            session.close()

    @cached_property
    def _setup(self) -> Any:
        """The setup in Ray's object store."""
        evaluator, session = self._evaluator, self._session
        device = evaluator.anatomy.model.device.type  # Ray shows a worker its own GPUs alone
        return session.ray.put(
            Setup(
                evaluator.batches,
                evaluator.objective,
                evaluator.options,
                evaluator.order,
                device,
                session.threads,
                self._memory,
                session.neighbours,
                session.sharing,
            )
        )

    @cached_property
    def _model(self) -> Any:
        """The model in Ray's object store, put there when the first worker needs it."""
        return self._session.ray.put(_on_cpu(self._evaluator.anatomy.model))

    def _start(self, place: _Place) -> None:
        actor = self._session.ray.remote(Worker).options(**self._session.placement)
        place.actor, place.ready = actor.remote(), False
        self._prepare(place)

    def _prepare(self, place: _Place) -> None:
        source = self._model if self._checkpoint is None else self._checkpoint
        place.waiting = place.actor.prepare.remote(self._setup, source)

    def _assign(self, jobs: Sequence[Job]) -> int:
        """Queue the jobs, each at the home of its batch; parts of a divided one where least is to do. Returns how many.

        The same jobs always go the same way, to the states that were kept for them.
        """
        count = len(self._places)
        divided = shares(jobs, States(0), count)
        homes: set[int] = set()
        rest = []
        for job in divided:
            if job.number in homes:
                rest.append(job)
            else:
                homes.add(job.number)
                self._places[job.number % count].queue.append(job)
        for job in rest:
            near = [self._places[(job.number + step) % count] for step in range(count)]
            min(near, key=lambda place: len(place.queue)).queue.append(job)
        return len(divided)

    def _feed(self, place: _Place) -> None:
        """Give an idle worker its next job, or one of a worker that is not there."""
        if not place.ready or place.waiting is not None:
            return
        absent = [other.queue for other in self._places if not other.ready and other.queue]
        queue = next((queue for queue in (place.queue, *absent) if queue), None)
        if queue:
            place.job = queue.popleft()
            place.waiting = place.actor.measure.remote(place.job)

    def _next(self) -> list[_Place]:
        """Wait for whoever has something to say."""
        asked = {place.waiting: place for place in self._places if place.waiting is not None}
        done, _ = self._session.ray.wait(list(asked), num_returns=1, timeout=PATIENCE)
        if not done and not any(place.ready for place in self._places):
            raise UserError(
                f"Ray gave no worker within {PATIENCE} s; see `ray status` for what its machines are busy with, or "
                "drop --workers to measure in this process."
            )
        return [asked[reference] for reference in done]

    def _receive(self, place: _Place) -> Measured | None:
        """Take what a worker says: a result, that it is ready, that it lacks the model, or that it died."""
        exceptions = self._session.ray.exceptions
        reference, place.waiting = place.waiting, None
        try:
            answer = self._session.ray.get(reference)
        except exceptions.RayTaskError as error:  # what the worker itself raised
            if not place.ready:  # it may have room for the model when the next question comes
                self._prepare(place)
            elif place.job is None:  # of a question that was left early
                return None
            raise error.cause from error
        except exceptions.RayError as error:  # it died, was killed for its memory, or its machine or result is gone
            self._bury(place, error)
            return None
        if isinstance(answer, Measured):
            job, place.job, place.deaths = place.job, None, 0
            return answer if job is not None else None
        if answer is None:
            place.waiting = place.actor.prepare.remote(self._setup, self._model)
        elif other := sorted({*answer} - {*self._expected()}):
            self._prepare(place)
            raise UserError(
                f"a worker runs other code than this process ({', '.join(other)}): install the same versions of "
                "shallower and transformers, and put the same files of the model's and the objective's own code, on "
                "every machine."
            )
        else:
            place.ready = True
        return None

    def _expected(self) -> list[str]:
        """What a worker may say that it measures with."""
        evaluator = self._evaluator
        return _code(evaluator.anatomy.model) + _code_of(evaluator.objective, evaluator.objective.code)

    def _bury(self, place: _Place, error: Exception) -> None:
        """Keep the job of a worker that died, and start another, unless that was tried often enough."""
        if place.job is not None:
            place.queue.appendleft(place.job)
        place.job, place.ready = None, False
        place.deaths += 1
        if place.deaths < MOST_DEATHS:
            progress.note("A worker was lost; another takes its place.")
            self._start(place)
            return
        place.actor = None
        if all(other.actor is None for other in self._places):
            reason = next((line.strip() for line in str(error).splitlines()[::-1] if line.strip()), "no reason given")
            raise UserError(
                f"every worker died {MOST_DEATHS} times in a row; the last said: {reason[:300].rstrip('.')}. When "
                "memory was short, give fewer --workers or less --memory."
            ) from error


def _code(model: PreTrainedModel) -> list[str]:
    """What measures a model: versions, and digests of its own code. Classes of a script go with it to a worker."""
    version, *files = code_of_model(model)
    own = [name for name in files if not name.startswith("__main__.")]
    return [f"shallower {__version__}", f"transformers {version}", *own]


def _code_of(objective: Method, source: str | None) -> list[str]:
    """Digests of an objective of another package, of its file's text and of what it imports. None without a text."""
    if source is None or is_ours(objective):
        return []
    around = own_code(objective.function.__module__)
    return [f"{objective.name} {hashlib.sha256(f'{source}{around}'.encode()).hexdigest()}"]


def _is_imported(objective: Method) -> bool:
    """Whether this process, which was sent the objective, imported it: what has no place in a module comes whole."""
    found: Any = sys.modules.get(objective.function.__module__)
    for name in getattr(objective.function, "__qualname__", "").split("."):
        found = getattr(found, name, None)
    return found is objective.function


def _on_cpu(model: PreTrainedModel) -> PreTrainedModel:
    """The model with its weights in main memory, as it is when they are there already."""
    if model.device.type == "cpu":
        return model
    moved: dict[int, Any] = {
        id(weight): nn.Parameter(weight.detach().cpu(), requires_grad=weight.requires_grad)
        for weight in model.parameters()
    }
    moved |= {id(buffer): buffer.cpu() for buffer in model.buffers()}
    return copied(model, moved)
