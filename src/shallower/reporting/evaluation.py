"""What the terminal shows of a comparison: its texts, tables of tasks, and what models write."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from shallower.evaluation.comparison import Comparison
from shallower.evaluation.generation import Generation
from shallower.evaluation.pairs import Difference
from shallower.evaluation.tasks import TaskMetric, TaskResult
from shallower.reporting.tables import CHANCE, PerplexityRow, add_row, new_table
from shallower.reporting.wording import percent, signed

_SAMPLES = 3
_WIDEST = 180  # characters of a text shown: six lines where two stand side by side on a terminal of 80 columns


def perplexity_rows(found: Comparison) -> list[PerplexityRow]:
    """What `perplexity_table` shows of a comparison."""
    rows = []
    for each in found.evaluations:
        differences = {text: found.text_difference(each, text) for text in found.texts}
        unclear = {text for text, one in differences.items() if one is not None and not one.significant}
        values = {text: measured.perplexity for text, measured in each.perplexity.items()}
        apart = {text for text in found.texts if found.apart(each, text)}
        rows.append(PerplexityRow(each.model, each.blocks, each.parameters, values, unclear, apart))
    return rows


def text_sentences(found: Comparison) -> Iterator[str]:
    """A sentence on each text of a comparison: how much of it was scored, and each model's bits per byte."""
    for text in found.texts:
        bits = ", ".join(f"{each.perplexity[text].bits_per_byte:.3f}" for each in found.evaluations)
        measured = found.evaluations[0].perplexity[text]
        scored = f"{measured.tokens:,} tokens scored in {measured.windows} windows"
        others = [each for each in found.evaluations if found.apart(each, text)]
        told = "".join(f", other windows by {each.model}" for each in others)
        yield f"{text}: {scored}{told}; bits per byte {bits}."


@dataclass(frozen=True)
class TaskColumn:
    """One model of `task_table`. differences: to the first model, by task and metric."""

    model: str
    results: Sequence[TaskResult]
    differences: Mapping[tuple[str, str], Difference]


def task_columns(found: Comparison) -> list[TaskColumn]:
    """What `task_table` shows of a comparison."""
    columns = []
    for each in found.evaluations:
        differences = {}
        for result in each.tasks:
            for metric in result.metrics:
                difference = found.task_difference(each, result.task, metric.name)
                if difference is not None:
                    differences[result.task, metric.name] = difference
        columns.append(TaskColumn(each.model, each.tasks, differences))
    return columns


def task_table(columns: Sequence[TaskColumn]) -> Table:
    """A row for each metric of a task, a column for each model: value ± standard error, and under it the difference to
    the first model ± its paired error.
    """
    told = "Value ± standard error"
    told += f"; below, the difference to {columns[0].model} ± its paired error." if len(columns) > 1 else "."
    unclear = any(not found.significant for column in columns for found in column.differences.values())
    table = new_table("Task", "Metric", "Items", *(column.model for column in columns), caption=told + CHANCE * unclear)
    for result in columns[0].results:
        if result.within is not None and not result.group:
            continue  # summed up in its group; all are in the file
        for place, metric in enumerate(result.metrics):
            cells = [_cell(column, result.task, metric.name) for column in columns]
            name = f"{'  ' if result.within else ''}{result.task}" + (f", {result.shots}-shot" if result.shots else "")
            add_row(table, name if place == 0 else "", metric.name, f"{result.count:,}" if place == 0 else "", *cells)
    return table


def _cell(column: TaskColumn, task: str, name: str) -> str:
    metric = next(
        (each for result in column.results if result.task == task for each in result.metrics if each.name == name), None
    )
    if metric is None:
        return "–"
    difference = column.differences.get((task, name))
    if difference is None:
        return _value(metric)
    error = f" ±{difference.error:.3f}" if difference.error is not None else ""
    return f"{_value(metric)}\n{signed(difference.value, '{:.3f}'.format)}{error}" + (
        "" if difference.significant else " ~"
    )


def _value(metric: TaskMetric) -> str:
    return f"{metric.value:.3f}" + (f" ±{metric.error:.3f}" if metric.error is not None else "")


def generation_table(written: Mapping[str, Generation]) -> Table:
    """One row a model: how much repeats, loops, how long the texts are."""
    told = (
        "Greedy continuations of the same prompts. 2-runs, 3-runs: share of these runs of words that are not repeats. "
        "Ended: by the model itself."
    )
    table = new_table("Model", "2-runs", "3-runs", "Loops", "Tokens", "Ended", caption=told)
    for model, found in written.items():
        shares = (found.distinct_2, found.distinct_3, found.loops)
        add_row(
            table,
            model,
            *(percent(share, 1, digits=0) for share in shares),
            f"{found.length:.0f}",
            percent(found.ended, 1, digits=0),
        )
    return table


def samples_table(written: Mapping[str, Generation]) -> Table:
    """What the models wrote after the same prompts, side by side."""
    table = Table(box=SIMPLE_HEAD, show_lines=True, pad_edge=False)
    table.add_column("Prompt", overflow="fold", ratio=1)
    for model in written:
        table.add_column(Text(model), overflow="fold", ratio=2)
    first = next(iter(written.values()))
    for place, one in enumerate(first.continuations[:_SAMPLES]):
        texts = [_shown(found.continuations[place].text) for found in written.values()]
        table.add_row(Text(one.prompt), *(Text(text) for text in texts))
    return table


def _shown(text: str) -> str:
    """The start of a text in as few lines as can be."""
    line = re.sub(r"\s*\n\s*", lambda gap: f" {gap[0].count(chr(10)) * '⏎'} ", text)
    return line if len(line) <= _WIDEST else f"{line[: _WIDEST - 1]}…"
