"""Texts that say the same: exactly (but for case and punctuation), or nearly, by the words they share in runs of five.

- Words are runs of letters and digits, lower-cased; a text is the set of its runs of `SHINGLE` words. How alike two
  texts are is the Jaccard similarity of these sets (Broder 1997); of short texts only exact copies count.
- Candidates come from MinHash signatures in a locality-sensitive index (datasketch), with so many bands that a pair at
  the threshold itself is found with probability 0.999; each is then verified on the sets themselves, so what is
  reported is exact and only what is missed is a matter of chance.
- A run is known by 64 bits: of a million different runs two would be taken for one with probability 3e-8.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from shallower.corpus.quality import WORD
from shallower.errors import CorpusError, require_package

if TYPE_CHECKING:
    from datasketch import MinHash

SHINGLE = 5
LEAST_WORDS = 20  # of fewer, most of a text's runs are those of a date line or a heading: only copies say the same
PERMUTATIONS = 128
_FOUND = 0.999  # of the pairs whose similarity is the threshold
_SHINGLES_AT_ONCE = 4_096  # times PERMUTATIONS numbers in memory
_KNOWN_WORDS = 1_000_000

Hashes = npt.NDArray[np.uint64]


def words_of(text: str) -> list[str]:
    """Runs of letters and digits, lower-cased."""
    return WORD.findall(text.lower())


def fingerprint(words: Sequence[str], text: str) -> bytes:
    """16 bytes that are the same for texts of the same words in the same order; without words, for the same text."""
    content = "\x1f".join(words) if words else text.strip()
    return hashlib.blake2b(content.encode(), digest_size=16).digest()


class Shingles:
    """Turns words into the hashes of their runs. Remembers what each word's hash is."""

    def __init__(self, size: int = SHINGLE) -> None:
        self.size = size
        self._words: dict[str, int] = {}
        # odd numbers: the place of a word in its run matters
        draw = hashlib.shake_128(b"shallower shingles").digest(8 * size)
        self._factors = np.frombuffer(draw, dtype="<u8").astype(np.uint64) | np.uint64(1)

    def runs(self, words: Sequence[str]) -> Hashes:
        """The hash of each run of `size` words in order, uint64 [words - size + 1]; of fewer words, of all of them."""
        if not words:
            return np.zeros(0, dtype=np.uint64)
        hashes = np.array([self._hash(word) for word in words], dtype=np.uint64)
        if len(hashes) < self.size:
            return _mixed(np.sum(hashes * self._factors[: len(hashes)], keepdims=True, dtype=np.uint64))
        count = len(hashes) - self.size + 1
        total = np.zeros(count, dtype=np.uint64)
        for place, factor in enumerate(self._factors):
            total += hashes[place : place + count] * factor
        return _mixed(total)

    def of(self, words: Sequence[str]) -> Hashes:
        """The set of runs, sorted."""
        return np.unique(self.runs(words))

    def _hash(self, word: str) -> int:
        known = self._words.get(word)
        if known is None:
            if len(self._words) >= _KNOWN_WORDS:
                self._words.clear()
            known = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
            self._words[word] = known
        return known


def jaccard(one: Hashes, two: Hashes) -> float:
    """Shared members over all members of two sorted sets."""
    shared = len(np.intersect1d(one, two, assume_unique=True))
    total = len(one) + len(two) - shared
    return shared / total if total else 0.0


def bands(threshold: float, permutations: int = PERMUTATIONS) -> tuple[int, int]:
    """Bands and rows of the index: as many rows as still find pairs at the threshold (few rows, more candidates)."""
    for rows in range(permutations // 2, 0, -1):
        count = permutations // rows
        if 1 - (1 - threshold**rows) ** count >= _FOUND:
            return count, rows
    return permutations, 1


class Duplicates:
    """Texts seen so far. Keeps 8 bytes a run of words and a signature for each, not the text.

    Raises CorpusError when datasketch is not installed, or the threshold is not above 0 and at most 1.
    """

    def __init__(self, threshold: float) -> None:
        if not 0 < threshold <= 1:
            raise CorpusError(f"dedup={threshold} is not above 0 and at most 1, the Jaccard similarity of duplicates.")
        require_package("datasketch", "data", "finding near-duplicates")
        from datasketch import MinHash, MinHashLSH

        self.threshold = threshold
        self._shingles = Shingles()
        self._index: Any = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, params=bands(threshold))
        self._empty: MinHash = MinHash(num_perm=PERMUTATIONS, seed=1, hashfunc=_itself)
        self._exact: dict[bytes, int] = {}
        self._sets: dict[int, Hashes] = {}

    @property
    def different(self) -> int:
        """How many texts `exact` was asked about, without copies: a number that none of them has yet."""
        return len(self._exact)

    def exact(self, number: int, words: Sequence[str], text: str) -> int | None:
        """The first text with the same words in the same order, if there is one; else `number` is that first one."""
        first = self._exact.setdefault(fingerprint(words, text), number)
        return None if first == number else first

    def near(self, words: Sequence[str], skip: Callable[[int], bool] | None = None) -> Iterator[tuple[int, float]]:
        """Texts that were added and are at least `threshold` alike, with their similarity, in the order added.

        skip: which of them need no comparing, asked right before it would be done. Then `add` adds the text itself.
        Texts of fewer than LEAST_WORDS words are like no other: `exact` finds their copies.
        """
        self._set = self._shingles.of(words if len(words) >= LEAST_WORDS else [])
        self._signature = self._empty.copy()
        small = self._set >> np.uint64(32)  # the library permutes 32-bit numbers
        for start in range(0, len(small), _SHINGLES_AT_ONCE):
            self._signature.update_batch(small[start : start + _SHINGLES_AT_ONCE].tolist())
        if not len(self._set):
            return
        for candidate in sorted(self._index.query(self._signature)):
            if skip is not None and skip(candidate):
                continue
            other = self._sets[candidate]
            short, long = sorted((len(self._set), len(other)))
            if short >= self.threshold * long and (alike := jaccard(self._set, other)) >= self.threshold:
                yield candidate, alike

    def add(self, number: int) -> None:
        """Keep the text that `near` was last asked about."""
        if len(self._set):
            self._index.insert(number, self._signature, check_duplication=False)
            self._sets[number] = self._set


def near_pairs(texts: Sequence[str], threshold: float) -> Iterator[tuple[int, int, float]]:
    """Every pair of texts of LEAST_WORDS words and more that is found and is at least `threshold` alike.

    Two positions and the similarity.
    """
    seen = Duplicates(threshold)
    for number, text in enumerate(texts):
        yield from ((other, number, alike) for other, alike in seen.near(words_of(text)))
        seen.add(number)


def _itself(value: int) -> int:
    return value


def _mixed(hashes: Hashes) -> Hashes:
    """The finaliser of splitmix64: a sum of products has weak low bits."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Hashes = hashes ^ (hashes >> np.uint64(31))
    return mixed
