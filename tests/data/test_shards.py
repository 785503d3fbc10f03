"""Caches built together: the same bytes whoever does what, and no wrong or endless wait where something goes wrong."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain.data import shards
from posttrain.data.blocks import Block
from posttrain.data.cache import CacheDirError, TokenCache, cache_place
from posttrain.data.chat import Sample
from posttrain.data.claims import parts_name
from posttrain.data.files import Part
from posttrain.data.shards import CacheBuild, build_together
from posttrain.errors import UserError

LINES = 10
"""Of each part."""


class Job:
    """A file of numbered parts, each with its own samples, a bad row and one left out; lines count by part."""

    size = 1000

    def __init__(self, parts: int = 5, name: str = "a"):
        self.path = f"{name}.jsonl"
        self.facts: Mapping[str, Any] = {"name": name}
        self.count = parts
        self.done: list[int] = []
        self.fail: dict[int, BaseException] = {}
        self.closed = 0

    def parts(self) -> list[Part]:
        return [Part(index, index + 1, 100) for index in range(self.count)]

    def blocks(self, part: Part) -> Iterator[Block]:
        self.done.append(part.start)
        for line in range(1, LINES - 1):
            yield Block.of([sample(part.start, line)], (), rows=1)
            if part.start in self.fail and line == 4:
                raise self.fail[part.start]
        yield Block.of((), [{"line": LINES - 1, "key": "", "reason": "bad"}], rows=2, left_out=1)
        yield Block(lines_read=LINES)

    def close(self) -> None:
        self.closed += 1


def sample(part: int, line: int) -> Sample:
    length = 2 + (7 * part + line) % 5
    tokens = np.arange(length, dtype=np.int32) + 100 * part + line
    weights = np.linspace(0, 1, length, dtype=np.float32)
    return Sample(tokens, weights, "a.jsonl", line, ("odd",) if line % 2 else ())


def assert_holds(cache: TokenCache | None, parts: int) -> None:
    assert cache is not None
    expected = [sample(part, line) for part in range(parts) for line in range(1, LINES - 1)]
    places = zip(cache.offsets[:-1], cache.offsets[1:], strict=True)
    for (start, stop), wanted in zip(places, expected, strict=True):
        np.testing.assert_array_equal(cache.tokens[start:stop], wanted.tokens)
        np.testing.assert_array_equal(cache.loss_weights[start:stop], wanted.loss_weights)
    assert cache.lines.tolist() == [LINES * part + line for part in range(parts) for line in range(1, LINES - 1)]
    assert [reject["line"] for reject in cache.rejects()] == [LINES * part + LINES - 1 for part in range(parts)]
    assert (cache.rows, cache.bad_rows, cache.left_out) == (LINES * parts, parts, parts)
    assert cache.notes == {"odd": 4 * parts}


def build(job: Job, directory: Path) -> TokenCache | None:
    made = CacheBuild(job, cache_dir=str(directory))
    assert build_together([made]) == []
    return made.cache


def content(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def leftovers(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if ".tmp-" in path.name or ".parts-" in path.name]


def collected(job: Job, directory: Path) -> list[str]:
    """The shards that are there."""
    place = cache_place(job.facts, str(directory))
    return sorted(path.name for path in directory.glob(f"{parts_name(place, '').name}*/*.shard"))


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_parts_become_one_cache(tmp_path, parts):
    job = Job(parts)
    assert_holds(build(job, tmp_path), parts)
    assert job.done == list(range(parts))
    assert leftovers(tmp_path) == []
    again = Job(parts)
    assert_holds(build(again, tmp_path), parts)
    assert again.done == []


def test_the_bytes_do_not_depend_on_who_did_what(tmp_path):
    """One builds in order; of two others the first does some parts, the second the rest in another order."""
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    build(Job(), alone)
    first, second = CacheBuild(Job(), cache_dir=str(shared)), CacheBuild(Job(), cache_dir=str(shared))
    for _ in range(3):
        assert second.step()
    assert build_together([first]) == []
    assert build_together([second]) == []
    assert second.job.done == [0, 1, 2] and first.job.done == [3, 4]  # pyright: ignore[reportAttributeAccessIssue]
    assert_holds(second.cache, 5)
    assert content(alone) == content(shared)


def test_threads_that_build_at_once_do_each_part_once(tmp_path):
    """Locks belong to open files, so threads stand for processes."""
    jobs = [Job(12) for _ in range(4)]
    builds = [CacheBuild(job, cache_dir=str(tmp_path)) for job in jobs]
    errors: list[list[UserError]] = []
    threads = [threading.Thread(target=lambda b=b: errors.append(build_together([b]))) for b in builds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == [[]] * 4
    for made in builds:
        assert_holds(made.cache, 12)
    assert sorted(part for job in jobs for part in job.done) == list(range(12))
    assert leftovers(tmp_path) == []


def test_what_a_builder_left_is_gone_on_with(tmp_path):
    killed = Job()
    killed.fail[3] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        build(killed, tmp_path)
    assert collected(killed, tmp_path) == ["000000.shard", "000001.shard", "000002.shard"]
    for path in [*tmp_path.rglob("*"), tmp_path]:
        os.utime(path, (time.time() - 90_000,) * 2)  # left for more than a day
    after = Job()
    assert_holds(build(after, tmp_path), 5)
    assert after.done == [3, 4]
    assert leftovers(tmp_path) == []


def test_shards_that_nobody_goes_on_with_are_removed_after_a_day(tmp_path):
    jobs = [Job(name="young"), Job(name="old")]
    for job in jobs:
        job.fail[1] = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            build(job, tmp_path)
    old = cache_place(jobs[1].facts, str(tmp_path)).name
    for path in tmp_path.glob(f"{old}.parts-*"):
        for inside in [*path.iterdir(), path]:
            os.utime(inside, (time.time() - 90_000,) * 2)
    build(Job(name="other"), tmp_path)
    assert collected(jobs[0], tmp_path) and not collected(jobs[1], tmp_path)
    assert len(leftovers(tmp_path)) == 1


# ---- failures -------------------------------------------------------------------------------------------------------


def test_every_builder_meets_the_error_of_a_part(tmp_path):
    errors = []
    for _ in range(2):
        job = Job()
        job.fail[2] = UserError("a.jsonl: cannot be read")
        errors += build_together([CacheBuild(job, cache_dir=str(tmp_path))])
        assert job.done[-1] == 2
    assert [str(error) for error in errors] == ["a.jsonl: cannot be read"] * 2
    assert [path for path in tmp_path.rglob("*") if ".tmp-" in path.name] == []


def test_the_other_files_are_built_beside_one_that_fails(tmp_path):
    jobs = [Job(1, "one"), Job(3, "two"), Job(3, "three")]
    jobs[1].fail[0] = UserError("two is broken")
    builds = [CacheBuild(job, cache_dir=str(tmp_path)) for job in jobs]
    assert [str(error) for error in build_together(builds)] == ["two is broken"]
    assert [made.cache is not None for made in builds] == [True, False, True]
    assert all(job.closed for job in jobs)


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("harm", [damage, cut, empty])
def test_a_damaged_shard_is_made_again(tmp_path, caplog, harm):
    first = Job()
    made = CacheBuild(first, cache_dir=str(tmp_path))
    for _ in range(4):
        assert made.step()
    (shard,) = tmp_path.rglob("000001.shard")
    harm(shard)
    second = Job()
    assert_holds(build(second, tmp_path), 5)
    assert second.done == [4, 1]
    assert "000001.shard is damaged and is made again" in caplog.text


def test_a_disk_that_never_keeps_what_is_written_is_given_up(tmp_path, monkeypatch):
    rename = Path.rename

    def harmful(path: Path, target: Path) -> Path:
        done = rename(path, target)
        if target.suffix == ".shard":
            damage(target)
        return done

    monkeypatch.setattr(Path, "rename", harmful)
    with pytest.raises(CacheDirError, match="does not read back as it was written; name a directory on another disk"):
        build(Job(2), tmp_path)


class FullDisk:
    """Stands in for `open`: after some writes there is no space left."""

    def __init__(self, writes: int):
        self.left = writes

    def sync(self, file: Any) -> None:
        file.flush()
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("writes", range(5))
def test_a_full_disk_is_said_to_be_full_and_what_is_finished_is_kept(tmp_path, monkeypatch, writes):
    """Four shards; with more room it is the merging that fails."""
    disk = FullDisk(writes)
    monkeypatch.setattr(shards, "sync", disk.sync)
    monkeypatch.setattr("posttrain.data.cache.sync", disk.sync)
    with pytest.raises(
        CacheDirError, match=r"data\.cache_dir: cannot write .*No space left.*free some space"
    ) as caught:
        build(Job(4), tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert [path.name for path in tmp_path.rglob("*") if ".tmp-" in path.name] == []
    assert len(collected(Job(4), tmp_path)) == writes
    monkeypatch.undo()
    after = Job(4)
    assert_holds(build(after, tmp_path), 4)
    assert after.done == list(range(writes, 4))


LIMITED = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from test_shards import *
limit = int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    build(Job(24), Path(sys.argv[2]))
except CacheDirError as error:
    print(error)
"""


