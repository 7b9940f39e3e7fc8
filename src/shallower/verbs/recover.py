"""`shallower recover`: repair a cut model, and show what every step gave."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shallower import progress
from shallower.anatomy import Anatomy, dissect
from shallower.anatomy.patch import Patch
from shallower.checkpoint.cache import cache_root
from shallower.checkpoint.fingerprint import fingerprint
from shallower.checkpoint.load import LoadedModel
from shallower.checkpoint.locate import stored_dtype
from shallower.corpus import CalibrationSet
from shallower.errors import CorpusError, ModelError, PlanError, UserError
from shallower.evaluation.perplexity import perplexity
from shallower.evaluation.text import read_evaluation_text
from shallower.exporters import save
from shallower.launched import leads, wait
from shallower.packaged import LeavesOut, stock_type
from shallower.plan import PruningPlan
from shallower.recovery import Repair
from shallower.registry import Method, share_options
from shallower.registry import recovery as recoveries
from shallower.reporting.data import RecoveryStage
from shallower.reporting.wording import plural, recovery_rows
from shallower.resources import parse_memory
from shallower.surgery import cut, require_free
from shallower.surgery.adopt import adopt
from shallower.surgery.mapping import mapped
from shallower.surgery.patch import patches
from shallower.training.answers import answer_perplexity, split
from shallower.training.instructions import build_instructions
from shallower.training.patch import attach, cuts
from shallower.training.recipe import HeldOut, check_recipe
from shallower.training.state import ENDED
from shallower.units import Unit
from shallower.verbs.evaluate import fitting, held_out, text_name, text_perplexity
from shallower.verbs.subject import Subject, calibrate, open_subject
from shallower.verbs.supply import supply

PLAN = "plan.json"
SEQUENCES, LENGTH = 128, 256  # a matrix with 1,536 inputs wants many times as many tokens
TRAIN_SEQUENCES = 4096  # training reads on, and a million tokens are more than a processor trains on in an hour
Stages = Sequence[tuple[Method, Mapping[str, Any]]]  # recoveries and their options


@dataclass(frozen=True, eq=False)
class Training:
    """What recoveries that train read. held_out: perplexity on text that nothing is trained on, by which the best
    weights are kept; None where there is no such text. measured: what tells this measure from others.
    """

    text: CalibrationSet
    held_out: HeldOut | None
    measured: tuple[object, ...] = ()


class Resume:
    """Where the trainings of one command keep their state, so that the same command goes on after a kill: beside what
    it writes, in `.NAME.training`, or in the cache where it writes nothing.
    """

    def __init__(self, out: str | Path | None) -> None:
        target = None if out is None else Path(out).absolute()
        self._own = target is not None
        self._root = target.with_name(f".{target.name}.training") if target else cache_root() / "training"
        self._made: list[Path] = []

    def folder(self, *what: object) -> Path:
        """One for all that decides the result, `what`; another one for anything else."""
        key = hashlib.sha256(json.dumps(what, default=str).encode()).hexdigest()[:16]
        self._made.append(self._root / key)
        return self._made[-1]

    def tidy(self) -> None:
        """Remove the folders in which nothing is kept."""
        for folder in (*self._made, self._root):
            with suppress(OSError):
                folder.rmdir()

    def clear(self) -> None:
        """Remove what was kept: the command came to its end."""
        for folder in (self._root,) if self._own else self._made:
            shutil.rmtree(folder, ignore_errors=True)
        self.tidy()


@dataclass(frozen=True, eq=False)
class Recovered:
    """A repaired model. stages: the cut model, then what each recovery made of it. folder: None when not saved; form:
    that of the checkpoint (`shallower.forms`), then empty.
    """

    model: PreTrainedModel = field(repr=False)
    plan: PruningPlan
    stages: tuple[RecoveryStage, ...]
    notes: tuple[str, ...]
    folder: Path | None
    form: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "folder": None if self.folder is None else str(self.folder),
            "form": self.form,
            "plan": self.plan.to_json(),
            "recovery": [stage.to_json() for stage in self.stages],
            "notes": list(self.notes),
        }


def recover(
    model: str | Path | PreTrainedModel | Subject,
    methods: str,
    *,
    teacher: str | Path | PreTrainedModel | Subject | None = None,
    plan: PruningPlan | str | Path | None = None,
    out: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibration: str | Path | CalibrationSet | None = None,
    sequences: int = SEQUENCES,
    length: int = LENGTH,
    train_sequences: int = TRAIN_SEQUENCES,
    instructions: str | Path | None = None,
    settings: Mapping[str, str] | None = None,
    texts: Sequence[str] = (),
    window: int = 1024,
    max_windows: int | None = 12,
    seed: int = 0,
    force: bool = False,
    memory: int | str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> Recovered:
    """Repair a cut model with its dense teacher, and measure held-out text before and after each step.

    model: a pruned checkpoint, whose plan.json says what is missing; or, without a `teacher`, the dense model, which is
    cut by `plan` first. methods: names of recoveries, one or several in order (`refit,full`). settings: their options
    as text. texts: held-out text; without any, the documents that calibration left out. out: folder to write; without
    it nothing is written.
    train_sequences: what recoveries that train read of the calibration text, as the others read `sequences`; a
    ready-made set is read whole by all. instructions: .jsonl file of conversations to train on instead. They keep the
    weights that do best on the documents that calibration left out, or on the answers of every 20th conversation, never
    by `texts`. After a kill the same call resumes, from a folder beside `out`, or in the cache. Of processes that
    `accelerate launch` started together, all train, and the first one writes.

    Raises UserError (PlanError, ModelError, CorpusError, OutputError, …) before anything is written.
    """
    steps = parse_recoveries(methods, settings or {})
    memory = parse_memory(memory)
    if out is not None:
        require_free(out, force=force)
    contents = {text: read_evaluation_text(text, supply()) for text in texts}
    given = _plan(model, teacher, plan)
    options: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    dense = open_subject(model if teacher is None else teacher, tokenizer, **options)
    student, reload = _student(model, dense, given, has_teacher=teacher is not None, options=options)
    text = calibrate(dense, calibration, sequences=sequences, length=length, seed=seed)
    contents = contents or held_out(calibration)
    if out is not None:
        require_place(steps, dense.anatomy, given.removed)
    training = training_text(
        dense,
        steps,
        calibration,
        sequences=train_sequences,
        length=length,
        instructions=instructions,
        window=window,
        max_windows=max_windows,
        seed=seed,
    )
    resume = Resume(out)
    untouched = [*student.model.parameters()]
    student, stages, notes = run_recoveries(
        student,
        dense,
        given.removed,
        steps,
        text,
        training=training,
        resume=resume,
        measure=lambda repaired: perplexities(repaired, contents, window, max_windows),
        seed=seed,
        memory=memory,
    )
    wait()  # until all have read what the trainings left
    folder, form = None, ""
    if leads() and out is not None:
        anatomy, stored = dense.anatomy, student.model
        if (again := reload()) is not None:
            anatomy, stored = again
            adopt(stored, student.model, untouched)
        stored = with_maps_inside(stored, anatomy, given.removed)
        document = {"recovery": [stage.to_json() for stage in stages], "notes": list(notes)}
        folder = save(
            stored,
            out,
            plan=given,
            tokenizer=dense.loaded.tokenizer,
            card=recovery_card(stages),
            pages={"recovery.json": json.dumps(document, indent=1)},
            force=force,
            verify_ids=text.input_ids[:1, :64],
        )
        form = "packaged" if isinstance(stored, LeavesOut) else "ordinary"
    if leads():
        resume.clear()
    wait()
    return Recovered(student.model, given, stages, notes, folder, form)


def parse_recoveries(names: str, settings: Mapping[str, str], what: str = "") -> Stages:
    """Recoveries by name with their options. what: whom to name in the error about an option that none of them has.

    Raises UserError when there is no name, UnknownName for one that does not exist, or an option that none has,
    or a value out of range.
    """
    methods = [recoveries.get(name.strip()) for name in names.split(",") if name.strip()]
    if not methods:
        known = ", ".join(method.name for method in recoveries)
        raise UserError(f"no recovery is named in {names!r}: name one or several of {known}, as in refit.")
    options = share_options(what or f"recovery {names!r}", methods, settings)
    for method, given in zip(methods, options, strict=True):
        if method.traits.get("trained"):
            check_recipe(given)
    return list(zip(methods, options, strict=True))


def require_place(steps: Stages, dense: Anatomy, removed: frozenset[Unit]) -> None:
    """Raise ModelError where maps that these recoveries put at cuts could not be saved: before they are fitted."""
    maps = [method for method, _ in steps if method.traits.get("maps")]
    if not maps:
        return
    trial = cut(dense, removed)
    generator = torch.Generator().manual_seed(0)
    for _ in maps:
        for patch in attach(trial, cuts(trial, dense, removed), rank=1, seed=0):
            assert isinstance(patch, Patch)
            for part in (patch.up, patch.bias):  # a map that shows
                part.data = torch.randn(part.shape, generator=generator).to(part)
    try:
        mapped(trial, dense, removed)
    except ModelError as error:
        raise ModelError(f"what {maps[0].name} makes could not be saved: {error} Use refit, lora or full.") from None


def training_text(
    dense: Subject,
    steps: Stages,
    calibration: str | Path | CalibrationSet | None,
    *,
    sequences: int,
    length: int,
    instructions: str | Path | None,
    window: int,
    max_windows: int | None,
    seed: int,
) -> Training | None:
    """What those of the recoveries that train will read, and what they are measured on; None where none of them trains.

    Raises UserError for instructions that nothing would read, CorpusError when there is too little text.
    """
    if not any(method.traits.get("trained") for method, _ in steps):
        if instructions is not None:
            raise UserError("--instructions is for recoveries that train, such as full or lora: name one, or drop it.")
        return None
    text: CalibrationSet
    if instructions is not None:
        conversations = build_instructions(instructions, dense.tokenizer, length=length, sequences=sequences)
        text, held = split(conversations)
        if held is not None:
            return Training(text, lambda model: answer_perplexity(model, held), (held.digest,))
    else:
        try:
            text = calibrate(dense, calibration, sequences=sequences, length=length, seed=seed)
        except CorpusError as error:
            raise CorpusError(f"{error} For training, sequences are set with --train-sequences.") from None
    left_out = next(iter(held_out(calibration).values()), None)
    if left_out is None:
        return Training(text, None)
    tokenizer = dense.tokenizer
    ids = torch.tensor(tokenizer(left_out, add_special_tokens=False, verbose=False)["input_ids"])

    def measure(model: PreTrainedModel) -> float:
        label, fits = "on what calibration left out", fitting(dense, window)
        return perplexity(model, tokenizer, ids, window=fits, max_windows=max_windows, label=label).perplexity

    digest = hashlib.sha256(left_out.encode()).hexdigest()
    return Training(text, measure, (digest, fitting(dense, window), max_windows))


def run_recoveries(
    student: Subject,
    dense: Subject,
    removed: frozenset[Unit],
    steps: Stages,
    text: CalibrationSet,
    *,
    training: Training | None,
    resume: Resume,
    measure: Callable[[Subject], Mapping[str, float]],
    seed: int,
    memory: int | None,
) -> tuple[Subject, tuple[RecoveryStage, ...], tuple[str, ...]]:
    """Change the student's model in place, one recovery after another. Returns the student, which is another one where
    weights were spread over processes.

    text: for those in closed form. training: for those that train. measure: perplexities of the student as it is,
    called before the first and behind each.
    """
    stages = [RecoveryStage("cut", measure(student))]
    notes: list[str] = []
    begun = [fingerprint(student.model), dense.identity.fingerprint, sorted(map(str, removed)), text.digest, seed]
    try:
        for number, (method, options) in enumerate(steps):
            size = _parameters(student.model)
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
            if method.traits.get("trained"):
                assert training is not None
                done = [(one.name, given) for one, given in steps[: number + 1]]
                folder = resume.folder(*begun, training.text.digest, training.measured, done)
                supplied |= {"calibration": training.text, "held_out": training.held_out, "folder": folder}
            with progress.task(f"recovery {method.name}"):
                made = method.function(**{name: supplied[name] for name in method.parameters}, **options)
            if made is not None and made is not student.model:
                student = Subject(replace(student.loaded, model=made), dissect(made))
            seconds, tokens = time.perf_counter() - start, repair.tokens
            curve: tuple[dict[str, float], ...] = ()
            if folder is not None and (folder / ENDED).is_file():  # a method from elsewhere may keep nothing
                told = json.loads((folder / ENDED).read_text(encoding="utf-8"))
                seconds, tokens, curve = max(seconds, told["seconds"]), told["tokens"], tuple(told["curve"])
                repair.notes.append(_told(told))
            notes += [f"{method.name}: {note}" for note in repair.notes]
            gained = _parameters(student.model) - size
            stages.append(RecoveryStage(method.name, measure(student), gained, tokens, round(seconds, 1), curve))
    finally:
        resume.tidy()
    return student, tuple(stages), tuple(notes)


def _told(told: Mapping[str, Any]) -> str:
    """A training in a sentence. told: its training.json."""
    sentence = f"{plural(told['step'], 'step')} of training in {told['seconds'] / 60:.1f} minutes"
    sentence += f", which stopped early: {told['stopped']}" if told["stopped"] else ""
    return f"{sentence}; the weights of step {told['kept']} are kept."


def perplexities(
    subject: Subject, contents: Mapping[str, str], window: int, max_windows: int | None
) -> dict[str, float]:
    """Perplexity on each text, by the text's name."""
    return {
        text_name(name): text_perplexity(
            subject, content, window=window, max_windows=max_windows, label=f"on {text_name(name)}"
        ).perplexity
        for name, content in contents.items()
    }


