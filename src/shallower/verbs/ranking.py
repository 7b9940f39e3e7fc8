"""Scores for searches that rank: measured with the search's own metric or another, or given, and checked."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from shallower.budget import Amount, parse_remove
from shallower.corpus import CalibrationSet
from shallower.engine import Ablator, needs_backward
from shallower.engine.stream import span_ends
from shallower.errors import UserError
from shallower.registry import Configured, Method
from shallower.registry import metric as metrics
from shallower.registry import objective as objectives
from shallower.scores import Scores, ScoreSheet
from shallower.units import Unit
from shallower.verbs.score import require_no_gradients, score_many
from shallower.verbs.subject import Subject


def that_rank(stages: Sequence[Configured]) -> list[Method]:
    """Those searches that read scores of a metric."""
    return [method for method, _ in stages if {"scores", "spans"} & set(method.parameters)]


def reads_spans(stages: Sequence[Configured], units: str) -> bool:
    """Whether a search reads scores of spans: of attentions alone, or MLPs alone, it adds up those of units.

    units: as in `--units`.
    """
    return units not in ("attn", "mlp") and any("spans" in method.parameters for method in that_rank(stages))


def metric_of(stages: Sequence[Configured], metric: str | None) -> Method | None:
    """What a ranking search reads scores of: the metric that was named, or its own; None where nothing ranks, unless
    one was named all the same.

    Raises UnknownName for a metric that does not exist, and UserError where the search has none of its own.
    """
    ranking = that_rank(stages)
    name = metric or (ranking[0].traits.get("metric") if ranking else None)
    if ranking and name is None:
        raise UserError(
            f"search {ranking[0].name!r} ranks units by a metric, and has none of its own: add --metric cosine."
        )
    return None if name is None else metrics.get(str(name))


def refuse_ranking(stages: Sequence[Configured]) -> NoReturn:
    """Raise UserError for a metric or scores that no search of these reads."""
    raise UserError(
        f"search {stages[-1][0].name!r} measures an objective and takes no --metric or --scores; drop it or use "
        "one-shot."
    )


def rank(
    subject: Subject,
    stages: Sequence[Configured],
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
    only: Collection[Unit] | None = None,
) -> Scores | None:
    """Measure the scores that a ranking search reads; None for searches that only ask for losses. As in `search`.

    settings: of which the metric's are read, and the objective's by a metric that asks it. only: the units that may go,
    as for `score_many`.
    """
    ranking = that_rank(stages)
    method = metric_of(stages, metric)
    if method is None:
        return None
    if not ranking:
        refuse_ranking(stages)
    spans = reads_spans(stages, units)
    among_units = any("scores" in method.parameters and "spans" not in method.parameters for method in ranking)
    if spans and units == "all" and not among_units and subject.anatomy.of_kind("attn", "mlp"):
        units = "sublayer"  # no scores of units are read, but of spans that end in mid-block
    known = {*method.options, *(objectives.get(objective).options if "units" in method.parameters else ())}
    [found] = score_many(
        subject,
        [method.name],
        units=units,
        spans=spans,
        objective=objective,
        calibration=text,
        settings={key: value for key, value in (settings or {}).items() if key in known} or None,
        seed=seed,
        memory=memory,
        workers=workers,
        ablator=ablator,
        only=only,
    ).scores
    return found


def ranked(
    subject: Subject,
    stages: Sequence[Configured],
    metric: str | None,
    scores: Scores | ScoreSheet | str | Path,
    options: Mapping[str, Any],
    units: str,
) -> Scores:
    """Scores measured before, checked against the search that reads them. options: those that were set of the metric.

    Raises UserError for scores of another model or metric, or with other options, and where there are none of spans
    for a search that reads these, or of none that end where these may.
    """
    given = read_scores(stages, scores, metric, units)
    known = metrics.get(given.metric).options if options else {}
    for name, value in options.items():
        measured = given.made_by.options.get(name, known[name].default if name in known else None)
        if measured != value:
            raise UserError(
                f"--set {name}={value} and --scores that were measured with {name}={measured} contradict each other: "
                "drop the first, or score again with it."
            )
    if given.model.fingerprint != subject.identity.fingerprint:
        theirs, mine = (f"{side.name} ({side.fingerprint[:19]}…)" for side in (given.model, subject.identity))
        raise UserError(f"the scores are of {theirs}, not of {mine}; score this model first.")
    if units != "block" and reads_spans(stages, units):
        ends = {end for span in given.spans for end in (span.start, span.stop)}
        if not ends.issuperset(span_ends(subject.anatomy)):
            raise UserError(
                f"the scores have no spans that end in mid-block, as --units {units} needs: score with --units "
                "sublayer --spans."
            )
    return given


def read_scores(
    stages: Sequence[Configured], scores: Scores | ScoreSheet | str | Path, metric: str | None, units: str
) -> Scores:
    """Scores measured before, those of `metric` where it is named, for a search that reads such among `units`.

    Raises UserError where it reads none, or they are of another metric, or of no spans for a search that reads these.
    """
    ranking = that_rank(stages)
    if not ranking:
        refuse_ranking(stages)
    given = _given(scores, metric)
    if metric is not None and metric != given.metric:
        raise UserError(
            f"--metric {metric} and --scores of metric {given.metric} contradict each other; give one of them."
        )
    if reads_spans(stages, units) and not given.spans:
        raise UserError(
            f"search {ranking[0].name!r} needs scores of spans; make them with `shallower score MODEL "
            f"--units {_scored_for(units)} --spans --out FILE`."
        )
    return given


def _scored_for(units: str) -> str:
    """What `--units` to score with for spans to be there: in mid-block they end only where no blocks are scored."""
    return "sublayer" if units == "all" else units


def _given(scores: Scores | ScoreSheet | str | Path, metric: str | None) -> Scores:
    """Scores measured before: of a sheet of several metrics the one that is named."""
    if isinstance(scores, Scores):
        return scores
    sheet, where = (scores, "the sheet") if isinstance(scores, ScoreSheet) else (ScoreSheet.load(scores), str(scores))
    return sheet.scores[0] if len(sheet.scores) == 1 else sheet.pick(metric, where)


def scores_to_rank_by(
    stages: Sequence[Configured],
    metric: str | None,
    remove: str | int,
    scores: Scores | ScoreSheet | str | Path | None,
    *,
    units: str,
    stream: bool,
) -> Scores | None:
    """The scores that were given, read, and checked as far as that goes without a model.

    Raises UserError as `read_scores`, and where a search with streamed blocks would measure a metric that takes
    gradients.
    """
    if scores is not None:
        return read_scores(stages, scores, metric, units)
    method = metric_of(stages, metric) if stream else None
    if method is not None and isinstance(parse_remove(str(remove))[0], Amount):
        require_no_gradients([method.name] if needs_backward(method) else [])
    return None


def how_ranked(
    ranking: Scores | None, text: CalibrationSet, objective: str, judging: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    """What the scores that ranked were made with, as `made_by.options` of the plan tells it: options that are not the
    metric's defaults, and where another command had measured them otherwise, its text, seed, objective and options.

    judging: options of the objective and number format that this search would have measured them with.
    """
    if ranking is None:
        return {}
    made, own = ranking.made_by, dict[str, Any]()
    method = next((each for each in metrics if each.name == ranking.metric), None)
    if method is not None:  # else it is of a package that is not installed here
        own = method.options_in_use({})
        own["positions"] = method.traits.get("positions", "all")
    asked = judging if made.objective is not None else {"dtype": judging["dtype"]}
    judged, wanted = ({key: each[key] for key in each if key not in own} for each in (made.options, asked))
    told = {name: made.options[name] for name in made.options if name in own and made.options[name] != own[name]}
    read = None if made.calibration is None else made.calibration.digest
    measured = (judged, made.seed, read or text.digest, made.objective or objective)
    if measured != (wanted, seed, text.digest, objective):
        words = ["no text" if made.calibration is None else f"{made.calibration.title} ({made.calibration.digest})"]
        words += [f"seed {made.seed}", *([] if made.objective is None else [made.objective])]
        words += [f"{name}={value}" for name, value in judged.items() if wanted.get(name) != value]
        told["scores"] = ", ".join(words)
    return told
