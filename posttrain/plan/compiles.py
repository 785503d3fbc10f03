"""Compilations for a search: several at once, each in a process of its own, and their answers kept on disk.

An answer is found again by all that it depends on: the config but for what has no part in the step, the model's shapes,
the topology, the versions of the compiler and the source of this package.
"""

import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import resources
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from posttrain.config import Config
from posttrain.plan.topology import ENVIRONMENT

UNRELATED = ("run", "checkpoint", "evaluate", "log")
"""Sections that have no part in the compiled step."""
PROCESS_BYTES = 3 * 2**30
"""Memory that one compilation is reckoned with: Llama-3.1-8B takes 1.9 GiB."""
FULL = re.compile(r"RESOURCE_EXHAUSTED.*\bhbm\b.*", re.IGNORECASE)
"""How the compiler says that a program does not fit."""
_USED = re.compile(r"(temporaries \(|Used )([\d.]+)([KMGT]?)")
_UNITS = {"": 1.0, "K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}


def default_jobs() -> int:
    """As many as there are cores, and as fit into the memory that is free."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists() and (found := re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())):
        free = int(found[1]) * 1024
    return max(1, min(os.cpu_count() or 1, free // PROCESS_BYTES))


def cache_dir() -> Path:
    """Where answers are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "posttrain" / "plans"


@functools.cache
def source_hash() -> str:
    """Of every Python file of this package."""
    digest = hashlib.sha256()
    root = Path(str(resources.files("posttrain")))
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


@functools.cache
def _versions() -> list[str | None]:
    versions: list[str | None] = [version(name) for name in ("jax", "jaxlib", "flax", "optax")]
    try:
        return [*versions, version("libtpu")]
    except PackageNotFoundError:  # the command refuses; tests of the search compile nothing
        return [*versions, None]


def request_of(config: Config, topology: str, slices: int) -> dict[str, Any]:
    """What `worker.py` is asked."""
    return {"config": config.model_dump(mode="json"), "topology": topology, "slices": slices}


def key_of(request: dict[str, Any], fingerprint: str) -> str:
    """Under which the answer is kept; `fingerprint` is the model's."""
    own = request["config"]["objective"].get("file")
    described = {
        **request,
        "config": {name: values for name, values in request["config"].items() if name not in UNRELATED},
        "model": fingerprint,
        "objective": hashlib.sha256(Path(own).read_bytes()).hexdigest() if own else None,
        "versions": _versions(),
        "flags": [os.environ.get(name, "") for name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS")],
        "source": source_hash(),
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Answer:
    """Of one compilation: `plan` as of `worker.compile_plan`, or why there is none."""

    plan: dict[str, Any] | None
    problem: str = ""
    too_large: bool = False
    """The compiler found no way to fit the program into the device's memory."""
    seconds: float = 0.0
    """That it took, start-up included."""

    @property
    def final(self) -> bool:
        """Whether asking again would answer the same."""
        return self.plan is not None or self.too_large

    def needed(self, state: int) -> float | None:
        """Bytes that a program that is too large would need, if the compiler tells; `state` is what is there before the
        step begins, which some of its messages leave out."""
        found = _USED.search(self.problem)
        if found is None:
            return None
        told = float(found[2]) * _UNITS[found[3]]
        return told + state if found[1].startswith("temporaries") else told


def read_answer(key: str) -> Answer | None:
    """What is kept; None if nothing is."""
    path = cache_dir() / f"{key}.json"
    return Answer(**json.loads(path.read_text())) if path.exists() else None


def keep_answer(key: str, answer: Answer) -> None:
    """Written whole or not at all, so that an interrupted search leaves nothing half done."""
    directory = cache_dir()
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=directory, suffix=".part", delete=False) as file:
        json.dump(vars(answer), file)
    os.replace(file.name, directory / f"{key}.json")


class Compilation:
    """A process that compiles one request; `poll` until it answers, or `stop` it."""

    def __init__(self, request: dict[str, Any], module: str = "posttrain.plan.worker"):
        self._started = time.monotonic()
        self._files = tempfile.TemporaryDirectory(prefix="posttrain-plan-")
        given, self._out, self._err = (Path(self._files.name, name) for name in ("given", "out", "err"))
        given.write_text(json.dumps(request))
        with given.open() as source, self._out.open("w") as out, self._err.open("w") as err:
            command = [sys.executable, "-m", module]
            self._process = subprocess.Popen(
                command, stdin=source, stdout=out, stderr=err, env=os.environ | ENVIRONMENT
            )

    def poll(self) -> Answer | None:
        """The answer; None while there is none."""
        if self._process.poll() is None:
            return None
        seconds = time.monotonic() - self._started
        out, err = self._out.read_text(), self._err.read_text()
        self._files.cleanup()
        if self._process.returncode != 0:
            return _failure(err if err.strip() else f"exit code {self._process.returncode}", seconds)
        told = json.loads(out)
        if "problems" in told:
            problem = "\n".join(told["problems"])
            return Answer(None, problem, too_large=FULL.search(problem) is not None, seconds=seconds)
        return Answer(told, seconds=seconds)

    def stop(self) -> None:
        """Ends the process at once, if it has not ended."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._files.cleanup()


def _failure(text: str, seconds: float) -> Answer:
    full = FULL.search(text)
    problem = full[0] if full else text.strip().splitlines()[-1]
    return Answer(None, problem, too_large=full is not None, seconds=seconds)
