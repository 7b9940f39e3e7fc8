"""Evaluation text by specification: one long string, joined the way published perplexities join it."""

from __future__ import annotations

import heapq
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from shallower import progress
from shallower.corpus.pieces import PIECE, pieces
from shallower.corpus.sources import file_kind, open_source, text_lines
from shallower.corpus.specification import Part, in_part, parse_specification
from shallower.corpus.supply import NOTHING, Supply
from shallower.errors import CorpusError, UnknownName
from shallower.evaluation.task_data import hub_unreachable
from shallower.registry import Option

NAMED: Mapping[str, str] = {
    "wikitext2": "hf:Salesforce/wikitext:wikitext-2-raw-v1:test",
    "c4": "hf:allenai/c4:en:validation",
}
"""Texts that papers report perplexity on, and the data set of the Hub that each is."""

_PART = Option("part", Part, "all")
_MOST_CHARACTERS = 4_000_000


def read_evaluation_text(spec: str, supply: Supply = NOTHING) -> str:
    """Read the text of a specification; `?part=held-out` takes the documents that `part=train` leaves out of
    calibration.

    - A `.txt` file, compressed or not, is read as it is.
    - WikiText (a `.txt` file or Hub data set with `wikitext` in its name) takes the form of published results: a row a
      line, blank rows emptied, the others keeping their line end, joined with two line ends.
    - `wikitext2` and `c4` are the Hub's copies, unless there is a file of that name.
    - Documents of anything else are joined with an empty line between them; of a Hub data set, and of what is held out,
      the first 4,000,000 characters of each source.
    - The sources of a mixture take turns, in pieces of at most 8,000 characters, so that its beginning is mixed by the
      weights, too; where one has ended the others go on.

    supply: what the sources `demo:` need.

    Raises CorpusError when the text is missing, empty, or not text.
    """
    parsed = parse_specification(spec, ("part",))
    if parsed.source in NAMED and not os.path.exists(parsed.source):
        unreachable = hub_unreachable()
        if unreachable is not None:
            raise CorpusError(
                f"the text {parsed.source} is {NAMED[parsed.source]}, and the Hub cannot be reached ({unreachable}): "
                "connect, or name a file that holds it, such as wikitext2.test.txt or c4.jsonl."
            )
        parsed = parse_specification(spec.replace(parsed.source, NAMED[parsed.source], 1), ("part",))
    part: Part = _PART.parse(parsed.options.get("part", "all"))
    path = Path(os.path.expanduser(parsed.source))
    if part == "all" and file_kind(path) == ".txt" and os.path.isfile(path):
        lines = [line for _, line in text_lines(path)]
        if "wikitext" in path.name.lower():
            progress.note(f"{path.name} is read as WikiText, for its name: rows are joined as for published results.")
            lines = [line if line.strip() else "" for line in lines]
            return _not_blank("\n\n".join(lines), spec)
        return _not_blank("".join(lines), spec)
    read = [(term.weight, _documents(term.source, supply, part)) for term in parsed.terms]
    return _not_blank("\n\n".join(read[0][1] if len(read) == 1 else _in_turns(read)), spec)


def _documents(text: str, supply: Supply, part: Part) -> Iterator[str]:
    try:
        source = open_source(text, supply)
    except (CorpusError, UnknownName) as error:
        if not text.isalnum() or text in NAMED:  # no misspelt name, but a path, a source of another kind, or mixed
            raise
        raise CorpusError(f"{error} Text to evaluate on is also {', '.join(NAMED)}.") from None
    limit = _MOST_CHARACTERS if source.streamed or part == "held-out" else math.inf
    keep_blank = source.streamed and "wikitext" in source.name.lower()
    size = 0
    for document in source.read():
        if (keep_blank or document.text.strip()) and in_part(document.whole or document.text, part):
            yield document.text
            size += len(document.text)
        if size > limit:
            return


def _in_turns(sources: Sequence[tuple[float, Iterator[str]]]) -> Iterator[str]:
    """Pieces of the documents of all sources: the next one is of the source that has had the least for its weight."""
    queues = [(weight, _pieces(documents)) for weight, documents in sources]
    due = [(0.0, place) for place in range(len(queues))]
    while due:
        had, place = heapq.heappop(due)
        weight, texts = queues[place]
        for text in islice(texts, 1):
            yield text
            heapq.heappush(due, (had + len(text) / weight, place))


def _pieces(documents: Iterable[str]) -> Iterator[str]:
    for document in documents:
        yield from pieces(document.splitlines(keepends=True), PIECE)


def _not_blank(text: str, spec: str) -> str:
    if not text.strip():
        raise CorpusError(f"{spec} holds no text to evaluate on: choose another text or part.")
    return text
