"""Recoveries of a cut model, one after another: what `shallower recover` and `shallower prune --recover` share."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from shallower import progress
from shallower.anatomy import Anatomy, dissect
from shallower.anatomy.patch import Patch
from shallower.anatomy.weigh import size
from shallower.anatomy.writers import find_writers
from shallower.checkpoint.cache import cache_root
from shallower.checkpoint.determinants import determinants, determined
from shallower.corpus import CalibrationSet
from shallower.defaults import REPAIR_LENGTH, REPAIR_SEQUENCES
from shallower.engine.moments import require_tokens
from shallower.engine.twins import Station
from shallower.errors import ModelError
from shallower.evaluation.perplexity import Perplexity, context_limit
from shallower.files import expanded
from shallower.launched import world_size
from shallower.recovery import Repair
from shallower.registry import Configured
from shallower.reporting.data import RecoveryMadeBy, RecoveryStage
from shallower.reporting.wording import plural
from shallower.surgery import cut
from shallower.surgery.fold import can_have_bias
from shallower.surgery.mapping import mapped
from shallower.surgery.stations import cuts
from shallower.training.maps_at_cuts import attach_maps
from shallower.training.recipe import TRAINED_AS
from shallower.training.state import ENDED, begun_options, require_room
from shallower.units import Unit
from shallower.verbs.recovery_steps import in_closed_form, that_fold
from shallower.verbs.subject import Subject
from shallower.verbs.texts import fitting, values
from shallower.verbs.training_text import Training
from shallower.version import __version__


class Resume:
    """Where the trainings of one command keep their state, so that the same command goes on after a kill: beside what
    it writes, in `.NAME.training`, or in the cache where it writes nothing.
    """

    def __init__(self, out: str | Path | None) -> None:
        target = None if out is None else expanded(out).absolute()
        self._own = target is not None
        self._root = target.with_name(f".{target.name}.training") if target else cache_root() / "training"
        self._made: list[Path] = []

    def folder(self, *what: object) -> Path:
        """One for all that decides the result, `what`; another one for anything else."""
        key = hashlib.sha256(json.dumps(what, default=str).encode()).hexdigest()[:16]
        folder = self._root / key
        if self._own and not folder.exists() and self._others():
            progress.note(
                f"{self._root} holds an unfinished training of other models, texts or options, or in another number "
                "format, on another kind of device or by another version of transformers, and this one begins anew: to "
                "go on with it, stop, and give what it was begun with, such as --dtype float32 or bfloat16 where auto "
                "chose"
            )
        self._made.append(folder)
        return folder

    def _others(self) -> list[Path]:
        """Folders with a state that this command did not name."""
        return [path.parent for path in self._root.glob("*/state-*") if path.parent not in self._made]

    def require_room(self, trained: int) -> None:
        """Raise OutputError unless the disk has room for what a training of so many parameters keeps."""
        require_room(self._root, trained)

    def tidy(self) -> None:
        """Remove the folders in which nothing is kept."""
        for folder in (*self._made, self._root):
            with suppress(OSError):
                folder.rmdir()

    def clear(self) -> None:
        """Remove what was kept: the command came to its end. One that trained nothing leaves what others keep."""
        for folder in (self._root,) if self._own and self._made else self._made:
            shutil.rmtree(folder, ignore_errors=True)
        self.tidy()


def repair_size(subject: Subject, sequences: int, length: int) -> tuple[int, int]:
    """Sequences and their length that a repair reads: what the search reads, but not less than it needs itself.

    A model that cannot read the usual length is repaired on what it can read.
    """
    limit = context_limit(subject.model)
    usual = REPAIR_LENGTH if limit is None else min(REPAIR_LENGTH, limit)
    return max(sequences, REPAIR_SEQUENCES), max(length, usual)


def require_ready(
    student: Anatomy,
    dense: Anatomy,
    removed: frozenset[Unit],
    steps: Sequence[Configured],
    text: CalibrationSet,
    training: Training | None,
) -> None:
    """Raise UserError, ModelError or CorpusError where one of the recoveries cannot repair or train this model with its
    options on this text: before the first begins.
    """
    if that_fold(steps):
        Repair(student, dense, removed, text).require_writers()
    for method, options in steps:
        ready = getattr(method.function, "ready", None)  # a method from elsewhere may have none
        if ready is not None and training is not None:
            ready(student.model, training.text, options)
        if inputs := method.traits.get("inputs"):
            widest = inputs(Repair(student, dense, removed, text), method.options_in_use(options))
            require_tokens(text.tokens, widest, least=f"the widest map of {method.name}")


def require_recoverable(
    student: Subject,
    dense: Subject,
    removed: frozenset[Unit],
    steps: Sequence[Configured],
    text: CalibrationSet,
    training: Training | None,
    resume: Resume,
) -> None:
    """Raise as `require_ready`, and OutputError without room for what the trainings keep."""
    require_ready(student.anatomy, dense.anatomy, removed, steps, text, training)
    for trained in trained_parameters(steps, student.model):
        resume.require_room(sum(trained.values()))


def trained_parameters(steps: Sequence[Configured], student: PreTrainedModel) -> Iterator[Mapping[str, int]]:
    """How many parameters each of the recoveries that train will train of a student, at least, by the names of the
    parameters, or of the modules that they are added to.
    """
    for method, options in steps:
        if hasattr(method.function, "counted"):  # a method from elsewhere may not say
            yield method.function.counted(student, options)


def require_place(steps: Sequence[Configured], dense: Anatomy, removed: frozenset[Unit]) -> None:
    """Raise ModelError where maps that these recoveries put at cuts could not be saved: before they are fitted."""
    maps = [method for method, _ in steps if method.traits.get("maps")]
    if not maps:
        return
    trial = cut(dense, removed)
    places = cuts(dissect(trial), dense, removed, find_writers(dense))
    generator = torch.Generator().manual_seed(0)
    makers: list[str] = []
    for method in maps:
        constant = method.traits["maps"] == "constant"
        here = _without_bias(trial, places) if constant else places
        made = attach_maps(trial, here, rank=0 if constant else 1, seed=0)
        makers += [method.name] if len(made) else []
        for patch in made:
            assert isinstance(patch, Patch)
            for part in (patch.up, patch.bias):  # a map that shows
                part.data = torch.randn(part.shape, generator=generator).to(part)
    if not makers:
        return
    try:
        mapped(trial, dense, removed)
    except ModelError as error:
        what = f"what {makers[0]} makes" if len(makers) == 1 else f"what {' and '.join(makers)} make"
        raise ModelError(f"{what} could not be saved: {error} Use refit, lora or full.") from None


def _without_bias(student: PreTrainedModel, places: Sequence[Station]) -> list[Station]:
    """The places in front of which nothing has, or can have, a bias that a constant could go to."""
    anatomy = dissect(student)
    halves = find_writers(anatomy)
    writers = [place.writer(halves) for place in places]
    return [
        place
        for place, writer in zip(places, writers, strict=True)
        if writer is None or not can_have_bias(anatomy, writer)
    ]


def run_recoveries(
    student: Subject,
    dense: Subject,
    removed: frozenset[Unit],
    steps: Sequence[Configured],
    text: CalibrationSet,
    *,
    training: Training | None,
    resume: Resume,
    measure: Callable[[Subject], Mapping[str, Perplexity]],
    seed: int,
    memory: int | None,
    repaired: bool = False,
) -> tuple[Subject, tuple[RecoveryStage, ...], tuple[str, ...]]:
    """Change the student's model in place, one recovery after another. Returns the student, which is another one where
    weights were spread over processes.

    text: for those in closed form. training: for those that train. measure: perplexities of the student as it is,
    called before the first and behind each. repaired: the student is no plain cut any more. Nothing is checked that
    `require_recoverable` does.
    """
    stages = [RecoveryStage("repaired" if repaired else "cut", values(measure(student)))]
    notes: list[str] = [] if training is None else [*training.notes]
    begun: list[object] = [TRAINED_AS, sorted(map(str, removed)), text.digest, seed]
    if any(method.trained for method, _ in steps):
        if world_size() > 1 and not (determined(student.model) and determined(dense.model)):
            raise ModelError(
                "processes that train together must have the same model, and what changes this one cannot be compared: "
                "hooks, replaced forwards, autocast, adapters of peft, another package's attention, or a class without "
                "a file or with one that was loaded again. Do without, or train in one process."
            )
        begun += [*determinants(student.model), *determinants(dense.model)]
    try:
        for number, (method, options) in enumerate(steps):
            before, _ = size((student.model,))
            start = time.perf_counter()
            repair = Repair(dissect(student.model), dense.anatomy, removed, text, seed, memory)
            supplied: dict[str, Any] = {
                "repair": repair,
                "student": student.model,
                "anatomy": dense.anatomy,
                "removed": removed,
                "seed": seed,
            }
            folder: Path | None = None
            if method.trained:
                assert training is not None
                done = [(one.name, given) for one, given in steps[: number + 1]]
                folder = resume.folder(*begun, training.text.digest, training.measured, done)
                supplied |= {"calibration": training.text, "held_out": training.held_out, "folder": folder}
            with progress.task(f"recovery {method.name}"):
                made = method.function(**{name: supplied[name] for name in method.parameters}, **options)
            if made is not None and made is not student.model:
                student = student.holding(made)
            seconds, tokens = time.perf_counter() - start, repair.tokens
            curve: tuple[dict[str, float], ...] = ()
            # this file is how a training tells of itself, as it outlives a kill; a method from elsewhere may keep none
            if folder is not None and (folder / ENDED).is_file():
                told = json.loads((folder / ENDED).read_text(encoding="utf-8"))
                seconds, tokens, curve = max(seconds, told["seconds"]), told["tokens"], tuple(told["curve"])
                repair.notes.append(_told(told))
            notes += [f"{method.name}: {note}" for note in repair.notes]
            gained = size((student.model,))[0] - before
            # of a training as they were settled: the number format in the place of `compute=auto`
            settled = {name: value for name, value in begun_options(folder).items() if name in method.options}
            used = {**method.options_in_use(options), **settled}
            shown = values(measure(student))
            stages.append(RecoveryStage(method.name, shown, gained, tokens, round(seconds, 1), curve, used))
    finally:
        resume.tidy()
    return student, tuple(stages), tuple(notes)


def _told(told: Mapping[str, Any]) -> str:
    """A training in a sentence. told: its training.json."""
    sentence = f"{plural(told['step'], 'step')} of training in {told['seconds'] / 60:.1f} minutes"
    sentence += f", which stopped early: {told['stopped']}" if told["stopped"] else ""
    return f"{sentence}; the weights of step {told['kept']} are kept."


def texts_read(
    steps: Sequence[Configured], text: CalibrationSet, training: Training | None
) -> tuple[CalibrationSet | None, CalibrationSet | None]:
    """What the recoveries in closed form read, and what those that train do; None where there is none of that kind."""
    return text if in_closed_form(steps) else None, None if training is None else training.text


def recovery_made_by(
    dense: Subject,
    steps: Sequence[Configured],
    text: CalibrationSet,
    training: Training | None,
    seed: int,
    window: int,
    max_windows: int | None,
) -> RecoveryMadeBy:
    """What makes the same repair, and its perplexities, again, besides the stages' options and the held-out texts."""
    repaired, trained = (None if read is None else read.identity for read in texts_read(steps, text, training))
    return RecoveryMadeBy(
        dense.identity,
        repaired,
        trained,
        seed,
        __version__,
        dtype=dense.dtype,
        device=dense.model.device.type,
        window=fitting(dense, window),
        windows=max_windows,
    )
