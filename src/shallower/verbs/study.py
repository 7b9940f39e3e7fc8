"""`shallower study`: a grid of calibration sets, objectives, searches and ratios, measured cell by cell, and what it
says.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from shallower import progress
from shallower.corpus import (
    CalibrationSet,
    ChoiceSet,
    build_calibration,
    build_choices,
    overlap,
    with_options,
)
from shallower.engine import Ablator, Racing, along_with, reads_choices
from shallower.engine.ablator import MEASURED_AS
from shallower.engine.likelihood import perplexity_of
from shallower.engine.memo import context_key
from shallower.engine.method_code import code_of
from shallower.engine.ray_session import connect
from shallower.engine.trace import prove
from shallower.errors import BudgetError, CorpusError, ModelError, UserError
from shallower.files import expanded, require_writable, write_text
from shallower.plan import PruningPlan
from shallower.registry import Configured
from shallower.registry import objective as objectives
from shallower.resources import parse_memory, parse_workers
from shallower.scores import Scores
from shallower.studies.findings import Findings, find
from shallower.studies.grid import Study, read_study
from shallower.studies.ledger import Ledger
from shallower.studies.result import Cell, Failure, Result, search_and_metric
from shallower.units import Unit
from shallower.verbs.calibrate import calibrate
from shallower.verbs.measuring import make_ablator
from shallower.verbs.ranking import metric_of, rank
from shallower.verbs.request import Request, resolve
from shallower.verbs.runnable import require_runnable, settings_of, shared_texts
from shallower.verbs.search import search
from shallower.verbs.search_methods import search_stages
from shallower.verbs.subject import Subject, open_subject
from shallower.verbs.supply import supply
from shallower.version import __version__

CELLS = "cells.jsonl"
RANKED_AS = 2  # to be raised when units are ranked otherwise than before, by the same metrics
_QUESTION_TOKENS = 256

Judge = Callable[[Sequence[frozenset[Unit]]], list[float]]
CellOutcome = Result | Failure
TextAxes = tuple[str, str, str, int, int, int]  # of a cell: the model, and all that decides its calibration set


@dataclass(frozen=True)
class Finished:
    """A study that was run: the cells of its grid, what they say together, and where they are.

    results: of the cells that could be measured; `findings.failures` has the others.
    """

    study: Study
    results: tuple[Result, ...]
    findings: Findings
    folder: Path


def study(
    file: str | os.PathLike[str] | Study,
    out: str | os.PathLike[str],
    *,
    memory: int | str | None = None,
    workers: int | str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> Finished:
    """Measure every cell of a grid, and analyse them.

    A cell is a plan with its loss, held-out perplexities and task accuracies. What is done is on disk in `out`, beside
    a copy of the file, so that the same call goes on where it was interrupted, and cells share what the engine
    remembers. A cell whose text is too short, or whose search finds nothing that can be removed, is told in the
    findings, and the others are measured.

    file: STUDY.yaml, see `shallower.studies.grid`. memory, workers, device, dtype: as for `search`.

    Raises UserError for a study that cannot be read or run, before anything is measured, and where no cell could be.
    """
    parse_memory(memory)
    parse_workers(workers)
    given = file if isinstance(file, Study) else read_study(file)
    require_runnable(given)
    folder = expanded(out)
    require_writable(folder / CELLS, str(folder))
    copied = None if isinstance(file, Study) else _copy_of(expanded(file), folder)
    ledger = Ledger(folder / CELLS)
    opened = partial(open_subject, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    for model in given.models[1:]:  # not after the first was measured; it is loaded again then, and one at a time
        require_sound(opened(model), given)
    found: list[CellOutcome] = []
    with progress.task(f"study of {len(given.cells)} cells", len(given.cells)) as step:
        for model in given.models:
            found += _measure(opened(model), model, given, ledger, memory, workers, step, copied)
            copied = None
    order = {cell: number for number, cell in enumerate(given.cells)}  # whatever was measured first
    found.sort(key=lambda outcome: order[outcome.cell])
    results = tuple(outcome for outcome in found if isinstance(outcome, Result))
    failures = tuple(outcome for outcome in found if isinstance(outcome, Failure))
    if not results:
        raise UserError(f"no cell of the study could be measured; the first of {len(failures)}: {failures[0].why}")
    return Finished(given, results, find(results, failures), folder)


def _copy_of(file: Path, folder: Path) -> tuple[Path, str] | None:
    """Where beside the results a copy of the study's file is to be, and what is in it; None where that is the file."""
    copy = folder / file.name
    return None if copy.exists() and copy.samefile(file) else (copy, file.read_text(encoding="utf-8"))


