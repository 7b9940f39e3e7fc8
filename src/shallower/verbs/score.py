"""`shallower score`: how important is each unit?"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from transformers import PreTrainedTokenizerBase

from shallower.anatomy.streamed import is_streamed
from shallower.corpus import CalibrationSet
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
from shallower.registry import Method, share_options
from shallower.registry import metric as metrics
from shallower.registry import objective as objectives
from shallower.resources import parse_memory, parse_workers
from shallower.scores import Score, Scores, ScoreSheet
from shallower.units import Unit
from shallower.verbs.subject import (
    ModelLike,
    calibrate,
    make_ablator,
    note_default,
    open_subject,
    require_streamable,
    units_of,
)
from shallower.version import __version__

ALL = "all"
SEQUENCES, LENGTH = 32, 128
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
    these (default: where the metric's paper does). positions: which tokens a stream metric averages over (`auto`: as in
    the metric's paper). settings: options of the metric, and of the objective, as text. objective: what an adaptive
    metric asks.
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
    adaptive = [method for method in methods if _is_adaptive(method)]
    judges = [objectives.get(objective)] if adaptive else []
    what = " or ".join(f"{asked.kind} {asked.name!r}" for asked in (*methods, *judges))
    shared = share_options(what, [*methods, *judges], settings or {})
    judged = shared.pop() if judges else {}
    given = dict(zip([method.name for method in methods], shared, strict=True))
    if positions not in (choices := ("auto", *get_args(Positions))):
        raise UnknownName("choice of positions", positions, choices)
    memory, workers = parse_memory(memory), parse_workers(workers)
    backward = [method.name for method in methods if needs_backward(method)]
    if stream_blocks:
        require_streamable(workers=workers)
        require_no_gradients(backward)
    stream = [method for method in methods if reads_stream(method)]
    if spans and not stream:
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
    if is_streamed(subject.model):
        require_no_gradients(backward)
    text = None
    if adaptive or stream or backward:
        asked = objective if adaptive else "nll"
        note_default(calibration)
        text = calibrate(subject, calibration, sequences=sequences, length=length, seed=seed, objective=asked)
        if adaptive and ablator is not None:
            ablator.require_measures(subject.model, text, objective, judged)
    takes = [unit for unit in wanted if only is None or unit in only]
    rows: dict[str, tuple[Score, ...]] = {}
    if stream:
        assert text is not None
        statistics = [
            stream_statistic(method, given[method.name], spans=spans, positions=positions) for method in stream
        ]
        for statistic, found in zip(statistics, stream_scores(subject.anatomy, text, statistics, wanted), strict=True):
            rows[statistic.metric.name] = found
            given[statistic.metric.name] = {**statistic.options, "positions": statistic.positions}
    weighing = [WeightStatistic(method, given[method.name]) for method in methods if reads_weights(method)]
    if weighing:
        for weight, found in zip(weighing, weight_scores(subject.anatomy, text, weighing, wanted), strict=True):
            rows[weight.metric.name] = found
    if adaptive:
        assert text is not None
        with ExitStack() as stack:
            if ablator is None:
                ablator = make_ablator(subject, text, objective, judged, memory=memory, workers=workers)
                stack.enter_context(closing(ablator))
            for method in adaptive:
                rows[method.name] = measured_scores(method, given[method.name], ablator, takes, seed)
                given[method.name] = {**judged, **given[method.name]}
    made = {
        method.name: MadeBy(
            None,
            objective if method in adaptive else None,
            method.name,
            {**given[method.name], "dtype": subject.dtype},
            seed,
            text.identity if text is not None and _reads_text(method) else None,
            __version__,
        )
        for method in methods
    }
    return ScoreSheet(tuple(Scores(subject.identity, name, rows[name], made[name]) for name in made))


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
    """A stream metric with its paper's positions and spans, unless told otherwise."""
    chosen = method.traits.get("positions", "all") if positions == "auto" else positions
    return StreamStatistic(method, options, chosen, bool(method.traits.get("spans")) if spans is None else spans)
