"""`shallower score`: how important is each unit?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shallower.corpus import CalibrationSet
from shallower.engine import StreamStatistic, stream_scores
from shallower.errors import UserError
from shallower.plan import MadeBy
from shallower.registry import Method
from shallower.registry import metric as metrics
from shallower.scores import Score, Scores
from shallower.units import Unit
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
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> Scores:
    """Score the units of a model by one metric; higher means keep.

    units: `block`, `attn`, `mlp`, `sublayer` or `all`. spans: also score every span of blocks (default: where the
    metric's paper does). positions: which tokens a stream metric averages over (`auto`: as in the metric's paper).
    settings: options of the metric as text. objective: what an adaptive metric asks.

    Raises UnknownName for an unknown metric or option, ModelError and CorpusError for a model or text that cannot be
    used.
    """
    method = metrics.get(metric)
    options = method.parse_options(settings or {})
    subject = open_subject(model, tokenizer, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    wanted = units_of(subject, units)
    text = calibrate(subject, calibration, sequences=sequences, length=length, seed=seed)
    adaptive = "losses" in method.parameters
    if adaptive:
        if spans:
            raise UserError(
                f"metric {metric!r} has no span scores; use a metric of the stream, such as angular or cosine."
            )
        rows = _adaptive(subject, method, options, wanted, text, objective)
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


def _adaptive(
    subject: Subject,
    method: Method,
    options: Mapping[str, Any],
    units: Sequence[Unit],
    text: CalibrationSet,
    objective: str,
) -> tuple[Score, ...]:
    ablator = make_ablator(subject, text, objective)
    values = method.function(units, ablator.losses, **options)
    return tuple(Score(unit, values[unit]) for unit in units)
