"""`shallower recover`: repair a cut model, and show what every step gave."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shallower import progress
from shallower.anatomy.weigh import size
from shallower.checkpoint.locate import locate
from shallower.corpus import CalibrationSet
from shallower.defaults import REPAIR_LENGTH, REPAIR_SEQUENCES, WINDOW, WINDOWS
from shallower.errors import ModelError, ModelTooLarge, PlanError, TooLittleText, UserError
from shallower.exporters import save
from shallower.filenames import PAGE, PLAN, RECOVERY
from shallower.launched import leads, wait
from shallower.packaged import LeavesOut, has_maps, stock_type
from shallower.plan import PruningPlan
from shallower.registry import Configured
from shallower.reporting.card import recovery_card
from shallower.reporting.data import RecoveryData, RecoveryMadeBy, RecoveryStage
from shallower.reporting.page import render_recovery
from shallower.resources import parse_memory
from shallower.surgery import cut, require_unquantized
from shallower.surgery.plain import is_plain
from shallower.surgery.save import form_of
from shallower.surgery.silence import adds_nothing
from shallower.surgery.stations import layers_of
from shallower.units import listed, sublayers_of
from shallower.verbs.calibrate import calibrate, note_default
from shallower.verbs.contamination import shared_runs
from shallower.verbs.history import methods_of, told_before
from shallower.verbs.plan_text import PlanText, text_of_plan
from shallower.verbs.recoveries import (
    Resume,
    recovery_made_by,
    require_place,
    require_recoverable,
    run_recoveries,
    texts_read,
)
from shallower.verbs.recovery_steps import (
    in_closed_form,
    parse_recoveries,
    require_closed_form,
    require_launch,
    require_training,
    that_need_plain,
)
from shallower.verbs.stored import Stored, as_stored, stored_checkpoint, stored_cut
from shallower.verbs.subject import (
    ModelLike,
    Subject,
    open_subject,
    require_place_for,
    require_space_for,
)
from shallower.verbs.texts import (
    held_out,
    nothing_held_out,
    perplexities,
    read_texts,
    text_title,
    tokens_read,
    values,
)
from shallower.verbs.training_text import Training, training_text


@dataclass(frozen=True, eq=False)
class Recovered:
    """A repaired model. stages: the cut model, then what each recovery made of it. dense: perplexities of the dense
    model, by name of the text. made_by: what the recoveries worked with. folder: None when not saved; form: that of the
    checkpoint (`shallower.forms`), then None. before: what had repaired the model already. tokenizer: whether the
    folder has one.
    """

    model: PreTrainedModel = field(repr=False)
    plan: PruningPlan
    stages: tuple[RecoveryStage, ...]
    notes: tuple[str, ...]
    folder: Path | None
    made_by: RecoveryMadeBy
    dense: Mapping[str, float] = field(default_factory=dict)
    form: str | None = None
    before: Mapping[str, Any] | None = field(default=None, repr=False)
    tokenizer: bool = True

    @property
    def data(self) -> RecoveryData:
        """What recovery.json and the page tell."""
        return RecoveryData(self.made_by, self.dense, self.stages, self.notes, self.form, self.before, self.tokenizer)


def recover(
    model: ModelLike,
    methods: str,
    *,
    teacher: ModelLike | None = None,
    plan: PruningPlan | str | Path | None = None,
    out: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibration: str | Path | CalibrationSet | None = None,
    sequences: int | None = None,
    length: int = REPAIR_LENGTH,
    train_sequences: int | None = None,
    instructions: str | Path | None = None,
    settings: Mapping[str, str] | None = None,
    texts: str | Path | Sequence[str | Path] = (),
    window: int = WINDOW,
    max_windows: int | None = WINDOWS,
    seed: int | None = None,
    force: bool = False,
    memory: int | str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> Recovered:
    """Repair a cut model with its dense teacher, and measure held-out text before and after each step.

    model: a pruned checkpoint, whose plan.json says what is missing; or, without a `teacher`, the dense model, which is
    cut by `plan` first. One that is given itself stays as it was; the repaired one shares with it what no recovery
    changed. methods: names of recoveries, one or several in order (`refit,full`). settings: their options as text.
    calibration: without it the plan's own text is read, where it is still what it was, by the seed that chose of it
    then, unless a `seed` is given. texts: held-out text; without any, the documents that calibration left out. out:
    folder to write; without it nothing is written. train_sequences: what recoveries that train read of the calibration
    text (default: 4,096, or all of a shorter text), as the others read `sequences` (default: 128); a ready-made set is
    read whole by all. instructions: .jsonl file of conversations to train on instead. Trainings keep the weights that
    do best on the documents that calibration left out, or on the answers of every 20th conversation, never by `texts`.
    After a kill the same call resumes, from a folder beside `out`, or in the cache. Of processes that `accelerate
    launch` started together, all train, and the first one writes.

    Raises UserError (PlanError, ModelError, CorpusError, OutputError, …) before anything is written.
    """
    steps = parse_recoveries(methods, settings or {})
    require_launch(steps)
    require_training(steps, train_sequences, instructions)
    require_closed_form(steps, sequences, memory)
    memory = parse_memory(memory)
    if out is not None:
        require_place_for(out, model, teacher, force=force)
    contents = read_texts(texts)
    given = _plan(model, teacher, plan)
    options: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    dense = open_subject(model if teacher is None else teacher, tokenizer, **options)
    require_unquantized(dense.model)
    student, load_again = _student(model, dense, given, has_teacher=teacher is not None, options=options)
    _require_first_repair(student, steps)
    _require_plain(student, dense, given, steps)
    checkpoint = dense if teacher is None else student
    if out is not None:
        if leads():
            require_space_for(out, checkpoint, size((student.model,))[0])
        require_place(steps, dense.anatomy, given.removed)
    read = _texts(
        dense,
        given,
        steps,
        calibration,
        contents,
        sequences=sequences,
        length=length,
        train_sequences=train_sequences,
        instructions=instructions,
        window=window,
        max_windows=max_windows,
        seed=seed,
    )
    seed = seed or 0
    resume = Resume(out)
    require_recoverable(student, dense, given.removed, steps, read.fitted, read.training, resume)
    before = told_before(student.loaded.path) if teacher is not None else None
    # only to tell what changed where it is loaded again: held, they take memory through a whole training
    loads_again = leads() and out is not None and checkpoint.stored_dtype != checkpoint.dtype
    before_repair = [*student.model.parameters()] if loads_again else []
    made_by = recovery_made_by(dense, steps, read.fitted, read.training, seed, window, max_windows)
    of_dense = values(perplexities(dense, read.held_out, window, max_windows, label="of the dense model on"))
    shared = _shared_with_held_out(dense, read, steps, tokens_read(dense, window, None, max_windows))
    student, stages, said = run_recoveries(
        student,
        dense,
        given.removed,
        steps,
        read.fitted,
        training=read.training,
        resume=resume,
        measure=lambda repaired: perplexities(repaired, read.held_out, window, max_windows),
        seed=seed,
        memory=memory,
        repaired=before is not None or _is_changed(student, dense, given),
    )
    notes = (*shared, *read.notes, *nothing_held_out(read.held_out, read.calibration), *said)
    wait()  # until all have read what the trainings left
    folder, form, has_tokenizer = None, None, dense.loaded.tokenizer is not None
    if leads() and out is not None:
        stored = as_stored(dense.anatomy, student.model, given.removed, load_again(), before_repair).model
        form = "packaged" if isinstance(stored, LeavesOut) else form_of("ordinary", stored).name
        told = RecoveryData(made_by, of_dense, stages, notes, form, before, has_tokenizer)
        folder = _save(stored, out, given, told, dense.loaded.tokenizer, read.fitted, force=force)
    if leads():
        resume.clear()
    wait()
    return Recovered(student.model, given, stages, notes, folder, made_by, of_dense, form, before, has_tokenizer)


@dataclass(frozen=True, eq=False)
class _Texts:
    """What is read. calibration: what was named, or the plan's own text. notes: what is to be told of that. fitted:
    what repairs in closed form are fitted on; where there are none, what is trained on. training: what trainings read,
    None without any. held_out: texts by name that perplexity is measured on.
    """

    calibration: str | Path | CalibrationSet | None
    notes: tuple[str, ...]
    fitted: CalibrationSet
    training: Training | None
    held_out: Mapping[str, str]


def _texts(
    dense: Subject,
    plan: PruningPlan,
    steps: Sequence[Configured],
    calibration: str | Path | CalibrationSet | None,
    contents: Mapping[str, str],
    *,
    sequences: int | None,
    length: int,
    train_sequences: int | None,
    instructions: str | Path | None,
    window: int,
    max_windows: int | None,
    seed: int | None,
) -> _Texts:
    """All texts, as `recover` says; `contents` are held out where there are any, else what calibration left out."""
    own, only_read = PlanText(), calibration if contents else None  # else what it holds out is shown
    if calibration is None and (in_closed_form(steps) or instructions is None or not contents):
        repairs = in_closed_form(steps) or instructions is None
        own = text_of_plan(dense, plan, seed, repairs=repairs, has_held_out=bool(contents))
        calibration = own.spec
        if not own.notes:
            note_default(calibration)
    fitted = None
    if in_closed_form(steps):
        count = REPAIR_SEQUENCES if sequences is None else sequences
        try:
            fitted = calibrate(dense, calibration, sequences=count, length=length, seed=seed or 0)
        except TooLittleText as error:
            raise TooLittleText(" ".join([str(error), *own.notes])) from None
    contents = contents or held_out(calibration)
    training = training_text(
        dense,
        steps,
        calibration,
        sequences=train_sequences,
        length=length,
        instructions=instructions,
        contents=contents,
        window=window,
        max_windows=max_windows,
        seed=seed or 0,
    )
    if fitted is None:
        assert training is not None
        fitted = training.text
        if only_read is not None and not training.of_calibration:
            raise UserError(
                f"nothing reads the calibration text {text_title(only_read)}: conversations (--instructions) are "
                "trained on and measured by, and --text is shown. Leave out --calibration, or --text."
            )
    return _Texts(calibration, own.notes, fitted, training, contents)


def _shared_with_held_out(
    dense: Subject, read: _Texts, steps: Sequence[Configured], tokens: int | None
) -> tuple[str, ...]:
    """What is to be told of held-out text that was read before. tokens: how much of each text is measured."""
    repaired, trained = texts_read(steps, read.fitted, read.training)
    before = {"the text of the repair": repaired, "the training text": trained}
    return tuple(shared_runs(dense, before, read.held_out, tokens, flattered="the repaired model"))


def _save(
    stored: PreTrainedModel,
    out: str | Path,
    plan: PruningPlan,
    told: RecoveryData,
    tokenizer: PreTrainedTokenizerBase | None,
    text: CalibrationSet,
    *,
    force: bool,
) -> Path:
    """Write the checkpoint with its report. text: what its logits are compared on when it is loaded again."""
    return save(
        stored,
        out,
        plan=plan,
        tokenizer=tokenizer,
        card=recovery_card(told.recovery, told.dense, told.made_by),
        recoveries=[*methods_of(told.before), *(stage.method for stage in told.recovery[1:])],
        pages={
            RECOVERY: json.dumps(told.to_json(), indent=1),
            PAGE: render_recovery(plan, told, Path(out).name),
        },
        force=force,
        verify_ids=text.input_ids[:1, :64],
    )


def _plan(model: ModelLike, teacher: ModelLike | None, plan: PruningPlan | str | Path | None) -> PruningPlan:
    """The plan that was given, or the one in the pruned checkpoint."""
    inside = Path(os.path.expanduser(model)) / PLAN if isinstance(model, (str, Path)) else None
    if plan is not None:
        given = plan if isinstance(plan, PruningPlan) else PruningPlan.load(plan)
        if teacher is not None and inside is not None:
            _require_agreed(given, "the plan" if plan is given else f"--plan {plan}", inside)
        return given
    if teacher is None:
        raise UserError(
            "say what the model was cut from, or how to cut it: give a pruned checkpoint with its dense model "
            "(--teacher MODEL), or a dense model with a plan (--plan FILE)."
        )
    if inside is not None and not inside.parent.is_dir():
        locate(str(model))  # says that there is no such model, or what it is instead
    if inside is None or not inside.is_file():
        raise PlanError(
            f"{model if inside is not None else 'a model in memory'} has no {PLAN} that says what is missing: name the "
            "plan that it was cut by (--plan FILE)."
        )
    return PruningPlan.load(inside)


def _require_agreed(given: PruningPlan, name: str, inside: Path) -> None:
    """Raise PlanError where the checkpoint's own plan says that other units of the same model are missing. name: of the
    plan that was given.
    """
    try:
        own = PruningPlan.load(inside)
    except PlanError:  # without one, or with one that cannot be read, another is needed
        return
    if own.model.fingerprint == given.model.fingerprint and sublayers_of(own.remove) != sublayers_of(given.remove):
        raise PlanError(
            f"{inside} says that {inside.parent.name} lacks {listed(own.remove) or 'nothing'}, and {name} removes "
            f"{listed(given.remove) or 'nothing'}: leave the plan out, or name the checkpoint that was cut by it."
        )


def _student(
    model: ModelLike, dense: Subject, plan: PruningPlan, *, has_teacher: bool, options: Mapping[str, Any]
) -> tuple[Subject, Callable[[], Stored | None]]:
    """The cut model, and how to get it and the dense one's anatomy once more, in the precision that its checkpoint has;
    None where they are in that.
    """
    if has_teacher:
        try:
            student = open_subject(model, dense.loaded.tokenizer, **options)
        except ModelTooLarge as error:
            raise ModelTooLarge(
                f"{error} It is loaded whole beside its teacher. For a plain cut give the dense model and the plan "
                f"instead (--plan {PLAN}): then both share their weights."
            ) from error
        if student.model.device != dense.model.device:
            raise UserError(
                f"{student.loaded.name} is on {student.model.device} and its teacher {dense.loaded.name} on "
                f"{dense.model.device}, and what one computes is compared with what the other does: put both on one "
                "device (model.to(…), or device=… for what is given by name)."
            )
        if not isinstance(model, (str, Path)):
            student = student.shared()
        _require_kin(student, dense)
        _require_gone(student, dense)
        plan.require_for(dense.identity)
        if not _has_maps(student):  # else places of what is missing are there
            layers_of(student.anatomy, dense.anatomy, plan.removed)
        folder, stored = student.loaded.path, student.stored_dtype
        if folder is None or stored == student.dtype:
            return student, lambda: None
        return student, partial(stored_checkpoint, folder, dense, **{**options, "device": "cpu", "dtype": stored})
    plan.require_for(dense.identity)
    with progress.task("cutting"):
        student = dense.holding(cut(dense.anatomy, plan.removed))
    return student, partial(stored_cut, dense, plan.removed)


def _require_first_repair(student: Subject, steps: Sequence[Configured]) -> None:
    """Raise PlanError for repairs of a model in which maps make up already for what is missing: it would be made up
    for twice.
    """
    repairs = [method.name for method, _ in steps if method.traits.get("maps") or not method.trained]
    if repairs and _has_maps(student):
        raise PlanError(
            f"{student.loaded.name} has maps in the place of what is missing, as an earlier recovery left them: it can "
            f"be trained further (--with full), but not repaired again by {repairs[0]}. Repair the plain cut: give the "
            f"dense model with the plan (--plan {PLAN})."
        )


def _has_maps(student: Subject) -> bool:
    """Whether maps of an earlier recovery stand in a checkpoint's blocks."""
    return isinstance(student.model, LeavesOut) and has_maps(student.model.config)


