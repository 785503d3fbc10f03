"""Claims on work in a directory that several processes write: locks that end with their process, and what kills leave.

Under `cache.py` and `shards.py`. The directory may be one that all hosts share, or each host's own disk; nothing here
needs to know which. Where a file system has no locks, or does not share them between hosts, work may be done twice.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

log = logging.getLogger(__name__)

Claim = Literal["mine", "taken", "no locks"]

_ABANDONED_SECONDS = 24 * 3600
_TEMPORARY, _PARTS = ".tmp-", ".parts-"


@contextlib.contextmanager
def claimed(lock: Path, *, wait: bool = False) -> Iterator[Claim]:
    """Holds the lock file `lock`, made where there is none; the kernel drops it with its process.

    Yields whether this process has the claim. With `wait` it is never `taken`.
    """
    with open(lock, "ab") as file:
        claim: Claim = "mine"
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            claim = "taken"
            if wait:
                log.info("waiting for another process that holds %s", lock)
                fcntl.flock(file, fcntl.LOCK_EX)
                claim = "mine"
        except OSError:  # a file system without locks
            claim = "no locks"
        yield claim


def lock_of(place: Path) -> Path:
    """The lock file of whatever is made at `place`."""
    return place.with_name(f"{place.name}.lock")


def temporary_name(place: Path) -> Path:
    """A name beside `place` that nobody else uses, and that `remove_abandoned` knows."""
    return place.with_name(f"{place.name}{_TEMPORARY}{socket.gethostname()}-{uuid.uuid4().hex[:8]}")


def parts_name(place: Path, key: str) -> Path:
    """Where the parts of what will be at `place` are collected; `key` tells different divisions apart."""
    return place.with_name(f"{place.name}{_PARTS}{key}")


def remove_abandoned(root: Path, own: Path | None) -> None:
    """Clears away what killed builds left under `root`. `own` is the place whose lock this process holds.

    A free lock proves that no process of this machine builds there; other machines' files, and parts that somebody may
    want to go on with, are only taken for abandoned when nothing was written to them for a day, because not every
    network file system shares its locks.
    """
    for left in [*root.glob(f"*{_TEMPORARY}*"), *root.glob(f"*{_PARTS}*")]:
        place = root / left.name.split(".")[0]
        with contextlib.ExitStack() as stack:
            free = place == own or stack.enter_context(claimed(lock_of(place))) == "mine"
            here = left.name.startswith(f"{place.name}{_TEMPORARY}{socket.gethostname()}-")
            with contextlib.suppress(FileNotFoundError):  # its builder has just finished
                age = time.time() - max(path.stat().st_mtime for path in [left, *left.iterdir()])
                if (free and here) or age > _ABANDONED_SECONDS:
                    log.info("removing %s, left by a build that was killed", left)
                    shutil.rmtree(left, ignore_errors=True)


def sync(file: Any) -> None:
    """Makes what was written to an open file survive a power cut."""
    file.flush()
    os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Makes new names in `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
