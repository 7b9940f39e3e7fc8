"""Long texts, cut into pieces where they have an end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

PIECE = 8_000
"""Characters of a piece, where nothing else says how many."""


def pieces(lines: Iterable[str], limit: int) -> Iterator[str]:
    """Cut a text, given as lines with their ends, into pieces of at most `limit` characters.

    Cuts at the last blank line of the piece's second half, else at a line's end, else anywhere. The pieces joined are
    the text.
    """
    held: list[str] = []
    size = paragraph_end = paragraph_size = 0
    for line in (part for whole in lines for part in _hard_cut(whole, limit)):
        if size + len(line) > limit:
            end = paragraph_end if paragraph_size > limit // 2 else len(held)
            yield "".join(held[:end])
            held = held[end:]
            size = sum(map(len, held))
            paragraph_end = paragraph_size = 0
            if size + len(line) > limit:
                yield "".join(held)
                held, size = [], 0
        held.append(line)
        size += len(line)
        if not line.strip():
            paragraph_end, paragraph_size = len(held), size
    if held:
        yield "".join(held)


def _hard_cut(line: str, limit: int) -> Iterator[str]:
    if len(line) <= limit:
        yield line
        return
    for start in range(0, len(line), limit):
        yield line[start : start + limit]
