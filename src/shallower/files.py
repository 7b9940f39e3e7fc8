"""Files and folders that are there whole or not at all: written under a temporary name, then renamed. Torch-free.

What is not finished is in a hidden folder beside its target, where the process that writes holds a lock:

    .NAME.XXXXXXXX.part/new         the file or folder that is being written
    .NAME.XXXXXXXX.part/old         what NAME was, from before `new` takes its place until it is deleted
    .NAME.XXXXXXXX.part/lock-HOST   locked until the process ends, however it ends

So a process that was killed leaves a folder whose lock is free, and the next one that writes NAME removes it. What
another machine left is not touched: on a network file system its locks may not be seen from here.
"""

from __future__ import annotations

import errno
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath

from shallower import progress
from shallower.errors import OutputError

try:
    import fcntl
except ImportError:  # Windows has no such locks: there what a kill leaves stays
    fcntl = None  # type: ignore[assignment]

_NEW, _OLD, _SUFFIX = "new", "old", ".part"
# what systems, notebooks and the Hub leave in any folder
_LEFT = (".DS_Store", "Thumbs.db", "desktop.ini", ".gitattributes", ".ipynb_checkpoints", ".cache/huggingface")


def expanded(path: str | os.PathLike[str]) -> Path:
    """The path with `~` for the home folder, as a shell reads it: what comes from Python or a file has seen none."""
    return Path(os.path.expanduser(path))


def nearest_parent(path: str | os.PathLike[str]) -> Path:
    """The innermost of the path's parents that is there."""
    whole = Path(os.path.abspath(expanded(path)))
    return next((parent for parent in whole.parents if os.path.lexists(parent)), whole)


def require_writable(path: str | os.PathLike[str], told: str) -> None:
    """Raise OutputError unless a file or folder can be made at `path`, whose parents may be missing; nothing is left
    there. told: what to call it.
    """
    parent = nearest_parent(path)
    if not parent.is_dir():
        raise OutputError(f"{told} cannot be written: {parent} is not a folder; choose another place.")
    try:  # permissions do not tell of every folder that takes nothing, such as /proc
        os.rmdir(tempfile.mkdtemp(dir=parent, prefix=f".{expanded(path).name}.", suffix=_SUFFIX))  # as `_workplace`
    except OSError as error:
        why = f"in {parent} nothing can be made ({error.strerror or error})"
        raise OutputError(f"{told} cannot be written: {why}; choose another place or change its permissions.") from None


def require_free(
    folder: Path,
    told: str,
    *,
    force: bool,
    replaceable: Callable[[Path], bool],
    what: str,
    known: Callable[[PurePath], bool] = lambda path: True,
) -> None:
    """Raise OutputError unless the folder can be made, or `force` may replace it. What a process that was killed left
    there is removed first.

    told: what to call it. replaceable: whether a folder with something in it may be replaced; what: such a folder in
    words. known: whether a file, by its path inside, belongs to what was written there; others are not replaced.
    """
    folder = expanded(folder)
    require_writable(folder, told)
    settle(folder)
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
    if any(folder.iterdir()) and not replaceable(folder):
        raise OutputError(
            f"{told} is not {what}, so --force does not replace it; choose another folder or remove it yourself."
        )
    inside = (path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir())
    foreign = [
        name.as_posix()
        for name in (path.relative_to(folder) for path in inside)
        if not (known(name) or left_by_systems(name))
    ]
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise OutputError(
            f"{told} also holds {', '.join(foreign[:3])}{more}, which shallower did not write and --force would "
            "delete; move that to another place, or choose another folder."
        )


