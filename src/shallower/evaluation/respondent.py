"""A model that answers lm-eval's requests: its own `HFLM`, which remembers answers and survives a full memory.

Every form of a model answers through its own forward and `generate`, as stock software would run it: what lm-eval does
with `--model hf` on the same checkpoint gives the same scores.
"""

from __future__ import annotations

import copy
import gc
import inspect
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from shallower import progress
from shallower.checkpoint.determinants import determinants
from shallower.checkpoint.stock import evaluating
from shallower.engine.workers import usual_memory
from shallower.errors import ModelError, UserError, out_of_memory
from shallower.evaluation.answered import Answered, digest
from shallower.evaluation.harness import quiet_harness

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Response = tuple[float, bool]  # the log-likelihood, and whether the model would have said just that
Encoded = tuple[Any, list[int], list[int]]  # as lm-eval passes them: what was asked, context and continuation in ids

WRITTEN_TOGETHER = 8  # texts
MOST_BATCH = 64
LOGIT_BYTES = 512 << 20  # on a processor: beyond it a larger batch is not faster
COPIES = 10  # bytes a logit takes: in the model's precision, its log-softmax and a copy

_T = TypeVar("_T")


class Respondent(HFLM):  # type: ignore[misc]
    """Answers requests with a model, a batch at a time; what was answered before comes from `answered`."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch: int | None = None,
        answered: Answered | None = None,
        truncate: bool = False,
        label: str = "",
    ) -> None:
        """batch: rows at a time, as many as fit by default. truncate: cut prompts that are longer than the model's
        context from the left, as lm-eval does, instead of refusing them. label: what progress calls the model.

        Raises ModelError for a tokenizer without a token to begin a text with.
        """
        own = copy.deepcopy(tokenizer)  # lm-eval gives it a padding token
        with quiet_harness(), evaluating(model):
            super().__init__(pretrained=model, tokenizer=own, batch_size=batch or 1)
        if self.prefix_token_id is None:
            raise ModelError(
                f"the tokenizer of {label or 'the model'} has neither a BOS nor an EOS token, and lm-eval reads what "
                "has no prompt after one: name one in its tokenizer_config.json, or leave the tasks out."
            )
        self.batch = batch
        self.answered = answered
        self.truncate = truncate
        self.label = label
        self.cut: set[tuple[str, int]] = set()  # prompts, by task and item: each may have been asked with many choices
        self._asked: Sequence[Any] = ()
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._keep: int | None = None

    @cached_property
    def context(self) -> str:
        """What an answer depends on besides the request. All weights are read for it: only where answers are kept."""
        return context_of(self.model)

    @cached_property
    def _tokens(self) -> str:
        """Which texts the ids stand for, and where a text ends."""
        return digest(_of_tokenizer(self.tokenizer), self.eot_token_id, self.tokenizer.pad_token_id)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[Response]:
        self._asked = requests
        return list(super().loglikelihood(requests, disable_tqdm=True))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        self._asked = ()  # lm-eval cuts these into windows that fit
        self.batch_size_per_gpu = sys.maxsize  # all in one call, which finds out how many fit
        return list(super().loglikelihood_rolling(requests, disable_tqdm=True))

    def _loglikelihood_tokens(
        self, requests: Sequence[Encoded], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[Response]:
        keys = [digest("loglikelihood", context, continuation) for _, context, continuation in requests]
        for place, (_, context, continuation) in enumerate(requests):
            if not continuation:
                self._refuse(place, "has a choice of which the tokenizer makes no token; it cannot be scored")
            if len(continuation) > self.max_length:  # cut from the left it would be another choice
                self._refuse(
                    place,
                    f"has a choice of {len(continuation):,} tokens, but the model reads {self.max_length:,} at most: "
                    "leave the task out",
                )
            if len(context) + len(continuation) > self.max_length + 1:
                self._too_long(place, len(context) + len(continuation) - 1)
        known = self._recall(keys)
        # the longest first, so that a full memory shows at once; what shares all but its last token side by side
        order = sorted(range(len(requests)), key=lambda at: (-len(requests[at][1] + requests[at][2]), requests[at][1:]))
        todo: dict[str, Encoded] = {keys[at]: requests[at] for at in order if keys[at] not in known}
        with progress.task(f"{self.label} answering".strip(), total=len(set(keys))) as step:
            step(len(set(keys)) - len(todo))
            for part in self._answers(todo):
                known |= part
                self._remember(part)
                step(len(part))
        return [(float(known[key][0]), bool(known[key][1])) for key in keys]

    def _answers(self, todo: dict[str, Encoded]) -> Iterator[dict[str, Response]]:
        """Answers by key, some at a time."""
        while todo:
            longest = next(iter(todo.values()))
            rows = self._rows(len(longest[1]) + len(longest[2]))
            part: dict[str, Encoded] = {}
            distinct: set[tuple[int, ...]] = set()  # lm-eval runs what differs in the last token only once
            for key, (_, context, continuation) in todo.items():
                distinct.add(tuple(context + continuation[:-1]))
                if len(distinct) > rows:
                    break
                part[key] = todo[key]
            for key in part:
                del todo[key]

            def answer(size: int, part: dict[str, Encoded] = part) -> list[Response]:
                self.batch_size_per_gpu = size
                self._keep = _positions(part.values())
                # named, as a nested function has no super() of its own
                return list(HFLM._loglikelihood_tokens(self, list(part.values()), disable_tqdm=True))

            yield dict(zip(part, self._within_memory(answer, rows), strict=True))

    def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
        """Logits of the last positions only, where the model can leave the others out: lm-eval counts from the end."""
        if self._keep is None or not self._keeps or attn_mask is not None:
            logits: torch.Tensor = super()._model_call(inps, attn_mask, labels)
            return logits
        with torch.no_grad():
            logits = self.model(inps, logits_to_keep=min(self._keep, inps.shape[1])).logits
        return logits

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        found: dict[int, str] = {}
        todo: dict[int, str] = {}
        keys = []
        sampled: set[int] = set()
        if self.eot_token_id is None:
            raise ModelError(
                f"the tokenizer of {self.label or 'the model'} has no EOS token, with which lm-eval ends what is "
                "written: name one in its tokenizer_config.json, or leave out tasks whose answers are written."
            )
        own = _of_generation(self.model)
        self._asked = requests
        for place, request in enumerate(requests):
            text, given = request.args
            arguments = normalize_gen_kwargs(given, self.max_gen_toks)
            ids = self.tok_encode(text)
            room = self.max_length - arguments["max_gen_toks"]
            if room < 1:
                self._refuse(
                    place,
                    f"takes answers of up to {arguments['max_gen_toks']:,} tokens, which leaves no room for a prompt "
                    f"in the {self.max_length:,} tokens that the model reads at most: leave the task out",
                )
            if len(ids) > room:
                self._too_long(place, len(ids), room)
            if arguments["do_sample"]:
                sampled.add(place)
            keys.append(digest("generate", ids, arguments, own, self._tokens))
        known = self._recall([key for place, key in enumerate(keys) if place not in sampled])
        for place, key in enumerate(keys):
            if place not in sampled and key in known:
                found[place] = str(known[key])
            else:
                todo[place] = key
        with progress.task(f"{self.label} writing".strip(), total=len(requests)) as step:
            step(len(found))
            # what is drawn comes last, and alone: what else is known already must not change who is drawn with whom
            places = sorted(todo, key=lambda place: place in sampled)
            usual = self.batch or WRITTEN_TOGETHER
            while places:
                drawn = places[0] in sampled
                rows = usual if drawn else self.batch or WRITTEN_TOGETHER  # fewer once memory was full
                part = [place for place in places[:rows] if (place in sampled) == drawn]
                places = places[len(part) :]

                def write(size: int, part: list[int] = part) -> list[str]:
                    self.batch_size_per_gpu = size
                    return list(HFLM.generate_until(self, [requests[place] for place in part], disable_tqdm=True))

                written = dict(zip(part, self._within_memory(write, rows), strict=True))
                found |= written
                self._remember({todo[place]: text for place, text in written.items() if place not in sampled})
                step(len(part))
        return [found[place] for place in range(len(requests))]

    def _rows(self, length: int) -> int:
        """How many rows of `length` tokens go through the model at a time."""
        if self.batch is not None:
            return self.batch
        room = usual_memory(self.model)
        if self.model.device.type == "cpu":
            room = min(room, LOGIT_BYTES)
        vocabulary = self.model.get_input_embeddings().num_embeddings
        return max(1, min(MOST_BATCH, int(room // (COPIES * vocabulary * length))))

    def _within_memory(self, run: Callable[[int], _T], rows: int) -> _T:
        """`run(rows)`, with half as many rows for as long as memory does not suffice.

        Raises ModelError when it does not suffice for one.
        """
        while True:
            try:
                return run(rows)
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                if rows == 1:
                    raise ModelError(
                        f"{self.label or 'the model'} runs out of memory with one row at a time; choose another "
                        "--device, a smaller --dtype, or tasks with shorter prompts (--fewshot)."
                    ) from error
            rows //= 2
            self.batch = rows
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            progress.note(f"{self.label or 'The model'} ran out of memory; going on with {rows} rows at a time.")

    def _too_long(self, place: int, tokens: int, room: int | None = None) -> None:
        if self.truncate:
            asked = self._asked[place]
            self.cut.add((asked.task_name, asked.doc_id))
            return
        limit = self.max_length if room is None else room
        self._refuse(
            place,
            f"is {tokens:,} tokens long, but the model reads {limit:,} at most: take fewer examples (--fewshot), leave "
            "the task out, or add --truncate to cut such prompts from the left, as lm-eval does",
        )

    def _refuse(self, place: int, what: str) -> None:
        asked = self._asked[place] if place < len(self._asked) else None
        where = "a request" if asked is None else f"item {asked.doc_id} of task {asked.task_name}"
        raise UserError(f"{where} {what}.")

    def _recall(self, keys: Sequence[str]) -> dict[str, Any]:
        return {} if self.answered is None else self.answered.read(self.context, keys)

    def _remember(self, answers: dict[str, Any]) -> None:
        """Keep what is an answer: not what is no number, as of a model that overflows."""
        held = {key: one for key, one in answers.items() if isinstance(one, str) or not math.isnan(one[0])}
        if self.answered is not None and held:
            self.answered.write(self.context, held)


def _positions(requests: Iterable[Encoded]) -> int:
    """How many positions, from the end of rows that are filled up at the right, predict a token of a continuation."""
    read = [(len(context) + len(continuation) - 1, len(continuation)) for _, context, continuation in requests]
    longest = max(length for length, _ in read)
    return max(longest - length + scored for length, scored in read)


def context_of(model: PreTrainedModel) -> str:
    """Digest of what an answer depends on besides the request: weights, configuration, precision, device."""
    return digest(*determinants(model))


def _of_generation(model: PreTrainedModel) -> str:
    """What `generate` obeys besides its arguments, such as a penalty for repetition."""
    own = model.generation_config
    return "" if own is None else str(own.to_json_string(ignore_metadata=True))


def _of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of how a tokenizer reads and writes text."""
    if tokenizer.is_fast:
        told = json.loads(tokenizer.backend_tokenizer.to_str())
        # these two are set anew with every batch
        state = {name: value for name, value in told.items() if name not in ("padding", "truncation")}
    else:
        state = {type(tokenizer).__name__: tokenizer.get_vocab()}
    return digest(state, tokenizer.all_special_ids, getattr(tokenizer, "clean_up_tokenization_spaces", None))
