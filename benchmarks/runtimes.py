"""Checkpoints in other software: perplexity by transformers, llama.cpp and vLLM, on the same tokens.

    python benchmarks/runtimes.py --text FILE [--llama-cpp FOLDER] [--vllm PYTHON] CHECKPOINT [CHECKPOINT ...]

--llama-cpp: its source folder, with `llama-perplexity` built in build/bin and what its converter imports installed
here. --vllm: the Python of an environment that has vLLM; it works in bfloat16 on some processors, so float32 is asked
for. The text is read in windows of 512 tokens whose second half is scored, as llama-perplexity does it; no token is put
in front. A checkpoint that a program refuses has the last line of what it said in the place of the number.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

WINDOW = 512


def by_transformers(folder: Path, windows: list[list[int]]) -> str:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()
    nlls: list[float] = []
    with torch.inference_mode():
        for window in windows:
            row = torch.tensor(window)
            scored = slice(WINDOW // 2, WINDOW - 1)
            logits = model(row[None]).logits[0, scored]
            nlls += torch.nn.functional.cross_entropy(logits, row[scored.start + 1 :], reduction="none").tolist()
    return perplexity(nlls)


def by_llama_cpp(folder: Path, text: Path, windows: int, home: Path) -> str:
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "model.gguf"
        converted = run([sys.executable, home / "convert_hf_to_gguf.py", folder, "--outtype", "f32", "--outfile", file])
        if converted.returncode:
            return last_line(converted)
        shape = ["-c", WINDOW, "-b", WINDOW, "--chunks", windows]
        scored = run([home / "build" / "bin" / "llama-perplexity", "-m", file, "-f", text, *shape])
        found = re.search(r"PPL = ([\d.]+)", scored.stdout + scored.stderr)
        return found[1] if found else last_line(scored)


def by_vllm(folder: Path, windows: list[list[int]], python: Path) -> str:
    with tempfile.TemporaryDirectory() as place:
        asked, answered = Path(place) / "windows.json", Path(place) / "nlls.json"
        asked.write_text(json.dumps(windows), encoding="utf-8")
        scored = run([python, __file__, "--inside-vllm", asked, answered, folder])
        if not answered.exists():
            return last_line(scored)
        return perplexity(json.loads(answered.read_text(encoding="utf-8")))


def inside_vllm(asked: Path, answered: Path, folder: Path) -> None:
    """Run by vLLM's own Python."""
    from vllm import LLM, SamplingParams, TokensPrompt  # type: ignore[import-not-found]

    model = LLM(
        str(folder),
        dtype="float32",
        trust_remote_code=True,
        enforce_eager=True,
        max_model_len=WINDOW + 8,
        max_num_seqs=4,
    )
    windows = json.loads(asked.read_text(encoding="utf-8"))
    told = model.generate(
        [TokensPrompt(prompt_token_ids=window) for window in windows],
        SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0),
    )
    nlls = [
        -each.prompt_logprobs[place][window[place]].logprob
        for window, each in zip(windows, told, strict=True)
        for place in range(WINDOW // 2 + 1, WINDOW)
    ]
    answered.write_text(json.dumps(nlls), encoding="utf-8")


def perplexity(nlls: list[float]) -> str:
    return f"{math.exp(sum(nlls) / len(nlls)):.4f}"


def run(command: list[object]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, env=os.environ.copy())


def last_line(ended: subprocess.CompletedProcess[str]) -> str:
    said = [line for line in (ended.stdout + ended.stderr).splitlines() if line.strip()]
    errors = [line for line in said if "error" in line.lower()]
    return f"refused: {(errors or said or ['without a word'])[-1].strip()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--llama-cpp", type=Path)
    parser.add_argument("--vllm", type=Path)
    parser.add_argument("--inside-vllm", type=Path, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    given = parser.parse_args()
    if given.inside_vllm:
        inside_vllm(*given.inside_vllm, given.checkpoints[0])
        return
    if given.text is None:
        parser.error("--text is missing")
    from transformers import AutoTokenizer

    print("| checkpoint | transformers | llama.cpp | vLLM |\n|---|---:|---:|---:|")
    for folder in given.checkpoints:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        ids = tokenizer(given.text.read_text(encoding="utf-8"), add_special_tokens=False).input_ids
        windows = [ids[start : start + WINDOW] for start in range(0, given.windows * WINDOW, WINDOW)]
        row = [by_transformers(folder, windows)]
        row.append(by_llama_cpp(folder, given.text, given.windows, given.llama_cpp) if given.llama_cpp else "")
        row.append(by_vllm(folder, windows, given.vllm) if given.vllm else "")
        print(f"| {folder.name} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
