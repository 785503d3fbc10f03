"""Token caches built by several processes together: who does what, what is left when one dies, and the merging.

Between `sources.py`, which knows how a part of a file is tokenized, and `cache.py`. A big file falls into parts, a
function of the file alone. Beside the cache's place a directory collects the finished ones as shards: a process claims
the next part that is neither finished nor claimed, tokenizes it, and puts it there by a rename. When all are there, one
process merges them in order. A claim is a lock that the kernel drops with its process, so the parts of one that died
are taken over; the part on which one failed is tried by the others, which then fail in the same way. A file of one part
becomes a cache directly.

So processes that see one directory share the work, and on disks of their own each host does all of it. Either way the
cache has the same bytes, whoever did what.
"""

import contextlib
import hashlib
import logging
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from posttrain.data.blocks import Block, DamagedBlock, counts_in
from posttrain.data.cache import (
    CacheDirError,
    CacheWriter,
    TokenCache,
    cache_place,
    open_cache,
    read_cache,
    remove_damaged,
    writing,
)
from posttrain.data.claims import claimed, parts_name, sync, temporary_name
from posttrain.data.files import Part
from posttrain.errors import UserError

log = logging.getLogger(__name__)

_SHARD = ".shard"
_SHORTEST_WAIT, _LONGEST_WAIT = 0.02, 1.0
_MAX_DAMAGED = 8
"""So often a cache or one of its shards may read back damaged before the disk is given up."""


@runtime_checkable
class Job(Protocol):
    """How one file is tokenized."""

    @property
    def path(self) -> str: ...

    @property
    def size(self) -> int:
        """Bytes of the file, for a progress bar."""
        ...

    @property
    def facts(self) -> Mapping[str, Any]:
        """JSON values; everything that decides what the blocks hold."""
        ...

    def parts(self) -> list[Part]:
        """The file's parts in order, the same for everyone. Raises UserError."""
        ...

    def blocks(self, part: Part) -> Iterator[Block]:
        """The blocks of a part in order. Raises UserError, also when the file has changed."""
        ...

    def close(self) -> None:
        """Called when there is nothing to do for now; `blocks` may be called again."""
        ...


class _ShardGone(Exception):
    """A shard that is to be merged is not there, or not what was written."""


