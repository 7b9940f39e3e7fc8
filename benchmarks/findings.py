"""Findings 1, 2 and 4 of the literature on a model at hand: what goes more easily, and what a task's own metric gains.

Blocks, attention and MLP sublayers are removed one after another, up to half of them, in the order of each metric;
perplexity is measured after each removal, answers to questions after 10, 20, 33, 40 and 50 %.

1. Attention sublayers go more easily than MLP sublayers and blocks (arXiv:2407.16286).
2. An adaptive metric gains on the task it was computed on and may lose on others (arXiv:2407.16286).
4. Deep spans are the most alike by angular distance; question answering holds until a sharp drop, perplexity rises
   smoothly (arXiv:2403.17887).

    python benchmarks/findings.py --data FOLDER [--model demo] [--limit 32] [--out docs]

FOLDER holds text/c4.jsonl (what metrics read), text/wikitext2.test.txt (perplexity), and tasks/: arc_easy/test.jsonl,
arc_easy/validation.jsonl (what the task's own metric reads), boolq/validation.jsonl, mmlu/test.jsonl. Writes
OUT/findings.md and the figures in OUT/findings/. All wording there follows from the numbers. Measurements are kept on
disk as they are made, so the same command resumes after an interruption. The time goes into questions: in proportion to
--limit.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from shallower.cli.progress import working
from shallower.corpus import CalibrationSet, build_calibration, build_choices
from shallower.corpus.choices import ChoiceSet
from shallower.reporting.style import EDGE, PALE, styled
from shallower.units import KINDS, Span, Unit, listed
from shallower.verbs.measuring import make_ablator
from shallower.verbs.score import score
from shallower.verbs.subject import Subject, open_subject

Removed = frozenset[Unit]

SHARES = (0.1, 0.2, 1 / 3, 0.4, 0.5)  # of the units of a kind: where questions are asked
OWN = "ARC-easy"  # the task that a metric is computed on
TASKS = {
    "ARC-easy": "tasks/arc_easy/test.jsonl",
    "BoolQ": "tasks/boolq/validation.jsonl",
    "MMLU": "tasks/mmlu/test.jsonl",
}
OWN_QUESTIONS = "tasks/arc_easy/validation.jsonl"
ON_TEXT, ON_TASK, SPANS = "loss on C4", f"loss on {OWN}", "angular spans"
VALUE_ON_TEXT, VALUE_ON_TASK = "shapley on C4", f"shapley on {OWN}"
ANSWERED = ("cosine", ON_TEXT, VALUE_ON_TEXT, VALUE_ON_TASK, SPANS)  # rankings whose cuts are asked questions, too
NAMES = {"block": "blocks", "attn": "attention sublayers", "mlp": "MLP sublayers"}
COLOURS = ("#64748B", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#E69F00", "#56B4E9", "#334155")


@dataclass(frozen=True)
class Curve:
    """What one ranking of one kind of unit removes: `sets[n]` are n units."""

    kind: str
    ranking: str
    sets: tuple[Removed, ...]

    @property
    def asked(self) -> list[int]:
        """Numbers of units after which questions are asked."""
        units = 2 * (len(self.sets) - 1)
        return [0, *sorted({max(1, round(share * units)) for share in SHARES})] if self.ranking in ANSWERED else []


@dataclass(frozen=True)
class Task:
    """A set of questions and what was answered: `margins[removed]` is float64 [questions], right where below 0."""

    name: str
    chance: float
    margins: Mapping[Removed, NDArray[np.float64]]

    def accuracy(self, removed: Removed) -> float:
        return float((self.margins[removed] < 0).mean())

    @property
    def dense(self) -> float:
        return self.accuracy(frozenset())

    @property
    def error(self) -> float:
        """Standard error of the dense model's accuracy."""
        return math.sqrt(self.dense * (1 - self.dense) / len(self.margins[frozenset()]))

    def difference(self, one: Removed, other: Removed) -> tuple[float, float]:
        """By how many nats the right answer is further ahead with `one` removed than with `other`, and its standard
        error over questions.
        """
        gain = self.margins[other] - self.margins[one]
        return float(gain.mean()), float(gain.std(ddof=1) / math.sqrt(len(gain)))


