"""Checkpoints from the Hugging Face Hub, through its own client and cache."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from shallower import progress
from shallower.checkpoint.locate import read_config
from shallower.checkpoint.stock import quiet
from shallower.errors import ModelError, first_line

_TEXTS = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "README.md"]
_TEMPLATES = ["config.json", "additional_chat_templates/*.jinja"]  # the first as the client warns if nothing matches
_SUBFOLDERS = ["*/*"]  # "*" matches across folders, and subfolders hold other formats of the same weights
_WEIGHTS = ["model*.safetensors"]  # not the second copies that some repositories hold under other names
# Among them what the HTTP client below raises of its own, such as ProxyError: httpx or httpx2, by the version of the
# Hub's. ValueError: a name, or the address of a proxy, that is none.
_FAILURES: tuple[type[Exception], ...] = (
    *(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError" and issubclass(kind, Exception)),
    *(HfHubHTTPError, EntryNotFoundError, OSError, ValueError),
)


def fetch_config(name: str, revision: str | None, *, code: bool) -> Path:
    """Fetch everything but the weights. Returns the snapshot's folder, whose name is the commit.

    code: also fetch the Python files, for remote code.

    Raises ModelError, saying what to do, when the Hub cannot be reached, lacks the checkpoint, or asks for a login.
    """
    folder = _fetch(name, revision, [*_TEXTS, "*.py"] if code else _TEXTS)
    _fetch(name, folder.name, _TEMPLATES, ignored=None)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{name} on the Hub has no config.json: it is not a checkpoint that transformers loads.")
    read_config(folder)
    return folder


def fetch_weights(name: str, revision: str) -> Path:
    """Fetch the safetensors of a commit into the folder of `fetch_config`.

    Raises ModelError like `fetch_config`, and when the repository has no safetensors.
    """
    folder = _fetch(name, revision, _WEIGHTS)
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{name} on the Hub has no safetensors weights. Pickled ones are not read; look for another revision or "
            "copy, or convert it with `save_pretrained`."
        )
    return folder


def _fetch(name: str, revision: str | None, patterns: list[str], ignored: list[str] | None = _SUBFOLDERS) -> Path:
    try:
        with quiet(), progress.task(f"fetching {name}"):
            found = snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=ignored)
            return Path(found)
    except GatedRepoError:
        raise ModelError(
            f"{name} is gated: accept its terms at https://huggingface.co/{name} and log in with `hf auth login`."
        ) from None
    except RevisionNotFoundError:
        raise ModelError(f"{name} has no revision {revision!r}; see https://huggingface.co/{name}/commits.") from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"there is no model {name} on the Hub, or it is private: check the name, or log in with `hf auth login`."
        ) from None
    except (OfflineModeIsEnabled, LocalEntryNotFoundError):
        raise ModelError(
            f"{name} is not in the local Hub cache and the Hub cannot be reached (offline, or HF_HUB_OFFLINE is set). "
            "Connect, or give a local folder, a .gguf file, or demo."
        ) from None
    except _FAILURES as error:
        raise ModelError(f"{name} cannot be fetched from the Hub: {first_line(error)}") from error
