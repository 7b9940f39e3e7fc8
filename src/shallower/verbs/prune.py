"""`shallower prune`: the whole job, from a model and some text to a smaller checkpoint with a page that shows what it
cost.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shallower import progress
from shallower.corpus import CalibrationSet
from shallower.defaults import WINDOW, WINDOWS
from shallower.engine import stream_scores
from shallower.errors import CorpusError, ModelError, OutputError, PlanError
from shallower.evaluation.tasks import TaskSettings
from shallower.exporters import export
from shallower.filenames import PAGE, REPORT
from shallower.forms import require_form
from shallower.plan import MadeBy, PruningPlan
from shallower.registry import Configured
from shallower.registry import metric as metrics
from shallower.reporting.card import pruned_card
from shallower.reporting.data import RecoveryStage, ReportData
from shallower.reporting.page import render
from shallower.resources import parse_memory, parse_workers
from shallower.scores import Scores
from shallower.surgery import Export, cut, require_together, require_unquantized, require_whole, save
from shallower.surgery.patch import patches
from shallower.units import Kind, Unit, listed, plain
from shallower.verbs.before_after import BeforeAfter, Clock, before_after
from shallower.verbs.prune_checks import require_consistent, require_prunable, require_storable, split_settings
from shallower.verbs.prune_texts import JobTexts, shared_with_held_out, texts_of_prune
from shallower.verbs.questions import read_questions
from shallower.verbs.recoveries import (
    Resume,
    recovery_made_by,
    require_place,
    require_recoverable,
    run_recoveries,
)
from shallower.verbs.recovery_steps import (
    require_closed_form,
    require_launch,
    require_training,
)
from shallower.verbs.repairable import keep_repairable
from shallower.verbs.repaired import left_unrepaired
from shallower.verbs.request import Request, parameters_left, resolve, takes_all
from shallower.verbs.score import stream_statistic
from shallower.verbs.search import search as search_plan
from shallower.verbs.search_methods import require_possible
from shallower.verbs.stored import as_stored, stored_cut
from shallower.verbs.subject import ModelLike, Subject, open_subject, require_place_for, require_space_for
from shallower.verbs.texts import (
    fitting,
    nothing_held_out,
    perplexities,
    read_texts,
    require_measurable,
    tokens_read,
)
from shallower.version import __version__

INFLUENCE = "cosine"
DISTANCE = "angular"


@dataclass(frozen=True, eq=False)
class Pruned:
    """A finished job. folder: the checkpoint, None when it was not saved. of_blocks: the parameters that the dense
    model's blocks held.
    """

    model: PreTrainedModel = field(repr=False)
    plan: PruningPlan
    report: ReportData = field(repr=False)
    folder: Path | None
    of_blocks: int


@dataclass(frozen=True, eq=False)
class _Job:
    """What is worked on, and with what, whatever the search chooses."""

    subject: Subject
    request: Request
    steps: Sequence[Configured]
    form: str
    read: JobTexts
    window: int
    max_windows: int | None
    seed: int
    memory: int | None
    resume: Resume
    out: str | Path | None


@dataclass(frozen=True, eq=False)
class _CutModel:
    """What is left after a cut, to be measured, and how it is stored."""

    subject: Subject
    export: Export


@dataclass(frozen=True, eq=False)
class _Repaired:
    """A cut model behind the recoveries, if there are any. before: the parameters that they were given. stages: the cut
    model, and the model behind each. notes: what is to be told of them.
    """

    subject: Subject
    before: Sequence[nn.Parameter] | None = None
    stages: tuple[RecoveryStage, ...] = ()
    notes: tuple[str, ...] = ()


def prune(
    model: ModelLike,
    remove: str | int | None = None,
    *,
    out: str | Path | None = None,
    plan: PruningPlan | str | Path | None = None,
    search: str = "greedy",
    objective: str = "nll",
    metric: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    units: str = "block",
    ordinary: bool = False,
    protect: str = "",
    calibration: str | Path | CalibrationSet | None = None,
    sequences: int | None = None,
    length: int | None = None,
    settings: Mapping[str, str] | None = None,
    exact: bool = False,
    repair: str = "",
    recover: str = "",
    train_sequences: int | None = None,
    instructions: str | Path | None = None,
    texts: str | Path | Sequence[str | Path] = (),
    tasks: str | Sequence[str] = (),
    task_items: int | None = None,
    task_data: str | Path | None = None,
    window: int = WINDOW,
    max_windows: int | None = WINDOWS,
    speed: bool = True,
    form: str = "auto",
    seed: int | None = None,
    force: bool = False,
    memory: int | str | None = None,
    workers: int | str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> Pruned:
    """Choose what to remove (or take a plan), cut it out, measure before and after, and write a checkpoint with its
    report.

    remove, search, objective, metric, units, ordinary, protect, settings, exact, repair, memory, workers: as for
    `search`. plan: apply this plan and search nothing. calibration, sequences, length: as for `search`; with a plan by
    default the text that it was made with, if that is still what it was, by the seed that chose of it then, unless a
    `seed` is given. recover: recoveries of the cut model, in order (`refit,full`); `settings` are theirs, too, and
    where `repair` has the same option, for both. Those in closed form read `sequences` sequences of the calibration
    text, but at least 128; those that train `train_sequences` of them (default: 4,096, or all of a shorter text), or
    `instructions`: see `recover`. Their sequences have `length` tokens, but at least 256 where the model can read so
    many. A ready-made set is read whole.
    out: folder to write; without it nothing is written. texts: held-out texts for perplexity; without any, the
    documents that calibration left out. max_windows: windows evaluated of each text. tasks: of lm-eval, asked before
    and after, each for its first `task_items` items; task_data: where they are read from, as for `evaluate`.
    speed: also time prefill and decoding. form: how sublayers that are missing alone are stored, `auto`, `packaged` or
    `padded` (`shallower.forms`).

    Raises UserError (BudgetError, PlanError, OutputError, …) before anything is written, and VerificationError when the
    written checkpoint does not reproduce the pruned model.
    """
    require_consistent(remove, plan, repair, recover, form)
    steps, settings = split_settings(
        recover, settings or {}, search, objective, repair, metric, planned=plan is not None
    )
    require_launch(steps)
    require_training(steps, train_sequences, instructions)
    if plan is not None and steps:
        require_closed_form(steps, None, memory)
    if remove is not None:
        require_possible(
            remove,
            search,
            objective,
            metric,
            settings,
            units=units,
            ordinary=ordinary,
            protect=protect,
            exact=exact,
            repair=repair,
            workers=workers,
        )
    if repair and not steps:
        progress.note(
            f"--repair {repair} only decides what is removed, and the model that is written is not repaired: add "
            f"--recover {repair} for that."
        )
    memory, workers = parse_memory(memory), parse_workers(workers)
    require_form(form)
    if out is not None:
        require_place_for(out, model, force=force)
    clock, resume = Clock(), Resume(out)
    given = plan if plan is None or isinstance(plan, PruningPlan) else PruningPlan.load(plan)
    contents = read_texts(texts)
    asked = read_questions((), tasks, (), settings=TaskSettings(task_items), task_data=task_data) if tasks else None
    with clock("loading"):
        subject = open_subject(model, tokenizer, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        request, protect = _request(
            subject, given, remove, steps, search=search, units=units, ordinary=ordinary, protect=protect
        )
        if out is not None:
            require_space_for(out, subject, parameters_left(subject, request))
    if steps and form == "auto":
        form = "packaged"  # where blocks are not whole: transformers' own way is made from the dense model's weights
    known_cut = _cut_ahead(subject, request, steps, form, saved=out is not None)
    with clock("calibration text"):
        read = texts_of_prune(
            subject,
            given,
            calibration,
            steps,
            objective,
            contents,
            sequences=sequences,
            length=length,
            repair=bool(repair),
            train_sequences=train_sequences,
            instructions=instructions,
            window=window,
            max_windows=max_windows,
            seed=seed,
        )
        require_measurable(subject, read.held_out, window, max_windows=max_windows)
        require_prunable(subject, request, steps, read.fitted, read.training, resume)
    job = _Job(subject, request, steps, form, read, window, max_windows, seed or 0, memory, resume, out)
    with clock("stream metrics"):
        influence, spans = _stream_metrics(subject, _kinds(request), read.whole, job.seed)
    with clock("search"):
        chosen = given
        if chosen is None:
            assert remove is not None
            chosen = search_plan(
                subject,
                remove,
                search=search,
                objective=objective,
                metric=metric,
                scores=spans if search == "contiguous" and metric in (None, DISTANCE) and units == "block" else None,
                units=units,
                ordinary=ordinary,
                protect=protect,
                calibration=read.searched,
                settings=settings,
                exact=exact,
                repair=repair,
                seed=job.seed,
                memory=memory,
                workers=workers,
            )
    with _naming(request, chosen.remove):
        smaller = known_cut or _cut(subject, chosen.removed, form)
        repaired = _repaired(job, smaller.subject, chosen.removed, clock)
    stored = smaller.export
    if out is not None:
        with clock("loading again"):
            stored = _as_stored(job, smaller.export, chosen.removed, repaired)
    known = repaired.stages[-1].perplexity if repaired.stages else None
    measured = before_after(
        subject, repaired.subject, read.held_out, asked, clock, window, max_windows, speed=speed, known=known
    )
    report = _report(job, chosen, influence, spans, repaired, stored, measured, clock.seconds)
    folder = None
    if out is not None:
        with clock("writing and verifying"):
            folder = _save(job, stored, out, report, force=force)
    resume.clear()
    return Pruned(repaired.subject.model, chosen, report, folder, subject.weights.blocks.parameters)


def _request(
    subject: Subject,
    plan: PruningPlan | None,
    remove: str | int | None,
    steps: Sequence[Configured],
    *,
    search: str,
    units: str,
    ordinary: bool,
    protect: str,
) -> tuple[Request, str]:
    """What is to go of a model that can be cut, and what is protected, with what the recoveries cannot repair."""
    require_whole(subject.model)
    require_together(subject.model)
    require_unquantized(subject.model)
    if plan is not None:
        plan.require_for(subject.identity)
        subject.anatomy.require(plan.remove)
        if takes_all(subject, plan.remove):
            raise PlanError(
                f"the plan removes all {len(subject.anatomy.blocks)} blocks, whole or by their sublayers, and "
                "something must stay: shorten it with `shallower plan cut`, or search again for less."
            )
        return Request(plan.remove, None), protect
    assert remove is not None
    request = resolve(subject, remove, search, units=units, ordinary=ordinary, protect=protect)
    if request.budget is None:
        return request, protect
    kept = keep_repairable(subject.anatomy, request.units, steps, protect)
    if kept != protect:
        request = resolve(subject, remove, search, units=units, ordinary=ordinary, protect=kept)
    return request, kept


def _cut_ahead(
    subject: Subject, request: Request, steps: Sequence[Configured], form: str, *, saved: bool
) -> _CutModel | None:
    """What is known to go is cut before anything is read and measured; where it is for a search to say, what can be is
    tried. saved: also what maps at the cuts become.
    """
    if request.budget is not None:
        require_storable(subject, request, steps, form, saved=saved)
        return None
    removed = frozenset(request.units)
    ahead = _cut(subject, removed, form)
    if saved:
        require_place(steps, subject.anatomy, removed)
    return ahead


def _cut(subject: Subject, removed: frozenset[Unit], form: str) -> _CutModel:
    with progress.task("cutting"):
        found = export(subject.anatomy, removed, cut(subject.anatomy, removed), form)
        return _CutModel(subject.holding(found.model), found)


@contextmanager
def _naming(request: Request, chosen: Sequence[Unit]) -> Iterator[None]:
    """Say in an error what a search had chosen, so that it need not be searched again."""
    try:
        yield
    except (CorpusError, ModelError, OutputError) as error:
        if request.budget is None:
            raise
        units = listed(chosen)
        raise type(error)(
            f"{error} The search had chosen {units}: --remove {units} takes that without another search, and what was "
            "measured is remembered, too."
        ) from error


def _repaired(job: _Job, smaller: Subject, removed: frozenset[Unit], clock: Clock) -> _Repaired:
    """What the recoveries make of the cut model, which is changed."""
    if not job.steps:
        return _Repaired(smaller)
    before = [*smaller.model.parameters()]
    with clock("recovery"):
        if job.out is not None and job.request.budget is not None:  # else that was tried before
            require_place(job.steps, job.subject.anatomy, removed)
        require_recoverable(smaller, job.subject, removed, job.steps, job.read.fitted, job.read.training, job.resume)
        repaired, stages, notes = run_recoveries(
            smaller,
            job.subject,
            removed,
            job.steps,
            job.read.fitted,
            training=job.read.training,
            resume=job.resume,
            measure=lambda so_far: perplexities(so_far, job.read.held_out, job.window, job.max_windows),
            seed=job.seed,
            memory=job.memory,
        )
    return _Repaired(repaired.holding(repaired.model), before, stages, notes)


def _as_stored(job: _Job, measured: Export, removed: frozenset[Unit], repaired: _Repaired) -> Export:
    """How the model is stored: `measured`, or where the checkpoint is in another precision or maps stand at cuts,
    another one.
    """
    again = stored_cut(job.subject, removed)
    found = as_stored(job.subject.anatomy, repaired.subject.model, removed, again, repaired.before)
    return measured if found.model is measured.model else export(found.dense, removed, found.model, job.form)


def _report(
    job: _Job,
    plan: PruningPlan,
    influence: Scores,
    spans: Scores | None,
    repaired: _Repaired,
    stored: Export,
    measured: BeforeAfter,
    seconds: Mapping[str, float],
) -> ReportData:
    subject, made_by = job.subject, None
    if job.steps:
        made_by = recovery_made_by(
            subject, job.steps, job.read.fitted, job.read.training, job.seed, job.window, job.max_windows
        )
    return ReportData(
        plan=plan,
        influence=(influence,),
        spans=spans,
        dense=measured.dense,
        pruned=measured.pruned,
        speed_setting=measured.speed_setting,
        seconds=seconds,
        notes=_notes(job, plan, repaired, stored, measured),
        machine=_machine(),
        form="packaged" if any(patches(repaired.subject.model)) else stored.form.name,
        base_model=subject.identity.name,
        folder=Path(job.out).name if job.out is not None else "",
        recovery=repaired.stages,
        recovery_made_by=made_by,
        dtype=subject.dtype,
        device=subject.model.device.type,
        window=fitting(subject, job.window),
        windows=job.max_windows,
        tokenizer=subject.loaded.tokenizer is not None,
    )


def _notes(job: _Job, plan: PruningPlan, repaired: _Repaired, stored: Export, measured: BeforeAfter) -> tuple[str, ...]:
    """What the reader of the report must know."""
    read, tokens = job.read, tokens_read(job.subject, job.window, None, job.max_windows)
    return (
        *shared_with_held_out(job.subject, read, job.steps, tokens),
        *read.notes,
        *nothing_held_out(read.held_out, read.calibration),
        *measured.of_tasks,
        *(() if job.steps else left_unrepaired(plan, "this model was", "Add --recover {}.")),
        *measured.of_speed,
        *stored.notes,
        *repaired.notes,
    )


def _save(job: _Job, stored: Export, out: str | Path, report: ReportData, *, force: bool) -> Path:
    """Write the checkpoint with its report."""
    return save(
        stored,
        out,
        plan=report.plan,
        tokenizer=job.subject.loaded.tokenizer,
        card=pruned_card(report),
        recoveries=[stage.method for stage in report.recovery[1:]],
        pages={REPORT: json.dumps(report.to_json(), indent=1), PAGE: render(report)},
        force=force,
        verify_ids=job.read.judging.input_ids[:1, :64],
    )


def _kinds(request: Request) -> frozenset[Kind]:
    """What kinds of units go, or where the search has not been, may go."""
    return frozenset(unit.kind for unit in plain(request.units)) or frozenset({"block"})  # a plan may remove nothing


def _stream_metrics(
    subject: Subject, kinds: Collection[Kind], text: CalibrationSet, seed: int
) -> tuple[Scores, Scores | None]:
    """Influence of each unit of the kinds, and where blocks may go angular distance of each span of them, from one
    pass.
    """
    names = (INFLUENCE, DISTANCE) if "block" in kinds else (INFLUENCE,)
    statistics = [stream_statistic(metrics.get(name), {}) for name in names]
    rows = stream_scores(subject.anatomy, text, statistics, subject.anatomy.of_kind(*kinds))
    found = []
    for statistic, scored in zip(statistics, rows, strict=True):
        options = {"positions": statistic.positions, "dtype": subject.dtype}
        made_by = MadeBy(None, None, statistic.metric.name, options, seed, text.identity, __version__)
        found.append(Scores(subject.identity, statistic.metric.name, scored, made_by))
    return found[0], found[1] if len(found) > 1 else None


def _machine() -> str:
    return f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}"
