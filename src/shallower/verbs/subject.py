"""What a verb works on: a loaded model with its anatomy, whether the caller gave a name or a model in memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shallower import progress
from shallower.anatomy.dissect import Anatomy, dissect
from shallower.anatomy.streamed import is_streamed, stream_from_processor
from shallower.anatomy.weigh import UnitWeight, Weights, weigh
from shallower.checkpoint.determinants import code_of_model, determinants
from shallower.checkpoint.dtype import DTYPES, dtype_name, parse_device, parse_dtype, require_float64
from shallower.checkpoint.fingerprint import fingerprint
from shallower.checkpoint.load import LoadedModel, load_model
from shallower.checkpoint.locate import locate
from shallower.checkpoint.shards import stored_dtype
from shallower.errors import BudgetError, CorpusError, ModelTooLarge, UserError
from shallower.plan import ModelIdentity
from shallower.surgery import require_apart, require_free, require_space, sharing
from shallower.surgery.ordinary_pairs import exact_pairs, weigh_pairs
from shallower.units import KINDS, Kind, Unit


@dataclass(frozen=True, eq=False)
class Subject:
    """A model to be examined."""

    loaded: LoadedModel
    anatomy: Anatomy

    @property
    def model(self) -> PreTrainedModel:
        return self.loaded.model

    @property
    def dtype(self) -> str:
        """The number format that the model computes in, such as `bfloat16`."""
        return dtype_name(self.model.dtype)

    @property
    def stored_dtype(self) -> str:
        """The number format that its checkpoint has, and that what is made of it is written in; it may be in memory in
        another. float32 for float64, in which no checkpoint is loaded.
        """
        found = None if self.loaded.path is None else stored_dtype(self.loaded.path)
        return "float32" if found == "float64" else found or self.dtype

    def holding(self, model: PreTrainedModel) -> Subject:
        """A model that was made of this one, with its tokenizer and name."""
        return Subject(replace(self.loaded, model=model, path=None), dissect(model))

    def shared(self) -> Subject:
        """The same with a model that may be changed and shares the tensors of this one until then."""
        model = sharing(self.model)
        return Subject(replace(self.loaded, model=model), dissect(model))

    @property
    def identity(self) -> ModelIdentity:
        """Of a model that was given in memory, as its weights are now: whoever holds it may change them (10 ms for 135M
        parameters). Of one that was loaded, as they were when it was first asked for.
        """
        return self._identified() if self.loaded.path is None else self._as_loaded

    @cached_property
    def _as_loaded(self) -> ModelIdentity:
        return self._identified()

    def _identified(self) -> ModelIdentity:
        blocks = len(self.anatomy.blocks)
        return ModelIdentity(self.loaded.name, self.loaded.revision, fingerprint(self.model, self.loaded.path), blocks)

    @cached_property
    def determinants(self) -> list[str]:
        """Of what the model computes, as it is when they are first asked for."""
        return determinants(self.model)

    @cached_property
    def weights(self) -> Weights:
        return weigh(self.anatomy)

    @cached_property
    def pairs(self) -> dict[Unit, UnitWeight]:
        """Pairs of sublayers without which an ordinary model is left, and what each weighs."""
        return weigh_pairs(self.anatomy, self.weights, exact_pairs(self.anatomy))

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Raises CorpusError when the model came without one."""
        if self.loaded.tokenizer is None:
            raise CorpusError(
                f"{self.loaded.name} has no tokenizer, so it cannot read text: put the tokenizer's files "
                "(tokenizer.json, tokenizer_config.json) into its folder; in Python, pass tokenizer=… or a "
                "CalibrationSet of ids."
            )
        return self.loaded.tokenizer


ModelLike: TypeAlias = str | Path | PreTrainedModel | Subject  # what `open_subject` takes


def several(given: ModelLike | Iterable[ModelLike]) -> list[ModelLike]:
    """What was given as a list, also a model, or the name of a model or text, that was given alone: a str is made of
    str, too, its letters.
    """
    return [given] if isinstance(given, (str, Path, PreTrainedModel, Subject)) else list(given)


def path_of(model: ModelLike) -> str:
    """Where a model is, as it was given; empty for one in memory."""
    return str(model) if isinstance(model, (str, Path)) else ""


def several_names(given: str | Path | Iterable[str | Path]) -> list[str]:
    """The same of texts and tasks, which are names or paths."""
    return [str(name) for name in several(given)]


def open_subject(
    model: ModelLike,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    stream_blocks: bool = False,
) -> Subject:
    """Load MODEL if it is a name or path, and find its anatomy. A Subject comes back as it is, but for a `tokenizer`.

    A model that is given itself, also as a Subject, is put into evaluation mode, and stays so: call `model.train()`
    again to go on training it.

    tokenizer: in place of the one that the model came with. stream_blocks: of a model that is given by name or path,
    leave the blocks on the processor, and bring each to the device only while it runs.

    Raises ModelError when the model cannot be found, read, or taken apart, and UserError when one in memory is on a
    device without float64 (Apple's GPUs), or is to be streamed.
    """
    if stream_blocks and isinstance(model, (Subject, PreTrainedModel)):
        raise UserError("blocks are streamed as a model is loaded, and this one is in memory: give its name or path.")
    if isinstance(model, Subject):
        model.model.eval()
        return model if tokenizer is None else replace(model, loaded=replace(model.loaded, tokenizer=tokenizer))
    if isinstance(model, PreTrainedModel):
        name = Path(model.config.name_or_path).name if model.config.name_or_path else type(model).__name__
        require_float64(str(model.device), "move the model first (model.to('cpu'))")
        loaded = LoadedModel(model.eval(), tokenizer, name, None, None)
    else:
        loaded = _loaded(str(model), device, dtype, trust_remote_code=trust_remote_code, stream=stream_blocks)
        loaded = loaded if tokenizer is None else replace(loaded, tokenizer=tokenizer)
    code_of_model(loaded.model)  # read while the files are those that were imported
    return Subject(loaded, dissect(loaded.model))


