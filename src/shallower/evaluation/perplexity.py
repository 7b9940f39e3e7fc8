"""Perplexity of a text: windows, stride, token-weighted sums in float64.

The text is tokenised as a whole, or as far as its windows are read, without special tokens. Windows start `stride`
tokens apart. Each token is scored once, in the first window that reaches it, unless nothing of the text stands before
it in that window. So the text's first token is never scored, and with windows side by side (the default) neither is the
first of each window. The last, shorter window counts too. Perplexity is the exponential of the mean over scored tokens,
not of window means.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from shallower import progress
from shallower.checkpoint.stock import evaluating
from shallower.corpus.bos import resolve_bos
from shallower.corpus.calibration import padded
from shallower.defaults import WINDOW
from shallower.engine.likelihood import perplexity_of
from shallower.errors import CorpusError, ModelError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WindowBos = Literal["auto", "each-sequence", "none"]

_ROWS = 256  # logits in float32 at a time: 256 × 150,000 × 4 bytes = 150 MB
_BEGINNING = 10_000  # characters of a text that are encoded at least


@dataclass(frozen=True)
class Perplexity:
    """Mean loss of a text.

    nll: nats a token. stderr: standard error of `nll`, from the spread between windows; None for one window.
    tokens: scored tokens. bytes: UTF-8 bytes of their text (exact for text, close for token ids). sums, counts: the
    loss and the scored tokens of each window.
    """

    nll: float
    stderr: float | None
    tokens: int
    windows: int
    bytes: int
    sums: tuple[float, ...] = field(default=(), repr=False)
    counts: tuple[int, ...] = field(default=(), repr=False)

    @property
    def perplexity(self) -> float:
        return perplexity_of(self.nll)

    @property
    def bits_per_byte(self) -> float:
        """Comparable between models with different tokenizers; nan when the scored tokens have no text."""
        return self.nll * self.tokens / math.log(2) / self.bytes if self.bytes else math.nan

    def to_json(self) -> dict[str, Any]:
        """Without the windows."""
        names = ("nll", "stderr", "tokens", "windows", "bytes", "perplexity", "bits_per_byte")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Window:
    """Tokens [start, stop) of the text, of which [scored, stop) are scored."""

    start: int
    scored: int
    stop: int


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Tensor,
    *,
    window: int = WINDOW,
    stride: int | None = None,
    batch_size: int = 1,
    bos: WindowBos = "auto",
    max_windows: int | None = None,
    label: str = "",
) -> Perplexity:
    """Measure the perplexity of `text`. `batch_size` and `bos` are for callers from Python; no verb sets them.

    Args:
        model: A causal language model; it is left in the mode (training or not) it was in.
        tokenizer: The model's tokenizer.
        text: A string, or token ids (int64 [tokens], without special tokens).
        window: Tokens the model sees at once, BOS included.
        stride: Tokens between the starts of windows; the window's room when None.
        batch_size: Windows at once.
        bos: `each-sequence` puts a BOS before each window (not scored, and no ground for scoring the token after it);
            `auto` does so if the tokenizer itself adds one.
        max_windows: Stop after that many windows.
        label: What progress calls this measurement, such as the model and the text.

    Raises:
        UserError: A window the model cannot hold, or a stride that would leave text out.
        CorpusError: Less than two tokens of text, or ids the model does not have.
    """
    text_windows = cut_windows(
        model, tokenizer, text, window=window, stride=stride, batch_size=batch_size, bos=bos, max_windows=max_windows
    )
    windows = text_windows.windows
    sums: list[float] = []
    with (
        evaluating(model),
        torch.inference_mode(),
        progress.task(f"perplexity {label}".rstrip(), total=len(windows)) as step,
    ):
        for start in range(0, len(windows), batch_size):
            batch = windows[start : start + batch_size]
            sums += _window_sums(model, text_windows.ids, batch, text_windows.bos)
            step(len(batch))
    return text_windows.summed_up(sums)


@dataclass(frozen=True, eq=False)
class TextWindows:
    """A text, cut into windows. ids: int64 [tokens]. bos: what is put before each window. bytes: of what is scored."""

    ids: Tensor
    windows: tuple[Window, ...]
    bos: int | None
    bytes: int

    @property
    def asked(self) -> list[tuple[list[int], list[int]]]:
        """For each window what the model reads, and what its last positions should predict."""
        opening = [] if self.bos is None else [self.bos]
        return [
            (opening + self.ids[part.start : part.stop - 1].tolist(), self.ids[part.scored : part.stop].tolist())
            for part in self.windows
        ]

    def summed_up(self, sums: Sequence[float]) -> Perplexity:
        """sums: the loss of each window, in nats."""
        counts = tuple(part.stop - part.scored for part in self.windows)
        mean = math.fsum(sums) / sum(counts)
        error = _standard_error(sums, counts, mean)
        return Perplexity(mean, error, sum(counts), len(counts), self.bytes, tuple(sums), counts)


def cut_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Tensor,
    *,
    window: int = WINDOW,
    stride: int | None = None,
    batch_size: int = 1,
    bos: WindowBos = "auto",
    max_windows: int | None = None,
) -> TextWindows:
    """The windows that `perplexity` reads; takes and raises what it does."""
    _, bos_id = resolve_bos(tokenizer, bos)
    room = window - (bos_id is not None)
    _check(model, window, room, stride, batch_size, max_windows)
    step = min(stride or room, room)
    ids, ends = _encoded(tokenizer, text, None if max_windows is None else (max_windows - 1) * step + room)
    if len(ids) < 2:
        raise CorpusError(f"the evaluation text has {len(ids)} tokens; a loss needs at least 2: use a longer text.")
    embeddings = model.get_input_embeddings().weight
    if int(ids.max()) >= embeddings.shape[0]:
        raise CorpusError(
            f"the text has the token id {int(ids.max())}, but the model ends at {embeddings.shape[0] - 1}: the "
            "tokenizer is another model's."
        )
    windows = tuple(islice(_windows(len(ids), room, step), max_windows))
    return TextWindows(ids, windows, bos_id, _scored_bytes(tokenizer, text, ids, ends, windows))


def first_ids(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int | None) -> tuple[Tensor, Sequence[int] | None]:
    """Ids of the text's first `tokens` tokens, or of all (int64 [tokens]), and if the tokenizer tells, where in the
    text each of them ends, in characters.

    Of a long text only a beginning with twice as many tokens is encoded: where a token ends can depend on what follows,
    but not on what follows so far behind.
    """
    fast = bool(tokenizer.is_fast)
    size = len(text) if tokens is None else max(_BEGINNING, 10 * tokens)
    while True:
        encoded = tokenizer(text[:size], add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
        if tokens is None or size >= len(text) or len(encoded["input_ids"]) >= 2 * tokens:
            break
        size *= 2
    ids = torch.tensor(encoded["input_ids"][:tokens], dtype=torch.int64)
    return ids, [end for _, end in encoded["offset_mapping"][:tokens]] if fast else None


def context_limit(model: PreTrainedModel) -> int | None:
    """Most positions the model can take, or None if its config sets no limit (ALiBi, recurrent)."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "max_seq_len"):
        limit = getattr(config, name, None)
        if isinstance(limit, int) and limit > 0:
            return limit
    return None


