"""Tables for the terminal, readable at 80 columns."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from shallower.reporting.data import RecoveryStage, ReportData
from shallower.reporting.ranks import RankCorrelation
from shallower.reporting.wording import (
    by_kind,
    comparison,
    count,
    number,
    plural,
    recovery_rows,
    relative_change,
    score,
    signed,
    size,
)
from shallower.scores import Score, Scores, ScoreSheet
from shallower.units import KINDS, Span, Unit, listed

if TYPE_CHECKING:
    from shallower.anatomy.weigh import UnitWeight, Weights
    from shallower.timing import Speed, Spread

_COUNTED = "Blocks are counted from 0."
CHANCE = " ~ could be chance (p ≥ 0.05)."
_NAME = 28  # columns of a name that stay together, where numbers beside it can be broken between words
_BAR = 24  # columns of the longest bar


@dataclass(frozen=True)
class PerplexityRow:
    """One model of `perplexity_table`. perplexity: by name of the text. unclear: texts where the difference to the
    first model could be chance. apart: texts of which it read other windows than the first model, so that they are not
    compared.
    """

    model: str
    blocks: int
    parameters: int
    perplexity: Mapping[str, float]
    unclear: Collection[str] = ()
    apart: Collection[str] = ()


def before_after_table(data: ReportData) -> Table:
    """Dense and pruned model side by side, with what changed."""
    speed = f"Speed: {data.speed_setting}." if data.speed_setting else ""
    table = new_table("", "Dense", "Pruned", "Difference", caption=speed)
    for row in comparison(data):
        add_row(table, row.label, row.dense, row.pruned, row.difference)
    return table


def recovery_table(stages: Sequence[RecoveryStage], dense: Mapping[str, float]) -> Table:
    """The dense model, by its perplexities, the cut one, and what each recovery made of it."""
    head, rows = recovery_rows(stages, dense)
    table = new_table(*head, caption="")
    for row in rows:
        add_row(table, *row)
    return table


def scores_table(scores: Scores) -> Table:
    """Every unit in order of depth with its rank (1 goes first)."""
    rank = {unit: place for place, unit in enumerate(scores.ranked(), start=1)}
    finite = [abs(value) for value in scores.units.values() if math.isfinite(value)]
    longest = max(finite, default=0.0)
    table = new_table("Unit", "Rank", scores.metric, "± error", caption="Rank 1 matters least.")
    table.add_column("", justify="left", no_wrap=True, min_width=4, max_width=_BAR)
    units = [(row.of, row) for row in scores.rows if isinstance(row.of, Unit)]
    for unit, row in sorted(units, key=lambda pair: pair[0]):
        add_row(table, str(unit), str(rank[unit]), score(row.value), score(row.error), _bar(row.value, longest))
    return table


def spans_table(scores: Scores) -> Table:
    """Of the spans of each length, the least."""
    best: dict[float, tuple[Span, Score]] = {}
    for row in scores.rows:
        if isinstance(row.of, Span) and (row.of.blocks not in best or row.value < best[row.of.blocks][1].value):
            best[row.of.blocks] = (row.of, row)
    longest = max((abs(row.value) for _, row in best.values() if math.isfinite(row.value)), default=0.0)
    table = new_table("Length", "Least span", scores.metric, "± error", caption=_COUNTED)
    table.add_column("", justify="left", no_wrap=True, min_width=4, max_width=_BAR)
    for length, (span, row) in sorted(best.items()):
        told = score(row.value), score(row.error), _bar(row.value, longest)
        add_row(table, f"{length:g}", listed(span.units), *told)
    return table


def sheet_table(sheet: ScoreSheet) -> Table:
    """Every unit in order of depth, and by each metric its rank (1 goes first) before its value."""
    table = new_table("Unit", *sheet.metrics, caption="Rank and value by each metric. Rank 1 matters least.")
    ranks = [{unit: place for place, unit in enumerate(scores.ranked(), start=1)} for scores in sheet.scores]
    values = [scores.units for scores in sheet.scores]
    digits = len(str(len(ranks[0])))
    for unit in sorted(ranks[0]):
        cells = [f"{rank[unit]:>{digits}} {score(value[unit]):>9}" for rank, value in zip(ranks, values, strict=True)]
        add_row(table, str(unit), *cells)
    return table


def correlations_table(metrics: Sequence[str], correlations: Sequence[RankCorrelation]) -> Table:
    """A square of metrics by metrics: Spearman above the diagonal, Kendall below."""
    cells = {(row.first, row.second): row.spearman for row in correlations}
    cells |= {(row.second, row.first): row.kendall for row in correlations}
    told = "Rank correlations of units: Spearman's rho above the diagonal, Kendall's tau below."
    table = new_table("", *metrics, caption=told)
    for row in metrics:
        add_row(table, row, *("" if row == column else number(cells[row, column]) for column in metrics))
    return table


def inspection_table(weights: Weights, removed: Collection[Unit] = (), gone: UnitWeight | None = None) -> Table:
    """What blocks, sublayers and the whole model weigh, and what is left without `removed`, with which `gone` goes.

    Blocks that weigh the same share their rows, so most models take few.
    """
    table = new_table("", "Parameters", "Bytes", "FLOPs/token", "KV bytes/token", caption=_COUNTED)
    indices = sorted({unit.index for unit in weights.units})
    for _, alike in groupby(indices, key=lambda index: [weights.units.get(Unit(index, kind)) for kind in KINDS]):
        group = list(alike)
        name = f"block {group[0]}" if len(group) == 1 else f"blocks {group[0]} to {group[-1]}, each"
        _weigh(table, name, weights.units[Unit(group[0], "block")])
        for kind in ("attn", "mlp"):
            weight = weights.units.get(Unit(group[0], kind))
            if weight is not None:
                _weigh(table, f"  {kind}", weight)
    table.add_section()
    whole, blocks = weights.model, weights.blocks
    _weigh(table, f"all {plural(len(indices), 'block')}", blocks)
    _weigh(table, "model", whole, "bold")
    if gone is not None and removed:
        table.add_section()
        _weigh(table, "after removal", _left(whole, gone), "bold")
        changes = [
            "unchanged" if not part else relative_change(total, total - part)
            for part, total in (
                (gone.parameters, whole.parameters),
                (gone.bytes, whole.bytes),
                (gone.flops, whole.flops),
                (gone.kv_bytes, whole.kv_bytes),
            )
        ]
        add_row(table, "difference", *changes)
        told = ", ".join(by_kind(removed))
        table.caption = Text(f"Removed: {told} ({listed(removed, ', ')}). {_COUNTED}", style="dim")
    return table


def perplexity_table(rows: Sequence[PerplexityRow]) -> Table:
    """Several models, one a row; under each perplexity its difference to the first model's."""
    texts = list(dict.fromkeys(text for row in rows for text in row.perplexity))
    compared = any(text not in row.apart for row in rows[1:] for text in row.perplexity)
    told = f"Perplexity, lower is better; in brackets relative to {rows[0].model}." if compared else "Perplexity."
    told += CHANCE if any(row.unclear for row in rows) else ""
    table = new_table("Model", "Blocks", "Parameters", *texts, caption=told)
    for row in rows:
        cells = []
        for text in texts:
            value, first = row.perplexity.get(text), rows[0].perplexity.get(text)
            cell = number(value)
            beside = row is not rows[0] and text not in row.apart
            if beside and value is not None and first and math.isfinite(value) and math.isfinite(first):
                cell += f"\n{signed(value - first)} ({value / first:.2f}×)" + (" ~" if text in row.unclear else "")
            cells.append(cell)
        add_row(table, row.model, str(row.blocks), count(row.parameters), *cells)
    return table


