"""Whether a search missed a better plan: every set of one size, or those of a few runs of neighbouring blocks.

The first and the last block stay. All sets are raced by the objective on the calibration tokens; the best are measured
in full, and on the held-out texts. This is the evidence in docs/decisions.md ('The default search stays greedy').

    python benchmarks/exhaustive.py --calibration c4.jsonl --held-out wikitext2.test.txt --held-out books.jsonl
        --remove 6 --runs 2

With `--plan` these sets are measured and no others.

Three of 30 blocks are 3,276 sets and take half an hour on two cores, six in at most two runs 1,288 sets and 13 minutes.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import combinations, pairwise

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from searches import windows

from shallower.corpus import build_calibration
from shallower.engine import Ablator, Racing
from shallower.units import Unit, listed, parse_units
from shallower.verbs.subject import open_subject


def sets(blocks: int, size: int, runs: int | None) -> Iterator[frozenset[Unit]]:
    """Sets of so many blocks without the first and the last, of at most `runs` runs of neighbours; None: all."""
    for chosen in combinations(range(1, blocks - 1), size):
        apart = 1 + sum(after > before + 1 for before, after in pairwise(chosen))
        if runs is None or apart <= runs:
            yield frozenset(Unit(index, "block") for index in chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--held-out", action="append", required=True)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--remove", type=int, help="blocks")
    which.add_argument("--plan", action="append", type=parse_units, help="instead of all sets this one; repeatable")
    parser.add_argument("--runs", type=int, help="of neighbouring blocks, at most; all sets by default")
    parser.add_argument("--objective", default="kl")
    parser.add_argument("--best", type=int, default=8, help="sets that are measured in full")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--windows", type=int, default=16, help="windows of 512 tokens, of each held-out text")
    asked = parser.parse_args()
    subject = open_subject(asked.model)
    shape = {"sequences": asked.sequences, "length": asked.length, "seed": 0}
    text = build_calibration(asked.calibration, subject.tokenizer, **shape, part="train")
    held_out = [Ablator(subject.anatomy, windows(subject, source, asked.windows)) for source in asked.held_out]
    candidates = list(map(frozenset, asked.plan or sets(len(subject.anatomy.blocks), asked.remove, asked.runs)))
    start = time.perf_counter()
    with closing(Ablator(subject.anatomy, text, asked.objective, racing=Racing())) as ablator:
        raced = ablator.losses(candidates, keep=asked.best)
        order = sorted(range(len(candidates)), key=raced.__getitem__)[: asked.best]
        best = [candidates[place] for place in order]
        losses = ablator.losses(best)
    seconds = time.perf_counter() - start
    print(
        f"{len(candidates):,} sets, {ablator.spent.tokens:,} of {len(candidates) * text.tokens:,} tokens, "
        f"{seconds:.0f} s"
    )
    print(f"| removed | {asked.objective} | perplexity on {' / '.join(map(os.path.basename, asked.held_out))} |")
    print("|---|---:|---:|")
    elsewhere = [measured.losses(best) for measured in held_out]
    for place in sorted(range(len(best)), key=losses.__getitem__):
        removed = listed(best[place], ", ")
        told = " / ".join(f"{math.exp(found[place]):.1f}" for found in elsewhere)
        print(f"| {removed} | {losses[place]:.4f} | {told} |")


if __name__ == "__main__":
    main()
