"""Signs of a document's quality, and scorers that make one number of them; one scorer a file, file name = its name.

A scorer sees the text and its signals and returns a number from 0 (worst) to 1:

    @quality("long")
    def long(text: str, signals: Signals) -> float:
        \"\"\"1 from 500 words on.\"\"\"
        return min(1.0, signals.words / 500)
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from shallower.errors import UserError
from shallower.registry import quality

STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an and are as at be but by for from had has have he her his i in is it its not of on or said she that the "
        "their they this to was were which will with you",
    )
)
WORD = re.compile(r"[^\W_]+")
_SYMBOL = re.compile(r"#|…|\.\.\.|[{}<>|\\^~=*_\[\]]")
_RUN = 5  # words


@dataclass(frozen=True)
class Signals:
    """What can be counted in a text.

    words: runs of letters and digits. mean_word: their letters on average. symbols: `#`, `…`, brackets and signs of
    markup or code, for each word. alphabetic: the share of words that have a letter. duplicate_lines: the share of
    characters in lines (of more than a few letters) that stand there before. repeated_runs: the share of words inside
    runs of five words that stand there before. stop_words: the share of words that are the most frequent of English.
    """

    words: int
    mean_word: float
    symbols: float
    alphabetic: float
    duplicate_lines: float
    repeated_runs: float
    stop_words: float


def signals(text: str) -> Signals:
    """Count. The signals are those of Gopher's rules (arXiv:2112.11446, table A1), as numbers instead of verdicts."""
    words = WORD.findall(text.lower())
    count = max(1, len(words))
    return Signals(
        words=len(words),
        mean_word=sum(map(len, words)) / count,
        symbols=len(_SYMBOL.findall(text)) / count,
        alphabetic=sum(any(map(str.isalpha, word)) for word in words) / count,
        duplicate_lines=_duplicate_lines(text),
        repeated_runs=_repeated_runs(words),
        stop_words=sum(word in STOP_WORDS for word in words) / count,
    )


def scorer(name: str) -> Callable[[str, Signals], float]:
    """The registered scorer, checked: what it returns is from 0 to 1.

    Raises UnknownName for another name, and, when called, UserError for a number out of range.
    """
    method = quality.get(name)

    def judge(text: str, found: Signals) -> float:
        score = float(method.function(text, found))
        if not 0 <= score <= 1:
            raise UserError(f"quality {name!r} gave {score} to a text; a scorer returns a number from 0 to 1.")
        return score

    return judge


def _duplicate_lines(text: str) -> float:
    lines = [line for line in (line.strip() for line in text.split("\n")) if len(line) > _RUN]
    total = sum(map(len, lines))
    repeated = sum(len(line) * (times - 1) for line, times in Counter(lines).items())
    return repeated / total if total else 0.0


def _repeated_runs(words: list[str]) -> float:
    seen: set[tuple[str, ...]] = set()
    repeated = bytearray(len(words))
    for start, run in enumerate(zip(*(words[place:] for place in range(_RUN)), strict=False)):
        if run in seen:
            repeated[start : start + _RUN] = b"\1" * _RUN
        seen.add(run)
    return sum(repeated) / len(words) if words else 0.0