@dataclass(frozen=True)
class Measured:
    """Everything that the page tells."""

    subject: Subject
    curves: tuple[Curve, ...]
    nll: Mapping[Removed, float]
    tasks: tuple[Task, ...]
    spans: Mapping[Span, float]
    setting: str

    def perplexity(self, removed: Removed) -> float:
        return math.exp(min(self.nll[removed], 700))

    def of(self, kind: str) -> list[Curve]:
        return [curve for curve in self.curves if curve.kind == kind]

    def before_doubling(self, curve: Curve) -> int:
        """How many units can go while perplexity stays within twice the dense model's."""
        limit = 2 * self.perplexity(frozenset())
        fails = (number for number, removed in enumerate(curve.sets) if self.perplexity(removed) > limit)
        return next(fails, len(curve.sets)) - 1

    def holding(self, curve: Curve, task: Task) -> int:
        """The last point asked up to which accuracy never fell below the dense model's minus its standard error."""
        last = 0
        for number in curve.asked:
            if task.accuracy(curve.sets[number]) < task.dense - task.error:
                break
            last = number
        return last

    def parameters(self, removed: Removed) -> float:
        """Share of the parameters in blocks."""
        return self.subject.weights.of(removed).parameters / self.subject.weights.blocks.parameters


def measure(given: argparse.Namespace) -> Measured:
    subject = open_subject(given.model, dtype=given.dtype)
    data = Path(given.data)

    def text(name: str, sequences: int, length: int) -> CalibrationSet:
        return build_calibration(str(data / name), subject.tokenizer, sequences=sequences, length=length)

    def questions(name: str, count: int) -> ChoiceSet:
        return build_choices(str(data / name), subject.tokenizer, questions=count, length=given.question_tokens)

    calibration, evaluation = text("text/c4.jsonl", *given.calibration), text("text/wikitext2.test.txt", *given.text)
    own = questions(OWN_QUESTIONS, given.limit)
    spans = score(subject, "angular", positions="all", spans=True, calibration=calibration).spans
    curves = tuple(_curves(subject, calibration, own, spans, given.samples))
    with closing(make_ablator(subject, evaluation, "nll")) as ablator:
        sets = _distinct(removed for curve in curves for removed in curve.sets)
        nll = dict(zip(sets, ablator.losses(sets), strict=True))
    asked = _distinct(curve.sets[number] for curve in curves for number in curve.asked)
    tasks = []
    for name, path in TASKS.items():
        choices = questions(path, given.limit)
        with closing(make_ablator(subject, choices, "task")) as ablator:
            margins = dict(zip(asked, ablator.sums(asked), strict=True))
        options = torch.bincount(choices.answers.question).double()
        tasks.append(Task(name, float((1 / options).mean()), margins))
    setting = (
        f"{subject.identity.name} ({str(subject.model.dtype).removeprefix('torch.')}), {subject.identity.blocks} "
        f"blocks. Metrics read {calibration.sequences} sequences of {calibration.length} tokens of C4, or "
        f"{own.questions} questions of the validation split of {OWN}. Perplexity is measured on {evaluation.sequences} "
        f"sequences of {evaluation.length} tokens of the WikiText-2 test text. Each task has {given.limit} questions, "
        f"none longer than {given.question_tokens} tokens, without examples; the answer is the choice with the highest "
        "log-likelihood."
    )
    return Measured(subject, curves, nll, tuple(tasks), spans, setting)


def _distinct(sets: Iterable[Removed]) -> list[Removed]:
    return list(dict.fromkeys(sets))


def _curves(
    subject: Subject, text: CalibrationSet, own: ChoiceSet, spans: Mapping[Span, float], samples: int
) -> Iterator[Curve]:
    ways: dict[str, dict[str, Any]] = {
        "cosine": {"metric": "cosine", "calibration": text},
        "relative-l2": {"metric": "relative-l2", "calibration": text},
        "angular": {"metric": "angular", "calibration": text, "positions": "all", "spans": False},
        ON_TEXT: {"metric": "loss", "calibration": text},
        ON_TASK: {"metric": "loss", "calibration": own, "objective": "task"},
    }
    shapley: dict[str, Any] = {"metric": "shapley", "settings": {"samples": str(samples)}}
    ways[VALUE_ON_TEXT] = {"calibration": text, **shapley}
    ways[VALUE_ON_TASK] = {"calibration": own, "objective": "task", **shapley}
    for kind, (ranking, way) in itertools.product(KINDS, ways.items()):
        order = score(subject, units=kind, **way).ranked()
        yield Curve(kind, ranking, _nested(order))
    half = len(subject.anatomy.blocks) // 2
    best = [
        min((span for span in spans if span.blocks == length), key=spans.__getitem__) for length in range(1, half + 1)
    ]
    yield Curve("block", SPANS, (frozenset(), *(frozenset(span.units) for span in best)))


