"""MODEL → a model in memory. Everything that can be refused is refused before weights are read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shallower import packaged, progress
from shallower.checkpoint import hub, stock
from shallower.checkpoint.architecture import require_decoder
from shallower.checkpoint.demo_files import DEMO_MODEL, demo_model
from shallower.checkpoint.dtype import parse_device, parse_dtype
from shallower.checkpoint.gguf import convert_gguf
from shallower.checkpoint.locate import Location, locate, read_config
from shallower.checkpoint.shards import weight_files
from shallower.errors import ModelError


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model in evaluation mode, with where it came from.

    name: the folder's or file's own name, or the Hub name: fit to be published, unlike a path.
    revision: the commit, for a model of the Hub.
    path: the folder of safetensors that was read.
    """

    model: PreTrainedModel = field(repr=False)
    tokenizer: PreTrainedTokenizerBase | None = field(repr=False)
    name: str
    revision: str | None
    path: Path | None


def load_model(
    model: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> LoadedModel:
    """Load MODEL: a folder, a `.gguf` file, a Hub name `owner/name[@revision]`, or `demo`.

    dtype: `float32`, `bfloat16`, `float16`, or `auto` for what the device multiplies fastest.
    device: `cpu`, `cuda`, `cuda:1`, or `auto` for the best there is.
    revision: branch, tag or commit of a Hub model; the same as `@revision` in the name.

    Raises ModelError for anything that is not a complete decoder-only causal language model in safetensors or GGUF, and
    UnknownName for a dtype or device that does not exist.
    """
    placed = parse_device(device)
    number_format = parse_dtype(dtype, placed)
    location = _with_revision(locate(model), revision)
    folder, name, commit = _folder(location, trust_remote_code=trust_remote_code)
    shallow = _shallow_class(folder, name)
    config = stock.load_config(folder, name, trust_remote_code=trust_remote_code, model_class=shallow)
    if shallow is None:
        require_decoder(config, name, trust_remote_code=trust_remote_code)
        if not trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
            progress.note(
                f"the code that {name} comes with was not run: it is read as transformers' own {config.model_type}. "
                "Where that differs, read the code, and pass --trust-remote-code if you trust it."
            )
    if commit is not None:
        folder = hub.fetch_weights(name, commit)
    weight_files(folder)
    with progress.task(f"loading {name}"):
        network = stock.load_weights(
            folder, name, config, number_format, placed, trust_remote_code=trust_remote_code, model_class=shallow
        )
        tokenizer = stock.load_tokenizer(folder, name, trust_remote_code=trust_remote_code)
    return LoadedModel(network, tokenizer, name, commit, folder)


def load(
    model: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> PreTrainedModel:
    """The model at MODEL, in evaluation mode; see load_model for arguments and errors.

    Also loads what `prune` packaged because blocks lack sublayers. No code in the folder is run for that: this package
    has the same.
    """
    return load_model(
        str(model), dtype=dtype, device=device, trust_remote_code=trust_remote_code, revision=revision
    ).model


def _shallow_class(folder: Path, name: str) -> type[PreTrainedModel] | None:
    """The class of a packaged checkpoint, from this package's own code; None for any other checkpoint."""
    config = read_config(folder)
    if not packaged.is_packaged(config):
        return None
    found: type[PreTrainedModel] = packaged.shallow_class(packaged.stock_class(config, name))
    return found


def load_tokenizer(model: str, *, trust_remote_code: bool = False) -> tuple[PreTrainedTokenizerBase, str]:
    """The tokenizer of MODEL and the model's name, without reading weights.

    Raises ModelError when MODEL cannot be found or has no tokenizer.
    """
    folder, name, _ = _folder(locate(model), trust_remote_code=trust_remote_code)
    tokenizer = stock.load_tokenizer(folder, name, trust_remote_code=trust_remote_code)
    if tokenizer is None:
        raise ModelError(
            f"{name} has no tokenizer, so text cannot become its tokens: put the tokenizer's files "
            "(tokenizer.json, tokenizer_config.json) into its folder, or name another model."
        )
    return tokenizer, name


def _with_revision(location: Location, revision: str | None) -> Location:
    if revision is None or revision == location.revision:
        return location
    if location.kind != "hub":
        raise ModelError(f"a revision ({revision!r}) makes sense for a Hub model only, and {location.name} is local.")
    if location.revision is not None:
        raise ModelError(f"two revisions are named: {location.revision!r} and {revision!r}; name one.")
    return Location("hub", location.name, None, revision)


def _folder(location: Location, *, trust_remote_code: bool) -> tuple[Path, str, str | None]:
    """The folder with the config (for the Hub, not yet the weights), the model's name, and the Hub commit."""
    if location.kind == "hub":
        folder = hub.fetch_config(location.name, location.revision, code=trust_remote_code)
        return folder, location.name, folder.name
    if location.kind == "demo":
        return demo_model(), DEMO_MODEL, None
    assert location.path is not None
    if location.kind == "gguf":
        return convert_gguf(location.path), location.name, None
    return location.path, location.name, None
