"""How far a search has come, on standard error: a line for each compilation, and a bar while there is a terminal."""

import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from posttrain.plan.candidates import Candidate
from posttrain.plan.compiles import Answer
from posttrain.train.chips import GIB

if TYPE_CHECKING:
    from posttrain.plan.search import Outcome, Tried


class SearchProgress:
    """A context manager around a search."""

    def __init__(self, deadline: float | None, jobs: int):
        self._started, self._deadline, self._jobs = time.monotonic(), deadline, jobs
        self._seconds: list[float] = []
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[left]}"))
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._progress.add_task("searching", total=None, left="")

    @staticmethod
    def waiting(what: str) -> Any:
        """Something that spins, for what takes some seconds."""
        return Console(stderr=True).status(what)

    def __enter__(self) -> "SearchProgress":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def compiled(self, candidate: Candidate, answer: Answer, outcome: "Outcome") -> None:
        """One compilation has ended."""
        self._seconds.append(answer.seconds)
        if answer.plan is None:
            told = next(one.reason for one in outcome.left if one.candidate == candidate)
        else:
            found = next(one for one in outcome.tried if one.candidate == candidate)
            low, high = found.prediction.step_seconds
            told = f"{answer.plan['memory']['peak'] / GIB:.2f} GiB, {low:.4g} to {high:.4g} s a step"
        self._progress.console.print(f"{candidate.text}: {told}", markup=False, highlight=False, soft_wrap=True)

    def update(self, tried: int, running: int, waiting: int, best: "Tried | None") -> None:
        """What there is by now; `waiting` are those that may yet be compiled."""
        fastest = "" if best is None else f", best {sum(best.prediction.step_seconds) / 2:.4g} s a step"
        self._progress.update(
            self._task,
            description=f"{tried} compiled, {running} running, up to {waiting} more{fastest}",
            completed=tried,
            total=tried + running + waiting,
            left=self._left(running + waiting),
        )

    def _left(self, count: int) -> str:
        """How long it may yet take: all that may be compiled, as fast as those so far, or until the time is over."""
        ends = [] if self._deadline is None else [self._deadline - time.monotonic()]
        if self._seconds:
            ends.append(count * sum(self._seconds) / len(self._seconds) / self._jobs)
        if not ends:
            return ""
        minutes, seconds = divmod(max(0, round(min(ends))), 60)
        return f"at most {minutes}:{seconds:02d} left"