def _require_plain(student: Subject, dense: Subject, plan: PruningPlan, steps: Sequence[Configured]) -> None:
    """Raise UserError where a recovery that needs the plain cut is given a model that was repaired or trained, or is in
    another number format than the dense one, whose units it runs on the cut model's stream.
    """
    what = that_need_plain(steps)
    if what and student.dtype != dense.dtype:
        raise UserError(
            f"{what} runs units of {dense.loaded.name} ({dense.dtype}) on the stream of {student.loaded.name} "
            f"({student.dtype}): load both in one number format."
        )
    if what and not is_plain(student.model, dense.anatomy, plan.removed):
        raise UserError(
            f"{what} needs the cut model that nothing was repaired of, and weights of {student.loaded.name} are others "
            f"than in {dense.loaded.name}: choose another way for {steps[0][0].name} (--set), or begin with the plain "
            f"cut: give the dense model with the plan (--plan {PLAN})."
        )


def _is_changed(student: Subject, dense: Subject, plan: PruningPlan) -> bool:
    """Whether a model that was given in memory, of which nothing is told, was repaired or trained, as far as can be
    seen: what was cut elsewhere may be of a family that cannot be cut so here.
    """
    if student.loaded.path is not None:
        return False
    try:
        return not is_plain(student.model, dense.anatomy, plan.removed)
    except ModelError:
        return False


def _require_gone(student: Subject, dense: Subject) -> None:
    """Raise ModelError for a padded checkpoint: what was removed is still in it, as sublayers with a matrix of zeros,
    which training would bring back, and behind which nothing can be fitted.
    """
    empty, own = (
        [unit for unit in side.anatomy.of_kind("attn", "mlp") if adds_nothing(side.anatomy, unit)]
        for side in (student, dense)
    )
    if len(empty) > len(own):
        raise ModelError(
            f"{student.loaded.name} is padded: {listed(empty)} are in it with a matrix of zeros in the place of what "
            f"was removed, which training would bring back. Give the dense model with the plan instead (--plan {PLAN})."
        )


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