def _measure(
    subject: Subject,
    model: str,
    given: Study,
    ledger: Ledger,
    memory: int | str | None,
    workers: int | str | None,
    step: progress.Step,
    copied: tuple[Path, str] | None,
) -> list[CellOutcome]:
    """The cells of one model. All that holds it ends with the call, so that the next one has its memory.

    copied: a file to be written, and what is in it, once it is known that there may be results.
    """
    require_sound(subject, given)
    texts = judging_texts(subject, given)
    judges = _judges(subject, texts, memory, workers)
    runner = Runner(subject, given, ledger, digests(texts), judges, memory, workers, texts)
    if copied is not None:
        write_text(*copied)
    return [outcome for axes, cells in by_text(given, model).items() for outcome in runner.run(axes, cells, step)]


@dataclass(frozen=True)
class Runner:
    """Runs the cells of one model. judged_on: digests of what `judges` read; texts: what they read, by the same names,
    to be compared with what calibrates.
    """

    subject: Subject
    study: Study
    ledger: Ledger
    judged_on: Mapping[str, str]
    judges: Mapping[str, Judge] = field(default_factory=dict)
    memory: int | str | None = None
    workers: int | str | None = None
    texts: Mapping[str, CalibrationSet] = field(default_factory=dict)

    def run(self, axes: TextAxes, cells: Sequence[Cell], step: progress.Step) -> list[CellOutcome]:
        outcomes: list[CellOutcome] = []
        told: set[str] = set()
        for objective in sorted(self.study.objectives, key=companions_first):
            own = [cell for cell in cells if cell.objective == objective]
            with progress.silent():
                text = self._text(axes, objective)
                found = self._measured(own, text)
            if isinstance(text, CalibrationSet) and text.digest not in told:
                told.add(text.digest)
                self._tell_shared(own[0].calibrated_on, text)
            outcomes += found
            step(len(own))
            _tell(found)
        return outcomes

    def _text(self, axes: TextAxes, objective: str) -> CalibrationSet | CorpusError:
        """What cells are calibrated on, or why it cannot be read."""
        try:
            return calibration_of(self.subject, self.study, axes, objective)
        except CorpusError as error:
            return error

    def _tell_shared(self, where: str, text: CalibrationSet) -> None:
        """A line for each text that judges and has runs of 13 tokens of what calibrates, as a copy of a file has."""
        for name, judging in self.texts.items():
            shared = overlap(text, judging)
            if shared.shared:
                progress.note(
                    f"{name} shares {shared.shared} of {shared.total} runs of {shared.n} tokens with what calibrates "
                    f"{where}: what is measured on it flatters these plans."
                )

    def _measured(self, cells: Sequence[Cell], text: CalibrationSet | CorpusError) -> list[CellOutcome]:
        """What came of the cells; those that are not on disk are searched one by one, and judged together."""
        if isinstance(text, CorpusError):
            return [Failure(cell, str(text)) for cell in cells]
        keys = {cell: self.key(cell, text) for cell in cells}
        known = {cell: result for cell, key in keys.items() if (result := self.ledger.get(key)) is not None}
        missing = [cell for cell in cells if cell not in known]
        made_by = self.made_by(text) if missing else {}
        with self._ray() if missing else nullcontext():
            fresh = self._searched(missing, text)
            for result in self._judged([each for each in fresh.values() if isinstance(each, Result)]):
                fresh[result.cell] = result
                self.ledger.add(keys[result.cell], result, made_by)
        return [fresh[cell] if cell in fresh else replace(known[cell], cell=cell) for cell in cells]

    def _judged(self, results: Sequence[Result]) -> list[Result]:
        """The same with perplexities and accuracies, asked of each judge at once: plans share most of their blocks."""
        if not results:
            return []
        judged = {name: judge([result.removed for result in results]) for name, judge in self.judges.items()}
        return [
            replace(
                result,
                held_out={name: perplexity_of(judged[name][number]) for name in self.study.held_out},
                tasks={name: _accuracy(judged[name][number]) for name in self.study.tasks},
            )
            for number, result in enumerate(results)
        ]

    def key(self, cell: Cell, text: CalibrationSet) -> str:
        """Digest of all that a cell's result depends on: not where texts lie, but what is in them."""
        study = self.study
        stages, _ = self._stages(cell)
        ranked_by = metric_of(stages, search_and_metric(cell.search)[1])
        methods = [
            objectives.get(cell.objective),
            *(method for method, _ in stages),
            *([ranked_by] if ranked_by else []),
        ]
        return context_key(
            {
                "model": self.subject.determinants,
                "calibration": text.digest,
                "cell": [cell.seed, cell.objective, cell.search, cell.remove],
                "code": [code_of(method) for method in methods],
                "how": [study.units, study.protect, sorted(study.settings.items()), study.exact],
                "judged_on": sorted(self.judged_on.items()),
                "measured_as": MEASURED_AS,
                "ranked_as": RANKED_AS,
                "version": __version__,
            }
        )

    def made_by(self, text: CalibrationSet) -> dict[str, Any]:
        """What cells depend on besides themselves, as their lines say it: a key does not tell what it is of."""
        study = self.study
        return {
            "model": asdict(self.subject.identity),
            "dtype": self.subject.dtype,
            "calibration": asdict(text.identity),
            "units": study.units,
            "protect": study.protect,
            "settings": study.settings,
            "exact": study.exact,
            "judged_on": self.judged_on,
            "held_out_sequences": study.held_out_sequences,
            "held_out_length": study.held_out_length,
            "questions": study.questions,
            "version": __version__,
        }

    def _ray(self) -> AbstractContextManager[object]:
        """Keeps Ray for one crew of workers after another, each of which would start and end it."""
        workers = parse_workers(self.workers)
        return nullcontext() if workers is None else closing(connect(workers, self.subject.model.device))

    def _searched(self, cells: Sequence[Cell], text: CalibrationSet) -> dict[Cell, CellOutcome]:
        """Plans of cells that differ in search and ratio only: they share one ablator, and scores to rank by."""
        if not cells:
            return {}
        found: dict[Cell, CellOutcome] = {}
        scores: dict[str, Scores | None] = {}
        try:
            ablator = self._ablator(cells[0], text)
        except ModelError as error:  # it overflows on this text
            return {cell: Failure(cell, str(error)) for cell in cells}
        with closing(ablator):
            for cell in cells:
                start = time.perf_counter()
                try:
                    request = self._request(cell)
                    if cell.search not in scores and request.budget is not None:
                        scores[cell.search] = self._rank(cell, text, ablator, request.units)
                    plan = self._plan(cell, text, ablator, scores.get(cell.search))
                except (BudgetError, CorpusError, ModelError) as error:  # of this cell, which others need not share
                    found[cell] = Failure(cell, str(error))
                    continue
                seconds = round(time.perf_counter() - start, 2)
                last, dense = (math.inf if loss is None else loss for loss in (plan.order[-1][1], plan.dense))
                found[cell] = Result(cell, tuple(unit for unit, _ in plan.order), last, dense, seconds)
        return found

    def _ablator(self, cell: Cell, text: CalibrationSet) -> Ablator:
        stages = self._stages(cell)
        return make_ablator(
            self.subject,
            text,
            cell.objective,
            stages[1],
            racing=None if self.study.exact else Racing(),
            memory=self.memory,
            workers=self.workers,
        )

    def _stages(self, cell: Cell) -> tuple[list[Configured], dict[str, Any]]:
        name, metric = search_and_metric(cell.search)
        settings = settings_of(self.study, name, cell.objective, metric)
        return search_stages(name, cell.objective, settings, metric)

    def _request(self, cell: Cell) -> Request:
        name = search_and_metric(cell.search)[0]
        return resolve(self.subject, cell.remove, name, units=self.study.units, protect=self.study.protect)

    def _rank(self, cell: Cell, text: CalibrationSet, ablator: Ablator, units: Sequence[Unit]) -> Scores | None:
        name, metric = search_and_metric(cell.search)
        return rank(
            self.subject,
            self._stages(cell)[0],
            text,
            metric=metric,
            units=self.study.units,
            objective=cell.objective,
            settings=settings_of(self.study, name, cell.objective, metric),
            seed=cell.seed,
            memory=self.memory,
            workers=self.workers,
            ablator=ablator,
            only=units,
        )

    def _plan(self, cell: Cell, text: CalibrationSet, ablator: Ablator, scores: Scores | None) -> PruningPlan:
        name, metric = search_and_metric(cell.search)
        return search(
            self.subject,
            cell.remove,
            search=name,
            objective=cell.objective,
            metric=metric,
            scores=scores,
            units=self.study.units,
            protect=self.study.protect,
            calibration=text,
            settings=settings_of(self.study, name, cell.objective, metric),
            exact=self.study.exact,
            seed=cell.seed,
            ablator=ablator,
        )


