"""What a verb works on: a loaded model with its anatomy, whether the caller gave a name or a model in memory."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shallower import progress
from shallower.anatomy.dissect import Anatomy, dissect
from shallower.anatomy.streamed import is_streamed, stream_from_processor
from shallower.anatomy.weigh import UnitWeight, Weights, weigh
from shallower.checkpoint.cache import cache_root
from shallower.checkpoint.determinants import (
    beside_weights,
    code_of_model,
    determinants,
    determined,
    is_portable,
)
from shallower.checkpoint.dtype import DTYPES, dtype_name, parse_device, parse_dtype, require_float64
from shallower.checkpoint.fingerprint import checksum, fingerprint
from shallower.checkpoint.load import LoadedModel, load_model
from shallower.checkpoint.locate import locate
from shallower.checkpoint.shards import stored_dtype
from shallower.corpus import CalibrationSet, asks_model, build_calibration, build_choices, named_options
from shallower.corpus.options import OPTIONS
from shallower.corpus.questions import EXAMPLE
from shallower.engine import Ablator, Racing, reads_choices
from shallower.engine.memo import Memo
from shallower.engine.ray_workers import Checkpoint, RayWorkers
from shallower.errors import (
    BudgetError,
    CorpusError,
    ModelError,
    ModelTooLarge,
    TooLittleText,
    UserError,
    out_of_memory,
)
from shallower.evaluation.perplexity import context_limit
from shallower.plan import ModelIdentity
from shallower.registry import objective as objectives
from shallower.resources import parse_memory, parse_workers
from shallower.surgery import is_spread, require_apart, require_free, require_space, sharing
from shallower.surgery.ordinary_pairs import exact_pairs, weigh_pairs
from shallower.units import KINDS, Kind, Unit
from shallower.verbs.supply import supply

_POSITIONS = re.compile(r"(^|[._])(wpe|\w*positions?\w*)([._]|$)")  # of parameters
_RESERVED = range(3)  # rows of such a table that are of no position (OPT: 2)
DEFAULT_CALIBRATION = "python"  # the one text that every machine has; better: text like what the model will read


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


def calibrate(
    subject: Subject,
    calibration: str | Path | CalibrationSet | None,
    *,
    sequences: int,
    length: int,
    seed: int,
    objective: str = "nll",
) -> CalibrationSet:
    """The calibration set itself, or one built from a specification (by default Python's standard library).

    One document in ten is left for held-out evaluation unless the specification says `part=…`. For an objective that
    reads choices the specification is a .jsonl file of questions, and `sequences` are questions.

    Raises CorpusError when the text is missing, too short, or not text, or longer than what the model can read.
    """
    if isinstance(calibration, CalibrationSet):
        text = calibration
    else:
        require_room_to_write(subject.model, str(calibration or DEFAULT_CALIBRATION), length)
        text = _build(subject, calibration, sequences, length, seed, objective)
    require_room(subject.model, text.length)
    require_known(subject.model, text)
    return text


def note_default(calibration: str | Path | CalibrationSet | None) -> None:
    """Tell those who named no text what is read."""
    if calibration is None:
        progress.note(
            "No text was named, so the documentation and the code of this Python are read. Text like what the model "
            "will read serves better (--calibration text.jsonl)."
        )


def calibrate_most(
    subject: Subject, calibration: str | Path | CalibrationSet | None, *, sequences: int, length: int, seed: int
) -> tuple[CalibrationSet, int]:
    """As `calibrate`, of a text that holds less than `sequences` all it has; and how many sequences were asked for in
    the end.

    Raises CorpusError as `calibrate` does: TooLittleText when it holds none, or less than its specification asks for.
    """
    short: TooLittleText | None = None
    while True:
        try:
            return calibrate(subject, calibration, sequences=sequences, length=length, seed=seed), sequences
        except TooLittleText as error:  # of a mixture each text is told of on its own
            short = error
            sequences = math.floor(sequences * error.share + 1e-9)
            # what the specification says wins over the argument, and would fail again
            if not sequences or "sequences" in named_options(str(calibration)):
                raise
        except CorpusError:
            if short is None:
                raise
            raise short from None  # so few that a small weight of the mixture is none of them


def require_room_to_write(model: PreTrainedModel, spec: str, length: int) -> None:
    """Raise CorpusError when a specification asks for the model's own text in sequences that it cannot read.

    length: of these sequences where the specification does not say it itself.
    """
    if asks_model(spec):
        require_room(model, OPTIONS["length"].parse(named_options(spec).get("length", str(length))))


def require_room(model: PreTrainedModel, length: int) -> None:
    """Raise CorpusError when sequences of `length` are more than a model can read.

    Beyond the length that its config has, rotary positions go on, and a table of learned ones ends. Whatever else may
    fail there (GPT-J's table of computed positions, MPT's bias) is found by reading one sequence.
    """
    limit = context_limit(model)
    if limit is None or length <= limit:
        return
    ends = any(_POSITIONS.search(name) and len(table) - limit in _RESERVED for name, table in model.named_parameters())
    if not ends:
        try:
            with torch.no_grad(), progress.task(f"trying a sequence of {length:,} tokens"):
                model.base_model(torch.zeros((1, length), dtype=torch.long, device=model.device), use_cache=False)
        except (IndexError, RuntimeError) as error:
            if out_of_memory(error):
                raise
            ends = True
    if ends:
        raise CorpusError(
            f"sequences of {length} tokens are longer than the {limit} positions that the model has: use --length "
            f"{limit} or less."
        )


def require_known(model: PreTrainedModel, text: CalibrationSet) -> None:
    """Raise CorpusError when ids of a text have no embedding in the model."""
    rows = model.get_input_embeddings().weight.shape[0]
    least, most = int(text.input_ids.min()), int(text.input_ids.max())
    if least < 0 or most >= rows:
        raise CorpusError(
            f"{text.spec} has the token id {least if least < 0 else most}, and the model knows 0 to {rows - 1}: build "
            "the set with the model's own tokenizer."
        )


def _build(
    subject: Subject, calibration: str | Path | None, sequences: int, length: int, seed: int, objective: str
) -> CalibrationSet:
    if reads_choices(objectives.get(objective)):
        if calibration is None:
            raise CorpusError(
                f"objective {objective!r} reads multiple-choice questions, and none were given: name a .jsonl file of "
                f"them (--calibration), with rows such as {EXAMPLE}."
            )
        return build_choices(
            str(calibration), subject.tokenizer, questions=sequences, length=length, seed=seed, part="train"
        )
    spec = DEFAULT_CALIBRATION if calibration is None else str(calibration)
    return build_calibration(
        spec,
        subject.tokenizer,
        sequences=sequences,
        length=length,
        seed=seed,
        part="train",
        supply=supply(subject.model, subject.tokenizer),
    )


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
