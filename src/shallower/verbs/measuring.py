"""An evaluator for a verb: with the memo on disk, and workers where they are asked for and can have the model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from shallower.anatomy.streamed import is_streamed
from shallower.checkpoint.cache import cache_root
from shallower.checkpoint.determinants import beside_weights, determined, is_portable
from shallower.checkpoint.fingerprint import checksum
from shallower.corpus import CalibrationSet
from shallower.engine import Ablator, Racing
from shallower.engine.memo import Memo
from shallower.engine.ray_workers import Checkpoint, RayWorkers
from shallower.errors import ModelError
from shallower.resources import parse_memory, parse_workers
from shallower.surgery import is_spread
from shallower.verbs.subject import Subject, require_streamable


def make_ablator(
    subject: Subject,
    calibration: CalibrationSet,
    objective: str,
    options: Mapping[str, Any] | None = None,
    *,
    racing: Racing | None = None,
    memory: int | str | None = None,
    workers: int | str | None = None,
) -> Ablator:
    """An evaluator that remembers on disk what was measured, so that interrupted work resumes. Close it after use.

    options: of the objective. memory: bytes that it may keep besides the model, as a number or as in `4GB`. workers: a
    number of Ray workers on this machine, or the address of a Ray cluster; by default threads of this process measure.

    Raises UserError when either cannot be read, Ray is not installed, or workers are asked for and the model is
    streamed, and ModelError when it is spread over devices, or computes what it does in this process alone.
    """
    limit, asked = parse_memory(memory), parse_workers(workers)
    crew = None
    if asked is not None:
        if is_streamed(subject.model):
            require_streamable(workers=asked)
        if is_spread(subject.model):
            raise ModelError(
                f"the model is spread over devices by accelerate, and each worker (--workers {asked}) would need it "
                "all: drop --workers, or load it on one device."
            )
        if not is_portable(subject.model):
            raise ModelError(
                "autocast, a hook on all modules, another forward of a class, or an attention that transformers does "
                f"not have holds in this process alone, and workers (--workers {asked}) would measure another model: "
                "undo it, or drop --workers."
            )
        crew = partial(RayWorkers, asked=asked, memory=limit, checkpoint=_checkpoint(subject))
    return Ablator(
        subject.anatomy,
        calibration,
        objective,
        options,
        racing=racing,
        memo=Memo(cache_root() / "measured.sqlite"),
        memory=limit,
        workers=crew,
    )


def _checkpoint(subject: Subject) -> Checkpoint | None:
    """Where workers read the model themselves; None for one that is in memory only, or computes otherwise there."""
    loaded, model = subject.loaded, subject.model
    if loaded.path is None or not determined(model):
        return None
    return Checkpoint(
        str(loaded.path.resolve()),
        loaded.name,
        loaded.revision,
        checksum(model),
        beside_weights(model),
        subject.dtype,
        type(model).__module__.startswith("transformers_modules"),  # code of the Hub that the user trusted here
    )
