"""Processes killed while they build one cache together: it is absent or exactly right, and the next start finishes it.

The test runs this file as a program that loads the tokenizer once and forks the builders, which makes a start cheap.
"""

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PARTS = 3


def run_program(directory: Path, *arguments: object) -> dict[str, int]:
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, str(directory), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_builder_killed_before_any_of_its_file_operations_leaves_nothing_wrong(tmp_path):
    found = run_program(tmp_path, "every-operation")
    assert found["kills"] > 5 * PARTS  # claim, write, sync, rename and release of every part, and then the merging
    assert found["absent"] > 3 * PARTS
    assert found["right"] >= 1  # those killed when the cache was there, and only shards were to be removed


def test_two_builders_killed_at_random_five_times(tmp_path):
    found = run_program(tmp_path, "random", 5, 0)
    assert found["kills"] >= 5 and found["finished"] >= 1


@pytest.mark.acceptance
def test_two_builders_killed_at_random_fifty_times(tmp_path):
    found = run_program(tmp_path, "random", 50, 1)
    assert found["kills"] >= 50 and found["finished"] >= 1
    assert found["absent"] > 10


# ---- the program ----------------------------------------------------------------------------------------------------


def write_chats(path: Path, rows: int) -> None:
    """Some bad rows and blank lines among conversations of very different lengths."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            answer = "so " + " ".join(
                draw.choice(["so", "it", "is", "\u2028", "42"]) for _ in range(draw.randrange(1, 120))
            )
            chat = [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": answer}]
            row = {"messages": chat} if number % 50 else {"messages": []}
            file.write(json.dumps(row, ensure_ascii=False) + "\n" * draw.choice([1, 1, 1, 2]))


def fork(work: Callable[[], None]) -> int:
    """The id of a new process that does the work and ends with 0, or with 1 and a traceback."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    finally:
        if code:
            sys.excepthook(*sys.exc_info())
            sys.stderr.flush()
        os._exit(code)


def wait(child: int) -> int:
    """0, the exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def content(directory: Path) -> dict[str, bytes]:
    """The finished caches in a directory, file by file."""
    places = [place for place in directory.iterdir() if place.is_dir() and "." not in place.name]
    return {f"{place.name}/{file.name}": file.read_bytes() for place in places for file in sorted(place.iterdir())}


def state(directory: Path, expected: dict[str, bytes]) -> str:
    found = content(directory) if directory.exists() else {}
    assert found in ({}, expected), "a cache is neither absent nor right"
    return "right" if found else "absent"


def check_finished(directory: Path, expected: dict[str, bytes]) -> None:
    assert state(directory, expected) == "right"
    left = [path.name for path in directory.iterdir() if ".parts-" in path.name or ".tmp-" in path.name]
    assert not left, f"left behind: {left}"


def kill_before_operation(number: int) -> None:
    """This process will kill itself just before the file operation with this number."""
    from posttrain.data import cache, claims, shards

    operations: Iterator[int] = iter(range(number + 1))

    def counted(function):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            if next(operations, None) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapper

    for module, name in ((shards, "sync"), (shards, "claimed"), (cache, "sync"), (cache, "sync_directory")):
        setattr(module, name, counted(getattr(module, name)))
    for owner, name in ((Path, "rename"), (Path, "unlink"), (shutil, "rmtree"), (os, "unlink"), (os, "rmdir")):
        setattr(owner, name, counted(getattr(owner, name)))
    claims.os.fsync = counted(os.fsync)


def kill_at_every_operation(build: Callable[[Path], None], directory: Path, expected: dict[str, bytes]) -> dict:
    found = {"kills": 0, "absent": 0, "right": 0}
    number = 0
    while True:
        place = directory / f"operation {number}"

        def killed(place=place, number=number) -> None:
            kill_before_operation(number)
            build(place)

        ended = wait(fork(killed))
        assert ended in (0, -signal.SIGKILL)
        if ended == 0:
            return found
        found["kills"] += 1
        found[state(place, expected)] += 1
        assert wait(fork(lambda place=place: build(place))) == 0
        assert state(place, expected) == "right"  # shards may be left where the kill came after the cache was there
        shutil.rmtree(place)
        number += 1


def kill_at_random(
    build: Callable[[Path], None], directory: Path, expected: dict[str, bytes], kills: int, seed: int
) -> dict:
    draw = random.Random(seed)
    place = directory / "killed"
    start = time.perf_counter()
    assert [wait(child) for child in [fork(lambda: build(place)) for _ in range(2)]] == [0, 0]
    undisturbed = time.perf_counter() - start
    check_finished(place, expected)
    shutil.rmtree(place)
    found = {"kills": 0, "absent": 0, "right": 0, "finished": 0}
    while found["kills"] < kills:
        children = [fork(lambda: build(place)) for _ in range(2)]
        time.sleep(draw.uniform(0, 0.7 * undisturbed))
        victims = draw.sample(children, draw.choice([1, 1, 2]))
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        ended = {child: wait(child) for child in victims}
        found[state(place, expected)] += 1
        ended |= {child: wait(child) for child in children if child not in victims}
        assert all(code == 0 or (child in victims and code == -signal.SIGKILL) for child, code in ended.items())
        found["kills"] += sum(code == -signal.SIGKILL for code in ended.values())
        if len(victims) == 1:
            assert state(place, expected) == "right"  # the other one has finished it
        if state(place, expected) == "right":
            found["finished"] += 1
            shutil.rmtree(place)
    assert [wait(child) for child in [fork(lambda: build(place)) for _ in range(2)]] == [0, 0]
    assert state(place, expected) == "right"
    return found


def main(directory: Path, mode: str, *arguments: str) -> None:
    from posttrain.config import DataConfig, SourceConfig
    from posttrain.data.sources import tokenize_sources
    from posttrain.data.tokenizer import Tokenizer

    chats = directory / "chats.jsonl"
    rows = 100 if mode == "every-operation" else 600
    write_chats(chats, rows)
    part_bytes = -(-chats.stat().st_size // PARTS)
    tokenizer = Tokenizer.load(str(ROOT / "tests" / "fixtures" / "chat"), chat_template="chatml")

    def build(place: Path, part_bytes: int = part_bytes) -> None:
        data = DataConfig(cache_dir=str(place), on_bad_row="skip")
        sources = {"data.train.0": SourceConfig(path=str(chats))}
        (cache,) = tokenize_sources(sources, tokenizer, data, part_bytes=part_bytes, is_main=False)["data.train.0"]
        assert (cache.rows, cache.bad_rows) == (rows, rows // 50)

    whole, shared = directory / "whole", directory / "shared"
    build(whole, part_bytes=1 << 30)  # without shards; and in this process, so that the others start with all loaded
    assert wait(fork(lambda: build(shared))) == 0
    expected = content(whole)
    check_finished(shared, expected)
    if mode == "every-operation":
        found = kill_at_every_operation(build, directory, expected)
    else:
        found = kill_at_random(build, directory, expected, *map(int, arguments))
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
