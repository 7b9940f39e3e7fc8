"""A slice of a study: `shallower study` against cells that are measured one by one, plainly.

    python benchmarks/study.py --text c4.jsonl --held-out wikitext2.test.txt [--sequences 8] [--length 64] [--seeds 0]
        [--objectives nll kl]

The slice is one text, one size, four searches and two ratios: eight cells for each objective and seed. Plainly, each
cell is a run of the published algorithm with a full forward of the stock model for every candidate set (as in
`selection.py`), and then the perplexity of the cut model on the held-out text; nothing is carried from cell to cell.
Ours starts with an empty memory on disk. Both compute in the same number format on the same tokens. Prints the seconds
of both, their ratio, and for each cell by how much the losses of the two plans differ (races may end in another plan).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from selection import Reference, Removed, evopress, shortened_llama, sleb
from torch.nn.functional import kl_div, log_softmax

from shallower.anatomy.dissect import unpack
from shallower.budget import parse_remove
from shallower.corpus import CalibrationSet, build_calibration
from shallower.corpus.calibration import Batch
from shallower.studies.grid import parse_study
from shallower.studies.result import Cell
from shallower.units import Unit
from shallower.verbs.calibrate import calibrate
from shallower.verbs.request import budget_for
from shallower.verbs.study import study
from shallower.verbs.subject import Subject, open_subject, units_of

SEARCHES, REMOVE = ("one-shot:loss", "contiguous", "greedy", "evolutionary"), ("10%", "20%")
GENERATIONS = 10


def deeper_layers(reference: Reference, subject: Subject, count: int) -> Removed:
    """The span of 2403.17887: angular distance between the last token's streams, from one forward of the text.

    What the model returns as its last hidden state is behind the final norm, so what leaves the last block is hooked.
    """
    blocks = len(subject.anatomy.blocks)
    total = torch.zeros(blocks - count + 1, dtype=torch.float64)
    left: list[torch.Tensor] = []
    hook = subject.anatomy.blocks[-1].module.register_forward_hook(lambda *seen: left.append(unpack(seen[-1])))
    with torch.no_grad(), hook:
        for batch in reference.text.batches(reference.sequences):
            left.clear()
            output = subject.model(input_ids=batch.input_ids, output_hidden_states=True, use_cache=False)
            last = [stream[:, -1].double() for stream in (*output.hidden_states[:blocks], *left)]
            for start in range(blocks - count + 1):
                alike = torch.cosine_similarity(last[start], last[start + count], dim=-1)
                total[start] += (torch.arccos(alike.clamp(-1, 1)) / math.pi).sum()
    reference.tokens += reference.text.input_ids.numel()
    first = int(total.argmin())
    return frozenset(Unit(index, "block") for index in range(first, first + count))


class Divergence(Reference):
    """Kullback-Leibler divergence from the dense model, whose probabilities are computed once and kept."""

    def __init__(self, subject: Subject, text: CalibrationSet, tokens_a_forward: int) -> None:
        super().__init__(subject, text, tokens_a_forward)
        with torch.no_grad():
            self.dense = [self._log_probabilities(batch) for batch in text.batches(self.sequences)]

    def loss(self, removed: Removed) -> float:
        total = 0.0
        with self._cut(removed), torch.no_grad():
            for batch, dense in zip(self.text.batches(self.sequences), self.dense, strict=True):
                own = self._log_probabilities(batch)
                total += float(kl_div(own, dense, reduction="sum", log_target=True))
        self.tokens += self.text.input_ids.numel()
        return total / (self.text.sequences * (self.text.length - 1))

    def _log_probabilities(self, batch: Batch) -> torch.Tensor:
        logits = self.anatomy.model(input_ids=batch.input_ids, use_cache=False).logits
        return log_softmax(logits[:, :-1].float(), dim=-1).flatten(0, 1)


def plain(subject: Subject, text: CalibrationSet, held_out: CalibrationSet, cell: Cell) -> tuple[Removed, float]:
    """One cell by itself: the plan, and its held-out perplexity."""
    reference = REFERENCES[cell.objective](subject, text, 2048)
    units = units_of(subject, "block")
    amounts = [amount for amount in parse_remove(cell.remove) if not isinstance(amount, Unit)]
    budget = budget_for(subject, amounts, units)
    count = next(size for size in range(1, len(units)) if budget.met(frozenset(units[:size])))
    removed = {
        "one-shot:loss": lambda: shortened_llama(reference, units, count),
        "contiguous": lambda: deeper_layers(reference, subject, count),
        "greedy": lambda: sleb(reference, units, count),
        "evolutionary": lambda: evopress(reference, units, count, GENERATIONS, cell.seed),
    }[cell.search]()
    return removed, math.exp(Reference(subject, held_out, 2048).loss(removed))


REFERENCES: dict[str, type[Reference]] = {"nll": Reference, "kl": Divergence}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", required=True, help="calibration text, such as c4.jsonl")
    parser.add_argument("--held-out", required=True, help="text for perplexity, such as wikitext2.test.txt")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--objectives", nargs="+", choices=sorted(REFERENCES), default=["nll"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    subject = open_subject(given.model)
    grid = parse_study(
        {
            "models": given.model if subject.loaded.path is None else str(subject.loaded.path),
            "texts": {"text": str(Path(given.text).absolute())},
            "sequences": [given.sequences],
            "length": given.length,
            "seeds": list(given.seeds),
            "objectives": list(given.objectives),
            "searches": list(SEARCHES),
            "remove": list(REMOVE),
            "held_out": {"held out": str(Path(given.held_out).absolute())},
            "held_out_sequences": 8,
            "held_out_length": 256,
            "settings": {"generations": GENERATIONS, "patience": GENERATIONS},
        },
        "the slice",
    )
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SHALLOWER_CACHE"] = folder  # ours remembers nothing from before
        start = time.perf_counter()
        done = study(grid, Path(folder) / "out")
        ours = time.perf_counter() - start
    held_out = build_calibration(given.held_out, subject.tokenizer, sequences=8, length=256)
    rows = []
    start = time.perf_counter()
    for result in done.results:
        cell = result.cell
        text = calibrate(subject, given.text, sequences=given.sequences, length=given.length, seed=cell.seed)
        rows.append((result, text, *plain(subject, text, held_out, cell)))
    theirs = time.perf_counter() - start
    for result, text, removed, perplexity in rows:
        cell, mine = result.cell, frozenset(result.order)
        reference = REFERENCES[cell.objective](subject, text, 2048)
        gap = 0.0 if mine == removed else reference.loss(mine) / reference.loss(removed) - 1
        row = {
            "seed": cell.seed,
            "objective": cell.objective,
            "search": cell.search,
            "remove": cell.remove,
            "same_plan": mine == removed,
            "loss_gap": round(gap, 5),
            "held_out_ours": round(result.held_out["held out"], 2),
            "held_out_plain": round(perplexity, 2),
        }
        print(json.dumps(row) if given.json else "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    told = {"cells": len(rows), "ours_s": round(ours, 1), "plain_s": round(theirs, 1), "ratio": round(theirs / ours, 2)}
    print(json.dumps(told) if given.json else "  ".join(f"{key} {value}" for key, value in told.items()))


if __name__ == "__main__":
    main()
