"""What a model writes: multiple choice asks only which of given answers is likelier, and a pruned model that still
chooses well may repeat itself for ever.

Each model continues the same prompts, greedily, so that nothing is left to chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from shallower import progress
from shallower.checkpoint.stock import evaluating
from shallower.errors import UserError
from shallower.evaluation.perplexity import context_limit

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "Photosynthesis is the process by which",
    "To make a good cup of tea, you first",
    "The three most important inventions of the twentieth century are",
    "def fibonacci(n):\n",
    "Dear Sir or Madam,\n\nI am writing to",
    "Question: A train travels 60 miles in 1.5 hours. What is its average speed?\nAnswer:",
)
TOKENS = 64
LOOP = 3  # the same run of words, so often in a row at the end, is a loop


@dataclass(frozen=True)
class Continuation:
    """What a model wrote after a prompt. tokens: their number; ended: whether the model stopped by itself."""

    prompt: str
    text: str
    tokens: int
    ended: bool
    loops: bool


@dataclass(frozen=True)
class Generation:
    """distinct_2, distinct_3: share of different runs of two and three words among all of a text's, averaged over
    texts; 1 when nothing comes twice. loops: share of texts that end in a loop. length: mean number of tokens. ended:
    share of texts that the model ended by itself.
    """

    distinct_2: float
    distinct_3: float
    loops: float
    length: float
    ended: float
    continuations: tuple[Continuation, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def continue_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] = PROMPTS,
    *,
    tokens: int = TOKENS,
    label: str = "",
) -> Generation:
    """Let a model continue each prompt by at most `tokens` tokens, greedily, one prompt at a time, and to no more than
    its context.

    Raises UserError when its context has no room behind a prompt.
    """
    rooms = prompt_rooms(model, tokenizer, prompts, tokens=tokens)
    written = []
    stops = _stops(model, tokenizer)
    with (
        evaluating(model),
        torch.inference_mode(),
        progress.task(f"{label} continuing prompts".strip(), total=len(prompts)) as step,
    ):
        for prompt, room in zip(prompts, rooms, strict=True):
            ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
            padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=room,
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                repetition_penalty=1.0,
                eos_token_id=sorted(stops) or None,
                pad_token_id=padding,
            )
            new = output[0, ids.shape[1] :].tolist()
            ended = bool(new) and new[-1] in stops
            text = tokenizer.decode(new, skip_special_tokens=True)
            written.append(Continuation(prompt, text, len(new), ended, loops(text)))
            step()
    return Generation(
        _mean([distinct(each.text, 2) for each in written]),
        _mean([distinct(each.text, 3) for each in written]),
        _mean([float(each.loops) for each in written]),
        _mean([float(each.tokens) for each in written]),
        _mean([float(each.ended) for each in written]),
        tuple(written),
    )


def prompt_rooms(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] = PROMPTS,
    *,
    tokens: int = TOKENS,
) -> list[int]:
    """How many tokens may follow each prompt. Raises UserError when the model's context ends before the first."""
    limit = context_limit(model)
    if limit is None:
        return [tokens] * len(prompts)
    lengths = [len(tokenizer(prompt).input_ids) for prompt in prompts]
    if max(lengths) >= limit:
        raise UserError(
            f"a prompt to be continued has {max(lengths)} tokens, and the model reads {limit} at most: leave out "
            "--generate and --suite quick."
        )
    return [min(tokens, limit - length) for length in lengths]


def distinct(text: str, run: int) -> float:
    """Different runs of `run` words among all; 1 for a text that is too short to have two."""
    words = text.split()
    runs = [tuple(words[start : start + run]) for start in range(len(words) - run + 1)]
    return len(set(runs)) / len(runs) if runs else 1.0


def loops(text: str) -> bool:
    """Whether the text ends in one run of words, three times or more in a row; after these it may be cut off within the
    run, and within a word.
    """
    words = text.split()
    for period in range(1, len(words) // LOOP + 1):
        # a last word that was cut off begins the word that would follow
        for whole, rest in ((words, ""), (words[:-1], words[-1])):
            tail = whole[-LOOP * period :]
            repeated = len(tail) == LOOP * period and tail[period:] == tail[:-period]
            if repeated and tail[-period].startswith(rest):
                return True
    return False


def _stops(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    told = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = told if isinstance(told, list) else [told, tokenizer.eos_token_id]
    return frozenset(token for token in ids if token is not None)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
