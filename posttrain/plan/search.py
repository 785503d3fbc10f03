"""`posttrain plan --search`: which mesh, remat, micro-batch and compiler options train fastest and fit.

The true step is compiled for every candidate that is tried, which takes a minute or more, whatever the model's depth:
layers are a loop, compiled once. So few are tried. What cannot run or cannot fit is known before (`static.py`); the
rest is ordered by a guess that the compiled ones correct (`estimate.py`), until nothing left is likely to beat the
best, or the time is over. Every candidate ends up ranked or with the reason why it was left out.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from posttrain.config import Config
from posttrain.errors import UserError, UserErrors
from posttrain.plan.candidates import Candidate, Facts, Static
from posttrain.plan.compiles import Answer, Compilation, keep_answer, key_of, read_answer, request_of
from posttrain.plan.estimate import Correction, guess_bytes, guess_seconds
from posttrain.plan.predict import Prediction, predict
from posttrain.plan.progress import SearchProgress
from posttrain.train.chips import GIB, Chip, chip_of

SURE = 2.0
"""Standard deviations that a guess must be off for a candidate that was left out for it to be the best."""


@dataclass(frozen=True)
class Tried:
    """A candidate that was compiled."""

    candidate: Candidate
    plan: dict[str, Any]
    prediction: Prediction
    seconds: float
    """Of its compilation."""
    kept: bool
    """Whether it was compiled by an earlier search."""

    @property
    def per_token(self) -> tuple[float, float, float]:
        """Seconds of a step per token of the global batch: the low end of the prediction, its middle, the high end."""
        low, high = (seconds / self.plan["work"]["tokens"] for seconds in self.prediction.step_seconds)
        return low, (low + high) / 2, high


@dataclass(frozen=True)
class Left:
    """A candidate that was not ranked, and why."""

    candidate: Candidate
    why: str
    """`refused`: a run with it would be; `too large`: it cannot fit; `implied`: another one shows that it cannot fit;
    `unlikely`: by the guess; `failed`: the compiler; `no time`."""
    reason: str


@dataclass
class Outcome:
    """What a search knows."""

    config: Config
    topology: str
    facts: Facts
    chip: Chip
    own: Candidate | None
    """The config as it stands."""
    tried: list[Tried] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def room(self) -> float:
        """Bytes of a device's memory."""
        return self.chip.device.hbm_bytes

    @property
    def ranked(self) -> list[Tried]:
        """What fits, the fastest first by the middle of the prediction."""
        return sorted((one for one in self.tried if one.prediction.fits), key=lambda one: one.per_token[1])

    @property
    def best(self) -> Tried | None:
        return next(iter(self.ranked), None)

    def leaders(self) -> tuple[Tried, Tried]:
        """Which would be first if all overlapped (the low ends), and if nothing did. Needs one that fits."""
        low, high = (min(self.ranked, key=lambda one: one.per_token[end]) for end in (0, 2))
        return low, high


def search(
    config: Config, topology: str, slices: int, *, rows_per_device: Sequence[int], jobs: int, budget: float | None
) -> Outcome:
    """Searches with `jobs` compilations at once for at most `budget` seconds. Raises `UserErrors` for what is wrong
    with the config whatever the mesh."""
    started = time.monotonic()
    told = _examine(config, topology, slices, rows_per_device)
    facts = Facts(**told["facts"])
    chip = chip_of(facts.device_kind)
    if chip is None:
        raise UserError(f"--topology {topology}: no published peaks are known for {facts.device_kind}")
    own = None if told["own"] is None else _candidate(told["own"])
    statics = [
        Static(**{**one, "candidate": _candidate(one["candidate"]), "problems": tuple(one["problems"])})
        for one in told["candidates"]
    ]
    run = _Search(Outcome(config, topology, facts, chip, own), statics, slices)
    run.read_kept()
    run.compile(jobs, None if budget is None else started + budget)
    run.outcome.seconds = time.monotonic() - started
    return run.outcome


def _candidate(raw: dict[str, Any]) -> Candidate:
    return Candidate(**{**raw, "mesh": tuple(raw["mesh"])})


def _examine(config: Config, topology: str, slices: int, rows_per_device: Sequence[int]) -> dict[str, Any]:
    request = request_of(config, topology, slices) | {"rows_per_device": list(rows_per_device)}
    asked = Compilation(request, "posttrain.plan.static")
    try:
        with SearchProgress.waiting(f"building the candidates for {topology}"):
            while (answer := asked.poll()) is None:
                time.sleep(0.1)
    finally:
        asked.stop()
    if answer.plan is None:
        raise UserErrors(answer.problem.split("\n"))
    return answer.plan


