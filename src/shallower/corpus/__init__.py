"""Text sources → packed token batches with a digest."""

from shallower.corpus.answers import Answers
from shallower.corpus.bos import Bos, adds_bos, resolve_bos
from shallower.corpus.build import build_calibration
from shallower.corpus.calibration import Batch, CalibrationSet, SourceRecord
from shallower.corpus.choices import ChoiceSet, build_choices
from shallower.corpus.overlap import Overlap, overlap
from shallower.corpus.sources import Document, Source, open_source
from shallower.corpus.specification import Part

__all__ = [
    "Answers",
    "Batch",
    "Bos",
    "CalibrationSet",
    "ChoiceSet",
    "Document",
    "Overlap",
    "Part",
    "Source",
    "SourceRecord",
    "adds_bos",
    "build_calibration",
    "build_choices",
    "open_source",
    "overlap",
    "resolve_bos",
]
