"""The text that a verb reads: what was named, or Python's own, in a size that the model can read."""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch
from transformers import PreTrainedModel

from shallower import progress
from shallower.corpus import CalibrationSet, asks_model, build_calibration, build_choices, named_options
from shallower.corpus.options import OPTIONS
from shallower.corpus.questions import EXAMPLE
from shallower.engine import reads_choices
from shallower.errors import CorpusError, TooLittleText, out_of_memory
from shallower.evaluation.perplexity import context_limit
from shallower.registry import objective as objectives
from shallower.verbs.subject import Subject
from shallower.verbs.supply import supply

_POSITIONS = re.compile(r"(^|[._])(wpe|\w*positions?\w*)([._]|$)")  # of parameters
_RESERVED = range(3)  # rows of such a table that are of no position (OPT: 2)
DEFAULT_CALIBRATION = "python"  # the one text that every machine has; better: text like what the model will read


def calibrate(
    subject: Subject,
    calibration: str | Path | CalibrationSet | None,
    *,
    sequences: int,
    length: int,
    seed: int,
    objective: str = "nll",
) -> CalibrationSet:
    """The calibration set itself, or one built from a specification (by default this Python's documentation and code).

    One document in ten is left for held-out evaluation unless the specification says `part=…`. For an objective that
    reads choices the specification is a .jsonl file of questions, and `sequences` are questions.

    Raises CorpusError when the text is missing, too short, or not text, or longer than what the model can read.
    """
    if isinstance(calibration, CalibrationSet):
        text = calibration
    else:
        require_room_to_write(subject.model, str(calibration or DEFAULT_CALIBRATION), length)
        text = _build(subject, calibration, sequences, length, seed, objective)
    require_room(subject.model, text.length)
    require_known(subject.model, text)
    return text


def note_default(calibration: str | Path | CalibrationSet | None) -> None:
    """Tell those who named no text what is read."""
    if calibration is None:
        progress.note(
            "No text was named, so the documentation and the code of this Python are read. Text like what the model "
            "will read serves better (--calibration text.jsonl)."
        )


def calibrate_most(
    subject: Subject,
    calibration: str | Path | CalibrationSet | None,
    *,
    sequences: int,
    length: int,
    seed: int,
    objective: str = "nll",
) -> tuple[CalibrationSet, int]:
    """As `calibrate`, of a text that holds less than `sequences` all it has; and how many sequences were asked for in
    the end.

    Raises CorpusError as `calibrate` does, for too few questions, too: TooLittleText when it holds no text, or less
    than its specification asks for.
    """
    short: TooLittleText | None = None
    while True:
        try:
            read = calibrate(subject, calibration, sequences=sequences, length=length, seed=seed, objective=objective)
            return read, sequences
        except TooLittleText as error:  # of a mixture each text is told of on its own
            short = error
            sequences = math.floor(sequences * error.share + 1e-9)
            # what the specification says wins over the argument, and would fail again
            if not sequences or "sequences" in named_options(str(calibration)):
                raise
        except CorpusError:
            if short is None:
                raise
            raise short from None  # so few that a small weight of the mixture is none of them


def require_room_to_write(model: PreTrainedModel, spec: str, length: int) -> None:
    """Raise CorpusError when a specification asks for the model's own text in sequences that it cannot read.

    length: of these sequences where the specification does not say it itself.
    """
    if asks_model(spec):
        require_room(model, OPTIONS["length"].parse(named_options(spec).get("length", str(length))))


def require_room(model: PreTrainedModel, length: int) -> None:
    """Raise CorpusError when sequences of `length` are more than a model can read.

    Beyond the length that its config has, rotary positions go on, and a table of learned ones ends. Whatever else may
    fail there (GPT-J's table of computed positions, MPT's bias) is found by reading one sequence.
    """
    limit = context_limit(model)
    if limit is None or length <= limit:
        return
    ends = any(_POSITIONS.search(name) and len(table) - limit in _RESERVED for name, table in model.named_parameters())
    if not ends:
        try:
            with torch.no_grad(), progress.task(f"trying a sequence of {length:,} tokens"):
                model.base_model(torch.zeros((1, length), dtype=torch.long, device=model.device), use_cache=False)
        except (IndexError, RuntimeError) as error:
            if out_of_memory(error):
                raise
            ends = True
    if ends:
        raise CorpusError(
            f"sequences of {length} tokens are longer than the {limit} positions that the model has: use --length "
            f"{limit} or less."
        )


def require_known(model: PreTrainedModel, text: CalibrationSet) -> None:
    """Raise CorpusError when ids of a text have no embedding in the model."""
    rows = model.get_input_embeddings().weight.shape[0]
    least, most = int(text.input_ids.min()), int(text.input_ids.max())
    if least < 0 or most >= rows:
        raise CorpusError(
            f"{text.spec} has the token id {least if least < 0 else most}, and the model knows 0 to {rows - 1}: build "
            "the set with the model's own tokenizer."
        )


def _build(
    subject: Subject, calibration: str | Path | None, sequences: int, length: int, seed: int, objective: str
) -> CalibrationSet:
    if reads_choices(objectives.get(objective)):
        if calibration is None:
            raise CorpusError(
                f"objective {objective!r} reads multiple-choice questions, and none were given: name a .jsonl file of "
                f"them (--calibration), with rows such as {EXAMPLE}."
            )
        return build_choices(
            str(calibration), subject.tokenizer, questions=sequences, length=length, seed=seed, part="train"
        )
    spec = DEFAULT_CALIBRATION if calibration is None else str(calibration)
    return build_calibration(
        spec,
        subject.tokenizer,
        sequences=sequences,
        length=length,
        seed=seed,
        part="train",
        supply=supply(subject.model, subject.tokenizer),
    )
