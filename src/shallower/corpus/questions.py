"""Multiple-choice questions from a .jsonl file, and the text that a model is given of each.

    {"question": …, "choices": […], "gold": 2}       Question: …⏎Answer: CHOICE           (ARC, OpenBookQA, MMLU)
    {"goal": …, "choices": […], "gold": 0}           the same                             (PIQA)
    {"passage": …, "question": …, "answer": true}    PASSAGE⏎Question: …?⏎Answer: yes     (BoolQ; no is choice 0)
    {"context": …, "question": …, …}                 CONTEXT⏎Question: …⏎Answer: CHOICE
    {"context": …, "choices": […], "gold": 1}        … CHOICE
    {"ctx": …, "endings": […], "gold": 3}            LABEL: … ENDING, without [marks]     (HellaSwag)
    {"sentence": "… _ …", "choices": […], "gold": 0} the choice in the blank; what follows it is scored (WinoGrande)

`endings` may stand for `choices`, a `passage` before any question, and other fields are not read. These prompts are for
calibration: what a benchmark reports is defined by its own harness.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shallower.corpus.sources import encodable, json_records, text_of_record
from shallower.errors import CorpusError

ASKING = ("sentence", "ctx", "context", "goal", "question")
EXAMPLE = '{"question": "…", "choices": ["…", "…"], "gold": 0}'
_MARK = re.compile(r"\[.*?\]")


@dataclass(frozen=True)
class Question:
    """text: the row as a text source reads it, by which parts are told there as well. prompts: for each choice what the
    model reads, and what of it is scored after that. gold: which choice is right, from 0.
    """

    text: str
    prompts: tuple[tuple[str, str], ...]
    gold: int


def read_questions(path: Path) -> Iterator[tuple[int, Question]]:
    """Each question of the file with its line, counted from 1.

    Raises CorpusError for a file that is not JSON lines or is empty, and for the first row that is not a question.
    """
    number = 0
    for number, record in json_records(path):
        yield number, _question(record, f"{path}, line {number}")
    if not number:
        raise CorpusError(f"{path} is empty: it holds no question. Write one a line, as in {EXAMPLE}.")


def is_question(record: Mapping[str, Any]) -> bool:
    """Whether a row has the fields of a question with its answer."""
    choices = "choices" in record or "endings" in record
    if choices or isinstance(record.get("answer"), bool):
        return any(name in record for name in ASKING)
    return "question" in record and isinstance(record.get("answer"), str)


def solved(record: Mapping[str, Any], where: str) -> str:
    """The question with its right answer, as an example to learn from.

    Raises CorpusError for a row that is not a question.
    """
    if isinstance(record.get("answer"), str) and not ("choices" in record or "endings" in record):
        asked, answer = (_text(record.get(name), name, where) for name in ("question", "answer"))
        return f"{_asking(record, asked)} {answer}"
    question = _question(record, where)
    return "".join(question.prompts[question.gold])


def _question(record: Mapping[str, Any], where: str) -> Question:
    field = next((name for name in ASKING if name in record), None)
    if field == "context" and _is_said(record.get("question")):
        field = "question"
    if field is None:
        raise CorpusError(
            f"{where} asks nothing: it has the fields {', '.join(record)}, but none of {', '.join(ASKING)}. Write "
            f"rows such as {EXAMPLE}."
        )
    text = _text(record[field], field, where)
    whole = _as_document(record, where) or text
    choices, gold = _choices(record, where)
    if field == "sentence":
        return Question(whole, _in_blank(text, choices, where), gold)
    if field == "ctx":
        label = record.get("activity_label")
        context = _without_marks(f"{label}: {text}" if label else text)
        choices = [_text(_without_marks(choice), "choices", where) for choice in choices]
    elif field == "context":
        context = text
    else:
        plain = isinstance(record.get("answer"), bool) and not text.endswith("?")  # BoolQ writes none
        if "passage" in record:
            _text(record["passage"], "passage", where)
        context = _asking(record, f"{text}?" if plain else text)
    return Question(whole, tuple((context.rstrip(), f" {choice}") for choice in choices), gold)


def _asking(record: Mapping[str, Any], question: str) -> str:
    """The question behind what is told before it: a passage and a context, where these are text."""
    before = [record[name].strip() for name in ("passage", "context") if _is_said(record.get(name))]
    return "\n".join([*map(encodable, before), f"Question: {question}\nAnswer:"])


def _is_said(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _as_document(record: Mapping[str, Any], where: str) -> str:
    """The text of the row as a text source reads it; empty where that is blank, or refuses it."""
    try:
        text = text_of_record(record, None, where)
    except CorpusError:
        return ""
    return text if text.strip() else ""


def _choices(record: Mapping[str, Any], where: str) -> tuple[list[str], int]:
    """The texts to choose from, and the right one."""
    field = next((name for name in ("choices", "endings") if name in record), None)
    if field is None:
        answer = record.get("answer")
        if isinstance(answer, bool):
            return ["no", "yes"], int(answer)
        raise CorpusError(
            f"{where} has no field choices or endings, only {', '.join(record)}: write rows such as {EXAMPLE}."
        )
    given = record[field]
    if not isinstance(given, list) or len(given) < 2:
        raise CorpusError(
            f"{where}: field {field!r} holds {_shown(given)}; it must be a list of at least 2 texts to choose from."
        )
    choices = [_text(choice, field, where) for choice in given]
    if "gold" not in record:
        raise CorpusError(
            f"{where} has no field 'gold', only {', '.join(record)}: name the right choice by its place, from 0."
        )
    gold = record["gold"]
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
        raise CorpusError(
            f"{where}: field 'gold' is {_shown(gold)}, but there are {len(choices)} choices: it must be a whole number "
            f"from 0 to {len(choices) - 1}."
        )
    return choices, gold


def _in_blank(sentence: str, choices: list[str], where: str) -> tuple[tuple[str, str], ...]:
    """The choices differ in what precedes the scored text, which is the same for all."""
    before, blank, after = sentence.partition("_")
    if not blank or not after.strip():
        raise CorpusError(
            f"{where}: field 'sentence' is {_shown(sentence)}; it needs a blank, _, and text after it, which is scored."
        )
    return tuple((before + choice, after) for choice in choices)


def _text(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise CorpusError(f"{where}: field {field!r} holds {_shown(value)}, where text must stand: fill it in.")
    return encodable(value.strip())


def _without_marks(text: str) -> str:
    """Without what WikiHow's headings left behind in HellaSwag, [header] and the like."""
    return _MARK.sub("", text.replace(" [title]", ". ")).replace("  ", " ").strip()


def _shown(value: Any, limit: int = 40) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else text[:limit] + "…"
