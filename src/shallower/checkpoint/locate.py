"""What MODEL means: a folder, a `.gguf` file, a Hub name `owner/name[@revision]`, or the word `demo`. Torch-free."""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shallower.errors import ModelError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
CONVERT = (
    "Checkpoints must be safetensors, because a pickle can run code: load it once where you trust it and write it "
    "again with `AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)`."
)

_HUB_NAME = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
_FILE_SUFFIXES = (*PICKLES, ".gguf", ".safetensors", ".json", ".zip", ".tar", ".gz")


@dataclass(frozen=True)
class Location:
    """Where a model is.

    name: how to call it: the folder's or file's own name, `owner/name` of the Hub, or `demo`.
    path: the folder or file; None for the Hub and the demo.
    revision: the branch, tag or commit that a Hub name asked for.
    """

    kind: Literal["folder", "hub", "gguf", "demo"]
    name: str
    path: Path | None = None
    revision: str | None = None


def locate(model: str) -> Location:
    """Read MODEL. Looks at the local disk only: whether a Hub name exists is found out when it is fetched.

    Raises ModelError when MODEL is none of the four, or a folder that is not a checkpoint.
    """
    if model == "demo":
        return Location("demo", "demo")
    try:
        path = Path(model).expanduser()
    except RuntimeError:
        raise ModelError(
            f"there is no model at {model!r}: no home is known by {model.partition('/')[0]}. Write the whole path."
        ) from None
    if not model.strip():
        raise ModelError("MODEL is empty: give a folder, a .gguf file, a Hub name such as owner/name, or demo.")
    if path.is_dir():
        read_config(path)
        return Location("folder", path.resolve().name, path)
    if path.exists():
        return _locate_file(path)
    hub = _HUB_NAME.fullmatch(model)
    revision = hub["revision"] if hub else None
    if hub and revision is None and (model.startswith(".") or _partly_exists(path)):
        raise ModelError(
            f"there is no {model} on this disk{_nearest(path)}. If you mean the Hub's {model}, write {model}@main."
        )
    if hub is None or path.suffix.lower() in _FILE_SUFFIXES:
        known = "a folder, a .gguf file, a Hub name written owner/name[@revision], or demo"
        raise ModelError(f"there is no model at {model!r}{_nearest(path)}. MODEL is {known}.")
    return Location("hub", hub["name"], None, revision)


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed `config.json` of a checkpoint folder.

    Raises ModelError when it is missing or is not a JSON object, and for a folder with a PEFT adapter.
    """
    file = folder / "config.json"
    if (folder / "adapter_config.json").is_file():  # where peft is installed, transformers would load it unmerged
        raise ModelError(
            f"{folder} holds an adapter; merge the adapter into its base model first (peft: `merge_and_unload`), and "
            "save the result in a folder of its own."
        )
    if not file.is_file():
        raise ModelError(f"{folder} is not a checkpoint: it has no config.json{_what_instead(folder)}.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read as JSON ({error}). Copy or download it again.") from None
    if not isinstance(config, dict):
        raise ModelError(f"{file} is not a JSON object. Copy or download it again.")
    return config


def _locate_file(path: Path) -> Location:
    suffix = path.suffix.lower()
    if suffix == ".gguf":
        return Location("gguf", path.name, path)
    if suffix in PICKLES:
        raise ModelError(f"{path} is a pickle. {CONVERT}")
    if suffix in (".safetensors", ".json"):
        raise ModelError(f"{path} is one file of a checkpoint; give its folder, {path.parent}.")
    raise ModelError(f"{path} is not a model: give a checkpoint folder or a .gguf file.")


def _what_instead(folder: Path) -> str:
    """A hint at what a folder without config.json is."""
    if ggufs := sorted(folder.glob("*.gguf")):
        return f"; give the .gguf file itself, {ggufs[0]}"
    inner = sorted(child for child in folder.iterdir() if (child / "config.json").is_file())
    if inner:
        return f" (did you mean {inner[0]}?)"
    if any(child.suffix in PICKLES for child in folder.iterdir()):
        return " (and only pickled weights, which are not read)"
    return "; a checkpoint folder holds config.json, *.safetensors and the tokenizer's files"


def _partly_exists(path: Path) -> bool:
    return path.parent != Path(".") and path.parent.is_dir()


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (nor a folder {path.parent})" if path.parent.parent.is_dir() else ""
    try:
        names = [child.name for child in path.parent.iterdir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.7)
    return f" (did you mean {path.parent / near[0]}?)" if near else ""