def _loaded(model: str, device: str, dtype: str, *, trust_remote_code: bool, stream: bool) -> LoadedModel:
    if not stream:
        return load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    place = parse_device(device)
    number_format = dtype_name(parse_dtype(dtype, place))
    try:
        loaded = load_model(model, dtype=number_format, device="cpu", trust_remote_code=trust_remote_code)
    except ModelTooLarge as error:
        raise ModelTooLarge(
            f"{model} does not fit the processor's memory in {number_format}; in the number format that it is stored "
            "in (--dtype) its weights stay in their files."
        ) from error
    assert loaded.path is not None
    if (stored := stored_dtype(loaded.path)) != number_format:
        instead = (
            f" With --dtype {stored} its blocks are read from their files as they run." if stored in DTYPES else ""
        )
        progress.note(
            f"{loaded.name} is stored in {stored or 'an unknown format'} and loaded in {number_format}, so all of it "
            f"takes memory on the processor.{instead}"
        )
    stream_from_processor(loaded.model, place)
    return loaded


def will_stream(model: ModelLike, stream_blocks: bool) -> bool:
    """Whether blocks wait on the processor until they run: of a model to be opened so, or of one in memory that was."""
    given = model.model if isinstance(model, Subject) else model
    return stream_blocks or (isinstance(given, PreTrainedModel) and is_streamed(given))


def require_streamable(
    *, repair: str = "", ordinary: bool = False, workers: int | str | None = None, exact: bool = False
) -> None:
    """Raise UserError for what a search with streamed blocks cannot do, or does anyway."""
    for option, given, why in (
        ("--repair", repair, "cuts each candidate"),
        ("--ordinary", ordinary, "cuts candidates"),
        ("--workers", workers, "loads the whole model in each worker"),
    ):
        if given:
            raise UserError(f"{option} {why}, which streamed blocks do not allow: drop {option} or --stream-blocks.")
    if exact:
        raise UserError("candidates do not race where blocks are streamed, so --exact would change nothing; drop it.")


def require_there(models: Iterable[ModelLike]) -> None:
    """Raise ModelError for a name or path that is no model, before any is loaded; whether a name is on the Hub is only
    found out then.
    """
    for model in models:
        if isinstance(model, (str, Path)):
            locate(str(model))


def require_computable(models: Iterable[ModelLike], device: str, dtype: str) -> None:
    """Raise UserError for a device or number format that models which are given by name cannot be loaded with."""
    if not all(isinstance(model, (Subject, PreTrainedModel)) for model in models):
        parse_dtype(dtype, parse_device(device))


def require_place_for(out: str | Path, *models: ModelLike | None, force: bool) -> None:
    """Raise OutputError unless a checkpoint can be written to `out`: it is free, or may be replaced and is none of the
    `models` that are read. Before anything is loaded.
    """
    for model in models:
        if isinstance(model, Subject):
            require_apart(out, model.loaded.path)
        elif isinstance(model, PreTrainedModel):
            require_apart(out, model.config._name_or_path)
        elif model is not None:
            require_apart(out, locate(str(model)).path)
    require_free(out, force=force)


def require_space_for(out: str | Path, subject: Subject, parameters: int) -> None:
    """Raise OutputError unless there is room at `out` for a checkpoint that is made of the subject's model and has as
    many parameters or more: before anything is searched, repaired or trained. A disk that fills up meanwhile is told
    of when it is written.
    """
    if subject.stored_dtype == subject.dtype:
        number = min(part.element_size() for part in subject.model.parameters())
    else:
        number = getattr(torch, subject.stored_dtype).itemsize
    require_space(out, parameters * number)


def kinds_of(which: str) -> tuple[Kind, ...]:
    """The kinds that a word of `--units` stands for. Raises BudgetError for another word."""
    kinds: dict[str, tuple[Kind, ...]] = {kind: (kind,) for kind in KINDS}
    kinds |= {"sublayer": ("attn", "mlp"), "all": KINDS}
    if which not in kinds:
        raise BudgetError(f"--units {which!r} is not one of {', '.join(kinds)}.")
    return kinds[which]


def units_of(subject: Subject, which: str, protected: frozenset[int] = frozenset()) -> tuple[Unit, ...]:
    """Units that may go. which: `block`, `attn`, `mlp`, `sublayer` (attn and mlp) or `all`.

    Raises BudgetError for another word, or when nothing is left after protection.
    """
    there = subject.anatomy.of_kind(*kinds_of(which))
    if not there:
        raise BudgetError(
            f"{subject.anatomy.family} has no {which} units that can be told apart: see `shallower inspect`."
        )
    units = tuple(unit for unit in there if unit.index not in protected)
    if not units:
        raise BudgetError(f"no {which} unit is left to remove after protecting {len(protected)} blocks.")
    return units
