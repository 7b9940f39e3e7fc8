"""`shallower score`: how important is each unit?"""

from __future__ import annotations

import random
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shallower.corpus import CalibrationSet
from shallower.engine import StreamStatistic, stream_scores
from shallower.errors import UserError
from shallower.plan import MadeBy
from shallower.registry import Method, share_options
from shallower.registry import metric as metrics
from shallower.registry import objective as objectives
from shallower.resources import parse_memory, parse_workers
from shallower.scores import Score, Scores
from shallower.verbs.subject import Subject, calibrate, make_ablator, open_subject, units_of
from shallower.version import __version__

Positions = Literal["auto", "all", "last"]


def score(
    model: str | Path | PreTrainedModel | Subject,
    metric: str = "cosine",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    units: str = "block",
    spans: bool | None = None,
    positions: Positions = "auto",
    objective: str = "nll",
    calibration: str | Path | CalibrationSet | None = None,
    sequences: int = 32,
    length: int = 128,
    settings: Mapping[str, str] | None = None,
    seed: int = 0,
    memory: int | str | None = None,
    workers: int | str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> Scores:
    """Score the units of a model by one metric; higher means keep.

    units: `block`, `attn`, `mlp`, `sublayer` or `all`. spans: also score every span of blocks (default: where the
    metric's paper does). positions: which tokens a stream metric averages over (`auto`: as in the metric's paper).
    settings: options of the metric, and of the objective, as text. objective: what an adaptive metric asks.
    memory: bytes that an adaptive metric may keep besides the model (`4GB`; default: a quarter of what is free).
    workers: how many Ray workers measure it, or the address of a Ray cluster (default: threads of this process).

    Raises UnknownName for an unknown metric or option, ModelError and CorpusError for a model or text that cannot be
    used.
    """
    method = metrics.get(metric)
    adaptive = bool({"losses", "differences"} & set(method.parameters))
    methods = [method, *([objectives.get(objective)] if adaptive else [])]
    what = " or ".join(f"{asked.kind} {asked.name!r}" for asked in methods)
    options, *judged = share_options(what, methods, settings or {})
    memory, workers = parse_memory(memory), parse_workers(workers)
    subject = open_subject(model, tokenizer, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    wanted = units_of(subject, units)
    text = calibrate(
        subject,
        calibration,
        sequences=sequences,
        length=length,
        seed=seed,
        objective=objective if adaptive else "nll",
    )
    if adaptive:
        if spans:
            raise UserError(
                f"metric {metric!r} has no span scores; use a metric of the stream, such as angular or cosine."
            )
        with closing(make_ablator(subject, text, objective, *judged, memory=memory, workers=workers)) as ablator:
            supply = {"units": wanted, "losses": ablator.losses, "differences": ablator.differences}
            supply["rng"] = random.Random(seed)
            found = method.function(**{name: supply[name] for name in method.parameters}, **options)
        rows = tuple(Score(unit, *found[unit]) for unit in wanted)
        options = {**judged[0], **options}
    else:
        statistic = stream_statistic(method, options, spans=spans, positions=positions)
        [rows] = stream_scores(subject.anatomy, text, [statistic], wanted)
        options = {**options, "positions": statistic.positions}
    made_by = MadeBy(None, objective if adaptive else None, metric, options, seed, text.identity, __version__)
    return Scores(subject.identity, metric, rows, made_by)


def stream_statistic(
    method: Method, options: Mapping[str, Any], *, spans: bool | None = None, positions: Positions = "auto"
) -> StreamStatistic:
    """A stream metric with its paper's positions and spans, unless told otherwise."""
    chosen = method.traits.get("positions", "all") if positions == "auto" else positions
    return StreamStatistic(method, options, chosen, bool(method.traits.get("spans")) if spans is None else spans)
