"""`shallower prune`: the whole job, from a model and some text to a smaller checkpoint with a page that shows what it
cost.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shallower import progress
from shallower.corpus import CalibrationSet
from shallower.defaults import WINDOW, WINDOWS
from shallower.engine import stream_scores
from shallower.errors import PlanError, UserError
from shallower.evaluation.tasks import TaskSettings
from shallower.exporters import export
from shallower.filenames import PAGE, REPORT
from shallower.forms import require_form
from shallower.plan import MadeBy, PruningPlan
from shallower.registry import Configured
from shallower.registry import metric as metrics
from shallower.reporting.data import RecoveryStage, ReportData
from shallower.reporting.page import render
from shallower.reporting.wording import size, speed_rows
from shallower.resources import parse_memory, parse_workers
from shallower.scores import Scores
from shallower.surgery import Export, cut, require_together, require_unquantized, require_whole, save
from shallower.surgery.adopt import adopt
from shallower.surgery.patch import patches
from shallower.units import Kind, Unit, plain
from shallower.verbs.before_after import Clock, before_after
from shallower.verbs.prune_checks import require_consistent, require_prunable, require_storable
from shallower.verbs.prune_texts import shared_with_held_out, texts_of_prune, wanted_of_prune
from shallower.verbs.questions import read_questions
from shallower.verbs.recover import as_stored
from shallower.verbs.recoveries import (
    Resume,
    recovery_card,
    recovery_made_by,
    require_place,
    require_recoverable,
    run_recoveries,
    with_maps_inside,
)
from shallower.verbs.recovery_steps import (
    in_closed_form,
    named_recoveries,
    parse_recoveries,
    require_closed_form,
    require_launch,
    require_training,
)
from shallower.verbs.repairable import keep_repairable, naming
from shallower.verbs.repaired import left_unrepaired
from shallower.verbs.request import Request, parameters_left, resolve, takes_all
from shallower.verbs.score import stream_statistic
from shallower.verbs.search import search as search_plan
from shallower.verbs.search_methods import require_possible, settable
from shallower.verbs.subject import Subject, open_subject, require_place_for, require_space_for
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


def prune(
    model: str | Path | PreTrainedModel | Subject,
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
    steps, settings = _recoveries(recover, settings or {}, search, objective, repair, metric, planned=plan is not None)
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
    # what is known to go is cut before anything is read and measured
    known_cut = _cut(subject, frozenset(request.units), form) if request.budget is None else None
    if known_cut is None:
        require_storable(subject, request, steps, form, saved=out is not None)
    elif out is not None:
        require_place(steps, subject.anatomy, frozenset(request.units))
    with clock("calibration text"):
        text = wanted_of_prune(
            subject,
            given,
            calibration,
            objective,
            sequences,
            length,
            seed,
            repairs=in_closed_form(steps) or (bool(steps) and instructions is None),
            has_held_out=bool(contents),
        )
        seed = seed or 0
        read = texts_of_prune(
            subject,
            text,
            steps,
            objective,
            contents,
            repair=bool(repair),
            train_sequences=train_sequences,
            instructions=instructions,
            window=window,
            max_windows=max_windows,
            seed=seed,
        )
        require_measurable(subject, read.held_out, window, max_windows=max_windows)
        require_prunable(subject, request, steps, read.fitted, read.training, resume)
    with clock("stream metrics"):
        influence, spans = _stream_metrics(subject, _kinds(request), read.whole, seed)
    with clock("search"):
        if given is None:
            assert remove is not None
            given = search_plan(
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
                seed=seed,
                memory=memory,
                workers=workers,
            )
    with nullcontext() if request.budget is None else naming(given.remove):
        smaller, exported = known_cut or _cut(subject, given.removed, form)
    before_repair = [*smaller.model.parameters()]
    stages: tuple[RecoveryStage, ...] = ()
    said: tuple[str, ...] = ()
    if steps:
        with nullcontext() if request.budget is None else naming(given.remove), clock("recovery"):
            if out is not None and known_cut is None:
                require_place(steps, subject.anatomy, given.removed)
            require_recoverable(smaller, subject, given.removed, steps, read.fitted, read.training, resume)
            smaller, stages, said = run_recoveries(
                smaller,
                subject,
                given.removed,
                steps,
                read.fitted,
                training=read.training,
                resume=resume,
                measure=lambda repaired: perplexities(repaired, read.held_out, window, max_windows),
                seed=seed,
                memory=memory,
            )
        smaller = smaller.holding(smaller.model)
    stored = exported
    if out is not None:
        with clock("loading again"):
            stored = _as_stored(subject, exported, given.removed, form, smaller.model if steps else None, before_repair)
    known = stages[-1].perplexity if stages else None
    measured = before_after(
        subject, smaller, read.held_out, asked, clock, window, max_windows, speed=speed, known=known
    )
    data = ReportData(
        plan=given,
        influence=(influence,),
        spans=spans,
        dense=measured.dense,
        pruned=measured.pruned,
        speed_setting=measured.speed_setting,
        seconds=clock.seconds,
        notes=(
            *shared_with_held_out(subject, read, steps, tokens_read(subject, window, None, max_windows)),
            *text.notes,
            *nothing_held_out(read.held_out, text.calibration),
            *measured.of_tasks,
            *(() if steps else left_unrepaired(given, "this model was", "Add --recover {}.")),
            *measured.of_speed,
            *stored.notes,
            *said,
        ),
        machine=_machine(),
        form="packaged" if any(patches(smaller.model)) else stored.form.name,
        base_model=subject.identity.name,
        folder=Path(out).name if out is not None else "",
        recovery=stages,
        recovery_made_by=(
            recovery_made_by(subject, steps, read.fitted, read.training, seed, window, max_windows) if steps else None
        ),
        dtype=subject.dtype,
        device=subject.model.device.type,
        window=fitting(subject, window),
        windows=max_windows,
        tokenizer=subject.loaded.tokenizer is not None,
    )
    folder = None
    if out is not None:
        with clock("writing and verifying"):
            folder = save(
                stored,
                out,
                plan=given,
                tokenizer=subject.loaded.tokenizer,
                card=_card(data),
                recoveries=[stage.method for stage in stages[1:]],
                pages={REPORT: json.dumps(data.to_json(), indent=1), PAGE: render(data)},
                force=force,
                verify_ids=read.judging.input_ids[:1, :64],
            )
    resume.clear()
    return Pruned(smaller.model, given, data, folder, subject.weights.blocks.parameters)


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


def _cut(subject: Subject, removed: frozenset[Unit], form: str) -> tuple[Subject, Export]:
    """What will be stored, to be measured, and how."""
    with progress.task("cutting"):
        found = export(subject.anatomy, removed, cut(subject.anatomy, removed), form)
        return subject.holding(found.model), found


def _as_stored(
    subject: Subject,
    measured: Export,
    removed: frozenset[Unit],
    form: str,
    repaired: PreTrainedModel | None,
    before_repair: list[nn.Parameter],
) -> Export:
    """What is stored: the cut model in the precision that the dense checkpoint is stored in, whatever it was measured
    in, with what recoveries made of it. repaired: None without any; before_repair: the parameters that they were given.
    """
    again = as_stored(subject, removed)
    anatomy = subject.anatomy if again is None else again[0]
    found = measured if again is None else export(anatomy, removed, again[1], form)
    if repaired is not None and found is not measured:
        adopt(found.model, repaired, before_repair)
    complete = with_maps_inside(found.model, anatomy, removed)
    return found if complete is found.model else export(anatomy, removed, complete, form)


def _recoveries(
    names: str,
    settings: Mapping[str, str],
    search: str,
    objective: str,
    repair: str = "",
    metric: str | None = None,
    *,
    planned: bool = False,
) -> tuple[Sequence[Configured], dict[str, str]]:
    """Recoveries with their options, and the options of search, metric, objective and the repair that judges; one that
    both sides have is for both.

    planned: nothing is searched, so that all options have to be for the recoveries.
    """
    if planned and settings and not names:
        raise UserError(
            f"a plan says what goes, so the settings {', '.join(settings)} would change nothing; drop them, or name "
            "the recovery that they are for."
        )
    if not names:
        return [], dict(settings)
    if planned:
        return parse_recoveries(names, settings), {}
    known = {option for method, _ in parse_recoveries(names, {}) for option in method.options}
    wanted = settable(search, objective, metric)
    wanted |= {option for method in (named_recoveries(repair) if repair else ()) for option in method.options}
    theirs = {key: text for key, text in settings.items() if key in known}
    others = {key: text for key, text in settings.items() if key not in known or key in wanted}
    return parse_recoveries(names, theirs, elsewhere=wanted), others


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


def _card(data: ReportData) -> str:
    """Before and after, as a Markdown table for the model card."""
    rows = [("blocks", f"{data.dense.blocks}", f"{data.pruned.blocks}")]
    rows.append(("parameters", f"{data.dense.parameters:,}", f"{data.pruned.parameters:,}"))
    rows.append((f"KV cache per token, {data.dtype}", size(data.dense.kv_bytes), size(data.pruned.kv_bytes)))
    for name, value in data.dense.perplexity.items():
        tokens = data.dense.perplexity_tokens[name]
        rows.append((f"perplexity, {name} ({tokens:,} tokens)", f"{value:.2f}", f"{data.pruned.perplexity[name]:.2f}"))
    for name, value in data.dense.tasks.items():
        rows.append((name, f"{value:.3f}", f"{data.pruned.tasks[name]:.3f}"))
    rows += [
        (f"{row.label.lower()}, tokens/s", row.dense, f"{row.pruned}: {row.difference}")
        for row in speed_rows(data)
        if row.difference
    ]
    lines = ["## Before and after", "", "| | dense | pruned |", "|---|---:|---:|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    if data.speed_setting:
        lines += ["", f"Speed: {data.speed_setting}."]
    if data.recovery and data.recovery_made_by is not None:
        lines += ["", recovery_card(data.recovery, data.dense.perplexity, data.recovery_made_by)]
    return "\n".join(lines)
