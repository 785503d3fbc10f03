"""What a run tells: `metrics.jsonl` and TensorBoard (`MetricsLog`), the terminal (`Console`), speed (`Throughput`).

The loop hands plain numbers to these after each step; only process 0 writes or prints. Names are those of TRL: loss,
entropy, mean_token_accuracy, num_tokens, learning_rate, grad_norm, epoch, global_step; `eval_` before held-out values.
"""

import json
import math
import numbers
import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from etils import epath
from rich.console import Console as RichConsole
from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from posttrain.errors import UserError

Values = Mapping[str, float | int | None]
"""Numbers by name; `None` is one that cannot be known, such as the MFU of a machine without a known peak."""

TIME_KEYS = frozenset({"time", "step_time", "tokens_per_second", "mfu", "seconds_left"})
"""Logged values that depend on the clock. All others of two equal runs are bitwise equal."""

FILE_NAME = "metrics.jsonl"
EVENTS_DIR = "tensorboard"

# ---- files -----------------------------------------------------------------------------------------------------------

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _to_json(value: Any) -> int | float | str | None:
    """JSON has no NaN or infinity: they become strings, spelled as in protobuf's JSON, which `float()` reads."""
    if value is None:
        return None
    if isinstance(value, numbers.Integral):
        return int(value)
    number = float(value)
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def _entries(data: bytes, file: str) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """(line with its end, entry). A last line without an end was torn by a kill and is left out."""
    *lines, _ = data.split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            raise UserError(
                f"{file}:{number}: not a logged step (a JSON object with an integer `step`): {line[:80]!r}; the file "
                "was changed or damaged: remove that line, or move the file away"
            )
        yield line + b"\n", entry


def read_metrics(path: epath.Path) -> list[dict[str, Any]]:
    """The entries of a `metrics.jsonl`, non-finite numbers restored; also of a run that goes on.

    Raises `UserError` naming file and line where a line is no entry.
    """
    return [
        {name: _NON_FINITE.get(value, value) if isinstance(value, str) else value for name, value in entry.items()}
        for _, entry in _entries(path.read_bytes(), str(path))
    ]


