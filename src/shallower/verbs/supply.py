"""What text sources need from a model and from the package index: text the model samples, and the demo's passages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from shallower.checkpoint.demo_files import demo_text
from shallower.corpus import Supply, adds_bos
from shallower.corpus.build import pad_id
from shallower.errors import CorpusError

_AT_ONCE = 16  # texts
_EMPTY_BATCHES = 4  # in a row, after which a model is taken to say nothing


def supply(model: PreTrainedModel | None = None, tokenizer: PreTrainedTokenizerBase | None = None) -> Supply:
    """The demo's texts by the names of domains, and, with a model and its tokenizer, the model's own."""
    texts = {"wiki": partial(demo_text, "calibration"), "science": partial(demo_text, "science")}
    if model is None or tokenizer is None:
        return Supply(texts=texts)
    return Supply(partial(sample, model, tokenizer), texts)


def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, start: str, *, tokens: int, seed: int
) -> Iterator[str]:
    """Texts that the model samples, at temperature 1 from its whole distribution (LLM-QAT, arXiv:2305.17888).

    start: `bos`, `token` (a random one of the vocabulary that is not special, as in LLM-QAT), or `auto`: BOS if the
    tokenizer adds one itself. A text ends at EOS or after `tokens` tokens. The same seed gives the same texts on one
    machine; a saved set is what gives the same bytes elsewhere.

    Raises CorpusError for `bos` without one, and for a model that says nothing.
    """
    begins_with_bos = start == "bos" or (start == "auto" and adds_bos(tokenizer))
    if begins_with_bos and tokenizer.bos_token_id is None:
        raise CorpusError("self:bos was asked for, but the tokenizer has no BOS token: use self:token.")
    special = set(tokenizer.all_special_ids)
    ordinary = torch.tensor([token for token in range(len(tokenizer)) if token not in special])
    generator = torch.Generator().manual_seed(seed)
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    end = tokenizer.eos_token_id if ends is None else ends
    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max(1, tokens - 1),
        eos_token_id=end,
        pad_token_id=pad_id(tokenizer),
    )
    empty = 0
    for number in count():
        if begins_with_bos:
            first = torch.full((_AT_ONCE,), int(tokenizer.bos_token_id))
        else:
            first = ordinary[torch.randint(len(ordinary), (_AT_ONCE,), generator=generator)]
        prompt = first[:, None].to(model.device)
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.inference_mode(), _nothing_else(model, settings):
            torch.manual_seed(seed * 1_000_003 + number)
            ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
        texts = [text for text in tokenizer.batch_decode(ids, skip_special_tokens=True) if text.strip()]
        empty = 0 if texts else empty + 1
        if empty == _EMPTY_BATCHES:
            raise CorpusError(f"the model says nothing when it begins with {start}: give calibration text instead.")
        yield from texts


@contextmanager
def _nothing_else(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """The model generates by these settings alone: what they leave open, such as penalties and tokens that may not be
    said, would come from its own.
    """
    own = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = own
