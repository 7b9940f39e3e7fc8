"""Write docs/demo-spans.svg, the README's picture, from what `shallower demo` wrote.

python tools/make_demo_figure.py smollm2-shallower
"""

from __future__ import annotations

import sys
from pathlib import Path

from shallower.reporting.data import ReportData
from shallower.reporting.figures import span_heatmap

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "demo-spans.svg"
PAPER = '<rect width="100%" height="100%" fill="white"/>'  # the page's figures are transparent, and viewers may be dark


def picture(report: ReportData) -> str:
    """The page's heatmap of spans as a file of its own. Raises ValueError when the report has no spans."""
    drawn = span_heatmap(report.spans, report.plan.remove) if report.spans else None
    if drawn is None:
        raise ValueError(f"{report.folder} has no scores of spans; give a folder that `shallower demo` wrote")
    before, after = drawn.split("</desc>", 1)
    return f"{before}</desc>\n {PAPER}{after}\n"


if __name__ == "__main__":
    PICTURE.write_text(picture(ReportData.load(Path(sys.argv[1]) / "report.json")), encoding="utf-8")
