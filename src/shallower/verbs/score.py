"""`shallower score`: how important is each unit?"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from transformers import PreTrainedTokenizerBase

from shallower.corpus import CalibrationSet
from shallower.defaults import LENGTH, SEQUENCES
from shallower.engine import (
    Ablator,
    StreamStatistic,
    WeightStatistic,
    needs_backward,
    reads_stream,
    reads_weights,
    stream_scores,
    weight_scores,
)
from shallower.engine.stream import Positions
from shallower.errors import ModelError, UnknownName, UserError
from shallower.plan import MadeBy
from shallower.registry import Configured, Method, share_options
from shallower.registry import metric as metrics
from shallower.registry import objective as objectives
from shallower.resources import parse_memory, parse_workers
from shallower.scores import Score, Scores, ScoreSheet
from shallower.units import Unit
from shallower.verbs.calibrate import calibrate, note_default
from shallower.verbs.measuring import make_ablator
from shallower.verbs.subject import ModelLike, Subject, open_subject, require_streamable, units_of, will_stream
from shallower.version import __version__

ALL = "all"
ADAPTIVE = frozenset({"units", "losses", "differences", "rng"})


def score(
    model: ModelLike,
    metric: str = "cosine",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    units: str = "block",
    spans: bool | None = None,
    positions: Positions | Literal["auto"] = "auto",
    objective: str = "nll",
    calibration: str | Path | CalibrationSet | None = None,
    sequences: int = SEQUENCES,
    length: int = LENGTH,
    settings: Mapping[str, str] | None = None,
    seed: int = 0,
    memory: int | str | None = None,
    workers: int | str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    stream_blocks: bool = False,
) -> Scores:
    """Score the units of a model by one metric; higher means keep.

    units: `block`, `attn`, `mlp`, `sublayer` or `all`. spans: also score every span of blocks, or for `sublayer` of
    these (default: for angular and linear-residual). positions: which tokens a stream metric averages over (`auto`: the
    last for angular, all for the others). settings: options of the metric, and of the objective, as text. objective:
    what an adaptive metric asks.
    memory: bytes that an adaptive metric may keep besides the model (`4GB`; default: a quarter of what is free).
    workers: how many Ray workers measure it, or the address of a Ray cluster (default: threads of this process).
    stream_blocks: of a model that is given by name or path, leave the blocks on the processor, and bring each to the
    device only while it runs: for models that are larger than the device.

    Raises UnknownName for an unknown metric or option, ModelError and CorpusError for a model or text that cannot be
    used.
    """
    [only] = score_many(
        model,
        [metric],
        tokenizer=tokenizer,
        units=units,
        spans=spans,
        positions=positions,
        objective=objective,
        calibration=calibration,
        sequences=sequences,
        length=length,
        settings=settings,
        seed=seed,
        memory=memory,
        workers=workers,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        stream_blocks=stream_blocks,
    ).scores
    return only


def score_many(
    model: ModelLike,
    names: str | Sequence[str] = ALL,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    units: str = "block",
    spans: bool | None = None,
    positions: Positions | Literal["auto"] = "auto",
    objective: str = "nll",
    calibration: str | Path | CalibrationSet | None = None,
    sequences: int = SEQUENCES,
    length: int = LENGTH,
    settings: Mapping[str, str] | None = None,
    seed: int = 0,
    memory: int | str | None = None,
    workers: int | str | None = None,
    ablator: Ablator | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    stream_blocks: bool = False,
    only: Collection[Unit] | None = None,
) -> ScoreSheet:
    """Score the units of a model by several metrics, which share their passes over the text.

    names: metrics, as a sequence or as in `cosine,taylor`; `all` is every static metric, and `loss`. An option of
    `settings` goes to every metric that has it; `spans` and `positions` to the metrics of the stream. ablator: one of
    this model, text and objective, for adaptive metrics; it stays open. only: of the units those that may go, which are
    all that an adaptive metric takes away and scores (default: all). The rest is as for `score`.

    Raises what `score` raises, and UserError for an ablator of something else.
    """
    methods = chosen_metrics(names)
    judges = [objectives.get(objective)] if any(map(_is_adaptive, methods)) else []
    what = " or ".join(f"{asked.kind} {asked.name!r}" for asked in (*methods, *judges))
    shared = share_options(what, [*methods, *judges], settings or {})
    judged = shared.pop() if judges else {}
    asked = list(zip(methods, shared, strict=True))
    if positions not in (choices := ("auto", *get_args(Positions))):
        raise UnknownName("choice of positions", positions, choices)
    memory, workers = parse_memory(memory), parse_workers(workers)
    if will_stream(model, stream_blocks):
        require_streamable(workers=workers)
        require_no_gradients([method.name for method in methods if needs_backward(method)])
    if spans and not any(map(reads_stream, methods)):
        raise UserError(
            f"metric {methods[0].name!r} has no span scores; use a metric of the stream, such as angular or cosine."
        )
    if ablator is None:  # else it comes from a search, which uses what it was given itself
        given_text = not isinstance(calibration, CalibrationSet) and calibration is not None
        _require_of_use(
            methods,
            text=given_text or (sequences, length) != (SEQUENCES, LENGTH),
            positions=positions != "auto",
            judging=objective != "nll" or memory is not None or workers is not None,
        )
    subject = open_subject(
        model,
        tokenizer,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        stream_blocks=stream_blocks,
    )
    wanted = units_of(subject, units)
    text = None
    if any(map(_reads_text, methods)):
        asking = objective if judges else "nll"
        note_default(calibration)
        text = calibrate(subject, calibration, sequences=sequences, length=length, seed=seed, objective=asking)
        if judges and ablator is not None:
            ablator.require_measures(subject.model, text, objective, judged)
    found = {
        **_by_stream(subject, text, asked, wanted, spans=spans, positions=positions),
        **_by_weights(subject, text, asked, wanted),
        **_by_losses(
            subject,
            text,
            asked,
            [unit for unit in wanted if only is None or unit in only],
            objective=objective,
            judged=judged,
            seed=seed,
            memory=memory,
            workers=workers,
            ablator=ablator,
        ),
    }
    scores = []
    for method in methods:
        measured = found[method.name]
        made_by = MadeBy(
            None,
            objective if _is_adaptive(method) else None,
            method.name,
            {**measured.options, "dtype": subject.dtype},
            seed,
            text.identity if text is not None and _reads_text(method) else None,
            __version__,
        )
        scores.append(Scores(subject.identity, method.name, measured.rows, made_by))
    return ScoreSheet(tuple(scores))


@dataclass(frozen=True)
class _Measured:
    """Scores by one metric, and the options that they were measured with."""

    rows: tuple[Score, ...]
    options: Mapping[str, Any]


def _by_stream(
    subject: Subject,
    text: CalibrationSet | None,
    asked: Sequence[Configured],
    units: Sequence[Unit],
    *,
    spans: bool | None,
    positions: Positions | Literal["auto"],
) -> dict[str, _Measured]:
    """Scores by those of the metrics that compare the residual stream, by name."""
    statistics = [
        stream_statistic(method, options, spans=spans, positions=positions)
        for method, options in asked
        if reads_stream(method)
    ]
    if not statistics:
        return {}
    assert text is not None
    found = stream_scores(subject.anatomy, text, statistics, units)
    return {
        each.metric.name: _Measured(rows, {**each.options, "positions": each.positions})
        for each, rows in zip(statistics, found, strict=True)
    }


def _by_weights(
    subject: Subject, text: CalibrationSet | None, asked: Sequence[Configured], units: Sequence[Unit]
) -> dict[str, _Measured]:
    """Scores by those of the metrics that read weights or their gradients, by name."""
    statistics = [WeightStatistic(method, options) for method, options in asked if reads_weights(method)]
    if not statistics:
        return {}
    found = weight_scores(subject.anatomy, text, statistics, units)
    return {each.metric.name: _Measured(rows, each.options) for each, rows in zip(statistics, found, strict=True)}


def _by_losses(
    subject: Subject,
    text: CalibrationSet | None,
    asked: Sequence[Configured],
    units: Sequence[Unit],
    *,
    objective: str,
    judged: Mapping[str, Any],
    seed: int,
    memory: int | None,
    workers: int | str | None,
    ablator: Ablator | None,
) -> dict[str, _Measured]:
    """Scores by those of the metrics that ask for losses of the model without units, by name. judged: options of the
    objective. ablator: who measures, and stays open; by default one that is made for it.
    """
    adaptive = [(method, options) for method, options in asked if _is_adaptive(method)]
    if not adaptive:
        return {}
    assert text is not None
    with ExitStack() as stack:
        if ablator is None:
            ablator = make_ablator(subject, text, objective, judged, memory=memory, workers=workers)
            stack.enter_context(closing(ablator))
        return {
            method.name: _Measured(measured_scores(method, options, ablator, units, seed), {**judged, **options})
            for method, options in adaptive
        }


def require_no_gradients(backward: Sequence[str]) -> None:
    """Raise UserError for metrics that take gradients, of which streamed blocks keep none."""
    if backward:
        raise UserError(
            f"metric {', '.join(backward)} needs gradients of all weights, and streamed blocks keep none: leave "
            "--stream-blocks out, or use another metric, such as cosine."
        )


def chosen_metrics(names: str | Sequence[str]) -> list[Method]:
    """The metrics of `cosine,taylor` or `all`.

    Raises UnknownName for one that does not exist, and UserError when none is named or one is named twice.
    """
    given = names.split(",") if isinstance(names, str) else names
    listed = [name.strip() for name in given if name.strip()]
    if listed == [ALL]:
        return [method for method in metrics if not _is_adaptive(method) or method.traits.get("in_all")]
    methods = [metrics.get(name) for name in listed]
    if not methods or len(set(listed)) < len(listed):
        raise UserError(f"--metric {','.join(listed)!r} must name metrics, each once, as in cosine,taylor, or be all.")
    return methods


def _require_of_use(methods: Sequence[Method], *, text: bool, positions: bool, judging: bool) -> None:
    """Raise UserError for options that are given and that no metric would look at.

    text, positions, judging: whether a text or its size, positions, or what an adaptive metric asks for is given.
    """
    readers = (
        ("--positions", positions, "averages over positions", "of the stream", reads_stream),
        ("--objective, --memory or --workers", judging, "runs the model without units", "that does", _is_adaptive),
        ("--calibration, --sequences or --length", text, "reads text", "that does", _reads_text),
    )
    for options, given, what, others, reads in readers:
        if given and not any(map(reads, methods)):
            named = ", ".join(method.name for method in methods)
            able = ", ".join(method.name for method in metrics if reads(method))
            raise UserError(
                f"metric {named} never {what}, so {options} would change nothing: drop them, or use a metric {others} "
                f"({able})."
            )


def _is_adaptive(method: Method) -> bool:
    return not ADAPTIVE.isdisjoint(method.parameters)


def _reads_text(method: Method) -> bool:
    return _is_adaptive(method) or reads_stream(method) or needs_backward(method)


class Ablating(Protocol):
    """What an adaptive metric asks: an `Ablator`, or one that stands in for it."""

    def losses(self, candidates: Sequence[Collection[Unit]], keep: int | None = None) -> list[float]: ...

    def differences(self, candidates: Sequence[Collection[Unit]]) -> list[tuple[float, float | None]]: ...


def measured_scores(
    method: Method, options: Mapping[str, Any], ablator: Ablating, units: Sequence[Unit], seed: int
) -> tuple[Score, ...]:
    """Scores by a metric that asks for losses of the model without units.

    Raises ModelError where the model itself overflows on the text.
    """
    supply = {
        "units": units,
        "losses": ablator.losses,
        "differences": ablator.differences,
        "rng": random.Random(seed),
    }
    found = method.function(**{name: supply[name] for name in method.parameters}, **options)
    require_finite(ablator.losses)  # known by now
    return tuple(Score(unit, *found[unit]) for unit in units)


def require_finite(losses: Callable[[list[frozenset[Unit]]], Sequence[float]]) -> None:
    """Raise ModelError where the dense model overflows on the text, so that nothing can be compared with it."""
    if not math.isfinite(losses([frozenset()])[0]):
        raise ModelError(
            "the model itself gives no finite losses on this text, so nothing can be compared with it: try --dtype "
            "float32, or another calibration text."
        )


def stream_statistic(
    method: Method,
    options: Mapping[str, Any],
    *,
    spans: bool | None = None,
    positions: Positions | Literal["auto"] = "auto",
) -> StreamStatistic:
    """A stream metric with its own positions and spans, unless told otherwise."""
    chosen = method.traits.get("positions", "all") if positions == "auto" else positions
    return StreamStatistic(method, options, chosen, bool(method.traits.get("spans")) if spans is None else spans)
