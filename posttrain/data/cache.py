"""The token cache on disk: tokenized samples, written once, memory-mapped by every run that reads them.

Stands between `sources.py`, which fills it, and `samples.py`, which needs every length before the first step. One
directory per data file, named by a hash of the facts that decide its content. Samples are kept whole: `max_length` and
truncation apply when they are read, so that changing them tokenizes nothing again. Rows that could not be used are kept
beside the good ones, so that what to do about them is no fact either.

A cache is right or absent: it is built in a directory beside its place, synced, and renamed; sizes and checksums are
compared at each opening, and what does not agree is built anew. The same facts give the same bytes, whoever builds.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int8, Int32, Int64, UInt64

from posttrain.data.blocks import COLUMNS, Block
from posttrain.data.chat import Sample
from posttrain.data.claims import claimed, lock_of, remove_abandoned, sync, sync_directory, temporary_name
from posttrain.errors import UserError

log = logging.getLogger(__name__)

_ARRAYS = {"offsets" if name == "lengths" else name: dtype for name, dtype in COLUMNS.items()}
_CHECKED = ("tokens", "loss_weights", "offsets", "splits", "labels", "margins")
_META, _REJECTS = "meta.json", "rejects.jsonl"
_CHUNK = 1 << 22


class CacheDirError(UserError):
    """The directory of the caches cannot be used: it is no use to go on with the next file."""


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
    hashes: UInt64[np.ndarray, "samples"]
    """The first 8 bytes of BLAKE2b over each sample's tokens, loss weights and label."""
    prompt_hashes: UInt64[np.ndarray, "samples"]
    """The same over the tokens before the first trained one; 0 where nothing is trained."""
    splits: Int32[np.ndarray, "samples"]
    """Of pairs of answers: how many of a sample's tokens are the chosen one, the first; 0 for single samples."""
    labels: Int8[np.ndarray, "samples"]
    """Of labelled answers: 1 if desirable, -1 if not; else 0."""
    margins: Float32[np.ndarray, "samples"]
    """Of pairs: by how much the chosen answer is better; 0 where the row does not say."""
    begins: Bool[np.ndarray, "samples"]
    """Whether each sample is the first of its record: the others before the next such one are of the same."""
    rows: int
    """Records read from the file, bad ones included."""
    left_out: int
    """Records that give nothing, though nothing is wrong with them."""
    bad_rows: int
    notes: Mapping[str, int]
    """What is worth counting about the samples, and about what is left out."""
    checksum: int
    """32 bits of the tokens, weights, borders, labels and margins of all samples: equal for equal samples."""

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
        self._notes: Counter[str] = Counter()
        self._lines = 0
        self.counts = {"samples": 0, "tokens": 0, "bad_rows": 0, "rows": 0, "left_out": 0}
        self._append("offsets.bin", np.zeros(1, np.int64).tobytes())

    def append(self, samples: Sequence[Sample], rejects: Sequence[Mapping[str, Any]]) -> None:
        """Adds samples, and descriptions (JSON objects) of rows that gave none; each counts as a row of its own."""
        self.add(Block.of(samples, rejects, rows=len(samples) + len(rejects)))

    def add(self, block: Block) -> None:
        """Adds the rows that follow those of the blocks before, whose lines they count on from."""
        for reject in block.rejects:
            moved = {**reject, "line": reject["line"] + self._lines}
            self._append(_REJECTS, json.dumps(moved).encode() + b"\n")
        columns = dict(block.columns)
        columns["lines"] = columns["lines"] + self._lines
        columns["offsets"] = self.counts["tokens"] + np.cumsum(columns.pop("lengths"))
        for name, dtype in _ARRAYS.items():
            self._append(f"{name}.bin", columns[name].astype(dtype, copy=False).tobytes())
        self.counts["samples"] += block.num_samples
        self.counts["tokens"] += block.num_tokens
        self.counts["bad_rows"] += len(block.rejects)
        self.counts["rows"] += block.rows
        self.counts["left_out"] += block.left_out
        self._notes.update(block.notes)
        self._lines += block.lines_read

    def _append(self, name: str, data: bytes) -> None:
        self._files[name].write(data)
        sums = self._sums[name]
        sums["bytes"] += len(data)
        sums["crc32"] = zlib.crc32(data, sums["crc32"])

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Syncs everything to disk, meta.json last."""
        for file in self._files.values():
            sync(file)
        meta = {"facts": facts, **self.counts, "notes": dict(sorted(self._notes.items())), "files": self._sums}
        with open(self._directory / _META, "w", encoding="utf-8") as file:
            json.dump(meta, file, indent=1)
            sync(file)
        sync_directory(self._directory)

    def close(self) -> None:
        """Closes the files, finished or not."""
        self._stack.close()


# ---- places ---------------------------------------------------------------------------------------------------------


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/posttrain/tokens`, by default under `~/.cache`. Caches are never removed; users may do so."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "posttrain" / "tokens"


def cache_place(facts: Mapping[str, Any], cache_dir: str | None = None) -> Path:
    """The directory of the cache that `facts` (JSON values) name. Raises UserError where `cache_dir` is not local."""
    if cache_dir is not None and "://" in cache_dir:
        raise CacheDirError(
            f"data.cache_dir: {cache_dir!r} is not a local directory, and the cache is memory-mapped; "
            "leave it unset or name a local path"
        )
    root = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
    return root / hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


@contextlib.contextmanager
def writing(root: Path) -> Iterator[None]:
    """Makes a CacheDirError of what goes wrong while caches are written."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        fix = "free some space there" if full else "make it writable"
        raise CacheDirError(
            f"data.cache_dir: cannot write the token cache in {root}: {error}; {fix}, or name another local "
            "directory (what is finished there is used by the next start)"
        ) from error


