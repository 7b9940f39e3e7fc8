"""What all figures share: colours, the settings of matplotlib, ticks, and the element that a figure becomes.

Object-oriented matplotlib only; the settings of the caller's matplotlib neither show here nor are changed.
"""

from __future__ import annotations

import hashlib
import html
import io
import math
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

BLUE, VERMILION, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"  # Okabe-Ito
INK, GREY, EDGE, PALE = "#334155", "#64748B", "#94A3B8", "#E2E8F0"  # greys, from dark to pale
REMOVED = VERMILION
COLOURS = (BLUE, VERMILION, GREEN, PINK, "#E69F00", "#56B4E9", GREY, "#B59B00")
"""Of lines, bars and dots that lie side by side, in this order."""

WIDTH = 9.2  # inches, at 72 units each; the page scales it

_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small, selectable, in the page's font
    "svg.hashsalt": "shallower",
    "text.parse_math": False,  # names of methods may hold a dollar sign
    "axes.unicode_minus": True,
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.labelsize": 8.5,
    "axes.edgecolor": EDGE,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.linewidth": 0.8,
    "grid.color": PALE,
    "grid.linewidth": 0.7,
    "xtick.color": EDGE,
    "ytick.color": EDGE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "text.color": INK,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
}


@contextmanager
def styled() -> Iterator[None]:
    """Inside the `with`, matplotlib draws in this project's style, whatever the caller's settings."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield


def perplexity_axis(axes: Axes) -> None:
    """A logarithmic vertical axis with ticks at round values, over what was drawn."""
    axes.set_yscale("log")
    ticks = round_values(*axes.get_ylim())
    axes.set_yticks(ticks, labels=tick_labels(ticks))
    axes.yaxis.set_minor_locator(NullLocator())


def round_values(low: float, high: float) -> list[float]:
    """Three to eight round numbers between two positive ones."""
    if high / low < 4:
        return [float(tick) for tick in MaxNLocator(6).tick_values(low, high) if low <= tick <= high and tick > 0]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        ticks = [step * 10.0**decade for decade in decades for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= 8:
            return ticks
    return ticks[:: 1 + len(ticks) // 8]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Perplexities in digits, from a million on in powers of ten."""
    return [f"{tick:,g}" if tick < 1e6 else f"{tick:.0e}" for tick in ticks]


def svg(figure: Figure, title: str, description: str) -> str:
    """The figure as an element to stand inside HTML: titled, scalable, without identifiers that could clash."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"\s*<style type=\"text/css\">.*?</style>", "", text, flags=re.DOTALL)  # would style the page
    referred = set(re.findall(r"(?:url\(|href=\")#([^\")]+)", text))
    own = "f" + hashlib.sha256((title + text).encode()).hexdigest()[:8]
    text = re.sub(r" id=\"([^\"]*)\"", _renamed(own, referred), text)
    text = re.sub(r"(url\(|href=\")#", rf"\1#{own}-", text)
    opening, rest = text.split(">", 1)
    opening = re.sub(r" (width|height)=\"[^\"]*\"", "", opening)
    return (
        f'{opening} role="img" aria-labelledby="{own}-title {own}-desc" stroke-linejoin="round" '
        f'stroke-linecap="butt">\n <title id="{own}-title">{html.escape(title)}</title>\n'
        f' <desc id="{own}-desc">{html.escape(description)}</desc>{rest}'
    )


def _renamed(own: str, referred: Collection[str]) -> Callable[[re.Match[str]], str]:
    return lambda match: f' id="{own}-{match[1]}"' if match[1] in referred else ""
