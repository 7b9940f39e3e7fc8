"""`.gguf` files: converted once, by transformers' own loader, into an ordinary safetensors folder in the cache."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PretrainedConfig

from shallower import progress
from shallower.checkpoint import stock
from shallower.checkpoint.architecture import require_decoder
from shallower.checkpoint.cache import cache_root, scratch, staging
from shallower.errors import ModelError, first_line, require_package

_MAGIC = b"GGUF"
_SCALING = (".rope.scaling.type", ".rope.scaling.factor", ".rope.scale_linear")  # the last in files of 2023
_BIASES = {"attention_bias": ".attn_q.bias", "mlp_bias": ".ffn_up.bias"}
_FORM = 3  # of the converted folder; raise it when conversion changes, so that old conversions are not found


def convert_gguf(path: Path) -> Path:
    """The folder with the converted model: float32 safetensors, config, tokenizer, chat template, generation config.

    Made at the first call for a file's content, found at every later one. Needs about four times as many bytes as the
    model has parameters, in memory and on disk.

    Raises ModelError when the file is not a whole GGUF of a causal language model, or the `gguf` package is missing.
    """
    require_gguf()
    try:
        with path.open("rb") as stream:
            magic = stream.read(len(_MAGIC))
        if magic != _MAGIC:
            raise ModelError(f"{path} is not a GGUF file, whatever its name says. Download it again.")
        target = converted_folder(sha256_of(path))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.") from None
    if target.is_dir():
        return target
    with staging(target) as folder:
        _convert(path, folder)
    return target


def converted_folder(sha256: str) -> Path:
    """Where the conversion of the GGUF file with this SHA-256 is, or will be."""
    return gguf_folder() / f"{sha256[:32]}-{_FORM}"


def gguf_folder() -> Path:
    """Where the folders are that files were converted into."""
    return cache_root() / "gguf"


def require_gguf() -> None:
    """Raise ModelError, saying what to install, when GGUF files cannot be read here."""
    require_package("gguf", "gguf", "reading a .gguf file", ModelError)


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _convert(path: Path, folder: Path) -> None:
    with progress.task(f"reading {path.name}"):
        reader = _read(path)
    dense: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # before there was one, the loader always dequantised
        dense["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with (
        scratch() as alone,
        stock.quiet(),
        _one_reading(reader, f"converting {path.name}") as mapped,
        stock.refusing(path.name, "the file"),
    ):
        (alone / path.name).symlink_to(path.resolve())  # what lies beside the file, such as a tokenizer, is not of it
        source: dict[str, Any] = {"pretrained_model_name_or_path": alone, "gguf_file": path.name}
        config = AutoConfig.from_pretrained(**source)
        require_decoder(config, path.name)
        _require_positions(reader, config, path.name)
        for field, tensor in _BIASES.items():  # no field of the file says that there are any
            if hasattr(config, field) and any(held.name.endswith(tensor) for held in reader.tensors):
                setattr(config, field, True)
        model, info = AutoModelForCausalLM.from_pretrained(
            **source, **dense, config=config, dtype=torch.float32, output_loading_info=True
        )
        stock.require_complete(info, path.name)
        _require_all_read(reader, mapped, path.name)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    # What says only how the file was made, or found here.
    for attribute in ("_model_name_or_path", "_name_or_path"):
        model.config.__dict__.pop(attribute, None)
    for attribute in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(attribute, None)
    # The loader's is derived from the config, marked as such, and recomputed by whoever loads it; this one is meant.
    stops = {key: getattr(model.generation_config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**stops)
    try:
        with stock.quiet(), progress.task(f"writing {path.name} as safetensors"):
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except SafetensorError as error:  # its way of reporting a full disk
        raise OSError(first_line(error)) from error


def _require_positions(reader: Any, config: PretrainedConfig, name: str) -> None:
    """Raise ModelError where rotary positions are scaled (Llama 3.1, YaRN, LongRoPE) and the loader did not read how:
    the model would compute something else.
    """
    said = {key: field for key, field in reader.fields.items() if key.endswith(_SCALING)}
    kind = next((_text(field) for key, field in said.items() if key.endswith("type")), "")
    told = [f"{key} = {kind}" for key in said if kind not in ("", "none") and key.endswith("type")]
    if not kind:  # a factor without a kind is that of linear scaling
        factors = {key: float(field.parts[field.data[0]][0]) for key, field in said.items()}
        told += [f"{key} = {factor:g}" for key, factor in factors.items() if factor not in (0, 1)]
    told += [
        tensor.name
        for tensor in reader.tensors
        if tensor.name.startswith("rope_factors_") or (tensor.name == "rope_freqs.weight" and (tensor.data != 1).any())
    ]
    read = getattr(config, "rope_parameters", None) or {}
    kinds = {part.get("rope_type", "default") for part in (read, *read.values()) if isinstance(part, dict)}
    if told and kinds <= {"default"}:
        raise ModelError(
            f"{name} scales its rotary positions ({', '.join(told)}), which this version of transformers does not read "
            "from GGUF; use the model's safetensors checkpoint."
        )


def _require_all_read(reader: Any, mapped: Collection[str], name: str) -> None:
    """Raise ModelError where the loader passed over tensors of the file for which the config has no place: it says
    nothing, and the model would compute something else.

    mapped: names of the tensors that it has a place for; of experts without the suffix. Those of rotary positions are
    `_require_positions`'.
    """
    names = [tensor.name for tensor in reader.tensors if not tensor.name.startswith("rope_")]
    left = [tensor for tensor in names if tensor not in mapped and tensor.removesuffix(".weight") not in mapped]
    if left:
        raise ModelError(
            f"of the tensors in {name} this version of transformers does not read {len(left)} ({', '.join(left[:3])}"
            f"{', …' if len(left) > 3 else ''}); use the model's safetensors checkpoint."
        )


def _text(field: Any) -> str:
    """What a GGUF field of text says."""
    return bytes(field.parts[field.data[0]]).decode()


def _read(path: Path) -> Any:
    """The parsed file, a `gguf.GGUFReader`. Its tensors are views of the file.

    Raises ModelError for a file that cannot be read, is truncated or damaged, or is a part of a split one.
    """
    import gguf

    class Reader(gguf.GGUFReader):  # type: ignore[misc]
        # The reader slices its memory map once or twice for each of some 400,000 vocabulary parts, and a slice of a
        # np.memmap costs ten times one of the plain array behind it.
        @property
        def data(self) -> np.ndarray[Any, Any]:
            return self._plain

        @data.setter
        def data(self, mapped: np.ndarray[Any, Any]) -> None:
            self._plain = mapped.view(np.ndarray)

    try:
        reader = Reader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ModelError(f"{path} is truncated or damaged. Download it again.") from error
    except OSError as error:  # else the cache, where it is converted, would be said to be full
        raise ModelError(f"{path} cannot be read: {error.strerror or error}.") from error
    parts = reader.fields.get("split.count")
    if parts is not None and int(parts.parts[parts.data[0]][0]) > 1:
        raise ModelError(f"{path} is one part of a split GGUF; join the parts first with `llama-gguf-split --merge`.")
    return reader


@contextlib.contextmanager
def _one_reading(reader: Any, description: str) -> Iterator[Collection[str]]:
    """Let transformers' GGUF loader use `reader` instead of parsing the file three times, and report its progress.
    Yields the names of the tensors that it has a place for, once it has worked them out.

    It also builds the same table of tensor names once for every module of the model: a quarter of its time. What it
    computes is unchanged; the demo model converts in a third of the time.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as loader

    tables: dict[tuple[Any, int], Any] = {}
    mapped: set[str] = set()
    build, weights_map = gguf.get_tensor_name_map, loader.get_gguf_hf_weights_map

    def name_map(arch: Any, blocks: int) -> Any:
        if (arch, blocks) not in tables:
            tables[arch, blocks] = build(arch, blocks)
        return tables[arch, blocks]

    def places(*args: Any, **kwargs: Any) -> Any:
        found = weights_map(*args, **kwargs)
        mapped.update(found)
        return found

    def reported(items: Iterable[Any], **_: Any) -> Iterator[Any]:
        with progress.task(description, total=len(reader.tensors)) as step:
            for item in items:
                yield item
                step()

    with contextlib.ExitStack() as swaps:
        swaps.enter_context(_swapped(gguf, "GGUFReader", lambda *_: reader))
        swaps.enter_context(_swapped(gguf, "get_tensor_name_map", name_map))
        swaps.enter_context(_swapped(loader, "get_gguf_hf_weights_map", places))
        swaps.enter_context(_swapped(loader, "tqdm", reported))
        yield mapped


@contextlib.contextmanager
def _swapped(module: Any, name: str, value: Callable[..., Any]) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)
