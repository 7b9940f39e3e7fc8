"""Evaluation text by specification: one long string, joined the way published perplexities join it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

from shallower.corpus.sources import file_kind, open_source, text_lines
from shallower.corpus.specification import Part, in_part, parse_specification
from shallower.corpus.supply import NOTHING, Supply
from shallower.errors import CorpusError
from shallower.evaluation.task_data import hub_unreachable
from shallower.registry import Option

NAMED: Mapping[str, str] = {
    "wikitext2": "hf:Salesforce/wikitext:wikitext-2-raw-v1:test",
    "c4": "hf:allenai/c4:en:validation",
    "ptb": "hf:ptb-text-only/ptb_text_only:penn_treebank:test#sentence",
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
    - `wikitext2`, `c4` and `ptb` are the Hub's copies, unless there is a file of that name.
    - Documents of anything else are joined with an empty line between them; of a Hub data set, and of what is held out,
      the first 4,000,000 characters. Of a mixture, those of all its sources, without regard to weights.

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
            lines = [line if line.strip() else "" for line in lines]
            return _not_blank("\n\n".join(lines), spec)
        return _not_blank("".join(lines), spec)
    texts: list[str] = []
    for term in parsed.terms:
        source = open_source(term.source, supply)
        limit = _MOST_CHARACTERS if source.streamed or part == "held-out" else math.inf
        keep_blank = source.streamed and "wikitext" in source.name.lower()
        size = 0
        for document in source.read():
            if (keep_blank or document.text.strip()) and in_part(document.whole or document.text, part):
                texts.append(document.text)
                size += len(document.text)
            if size > limit:
                break
    return _not_blank("\n\n".join(texts), spec)


def _not_blank(text: str, spec: str) -> str:
    if not text.strip():
        raise CorpusError(f"{spec} holds no text to evaluate on: choose another text or part.")
    return text