def companions_first(objective: str) -> int:
    """A sort key: objectives with which most others are measured at no cost come first."""
    return -len(along_with(objectives.get(objective), {}))


def by_text(given: Study, model: str) -> dict[TextAxes, list[Cell]]:
    """The cells of a model, together where they read one text."""
    cells_by_text: dict[TextAxes, list[Cell]] = {}
    for cell in given.cells:
        if cell.model == model:
            axes = (cell.model, cell.text, cell.format, cell.sequences, cell.length, cell.seed)
            cells_by_text.setdefault(axes, []).append(cell)
    return cells_by_text


def calibration_of(subject: Subject, given: Study, axes: TextAxes, objective: str) -> CalibrationSet:
    """What cells are calibrated on. Raises as `calibrate`."""
    _, name, form, sequences, length, seed = axes
    spec = given.texts[name]
    if form and not reads_choices(objectives.get(objective)):
        spec = with_options(spec, {"format": form})
    return calibrate(subject, spec, sequences=sequences, length=length, seed=seed, objective=objective)


def judging_texts(subject: Subject, given: Study) -> dict[str, CalibrationSet]:
    """What plans are judged on: held-out texts, and questions of tasks, by name."""
    found: dict[str, CalibrationSet] = {}
    for name, spec in given.held_out.items():
        found[name] = build_calibration(
            spec,
            subject.tokenizer,
            sequences=given.held_out_sequences,
            length=given.held_out_length,
            part="held-out" if shared_texts(given, spec) else "all",
            supply=supply(subject.model, subject.tokenizer),
        )
    for name, spec in given.tasks.items():
        found[name] = build_choices(
            spec,
            subject.tokenizer,
            questions=given.questions,
            length=_QUESTION_TOKENS,
            part="held-out" if shared_texts(given, spec) else "all",
        )
    return found


