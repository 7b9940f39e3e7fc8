"""What the static metrics cost: all of them, for all units and all spans, against plain forwards of the stock model.

    python benchmarks/metrics.py --text TEXT [--json]

One process, one number format and one number of threads for both sides, which take turns; medians. The run with
linear-residual comes first, once. A plain forward is the stock model's, head and logits included, over the same text
in batches of the same size. Memory is the highest resident memory while the metrics run (Linux), above what is
resident once the model is loaded and has run one token. The answers are compared with a direct calculation, pair by
pair in float64, on a few sequences.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from shallower.corpus import CalibrationSet, build_calibration
from shallower.engine.stream import TOKENS_A_BATCH, StreamStatistic, stream_scores
from shallower.registry import metric as metrics
from shallower.scores import Score
from shallower.units import Span, Unit
from shallower.verbs.subject import Subject, open_subject, units_of

DISTANCES = ("cosine", "relative-l1", "relative-l2", "angular")
EVERYTHING = (*DISTANCES, "linear-residual")
COMPARED = 2  # sequences of the direct calculation


def score(subject: Subject, text: CalibrationSet, names: Sequence[str]) -> list[tuple[Score, ...]]:
    """All units, block and sublayer, and all spans, at all tokens."""
    asked = [StreamStatistic(metrics.get(name), {}, "all", spans=True) for name in names]
    return stream_scores(subject.anatomy, text, asked, units_of(subject, "all"))


def plain_forward(subject: Subject, text: CalibrationSet) -> None:
    """The stock model over the text, with its head."""
    with torch.no_grad():
        for batch in text.batches(max(1, TOKENS_A_BATCH["cpu"] // text.length)):
            subject.model(input_ids=batch.input_ids, use_cache=False)


def timed(name: str, work: Callable[[], object]) -> tuple[float, float]:
    """Seconds that pass during a call, and seconds of processor time that this process spends."""
    start, spent = time.perf_counter(), time.process_time()
    work()
    taken = time.perf_counter() - start, time.process_time() - spent
    print(f"{name}: {taken[0]:.1f} s, {taken[1]:.1f} s of processor time", file=sys.stderr, flush=True)
    return taken


def largest_difference(subject: Subject, text: CalibrationSet) -> float:
    """Largest relative difference of any score to the direct calculation, on a few sequences (Llama-shaped models)."""
    few = text.subset(range(min(COMPARED, text.sequences)))
    depths, middles = _streams(subject, few)
    ends = {Span(i, j): (depths[i], depths[j]) for i in range(len(depths)) for j in range(i + 1, len(depths))}
    pairs: dict[Unit | Span, tuple[Tensor, Tensor]] = dict(ends)
    for index, middle in enumerate(middles):
        pairs[Unit(index, "block")] = depths[index], depths[index + 1]
        pairs[Unit(index, "attn")] = depths[index], middle
        pairs[Unit(index, "mlp")] = middle, depths[index + 1]
    worst = 0.0
    for name, rows in zip(DISTANCES, score(subject, few, DISTANCES), strict=True):
        for row in rows:
            expected = _direct(name, *pairs[row.of])
            worst = max(worst, abs(row.value - expected) / expected)
    return worst


def _streams(subject: Subject, text: CalibrationSet) -> tuple[list[Tensor], list[Tensor]]:
    """The stream at every depth and after every attention: float64 [tokens, hidden] each."""
    depths: list[Tensor] = []
    middles: list[Tensor] = []
    handles = []
    for block in subject.anatomy.blocks:
        inside = block.module.get_submodule("post_attention_layernorm")
        for module, kept in ((block.module, depths), (inside, middles)):
            handles.append(module.register_forward_pre_hook(lambda m, args, kept=kept: kept.append(args[0].double())))
    last = subject.anatomy.blocks[-1].module
    handles.append(last.register_forward_hook(lambda m, args, out: depths.append(out.double())))
    with torch.no_grad():
        subject.model(input_ids=text.input_ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return [state.flatten(0, 1) for state in depths], [state.flatten(0, 1) for state in middles]


def _direct(name: str, before: Tensor, after: Tensor) -> float:
    cosine = torch.cosine_similarity(before, after, dim=-1)
    if name == "cosine":
        values = 1 - cosine
    elif name == "angular":
        values = cosine.clamp(-1, 1).arccos() / math.pi
    else:
        order = int(name[-1])
        values = (after - before).norm(p=order, dim=-1) / after.norm(p=order, dim=-1)
    return float(values.mean())


def _peak_megabytes() -> float:
    """Highest resident memory of this process since this was last asked (Linux)."""
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", required=True, help="calibration text, such as c4.jsonl")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="auto", help="number format of both sides; auto: what is fastest here")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    subject = open_subject(given.model, device="cpu", dtype=given.dtype)
    text = build_calibration(given.text, subject.tokenizer, sequences=given.sequences, length=given.length)
    with torch.no_grad():
        subject.model(input_ids=text.input_ids[:1, :1], use_cache=False)
    _peak_megabytes()
    loaded = _peak_megabytes()  # resident now: nothing ran since the line above
    score(subject, text.subset([0]), DISTANCES)  # warm-up
    everything = timed("with linear-residual", lambda: score(subject, text, EVERYTHING))
    peak = _peak_megabytes()  # before any plain forward, whose logits take more
    plain_forward(subject, text.subset([0]))
    plain_times, distance_times = [], []
    for _ in range(given.repeats):
        plain_times.append(timed("plain forward", lambda: plain_forward(subject, text)))
        distance_times.append(timed("distances", lambda: score(subject, text, DISTANCES)))
    plain, plain_cpu = (statistics.median(column) for column in zip(*plain_times, strict=True))
    distances, distances_cpu = (statistics.median(column) for column in zip(*distance_times, strict=True))
    result = {
        "model": given.model,
        "dtype": str(subject.model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "sequences": text.sequences,
        "length": text.length,
        "repeats": given.repeats,
        "plain_forward_s": round(plain, 2),
        "distances_s": round(distances, 2),
        "distances_in_plain_forwards": round(distances / plain, 3),
        "distances_in_plain_forwards_processor_time": round(distances_cpu / plain_cpu, 3),
        "with_linear_residual_s": round(everything[0], 2),
        "with_linear_residual_in_plain_forwards": round(everything[0] / plain, 3),
        "with_linear_residual_in_plain_forwards_processor_time": round(everything[1] / plain_cpu, 3),
        "loaded_mb": round(loaded),
        "peak_above_loaded_mb": round(peak - loaded),
        "largest_relative_difference": largest_difference(subject, text),
        "all_plain_s": [round(value, 2) for value, _ in plain_times],
        "all_distances_s": [round(value, 2) for value, _ in distance_times],
    }
    if given.json:
        print(json.dumps(result))
        return
    print(f"{', '.join(DISTANCES)} of {len(subject.anatomy.units)} units and all spans")
    for name, value in result.items():
        print(f"{name:54} {value}")


if __name__ == "__main__":
    main()
