"""How well a model gives the answers of conversations that it is not trained on."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from shallower import progress
from shallower.corpus.instructions import InstructionSet
from shallower.engine.likelihood import perplexity_of
from shallower.training.feed import Feed

HELD_OUT = 20  # one conversation in so many is kept from training
FEWEST = 4  # held-out conversations; fewer say too little
AT_ONCE = 1024  # tokens, as all of their logits are in memory


def split(conversations: InstructionSet) -> tuple[InstructionSet, InstructionSet | None]:
    """Conversations to train on, and those to measure on: every 20th, without copies of these in either; None where
    that makes fewer than four, or leaves none to train on.
    """
    said = [ids.numpy().tobytes() for ids in conversations.input_ids]
    held: dict[bytes, int] = {}
    for row in range(HELD_OUT - 1, len(said), HELD_OUT):
        held.setdefault(said[row], row)
    rest = [row for row, words in enumerate(said) if words not in held]
    if len(held) < FEWEST or not rest:
        return conversations, None
    return conversations.subset(rest), conversations.subset([*held.values()])


@torch.no_grad()
def answer_perplexity(model: PreTrainedModel, conversations: InstructionSet) -> float:
    """Exponential of the mean loss over the answers' tokens."""
    feed = Feed(conversations, 1, AT_ONCE, seed=0)
    rows = tuple(range(conversations.sequences))
    total = 0.0
    with progress.task("measuring answers that nothing is trained on", len(rows)) as step:
        for portion in feed.portions(rows):
            given = {"input_ids": portion.input_ids, "attention_mask": portion.attention_mask}
            logits = model(**{name: ids.to(model.device) for name, ids in given.items()}, use_cache=False).logits
            counts = portion.scored[:, 1:]
            scored = logits[:, :-1][counts.to(logits.device)].float()
            total += float(cross_entropy(scored, portion.input_ids[:, 1:][counts].to(logits.device), reduction="sum"))
            step(len(portion.rows))
    return perplexity_of(total / feed.scored(rows))