def left_by_systems(inside: PurePath) -> bool:
    """Whether a path inside a folder is, or is in, what nobody misses: of the system, of notebooks, of the Hub."""
    return inside.name in _LEFT or any(parent.as_posix() in _LEFT for parent in (inside, *inside.parents))


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a name beside `path` to write a file to, which gets the name `path` when the `with` ends well; otherwise
    it is deleted, and `path` is as it was.

    Raises OutputError when the place cannot be written.
    """
    path = expanded(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        settle(path)
        with _workplace(path) as place:
            yield place / _NEW
            _flush(place / _NEW)
            os.replace(place / _NEW, path)
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}. Free some room or choose another place."
        ) from None


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder beside `folder` to write to, which takes its place when the `with` ends well; otherwise it
    is deleted, and `folder` is as it was. For after `require_free`.

    Raises OSError when the place cannot be written.
    """
    folder = expanded(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _workplace(folder) as place:
        made = place / _NEW
        made.mkdir()
        yield made
        _open_up(made)
        for path in (*made.rglob("*"), made):
            _flush(path)
        _move(place, folder)
        _flush(folder.parent)


def settle(target: Path) -> None:
    """Remove what processes of this machine left that were killed while they wrote `target`. Where one was killed
    between the two renames of a replacement, what `target` was gets its name back, or where another has that by now, is
    told of.
    """
    left_by = re.compile(rf"\.{re.escape(target.name)}\.\w{{8}}{re.escape(_SUFFIX)}")
    there: list[str] = []
    with suppress(OSError):
        there = [] if fcntl is None else [name for name in os.listdir(target.parent) if left_by.fullmatch(name)]
    for place in (target.parent / name for name in there):
        try:
            lock = os.open(place / _lock_name(), os.O_RDWR)
        except OSError:  # of another machine or user, or just removed
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # being written
            os.close(lock)
            continue
        if _unsettled(place):
            _put_back(place / _OLD, target)
        _leave(place, lock)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Inside the `with` no other process of this machine is in one for the same path; the file beside it that they
    agree by stays.
    """
    with open(path.with_name(f"{path.name}.lock"), "w") as lock:
        if fcntl is not None:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _workplace(target: Path) -> Iterator[Path]:
    """Yields a new folder as in the module's docstring, which ends with the `with`."""
    place = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=_SUFFIX))
    try:
        lock = os.open(place / "lock", os.O_RDWR | os.O_CREAT)
    except OSError:
        place.rmdir()
        raise
    try:
        if fcntl is not None:
            with suppress(OSError):  # a file system without locks: then what is left by a kill stays
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.rename(place / "lock", place / _lock_name())  # nobody finds it before it is held
        yield place
    finally:
        _leave(place, lock)


def _lock_name() -> str:
    return f"lock-{platform.node()}"


def _unsettled(place: Path) -> bool:
    """Whether what was to be replaced lost its name, and what replaces it has not got it yet."""
    return os.path.lexists(place / _OLD) and os.path.lexists(place / _NEW)


def _put_back(old: Path, target: Path) -> None:
    was = "was before a replacement of it that did not end"
    try:
        if not os.path.lexists(target):
            os.rename(old, target)
            progress.note(f"{target} is again what it {was}.")
            return
    except OSError:
        pass
    progress.note(f"{old} is what {target} {was}: move it to where you want it, or delete {old.parent}.")


def _leave(place: Path, lock: int) -> None:
    """Remove a workplace, but not the only copy of what its target was. The lock goes last, so that whatever is left by
    a kill is still known; closed, as NFS keeps open files.
    """
    try:
        _clear(place)
    except BaseException:  # Ctrl-C
        _clear(place)
        raise
    finally:
        os.close(lock)
        if not any(os.path.lexists(place / name) for name in (_OLD, _NEW)):
            shutil.rmtree(place, ignore_errors=True)


def _clear(place: Path) -> None:
    if not _unsettled(place):
        for name in (_OLD, _NEW):
            remove(place / name)


def remove(path: Path) -> None:
    """Delete a file or a folder if it is there and that can be done; another process may delete it just now."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` (UTF-8) to a file that is there whole or not at all. Raises as `replacing`."""
    with replacing(path) as temporary:
        # a file's name may hold bytes that are no UTF-8; what they become, JSON reads as what they were
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextmanager
def writing(target: Path, *, when_full: str) -> Iterator[None]:
    """Inside the `with`, what fails when `target` is written, by safetensors, too, becomes OutputError.

    when_full: what to do about a full disk, as the message ends with.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise OutputError(f"the disk is full: {target} was not written; {when_full}") from error
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"cannot write {target}: {reason}. Choose another place.") from error


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


def _move(place: Path, target: Path) -> None:
    """Rename what is new to `target`; what stands there moves aside first, and is deleted with the workplace."""
    try:
        if os.path.lexists(target):
            os.rename(target, place / _OLD)
        os.rename(place / _NEW, target)
    except BaseException:  # a signal may come behind a rename, too
        if _unsettled(place) and not os.path.lexists(target):
            os.rename(place / _OLD, target)
        elif _unsettled(place):
            remove(place / _OLD)  # another process has replaced it meanwhile
        raise
