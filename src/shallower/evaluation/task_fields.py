"""Rows of benchmark data sets, given the fields that lm-eval's templates read.

Copies of one data set differ in small ways: BoolQ's answer is a bool in one and a label in another, ARC's choices are a
list of texts, or texts with their letters. Only names and forms are changed here, never what a question says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Row = dict[str, Any]


def with_fields(data_set: str, row: Row) -> Row:
    """The row as lm-eval expects it of the Hub data set `data_set` (`owner/name` or `owner/name:config`)."""
    adapt = _ADAPTED.get(data_set) or _ADAPTED.get(data_set.partition(":")[0])
    return row if adapt is None else adapt(row)


def _lettered(row: Row) -> Row:
    """`choices` as {"text": […], "label": […]} and the right one's letter, of texts and the right one's number."""
    choices = row["choices"]
    if isinstance(choices, Mapping):
        return row
    letters = row.get("labels") or [chr(ord("A") + place) for place in range(len(choices))]
    answer = row.get("answerKey")
    if answer is None:
        gold = row["gold"]
        answer = letters[gold] if 0 <= gold < len(letters) else f"{gold}"
    return row | {"choices": {"text": list(choices), "label": list(letters)}, "answerKey": answer}


def _open_book(row: Row) -> Row:
    return _lettered(row if "question_stem" in row else row | {"question_stem": row["question"]})


def _bool_label(row: Row) -> Row:
    return row if "label" in row else row | {"label": int(row["answer"])}


def _gold_as(field: str) -> Callable[[Row], Row]:
    return lambda row: row if field in row or "gold" not in row else row | {field: row["gold"]}


_ADAPTED: Mapping[str, Callable[[Row], Row]] = {
    "allenai/ai2_arc": _lettered,
    "allenai/openbookqa": _open_book,
    "tau/commonsense_qa": _lettered,
    "aps/super_glue:boolq": _bool_label,
    "baber/piqa": _gold_as("label"),
    "Rowan/hellaswag": _gold_as("label"),
    "cais/mmlu": _gold_as("answer"),
}