def _nested(order: Sequence[Unit]) -> tuple[Removed, ...]:
    return tuple(frozenset(order[:count]) for count in range(len(order) // 2 + 1))


# The page


def page(found: Measured, command: str) -> str:
    parts = [
        f"# Do the papers' findings hold on {found.subject.identity.name}?",
        f"Made by `{command}`; all numbers and words are computed, none were written by hand. Findings 1 and 2 are "
        "from arXiv:2407.16286, 4 is from 2403.17887; for 3 see "
        "[trained maps](../benchmarks/results/recovery.md#trained-maps-against-the-mean-update).\n\n"
        f"{found.setting}",
        *_dense(found),
        *_first(found),
        *_second(found),
        *_fourth(found),
    ]
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _dense(found: Measured) -> Iterator[str]:
    yield "## What there is to lose"
    rows, lost = [], []
    for task in found.tasks:
        guessing = math.sqrt(task.chance * (1 - task.chance) / len(task.margins[frozenset()]))
        above = (task.dense - task.chance) / guessing
        if above < 2:
            lost.append(task.name)
        row = (task.name, f"{task.dense:.1%} ± {task.error:.1%}", f"{task.chance:.1%}", f"{above:+.1f}")
        rows.append(tuple(cell.replace("%", " %") for cell in row))
    yield f"The dense model's perplexity is {found.perplexity(frozenset()):.1f}."
    yield _table(("task", "dense accuracy", "chance", "standard errors of guessing above chance"), rows)
    if lost:
        yield (
            f"On {_listed(lost)} these questions cannot tell the dense model from guessing (less than 2 standard "
            "errors above chance). That accuracy there holds when units are removed therefore shows nothing."
        )


def _first(found: Measured) -> Iterator[str]:
    yield "## 1. Does attention go more easily than MLPs and blocks?"
    yield (
        "How many units of each kind can be removed before perplexity has doubled, in the order of each metric; "
        "in brackets, their share of the parameters in blocks:"
    )
    names = [curve.ranking for curve in found.of("attn")]
    cells = {(curve.ranking, curve.kind): curve for curve in found.curves}
    counts = {key: found.before_doubling(curve) for key, curve in cells.items()}

    def told(name: str, kind: str) -> str:
        curve, count = cells[name, kind], counts[name, kind]
        most = " or more" if count == len(curve.sets) - 1 else ""
        return f"{count}{most} ({found.parameters(curve.sets[count]):.0%})".replace("%", " %")

    yield _table(
        ("order by", *(NAMES[kind] for kind in KINDS)),
        [(name, *(told(name, kind) for kind in KINDS)) for name in names],
    )
    wins = {other: sum(counts[name, "attn"] > counts[name, other] for name in names) for other in ("mlp", "block")}
    light, heavy = (found.parameters(frozenset([Unit(0, kind)])) for kind in ("attn", "mlp"))
    yield (
        f"By {wins['mlp']} of {len(names)} orders, more attention sublayers than MLP sublayers can be removed; by "
        f"{wins['block']}, more attention sublayers than blocks. But units differ in size: an attention "
        f"sublayer holds {light / heavy:.2f} times the parameters of an MLP sublayer."
    )
    yield "![Perplexity as units are removed](findings/perplexity.svg)"
    yield (
        "Each colour is an order of removal; the dashed line is twice the dense model's perplexity. The axis is "
        "logarithmic."
    )
    third = round(len(cells[ON_TEXT, "attn"].sets[-1]) * 2 / 3)
    yield f"Accuracy and perplexity with a third of the units of a kind ({third}) removed:"
    rows = []
    for kind, name in itertools.product(KINDS, [name for name in names if name in ANSWERED]):
        removed = cells[name, kind].sets[third]
        accuracies = [f"{task.accuracy(removed):.1%}".replace("%", " %") for task in found.tasks]
        rows.append((f"{NAMES[kind]}, {name}", *accuracies, f"{found.perplexity(removed):,.1f}"))
    dense = [f"{task.dense:.1%}".replace("%", " %") for task in found.tasks]
    tasks = [task.name for task in found.tasks]
    yield _table(
        ("removed", *tasks, "perplexity"), [("nothing", *dense, f"{found.perplexity(frozenset()):,.1f}"), *rows]
    )
    yield (
        "The most units that can be removed, among the numbers tested, while accuracy up to that point is never more "
        "than a standard error below the dense model's:"
    )
    yield _table(
        ("removed", *tasks),
        [
            (f"{NAMES[curve.kind]}, {curve.ranking}", *(str(found.holding(curve, task)) for task in found.tasks))
            for curve in found.curves
            if curve.asked
        ],
    )
    yield "![Accuracy as units are removed](findings/accuracy.svg)"
    yield "The grey band is the dense model's accuracy with its standard error; the dashed line is chance."


def _second(found: Measured) -> Iterator[str]:
    yield "## 2. Does a metric gain on the task it was computed on, and lose on others?"
    yield (
        f"Blocks or sublayers are removed in the order of Shapley values, computed either on the answers of {OWN} (its "
        "validation split) or on text. The task columns show by how many nats the right answer is further ahead of the "
        "best wrong one with the first order than with the second, ± the standard error over questions (above 0: the "
        "task's own order is better). The last column is perplexity with the first order, divided by that with the "
        "second."
    )
    rows = []
    gained: dict[str, list[int]] = {task.name: [0, 0, 0] for task in found.tasks}
    for kind in KINDS:
        own, plain = (next(c for c in found.of(kind) if c.ranking == name) for name in (VALUE_ON_TASK, VALUE_ON_TEXT))
        for number in own.asked[1:]:
            cells = []
            for task in found.tasks:
                mean, error = task.difference(own.sets[number], plain.sets[number])
                gained[task.name][1 + (mean > 2 * error) - (mean < -2 * error)] += 1
                cells.append(f"{mean:+.2f} ± {error:.2f}")
            ratio = found.perplexity(own.sets[number]) / found.perplexity(plain.sets[number])
            rows.append((f"{number} {NAMES[kind]}", *cells, f"{ratio:.2f}"))
    yield _table(("removed", *(task.name for task in found.tasks), "perplexity"), rows)
    yield "\n".join(
        f"- {name}{' (its own)' if name == OWN else ''}: better by more than two standard errors at {better} of "
        f"{worse + same + better} points, worse at {worse}, indistinguishable at {same}."
        for name, (worse, same, better) in gained.items()
    )


def _fourth(found: Measured) -> Iterator[str]:
    yield "## 4. Are deep spans the most alike, and does question answering drop sharply?"
    blocks = found.subject.identity.blocks
    rows, deep = [], 0
    spans = next(curve for curve in found.curves if curve.ranking == SPANS)
    for length, removed in enumerate(spans.sets[1:], start=1):
        start = min(unit.index for unit in removed)
        centre = (start + length / 2) / blocks
        deep += centre > 0.5
        rows.append(
            (
                str(length),
                listed(removed),
                f"{found.spans[Span(start, start + length)]:.3f}",
                f"{centre:.2f}",
                f"{found.perplexity(removed):,.1f}",
            )
        )
    yield "For each length, the span with the least angular distance (all positions), and perplexity without it:"
    yield _table(("blocks", "span", "distance / π", "centre, 0 to 1", "perplexity"), rows)
    yield f"{deep} of {len(rows)} have their centre in the deeper half of the model."
    told = []
    for task in found.tasks:
        steps = [task.accuracy(spans.sets[number]) for number in spans.asked]
        told.append(_steepest(f"accuracy on {task.name}", spans.asked, [-step for step in steps], task.error))
    logs = [found.nll[spans.sets[number]] for number in spans.asked]
    told.append(_steepest("the loss (the logarithm of perplexity)", spans.asked, logs, 0.0))
    yield "\n".join(f"- {sentence}" for sentence in told)
    yield (
        "How to read the lines above: if a single step between two points accounts for nearly all of a fall, the drop "
        f"is sharp; if the fall is smooth, each of the {len(spans.asked) - 1} steps accounts for about as large a "
        "share of it as of the blocks."
    )


def _steepest(what: str, numbers: Sequence[int], rises: Sequence[float], error: float) -> str:
    """Where most of a rise happens. rises: what gets worse, higher is worse."""
    whole = rises[-1] - rises[0]
    if whole <= 2 * error:
        return f"{what} does not fall by more than two standard errors with {numbers[-1]} blocks removed."
    steps = np.diff(rises)
    place = int(np.argmax(steps))
    share = (numbers[place + 1] - numbers[place]) / numbers[-1]
    return (
        f"{what}: {steps[place] / whole:.0%} of what is lost with {numbers[-1]} blocks removed is lost between "
        f"{numbers[place]} and {numbers[place + 1]} blocks, which is {share:.0%} of the blocks removed."
    ).replace("%", " %")


# Figures


def figures(found: Measured, folder: Path) -> None:
    rankings = list(dict.fromkeys(curve.ranking for curve in found.curves))
    colour = dict(zip(rankings, COLOURS, strict=False))
    with styled():
        figure = Figure(figsize=(9.2, 3.2), layout="constrained")
        panels: list[Axes] = list(figure.subplots(1, 3, sharey=True))
        for axes, kind in zip(panels, KINDS, strict=True):
            for curve in found.of(kind):
                values = [found.perplexity(removed) for removed in curve.sets]
                axes.plot(
                    range(len(values)), values, color=colour[curve.ranking], linewidth=1.3, marker="o", markersize=2
                )
            axes.axhline(2 * found.perplexity(frozenset()), color=EDGE, linewidth=0.8, linestyle="--")
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            _frame(axes, f"{NAMES[kind]} removed")
        panels[0].set_ylabel("perplexity (dashed: twice dense)")
        _finish(figure, panels[0], colour, folder / "perplexity.svg")
        figure = Figure(figsize=(9.2, 6.6), layout="constrained")
        grid = figure.subplots(len(found.tasks), 3, sharex="col", sharey="row", squeeze=False)
        for task, line in zip(found.tasks, grid, strict=True):
            for axes, kind in zip(line, KINDS, strict=True):
                for curve in found.of(kind):
                    values = [task.accuracy(curve.sets[number]) for number in curve.asked]
                    axes.plot(curve.asked, values, color=colour[curve.ranking], linewidth=1.3, marker="o", markersize=3)
                axes.axhspan(task.dense - task.error, task.dense + task.error, color=PALE, zorder=0)
                axes.axhline(task.chance, color=EDGE, linewidth=0.8, linestyle="--")
                _frame(axes, f"{NAMES[kind]} removed" if task is found.tasks[-1] else "")
            line[0].set_ylabel(f"{task.name} accuracy")
        _finish(
            figure, grid[0][0], {name: colour[name] for name in rankings if name in ANSWERED}, folder / "accuracy.svg"
        )


def _frame(axes: Axes, label: str) -> None:
    axes.set_xlabel(label)
    axes.grid(axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _finish(figure: Figure, axes: Axes, colour: Mapping[str, str], path: Path) -> None:
    handles = [axes.plot([], [], color=shade, label=name)[0] for name, shade in colour.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    figure.savefig(path, format="svg", metadata={"Date": None})


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with text/ and tasks/")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--limit", type=int, default=32, help="questions of each task")
    parser.add_argument("--question-tokens", type=int, default=128, help="longer questions are left out")
    size: dict[str, Any] = {"type": int, "nargs": 2, "metavar": ("SEQUENCES", "LENGTH")}
    parser.add_argument("--calibration", default=(8, 128), help="of the text that metrics read", **size)
    parser.add_argument("--text", default=(8, 256), help="of the text for perplexity", **size)
    parser.add_argument("--samples", type=int, default=3, help="orders of removal for Shapley values")
    parser.add_argument("--out", default="docs", help="folder for findings.md and findings/")
    given = parser.parse_args()
    start = time.perf_counter()
    with working(quiet=False):
        found = measure(given)
    folder = Path(given.out) / "findings"
    folder.mkdir(parents=True, exist_ok=True)
    figures(found, folder)
    calibration, text = (" ".join(map(str, size)) for size in (given.calibration, given.text))
    command = (
        f"python benchmarks/findings.py --data FOLDER --model {given.model} --limit {given.limit} --question-tokens "
        f"{given.question_tokens} --calibration {calibration} --text {text} --samples {given.samples}"
    )
    written = Path(given.out) / "findings.md"
    written.write_text(page(found, command), encoding="utf-8")
    print(f"{written} after {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
