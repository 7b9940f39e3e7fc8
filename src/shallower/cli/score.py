"""`shallower score`: how important is each unit?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Option

from shallower.cli import options
from shallower.cli.output import print_written, require_free, typed, typed_again
from shallower.cli.verb import Answer, verb
from shallower.defaults import LENGTH, SEQUENCES

if TYPE_CHECKING:
    from rich.console import Console


@verb
def score(
    model: options.Model,
    metric: options.ScoredBy = "cosine",
    units: options.Kinds = "block",
    spans: Annotated[
        bool | None,
        Option(
            "--spans/--no-spans",
            help="Also score every span of blocks (--units sublayer: of these). Default: for angular and "
            "linear-residual.",
        ),
    ] = None,
    positions: Annotated[
        Literal["auto", "all", "last"],
        Option(
            "--positions",
            metavar="WHICH",
            help="Average over all tokens, the last, or auto: the last for angular, all for the others.",
        ),
    ] = "auto",
    objective: options.Objective = "nll",
    calibration: options.Calibration = None,
    sequences: options.Sequences = SEQUENCES,
    length: options.Length = LENGTH,
    settings: options.Settings = None,
    out: Annotated[
        Path | None, Option("--out", metavar="FILE", help="Write the scores here, as JSON. Default: only show them.")
    ] = None,
    force: options.Force = False,
    seed: options.Seed = 0,
    memory: options.Memory = None,
    workers: options.MeasuredBy = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    trust_remote_code: options.RemoteCode = False,
    stream_blocks: options.StreamBlocks = False,
) -> Answer:
    """Score each block or sublayer by one metric or several.

    Higher means keep.
    """
    require_free(out, force=force)
    chosen = options.parse_settings(settings)
    from shallower.reporting.ranks import rank_correlations
    from shallower.reporting.tables import correlations_table, scores_table, sheet_table, spans_table
    from shallower.verbs.score import chosen_metrics, score_many

    chosen_metrics(metric)
    sheet = score_many(
        model,
        metric,
        units=units,
        spans=spans,
        positions=positions,
        objective=objective,
        calibration=calibration,
        sequences=sequences,
        length=length,
        settings=chosen,
        seed=seed,
        memory=memory,
        workers=workers,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        stream_blocks=stream_blocks,
    )
    if out is not None:
        sheet.save(out)
    several, first = len(sheet.scores) > 1, sheet.scores[0]
    alike = rank_correlations(sheet)

    def show(console: Console) -> None:
        if several:
            console.print(sheet_table(sheet))
            console.print(correlations_table(sheet.metrics, alike))
        else:
            console.print(scores_table(first))
            if first.spans:
                console.print(spans_table(first))
        # attentions alone may hold less than a quarter of the parameters
        amount = "25%" if units == "block" else f"25%:units --units {units}"
        # beside whole blocks none of the spans ends in mid-block, and a lone kind of sublayer has no use for them
        way = "contiguous" if first.spans and units in ("block", "sublayer") else "one-shot"
        step = f"shallower search {typed(model)} --remove {amount} --search {way} --scores {typed(out)}"
        step += f" --metric {first.metric}" if several else ""
        step += "" if objective == "nll" else f" --objective {objective}"
        step += typed_again(calibration, (sequences, length), seed, dtype, trust_remote_code=trust_remote_code)
        step += " --stream-blocks" * stream_blocks
        print_written(console, out, "the scores", step)

    told = sheet.to_json()
    return Answer({**told, "correlations": [asdict(row) for row in alike]} if several else told, show)