# ---- opening and building -------------------------------------------------------------------------------------------


def open_cache(
    path: str,
    facts: Mapping[str, Any],
    build: Callable[[CacheWriter], None],
    *,
    cache_dir: str | None = None,
    wait: bool = True,
) -> TokenCache | None:
    """The cache that `facts` name, built when there is none.

    Args:
      path: the data file, for reports.
      facts: JSON values; everything that decides what `build` writes.
      build: adds all samples to the writer.
      cache_dir: where caches lie; None for `default_cache_dir()`.
      wait: for another process that is building it; without, None is returned then.

    One process at a time builds a cache. Where the file system offers no locks several may build at once: the first to
    rename wins, and the others take its cache.

    Raises:
      UserError: the cache directory cannot be used (CacheDirError); and whatever `build` raises, except `OSError`.
    """
    place = cache_place(facts, cache_dir)
    root = place.parent
    if (cache := read_cache(place, path)) is not None:
        return cache
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
        with claimed(lock_of(place), wait=wait) as claim:
            if claim == "taken":
                return None
            remove_abandoned(root, place if claim == "mine" else None)
            if (cache := read_cache(place, path, warn=True)) is None:  # not built while this process waited
                _build(place, path, facts, build)
                cache = read_cache(place, path)
    if cache is None:
        raise CacheDirError(
            f"data.cache_dir: {place} does not read back as it was written; name a directory on another disk"
        )
    return cache


def read_cache(place: Path, path: str, *, warn: bool = False) -> TokenCache | None:
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
        samples = [meta["files"][f"{name}.bin"]["crc32"] for name in _CHECKED]
        return TokenCache(
            path=path,
            directory=place,
            checksum=zlib.crc32(json.dumps(samples).encode()),
            rows=meta["rows"],
            left_out=meta["left_out"],
            bad_rows=meta["bad_rows"],
            notes=meta["notes"],
            **arrays,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        if warn:
            log.warning("the token cache %s is damaged and is built again: %s", place, error)
        return None


def remove_damaged(place: Path, path: str) -> None:
    """Makes room for a new cache where the one at `place` does not read back."""
    if not place.exists() or read_cache(place, path) is not None:
        return
    with writing(place.parent), claimed(lock_of(place), wait=True):
        if read_cache(place, path, warn=True) is None:  # nobody has built it again meanwhile
            shutil.rmtree(place, ignore_errors=True)


def _checksum(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def _map(path: Path, dtype: str) -> np.ndarray:
    if path.stat().st_size == 0:  # which cannot be mapped
        return np.zeros(0, dtype)
    return np.asarray(np.memmap(path, dtype, mode="r"))  # slices of a plain array cost a tenth of a memmap's


def _build(place: Path, path: str, facts: Mapping[str, Any], build: Callable[[CacheWriter], None]) -> None:
    """Builds beside `place` and renames."""
    temporary = temporary_name(place)
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
            if read_cache(place, path) is not None:  # another process was first
                return
            shutil.rmtree(place)
            temporary.rename(place)
        sync_directory(place.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
