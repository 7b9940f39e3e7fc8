"""Evaluation text by specification: one long string, joined the way published perplexities join it."""

from __future__ import annotations

from pathlib import Path

from shallower.corpus.sources import open_source, text_lines
from shallower.corpus.specification import Part, in_part, parse_specification
from shallower.corpus.supply import NOTHING, Supply
from shallower.errors import CorpusError
from shallower.registry import Option

_PART = Option("part", Part, "all")
_STREAMED_CHARACTERS = 4_000_000


def read_evaluation_text(spec: str, supply: Supply = NOTHING) -> str:
    """Read the text of a specification; `?part=held-out` takes the documents that `part=train` leaves out of
    calibration.

    - A `.txt` file is read as it is.
    - WikiText (a `.txt` file or Hub data set with `wikitext` in its name) takes the form of published results: a row a
      line, blank rows emptied, the others keeping their line end, joined with two line ends.
    - Documents of anything else are joined with an empty line between them; of a Hub data set the first 4,000,000
      characters. Of a mixture, those of all its sources, without regard to weights.

    supply: what the sources `demo:` need.

    Raises CorpusError when the text is missing, empty, or not text.
    """
    parsed = parse_specification(spec, ("part",))
    part: Part = _PART.parse(parsed.options.get("part", "all"))
    path = Path(parsed.source).expanduser()
    if path.suffix == ".txt" and path.is_file() and part == "all":
        lines = [line for _, line in text_lines(path)]
        if "wikitext" in path.name.lower():
            lines = [line if line.strip() else "" for line in lines]
            return _not_blank("\n\n".join(lines), spec)
        return _not_blank("".join(lines), spec)
    texts: list[str] = []
    for term in parsed.terms:
        source = open_source(term.source, supply)
        keep_blank = source.streamed and "wikitext" in source.name.lower()
        size = 0
        for document in source.read():
            if (keep_blank or document.text.strip()) and in_part(document.text, part):
                texts.append(document.text)
                size += len(document.text)
            if source.streamed and size > _STREAMED_CHARACTERS:
                break
    return _not_blank("\n\n".join(texts), spec)


def _not_blank(text: str, spec: str) -> str:
    if not text.strip():
        raise CorpusError(f"{spec} holds no text to evaluate on: choose another text or part.")
    return text
