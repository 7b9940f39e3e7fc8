"""What cleaning a text found: its tables, two figures and a page; and the tables of a calibration set."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from shallower.corpus import CalibrationSet, Cleaning, Cluster, Counts, SharedRows
from shallower.corpus.clean import Member
from shallower.reporting.markup import glued, html_figure, html_page, html_section, html_table
from shallower.reporting.style import BLUE, INK, PINK, VERMILION, WIDTH, styled, svg
from shallower.reporting.wording import percent, plural

if TYPE_CHECKING:
    from rich.table import Table

_KEPT, _DUPLICATE, _POOR = BLUE, VERMILION, PINK
_BINS = 20
SHOWN_CLUSTERS = 8
SHOWN_MEMBERS = 3
_SHOWN_CHARACTERS = 280


@dataclass(frozen=True)
class CleanReport:
    """What the page shows. texts: beginnings of documents of the largest clusters, by place (`shown_places`)."""

    cleaning: Cleaning
    overlaps: tuple[SharedRows, ...]
    texts: Mapping[int, str]


def shown_places(cleaning: Cleaning) -> frozenset[int]:
    """Documents whose texts the page quotes: the first members of the largest clusters, and those that stay."""
    return frozenset(
        member.document.place for cluster in cleaning.clusters[:SHOWN_CLUSTERS] for member in _shown_members(cluster)
    )


def summary(counts: Counts) -> list[tuple[str, str]]:
    """What was read, what leaves and why, for a table of two columns."""
    total = counts.documents
    rows = [("Documents read", f"{total:,}")]
    if counts.blank:
        rows.append(("Without text", _of(counts.blank, total)))
    if counts.threshold is not None:
        near = counts.duplicates - counts.exact_duplicates
        clusters = sum(times for size, times in counts.cluster_sizes.items() if size > 1)
        rows.append(("Copies (same words)", _of(counts.exact_duplicates, total)))
        rows.append((f"Near-duplicates (Jaccard from {counts.threshold:g})", _of(near, total)))
        rows.append(("Clusters of two and more", f"{clusters:,}"))
    if counts.min_quality:
        rows.append((f"Quality below {counts.min_quality:g}, by {counts.scorer}", _of(counts.low_quality, total)))
    return [*rows, ("Documents kept", _of(counts.kept, total))]


def overlap_rows(overlaps: Sequence[SharedRows]) -> list[tuple[str, ...]]:
    """A line for each evaluation set: name, rows, those that are long enough, those found, documents."""
    return [
        (shared.name, f"{shared.rows:,}", f"{shared.long_enough:,}", f"{shared.shared:,}", f"{shared.documents:,}")
        for shared in overlaps
    ]


OVERLAP_HEAD = ("Evaluation set", "Rows", "Long enough", "In the text", "In documents")


def headline(cleaning: Cleaning) -> str:
    """What stays of the text, in one sentence."""
    total = len(cleaning.documents) + cleaning.blank
    reasons = []
    if cleaning.threshold is not None:
        reasons.append(f"{plural(len(cleaning.duplicates), 'document')} that say what another says")
    if cleaning.min_quality:
        reasons.append(f"{len(cleaning.poor):,} of low quality")
    left = f", without {' and '.join(reasons)}" if reasons else ""
    return f"{len(cleaning.kept):,} of {total:,} documents of {cleaning.source} stay{left}."


def render(report: CleanReport) -> str:
    """The page as a string; texts and names are escaped."""
    cleaning = report.cleaning
    figures = html_figure(
        cluster_sizes(cleaning),
        "Cluster sizes",
        "How many clusters have how many documents that say the same; both axes are logarithmic. Size 1: documents "
        "that are like no other.",
        html_table(
            ("Size", "Clusters", "Documents"),
            [(f"{size:,}", f"{times:,}", f"{size * times:,}") for size, times in cleaning.sizes.items() if times],
            "Cluster sizes",
        ),
    )
    figures += html_figure(
        quality_bars(cleaning),
        f"Quality by {cleaning.scorer}",
        "0 is worst, 1 best; the number of documents is on a "
        "logarithmic axis."
        + (f" The line is where documents leave: {cleaning.min_quality:g}." if cleaning.min_quality else ""),
    )
    sections = (
        html_section("summary", "What stays", html_table((), summary(cleaning.counts), "What stays", style="facts")),
        html_section("figures", "Figures", figures),
        html_section("clusters", "The largest clusters", _examples(report)),
        html_section("overlap", "Overlap with evaluation sets", _overlaps(report.overlaps)),
    )
    return html_page(f"{cleaning.source}, cleaned", headline(cleaning), filter(None, sections))


def cluster_sizes(cleaning: Cleaning) -> str | None:
    """Number of clusters by size on two logarithmic axes, as an inline SVG; None when no duplicates were looked for."""
    figure = _cluster_figure(cleaning)
    if figure is None:
        return None
    told = ", ".join(f"{times} of size {size}" for size, times in list(cleaning.sizes.items())[:8])
    with styled():
        return svg(figure, "Cluster sizes", f"Clusters by size: {told}.")


def cluster_png(cleaning: Cleaning) -> bytes | None:
    """The same as a picture, to be a file of its own."""
    figure = _cluster_figure(cleaning)
    if figure is None:
        return None
    buffer = io.BytesIO()
    with styled():
        figure.suptitle(f"{cleaning.source}: documents that say the same", x=0.01, ha="left", fontsize=9.5)
        figure.savefig(buffer, format="png", dpi=144, metadata={"Software": None})
    return buffer.getvalue()


def _cluster_figure(cleaning: Cleaning) -> Figure | None:
    sizes = {size: times for size, times in cleaning.sizes.items() if times}
    if cleaning.threshold is None or not sizes:
        return None
    with styled():
        figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
        axes: Axes = figure.subplots()
        axes.vlines(list(sizes), 0.5, list(sizes.values()), color=_KEPT, linewidth=1, alpha=0.35)
        axes.scatter(list(sizes), list(sizes.values()), s=26, color=_KEPT, zorder=3)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.6)
        limit = max(10, max(sizes)) * 1.25
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
            axis.set_minor_formatter(NullFormatter())
        axes.set_xticks([tick for tick in (1, 2, 3, 5, *(10**power for power in range(1, 10))) if tick <= limit])
        axes.set_xlim(0.85, limit)
        axes.grid(axis="y")
        axes.set_xlabel("documents in the cluster")
        axes.set_ylabel("clusters")
        return figure


def quality_bars(cleaning: Cleaning) -> str | None:
    """Number of documents by quality: those that stay, those that leave as duplicates, those that leave for it."""
    if not cleaning.documents:
        return None
    groups = (
        ("kept", _KEPT, cleaning.kept),
        ("duplicates", _DUPLICATE, cleaning.duplicates),
        ("low quality", _POOR, cleaning.poor),
    )
    counts = {name: [0] * _BINS for name, _, _ in groups}
    for judged in cleaning.documents:
        name = next(name for name, _, places in groups if judged.place in places)
        counts[name][min(_BINS - 1, math.floor(judged.quality * _BINS))] += 1
    with styled():
        figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
        axes: Axes = figure.subplots()
        shown = [(name, colour) for name, colour, _ in groups if any(counts[name])]
        width = 0.9 / _BINS / len(shown)
        for number, (name, colour) in enumerate(shown):
            left = [(place + 0.05) / _BINS + number * width for place in range(_BINS)]
            axes.bar(left, counts[name], width, align="edge", color=colour, label=name)
        if cleaning.min_quality:
            axes.axvline(cleaning.min_quality, color=INK, linewidth=1, linestyle="--")
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.6)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(0, 1)
        axes.grid(axis="y")
        axes.set_xlabel(f"quality by {cleaning.scorer}")
        axes.set_ylabel("documents")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0)
        return svg(figure, f"Quality by {cleaning.scorer}", "Bar chart of documents by quality from 0 to 1.")


def source_table(text: CalibrationSet) -> Table:
    """Where the tokens of a set come from, for the terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("Source", overflow="fold")
    for name in ("Share", "Tokens", "Read", "Used", "Copies", "Near", "Poor"):
        table.add_column(name, justify="right")
    for record in text.sources:
        numbers = (record.tokens, record.read, record.documents)
        left_out = (record.exact_duplicates, record.near_duplicates, record.low_quality)
        share = "–" if record.weight is None else f"{record.weight:.1%}"
        table.add_row(record.name, share, *(_count(value) for value in (*numbers, *left_out)))
    return table


