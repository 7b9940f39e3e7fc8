"""What a study found: tables for the terminal, a page with figures, and the same as Markdown."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from shallower.files import write_text
from shallower.reporting.markup import glued, html_figure, html_page, html_section, html_table
from shallower.reporting.style import BLUE, COLOURS, EDGE, INK, PALE, VERMILION, WIDTH, perplexity_axis, styled, svg
from shallower.reporting.wording import distinct_names, number, percent
from shallower.strict_json import spelled, write_json
from shallower.studies.findings import Decomposition, Findings, outcomes
from shallower.studies.interval import Interval
from shallower.studies.result import FACTORS, Failure, Result, counterparts, distinct, grouped
from shallower.studies.variance import RESIDUAL

if TYPE_CHECKING:
    from rich.table import Table

PAGE, NUMBERS, TABLES = "study.html", "findings.json", "study.md"
_SMALLEST_SHARE = 0.01  # smaller ones are in the JSON file only

Rows = list[tuple[str, ...]]
_ByLevel = dict[Hashable, list[Result]]


def write_pages(folder: Path, results: Sequence[Result], findings: Findings) -> tuple[Path, Path, Path]:
    """Write page, numbers and Markdown tables into `folder`. Raises OutputError when it cannot be written."""
    page, numbers, tables = folder / PAGE, folder / NUMBERS, folder / TABLES
    write_json(numbers, spelled(findings.to_json()))
    write_text(page, render(results, findings))
    write_text(tables, markdown(results, findings))
    return page, numbers, tables


def agreements_table(findings: Findings) -> Table:
    """How alike plans are that differ in one thing only."""
    return _terminal(_AGREEMENT_HEAD, agreement_rows(findings), "Plans that differ in one thing only.")


def shares_table(findings: Findings) -> Table:
    """What the variance of each outcome is due to."""
    return _terminal(share_head(findings), share_rows(findings), "Share of the variance; means over ratios and models.")


def failures_table(results: Sequence[Result], findings: Findings) -> Table:
    """What could not be measured, and why."""
    models = model_names([*results, *findings.failures])
    head = (*(("Model",) if models else ()), *_FAILURE_HEAD)
    return _terminal(head, failure_rows(findings, models), "Could not be measured; the others were.")


def _terminal(head: Sequence[str], rows: Rows, caption: str) -> Table:
    from shallower.reporting.tables import add_row, new_table

    table = new_table(*head, caption=caption)
    for row in rows:
        add_row(table, *row)
    return table


_AGREEMENT_HEAD = ("Differing in", "Shared units (Jaccard)", "Same order (Kendall)", "Pairs")


def agreement_rows(findings: Findings) -> Rows:
    """A line a factor, the one that changes plans most first."""
    ordered = sorted(findings.agreements, key=lambda item: item.jaccard.value)
    return [(item.factor, item.jaccard.told(number), item.order.told(number), f"{item.pairs:,}") for item in ordered]


def share_head(findings: Findings) -> tuple[str, ...]:
    """The outcomes that were analysed."""
    return ("Due to", *dict.fromkeys(item.outcome for item in findings.decompositions))


def share_rows(findings: Findings) -> Rows:
    """A line a term with its share of each outcome, the largest of the plan first, and what is left over at the end.

    A term that an outcome has at one ratio counts as nothing where it has not.
    """
    head = share_head(findings)[1:]
    of_outcome = {name: [item.shares for item in findings.decompositions if item.outcome == name] for name in head}
    table: dict[str, dict[str, list[Interval]]] = {}
    for name, each in of_outcome.items():
        for term in dict.fromkeys(share.term for shares in each for share in shares):
            found = [{share.term: share.share for share in shares}.get(term, Interval(0, 0, 0)) for shares in each]
            table.setdefault(term, {})[name] = found
    means = {term: {outcome: _mean(values) for outcome, values in found.items()} for term, found in table.items()}
    shown = [term for term in means if max(item.value for item in means[term].values()) >= _SMALLEST_SHARE]
    shown.sort(key=lambda term: (term == RESIDUAL, -means[term].get("plan", Interval(0, 0, 0)).value))
    return [
        (term, *(means[term][name].told(_percent) if name in means[term] else "–" for name in head)) for term in shown
    ]


def _mean(items: Sequence[Interval]) -> Interval:
    return Interval(*(float(np.mean([getattr(item, name) for item in items])) for name in ("value", "low", "high")))


_RANK_HEAD = ("Removed", "Text", "Task", "Rank correlation")


def rank_rows(findings: Findings, models: Mapping[str, str]) -> Rows:
    """Whether perplexity ranks cells as accuracy does. models: see `model_names`; the first column, where there are."""
    return [
        (*_first(models, item.model), item.remove, item.text, item.task, item.correlation.told(number))
        for item in findings.ranks
    ]


_STABILITY_HEAD = ("Calibration tokens", "Shared units of two seeds", "Held-out perplexity", "Cells")


def stability_rows(findings: Findings, models: Mapping[str, str]) -> Rows:
    """How many tokens are enough. models: see `model_names`; the first column, where there are."""
    rows: Rows = []
    for item in findings.stability:
        row = (f"{item.tokens:,}", item.jaccard.told(number), _number(item.perplexity), str(item.cells))
        rows.append((*_first(models, item.model), *row))
    return rows


_FAILURE_HEAD = ("Removed", "Search", "Objective", "Cells", "Why")


def failure_rows(findings: Findings, models: Mapping[str, str]) -> Rows:
    """What could not be measured: a line for the cells of one search and ratio that have the same reason.

    models: see `model_names`; the first column, where there are.
    """

    def told(failure: Failure) -> tuple[str, ...]:
        cell = failure.cell
        return (*_first(models, cell.model), cell.remove, cell.search, cell.objective, failure.why)

    counts = Counter(map(told, findings.failures))
    return [(*where, str(count), why) for (*where, why), count in counts.items()]


_BEST_HEAD = ("Removed", "Varied", "Level", "Held-out perplexity", "Task accuracy")


def model_names(outcomes: Iterable[Result | Failure]) -> dict[str, str]:
    """Of several models, by MODEL, what to call each; nothing where there is only one."""
    models = list(dict.fromkeys(outcome.cell.model for outcome in outcomes))
    short = distinct_names([Path(model).name for model in models], models)
    return dict(zip(models, short, strict=True)) if len(models) > 1 else {}


def _first(models: Mapping[str, str], model: str) -> tuple[str, ...]:
    return (models[model],) if models else ()


def _levels(results: Sequence[Result]) -> Iterator[tuple[str, _ByLevel, _ByLevel, list[Result]]]:
    """For each model, ratio and factor: the results to average at each of its levels, one of each plan: those whose
    perplexities are, and those whose accuracies are; and those that are left out of either, as they are not finite or
    have no counterpart at another level.
    """
    for stratum in grouped(results, lambda result: result.cell.stratum).values():
        for factor in FACTORS:
            levels = grouped(stratum, lambda result, factor=factor: result.cell.compared(factor))  # type: ignore[misc]
            levels.pop(None, None)
            if len(levels) > 1:
                means = [counterparts(levels, "held_out", factor), counterparts(levels, "tasks", factor)]
                there = [{result.cell for group in kept.values() for result in group} for kept in means]
                left_out = [
                    each for group in levels.values() for each in group if not all(each.cell in kept for kept in there)
                ]
                of_text, of_tasks = ({level: distinct(group) for level, group in kept.items()} for kept in means)
                yield factor, of_text, of_tasks, left_out


def level_rows(results: Sequence[Result], models: Mapping[str, str]) -> Rows:
    """Mean outcomes at each level of each factor, over plans that have a counterpart at every level: the geometric mean
    of perplexities, the mean of accuracies.

    models: see `model_names`; the first column, where there are.
    """
    rows: Rows = []
    for factor, of_text, of_tasks, left_out in _levels(results):
        cell = next(each.cell for each in [*itertools.chain(*of_text.values()), *left_out])
        for level, group in of_text.items():
            row = [*_first(models, cell.model), cell.remove, factor, str(level)]
            row.append(_number(_geometric([value for result in group for value in result.held_out.values()])))
            if any(result.tasks for result in results):
                accuracies = [value for result in of_tasks[level] for value in result.tasks.values()]
                row.append(percent(sum(accuracies), len(accuracies)) if accuracies else "–")
            rows.append(tuple(row))
    return rows


def _left_out(counts: Mapping[str, int]) -> str:
    """A sentence on cells that were measured and are missing in a mean; nothing where none are. counts: by factor."""
    told = ", ".join(f"{count:,} where {factor} is compared" for factor, count in counts.items() if count)
    return (
        f" Left out of a mean are cells without a finite outcome, or without a counterpart at each level: {told}."
        if told
        else ""
    )


def _geometric(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else float("nan")


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}"


def _percent(share: float) -> str:
    return percent(share, 1, digits=0)


@dataclass(frozen=True)
class _Table:
    """One table of the page. words: how many columns from the left hold words, not numbers. told: how to read it."""

    name: str
    title: str
    head: Sequence[str]
    rows: Rows
    told: str
    words: int = 1


def _tables(results: Sequence[Result], findings: Findings) -> list[_Table]:
    """Every table that has rows."""
    models = model_names([*results, *findings.failures])
    several = ("Model",) if models else ()
    levels = level_rows(results, models)
    levels_head = (*several, *_BEST_HEAD)[: len(levels[0]) if levels else 0]
    failures_head = (*several, *_FAILURE_HEAD)
    of_levels: Counter[str] = Counter()
    for factor, _, _, left_out in _levels(results):
        of_levels[factor] += len(left_out)
    found = [
        _Table(
            "agreement",
            "Plans that differ in one thing only",
            _AGREEMENT_HEAD,
            agreement_rows(findings),
            "Of plans that depend on it. 1 is the same plan, or the same order. In brackets: 95 % intervals.",
        ),
        _Table(
            "shares",
            "What the variance is due to",
            share_head(findings),
            share_rows(findings),
            "Means over ratios and models. In brackets: 95 % intervals. Terms below "
            f"{_percent(_SMALLEST_SHARE)} of every outcome are in {NUMBERS} only.",
        ),
        _Table(
            "levels",
            "What each choice brings on average",
            levels_head,
            levels,
            f"Perplexity: the geometric mean over {_OVER}; lower is better. Accuracy: the mean over cells and tasks."
            + _left_out(of_levels),
            len(several) + _BEST_HEAD.index("Level") + 1,
        ),
        _Table(
            "ranks",
            "Does perplexity rank as tasks do?",
            (*several, *_RANK_HEAD),
            rank_rows(findings, models),
            "1: of any two plans, the one of lower perplexity has the higher accuracy; −1: the lower one.",
            len(several) + _RANK_HEAD.index("Task") + 1,
        ),
        _Table(
            "stability",
            "How many tokens are enough?",
            (*several, *_STABILITY_HEAD),
            stability_rows(findings, models),
            f"Perplexity: the geometric mean over {_OVER}; lower is better."
            + _left_out({"size": sum(item.left_out for item in findings.stability)}),
            len(several) + 1,
        ),
        _Table(
            "failures",
            "What could not be measured",
            failures_head,
            failure_rows(findings, models),
            "Everything else on this page is about the cells that were measured.",
            len(failures_head),
        ),
    ]
    return [table for table in found if table.rows]


_OVER = "cells and held-out texts"

HOW = (
    "In brackets: 95 % intervals. Plans are compared across a factor if they depend on it: a ranking by cosine, for "
    "instance, asks no objective. Cells that have the same plan for this reason count once. "
    "Agreement: bootstrap over groups of cells that share all but the factor. Variance: "
    "type II sums of squares of main effects and interactions of two factors, within one model and ratio, with redrawn "
    "residuals; of a plan, summed over sublayers. Searches that draw are not compared across seeds, and what they draw "
    "is left over. Correlation: over distinct plans, bootstrap over these. No interval (–): what a single group of "
    "cells says, and shares in a grid with as many cells as effects, where noise counts as an effect and nothing can "
    "be left over."
)


def render(results: Sequence[Result], findings: Findings) -> str:
    """The page as a string; it needs nothing from elsewhere."""
    figures = {
        "agreement": html_figure(
            agreement_bars(findings),
            "How alike plans are",
            "The shorter a bar, the more this choice changes the plan. Orange is the search, blue what it searches on. "
            "Whiskers: 95 % intervals.",
        ),
        "shares": html_figure(
            share_bars(findings),
            "Shares of the variance of each outcome",
            "Interactions: what two choices do only together, all pairs added up. Rest: what none of these explains. "
            "Means over ratios and models.",
        ),
        "levels": html_figure(
            spread(results),
            "Held-out perplexity of every cell",
            "Each dot is a cell, coloured by its calibration text. Lower is better; the axis is logarithmic.",
        ),
    }
    sections = [html_section("answer", "The answer", f"<p>{glued(findings.answer)}</p>\n")]
    for table in _tables(results, findings):
        numbers = html_table(table.head, table.rows, table.title, words=table.words)
        told = f'<p class="quiet">{glued(table.told)}</p>\n'
        sections.append(html_section(table.name, table.title, figures.get(table.name, "") + numbers + told))
    sections.append(html_section("how", "How this was computed", f'<p class="quiet">{glued(HOW)}</p>\n'))
    names = ", ".join(dict.fromkeys(Path(result.cell.model).name for result in results))
    return html_page(f"Study of {names}", f"{findings.cells:,} ways to choose what to remove", sections)


def markdown(results: Sequence[Result], findings: Findings) -> str:
    """The answer and the tables."""
    parts = [findings.answer, ""]
    for table in _tables(results, findings):
        ruler = ["---"] * table.words + ["---:"] * (len(table.head) - table.words)
        parts += [f"## {table.title}", "", _line(table.head), _line(ruler), *map(_line, table.rows), "", table.told, ""]
    return "\n".join([*parts, HOW, ""])


def _line(cells: Sequence[str]) -> str:
    escaped = [cell.replace("|", r"\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def agreement_bars(findings: Findings) -> str | None:
    """A bar a factor: how much of their units plans share that differ in this factor only."""
    items = sorted(findings.agreements, key=lambda item: -item.jaccard.value)
    if not items:
        return None
    with styled():
        figure = Figure(figsize=(WIDTH, 0.7 + 0.32 * len(items)), layout="constrained")
        axes: Axes = figure.subplots()
        values = [item.jaccard.value for item in items]
        below = [item.jaccard.value - item.jaccard.low for item in items]
        above = [item.jaccard.high - item.jaccard.value for item in items]
        errors = np.fmax(0.0, [below, above])  # 0 where there is no interval
        colours = [VERMILION if item.factor == "search" else BLUE for item in items]
        axes.barh([item.factor for item in items], values, xerr=errors, color=colours, height=0.62, ecolor=INK)
        axes.set_xlim(0, 1)
        axes.set_xlabel("shared units of plans that differ in this only (Jaccard)")
        axes.grid(axis="x")
        told = ", ".join(f"{item.factor} {item.jaccard.value:.2f}" for item in items)
        return svg(figure, "How alike plans are", f"Bars with intervals: {told}.")


def share_bars(findings: Findings) -> str | None:
    """One stacked bar an outcome: main effects, all interactions together, and the rest."""
    outcomes_ = share_head(findings)[1:]
    if not outcomes_:
        return None
    parts: dict[str, list[float]] = {}
    for name in outcomes_:
        own = [item for item in findings.decompositions if item.outcome == name]
        for label, value in _stack(own).items():
            parts.setdefault(label, [0.0] * len(outcomes_))[outcomes_.index(name)] = value
    with styled():
        figure = Figure(figsize=(WIDTH, 1.1 + 0.36 * len(outcomes_)), layout="constrained")
        axes: Axes = figure.subplots()
        left = np.zeros(len(outcomes_))
        for (label, values), colour in zip(parts.items(), COLOURS * 2, strict=False):
            shade = {RESIDUAL: PALE, "interactions": EDGE}.get(label, colour)
            axes.barh(outcomes_, values, left=left, color=shade, height=0.62, label=label)
            left += np.array(values)
        axes.invert_yaxis()
        axes.set_xlim(0, max(1.0, float(left.max())))
        axes.set_xlabel("share of the variance")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(parts), borderaxespad=0.2)
        return svg(figure, "What the variance is due to", "Stacked bars, one an outcome; the table has the numbers.")


def _stack(items: Sequence[Decomposition]) -> Mapping[str, float]:
    """Mean shares by label; interactions are added up."""
    sums: dict[str, float] = {}
    for item in items:
        for share in item.shares:
            label = "interactions" if " × " in share.term else share.term
            sums[label] = sums.get(label, 0.0) + share.share.value / len(items)
    last = ("interactions", RESIDUAL)
    return {
        label: sums[label] for label in [*(key for key in sums if key not in last), *(k for k in last if k in sums)]
    }


def spread(results: Sequence[Result]) -> str | None:
    """Held-out perplexity of every cell: a panel a text, a column a search at a ratio, of one model where there are
    several, and a colour a calibration text.
    """
    texts = [name for name in outcomes(results) if name in results[0].held_out]
    if not texts:
        return None
    by_model = [result for cells in grouped(results, lambda result: result.cell.model).values() for result in cells]
    columns = list(dict.fromkeys(map(_column, by_model)))
    labels = [f"{search}\n{remove}" for _, remove, search in columns]
    models = model_names(results)
    starts = []
    for model, name in models.items():
        among = [place for place, column in enumerate(columns) if column[0] == model]
        starts.append(among[0])
        labels[among[(len(among) - 1) // 2]] += f"\n{name}"
    sources = list(dict.fromkeys(result.cell.text for result in results))
    with styled():
        figure = Figure(figsize=(WIDTH, 0.9 + 2.1 * len(texts)), layout="constrained")
        panels: list[Axes] = list(figure.subplots(len(texts), 1, sharex=True, squeeze=False)[:, 0])
        for axes, text in zip(panels, texts, strict=True):
            for number, source in enumerate(sources):
                own = [result for result in results if result.cell.text == source]
                shift = (number - (len(sources) - 1) / 2) * 0.16
                places = [columns.index(_column(result)) + shift for result in own]
                values = [result.held_out[text] for result in own]
                colour = COLOURS[number % len(COLOURS)]
                axes.plot(places, values, "o", color=colour, alpha=0.55, markersize=3.5, label=source)
            for start in starts[1:]:
                axes.axvline(start - 0.5, color=EDGE, linewidth=0.8)
            perplexity_axis(axes)
            axes.set_ylabel(f"perplexity, {text} (log scale)")
            axes.grid(axis="y")
        panels[-1].set_xticks(range(len(columns)), labels)
        panels[0].legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(sources), borderaxespad=0.2)
        return svg(
            figure,
            "Held-out perplexity of every cell",
            f"Dots by search, {'ratio and model' if models else 'and ratio'}, coloured by calibration text.",
        )


def _column(result: Result) -> tuple[str, str, str]:
    return result.cell.model, result.cell.remove, result.cell.search
