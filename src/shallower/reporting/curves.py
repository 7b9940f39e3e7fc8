"""The picture of 2403.17887: accuracy and perplexity against what was removed."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from shallower.evaluation.perplexity import Perplexity
from shallower.evaluation.tasks import TaskResult
from shallower.filenames import CURVE_PNG, CURVE_SVG
from shallower.reporting.style import COLOURS, GREY, perplexity_axis, styled, svg
from shallower.reporting.wording import KIND_NAMES
from shallower.units import Kind

_SHARED = GREY  # of a line that several tasks have
_MARKERS = "osD^vPX*"
_DOTS = 200  # of a PNG, an inch


class CurvePoint(Protocol):
    """One prefix of the plan."""

    @property
    def removed(self) -> int | None: ...
    @property
    def blocks(self) -> int: ...
    @property
    def perplexity(self) -> Mapping[str, Perplexity]: ...
    @property
    def tasks(self) -> tuple[TaskResult, ...]: ...


def curve_files(points: Sequence[CurvePoint], model: str, kinds: Mapping[Kind, int]) -> dict[str, str | bytes]:
    """`curve.svg` and `curve.png`; nothing when there is nothing to draw. kinds: of the units that the plan removes,
    with how many of each the model has.
    """
    with styled():
        figure = ratio_figure(points, model, kinds)
        if figure is None:
            return {}
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=_DOTS, facecolor="white", metadata={"Software": None})
        title = f"{model}: accuracy and perplexity against units removed"
        return {
            CURVE_PNG: image.getvalue(),
            CURVE_SVG: svg(figure, title, "One point for each prefix of the plan; dotted: chance."),
        }


def ratio_figure(points: Sequence[CurvePoint], model: str, kinds: Mapping[Kind, int]) -> Figure | None:
    """Accuracy above, with its standard error and what guessing reaches, and perplexity on a logarithmic axis below,
    where they were measured.
    """
    tasks = [result.task for result in points[0].tasks if result.within is None]
    texts = list(points[0].perplexity)
    panels = [name for name, found in (("tasks", tasks), ("texts", texts)) if found]
    if not panels:
        return None
    figure = Figure(figsize=(6.4, 0.6 + 2.9 * len(panels)), layout="constrained")
    figure.suptitle(model, fontsize=10)
    axes: list[Axes] = list(figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0])
    places = [point.removed or 0 for point in points]
    for panel, own in zip(panels, axes, strict=True):
        own.grid(axis="y")
        if panel == "tasks":
            _draw_tasks(own, places, points, tasks)
        else:
            _draw_texts(own, places, points, texts)
        own.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[-1].set_xlabel(f"units removed, of {points[0].blocks} blocks")
    if len(kinds) == 1:
        [(kind, there)] = kinds.items()  # a model that was cut before has fewer attentions than blocks
        axes[-1].set_xlabel(f"{KIND_NAMES[kind]}s removed, of {there}")
    return figure


def _draw_tasks(axes: Axes, places: Sequence[int], points: Sequence[CurvePoint], tasks: Sequence[str]) -> None:
    guessing: dict[float, list[str]] = {}  # what it reaches, and the colours of such tasks
    for number, task in enumerate(tasks):
        values, errors = [], []
        for point in points:
            found = next((result.metrics[0] for result in point.tasks if result.task == task), None)
            values.append(math.nan if found is None else found.value)
            errors.append(0.0 if found is None or found.error is None else found.error)
        style: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "marker": _MARKERS[number % len(_MARKERS)]}
        axes.errorbar(
            places, values, yerr=errors, label=task, markersize=4, linewidth=1.3, capsize=2, elinewidth=0.7, **style
        )
        if (chance := next(result.chance for result in points[0].tasks if result.task == task)) is not None:
            guessing.setdefault(round(chance, 4), []).append(style["color"])
    for chance, colours in guessing.items():
        axes.axhline(chance, color=colours[0] if len(colours) == 1 else _SHARED, linestyle=":", linewidth=1.1, zorder=1)
    if guessing:
        axes.plot([], [], ":", color=_SHARED, linewidth=1.1, label="chance")
    axes.set_ylabel("accuracy, or the task's own score")


def _draw_texts(axes: Axes, places: Sequence[int], points: Sequence[CurvePoint], texts: Sequence[str]) -> None:
    for number, text in enumerate(texts):
        values = [point.perplexity[text].perplexity for point in points]
        finite = [value if math.isfinite(value) else math.nan for value in values]
        style: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "marker": _MARKERS[number % len(_MARKERS)]}
        axes.plot(places, finite, label=text, markersize=4, linewidth=1.3, **style)
    perplexity_axis(axes)
    axes.set_ylabel("perplexity (log scale)")
