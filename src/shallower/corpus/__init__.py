"""Text sources → packed token batches with a digest."""

from shallower.corpus.answers import Answers
from shallower.corpus.bos import Bos, adds_bos, resolve_bos
from shallower.corpus.build import build_calibration
from shallower.corpus.calibration import Batch, CalibrationSet, SourceRecord, is_saved
from shallower.corpus.choices import ChoiceSet, build_choices
from shallower.corpus.clean import Cleaning, Cluster, Counts, clean
from shallower.corpus.domains import DOMAINS
from shallower.corpus.options import asks_model, named_options, text_of, with_options, without_options
from shallower.corpus.overlap import EvaluationRuns, Overlap, SharedRows, overlap
from shallower.corpus.sources import Document, Source, open_source
from shallower.corpus.specification import Part
from shallower.corpus.supply import Supply

__all__ = [
    "DOMAINS",
    "Answers",
    "Batch",
    "Bos",
    "CalibrationSet",
    "ChoiceSet",
    "Cleaning",
    "Cluster",
    "Counts",
    "Document",
    "EvaluationRuns",
    "Overlap",
    "Part",
    "SharedRows",
    "Source",
    "SourceRecord",
    "Supply",
    "adds_bos",
    "asks_model",
    "build_calibration",
    "build_choices",
    "clean",
    "is_saved",
    "named_options",
    "open_source",
    "overlap",
    "resolve_bos",
    "text_of",
    "with_options",
    "without_options",
]