def with_maps_inside(model: PreTrainedModel, dense: Anatomy, removed: frozenset[Unit]) -> PreTrainedModel:
    """The model that can be saved: itself, or where maps stand at cuts, one that has them in place of what is missing.

    dense: of the model it was cut from, in the same precision.
    """
    return mapped(model, dense, removed) if any(patches(model)) else model


def recovery_card(stages: Sequence[RecoveryStage]) -> str:
    """The stages as a Markdown table for the model card."""
    head, rows = recovery_rows(stages)
    lines = ["## Recovery", "", f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _parameters(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _plan(model: Any, teacher: Any, plan: PruningPlan | str | Path | None) -> PruningPlan:
    """The plan that was given, or the one in the pruned checkpoint."""
    if isinstance(plan, PruningPlan):
        return plan
    if plan is not None:
        return PruningPlan.load(plan)
    if teacher is None:
        raise UserError(
            "say what the model was cut from, or how to cut it: give a pruned checkpoint with its dense model "
            "(--teacher MODEL), or a dense model with a plan (--plan FILE)."
        )
    inside = Path(model) / PLAN if isinstance(model, (str, Path)) else None
    if inside is None or not inside.is_file():
        raise PlanError(
            f"{model if inside is not None else 'a model in memory'} has no {PLAN} that says what is missing: name the "
            "plan that it was cut by (--plan FILE)."
        )
    return PruningPlan.load(inside)


def _student(
    model: Any, dense: Subject, plan: PruningPlan, *, has_teacher: bool, options: Mapping[str, Any]
) -> tuple[Subject, Callable[[], tuple[Anatomy, PreTrainedModel] | None]]:
    """The cut model, and how to get it and the dense one's anatomy once more, in the precision that its checkpoint has;
    None where they are in that.
    """
    if has_teacher:
        student = open_subject(model, dense.loaded.tokenizer, **options)
        _require_kin(student, dense)
        plan.require_for(dense.identity)
        folder = student.loaded.path
        stored = None if folder is None else stored_dtype(folder)
        if stored in (None, student.dtype):
            return student, lambda: None
        wanted = {**options, "device": "cpu", "dtype": stored}
        name = dense.model if dense.loaded.path is None else dense.loaded.path
        return student, lambda: (open_subject(name, **wanted).anatomy, open_subject(folder, **wanted).model)
    plan.require_for(dense.identity)
    with progress.task("cutting"):
        smaller = cut(dense.anatomy, plan.removed)
        loaded = LoadedModel(smaller, dense.loaded.tokenizer, dense.loaded.name, dense.loaded.revision, None)

    return Subject(loaded, dissect(smaller)), lambda: as_stored(dense, plan.removed)


def as_stored(dense: Subject, removed: frozenset[Unit]) -> tuple[Anatomy, PreTrainedModel] | None:
    """Anatomy of the dense model, and the plain cut, in the precision that the checkpoint is stored in; None where they
    are in memory in that precision.
    """
    folder = dense.loaded.path
    if folder is None:
        return None
    stored = stored_dtype(folder)
    if stored in (None, dense.dtype):
        return None
    anatomy = open_subject(folder, device="cpu", dtype=stored).anatomy
    return anatomy, cut(anatomy, removed)


def _require_kin(student: Subject, dense: Subject) -> None:
    """Raise ModelError when one model cannot teach the other."""
    mine, theirs = (side.model.config.get_text_config(decoder=True) for side in (student, dense))
    kinds = (stock_type(mine), stock_type(theirs))
    sizes = {what: (getattr(mine, what, None), getattr(theirs, what, None)) for what in ("hidden_size", "vocab_size")}
    for what, (own, other) in {"model_type": kinds, **sizes}.items():
        if own != other:
            raise ModelError(
                f"{dense.loaded.name} cannot teach {student.loaded.name}: its {what} is {other!r}, not {own!r}. Name "
                "the dense model that it was cut from (--teacher)."
            )
    if len(student.anatomy.blocks) > len(dense.anatomy.blocks):
        raise ModelError(
            f"{dense.loaded.name} has {len(dense.anatomy.blocks)} blocks, {student.loaded.name} has "
            f"{len(student.anatomy.blocks)}: the teacher is the larger one."
        )