def clean_table(rows: Sequence[Sequence[str]], head: Sequence[str] = ()) -> Table:
    """Rows whose first column is a name and whose others are numbers, for the terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_header=bool(head))
    for place in range(len(rows[0])):
        table.add_column(head[place] if head else "", justify="right" if place else "left")
    for row in rows:
        table.add_row(*row)
    return table


def clusters_json(cleaning: Cleaning) -> list[dict[str, Any]]:
    """Every cluster of two and more with its members, for a file."""
    ids = {member.document.place: member.document.id for cluster in cleaning.clusters for member in cluster.members}
    return [
        {
            "size": len(cluster.members),
            "kept": None if (best := _stays(cleaning, cluster)) is None else best.document.id,
            "members": [
                {
                    "id": member.document.id,
                    "place": member.document.place,
                    "quality": round(member.document.quality, 4),
                    "jaccard": round(member.alike, 4),
                    "to": None if member.to is None else ids[member.to],
                    "exact": member.exact,
                    "words": member.document.signals.words,
                }
                for member in cluster.members
            ],
        }
        for cluster in cleaning.clusters
    ]


def _stays(cleaning: Cleaning, cluster: Cluster) -> Member | None:
    """The member that the cleaned text holds; None where all have too low a quality."""
    best = next(member for member in cluster.members if member.document.place == cluster.kept)
    return best if cluster.kept in cleaning.kept else None


def _shown_members(cluster: Cluster) -> list[Any]:
    kept = [member for member in cluster.members if member.document.place == cluster.kept]
    return (kept + [member for member in cluster.members if member not in kept])[:SHOWN_MEMBERS]


def _examples(report: CleanReport) -> str:
    parts = []
    for cluster in report.cleaning.clusters[:SHOWN_CLUSTERS]:
        parts.append(f"<h3>{plural(len(cluster.members), 'document')}</h3>\n")
        shown = _shown_members(cluster)
        for member in shown:
            document, how = member.document, _how(report.cleaning, cluster, member)
            told = f"{document.id}: {how}; quality {document.quality:.2f}, {plural(document.signals.words, 'word')}"
            text = report.texts.get(document.place, "")
            quoted = " ".join(text[:_SHOWN_CHARACTERS].split()) + ("…" if len(text) > _SHOWN_CHARACTERS else "")
            parts.append(f'<p class="quiet">{glued(told)}</p>\n<blockquote><p>{escape(quoted)}</p></blockquote>\n')
        if more := len(cluster.members) - len(shown):
            parts.append(f'<p class="quiet">And {more:,} more in clusters.json.</p>\n')
    return "".join(parts)


def _how(cleaning: Cleaning, cluster: Cluster, member: Member) -> str:
    """What becomes of a member, and what brought it into its cluster."""
    if member.document.place == cluster.kept:
        fate = "stays" if _stays(cleaning, cluster) else "leaves: low quality"
    else:
        fate = "leaves: a copy" if member.exact else "leaves"
    other = next((each.document.id for each in cluster.members if each.document.place == member.to), None)
    return fate if other is None or member.exact else f"{fate}; Jaccard {member.alike:.2f} to {other}"


def _overlaps(overlaps: Sequence[SharedRows]) -> str:
    if not overlaps:
        return ""
    told = (
        f"Rows of an evaluation set of which a run of {overlaps[0].n} words stands in a document that stays. Shorter "
        "rows cannot be found."
    )
    body = html_table(OVERLAP_HEAD, overlap_rows(overlaps), "Overlap with evaluation sets")
    body += f'<p class="quiet">{glued(told)}</p>\n'
    examples = [(shared.name, example) for shared in overlaps for example in shared.examples]
    return body + (html_table((), examples, "Shared runs", style="facts") if examples else "")


def _of(part: int, total: int) -> str:
    return f"{part:,} ({percent(part, total)})" if total else f"{part:,}"


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"
