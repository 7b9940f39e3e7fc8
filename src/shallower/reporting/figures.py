"""The page's figures, each an inline SVG string. The same data give the same bytes."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from shallower.plan import PruningPlan
from shallower.reporting.data import RecoveryStage
from shallower.reporting.style import (
    BLUE,
    EDGE,
    GREEN,
    GREY,
    INK,
    REMOVED,
    WIDTH,
    round_values,
    styled,
    svg,
    tick_labels,
)
from shallower.reporting.wording import KIND_NAMES, score
from shallower.scores import Score, Scores
from shallower.units import KINDS, Kind, Unit, listed, runs, sublayers_of

_COLOURS: dict[Kind, str] = {"block": GREY, "attn": BLUE, "mlp": GREEN}
_MARKERS: dict[Kind, str] = {"block": "o", "attn": "s", "mlp": "D"}

_LABELLED_BLOCKS = 40  # up to so many blocks each has its number on the axis
_LABELLED_STARTS = 34  # the same, on the narrower axis of the heatmap
_LABELLED_REMOVALS = 64
_BRIGHTEST = 0.85
_LOG_RANGE = 20  # values that differ by more than this factor get a logarithmic axis


def influence_bars(scores: Scores, removed: Collection[Unit]) -> str | None:
    """A bar for each unit at its block, with the standard error where there is one; what was removed stands out. On a
    logarithmic axis, where a bar's length would depend on where the axis begins, a dot.

    None when no unit has a finite score.
    """
    rows = [(row.of, row) for row in scores.rows if isinstance(row.of, Unit) and math.isfinite(row.value)]
    if not rows:
        return None
    blocks = scores.model.blocks
    kinds = [kind for kind in KINDS if any(unit.kind == kind for unit, _ in rows)]
    whole = {unit.index for unit in removed if unit.kind == "block"}
    gone = {unit for unit, _ in rows if unit in removed or unit.index in whole}
    dots = _wide([row.value for _, row in rows])
    with styled():
        figure = Figure(figsize=(WIDTH, 2.9 if len(kinds) == 1 else 1.0 + 1.9 * len(kinds)), layout="constrained")
        panels: list[Axes] = list(figure.subplots(len(kinds), 1, sharex=True, sharey=True, squeeze=False)[:, 0])
        for axes, kind in zip(panels, kinds, strict=True):
            _values(axes, {unit: row for unit, row in rows if unit.kind == kind}, gone, kind, blocks, dots=dots)
            axes.set_ylabel(f"{scores.metric} of {kind}")
        for axes in panels:  # they share the scale, so it must see all values
            _value_scale(axes, [row.value for _, row in rows])
        _block_axis(panels[-1], blocks, "block (0-based)", _LABELLED_BLOCKS)
        labels = {kind: f"{KIND_NAMES[kind]}, kept" for kind in kinds}
        handles: list[Patch | Line2D] = [
            _dot(_COLOURS[kind], label) if dots else Patch(color=_COLOURS[kind], label=label)
            for kind, label in labels.items()
        ]
        if gone:
            handles.append(Patch(facecolor=REMOVED, edgecolor="#F7D7C2", linewidth=2.5, label="removed"))
        _legend(panels[0], handles)
        told = listed(gone, ", ") or "none of these"
        return svg(
            figure,
            importance(scores),
            f"{'Dots' if dots else 'Bar chart'} over blocks 0 to {blocks - 1}. Removed: {told}.",
        )


def importance(scores: Scores) -> str:
    """Title of `influence_bars`."""
    kinds = {row.of.kind for row in scores.rows if isinstance(row.of, Unit)}
    return f"Importance of each {KIND_NAMES[kinds.pop()] if len(kinds) == 1 else 'unit'} by {scores.metric}"


def span_heatmap(spans: Scores, removed: Collection[Unit]) -> str | None:
    """Distance of every span of whole blocks: start block on x, length on y, each length rescaled to 0…1, its least one
    marked.

    A length's colours end at its _BRIGHTEST quantile: the few spans that hold the first or last block are so far out
    that they would leave one colour for all others. What was removed is outlined if it is one run of blocks. None when
    no span has a finite score.
    """
    blocks = spans.model.blocks
    distance = np.full((blocks, blocks), np.nan)
    for span, value in spans.spans.items():
        if span.start % 1 == span.stop % 1 == 0:
            distance[int(span.stop - span.start) - 1, int(span.start)] = value if math.isfinite(value) else np.nan
    lengths = [row for row in range(blocks) if np.isfinite(distance[row]).any()]
    if not lengths:
        return None
    starts = [int(np.nanargmin(distance[row])) for row in lengths]
    least = [float(distance[row, start]) for row, start in zip(lengths, starts, strict=True)]
    rescaled = np.full_like(distance, np.nan)
    for row, low in zip(lengths, least, strict=True):
        spread = float(np.nanquantile(distance[row], _BRIGHTEST)) - low
        rescaled[row] = (distance[row] - low) / spread if spread > 0 else distance[row] * 0
    highest = lengths[-1] + 1
    gone = sublayers_of(removed)
    whole = [block for block in (Unit(index, "block") for index in range(blocks)) if gone.issuperset(block.sublayers)]
    chosen = runs(whole, "block") if sublayers_of(whole) == gone else ()
    with styled():
        figure = Figure(figsize=(WIDTH, 4.3), layout="constrained")
        plane, profile = figure.subplots(1, 2, sharey=True, width_ratios=(3.6, 1))
        image = plane.imshow(
            rescaled[:highest],
            origin="lower",
            aspect="auto",
            interpolation="none",  # the cells themselves go into the file, not a picture of them
            extent=(-0.5, blocks - 0.5, 0.5, highest + 0.5),
            cmap="viridis",
            vmin=0,
            vmax=1,
        )
        dots = max(5.0, min(20.0, 800 / blocks))
        plane.scatter(starts, [row + 1 for row in lengths], s=dots, color="white", edgecolor="black", linewidth=0.6)
        plane.set_ylabel("span length (blocks)")
        plane.yaxis.set_major_locator(MaxNLocator(10, integer=True))
        _block_axis(plane, blocks, "first block of the span (0-based)", _LABELLED_STARTS)
        bar = figure.colorbar(image, ax=plane, location="top", shrink=0.5, aspect=34, pad=0.02)
        ends = "least of its length", "rescaled for each length", f"{100 * _BRIGHTEST:.0f} % quantile or more"
        bar.set_ticks([0, 0.5, 1], labels=ends)
        bar.ax.tick_params(length=0)
        bar.outline.set_visible(False)
        profile.plot(least, [row + 1 for row in lengths], color=INK, linewidth=1.1, marker="o", markersize=2.2)
        profile.set_xlabel(f"least {spans.metric} score")
        profile.grid(axis="both")
        profile.xaxis.set_major_locator(MaxNLocator(4))
        profile.set_xlim(left=min(0.0, *least))
        handles: list[Line2D | Patch] = [_dot("white", "least of its length", edge="black")]
        if len(chosen) == 1:
            start, length = chosen[0].start, len(chosen[0])
            plane.add_patch(Rectangle((start - 0.5, length - 0.5), 1, 1, fill=False, edgecolor="white", linewidth=3.4))
            plane.add_patch(Rectangle((start - 0.5, length - 0.5), 1, 1, fill=False, edgecolor=REMOVED, linewidth=1.8))
            profile.axhline(length, color=REMOVED, linewidth=1.2)
            label = f"removed: {listed(removed)}"
            handles.append(Patch(fill=False, edgecolor=REMOVED, linewidth=1.8, label=label))
        plane.legend(handles=handles, loc="upper right")  # the triangle above the diagonal is empty
        told = f"Least of length {lengths[0] + 1} starts at block {starts[0]}; of length {highest}, at {starts[-1]}."
        return svg(figure, f"Distance ({spans.metric}) between the ends of every span of blocks", told)


def loss_curve(plan: PruningPlan) -> str | None:
    """The objective after each removal, in removal order, from the dense model on.

    The loss of `nll` is also read as perplexity on the right. The axes name the repair behind which candidates were
    judged. None when the objective was not measured.
    """
    steps: list[tuple[int, Unit | None, float]] = [] if plan.dense is None else [(0, None, plan.dense)]
    steps += [(place, unit, loss) for place, (unit, loss) in enumerate(plan.order, start=1) if loss is not None]
    steps = [step for step in steps if math.isfinite(step[2])]
    if not any(place for place, _, _ in steps):
        return None
    made = plan.made_by
    total = len(plan.order)
    with styled():
        figure, axes = _canvas(3.1)
        places, losses = [place for place, _, _ in steps], [loss for _, _, loss in steps]
        axes.plot(places, losses, color=EDGE, linewidth=1.3, zorder=2)
        kinds = [kind for kind in KINDS if any(unit.kind == kind for unit, _ in plan.order)]
        size = 30 if total <= 30 else 14
        for kind in kinds:
            mine = [(place, loss) for place, unit, loss in steps if unit is not None and unit.kind == kind]
            xs, ys = [place for place, _ in mine], [loss for _, loss in mine]
            axes.scatter(xs, ys, s=size, color=_COLOURS[kind], marker=_MARKERS[kind], zorder=3)
        if plan.dense is not None and math.isfinite(plan.dense):
            axes.scatter([0], [plan.dense], s=size * 1.2, color="white", edgecolor=INK, linewidth=1.2, zorder=3)
        for (place, _, loss), align in ((steps[0], "left"), (steps[-1], "right")):
            axes.annotate(
                score(loss),
                (place, loss),
                xytext=(-6 if align == "left" else 6, 7),
                textcoords="offset points",
                ha=align,
                fontweight="bold",
            )
        _removal_axis(axes, [str(unit) for unit, _ in plan.order])
        axes.margins(y=0.14)
        axes.grid(axis="y")
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.set_ylabel(f"{made.measure}, lower is better")
        if made.objective == "nll":
            axes.set_ylabel(f"{made.measure} (nats per token), lower is better")
            _perplexity_axis(axes, f"perplexity after {made.repair}" if made.repair else "perplexity")
        if kinds != ["block"]:
            _legend(axes, [_dot(_COLOURS[kind], KIND_NAMES[kind], marker=_MARKERS[kind]) for kind in kinds])
        told = f"From {score(losses[0])} at {places[0]} removals to {score(losses[-1])} at {places[-1]}."
        where = "part of the calibration text" if made.repair else "the calibration text"
        return svg(figure, f"{made.measure} on {where} after each removal", told)


def training_curve(stage: RecoveryStage) -> str | None:
    """Held-out perplexity, or where nothing was held out the loss, while a recovery trained. None for less than two
    measurements.
    """
    measure = "held_out" if any("held_out" in row for row in stage.curve) else "loss"
    rows = [row for row in stage.curve if math.isfinite(row.get(measure, math.nan))]
    if len(rows) < 2:
        return None
    with styled():
        figure, axes = _canvas(2.6)
        minutes, values = [row["minutes"] for row in rows], [row[measure] for row in rows]
        axes.plot(minutes, values, color=_COLOURS["block"], linewidth=1.3, marker="o", markersize=4)
        for row, value, align in ((rows[0], values[0], "left"), (rows[-1], values[-1], "right")):
            offset = (6 if align == "left" else -6, 7)
            place = (row["minutes"], value)
            axes.annotate(score(value), place, xytext=offset, textcoords="offset points", ha=align, fontweight="bold")
        axes.margins(y=0.16)
        axes.grid(axis="y")
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlabel("minutes of training")
        axes.set_ylabel("perplexity, lower is better" if measure == "held_out" else "loss, lower is better")
        told = f"From {score(values[0])} to {score(values[-1])} in {minutes[-1]:.1f} minutes."
        return svg(figure, f"While {stage.method} trained", told)


def _canvas(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _values(
    axes: Axes, rows: Mapping[Unit, Score], gone: Collection[Unit], kind: Kind, blocks: int, *, dots: bool
) -> None:
    for span in runs((unit for unit in rows if unit in gone), kind):
        # what is removed is low, so its bars alone would hardly be seen
        axes.axvspan(span.start - 0.5, span.stop - 0.5, color=REMOVED, alpha=0.16, linewidth=0)
    places, values = [unit.index for unit in rows], [row.value for row in rows.values()]
    colours = [REMOVED if unit in gone else _COLOURS[kind] for unit in rows]
    if dots:
        axes.scatter(places, values, s=max(8.0, min(26.0, 900 / blocks)), color=colours, zorder=3)
    else:
        axes.bar(places, values, 0.78, color=colours)
    measured = [(unit.index, row.value, row.error) for unit, row in rows.items() if row.error]
    axes.errorbar(
        [index for index, _, _ in measured],
        [value for _, value, _ in measured],
        yerr=[error for _, _, error in measured],
        fmt="none",
        ecolor="black",
        elinewidth=0.7,
        capsize=min(2.0, 70 / blocks),
        capthick=0.7,
    )


def _wide(values: Sequence[float]) -> bool:
    """Whether the small values could not be told apart on a linear axis."""
    sizes = sorted(abs(value) for value in values if value)
    return bool(sizes) and sizes[-1] >= _LOG_RANGE * sizes[len(sizes) // 2]


def _value_scale(axes: Axes, values: Sequence[float]) -> None:
    """Linear, unless they are too wide."""
    axes.grid(axis="y")
    if not _wide(values):
        axes.axhline(0, color=EDGE, linewidth=0.8)
        return
    sizes = sorted(abs(value) for value in values if value)
    if min(values) > 0:
        axes.set_yscale("log")
        axes.set_ylabel(f"{axes.get_ylabel()} (log scale)")
        axes.set_ylim(bottom=sizes[0] / 1.6)
    else:
        axes.set_yscale("symlog", linthresh=sizes[len(sizes) // 2], linscale=1.2)
        axes.set_ylabel(f"{axes.get_ylabel()} (log scale)")
        axes.axhline(0, color=EDGE, linewidth=0.8)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", "−")))


def _block_axis(axes: Axes, blocks: int, label: str, labelled: int) -> None:
    axes.set_xlim(-0.7, blocks - 0.3)
    axes.set_xticks(range(0, blocks, 1 if blocks <= labelled else 5))
    axes.set_xlabel(label)


def _removal_axis(axes: Axes, names: Sequence[str]) -> None:
    places = [0, *range(1, len(names) + 1, 1 + len(names) // _LABELLED_REMOVALS)]
    upright = len(names) > 10
    axes.set_xticks(places, labels=[("dense", *names)[place] for place in places])
    axes.tick_params(axis="x", labelrotation=90 if upright else 0, labelsize=7.5 if len(names) <= 40 else 6)
    axes.set_xlim(-0.5, len(names) + 0.5)
    axes.set_xlabel("removed, one after the other →")


def _perplexity_axis(axes: Axes, label: str) -> None:
    """Ticks at round perplexities on the right. Their places are logarithmic, so the automatic ones would crowd."""
    low, high = axes.get_ylim()
    right = axes.twinx()
    right.spines["right"].set_visible(True)
    right.set_ylim(low, high)
    ticks = round_values(*(math.exp(max(-300.0, min(loss, 300.0))) for loss in (low, high)))  # floats end at e^709
    right.set_yticks([math.log(tick) for tick in ticks], labels=tick_labels(ticks))
    right.set_ylabel(label)


def _dot(colour: str, label: str, *, marker: str = "o", edge: str | None = None) -> Line2D:
    return Line2D([], [], color=colour, marker=marker, markeredgecolor=edge or colour, linestyle="", label=label)


def _legend(axes: Axes, handles: Sequence[Patch | Line2D]) -> None:
    axes.legend(handles=list(handles), loc="lower right", bbox_to_anchor=(1, 1), ncols=len(handles), borderaxespad=0.2)
