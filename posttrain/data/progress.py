"""How far tokenizing has come: one bar over all files when it takes longer than some seconds, and a line at the end.

Fed by `sources.py`. What other processes have done counts too; what was there at the start counts for the bar, but not
for the speed.
"""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from posttrain.data.shards import CacheBuild

log = logging.getLogger(__name__)


class TokenizingReport:
    """A context manager around the building of caches; `shown` by the main process only."""

    QUIET_SECONDS = 3.0

    def __init__(self, builds: Sequence[CacheBuild], *, shown: bool):
        self._builds = [build for build in builds if build.cache is None]
        self._shown = shown and bool(self._builds)
        self._start = time.perf_counter()
        self._before: Counter[str] = Counter()
        self._progress = Progress(
            TextColumn("tokenizing {task.description}", markup=False),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn(
                "{task.fields[tokens]:,} tokens, {task.fields[speed]:,.0f}/s, {task.fields[bad_rows]:,} bad rows"
            ),
            console=Console(stderr=True),
            transient=True,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> "TokenizingReport":
        self._before = self._counts()
        return self

    def update(self) -> None:
        """Looks at what there is by now."""
        if not self._shown:
            return
        counts = self._counts()
        seconds = time.perf_counter() - self._start
        if seconds < self.QUIET_SECONDS:
            return
        fields = {
            "completed": sum(build.fraction * build.job.size for build in self._builds),
            "tokens": counts["tokens"],
            "bad_rows": counts["bad_rows"],
            "speed": (counts["tokens"] - self._before["tokens"]) / seconds,
        }
        if self._task is None:
            total = sum(build.job.size for build in self._builds)
            self._task = self._progress.add_task(self._name(), total=total, **fields)
            self._progress.start()
        self._progress.update(self._task, **fields)

    def _counts(self) -> Counter[str]:
        return sum((Counter(build.counts) for build in self._builds), Counter())

    def _name(self) -> str:
        if len(self._builds) > 1:
            return f"{len(self._builds)} files"
        return self._builds[0].job.path.rsplit("/", 1)[-1]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._progress.stop()
        counts, seconds = self._counts(), time.perf_counter() - self._start
        if self._shown and kind is None and counts != self._before:
            log.info(
                "tokenized %s: %s samples, %s tokens in %.1f s (%s tokens/s)",
                self._builds[0].job.path if len(self._builds) == 1 else self._name(),
                f"{counts['samples']:,}",
                f"{counts['tokens']:,}",
                seconds,
                f"{(counts['tokens'] - self._before['tokens']) / seconds:,.0f}",
            )
