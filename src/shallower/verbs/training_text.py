"""Which text recoveries that train read, and by what they choose the weights that they keep."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from shallower.corpus import CalibrationSet
from shallower.corpus.instructions import InstructionSet, build_instructions
from shallower.defaults import TRAIN_SEQUENCES
from shallower.errors import TooLittleText, UserError
from shallower.evaluation.perplexity import first_ids, perplexity
from shallower.registry import Configured
from shallower.reporting.wording import plural
from shallower.training.answers import FEWEST, HELD_OUT, answer_perplexity, split
from shallower.training.recipe import HeldOut
from shallower.verbs.calibrate import calibrate, calibrate_most
from shallower.verbs.subject import Subject
from shallower.verbs.texts import fitting, held_out, text_title, tokens_read


@dataclass(frozen=True, eq=False)
class Training:
    """What recoveries that train read. held_out: perplexity on text that nothing is trained on, by which the best
    weights are kept; None where there is no such text. measured: what tells this measure from others.
    notes: what of the text is not read, and which of the shown texts the weights are chosen by.
    of_calibration: whether the calibration text was read for it.
    """

    text: CalibrationSet
    held_out: HeldOut | None
    measured: tuple[object, ...] = ()
    notes: tuple[str, ...] = ()
    of_calibration: bool = True


def training_text(
    dense: Subject,
    steps: Sequence[Configured],
    calibration: str | Path | CalibrationSet | None,
    *,
    sequences: int | None,
    length: int,
    instructions: str | Path | None,
    contents: Mapping[str, str],
    window: int,
    max_windows: int | None,
    seed: int,
) -> Training | None:
    """What those of the recoveries that train will read, and what they are measured on; None where none of them trains.

    sequences: None for as many as is usual, or all of a shorter text. contents: held-out texts on which the stages
    will be shown.

    Raises UserError for instructions that cannot be read, CorpusError when there is too little text.
    """
    trained = [method.name for method, _ in steps if method.trained]
    if not trained:
        return None
    text: CalibrationSet
    notes: tuple[str, ...] = ()
    if instructions is not None:
        sequences = sequences or TRAIN_SEQUENCES
        conversations = build_instructions(instructions, dense.tokenizer, length=length, sequences=sequences)
        notes = tuple(_left_out(conversations, length, sequences))
        text, held = split(conversations)
        if held is not None:
            if copies := conversations.sequences - text.sequences - held.sequences:
                notes += (f"{plural(copies, 'conversation')} that say what one to measure by says are left out.",)
            return Training(
                text, lambda model: answer_perplexity(model, held), (held.digest,), notes, of_calibration=False
            )
        kept = (
            "do best on the documents that calibration left out" if held_out(calibration) else "the training ends with"
        )
        notes += (
            f"all {plural(text.sequences, 'conversation')} are trained on, as {HELD_OUT * FEWEST} or more, not all "
            f"alike, are needed to keep some to measure by: the weights are those that {kept}.",
        )
    elif sequences is None:
        text, most = calibrate_most(dense, calibration, sequences=TRAIN_SEQUENCES, length=length, seed=seed)
        if most < TRAIN_SEQUENCES:
            notes = (f"training reads {plural(most, 'sequence')} of {length} tokens, all that the text holds.",)
    else:
        try:
            text = calibrate(dense, calibration, sequences=sequences, length=length, seed=seed)
        except TooLittleText as error:
            raise TooLittleText(str(error).replace("--sequences", "--train-sequences")) from None
    left_out = next(iter(held_out(calibration).values()), None)
    if left_out is None:
        _require_no_patience(steps)
        if instructions is None:
            notes += (
                f"all of {text_title(calibration)} may be trained on, as nothing of it is held out to measure by: the "
                "weights are those that the training ends with.",
            )
        return Training(text, None, notes=notes)
    tokenizer = dense.tokenizer
    ids, _ = first_ids(tokenizer, left_out, tokens_read(dense, window, None, max_windows))

    def measure(model: PreTrainedModel) -> float:
        label, fits = "on what calibration left out", fitting(dense, window)
        return perplexity(model, tokenizer, ids, window=fits, max_windows=max_windows, label=label).perplexity

    notes += tuple(
        f"the weights kept of {' and '.join(trained)} were chosen by perplexity on {name}, so it flatters them: "
        "measure on other text (--text)."
        for name, content in contents.items()
        if content == left_out
    )
    digest = hashlib.sha256(left_out.encode()).hexdigest()
    return Training(text, measure, (digest, fitting(dense, window), max_windows), notes)


def _require_no_patience(steps: Sequence[Configured]) -> None:
    """Raise UserError where a training is to stop by measurements that there are none of."""
    for method, options in steps:
        if method.trained and (patience := options.get("patience")):
            raise UserError(
                f"patience={patience} stops {method.name} when perplexity on held-out text gets no better, and nothing "
                "is held out: leave it out, or train on text of which documents are left (a .jsonl file of ten "
                "documents or more, without part=)."
            )


def _left_out(conversations: InstructionSet, length: int, sequences: int) -> Iterator[str]:
    """How many conversations of a file are learned, where it is not all of them."""
    [source] = conversations.sources
    assert source.read is not None
    too_long = source.read - source.documents - conversations.unanswered
    if source.read > source.documents or source.documents == sequences:
        told = f"{source.documents:,} of the first {plural(source.read, 'conversation')} of {source.name} are used"
        told += f"; longer than {length} tokens (--length): {too_long:,}" if too_long else ""
        told += f"; without an answer: {conversations.unanswered:,}" if conversations.unanswered else ""
        ended = source.documents == sequences
        yield told + (f"; what follows is not read (--train-sequences {sequences})." if ended else ".")
