"""`shallower recover`: repair a cut model, and show what every step gave."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shallower import progress
from shallower.anatomy import dissect
from shallower.checkpoint.load import LoadedModel
from shallower.checkpoint.locate import stored_dtype
from shallower.corpus import CalibrationSet
from shallower.errors import ModelError, PlanError, UserError
from shallower.evaluation.text import read_evaluation_text
from shallower.plan import PruningPlan
from shallower.recovery import Repair
from shallower.registry import Method, share_options
from shallower.registry import recovery as recoveries
from shallower.reporting.data import RecoveryStage
from shallower.reporting.wording import recovery_rows
from shallower.resources import parse_memory
from shallower.surgery import cut, require_free, require_ordinary, save
from shallower.surgery.adopt import adopt
from shallower.units import Unit
from shallower.verbs.evaluate import held_out, text_name, text_perplexity
from shallower.verbs.subject import Subject, calibrate, open_subject

PLAN = "plan.json"
SEQUENCES, LENGTH = 128, 256  # a matrix with 1,536 inputs wants many times as many tokens
Stages = Sequence[tuple[Method, Mapping[str, Any]]]  # recoveries and their options


@dataclass(frozen=True, eq=False)
class Recovered:
    """A repaired model. stages: the cut model, then what each recovery made of it. folder: None when not saved."""

    model: PreTrainedModel = field(repr=False)
    plan: PruningPlan
    stages: tuple[RecoveryStage, ...]
    notes: tuple[str, ...]
    folder: Path | None

    def to_json(self) -> dict[str, Any]:
        return {
            "folder": None if self.folder is None else str(self.folder),
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
    cut by `plan` first. methods: names of recoveries, one or several in order (`emulated-update,refit`). settings:
    their options as text. texts: held-out text; without any, the documents that calibration left out. out: folder to
    write; without it nothing is written.

    Raises UserError (PlanError, ModelError, CorpusError, OutputError, …) before anything is written.
    """
    steps = parse_recoveries(methods, settings or {})
    memory = parse_memory(memory)
    if out is not None:
        require_free(out, force=force)
    contents = {text: read_evaluation_text(text) for text in texts}
    given = _plan(model, teacher, plan)
    options: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    dense = open_subject(model if teacher is None else teacher, tokenizer, **options)
    student, reload = _student(model, dense, given, has_teacher=teacher is not None, options=options)
    text = calibrate(dense, calibration, sequences=sequences, length=length, seed=seed)
    contents = contents or held_out(calibration)
    untouched = [*student.model.parameters()]
    stages, notes = run_recoveries(
        student,
        dense,
        given.removed,
        steps,
        text,
        measure=lambda: perplexities(student, contents, window, max_windows),
        seed=seed,
        memory=memory,
    )
    if out is None:
        return Recovered(student.model, given, stages, notes, None)
    require_ordinary(student.model)
    stored = reload()
    if stored is not student.model:
        adopt(stored, student.model, {id(parameter) for parameter in untouched})
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
    return Recovered(student.model, given, stages, notes, folder)


def parse_recoveries(names: str, settings: Mapping[str, str], what: str = "") -> Stages:
    """Recoveries by name with their options. what: whom to name in the error about an option that none of them has.

    Raises UserError when there is no name, UnknownName for one that does not exist, or an option that none has.
    """
    methods = [recoveries.get(name.strip()) for name in names.split(",") if name.strip()]
    if not methods:
        known = ", ".join(method.name for method in recoveries)
        raise UserError(f"no recovery is named in {names!r}: name one or several of {known}, as in refit.")
    return list(zip(methods, share_options(what or f"recovery {names!r}", methods, settings), strict=True))


def run_recoveries(
    student: Subject,
    dense: Subject,
    removed: frozenset[Unit],
    steps: Stages,
    text: CalibrationSet,
    *,
    measure: Callable[[], Mapping[str, float]],
    seed: int,
    memory: int | None,
) -> tuple[tuple[RecoveryStage, ...], tuple[str, ...]]:
    """Change `student.model` in place, one recovery after another.

    measure: perplexities of the student as it is, called before the first and behind each.
    """
    stages = [RecoveryStage("cut", measure())]
    notes: list[str] = []
    for method, options in steps:
        repair = Repair(dissect(student.model), dense.anatomy, removed, text, seed, memory)
        size = _parameters(student.model)
        start = time.perf_counter()
        with progress.task(f"recovery {method.name}"):
            method.function(repair, **options)
        seconds = round(time.perf_counter() - start, 1)
        notes += [f"{method.name}: {note}" for note in repair.notes]
        stages.append(RecoveryStage(method.name, measure(), _parameters(student.model) - size, repair.tokens, seconds))
    return tuple(stages), tuple(notes)


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
) -> tuple[Subject, Callable[[], PreTrainedModel]]:
    """The cut model, and how to get it once more in the precision that its checkpoint has."""
    if has_teacher:
        student = open_subject(model, dense.loaded.tokenizer, **options)
        _require_kin(student, dense)
        plan.require_for(dense.identity)
        folder = student.loaded.path
        stored = None if folder is None else stored_dtype(folder)
        if stored in (None, _dtype(student)):
            return student, lambda: student.model
        wanted = {**options, "device": "cpu", "dtype": stored}
        return student, lambda: open_subject(folder, **wanted).model
    plan.require_for(dense.identity)
    with progress.task("cutting"):
        smaller = cut(dense.anatomy, plan.removed)
        loaded = LoadedModel(smaller, dense.loaded.tokenizer, dense.loaded.name, dense.loaded.revision, None)
        return Subject(loaded, dissect(smaller)), lambda: as_stored(dense, smaller, plan.removed)


def as_stored(dense: Subject, smaller: PreTrainedModel, removed: frozenset[Unit]) -> PreTrainedModel:
    """The plain cut in the precision that the dense checkpoint is stored in; `smaller` itself where it has that."""
    folder = dense.loaded.path
    if folder is None:
        return smaller
    stored = stored_dtype(folder)
    if stored in (None, str(smaller.dtype).removeprefix("torch.")):
        return smaller
    return cut(open_subject(folder, device="cpu", dtype=stored).anatomy, removed)


def _dtype(subject: Subject) -> str:
    return str(subject.model.dtype).removeprefix("torch.")


def _require_kin(student: Subject, dense: Subject) -> None:
    """Raise ModelError when one model cannot teach the other."""
    mine, theirs = (side.model.config.get_text_config(decoder=True) for side in (student, dense))
    for what in ("model_type", "hidden_size", "vocab_size"):
        own, other = getattr(mine, what, None), getattr(theirs, what, None)
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