def bench_table(speeds: Mapping[str, Sequence[Speed]], setting: str) -> Table:
    """Models at each prompt and batch size, by name; under each time and amount its difference to the first model's."""
    from shallower.timing.speed import FEWEST_RUNS

    first = next(iter(speeds))
    told = f"{setting} Differences are to the first model; ≈ marks those within the spread."
    if min(speed.prefill_s.runs for speed in speeds[first]) < FEWEST_RUNS:
        told = (
            f"{setting} Differences are to the first model; ? marks all, as fewer than {FEWEST_RUNS} runs say little."
        )
    table = new_table("Model", "Prefill", "Decoding", "Peak memory", "KV cache", caption=told)
    for place, reference in enumerate(speeds[first]):
        table.add_section()
        add_row(table, f"prompt {reference.prompt}, batch {reference.batch}", style="bold")
        for name, measured in speeds.items():
            speed, against = measured[place], None if name == first else reference
            peak = "–" if speed.peak_bytes is None else size(speed.peak_bytes)
            if against is not None and speed.peak_bytes is not None and against.peak_bytes:
                peak += f"\n{relative_change(against.peak_bytes, speed.peak_bytes)}"
            cache = size(speed.kv_cache_bytes)
            if against is not None and against.kv_cache_bytes:
                cache += f"\n{relative_change(against.kv_cache_bytes, speed.kv_cache_bytes)}"
            add_row(
                table,
                f"  {name}",
                _timing(speed.prefill_s, speed.prefill_tokens_per_s, against.prefill_s if against else None),
                _timing(speed.decode_s, speed.decode_tokens_per_s, against.decode_s if against else None),
                peak,
                cache,
            )
    return table