class CacheBuild:
    """One file's cache, as far as it is built. `cache` is None until it is there."""

    def __init__(self, job: Job, *, cache_dir: str | None):
        self.job = job
        self.cache: TokenCache | None = None
        self._cache_dir = cache_dir
        self._place = cache_place(job.facts, cache_dir)
        self._parts: list[Part] = []
        self._bytes = 0
        self._shards = Path()
        self._finished: set[int] = set()
        self._finished_bytes = 0
        self._counts: Counter[str] = Counter()
        self._damaged = 0
        remove_damaged(self._place, job.path)
        self.cache = read_cache(self._place, job.path)
        for left in self._place.parent.glob(parts_name(self._place, "*").name):
            with contextlib.suppress(OSError):
                os.utime(left)  # it may be days old, and is wanted now

    @property
    def fraction(self) -> float:
        """How much of the file is tokenized, by anyone: 0 to 1."""
        if self.cache is not None:
            return 1.0
        return self._finished_bytes / max(self._bytes, 1)

    @property
    def counts(self) -> Mapping[str, int]:
        """`tokens`, `samples` and `bad_rows` of what is tokenized, by anyone."""
        if self.cache is not None:
            cache = self.cache
            return {"tokens": len(cache.tokens), "samples": cache.num_samples, "bad_rows": cache.bad_rows}
        return dict(self._counts)

    def step(self) -> bool:
        """Does one piece of the work: a part, or the cache itself. False where nothing is left, or others do it all.

        Raises UserError.
        """
        if self.cache is not None:
            return False
        if self._place.exists():  # another process has made it
            self.cache = read_cache(self._place, self.job.path)
            if self.cache is None:
                self._count_damage()
                remove_damaged(self._place, self.job.path)
            return True
        if not self._parts:
            self._parts = self.job.parts()
            self._bytes = sum(part.size for part in self._parts)
            key = hashlib.sha256(repr(self._parts).encode()).hexdigest()[:8]
            self._shards = parts_name(self._place, key)
        if len(self._parts) == 1:
            return self._make(self._write_directly)
        with writing(self._place.parent):
            try:
                return self._step_shards()
            except FileNotFoundError:
                if self._shards.exists():
                    raise
                return True  # the shards were merged and cleared away by another process just now

    def _make(self, build: Callable[[CacheWriter], None]) -> bool:
        """Makes the cache unless another process is doing so: then False."""
        options: dict[str, Any] = {"cache_dir": self._cache_dir, "wait": False}
        self.cache = open_cache(self.job.path, self.job.facts, build, **options)
        return self.cache is not None

    def _write_directly(self, writer: CacheWriter) -> None:
        for block in self.job.blocks(self._parts[0]):
            writer.add(block)

    # ---- shards -----------------------------------------------------------------------------------------------------

    def _step_shards(self) -> bool:
        self._shards.mkdir(parents=True, exist_ok=True)
        if self._place.exists():  # asked after the directory was made: the one who made the cache may not have seen it
            shutil.rmtree(self._shards, ignore_errors=True)
            return True
        missing = self._missing()
        if not missing:
            return self._merge()
        for index in missing:
            lock = self._shards / f"{index:06}.lock"
            with claimed(lock) as claim:
                if claim == "taken":
                    continue
                if claim == "no locks":  # the processes divide the work by going different ways
                    index = random.choice(missing)
                if not self._shard(index).exists():  # nobody has finished it meanwhile
                    self._write_shard(index)
                lock.unlink(missing_ok=True)
            return True
        return False

    def _shard(self, index: int) -> Path:
        return self._shards / f"{index:06}{_SHARD}"

    def _missing(self) -> list[int]:
        """The parts that are not finished; takes note of what the others hold."""
        finished = {int(name.removesuffix(_SHARD)) for name in os.listdir(self._shards) if name.endswith(_SHARD)}
        for index in sorted(finished - self._finished):
            self._finished_bytes += self._parts[index].size
            with open(self._shard(index), "rb") as file:
                self._counts.update(counts_in(file.readline()))
        self._finished |= finished
        return [index for index in range(len(self._parts)) if index not in finished]

    def _write_shard(self, index: int) -> None:
        data = Block.join(self.job.blocks(self._parts[index])).to_bytes()
        temporary = temporary_name(self._shard(index))
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                sync(file)
            temporary.rename(self._shard(index))
        finally:
            temporary.unlink(missing_ok=True)

    def _merge(self) -> bool:
        try:
            made = self._make(self._write_shards)
        except _ShardGone:  # it is missing now, and somebody tokenizes the part again
            return True
        if made:
            shutil.rmtree(self._shards, ignore_errors=True)
        return made

    def _write_shards(self, writer: CacheWriter) -> None:
        for index in range(len(self._parts)):
            shard = self._shard(index)
            try:
                writer.add(Block.from_bytes(shard.read_bytes()))
            except FileNotFoundError as error:
                raise _ShardGone from error
            except DamagedBlock as error:
                log.warning("the shard %s is damaged and is made again: %s", shard, error)
                shard.unlink(missing_ok=True)
                self._count_damage()
                raise _ShardGone from error

    def _count_damage(self) -> None:
        self._damaged += 1
        if self._damaged > _MAX_DAMAGED:
            raise CacheDirError(
                f"data.cache_dir: {self._place} does not read back as it was written; name a directory on another disk"
            )


def build_together(builds: Sequence[CacheBuild], report: Callable[[], None] = lambda: None) -> list[UserError]:
    """Works until every cache is there, alone or beside other processes that call this too.

    Returns what is wrong with files of which no cache can be made, in their order; the others' are made nevertheless.
    `report` is called whenever something has got further, here or in another process, or is waited for.

    Raises:
      CacheDirError: the directory of the caches cannot be used.
    """
    errors: dict[int, UserError] = {}
    pending = [index for index, build in enumerate(builds) if build.cache is None]
    wait = _SHORTEST_WAIT
    while pending:
        advanced = False
        for index in pending:
            try:
                while builds[index].step():
                    advanced = True
                    report()
            except CacheDirError:
                raise
            except UserError as error:
                errors[index] = error
            finally:
                builds[index].job.close()
        pending = [index for index in pending if builds[index].cache is None and index not in errors]
        report()
        if advanced:
            wait = _SHORTEST_WAIT
        elif pending:  # others are at all that is left
            time.sleep(wait)
            wait = min(2 * wait, _LONGEST_WAIT)
    return [errors[index] for index in sorted(errors)]