def digests(texts: Mapping[str, CalibrationSet]) -> dict[str, str]:
    """The digest of each text, by the same names."""
    return {name: text.digest for name, text in texts.items()}


def _judges(
    subject: Subject, texts: Mapping[str, CalibrationSet], memory: int | str | None, workers: int | str | None
) -> dict[str, Judge]:
    """For each held-out text its mean loss, for each task the share of wrong answers, of many sets at once."""
    found: dict[str, Judge] = {}
    for name, text in texts.items():
        objective, options = ("task", {"of": "accuracy"}) if isinstance(text, ChoiceSet) else ("nll", {})
        ablator = make_ablator(subject, text, objective, options, memory=memory, workers=workers)
        found[name] = partial(_judged, ablator)
    return found


def _judged(ablator: Ablator, candidates: Sequence[frozenset[Unit]]) -> list[float]:
    """Losses by a judge that holds workers and memory only while it is asked: the next one needs them, too."""
    with closing(ablator):
        return ablator.losses(candidates)


def _accuracy(wrong: float) -> float:
    """Of the share of wrong answers; nan where the model overflows on a question."""
    return 1 - wrong if math.isfinite(wrong) else math.nan


def require_sound(subject: Subject, given: Study) -> None:
    """Refuse, before an hour has gone, what this model cannot do. Raises UserError."""
    prove(subject.anatomy)
    for name, _ in map(search_and_metric, given.searches):
        for remove in given.remove:
            resolve(subject, remove, name, units=given.units, protect=given.protect)


def _tell(outcomes: Sequence[CellOutcome]) -> None:
    """A line a calibration set and objective, with the loss that each search reached at each ratio, and one for each
    cell that could not be measured.
    """
    cell = outcomes[0].cell
    where = f"{cell.calibrated_on} {cell.objective:<6}"
    reached = [
        f"{each.cell.search} {each.cell.remove}: {each.loss:.4f}" for each in outcomes if isinstance(each, Result)
    ]
    if reached:
        progress.note(f"{where} {'  '.join(reached)}")
    for each in outcomes:
        if isinstance(each, Failure):
            progress.note(f"{where} {each.cell.search} {each.cell.remove} could not be measured: {each.why}")
