"""Texts that perplexity is measured on: read before a model is loaded, held out of calibration, and measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from shallower import progress
from shallower.corpus import CalibrationSet, named_options, resolve_bos, text_of, with_options, without_options
from shallower.corpus.calibration import is_saved, saved_spec
from shallower.corpus.options import OPTIONS
from shallower.corpus.sources import open_source
from shallower.corpus.specification import parse_specification
from shallower.errors import TooLittleText, UserError
from shallower.evaluation.perplexity import Perplexity, TextWindows, context_limit, cut_windows, perplexity
from shallower.evaluation.text import read_evaluation_text
from shallower.files import expanded
from shallower.plan import text_name, without_folders
from shallower.reporting.wording import distinct_names
from shallower.verbs.calibrate import DEFAULT_CALIBRATION
from shallower.verbs.subject import Subject, several_names
from shallower.verbs.supply import supply


def read_texts(texts: str | Path | Sequence[str | Path]) -> dict[str, str]:
    """Held-out texts, by what to call each: files of one name in different folders are told apart.

    Raises CorpusError when one cannot be read.
    """
    given = list(dict.fromkeys(several_names(texts)))
    names = distinct_names([text_name(text) for text in given], given)
    return {name: read_evaluation_text(text, supply()) for name, text in zip(names, given, strict=True)}


def held_out(calibration: str | Path | CalibrationSet | None) -> dict[str, str]:
    """Documents of the calibration source that were left out of calibration, by what to call them; of a saved set, of
    the source that it was built from. Nothing for a set in memory, for a specification that asks for all documents, or
    for these, and where the source of a saved set is not there. That a saved set's is read from the Hub is told.
    """
    if isinstance(calibration, CalibrationSet):
        return {}
    asked, part = str(calibration or DEFAULT_CALIBRATION), "train"
    folder = expanded(asked)
    if is_saved(folder):
        asked, part = saved_spec(folder), ""  # which names its part
    try:
        if named_options(asked).get("part", part) != "train":
            return {}
        text = text_of(asked)
        if is_saved(folder) and not _is_there(text, folder):
            return {}
        spec = f"{text}?part=held-out"
        return {text_name(spec): read_evaluation_text(spec, supply())}
    except UserError:
        # too few documents to leave any out, the model's own text, questions that are no text, or a set whose text is
        # elsewhere: such calibration was read all the same, and the report then shows no perplexity
        return {}


def _is_there(text: str, folder: Path) -> bool:
    """Whether the text of the set in the folder can still be meant; a note where that is read from the Hub."""
    sources = [term.source for term in parse_specification(text, ()).terms]
    of_hub = [source for source in sources if open_source(source, supply()).streamed]
    if not all(source.startswith("hf:") for source in of_hub):
        return False  # a path from where the set was built is no data set of that name
    if of_hub:
        progress.note(
            f"{folder.name} was built from {' and '.join(of_hub)}, which is read from the Hub again for what the set "
            "left out, to measure on; --text names other text to measure on, such as a file."
        )
    return True


def or_all_of_it(
    calibration: str | Path | CalibrationSet | None, error: TooLittleText, sequences: int, least: int = 1
) -> str:
    """Advice to read all there is of a text that holds less than `sequences`, as its specification says it, which wins
    over what a verb asks for; empty where that is less than `least`.
    """
    spec = str(calibration or DEFAULT_CALIBRATION)
    asked = OPTIONS["sequences"].parse(named_options(spec).get("sequences", str(sequences)))
    there = math.floor(asked * error.share + 1e-9)
    if there < least:
        return ""
    return f"write {with_options(without_options(spec, ['sequences']), {'sequences': str(there)})}, or "


def nothing_held_out(contents: Mapping[str, str], calibration: str | Path | CalibrationSet | None) -> tuple[str, ...]:
    """A note where there is no text that perplexity could be shown on."""
    if contents:
        return ()
    return (f"no perplexity: nothing of {text_title(calibration)} is held out; name other text with --text.",)


def text_title(calibration: str | Path | CalibrationSet | None) -> str:
    """What to call calibration text in a sentence."""
    read = "the calibration set" if isinstance(calibration, CalibrationSet) else str(calibration or DEFAULT_CALIBRATION)
    return without_folders(read)


def require_measurable(
    subject: Subject,
    contents: Mapping[str, str],
    window: int,
    stride: int | None = None,
    max_windows: int | None = None,
) -> None:
    """Raise UserError or CorpusError for a window or a text that perplexity cannot be measured with: before longer work
    than that.
    """
    for content in contents.values():
        windows_of(subject, content, window, stride, max_windows)


def windows_of(subject: Subject, content: str, window: int, stride: int | None, max_windows: int | None) -> TextWindows:
    """`cut_windows`, of a window that fits the model's context, and a stride that fits the window."""
    return cut_windows(
        subject.model,
        subject.tokenizer,
        content,
        window=fitting(subject, window),
        stride=fitting_stride(subject, window, stride),
        max_windows=max_windows,
    )


def perplexities(
    subject: Subject,
    contents: Mapping[str, str],
    window: int,
    max_windows: int | None,
    label: str = "on",
    *,
    stride: int | None = None,
) -> dict[str, Perplexity]:
    """Perplexity of a loaded model on each text, by the text's name, which `label` stands before while it is measured;
    a window longer than the model's context is cut to it, and so is the stride.
    """
    return {
        name: perplexity(
            subject.model,
            subject.tokenizer,
            content,
            window=fitting(subject, window),
            stride=fitting_stride(subject, window, stride),
            max_windows=max_windows,
            label=f"{label} {name}",
        )
        for name, content in contents.items()
    }


def values(found: Mapping[str, Perplexity]) -> dict[str, float]:
    """The bare perplexities."""
    return {name: each.perplexity for name, each in found.items()}


def fitting(subject: Subject, window: int) -> int:
    """The window, or the model's context where that is shorter."""
    limit = context_limit(subject.model)
    return window if limit is None else min(window, limit)


def fitting_stride(subject: Subject, window: int, stride: int | None) -> int | None:
    """The stride, or the window that fits where that is shorter."""
    return None if stride is None else min(stride, fitting(subject, window))


def tokens_read(subject: Subject, window: int, stride: int | None, max_windows: int | None) -> int | None:
    """Where the last window of a text ends, in tokens; None where all of it is read."""
    if max_windows is None or subject.loaded.tokenizer is None:  # which reads no text
        return None
    _, bos = resolve_bos(subject.tokenizer, "auto")
    room = fitting(subject, window) - (bos is not None)
    step = min(fitting_stride(subject, window, stride) or room, room)
    return (max_windows - 1) * step + room


def windows_cut(subject: Subject, contents: Mapping[str, str], window: int, stride: int | None) -> list[str]:
    """What to say of texts that are read in shorter windows than was asked for."""
    fits, step = fitting(subject, window), fitting_stride(subject, window, stride)
    if fits == window or not contents:
        return []
    apart = "" if step == stride else f", {step:,} apart instead of {stride:,}"
    return [
        f"{subject.identity.name} reads {fits:,} tokens at most: its windows are of {fits:,} tokens instead of "
        f"{window:,}{apart}."
    ]
