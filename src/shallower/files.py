"""Files and folders that are there whole or not at all: written under a temporary name, then renamed. Torch-free."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shallower.errors import OutputError


def expanded(path: str | os.PathLike[str]) -> Path:
    """The path with `~` for the home folder, as a shell reads it: what comes from Python or a file has seen none."""
    return Path(os.path.expanduser(path))


def nearest_parent(path: str | os.PathLike[str]) -> Path:
    """The innermost of the path's parents that is there."""
    return next(parent for parent in Path(os.path.abspath(expanded(path))).parents if os.path.lexists(parent))


def require_writable(path: str | os.PathLike[str], told: str) -> None:
    """Raise OutputError unless a file or folder can be made at `path`, whose parents may be missing; nothing is left
    there. told: what to call it.
    """
    parent = nearest_parent(path)
    if not parent.is_dir():
        raise OutputError(f"{told} cannot be written: {parent} is not a folder; choose another place.")
    try:  # permissions do not tell of every folder that takes nothing, such as /proc
        os.rmdir(tempfile.mkdtemp(dir=parent, prefix=".shallower-"))
    except OSError as error:
        why = f"in {parent} nothing can be made ({error.strerror or error})"
        raise OutputError(f"{told} cannot be written: {why}; choose another place or change its permissions.") from None


def require_free(folder: Path, told: str, *, force: bool, replaceable: Callable[[Path], bool], what: str) -> None:
    """Raise OutputError unless the folder can be made, or `force` may replace it.

    told: what to call it. replaceable: whether a folder may be replaced; what: such a folder in words.
    """
    folder = expanded(folder)
    require_writable(folder, told)
    if not os.path.lexists(folder):
        return
    whole = Path(os.path.abspath(folder))
    if not force:
        raise OutputError(f"{told} exists; choose another folder, or add --force to replace it.")
    if folder.is_symlink() or not folder.is_dir():
        raise OutputError(f"{told} is not a folder, so --force does not replace it; choose another name.")
    if any(whole in (place, *place.parents) for place in (Path.cwd(), Path.home())):
        raise OutputError(
            f"{told} is, or holds, the current folder or your home, so --force does not replace it; choose another."
        )
    if not replaceable(folder):
        raise OutputError(
            f"{told} is not {what}, so --force does not replace it; choose another folder or remove it yourself."
        )


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a name beside `path` to write a file to, which gets the name `path` when the `with` ends well; otherwise
    it is deleted, and `path` is as it was.

    Raises OutputError when the place cannot be written.
    """
    path = expanded(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}. Free some room or choose another place."
        ) from None
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder beside `folder` to write to, which takes its place when the `with` ends well; otherwise it
    is deleted, and `folder` is as it was.

    Raises OSError when the place cannot be written.
    """
    folder = expanded(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        yield temporary
        _open_up(temporary)
        for path in (*temporary.rglob("*"), temporary):
            _flush(path)
        _move(temporary, folder)
        _flush(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` (UTF-8) to a file that is there whole or not at all. Raises as `replacing`."""
    with replacing(path) as temporary:
        # a file's name may hold bytes that are no UTF-8; what they become, JSON reads as what they were
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def _open_up(folder: Path) -> None:
    """Give folder and files the permissions that any new one gets; mkdtemp and safetensors make them private."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (*folder.rglob("*"), folder):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _move(temporary: Path, target: Path) -> None:
    """Rename to `target`; what stands there moves aside first and is deleted last."""
    if not os.path.lexists(target):
        os.rename(temporary, target)
        return
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old."))
    try:
        os.rename(target, aside / target.name)
        os.rename(temporary, target)
    except BaseException:  # a signal may come behind a rename, too
        if (aside / target.name).is_dir() and not os.path.lexists(target):
            os.rename(aside / target.name, target)
        shutil.rmtree(aside, ignore_errors=True)
        raise
    try:
        shutil.rmtree(aside)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
