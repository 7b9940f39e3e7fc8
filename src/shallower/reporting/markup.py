"""What every HTML page is made of: the frame, sections, figures and tables.

No scripts and nothing from elsewhere: a content policy in the page itself forbids both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from itertools import zip_longest

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def html_page(title: str, told: str, sections: Iterable[str], warning: str = "") -> str:
    """A page of sections (HTML) under a title and what it tells in one sentence (text)."""
    style = (files("shallower.reporting") / "page.css").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{escape(title)}</title>
<style>
{style}</style>
</head>
<body>
<header>
<p class="model">{escape(title)}</p>
<h1>{glued(told)}</h1>
{warning}</header>
<main>
{"".join(filter(None, sections))}</main>
</body>
</html>
"""


def html_section(name: str, title: str, body: str) -> str:
    """A section, or nothing when it has no body."""
    if not body:
        return ""
    heading = f'<h2 id="{name}-title">{title}</h2>'
    return f'<section id="{name}" aria-labelledby="{name}-title">\n{heading}\n{body}</section>\n'


def html_figure(svg: str | None, title: str, told: str, table: str = "") -> str:
    """A figure with its caption and its numbers, or nothing when there was nothing to draw."""
    if svg is None:
        return ""
    numbers = f"<details><summary>The numbers</summary>\n{table}</details>\n" if table else ""
    return (
        f'<figure>\n<h3>{escape(title)}</h3>\n<div class="plot">\n{svg}\n</div>\n'
        f"<figcaption>{glued(told)}</figcaption>\n{numbers}</figure>\n"
    )


def html_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], caption: str, *, style: str = "numbers", words: int = 1
) -> str:
    """A table whose first column names the rows. The caption is for screen readers: a heading stands above it.

    words: how many columns from the left hold words, which are aligned to the left among numbers.
    """
    aligned = [' class="word"'] * words
    lines = [f'<div class="scroll"><table class="{style}">', f'<caption class="unseen">{escape(caption)}</caption>']
    if head:
        named = zip_longest(head, aligned[: len(head)], fillvalue="")
        cells = "".join(f'<th scope="col"{kind}>{escape(cell)}</th>' if cell else "<td></td>" for cell, kind in named)
        lines.append(f"<thead><tr>{cells}</tr></thead>")
    lines.append("<tbody>")
    for first, *others in rows:
        told = zip_longest(others, aligned[1 : len(others) + 1], fillvalue="")
        cells = "".join(f"<td{kind}>{glued(cell)}</td>" for cell, kind in told)
        lines.append(f'<tr><th scope="row">{glued(first)}</th>{cells}</tr>')
    return "\n".join(lines) + "\n</tbody>\n</table></div>\n"


def glued(text: str, *, code: bool = False) -> str:
    """Escaped; a percent sign stays on the line of its number. code: what stands between backticks is code."""
    escaped = escape(text).replace(" %", "\N{NO-BREAK SPACE}%")
    return re.sub("`([^`]+)`", r"<code>\1</code>", escaped) if code else escaped