def _timing(spread: Spread, tokens_per_s: float, against: Spread | None) -> str:
    scale, unit = (1e3, "ms") if spread.median < 1 else (1, "s")
    median, least, most = (number(scale * value) for value in (spread.median, spread.least, spread.most))
    lines = [f"{number(tokens_per_s)} tokens/s", f"{median} {unit} ({least}–{most})"]
    if against is not None:
        mark = {True: "", False: "≈ ", None: "? "}[spread.differs_from(against)]
        lines.append(mark + signed(spread.faster_than(against), "{:.1f} %".format))
    return "\n".join(lines)


def _bar(value: float, longest: float) -> str:
    if not longest or not math.isfinite(value):
        return ""
    eighths = round(8 * _BAR * abs(value) / longest)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _left(whole: UnitWeight, gone: UnitWeight) -> UnitWeight:
    names = type(whole).__dataclass_fields__
    return type(whole)(**{name: getattr(whole, name) - getattr(gone, name) for name in names})


def _weigh(table: Table, name: str, weight: UnitWeight, style: str = "") -> None:
    cells = count(weight.parameters), size(weight.bytes), count(weight.flops), size(weight.kv_bytes)
    add_row(table, name, *cells, style=style)


class _WideTable(Table):
    """A table whose caption is as wide as the terminal, not as the table."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        caption, self.caption = self.caption, None
        try:
            yield from super().__rich_console__(console, options)
        finally:
            self.caption = caption
        if caption:
            yield caption


def new_table(first: str, *others: str, caption: str) -> Table:
    """A table with a name in each row, and numbers behind it."""
    told = Text(caption, style="dim") if caption else None
    table = _WideTable(box=SIMPLE_HEAD, caption=told, pad_edge=False)
    table.add_column(Text(first), overflow="fold")
    for name in others:
        table.add_column(Text(name), justify="right", overflow="fold")
    return table


def add_row(table: Table, *cells: str, style: str = "") -> None:
    """Cells are text, never markup: a model may be called `[red]`. The first, a name, stays whole unless long."""
    name = table.columns[0]
    indent = len(cells[0]) - len(cells[0].lstrip())
    longest = max((indent + len(word) for word in cells[0].split()), default=0)
    name.min_width = max(name.min_width or 0, min(longest, _NAME))
    table.add_row(*(Text(cell) for cell in cells), style=style)