def require_stride(window: int, stride: int | None) -> None:
    """Raise UserError for a stride that would leave text out."""
    if stride is not None and not 1 <= stride <= window:
        raise UserError(f"stride={stride} must be between 1 and the window, {window}, or text would be left out.")


def _check(
    model: PreTrainedModel, window: int, room: int, stride: int | None, batch_size: int, max_windows: int | None
) -> None:
    limit = context_limit(model)
    if limit is not None and window > limit:
        raise UserError(
            f"window={window} is longer than the {limit} positions the model has: use window={limit} or less."
        )
    if room < 2:
        raise UserError(
            f"window={window} leaves room for {room} tokens of text; use a window of at least {2 + window - room}."
        )
    require_stride(window, stride)
    for name, value in (("batch_size", batch_size), ("max_windows", max_windows)):
        if value is not None and value < 1:
            raise UserError(f"{name}={value} must be at least 1.")


def _encoded(
    tokenizer: PreTrainedTokenizerBase, text: str | Tensor, tokens: int | None
) -> tuple[Tensor, Sequence[int] | None]:
    """`first_ids` of a text; ids as they are."""
    if not isinstance(text, str):
        if text.dtype != torch.int64 or (text.ndim != 1 and text.shape[0] != 1):
            raise CorpusError(
                f"evaluation ids are {text.dtype} of shape {list(text.shape)}; they must be int64 [tokens]."
            )
        return text.detach().cpu().reshape(-1), None
    return first_ids(tokenizer, text, tokens)


