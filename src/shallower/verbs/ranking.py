"""Scores for searches that rank: measured with the search's own metric or another, or given, and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from shallower.corpus import CalibrationSet
from shallower.engine import Ablator
from shallower.errors import UserError
from shallower.registry import Method
from shallower.registry import metric as metrics
from shallower.registry import objective as objectives
from shallower.scores import Scores, ScoreSheet
from shallower.verbs.score import score_many
from shallower.verbs.subject import Subject

Stage = tuple[Method, Mapping[str, Any]]  # a search and its options


def that_rank(stages: Sequence[Stage]) -> list[Method]:
    """Those searches that read scores of a metric."""
    return [method for method, _ in stages if {"scores", "spans"} & set(method.parameters)]


def refuse_ranking(stages: Sequence[Stage]) -> NoReturn:
    """Raise UserError for a metric or scores that no search of these reads."""
    raise UserError(
        f"search {stages[-1][0].name!r} measures an objective and takes no --metric or --scores; drop it or use "
        "one-shot."
    )


def rank(
    subject: Subject,
    stages: Sequence[Stage],
    text: CalibrationSet,
    *,
    metric: str | None = None,
    units: str = "block",
    objective: str = "nll",
    settings: Mapping[str, str] | None = None,
    seed: int = 0,
    memory: int | str | None = None,
    workers: int | str | None = None,
    ablator: Ablator | None = None,
) -> Scores | None:
    """Measure the scores that a ranking search reads; None for searches that only ask for losses. As in `search`."""
    ranking = that_rank(stages)
    if not ranking:
        if metric is not None:
            refuse_ranking(stages)
        return None
    name = metric or str(ranking[0].traits["metric"])
    known = objectives.get(objective).options if "units" in metrics.get(name).parameters else {}
    [found] = score_many(
        subject,
        [name],
        units=units,
        spans=any("spans" in method.parameters for method in ranking) or None,
        objective=objective,
        calibration=text,
        settings={key: value for key, value in (settings or {}).items() if key in known} or None,
        seed=seed,
        memory=memory,
        workers=workers,
        ablator=ablator,
    ).scores
    return found


def ranked(
    subject: Subject, stages: Sequence[Stage], metric: str | None, scores: Scores | ScoreSheet | str | Path
) -> Scores:
    """Scores measured before, checked against the search that reads them."""
    ranking = that_rank(stages)
    if not ranking:
        refuse_ranking(stages)
    given = _given(scores, metric)
    if metric is not None and metric != given.metric:
        raise UserError(
            f"--metric {metric} and --scores of metric {given.metric} contradict each other; give one of them."
        )
    if given.model.fingerprint != subject.identity.fingerprint:
        raise UserError(
            f"the scores are of {given.model.name}, not of {subject.identity.name}; score this model first."
        )
    if any("spans" in method.parameters for method in ranking) and not given.spans:
        raise UserError(f"search {ranking[0].name!r} needs scores of spans; make them with `shallower score --spans`.")
    return given


def _given(scores: Scores | ScoreSheet | str | Path, metric: str | None) -> Scores:
    """Scores measured before: of a sheet of several metrics the one that is named."""
    if isinstance(scores, Scores):
        return scores
    sheet, where = (scores, "the sheet") if isinstance(scores, ScoreSheet) else (ScoreSheet.load(scores), str(scores))
    return sheet.scores[0] if len(sheet.scores) == 1 else sheet.pick(metric, where)
