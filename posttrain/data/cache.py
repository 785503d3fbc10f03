"""The token cache on disk: tokenized samples, written once, memory-mapped by every run that reads them.

Stands between `sources.py`, which fills it, and `pipeline.py`, which needs every length before the first step. One
directory per data file, named by a hash of the facts that decide its content. Samples are kept whole: `max_length` and
truncation apply when they are read, so that changing them tokenizes nothing again. Rows that could not be used are kept
beside the good ones, so that what to do about them is no fact either.

A cache is right or absent: it is built in a directory beside its place, synced, and renamed; sizes and checksums are
compared at each opening, and what does not agree is built anew.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32, Int64

from posttrain.data.chat import Sample
from posttrain.errors import UserError

log = logging.getLogger(__name__)

_ARRAYS: dict[str, type[np.generic]] = {
    "tokens": np.int32,
    "loss_weights": np.float32,
    "offsets": np.int64,
    "lines": np.int64,
    "trained": np.int32,
}
_META, _REJECTS = "meta.json", "rejects.jsonl"
_CHUNK = 1 << 22
_ABANDONED_SECONDS = 24 * 3600


@dataclass(frozen=True)
class TokenCache:
    """One data file's samples, memory-mapped. Sample `i` is `tokens[offsets[i]:offsets[i + 1]]`, and so its weights."""

    path: str
    """The data file, as the user named it."""
    directory: Path
    tokens: Int32[np.ndarray, "tokens"]
    loss_weights: Float32[np.ndarray, "tokens"]
    """Weight of predicting this token from those before it."""
    offsets: Int64[np.ndarray, "samples_and_one"]
    lines: Int64[np.ndarray, "samples"]
    """Where in the data file each sample comes from, counted as `read_rows` counts."""
    trained: Int32[np.ndarray, "samples"]
    """Tokens with a loss weight in each whole sample, but for its first token, which nothing predicts."""
    bad_rows: int
    checksum: int
    """Of the tokens, weights and borders of all samples: equal for equal samples."""

    @property
    def num_samples(self) -> int:
        """Samples, before truncation and filtering."""
        return len(self.lines)

    def rejects(self) -> Iterator[dict[str, Any]]:
        """What was said of each row that could not be used, in the file's order."""
        with open(self.directory / _REJECTS, encoding="utf-8") as lines:
            yield from map(json.loads, lines)