class MetricsLog:
    """Appends to `metrics.jsonl` and TensorBoard events in a run directory, local or remote.

    A line is `{"step", "global_step", <values>, "time"}` (`time` in Unix seconds), and is with the operating system
    when `log` returns. On resume the file is cut back to the entries up to `resume_step`, and TensorBoard is told to
    forget later ones; at `resume_step` 0 the run begins anew and nothing is kept.

    A remote directory (`gs://` and the like) cannot be appended to: the files then live in a temporary directory and
    are copied at `sync` and `close`. As a context it closes itself.

    Raises `UserError` naming file and line where the file to be cut back is damaged; it is then left as it was.
    """

    def __init__(
        self,
        run_dir: epath.Path,
        *,
        tensorboard: bool,
        is_main: bool,
        resume_step: int,
        wall_clock: Callable[[], float] = time.time,
    ):
        self._is_main = is_main
        if not is_main:
            return
        self._wall_clock = wall_clock
        self._remote = run_dir if "://" in os.fspath(run_dir) else None
        self._temporary = tempfile.TemporaryDirectory(prefix="posttrain-metrics-") if self._remote else None
        local = Path(self._temporary.name if self._temporary else run_dir)
        local.mkdir(parents=True, exist_ok=True)
        self._path = local / FILE_NAME
        old = run_dir / FILE_NAME
        if old.exists():
            self._keep(old.read_bytes(), str(old), resume_step)
        self._file = open(self._path, "ab")  # noqa: SIM115  # open until `close`
        self._events = _EventFile(local / EVENTS_DIR, resume_step) if tensorboard else None

    def _keep(self, data: bytes, file: str, resume_step: int) -> None:
        """Writes the lines up to `resume_step` back, whole or not at all."""
        kept = []
        if resume_step > 0:
            kept = [line for line, entry in _entries(data, file) if entry["step"] <= resume_step]
        partial = self._path.with_name(FILE_NAME + ".partial")
        with open(partial, "wb") as out:
            out.writelines(kept)
            out.flush()
            os.fsync(out.fileno())
        partial.replace(self._path)

    def log(self, step: int, values: Values) -> None:
        """One line, and one point in each TensorBoard curve whose value is known."""
        if not self._is_main:
            return
        now = self._wall_clock()
        entry = {"step": step, "global_step": step} | dict(values) | {"time": now}
        line = json.dumps({name: _to_json(value) for name, value in entry.items()}, allow_nan=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        if self._events:
            self._events.write(step, {name: v for name, v in values.items() if name != "global_step"}, now)

    def sync(self) -> None:
        """Everything logged is on disk, or at the remote place, when this returns. Call before each checkpoint."""
        if not self._is_main:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._events:
            self._events.flush()
        if self._remote is not None:
            _copy(self._path, self._remote)
            if self._events:
                _copy(self._events.path, self._remote / EVENTS_DIR)

    def close(self) -> None:
        """`sync`, then let go of the files. May be called again."""
        if not self._is_main or self._file.closed:
            return
        self.sync()
        self._file.close()
        if self._events:
            self._events.close()
        if self._temporary:
            self._temporary.cleanup()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _copy(file: Path, directory: epath.Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / file.name).write_bytes(file.read_bytes())


class _EventFile:
    """A TensorBoard event file of this process alone.

    Written without tensorboardX's `SummaryWriter`: its queue may still hold points when its `flush` returns, and it
    names files by the second, so that a quick resume would write over the file of the run before it.
    """

    def __init__(self, directory: Path, resume_step: int, flush_seconds: float = 10.0):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        events, summaries = cast(Any, event_pb2), cast(Any, summary_pb2)  # their classes exist at run time only
        self._event, self._summary = events.Event, summaries.Summary
        directory.mkdir(parents=True, exist_ok=True)
        name = f".{time.time_ns()}.{os.getpid()}"
        self._writer = EventsWriter(str(directory / "events"), name)
        (self.path,) = directory.glob(f"*{name}")
        self._flush_seconds, self._flushed = flush_seconds, time.monotonic()
        # A session that starts at a step makes TensorBoard drop that step and later ones of the sessions before it.
        first = resume_step + 1 if resume_step > 0 else 0
        start = events.SessionLog(status=events.SessionLog.START)
        self._writer.write_event(self._event(step=first, wall_time=time.time(), session_log=start))

    def write(self, step: int, values: Values, wall_time: float) -> None:
        points = [self._summary.Value(tag=k, simple_value=float(v)) for k, v in values.items() if v is not None]
        self._writer.write_event(self._event(step=step, wall_time=wall_time, summary=self._summary(value=points)))
        if time.monotonic() - self._flushed > self._flush_seconds:
            self.flush()

    def flush(self) -> None:
        self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._writer.close()


# ---- speed -----------------------------------------------------------------------------------------------------------


class Throughput:
    """Speed over the last `window` steps of a session of `total_steps`.

    Time is counted from where this is made or `pause` was last called: make it when the step is compiled, and call
    `pause` after everything that is no step (held-out loss, a save).
    """

    def __init__(
        self,
        *,
        total_steps: int,
        peak_flops: float | None,
        window: int = 20,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._remaining, self._peak, self._clock = total_steps, peak_flops, clock
        self._steps: deque[tuple[float, float, float]] = deque(maxlen=window)
        self._done, self._paused = 0, 0.0
        self._mark = clock()

    def step(self, tokens: float | int, flops: float) -> dict[str, float | None]:
        """Call when a step's values have arrived: its real tokens, and its FLOPs by `flops.train_flops`.

        Returns `step_time` (seconds) and `tokens_per_second`, means over the window; `mfu`, a fraction, None where
        the machine's peak is not known; `seconds_left` until the last step, pauses as frequent as so far included.
        """
        now = self._clock()
        self._steps.append((now - self._mark, tokens, flops))
        self._mark = now
        self._done += 1
        self._remaining -= 1
        seconds, tokens, flops = (sum(column) for column in zip(*self._steps, strict=True))
        step_time = seconds / len(self._steps)
        return {
            "step_time": step_time,
            "tokens_per_second": tokens / seconds if seconds > 0 else None,
            "mfu": flops / (seconds * self._peak) if self._peak and seconds > 0 else None,
            "seconds_left": max(0, self._remaining) * (step_time + self._paused / self._done),
        }

    def pause(self) -> None:
        """The time since the last step was not spent on steps. What comes before the first step is no pause."""
        now = self._clock()
        if self._done:
            self._paused += now - self._mark
        self._mark = now


# ---- terminal --------------------------------------------------------------------------------------------------------

_FORMATS = {
    "epoch": "epoch {:.2f}",
    "loss": "loss {:.4f}",
    "learning_rate": "lr {:.2e}",
    "grad_norm": "grad norm {:.3g}",
    "tokens_per_second": "{:,.0f} tok/s",
    "mfu": "MFU {:.1%}",
}
_REDRAW_SECONDS = 0.1


def _status(values: Values) -> str:
    known = {name: value for name, value in values.items() if value is not None}
    return "  ".join(text.format(known[name]) for name, text in _FORMATS.items() if name in known)


def _time_left(values: Values) -> str:
    seconds = values.get("seconds_left")
    if seconds is None or not math.isfinite(seconds):
        return ""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02} left"


class Console:
    """A run's progress on standard error; results go to standard output (`table`).

    As a context it keeps a live progress bar at the bottom of a terminal. Elsewhere (files, CI) it prints one plain
    line per step, at most one every `interval` seconds, and always the first and the last.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        is_main: bool,
        console: RichConsole | None = None,
        interval: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total, self._is_main, self._interval, self._clock = total_steps, is_main, interval, clock
        self._console = console or RichConsole(stderr=True)
        self._live: Live | None = None
        self._shown = -math.inf
        self._waiting: tuple[int, Values] | None = None
        """The last step, as long as it has not been shown."""

    def __enter__(self) -> "Console":
        if self._is_main and self._console.is_terminal and not self._console.is_dumb_terminal:
            # Redrawn by `step` alone: no thread, and a picture that stands still is a run that stands still.
            picture = Text(f"waiting for the first of {self._total} steps")
            terminal = sys.stdout.isatty()  # what goes to a file or pipe must not end up on standard error
            self._live = Live(picture, console=self._console, auto_refresh=False, redirect_stdout=terminal)
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._waiting is not None:
            self._show(*self._waiting)
        if self._live is not None:
            self._live.stop()
            self._live = None

    def step(self, step: int, values: Values) -> None:
        """A step is done: `values` are the logged ones with `epoch` and what `Throughput.step` returns."""
        if not self._is_main:
            return
        self._waiting = (step, dict(values))
        every = self._interval if self._live is None else _REDRAW_SECONDS
        if step >= self._total or self._clock() - self._shown >= every:
            self._show(step, values)

    def _show(self, step: int, values: Values) -> None:
        self._shown, self._waiting = self._clock(), None
        status, left = _status(values), _time_left(values)
        if self._live is None:
            self.note("  ".join(part for part in (f"step {step}/{self._total}", status, left) if part))
            return
        bar = Table.grid(padding=(0, 1), expand=True)
        for ratio in (None, 1, None, None):
            bar.add_column(ratio=ratio, no_wrap=True)
        share = step / max(1, self._total)
        bar.add_row(f"step {step}/{self._total}", ProgressBar(self._total, step), f"{share:.0%}", left)
        self._live.update(Group(Text(status), bar), refresh=True)

    def note(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self._is_main:
            self._console.print(Text(text), soft_wrap=True)

    def heldout(self, step: int, values: Values) -> None:
        """Held-out values, under their logged names, as a line of its own."""
        named = "  ".join(f"{name} {value:.4f}" for name, value in values.items() if value is not None)
        self.note(f"step {step}/{self._total}  held out: {named}")


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str | int | float]], console: RichConsole | None = None
) -> None:
    """Prints a table to standard output: numbers on the right, nothing cut off."""
    printer = console or RichConsole()
    output = Table(title=Text(title), title_justify="left", show_edge=False)
    for index, name in enumerate(columns):
        numeric = all(isinstance(row[index], int | float) for row in rows)
        output.add_column(Text(name), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        output.add_row(*(Text(f"{cell:,}" if isinstance(cell, int | float) else cell) for cell in row))
    if not printer.is_terminal:  # a file is as wide as its lines
        output.width = printer.measure(output, options=printer.options.update(width=10_000)).maximum
    printer.print(output, crop=False)
