"""`shallower eval`: perplexity of several models on several texts, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shallower.corpus import CalibrationSet
from shallower.errors import CorpusError, UserError
from shallower.evaluation.perplexity import Perplexity, context_limit, perplexity
from shallower.evaluation.text import read_evaluation_text
from shallower.verbs.subject import DEFAULT_CALIBRATION, Subject, open_subject


@dataclass(frozen=True)
class Evaluation:
    """Perplexity of one model, of `blocks` blocks and `parameters` parameters, on one text."""

    model: str
    blocks: int
    parameters: int
    text: str
    perplexity: Perplexity

    def to_json(self) -> dict[str, Any]:
        measured = self.perplexity
        numbers = {**asdict(measured), "perplexity": measured.perplexity, "bits_per_byte": measured.bits_per_byte}
        model = {"model": self.model, "blocks": self.blocks, "parameters": self.parameters}
        return {**model, "text": self.text, **numbers}


def evaluate(
    models: Sequence[str | Path | PreTrainedModel | Subject],
    texts: Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    window: int = 1024,
    stride: int | None = None,
    max_windows: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> list[Evaluation]:
    """Perplexity of each model on each text; one model is in memory at a time.

    texts: files, folders or data sets. max_windows: only the first windows of each text. Raises UserError when there is
    nothing to evaluate, ModelError and CorpusError for a model or text that cannot be used.
    """
    if not models or not texts:
        raise UserError("nothing to evaluate: name at least one model and one --text.")
    contents = {text: read_evaluation_text(text) for text in texts}
    found = []
    for model in models:
        subject = open_subject(model, tokenizer, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        for text, content in contents.items():
            label = f"of {subject.identity.name} on {text_name(text)}"
            measured = text_perplexity(
                subject, content, window=window, stride=stride, max_windows=max_windows, label=label
            )
            identity = subject.identity
            parameters = subject.weights.model.parameters
            found.append(Evaluation(identity.name, identity.blocks, parameters, text_name(text), measured))
        del subject
    return found


def text_perplexity(
    subject: Subject,
    content: str,
    *,
    window: int,
    stride: int | None = None,
    max_windows: int | None = None,
    label: str = "",
) -> Perplexity:
    """Perplexity of a loaded model; a window longer than the model's context is cut to it."""
    limit = context_limit(subject.model)
    fitting = window if limit is None else min(window, limit)
    return perplexity(
        subject.model,
        subject.tokenizer,
        content,
        window=fitting,
        stride=stride,
        max_windows=max_windows,
        label=label,
    )


def held_out(calibration: str | Path | CalibrationSet | None) -> dict[str, str]:
    """Documents of the calibration source that were left out of calibration; nothing for a ready-made set of ids."""
    if isinstance(calibration, CalibrationSet):
        return {}
    source = str(calibration or DEFAULT_CALIBRATION).partition("?")[0]
    spec = f"{source}?part=held-out"
    try:
        return {spec: read_evaluation_text(spec)}
    except CorpusError:
        return {}  # too few documents to leave any out: the report then shows no perplexity


def text_name(spec: str) -> str:
    """What to call a text in a table: the file's own name with its options, not its folder."""
    path, question, options = spec.partition("?")
    return Path(path).name + question + options
