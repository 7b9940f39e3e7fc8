"""The evidence for the default search: what each search leaves of the model on text that it did not read, and its time.

Every search removes 10, 20 and 30 % of the parameters in blocks, one after the other with what it measured before,
from the same calibration tokens. The perplexity of each cut is taken on held-out texts; the seconds and the tokens read
are those of all three, besides what a metric read. Searches that rank (`one-shot cosine`, `contiguous angular`) are
given a metric, others an objective; `random` and `last` look at neither, and `random` is one draw, that of --seed.
Nothing is recalled from disk.

    python benchmarks/searches.py --calibration c4.jsonl --held-out wikitext2.test.txt --held-out books.jsonl
        [--rows "greedy nll" "greedy,swap kl" "greedy kl sublayer"] [--sequences 32] [--length 128] [--json]
        [--questions arc_easy/test.jsonl]

A row is a search, a metric or objective, and the kind of units where it is not blocks. `task` asks as many
questions as there are sequences of text, from --questions, and is left out without these.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from contextlib import closing
from dataclasses import asdict, dataclass

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from windows import evenly

from shallower.corpus import CalibrationSet, build_calibration
from shallower.engine import Ablator, Racing, reads_choices
from shallower.evaluation import read_evaluation_text
from shallower.registry import objective as objectives
from shallower.units import Unit
from shallower.verbs.calibrate import calibrate
from shallower.verbs.search import search
from shallower.verbs.subject import Subject, open_subject

SHARES = ("10%", "20%", "30%")
BASELINES = ("one-shot cosine", "contiguous angular", "greedy nll")
ROWS = (
    *BASELINES,
    "random nll",
    "last nll",
    "one-shot loss",
    "milp loss",
    "greedy kl",
    "greedy js",
    "greedy logit-l2",
    "greedy hidden-cosine",
    "greedy top1",
    "beam kl",
    "greedy,swap nll",
    "greedy,swap kl",
    "evolutionary nll",
    "evolutionary kl",
    "annealing nll",
    "annealing kl",
    "greedy nll sublayer",
    "greedy kl sublayer",
    "contiguous angular sublayer",
    "greedy task",
)


@dataclass(frozen=True)
class Row:
    """perplexities: of each held-out text after each share. tokens: read by the search."""

    row: str
    removed: list[list[str]]
    perplexities: list[list[float]]
    tokens: int
    seconds: float


def run(
    row: str,
    subject: Subject,
    text: CalibrationSet,
    held_out: list[Ablator],
    seed: int,
    questions: CalibrationSet | None = None,
) -> Row:
    how, by, *kind = row.split()
    objective, metric = (by, None) if by in {method.name for method in objectives} else ("nll", by)
    if asks_questions(row):
        assert questions is not None
        text = questions
    start = time.perf_counter()
    with closing(Ablator(subject.anatomy, text, objective, racing=Racing())) as ablator:
        sets: list[frozenset[Unit]] = [
            search(
                subject,
                share,
                search=how,
                objective=objective,
                metric=metric,
                units=kind[0] if kind else "block",
                calibration=text,
                seed=seed,
                ablator=ablator,
            ).removed
            for share in SHARES
        ]
        seconds = time.perf_counter() - start
    losses = [measured.losses(sets) for measured in held_out]
    perplexities = [[math.exp(loss) for loss in at] for at in zip(*losses, strict=True)]
    removed = [[str(unit) for unit in sorted(units)] for units in sets]
    return Row(row, removed, perplexities, ablator.spent.tokens, seconds)


def asks_questions(row: str) -> bool:
    by = row.split()[1]
    return by in {method.name for method in objectives} and reads_choices(objectives.get(by))


def windows(subject: Subject, source: str, count: int, length: int = 512) -> CalibrationSet:
    """So many windows, spread evenly over the whole text."""
    ids = subject.tokenizer(read_evaluation_text(source), add_special_tokens=False, verbose=False).input_ids
    chosen = evenly(torch.tensor(ids), count, length)
    return CalibrationSet(os.path.basename(source), chosen[: count * length].view(-1, length), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--held-out", action="append", required=True)
    parser.add_argument("--questions", help="a .jsonl file of questions, for rows by task")
    parser.add_argument("--rows", nargs="+", help="default: all")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--windows", type=int, default=16, help="windows of 512 tokens, of each held-out text")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    if asked.rows and not asked.questions and any(map(asks_questions, asked.rows)):
        parser.error("rows by task need --questions FILE.jsonl")
    subject = open_subject(asked.model, dtype=asked.dtype)
    shape = {"sequences": asked.sequences, "length": asked.length, "seed": asked.seed}
    text = build_calibration(asked.calibration, subject.tokenizer, **shape, part="train")
    questions = None
    if asked.questions:
        questions = calibrate(subject, asked.questions, objective="task", **shape)
    held_out = [Ablator(subject.anatomy, windows(subject, source, asked.windows)) for source in asked.held_out]
    dense = [math.exp(ablator.losses([frozenset()])[0]) for ablator in held_out]
    sources = ", ".join(os.path.basename(source) for source in asked.held_out)
    if not asked.json:
        print(
            f"calibration {text.sequences} × {text.length} tokens, {subject.model.dtype}, {torch.get_num_threads()} "
            f"threads; perplexity on {sources}: dense {' / '.join(f'{value:.1f}' for value in dense)}\n"
        )
        print("| search | " + " | ".join(SHARES) + " | tokens read | seconds |")
        print("|---|" + "---:|" * (len(SHARES) + 2), flush=True)
    for name in asked.rows or [row for row in ROWS if asked.questions or not asks_questions(row)]:
        row = run(name, subject, text, held_out, asked.seed, questions)
        if asked.json:
            print(json.dumps(asdict(row)), flush=True)
            continue
        cells = [" / ".join(f"{value:.1f}" for value in at) for at in row.perplexities]
        print(f"| {name} | {' | '.join(cells)} | {row.tokens:,} | {row.seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