class CacheWriter:
    """The files of a cache under construction."""

    def __init__(self, directory: Path):
        names = [*(f"{name}.bin" for name in _ARRAYS), _REJECTS]
        self._directory = directory
        self._sums = {name: {"bytes": 0, "crc32": 0} for name in names}
        self._stack = contextlib.ExitStack()
        self._files = {name: self._stack.enter_context((directory / name).open("wb")) for name in names}
        self.counts = {"samples": 0, "tokens": 0, "bad_rows": 0}
        self._append("offsets.bin", np.zeros(1, np.int64).tobytes())

    def append(self, samples: Sequence[Sample], rejects: Sequence[Mapping[str, Any]]) -> None:
        """Adds samples, and descriptions (JSON objects) of rows that gave none."""
        for reject in rejects:
            self._append(_REJECTS, json.dumps(reject).encode() + b"\n")
        self.counts["bad_rows"] += len(rejects)
        if not samples:
            return
        ends = self.counts["tokens"] + np.cumsum([len(sample.tokens) for sample in samples])
        arrays = {
            "tokens": np.concatenate([sample.tokens for sample in samples]),
            "loss_weights": np.concatenate([sample.loss_weights for sample in samples]),
            "offsets": ends,
            "lines": np.array([sample.line for sample in samples]),
            "trained": np.array([np.count_nonzero(sample.loss_weights[1:]) for sample in samples]),
        }
        for name, array in arrays.items():
            self._append(f"{name}.bin", array.astype(_ARRAYS[name], copy=False).tobytes())
        self.counts["tokens"] = int(ends[-1])
        self.counts["samples"] += len(samples)

    def _append(self, name: str, data: bytes) -> None:
        self._files[name].write(data)
        sums = self._sums[name]
        sums["bytes"] += len(data)
        sums["crc32"] = zlib.crc32(data, sums["crc32"])

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Syncs everything to disk, meta.json last."""
        for file in self._files.values():
            _sync(file)
        with open(self._directory / _META, "w", encoding="utf-8") as file:
            json.dump({"facts": facts, **self.counts, "files": self._sums}, file, indent=1)
            _sync(file)
        _sync_directory(self._directory)

    def close(self) -> None:
        """Closes the files, finished or not."""
        self._stack.close()


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/posttrain/tokens`, by default under `~/.cache`. Caches are never removed; users may do so."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "posttrain" / "tokens"


def open_cache(
    path: str, facts: Mapping[str, Any], build: Callable[[CacheWriter], None], *, cache_dir: str | None = None
) -> TokenCache:
    """The cache that `facts` name, built when there is none.

    Args:
      path: the data file, for reports.
      facts: JSON values; everything that decides what `build` writes.
      build: appends all samples to the writer.
      cache_dir: where caches lie; None for `default_cache_dir()`.

    One process at a time builds a cache, the others wait for it. Where the file system offers no locks several may
    build at once: the first to rename wins, and the others take its cache.

    Raises:
      UserError: the cache directory cannot be used; and whatever `build` raises, except `OSError`.
    """
    if cache_dir is not None and "://" in cache_dir:
        raise UserError(
            f"data.cache_dir: {cache_dir!r} is not a local directory, and the cache is memory-mapped; "
            "leave it unset or name a local path"
        )
    root = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
    place = root / hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    if (cache := _read(place, path)) is not None:
        return cache
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(place, wait=True) as locked:
            _remove_abandoned(root, place if locked else None)
            if (cache := _read(place, path, warn=True)) is None:  # not built while this process waited for its turn
                _build(place, path, facts, build)
                cache = _read(place, path)
    except OSError as error:
        fix = "free some space there" if error.errno == errno.ENOSPC else "make it writable"
        raise UserError(
            f"data.cache_dir: cannot write the token cache in {root}: {error}; {fix}, or name another local directory"
        ) from error
    if cache is None:
        raise UserError(
            f"data.cache_dir: {place} does not read back as it was written; name a directory on another disk"
        )
    return cache


def _read(place: Path, path: str, *, warn: bool = False) -> TokenCache | None:
    """The cache at `place`, or None where there is none or it is not what its meta.json says."""
    if not place.exists():
        return None
    try:
        meta = json.loads((place / _META).read_text(encoding="utf-8"))
        for name in [*(f"{name}.bin" for name in _ARRAYS), _REJECTS]:
            expected = meta["files"][name]
            if (size := (place / name).stat().st_size) != expected["bytes"]:
                raise ValueError(f"{name} has {size} bytes instead of {expected['bytes']}")
            if _checksum(place / name) != expected["crc32"]:
                raise ValueError(f"{name} has another checksum than when it was written")
        arrays = {name: _map(place / f"{name}.bin", dtype) for name, dtype in _ARRAYS.items()}
        samples = [meta["files"][f"{name}.bin"]["crc32"] for name in ("tokens", "loss_weights", "offsets")]
        checksum = zlib.crc32(json.dumps(samples).encode())
        return TokenCache(path=path, directory=place, bad_rows=meta["bad_rows"], checksum=checksum, **arrays)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if warn:
            log.warning("the token cache %s is damaged and is built again: %s", place, error)
        return None


def _checksum(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def _map(path: Path, dtype: type[np.generic]) -> np.ndarray:
    if path.stat().st_size == 0:  # which cannot be mapped
        return np.zeros(0, dtype)
    return np.asarray(np.memmap(path, dtype, mode="r"))  # slices of a plain array cost a tenth of a memmap's


def _build(place: Path, path: str, facts: Mapping[str, Any], build: Callable[[CacheWriter], None]) -> None:
    """Builds beside `place` and renames."""
    temporary = place.with_name(f"{place.name}.tmp-{socket.gethostname()}-{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        with contextlib.closing(CacheWriter(temporary)) as writer:
            build(writer)
            writer.finish(facts)
        try:
            temporary.rename(place)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if _read(place, path) is not None:  # another process was first
                return
            shutil.rmtree(place)
            temporary.rename(place)
        _sync_directory(place.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    """Makes new names in `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _locked(place: Path, *, wait: bool) -> Iterator[bool]:
    """Holds the lock of `place`; the kernel drops it with its process. Yields whether the lock could be had."""
    with open(place.with_name(f"{place.name}.lock"), "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except BlockingIOError:
            locked = wait
            if wait:
                log.info("waiting for another process that builds %s", place)
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            locked = False
        yield locked


def _remove_abandoned(root: Path, own: Path | None) -> None:
    """Clears away what killed builds left. `own` is the place whose lock this process holds.

    A free lock proves that no process of this machine builds there; other machines' directories are only taken for
    abandoned when nothing was written to them for a day, because not every network file system shares its locks.
    """
    for temporary in root.glob("*.tmp-*"):
        place = root / temporary.name.split(".")[0]
        with contextlib.ExitStack() as stack:
            locked = place == own or stack.enter_context(_locked(place, wait=False))
            here = temporary.name.startswith(f"{place.name}.tmp-{socket.gethostname()}-")
            with contextlib.suppress(FileNotFoundError):  # its builder has just finished
                age = time.time() - max(path.stat().st_mtime for path in [temporary, *temporary.iterdir()])
                if (locked and here) or age > _ABANDONED_SECONDS:
                    log.info("removing %s, left by a build that was killed", temporary)
                    shutil.rmtree(temporary, ignore_errors=True)
