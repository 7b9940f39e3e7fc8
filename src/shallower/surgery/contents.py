"""What a checkpoint's folder may hold that shallower wrote, now or in an older version: all else is its owner's."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path, PurePath

from transformers.dynamic_module_utils import get_relative_import_files

from shallower.filenames import CARD, PAGE, PLAN, RECOVERY, REPORT

_OF_SHALLOWER = (CARD, PLAN, RECOVERY, PAGE, REPORT)
_OF_MODELS = ("config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json")
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
# What tokenizers of transformers write, by the names that their classes give it
_OF_TOKENIZERS = (
    *("added_tokens.json", "chat_template.jinja", "special_tokens_map.json", "tekken.json", "tokenizer.json"),
    *("tokenizer_config.json", "merges.txt", "vocab.json", "vocab.txt", "tokenizer.model", "sentencepiece.model"),
    *("sentencepiece.bpe.model", "spiece.model", "spm.model", "spm_char.model", "source.spm", "target.spm"),
    *("target_vocab.json", "vocab-src.json", "vocab-tgt.json", "bpe.codes", "dict.txt", "normalizer.json"),
    *("prophetnet.tokenizer", "emoji.json", "byte_maps.json", "entity_vocab.json", "word_shape.json"),
    "word_pronunciation.json",
)
# How the model card lists what was written under other names: tokenizers of their own code choose theirs freely
_LISTED = re.compile(r"<!-- Also written with this checkpoint: (\[.*\]) -->")
# templates besides the main one; what Python keeps of the code beside it
_FOLDERS = ("additional_chat_templates", "__pycache__")


def written_with(checkpoint: Path) -> Callable[[PurePath], bool]:
    """Whether a file, by its path in the folder of a checkpoint, is one that is written with it."""
    names = {*_OF_SHALLOWER, *_OF_MODELS, *_OF_TOKENIZERS, *_code(checkpoint)}
    listed = _listed(checkpoint)

    def known(path: PurePath) -> bool:
        if path.as_posix() in listed:
            return True
        if len(path.parts) > 1:
            return path.parts[0] in _FOLDERS
        return path.name in names or _SHARD.fullmatch(path.name) is not None

    return known


def listing(checkpoint: Path) -> str:
    """What the model card has to say so that `written_with` knows the files that are in the folder by now: empty where
    it knows all of them.
    """
    known = written_with(checkpoint)
    inside = sorted(path.relative_to(checkpoint) for path in checkpoint.rglob("*") if path.is_file())
    others = [path.as_posix() for path in inside if not known(path)]
    return f"\n<!-- Also written with this checkpoint: {json.dumps(others)} -->\n" if others else ""


def _listed(checkpoint: Path) -> set[str]:
    """Paths in the folder that its model card lists."""
    with suppress(OSError, ValueError):  # without a card, or one that somebody changed
        found = _LISTED.search((checkpoint / CARD).read_text(encoding="utf-8"))
        return {str(name) for name in json.loads(found[1])} if found else set()
    return set()


def _code(checkpoint: Path) -> set[str]:
    """Names of the Python files that the configs in the folder say are the model's or tokenizer's own code."""
    names: set[str] = set()
    for config in ("config.json", "tokenizer_config.json"):
        with suppress(OSError, ValueError, AttributeError):  # without a config, or one that is no object
            classes = json.loads((checkpoint / config).read_text(encoding="utf-8")).get("auto_map", {}).values()
            for name in (name for entry in classes for name in (entry if isinstance(entry, list) else [entry])):
                if isinstance(name, str):
                    names.add(f"{name.rpartition('--')[2].partition('.')[0]}.py")
    for name in [*names]:
        with suppress(OSError, ValueError):
            names |= {Path(file).name for file in get_relative_import_files(checkpoint / name)}
    return names
