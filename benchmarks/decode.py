"""Decoding without a third of the attentions, against the dense model, in one process.

Runs alternate; all models decode equally many tokens with their KV cache. The cut model is made in memory, or name
folders of cut models with `--model`.

    OMP_NUM_THREADS=2 python benchmarks/decode.py [--dense demo] [--remove attn.10-19 | --model FOLDER ...] [--json]

To be reached: KV-cache bytes of the cut model exactly two thirds, decoding at least 15 % faster (batch 8, a prompt of
1,024 tokens, the demo model of 30 blocks).
"""

from __future__ import annotations

import argparse
import json
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from shallower.anatomy import dissect
from shallower.checkpoint.load import LoadedModel
from shallower.cli.output import screen
from shallower.cli.progress import working
from shallower.reporting.tables import bench_table
from shallower.surgery import cut
from shallower.units import parse_units
from shallower.verbs.bench import bench
from shallower.verbs.subject import Subject, open_subject


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", default="demo", help="the model to compare with")
    parser.add_argument("--model", action="append", default=[], help="a cut model; repeatable")
    parser.add_argument("--remove", default="attn.10-19", help="without --model: what to cut out of the dense model")
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--generate", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    dense = open_subject(given.dense, dtype=given.dtype)
    subjects = {"dense": dense}
    for folder in given.model:
        subjects[folder] = open_subject(folder, dtype=given.dtype)
    if not given.model:
        loaded = dense.loaded
        model = cut(dense.anatomy, parse_units(given.remove))
        cut_model = LoadedModel(model, loaded.tokenizer, loaded.name, loaded.revision, None)
        subjects[f"without {given.remove}"] = Subject(cut_model, dissect(model))
    with working(quiet=given.json):
        found = bench(
            subjects, prompt=given.prompt, generate=given.generate, batch=given.batch, repeats=given.repeats, warmup=1
        )
    if given.json:
        print(json.dumps(found.to_json(), indent=1))
        return
    screen().print(bench_table({timed.model: timed.speeds for timed in found.models}, found.setting))
    first = found.models[0].speeds[0]
    for timed in found.models[1:]:
        speed = timed.speeds[0]
        print(
            f"{timed.model}: {timed.attns} of {found.models[0].attns} attentions; KV cache {speed.kv_cache_bytes:,} of "
            f"{first.kv_cache_bytes:,} bytes; decoding {speed.decode_s.faster_than(first.decode_s):+.1f} %, prefill "
            f"{speed.prefill_s.faster_than(first.prefill_s):+.1f} %"
        )


if __name__ == "__main__":
    main()
