"""What training brings a cut model in a given time: perplexity at the start, on the way and at the end.

    python benchmarks/healing.py --text c4.jsonl --held-out wikitext2.test.txt --remove block.13-18 --minutes 30 \
        --methods lora full full:distill=0.9,lr=5e-4

A method is a name and its options. The minutes count everything, measurements on the way too. `start` and `end` are on
--windows windows of the held-out text, spread evenly over it, as is what is measured on the way; `dense` is the
uncut model's. With --folder a run that was killed resumes when it is started again.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from transformers import PreTrainedModel
from windows import evenly

from shallower import progress
from shallower.corpus import CalibrationSet
from shallower.evaluation.perplexity import perplexity
from shallower.evaluation.text import read_evaluation_text
from shallower.plan import PruningPlan
from shallower.registry import recovery
from shallower.surgery import cut
from shallower.units import parse_units
from shallower.verbs.calibrate import calibrate_most
from shallower.verbs.subject import Subject, open_subject

MOST = 1 << 20  # sequences to train on: all whole ones of the text's training part


def held_out(subject: Subject, spec: str, window: int, count: int) -> Callable[[PreTrainedModel], float]:
    """Perplexity on `count` windows, spread evenly over the text; 0 for all of it."""
    text = read_evaluation_text(spec)
    ids = torch.tensor(subject.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    chosen = evenly(ids, count, window)
    return lambda model: perplexity(model, subject.tokenizer, chosen, window=window).perplexity


def run(name: str, subject: Subject, text: CalibrationSet, given: argparse.Namespace) -> dict[str, Any]:
    name, _, settings = name.partition(":")
    method = recovery.get(name)
    options = method.parse_options(dict(item.split("=", 1) for item in filter(None, settings.split(","))))
    if "minutes" in method.options:
        options.setdefault("minutes", given.minutes)
    removed = frozenset(PruningPlan.load(given.plan).removed if given.plan else parse_units(given.remove))
    measure = held_out(subject, given.held_out, given.window, given.windows)
    student = cut(subject.anatomy, removed)
    start, dense = measure(student), measure(subject.model)
    folder = Path(given.folder or tempfile.mkdtemp()) / f"{name}:{settings}"
    supplied = {
        "student": student,
        "anatomy": subject.anatomy,
        "removed": removed,
        "calibration": text,
        "held_out": measure,
        "folder": folder,
        "seed": given.seed,
    }
    begin = time.perf_counter()
    healed = method.function(**{key: supplied[key] for key in method.parameters}, **options)
    seconds = time.perf_counter() - begin
    told = json.loads((folder / "training.json").read_text())
    return {
        "method": f"{name}:{settings}".rstrip(":"),
        "removed": [str(unit) for unit in sorted(removed)],
        "dense": dense,
        "start": start,
        "end": measure(healed),
        "tokens": told["tokens"],
        "steps": told["step"],
        "minutes": seconds / 60,
        "stopped": told["stopped"],
        "curve": told["curve"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", required=True, help="training text, such as c4.jsonl")
    parser.add_argument("--held-out", required=True, help="text for perplexity, such as wikitext2.test.txt")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--plan")
    which.add_argument("--remove", help="units, such as block.13-18")
    parser.add_argument("--methods", nargs="+", required=True, help="such as lora full full:distill=0.9,lr=5e-4")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--length", type=int, default=256, help="tokens of a training sequence")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=12, help="0 for all of the held-out text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--folder", help="where states are kept, to resume from")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    subject = open_subject(given.model, dtype=given.dtype)
    text, _ = calibrate_most(subject, given.text, sequences=MOST, length=given.length, seed=0)
    if not given.json:
        print(
            f"{text.tokens:,} tokens in sequences of {text.length}, {subject.model.dtype}, "
            f"{torch.get_num_threads()} threads"
        )
    for name in given.methods:
        with progress.listening(_no_bar, lambda sentence: None if given.json else print(f"  {sentence}", flush=True)):
            row = run(name, subject, text, given)
        if given.json:
            print(json.dumps(row), flush=True)
            continue
        print(
            f"{row['method']:32} dense {row['dense']:.2f} start {row['start']:.2f} end {row['end']:.2f}, "
            f"{row['tokens']:,} tokens in {row['steps']} steps, {row['minutes']:.1f} minutes"
        )
        for point in row["curve"]:
            losses = " ".join(f"{key} {point[key]:.3f}" for key in ("loss", "nll", "kl") if key in point)
            print(f"  {point['minutes']:6.1f} min {point['tokens']:9,} tokens  {point['held_out']:7.2f}  {losses}")


def _no_bar(description: str, total: int | None) -> Any:
    return nullcontext(lambda n=1: None)


if __name__ == "__main__":
    main()
