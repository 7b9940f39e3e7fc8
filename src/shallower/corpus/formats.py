"""What becomes of rows that are more than text: chats in the model's own template, and few-shot prompts of a task."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

from shallower.corpus.bos import adds_bos
from shallower.corpus.questions import is_question, solved
from shallower.corpus.sources import Document, encodable
from shallower.errors import CorpusError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Format = Literal["text", "chat", "few-shot"]
_TODAY = datetime(2024, 7, 26)  # in every chat: Llama's templates take it where they cannot ask for the day
_ASKS_DAY = re.compile(r"""strftime_now\s*\(\s*(?:format\s*=\s*)?(["'])(.*?)\1\s*\)""")


@dataclass(frozen=True)
class Formatted:
    """A text with the rows it is made of. as_asked: it is a chat, or a prompt; else it is the row's plain text."""

    document: Document
    rows: tuple[Document, ...]
    as_asked: bool


def formatted(
    documents: Iterable[Document], form: Format, shots: int, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Formatted]:
    """Documents as `form` wants them; see `_chats` and `_few_shot`."""
    if form == "chat":
        return _chats(documents, tokenizer)
    if form == "few-shot":
        return _few_shot(documents, shots)
    return (Formatted(document, (document,), True) for document in documents)


def _chats(documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase) -> Iterator[Formatted]:
    """Rows of `messages`, of instruction and output, or of question and answer, in the chat template; others as text.

    A BOS that the template writes is left out: where BOS goes is the set's own matter.

    Raises CorpusError when the tokenizer has no chat template, or refuses a row.
    """
    if not tokenizer.chat_template:
        raise CorpusError("format=chat needs a chat template, and this model's tokenizer has none: use format=text.")
    for document in documents:
        turns = conversation(document.record or {})
        if not turns:
            yield Formatted(document, (document,), False)
            continue
        text = templated(tokenizer, turns, document.id)
        if adds_bos(tokenizer):  # else what looks like one, <|im_start|> for instance, belongs to the template
            text = text.removeprefix(str(tokenizer.bos_token))
        yield Formatted(replace(document, text=text), (document,), True)


def templated(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], where: str, *, asks: bool = False
) -> str:
    """A conversation in the tokenizer's chat template. asks: it ends where the answer would begin.

    A template that writes the day writes the same on any day, so that one text has one digest, and a training that was
    begun yesterday goes on.

    Raises CorpusError, which names the row by `where`, when the template refuses it.
    """
    try:
        template = _dated(tokenizer.get_chat_template())
        return str(
            tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, add_generation_prompt=asks)
        )
    # a template is a program of the model's author and raises what it likes
    except Exception as error:
        reason = first_line(error).rstrip(".")
        roles = ", ".join(turn["role"] for turn in turns)
        raise CorpusError(
            f"{where}: the model's chat template refuses a conversation of {roles} ({reason}): change the row, or "
            "leave it out."
        ) from error


def _dated(template: str) -> str:
    """The template with `_TODAY` where it asks for the day, written out: transformers lets nobody else answer."""
    return _ASKS_DAY.sub(lambda call: f"{call[1]}{_TODAY.strftime(call[2])}{call[1]}", template)


def _few_shot(documents: Iterable[Document], shots: int) -> Iterator[Formatted]:
    """Prompts of `shots` solved questions and one more, of rows that follow each other; other rows as text.

    So the questions of one subject stand together if they do in the file. Questions at the end that are too few for a
    prompt are left out.

    Raises CorpusError for a question that lacks its choices or answer, and at the end when there are too few for one
    prompt.
    """
    waiting: list[tuple[Document, str]] = []
    prompts, questions, name = 0, 0, ""
    for document in documents:
        if document.record is None or not is_question(document.record):
            yield Formatted(document, (document,), False)
            continue
        name = document.source
        questions += 1
        waiting.append((document, solved(document.record, document.id)))
        if len(waiting) > shots:
            prompts += 1
            rows = tuple(row for row, _ in waiting)
            yield Formatted(replace(rows[0], text="\n\n".join(text for _, text in waiting)), rows, True)
            waiting = []
    if questions and not prompts:
        raise CorpusError(
            f"{name} holds {questions} questions, but a prompt of {shots} shots needs {shots + 1}: use fewer shots, "
            "another file, or format=text."
        )


def conversation(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """The turns, `role` and `content`, of a row of `messages`, instruction and output, or question and answer.

    Empty when the row is none of these. An answer that is null is an empty one.
    """
    record = {name: "" if value is None else value for name, value in record.items()}
    messages = record.get("messages")
    if isinstance(messages, list) and messages:
        turns = [*messages[:-1], _answer(messages[-1])]
        if all(map(_is_turn, turns)):
            return [{"role": turn["role"], "content": encodable(turn["content"])} for turn in turns]
    if record.get("instruction") and isinstance(record.get("output"), str):
        asked = "\n\n".join(str(part) for part in (record["instruction"], record.get("input")) if part)
        return _exchange(asked, record["output"])
    if record.get("question") and isinstance(record.get("answer"), str):
        return _exchange(str(record["question"]), record["answer"])
    return []


def _answer(turn: Any) -> Any:
    """The last turn, which says nothing where its content is null."""
    return {**turn, "content": ""} if isinstance(turn, Mapping) and turn.get("content", "") is None else turn


def _is_turn(turn: Any) -> bool:
    """Whether it is text that somebody said; content in parts (images, calls of tools) is not."""
    return isinstance(turn, Mapping) and all(isinstance(turn.get(key), str) for key in ("role", "content"))


def _exchange(asked: str, answered: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": encodable(asked)}, {"role": "assistant", "content": encodable(answered)}]
