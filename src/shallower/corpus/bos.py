"""Where a beginning-of-sequence token goes. A model trained with one at position 0 reads text without it much worse."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from shallower.errors import CorpusError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Bos = Literal["auto", "each-sequence", "each-document", "none"]
ResolvedBos = Literal["each-sequence", "each-document", "none"]


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts a BOS first when it encodes (tried on a string: flags and templates disagree)."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return False
    with_special = tokenizer("a")["input_ids"]
    without = tokenizer("a", add_special_tokens=False)["input_ids"]
    return bool(with_special[:1] == [bos] and without[:1] != [bos])


def resolve_bos(tokenizer: PreTrainedTokenizerBase, bos: Bos) -> tuple[ResolvedBos, int | None]:
    """Turn `auto` into `each-sequence` or `none`, and give the token id (None for `none`).

    Raises CorpusError when a BOS is asked for and the tokenizer has none.
    """
    detected: ResolvedBos = "each-sequence" if adds_bos(tokenizer) else "none"
    resolved = detected if bos == "auto" else bos
    if resolved == "none":
        return resolved, None
    if tokenizer.bos_token_id is None:
        raise CorpusError(f"bos={bos!r} was asked for, but the tokenizer has no BOS token: use bos=auto or bos=none.")
    return resolved, int(tokenizer.bos_token_id)
