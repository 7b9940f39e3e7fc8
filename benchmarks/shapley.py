"""Shapley values of a model's units from several seeds: what a run costs, and whether the seeds rank units alike.

    python benchmarks/shapley.py --text c4.jsonl [--model demo] [--units block] [--seeds 0,1] [--json]

One line a seed: seconds, those of all cores together (which company on the machine hardly changes), sets asked for,
calibration tokens times distinct sets measured, orders of removal, the agreement of that run's own halves by which it
stops, and the median standard error. Then Spearman's correlation between the seeds, and of the first with `cosine` and
with leave-one-out (`loss`) on the same text. Nothing is recalled from disk, and each seed starts from nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Sequence
from random import Random
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from scipy.stats import spearmanr

from shallower.corpus import CalibrationSet, build_calibration
from shallower.engine import Ablator
from shallower.metrics.shapley import rank_agreement, sampled
from shallower.registry import metric as metrics
from shallower.units import Unit
from shallower.verbs.score import score
from shallower.verbs.subject import Subject, open_subject, units_of

OPTIONS = metrics.get("shapley").options


def run(
    subject: Subject, text: CalibrationSet, units: Sequence[Unit], given: argparse.Namespace, seed: int
) -> tuple[dict[str, Any], np.ndarray]:
    """One run from one seed: what is printed of it, and the value of each unit."""
    start, worked = time.perf_counter(), time.process_time()
    ablator = Ablator(subject.anatomy, text)
    asked = 0

    def losses(candidates: Sequence[frozenset[Unit]]) -> list[float]:
        nonlocal asked
        asked += len(candidates)
        return ablator.losses(candidates)

    values = sampled(units, losses, Random(seed), given.samples, min(given.max_removed, len(units)), given.stable)
    errors = values.std(axis=0, ddof=1) / len(values) ** 0.5
    row = {
        "seed": seed,
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - worked, 1),
        "sets": asked,
        "tokens": ablator.spent.tokens,
        "orders": len(values),
        "halves": round(rank_agreement(values), 4),
        "median_error": round(float(np.median(errors)), 4),
    }
    return row, values.mean(axis=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", required=True, help="calibration text, such as c4.jsonl")
    parser.add_argument("--units", default="block")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--samples", type=int, default=OPTIONS["samples"].default)
    parser.add_argument("--max-removed", type=int, default=OPTIONS["max_removed"].default)
    parser.add_argument("--stable", type=float, default=OPTIONS["stable"].default)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    subject = open_subject(given.model, dtype=given.dtype)
    units = units_of(subject, given.units)
    text = build_calibration(given.text, subject.tokenizer, sequences=given.sequences, length=given.length)
    Ablator(subject.anatomy, text).losses([frozenset()])  # warm-up
    if not given.json:
        print(
            f"{len(units)} units, {text.sequences} sequences of {text.length} tokens, {subject.model.dtype}, "
            f"{torch.get_num_threads()} threads, max_removed {given.max_removed}, samples {given.samples}, stable "
            f"{given.stable}",
            flush=True,
        )
    found = {}
    for seed in map(int, given.seeds.split(",")):
        row, found[seed] = run(subject, text, units, given, seed)
        print(json.dumps(row) if given.json else "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    compared = {
        f"seeds {one} and {other}": (found[one], found[other]) for one, other in itertools.combinations(found, 2)
    }
    first = next(iter(found))
    for name in ("cosine", "loss"):
        values = score(subject, name, units=given.units, calibration=text).units
        compared[f"seed {first} and {name}"] = (found[first], np.array([values[unit] for unit in units]))
    for names, pair in compared.items():
        agreement = round(float(spearmanr(*pair).statistic), 4)
        print(
            json.dumps({"spearman": names, "value": agreement}) if given.json else f"Spearman of {names}: {agreement}"
        )
    ranked = [str(units[place]) for place in np.argsort(np.mean(list(found.values()), axis=0))]
    if given.json:
        print(json.dumps({"least to most important": ranked}))
    else:
        print("least to most important:", ", ".join(ranked))


if __name__ == "__main__":
    main()