def _windows(tokens: int, room: int, stride: int) -> Iterator[Window]:
    reached = 1
    for start in range(0, tokens, stride):
        stop = min(start + room, tokens)
        scored = max(start + 1, reached)
        if scored < stop:
            yield Window(start, scored, stop)
        reached = stop
        if stop == tokens:
            return


def _window_sums(model: PreTrainedModel, ids: Tensor, windows: Sequence[Window], bos: int | None) -> list[float]:
    """Sum of the loss over each window's scored tokens, in nats."""
    opening = [] if bos is None else [bos]
    batch, mask = padded([[*opening, *ids[part.start : part.stop].tolist()] for part in windows], 0)
    given: dict[str, Any] = {} if bool(mask.all()) else {"attention_mask": mask.to(model.device)}
    output = model(input_ids=batch.to(model.device), use_cache=False, **given)
    if output.logits is None:
        raise ModelError(f"{type(model).__name__} gives no logits; perplexity needs a causal language model.")
    sums = []
    for part, logits in zip(windows, output.logits, strict=True):
        before = part.scored - part.start + len(opening) - 1  # the position that predicts the first scored token
        targets = ids[part.scored : part.stop].to(logits.device)
        sums.append(_summed_nll(logits[before : before + len(targets)], targets))
    return sums


def _summed_nll(logits: Tensor, targets: Tensor) -> float:
    """Sum of −log p(target). logits: any float type [tokens, vocabulary]; targets: int64 [tokens]."""
    total = 0.0
    for start in range(0, len(targets), _ROWS):
        rows = logits[start : start + _ROWS].float()
        chosen = rows.gather(1, targets[start : start + _ROWS, None])[:, 0]
        total += float((rows.logsumexp(dim=-1) - chosen).sum(dtype=torch.float64))
    return total


def _scored_bytes(
    tokenizer: PreTrainedTokenizerBase,
    text: str | Tensor,
    ids: Tensor,
    ends: Sequence[int] | None,
    windows: Sequence[Window],
) -> int:
    """Exact for text; ids are decoded, run by run of scored tokens, which may split a character at a run's ends."""
    if isinstance(text, str) and ends is not None:
        scored = (text[ends[part.scored - 1] : ends[part.stop - 1]] for part in windows)
        return sum(len(piece.encode("utf-8", errors="surrogatepass")) for piece in scored)
    runs: list[list[int]] = []
    for part in windows:
        if runs and runs[-1][1] == part.scored:
            runs[-1][1] = part.stop
        else:
            runs.append([part.scored, part.stop])
    return sum(len(tokenizer.decode(ids[start:stop].tolist()).encode()) for start, stop in runs)


def _standard_error(sums: Sequence[float], counts: Sequence[int], mean: float) -> float | None:
    """Of a ratio of sums: windows are the independent draws, weighted by their tokens."""
    if len(sums) < 2:
        return None
    spread = math.fsum((total - mean * count) ** 2 for total, count in zip(sums, counts, strict=True))
    return math.sqrt(spread * len(sums) / (len(sums) - 1)) / sum(counts)