@pytest.mark.parametrize(("limit", "kept"), [(500, 0), (1800, 24)])
def test_the_kernel_refuses_to_write_more(tmp_path, limit, kept):
    """In the middle of a shard, and in the middle of the merging."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent.parent), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", LIMITED, str(Path(__file__).parent), str(tmp_path), str(limit)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert "File too large; free some space there" in done.stdout, done.stderr
    assert [path.name for path in tmp_path.rglob("*") if ".tmp-" in path.name] == []
    assert len(collected(Job(24), tmp_path)) == kept
    assert_holds(build(Job(24), tmp_path), 24)


def test_a_damaged_cache_is_built_again_by_shards(tmp_path, caplog):
    cache = build(Job(), tmp_path)
    assert cache is not None
    damage(cache.directory / "tokens.bin")
    job = Job()
    assert_holds(build(job, tmp_path), 5)
    assert sorted(job.done) == list(range(5))
    assert "is damaged and is built again" in caplog.text


# ---- several processes ----------------------------------------------------------------------------------------------


def test_without_locks_work_may_be_done_twice_and_the_cache_is_right(tmp_path, monkeypatch):
    def no_locks(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    jobs = [Job(8) for _ in range(3)]
    builds = [CacheBuild(job, cache_dir=str(tmp_path)) for job in jobs]
    errors: list[list[UserError]] = []
    threads = [threading.Thread(target=lambda b=b: errors.append(build_together([b]))) for b in builds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == [[]] * 3
    for made in builds:
        assert_holds(made.cache, 8)
    assert {part for job in jobs for part in job.done} == set(range(8))


HOLDER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from test_shards import *
class Slow(Job):
    def blocks(self, part):
        if part.start == 1:
            print("holds", flush=True)
            time.sleep(600)
        yield from super().blocks(part)
build(Slow(), Path(sys.argv[2]))
"""


def test_a_part_whose_builder_dies_is_taken_over(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent.parent), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", HOLDER, str(Path(__file__).parent), str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "holds\n"
            job = Job()
            made = CacheBuild(job, cache_dir=str(tmp_path))
            while made.step():
                pass
            assert job.done == [2, 3, 4] and made.cache is None  # all but the one that is claimed
            holder.send_signal(signal.SIGKILL)
            holder.wait()
            assert build_together([made]) == []
            assert job.done == [2, 3, 4, 1]
            assert_holds(made.cache, 5)
        finally:
            holder.kill()


def test_progress_counts_what_others_have_done(tmp_path):
    mine, theirs = CacheBuild(Job(), cache_dir=str(tmp_path)), CacheBuild(Job(), cache_dir=str(tmp_path))
    theirs.step()
    theirs.step()
    assert mine.fraction == 0
    mine.step()
    assert mine.fraction == pytest.approx(0.4)  # as it was when the step began
    tokens = sum(len(sample(part, line).tokens) for part in range(2) for line in range(1, LINES - 1))
    assert mine.counts == {"tokens": tokens, "samples": 2 * (LINES - 2), "bad_rows": 2}
    build_together([mine])
    assert mine.fraction == 1
    assert mine.counts["bad_rows"] == 5