class _Search:
    """A search under way."""

    def __init__(self, outcome: Outcome, statics: Sequence[Static], slices: int):
        self.outcome, self._slices = outcome, slices
        self._open: dict[Candidate, Static] = {}
        self._time, self._memory = Correction(), Correction()
        self._full: list[tuple[Candidate, str]] = []
        self._running: dict[Candidate, Compilation] = {}
        for static in statics:
            if static.problems:
                self._leave(static.candidate, "refused", static.problems[0])
            elif static.bytes > outcome.room:
                size = f"{static.bytes / GIB:.2f} GiB of {outcome.room / GIB:.2f}"
                self._leave(static.candidate, "too large", f"parameters, optimizer and batch alone take {size}")
            else:
                self._open[static.candidate] = static

    def _leave(self, candidate: Candidate, why: str, reason: str) -> None:
        self._open.pop(candidate, None)
        self.outcome.left.append(Left(candidate, why, reason))

    def _key(self, candidate: Candidate) -> str:
        return key_of(self._request(candidate), self.outcome.facts.fingerprint)

    def _request(self, candidate: Candidate) -> dict[str, Any]:
        return request_of(candidate.config(self.outcome.config), self.outcome.topology, self._slices)

    def read_kept(self) -> None:
        """Takes what earlier searches have compiled."""
        for candidate in list(self._open):
            answer = read_answer(self._key(candidate))
            if answer is not None:
                self._take(candidate, answer, kept=True)

    def _take(self, candidate: Candidate, answer: Answer, *, kept: bool) -> None:
        """An answer, and what follows from it for others."""
        out, static = self.outcome, self._open.pop(candidate)
        if answer.plan is not None:
            found = predict(answer.plan, out.chip, tokens=None, price=None)
            tried = Tried(candidate, answer.plan, found, answer.seconds, kept)
            out.tried.append(tried)
            self._time.learn(candidate, guess_seconds(static, out.facts, out.chip), tried.per_token[1])
            peak = answer.plan["memory"]["peak"]
            self._memory.learn(candidate, guess_bytes(static, out.facts), float(peak))
            if not found.fits:
                self._full.append((candidate, f"{peak / GIB:.2f} GiB"))
        elif answer.too_large:
            needed = answer.needed(static.bytes)
            size = "more than there is" if needed is None else f"{needed / GIB:.2f} GiB"
            if needed is not None:
                self._memory.learn(candidate, guess_bytes(static, out.facts), needed)
            self._leave(candidate, "too large", f"the compiler says that it needs {size}, of {out.room / GIB:.2f}")
            self._full.append((candidate, size))
        else:
            self._leave(candidate, "failed", f"the compiler failed: {answer.problem}")
        for full, size in self._full:
            for other in [other for other in self._open if other.keeps_no_less_than(full)]:
                if other not in self._running:
                    self._leave(other, "implied", f"keeps no less than {full.text}, which needs {size}")

    def compile(self, jobs: int, deadline: float | None) -> None:
        """Until nothing is worth trying, or the time is over."""
        with SearchProgress(deadline, jobs) as progress:
            try:
                promising = self._start(jobs)
                while self._running and (deadline is None or time.monotonic() < deadline):
                    time.sleep(0.2)
                    if self._collect(progress):
                        promising = self._start(jobs)
                    progress.update(len(self.outcome.tried), len(self._running), promising, self.outcome.best)
            finally:
                for compilation in self._running.values():
                    compilation.stop()
        self._running.clear()
        self._explain_rest()

    def _start(self, jobs: int) -> int:
        """Starts as many as may run at once; how many more may yet be worth it."""
        promising = self._promising()
        while promising and len(self._running) < jobs:
            self._running[promising[0]] = Compilation(self._request(promising[0]))
            promising = self._promising()
        return len(promising)

    def _collect(self, progress: SearchProgress) -> bool:
        """Takes the answers that are there; whether there are any."""
        found = False
        for candidate, compilation in list(self._running.items()):
            answer = compilation.poll()
            if answer is None:
                continue
            found = True
            del self._running[candidate]
            if answer.final:
                keep_answer(self._key(candidate), answer)
            self._take(candidate, answer, kept=False)
            progress.compiled(candidate, answer, self.outcome)
        return found

    def _guesses(self) -> tuple[list[Candidate], list[tuple[float, float]], list[tuple[float, float]]]:
        """What waits, with logarithms of its time per token and of its bytes: (middle, standard deviation)."""
        out = self.outcome
        waiting = [candidate for candidate in self._open if candidate not in self._running]
        if not waiting:
            return [], [], []
        seconds = [guess_seconds(self._open[candidate], out.facts, out.chip) for candidate in waiting]
        sizes = [guess_bytes(self._open[candidate], out.facts) for candidate in waiting]
        times, memories = (
            list(zip(*(part.tolist() for part in correction.apply(waiting, guesses)), strict=True))
            for correction, guesses in ((self._time, seconds), (self._memory, sizes))
        )
        return waiting, times, memories

    def _promising(self) -> list[Candidate]:
        """What is worth trying, the most promising first; the config's own setting before all."""
        waiting, times, memories = self._guesses()
        best, room = self.outcome.best, math.log(self.outcome.room)
        bar = math.inf if best is None else math.log(best.per_token[1])
        found = []
        for candidate, (middle, unsure), (size, size_unsure) in zip(waiting, times, memories, strict=True):
            if candidate == self.outcome.own:
                found.append((-1, 0.0, candidate))
            elif middle - SURE * unsure < bar and size - SURE * size_unsure < room:
                likely = size < room
                found.append((0 if likely else 1, middle - unsure if likely else size, candidate))
        return [candidate for _, _, candidate in sorted(found, key=lambda one: one[:2])]

    def _explain_rest(self) -> None:
        """Of what was not tried, whether it was worth trying."""
        waiting, times, memories = self._guesses()
        promising, best, room = set(self._promising()), self.outcome.best, math.log(self.outcome.room)
        for candidate, (middle, unsure), (size, size_unsure) in zip(waiting, times, memories, strict=True):
            low, high = (math.exp(size + side * SURE * size_unsure) / GIB for side in (-1, 1))
            if candidate in promising:
                self._leave(candidate, "no time", "the time was over")
            elif size - SURE * size_unsure >= room:
                self._leave(candidate, "unlikely", f"estimated to need {low:.1f} to {high:.1f} GiB")
            else:
                assert best is not None
                ends = [math.exp(middle + side * SURE * unsure) / best.per_token[1] for side in (-1, 1)]
                self._leave(
                    candidate, "unlikely", f"estimated to take {ends[0]:.2f} to {ends[1]:.2f} times as long as the best"
                )
