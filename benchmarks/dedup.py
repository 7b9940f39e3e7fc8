"""Near-duplicates against known pairs: recall, precision, and seconds beside the library used plainly.

    python benchmarks/dedup.py --data DIR [--threshold 0.9] [--json]

DIR holds text/reuters.jsonl and neardup/reuters.pairs.jsonl (pairs of ids with the exact Jaccard similarity of their
five-word runs), neardup/articles.jsonl and neardup/articles.pairs.jsonl (planted
pairs). Every reported pair is checked on sets of word tuples, without hashes. Three rows a data set: finding all pairs
(`near_pairs`), the whole cleaning pass (`shallower corpus clean`: reading, quality, copies, clusters), and the plain
way (datasketch's MinHash of every run and its index with its own parameters, as its documentation shows).
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasketch import MinHash, MinHashLSH

from shallower.corpus import clean, open_source
from shallower.corpus.duplicates import near_pairs

Pair = frozenset[str]


@dataclass(frozen=True)
class Row:
    """One line of the result. precision: share of the pairs that are as alike; listed: that the file of pairs has."""

    data: str
    way: str
    documents: int
    threshold: float
    known: int
    pairs: int
    recall: float | None
    precision: float | None
    listed: float | None
    seconds: float


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def runs_of(text: str) -> set[tuple[str, ...]]:
    words = words_of(text)
    return {tuple(words[start : start + 5]) for start in range(max(1, len(words) - 4))}


def ours(texts: dict[str, str], threshold: float) -> set[Pair]:
    names = list(texts)
    return {frozenset((names[one], names[two])) for one, two, _ in near_pairs(list(texts.values()), threshold)}


def plain(texts: dict[str, str], threshold: float) -> set[Pair]:
    index = MinHashLSH(threshold=threshold, num_perm=128)
    found: set[Pair] = set()
    for name, text in texts.items():
        signature = MinHash(num_perm=128)
        for run in runs_of(text):
            signature.update(" ".join(run).encode())
        found |= {frozenset((name, other)) for other in index.query(signature)}
        index.insert(name, signature)
    return found


def measure(
    data: str,
    way: str,
    find: Callable[[dict[str, str], float], set[Pair]],
    texts: dict[str, str],
    known: set[Pair],
    threshold: float,
) -> Row:
    start = time.perf_counter()
    found = find(texts, threshold)
    seconds = time.perf_counter() - start
    right = sum(jaccard(texts, pair) >= threshold for pair in found)
    return Row(
        data,
        way,
        len(texts),
        threshold,
        len(known),
        len(found),
        len(known & found) / len(known),
        right / len(found) if found else None,
        len(known & found) / len(found) if found else None,
        round(seconds, 2),
    )


def jaccard(texts: dict[str, str], pair: Pair) -> float:
    one, two = (runs_of(texts[name]) for name in pair)
    return len(one & two) / len(one | two)


def whole_pass(data: str, path: Path, documents: int, threshold: float) -> Row:
    start = time.perf_counter()
    cleaning = clean(open_source(str(path)), dedup=threshold, min_quality=0.2)
    seconds = time.perf_counter() - start
    return Row(data, "clean", documents, threshold, 0, len(cleaning.clusters), None, None, None, round(seconds, 2))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def rows(data: Path, threshold: float) -> Iterable[Row]:
    for name, path in (("reuters", data / "text/reuters.jsonl"), ("articles", data / "neardup/articles.jsonl")):
        texts = {row["id"]: row["text"] for row in read(path)}
        listed = read(data / f"neardup/{name}.pairs.jsonl")
        known = {frozenset((pair["a"], pair["b"])) for pair in listed if pair.get("jaccard", 1) >= threshold}
        yield measure(name, "ours", ours, texts, known, threshold)
        yield whole_pass(name, path, len(texts), threshold)
        yield measure(name, "plain", plain, texts, known, threshold)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of text/ and neardup/")
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if not given.json:
        print(
            f"{'data':10} {'way':6} {'documents':>9} {'known':>6} {'found':>6} {'recall':>7} {'precision':>9} "
            f"{'listed':>7} {'s':>7}"
        )
    for row in rows(given.data, given.threshold):
        if given.json:
            print(json.dumps(asdict(row)), flush=True)
        else:
            shares = ["–" if share is None else f"{share:.3f}" for share in (row.recall, row.precision, row.listed)]
            print(
                f"{row.data:10} {row.way:6} {row.documents:9,} {row.known or '–':>6} {row.pairs:6} {shares[0]:>7} "
                f"{shares[1]:>9} {shares[2]:>7} {row.seconds:7.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
