"""The token cache: what goes in comes out, and it is right or absent whatever is killed, damaged or full."""

import contextlib
import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from posttrain.data.blocks import Block
from posttrain.data.cache import CacheWriter, TokenCache, default_cache_dir, open_cache
from posttrain.data.chat import Sample
from posttrain.errors import UserError

FACTS = {"data": "a", "tokenizer": "b"}


def make_samples(count: int, seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    return [
        Sample(
            tokens=rng.integers(0, 200_000, length).astype(np.int32),
            loss_weights=rng.choice([0.0, 0.0, 0.3, 1.0], length).astype(np.float32),
            file="rows.jsonl",
            line=3 * number + 1,
        )
        for number, length in enumerate(rng.integers(1, 30, count))
    ]


def write(samples: list[Sample], rejects: tuple[dict[str, object], ...] = ()):
    """A build that writes the samples in two batches."""

    def build(writer: CacheWriter) -> None:
        writer.append(samples[:3], rejects)
        writer.append(samples[3:], ())

    return build


def never(writer: CacheWriter) -> None:
    raise AssertionError("the cache was built again")


def assert_holds(cache: TokenCache, samples: list[Sample]) -> None:
    assert cache.num_samples == len(samples)
    for index, sample in enumerate(samples):
        place = slice(int(cache.offsets[index]), int(cache.offsets[index + 1]))
        np.testing.assert_array_equal(cache.tokens[place], sample.tokens)
        np.testing.assert_array_equal(cache.loss_weights[place], sample.loss_weights)
        assert cache.lines[index] == sample.line
        assert cache.trained[index] == sum(weight != 0 for weight in sample.loss_weights.tolist()[1:])
    assert cache.offsets[-1] == len(cache.tokens) == len(cache.loss_weights)


def leftovers(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("*.tmp-*"))


@pytest.mark.parametrize("count", [0, 1, 50])
def test_samples_come_back(tmp_path, count):
    samples = make_samples(count)
    rejects = ({"line": 5, "key": "messages", "reason": "no\u2028\ud800 list"},)
    assert_holds(open_cache("x", FACTS, write(samples, rejects), cache_dir=str(tmp_path)), samples)
    cache = open_cache("renamed", FACTS, never, cache_dir=str(tmp_path))
    assert_holds(cache, samples)
    assert cache.path == "renamed"
    assert cache.bad_rows == 1
    assert tuple(cache.rejects()) == rejects
    assert leftovers(tmp_path) == []


def test_other_facts_are_another_cache(tmp_path):
    first, second = make_samples(4, seed=1), make_samples(4, seed=2)
    open_cache("x", FACTS, write(first), cache_dir=str(tmp_path))
    assert_holds(open_cache("x", {**FACTS, "data": "c"}, write(second), cache_dir=str(tmp_path)), second)
    assert_holds(open_cache("x", FACTS, never, cache_dir=str(tmp_path)), first)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    """One bit, the size unchanged: what a lost write or a failing disk leaves."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
@pytest.mark.parametrize(
    "name",
    [f"{name}.bin" for name in ("tokens", "loss_weights", "offsets", "lines", "trained", "hashes", "prompt_hashes")],
)
def test_damaged_arrays_are_built_again(tmp_path, caplog, name, damage):
    samples = make_samples(20)
    cache = open_cache("x", FACTS, write(samples), cache_dir=str(tmp_path))
    damage(cache.directory / name)
    assert_holds(open_cache("x", FACTS, write(samples), cache_dir=str(tmp_path)), samples)
    assert f"{cache.directory} is damaged and is built again" in caplog.text
    assert len(caplog.records) == 1
    assert_holds(open_cache("x", FACTS, never, cache_dir=str(tmp_path)), samples)


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"files": {}}', '{"files": 3}'])
def test_a_damaged_description_is_built_again(tmp_path, caplog, content):
    samples = make_samples(20)
    meta = open_cache("x", FACTS, write(samples), cache_dir=str(tmp_path)).directory / "meta.json"
    meta.unlink() if content is None else meta.write_text(content)
    assert_holds(open_cache("x", FACTS, write(samples), cache_dir=str(tmp_path)), samples)
    assert "is damaged and is built again" in caplog.text


@pytest.mark.parametrize("error", [UserError("the file is broken"), KeyboardInterrupt(), RuntimeError("a bug")])
def test_a_build_that_fails_leaves_nothing(tmp_path, error):
    def build(writer: CacheWriter) -> None:
        writer.append(make_samples(5), ())
        raise error

    with pytest.raises(type(error)):
        open_cache("x", FACTS, build, cache_dir=str(tmp_path))
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_a_full_disk_is_said_to_be_full(tmp_path):
    def build(writer: CacheWriter) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=r"data\.cache_dir: .*No space left.*free some space"):
        open_cache("x", FACTS, build, cache_dir=str(tmp_path))
    assert leftovers(tmp_path) == []


def test_unusable_directories_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache_dir: cannot write .*make it writable"):
        open_cache("x", FACTS, never, cache_dir=str(tmp_path / "file" / "below"))
    with pytest.raises(UserError, match=r"data\.cache_dir: 'gs://bucket/cache' is not a local directory"):
        open_cache("x", FACTS, never, cache_dir="gs://bucket/cache")


def test_who_does_not_wait_gets_nothing_while_another_builds(tmp_path):
    def build(writer: CacheWriter) -> None:
        assert open_cache("other", FACTS, never, cache_dir=str(tmp_path), wait=False) is None
        write(make_samples(5))(writer)

    assert_holds(open_cache("x", FACTS, build, cache_dir=str(tmp_path), wait=False), make_samples(5))


def test_blocks_count_lines_on_and_everything_together(tmp_path):
    samples = [replace(sample, notes=("odd",)) for sample in make_samples(4)]
    block = Block.of(samples, [{"line": 20, "key": "", "reason": "bad"}], rows=7, left_out=2)

    def build(writer: CacheWriter) -> None:
        for part in (Block.join([block, Block(lines_read=30)]), Block.from_bytes(block.to_bytes())):
            writer.add(part)

    cache = open_cache("x", FACTS, build, cache_dir=str(tmp_path))
    assert cache.lines.tolist() == [1, 4, 7, 10, 31, 34, 37, 40]
    assert [reject["line"] for reject in cache.rejects()] == [20, 50]
    assert (cache.rows, cache.left_out, cache.bad_rows, cache.notes) == (14, 4, 2, {"odd": 8})
    assert cache.hashes[:4].tolist() == cache.hashes[4:].tolist()


def test_the_checksum_is_of_the_samples_alone(tmp_path):
    def checksum(samples: list[Sample], name: str, rejects: tuple[dict[str, object], ...] = ()) -> int:
        return open_cache("x", {"name": name}, write(samples, rejects), cache_dir=str(tmp_path)).checksum

    samples = make_samples(6)
    same = checksum(samples, "one")
    assert checksum([replace(s, line=s.line + 5) for s in samples], "two", ({"line": 1},)) == same
    weights = samples[2].loss_weights + np.float32(1)
    assert checksum([*samples[:2], replace(samples[2], loss_weights=weights), *samples[3:]], "three") != same
    joined = np.concatenate([samples[4].tokens, samples[5].tokens[:1]])
    moved = replace(samples[4], tokens=joined, loss_weights=np.zeros(len(joined), np.float32))
    rest = replace(samples[5], tokens=samples[5].tokens[1:], loss_weights=samples[5].loss_weights[1:])
    assert checksum([*samples[:4], moved, rest], "four") != same


def test_the_default_directory_is_the_users_cache(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache_dir() == Path("/somewhere/posttrain/tokens")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "posttrain" / "tokens"


# ---- several processes

BUILDER = """
import sys, time, numpy as np
from posttrain.data.cache import open_cache
from posttrain.data.chat import Sample
directory, name, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
def build(writer):
    print(name, "builds", flush=True)
    samples = [Sample(np.arange(n, dtype=np.int32), np.ones(n, np.float32), "f", n) for n in range(1, 2000)]
    for sample in samples:
        writer.append([sample], ())
        time.sleep(seconds / len(samples))
print(name, "starts", flush=True)
cache = open_cache("x", {"data": "shared"}, build, cache_dir=directory)
assert all((cache.tokens[a:b] == np.arange(b - a)).all() for a, b in zip(cache.offsets[:-1], cache.offsets[1:]))
print(name, "has", cache.num_samples, flush=True)
"""


@contextlib.contextmanager
def builder(directory: Path, name: str, seconds: float):
    command = [sys.executable, "-c", BUILDER, str(directory), name, str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def read_until(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    for said in process.stdout:
        if said.strip() == line:
            return
    raise AssertionError(f"never said {line!r}")


def test_a_second_process_waits_for_the_first_and_takes_over_when_it_is_killed(tmp_path):
    with builder(tmp_path, "first", 600) as first:
        read_until(first, "first builds")
        under_construction = leftovers(tmp_path)
        with builder(tmp_path, "second", 0.2) as second:
            read_until(second, "second starts")
            time.sleep(0.3)
            assert leftovers(tmp_path) == under_construction  # the second one builds nothing, and clears nothing away
            first.send_signal(signal.SIGKILL)
            read_until(second, "second builds")
            with builder(tmp_path, "third", 600) as third:
                read_until(second, "second has 1999")
                read_until(third, "third has 1999")
    assert leftovers(tmp_path) == []  # what the killed one left is gone


def test_without_locks_the_first_to_finish_wins(tmp_path, monkeypatch):
    def no_locks(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    samples = make_samples(20)

    def build(writer: CacheWriter) -> None:
        write(samples)(writer)
        assert_holds(open_cache("other", FACTS, write(samples), cache_dir=str(tmp_path)), samples)

    assert_holds(open_cache("x", FACTS, build, cache_dir=str(tmp_path)), samples)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(("host", "age", "kept"), [("elsewhere", 3600, True), ("elsewhere", 90_000, False)])
def test_another_machines_build_is_left_alone_until_it_is_a_day_old(tmp_path, host, age, kept):
    temporary = tmp_path / f"0123.tmp-{host}-abcd"
    temporary.mkdir()
    (temporary / "tokens.bin").write_bytes(b"1234")
    for path in (temporary / "tokens.bin", temporary):
        os.utime(path, (time.time() - age,) * 2)
    open_cache("x", FACTS, write(make_samples(3)), cache_dir=str(tmp_path))
    assert temporary.exists() == kept
