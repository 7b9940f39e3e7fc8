"""The state of a training on disk: written under a temporary name, renamed, and only tensors and JSON.

    FOLDER/state-00000120/   weights.safetensors  optimizer.safetensors  state.json
    FOLDER/good.safetensors  the trained weights where held-out perplexity was lowest, with their step and that value
    FOLDER/training.json     how a training that came to its end went; its states are gone, its good weights stay

A kill at any moment leaves a whole state, and one after the end, before the model was saved, loses nothing. Which
random numbers a step draws is decided by the seed and the step's number, so that no state of a generator is part of it.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from shallower.errors import OutputError, UserError
from shallower.files import nearest_parent, remove, replacing, writing
from shallower.strict_json import record_faults, write_json

WEIGHTS, OPTIMIZER, STATE, GOOD = "weights.safetensors", "optimizer.safetensors", "state.json", "good.safetensors"
ENDED = "training.json"
KEPT = "kept"  # beside the good weights: their step and held-out perplexity, as they may be newer than the state
_WHEN_FULL = "make room, or choose another place. The training resumes from the state before."


@dataclass
class State:
    """Where a training is. settings: what decides its result.

    step: steps done. tokens: read in them. seconds: spent, kills left out. curve: a row for each measurement. best: the
    lowest held-out perplexity, worse: measurements since. kept: the step whose weights are kept. measured: which
    measurement is next. losses: what `divergence.LossTrend` remembers of the steps.
    """

    settings: dict[str, Any]
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    measured: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)
    best: float | None = None
    kept: int = 0
    worse: int = 0
    losses: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Ended(State):
    stopped: str = ""


class StateStore:
    """The folder of a training, or memory where there is none."""

    def __init__(self, folder: Path | None, settings: dict[str, Any]) -> None:
        """Raises OutputError when the folder cannot be made."""
        self.folder = folder
        self.settings = settings
        self._good: dict[str, Tensor] = {}
        if folder is not None:
            with writing(folder, when_full=_WHEN_FULL):
                folder.mkdir(parents=True, exist_ok=True)
                for left in (*folder.glob(".state-*"), *folder.glob(f".{GOOD}.*")):  # of a process that was killed
                    remove(left)

    def save(self, state: State, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        """Write a state, and delete those before it. Raises OutputError when the disk is full or not writable."""
        if self.folder is None:
            return
        target = self.folder / f"state-{state.step:08}"
        temporary = self.folder / f".{target.name}.{os.getpid()}"
        with writing(target, when_full=_WHEN_FULL):
            try:
                shutil.rmtree(temporary, ignore_errors=True)  # of an earlier process with this number
                temporary.mkdir()
                _write(temporary / WEIGHTS, weights)
                _write(temporary / OPTIMIZER, moments)
                write_json(temporary / STATE, asdict(state))
                shutil.rmtree(target, ignore_errors=True)
                os.replace(temporary, target)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        for other in self._states():
            if other != target:
                shutil.rmtree(other, ignore_errors=True)

    def finished(self) -> State | None:
        """This very training as it ended, whose result `good` gives; None when it is not at its end."""
        if self.folder is None or not (self.folder / GOOD).is_file():
            return None
        data = _read(self.folder / ENDED)
        if data.get("settings") != self.settings or record_faults(ENDED, {**data, "curve": {}}, _Ended):
            return None
        del data["stopped"]
        return State(**data)

    def load(self) -> tuple[State, dict[str, Tensor], dict[str, Tensor]] | None:
        """The newest state, None when there is none.

        Raises UserError when it belongs to a training with other settings, or cannot be read.
        """
        found = self._states()
        if not found:
            return None
        folder = found[-1]
        try:
            data = json.loads((folder / STATE).read_text(encoding="utf-8"))
            weights, moments = load_file(folder / WEIGHTS), load_file(folder / OPTIMIZER)
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"{folder} cannot be read as the state of a training ({error}): delete it.") from None
        if data.get("settings") != self.settings:
            raise UserError(
                f"{self.folder} holds the unfinished training of another kind ({_differences(data, self.settings)}): "
                "continue it with its own settings, choose another folder, or delete this one."
            )
        if faults := record_faults(f"{folder / STATE}", {**data, "curve": {}}, State):
            raise UserError("; ".join(faults) + ": delete it.")
        return self._with_kept(State(**data)), weights, moments

    def _with_kept(self, state: State) -> State:
        """A state that knows of the good weights, where a kill came between these and the next state."""
        assert self.folder is not None
        path = self.folder / GOOD
        if not path.is_file():
            return state
        try:
            with safe_open(path, "pt") as file:
                step, best = file.get_tensor(KEPT).tolist()
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read as the weights of a training ({error}): delete it.") from None
        if step <= state.step:
            return state
        return replace(state, kept=int(step), best=None if math.isnan(best) else best, worse=0)

    def keep(self, weights: Mapping[str, Tensor], state: State) -> None:
        """Remember these trained weights as the good ones, with the step and value that `state` has for them."""
        if self.folder is None:
            self._good = {name: tensor.detach().cpu().clone() for name, tensor in weights.items()}
        else:
            with writing(self.folder / ENDED, when_full=_WHEN_FULL):
                (self.folder / ENDED).unlink(missing_ok=True)  # of another training, whose result this replaces
            best = math.nan if state.best is None else state.best
            kept = torch.tensor([state.kept, best], dtype=torch.float64)
            write_tensors(self.folder / GOOD, {**weights, KEPT: kept})

    def good(self) -> dict[str, Tensor]:
        """The weights that `keep` was last given."""
        return self._good if self.folder is None else load_file(self.folder / GOOD)

    def finish(self, state: State, stopped: str) -> None:
        """Replace the states by `training.json`, which says how it went; the good weights stay, for whoever has to do
        again what comes after. stopped: why it ended early, if it did.
        """
        if self.folder is None:
            return
        write_json(self.folder / ENDED, {**asdict(state), "stopped": stopped})
        for folder in self._states():
            shutil.rmtree(folder, ignore_errors=True)

    def _states(self) -> list[Path]:
        found = [] if self.folder is None else self.folder.glob("state-*")
        return sorted(path for path in found if path.is_dir())


def require_room(folder: Path, trained: int, unwritten: int = 0) -> None:
    """Raise OutputError unless two states of `trained` float32 parameters, and the good weights, fit the disk at
    `folder`, which may be missing. Those of a training that is there count as room, as they are replaced, and so do
    those in folders in it, one of which may be resumed: before it is known which, this can only ask for too little.

    unwritten: bytes that the teacher's cache will take there, too.
    """
    needed = 4 * trained * (2 * 3 + 1) + unwritten
    replaced = (*folder.rglob("state-*/*.safetensors"), *folder.rglob(GOOD))
    free = shutil.disk_usage(nearest_parent(folder / GOOD)).free + sum(path.stat().st_size for path in replaced)
    if free < needed:
        what = "the state of the training" + (" and the teacher's cache" if unwritten else "")
        raise OutputError(
            f"{folder} needs {needed / 1e9:.2f} GB for {what} and {free / 1e9:.2f} GB are free on that disk; "
            "make room or choose another place."
        )


def begun_options(folder: Path | None) -> dict[str, Any]:
    """The options that the newest training in a folder was begun with; none where there is no such training."""
    if folder is None:
        return {}
    for path in (*sorted(folder.glob(f"state-*/{STATE}"), reverse=True), folder / ENDED):
        settings = _read(path).get("settings")
        options = settings.get("options") if isinstance(settings, dict) else None
        if isinstance(options, dict):
            return options
    return {}


def _read(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file under a temporary name, then rename. Raises OutputError when that fails."""
    with replacing(path) as temporary, writing(path, when_full=_WHEN_FULL):
        _write(temporary, tensors)


def write_one_of_many(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """The same without a look at what killed processes left beside it, which reads the whole folder: that goes with the
    folder.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path, when_full=_WHEN_FULL):
        try:
            _write(temporary, tensors)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _differences(data: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    there, here = _flat(data.get("settings") or {}), _flat(settings)
    names = sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))
    return ", ".join(f"{name} {there.get(name)} instead of {here.get(name)}" for name in names) or "no settings"


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    inner = settings.get("options")
    options = inner if isinstance(inner, dict) else {}
    return {name: value for name, value in settings.items() if name != "options"} | options
