"""What a study would cost: its searches are run on made-up losses, and a few real sets are timed."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import astuple, dataclass, field
from random import Random

from shallower.corpus import CalibrationSet
from shallower.engine import Ablator, along_with, reads_choices
from shallower.engine.stream import span_ends
from shallower.errors import BudgetError, CorpusError, ModelError
from shallower.files import expanded
from shallower.plan import MadeBy
from shallower.registry import objective as objectives
from shallower.scores import Score, Scores
from shallower.studies.grid import Study, read_study
from shallower.studies.ledger import Ledger
from shallower.studies.result import Cell, search_and_metric
from shallower.units import Span, Unit, plain
from shallower.verbs.ranking import metric_of, reads_spans
from shallower.verbs.request import resolve
from shallower.verbs.runnable import require_runnable, settings_of
from shallower.verbs.score import measured_scores
from shallower.verbs.search_methods import search_stages
from shallower.verbs.study import (
    CELLS,
    Runner,
    by_text,
    calibration_of,
    companions_first,
    digests,
    judging_texts,
    require_sound,
)
from shallower.verbs.subject import Subject, open_subject
from shallower.verbs.trail import removal_order, run_search
from shallower.version import __version__

_TIMED_TOKENS = 1024


@dataclass(frozen=True)
class Estimate:
    """What a study would cost.

    cells: of the grid; done: those that are on disk; failing: those that a search cannot give. candidates: sets to be
    measured if no race ends early. seconds: for all of them, from the time that a few took here; alone: the same with
    every cell measured by itself.
    """

    cells: int
    done: int
    failing: int
    candidates: int
    seconds: float
    alone: float

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(*(one + two for one, two in zip(astuple(self), astuple(other), strict=True)))


def estimate(
    file: str | os.PathLike[str] | Study,
    out: str | os.PathLike[str],
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> Estimate:
    """What a study would cost, without running it.

    Every search is run on made-up losses to count the sets that it asks for, and a few real sets are timed. Sets whose
    loss is at hand from another objective's pass cost nothing. Raises UserError as `study` does.
    """
    given = file if isinstance(file, Study) else read_study(file)
    require_runnable(given)
    ledger = Ledger(expanded(out) / CELLS)
    total = Estimate(0, 0, 0, 0, 0.0, 0.0)
    for model in given.models:
        subject = open_subject(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        total += _estimated(subject, model, given, ledger)
        del subject
    return total


def _estimated(subject: Subject, model: str, given: Study, ledger: Ledger) -> Estimate:
    """What the cells of one model would cost."""
    require_sound(subject, given)
    done = failing = candidates = 0
    seconds = alone = 0.0
    cells_by_text = by_text(given, model)
    a_token: float | None = None
    runner = Runner(subject, given, ledger, digests(judging_texts(subject, given)))
    for axes, cells in cells_by_text.items():
        measured: dict[tuple[str, str], set[frozenset[Unit]]] = {}  # by objective and text
        for objective in sorted(given.objectives, key=companions_first):
            own_cells = [cell for cell in cells if cell.objective == objective]
            try:
                text = calibration_of(subject, given, axes, objective)
                a_token = _seconds_a_token(subject, text, objective) if a_token is None else a_token
            except (CorpusError, ModelError):
                failing += len(own_cells)
                continue
            asked: set[frozenset[Unit]] = set()
            for cell in own_cells:
                if ledger.get(runner.key(cell, text)) is not None:
                    done += 1
                    continue
                try:
                    own = _simulated(subject, given, cell)
                except BudgetError:
                    failing += 1
                    continue
                alone += len(own) * text.tokens * a_token
                asked |= own
            asked -= measured.get((objective, text.digest), set())
            candidates += len(asked)
            seconds += len(asked) * text.tokens * a_token
            for companion in along_with(objectives.get(objective), {}):
                measured.setdefault((companion.name, text.digest), set()).update(asked)
    return Estimate(sum(map(len, cells_by_text.values())), done, failing, candidates, seconds, alone)


@dataclass(eq=False)
class _MadeUp:
    """Losses that nothing was run for: they add up over units, nearly. asked: of which sets."""

    worth: Mapping[Unit, float]
    rng: Random
    asked: set[frozenset[Unit]] = field(default_factory=set)

    def losses(
        self, candidates: Sequence[Collection[Unit]], keep: int | None = None, *, race: bool = True
    ) -> list[float]:
        self.asked.update(frozenset(plain(candidate)) for candidate in candidates)
        return [
            sum(self.worth.get(unit, 0.5) for unit in candidate) + 0.01 * self.rng.random() for candidate in candidates
        ]

    def differences(self, candidates: Sequence[Collection[Unit]]) -> list[tuple[float, float | None]]:
        dense, *without = self.losses([frozenset(), *candidates])
        return [(loss - dense, None) for loss in without]


def _simulated(subject: Subject, given: Study, cell: Cell) -> set[frozenset[Unit]]:
    """The sets that `search` asks for when losses are made up: to rank, to search, and for what the plan tells."""
    name, metric = search_and_metric(cell.search)
    request = resolve(subject, cell.remove, name, units=given.units, protect=given.protect)
    rng = Random(cell.seed)
    made_up = _MadeUp({unit: rng.random() for unit in request.units}, rng)
    order = list(request.units)
    if request.budget is not None:
        settings = settings_of(given, name, cell.objective, metric)
        stages, _ = search_stages(name, cell.objective, settings, metric)
        ranking = metric_of(stages, metric)
        if ranking is not None and "units" in ranking.parameters:
            options = ranking.parse_options({key: text for key, text in settings.items() if key in ranking.options})
            measured_scores(ranking, options, made_up, request.units, cell.seed)
        scores = _made_up_scores(subject, cell, made_up, spans=reads_spans(stages, given.units))
        order = removal_order(
            run_search(stages, request.units, request.budget, made_up.losses, scores, cell.seed), made_up.losses
        )
    made_up.losses([frozenset(order[:count]) for count in range(len(order) + 1)])
    return made_up.asked


def _made_up_scores(subject: Subject, cell: Cell, made_up: _MadeUp, *, spans: bool) -> Scores:
    """Scores of the units that may go, and for a search of spans of all that stream metrics would score."""
    halves = spans and {"attn", "mlp"} <= {unit.kind for unit in made_up.worth}
    ends = span_ends(subject.anatomy) if halves else range(len(subject.anatomy.blocks) + 1)
    rows = [Score(unit, value, None) for unit, value in made_up.worth.items()]
    if spans:
        rows += [Score(Span(*pair), made_up.rng.random(), None) for pair in itertools.combinations(ends, 2)]
    made_by = MadeBy(cell.search, cell.objective, None, {}, cell.seed, None, __version__)
    return Scores(subject.identity, "made up", tuple(rows), made_by)


def _seconds_a_token(subject: Subject, text: CalibrationSet, objective: str) -> float:
    """Seconds that one calibration token of one candidate takes here, from single removals spread over the depth."""
    few = max(1, min(text.sequences, _TIMED_TOKENS // text.length))
    if not reads_choices(objectives.get(objective)):
        text = CalibrationSet(text.spec, text.input_ids[:few], None)
    blocks = subject.anatomy.of_kind("block")
    with closing(Ablator(subject.anatomy, text, objective)) as ablator:
        ablator.losses([frozenset()])
        start = time.perf_counter()
        ablator.losses([frozenset({unit}) for unit in blocks[:: max(1, len(blocks) // 8)]])
        return (time.perf_counter() - start) / max(1, ablator.spent.tokens - text.tokens)
