"""What a user says of the machine: how much memory may be used, and who measures."""

from __future__ import annotations

import importlib.util
import math
import re

from shallower.errors import UserError

_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_MOST = 1e18  # bytes
_AMOUNT = re.compile(r"(\d+\.?\d*|\.\d+)\s*(?:([kmgt])(i?)b?|b)?", re.IGNORECASE)
_CLUSTER = re.compile(r"auto(:0*[1-9]\d*)?|(ray://)?(?!auto:)[^\s/]+:\d+")


def parse_memory(text: str | int | None) -> int | None:
    """Bytes in `4GB`, `500MB` (powers of 1000), `4GiB` (powers of 1024) or plain bytes; None stays None.

    Raises UserError for anything else.
    """
    if text is None:
        return None
    found = _AMOUNT.fullmatch(str(text).strip())
    if found is None:
        raise UserError(f"--memory {str(text)!r} cannot be read: write bytes, as in 4GB, 500MB or 4GiB.")
    number, power, binary = found.groups()
    unit: int = (1024 if binary else 1000) ** _POWERS[(power or "").lower()]
    bytes_ = float(number) * unit
    if bytes_ >= _MOST:
        raise UserError(f"--memory {str(text)[:12]}… is more than any machine has: write bytes, as in 4GB or 500MB.")
    return math.floor(bytes_)


def parse_workers(text: str | int | None) -> int | str | None:
    """A number of Ray workers on this machine, or where a Ray cluster runs (see `cluster`); None for this process only.

    Raises UserError for what is neither, and when Ray is asked for and not installed.
    """
    if text is None:
        return None
    asked = str(text).strip()
    number = int(asked) if asked.isdecimal() else None
    if number == 0 or (number is None and _CLUSTER.fullmatch(asked) is None):
        raise UserError(
            f"--workers {asked!r} cannot be read: write how many to start on this machine, as in --workers 4, or where "
            "a Ray cluster runs: auto (RAY_ADDRESS, or the cluster of this machine), auto:4 (at most 4 workers there), "
            "host:port or ray://host:port."
        )
    if importlib.util.find_spec("ray") is None:
        raise UserError(
            "--workers needs Ray, which is not installed: pip install 'shallower[ray]', or drop --workers to measure "
            "with threads of this process."
        )
    return asked if number is None else number


def cluster(asked: str) -> tuple[str, int | None]:
    """The address of a Ray cluster, and how many workers it may have at most: `auto:4` is 4 on the one that `auto` is,
    and what has no number has no limit. asked: from `parse_workers`.
    """
    address, _, most = asked.partition(":")
    return (address, int(most)) if address == "auto" and most else (asked, None)
