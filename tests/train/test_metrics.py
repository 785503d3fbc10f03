"""What is logged can be read back, survives a kill and is cut back on resume; speed by closed forms; the terminal."""

import io
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath
from rich.console import Console as RichConsole

from posttrain.errors import UserError
from posttrain.train.metrics import TIME_KEYS, Console, MetricsLog, Throughput, read_metrics, table

ROOT = Path(__file__).parents[2]


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def open_log(run_dir: Any, resume_step: int = 0, *, tensorboard: bool = False, is_main: bool = True) -> MetricsLog:
    clock = Clock()
    return MetricsLog(
        epath.Path(run_dir), tensorboard=tensorboard, is_main=is_main, resume_step=resume_step, wall_clock=clock
    )


def strict(line: str) -> dict[str, Any]:
    """As a parser reads it that knows no NaN."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(line, parse_constant=refuse)


def events(file: Path) -> Iterator[Any]:
    """The records of a TensorBoard file: length (8 bytes), its checksum (4), data, checksum (4)."""
    from tensorboardX.proto import event_pb2

    data, at = file.read_bytes(), 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        yield event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
        at += 12 + length + 4
    assert at == len(data)


def curves(directory: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard shows: files in name order; a session's start drops its step and later ones from before it."""
    shown: dict[str, dict[int, float]] = {}
    for file in sorted(directory.iterdir()):
        assert ".out.tfevents." in file.name
        for event in events(file):
            if event.HasField("session_log") and event.session_log.status == event.session_log.START:
                shown = {tag: {s: v for s, v in points.items() if s < event.step} for tag, points in shown.items()}
            for value in event.summary.value:
                shown.setdefault(value.tag, {})[event.step] = value.simple_value
    return {tag: points for tag, points in shown.items() if points}


# ---- metrics.jsonl ---------------------------------------------------------------------------------------------------


def test_a_line_is_one_json_object(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.log(3, {"loss": float(np.float32(0.1)), "num_tokens": 7, "epoch": 0.25, "mfu": None})
        log.log(3, {"eval_loss": 2.0})
    first, second = (tmp_path / "metrics.jsonl").read_text().splitlines()
    expected = {"step": 3, "global_step": 3, "loss": 0.10000000149011612, "num_tokens": 7, "epoch": 0.25, "mfu": None}
    assert strict(first) == expected | {"time": 1000.0}
    assert next(iter(strict(first))) == "step"
    assert strict(second) == {"step": 3, "global_step": 3, "eval_loss": 2.0, "time": 1000.0}
    assert "time" in TIME_KEYS and not TIME_KEYS & {"step", "loss", "num_tokens", "epoch", "eval_loss"}


def test_every_bit_of_a_value_survives(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    values = random.integers(0, 2**32, 500, dtype=np.uint32).view(np.float32)
    values = values[np.isfinite(values)]
    with open_log(tmp_path) as log:
        for step, value in enumerate(values):
            log.log(step, {"loss": float(value)})
    found = np.array([entry["loss"] for entry in read_metrics(epath.Path(tmp_path / "metrics.jsonl"))], np.float32)
    assert found.tobytes() == values.tobytes()


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path: Path) -> None:
    with open_log(tmp_path, tensorboard=True) as log:
        log.log(1, {"loss": math.nan, "grad_norm": math.inf, "low": -math.inf})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert {k: strict(line)[k] for k in ("loss", "grad_norm", "low")} == {
        "loss": "NaN",
        "grad_norm": "Infinity",
        "low": "-Infinity",
    }
    (entry,) = read_metrics(epath.Path(tmp_path / "metrics.jsonl"))
    assert math.isnan(entry["loss"]) and entry["grad_norm"] == math.inf and entry["low"] == -math.inf
    assert math.isnan(curves(tmp_path / "tensorboard")["loss"][1])


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    with open_log(tmp_path / "run", tensorboard=True, is_main=False) as log:
        log.log(1, {"loss": 1.0})
        log.sync()
    log.close()
    assert not (tmp_path / "run").exists()


def test_resume_cuts_back_to_the_restored_step(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    with open_log(tmp_path) as log:
        for step in range(1, 6):
            log.log(step, {"loss": step / 3})
            if step % 2 == 0:
                log.log(step, {"eval_loss": step / 7})
    before = file.read_bytes().splitlines(keepends=True)
    with open_log(tmp_path, resume_step=4) as log:
        assert file.read_bytes() == b"".join(before[:6]), "steps 1 to 4 with two held-out lines, byte for byte"
        log.log(5, {"loss": 5 / 3})
    assert file.read_bytes() == b"".join(before)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_new_start_keeps_nothing(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.log(0, {"eval_loss": 3.0})
        log.log(1, {"loss": 2.0})
    with open_log(tmp_path) as log:
        log.log(0, {"eval_loss": 3.0})
    assert len((tmp_path / "metrics.jsonl").read_bytes().splitlines()) == 1


@pytest.mark.parametrize("torn", [b'{"step": 2, "lo', b'{"step": 2}', b"\0\0\0"])
def test_a_torn_last_line_is_dropped(tmp_path: Path, torn: bytes) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1, "loss": 2.0}\n' + torn)
    assert read_metrics(epath.Path(file)) == [{"step": 1, "loss": 2.0}]
    with open_log(tmp_path, resume_step=2) as log:
        assert file.read_bytes() == b'{"step": 1, "loss": 2.0}\n'
        log.log(2, {"loss": 1.0})
    assert [entry["step"] for entry in read_metrics(epath.Path(file))] == [1, 2]


@pytest.mark.parametrize("damage", [b'{"step": 2, "lo', b"[2]", b'{"loss": 1.0}', b'{"step": "2"}', b"\xff\xfe", b""])
def test_a_damaged_line_is_named_and_left_alone(tmp_path: Path, damage: bytes) -> None:
    file = tmp_path / "metrics.jsonl"
    content = b'{"step": 1}\n' + damage + b'\n{"step": 3}\n'
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: ") as caught:
        open_log(tmp_path, resume_step=3)
    assert "remove that line" in str(caught.value)
    assert file.read_bytes() == content
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: "):
        read_metrics(epath.Path(file))


KILLED = """
import os, signal, sys
from etils import epath
from posttrain.train.metrics import MetricsLog
tensorboard = sys.argv[2] == "tensorboard"
log = MetricsLog(epath.Path(sys.argv[1]), tensorboard=tensorboard, is_main=True, resume_step=0)
for step in range(1, 21):
    log.log(step, {"loss": float(step)})
    if step == 15:
        log.sync()
print("tensorboardX" in sys.modules, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("mode", ["tensorboard", "plain"])
def test_a_kill_loses_no_logged_line_and_no_synced_point(tmp_path: Path, mode: str) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path), mode]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)
    assert done.returncode == -signal.SIGKILL
    assert [e["loss"] for e in read_metrics(epath.Path(tmp_path / "metrics.jsonl"))] == list(range(1, 21))
    imported = done.stdout.strip() == "True"
    assert imported == (mode == "tensorboard"), "tensorboardX is imported where it is used only"
    if mode == "tensorboard":
        points = curves(tmp_path / "tensorboard")["loss"]
        assert {step: points[step] for step in range(1, 16)} == {step: float(step) for step in range(1, 16)}
    else:
        assert not (tmp_path / "tensorboard").exists()


# ---- TensorBoard -----------------------------------------------------------------------------------------------------


def test_tensorboard_shows_one_curve_over_a_resume(tmp_path: Path) -> None:
    with open_log(tmp_path, tensorboard=True) as log:
        for step in range(1, 6):
            log.log(step, {"loss": float(step), "mfu": None, "global_step": step})
            log.log(step, {"eval_loss": float(step)})
    with open_log(tmp_path, resume_step=3, tensorboard=True) as log:
        for step in range(4, 7):
            log.log(step, {"loss": float(10 * step)})
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2, "a resume within a second has a file of its own"
    assert curves(tmp_path / "tensorboard") == {
        "loss": {1: 1.0, 2: 2.0, 3: 3.0, 4: 40.0, 5: 50.0, 6: 60.0},
        "eval_loss": {1: 1.0, 2: 2.0, 3: 3.0},
    }
    with open_log(tmp_path, tensorboard=True) as log:
        log.log(0, {"eval_loss": 9.0})
    assert curves(tmp_path / "tensorboard") == {"eval_loss": {0: 9.0}}


# ---- remote directories ----------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[Path]:
    """A directory in which `gs://bucket/` lies."""
    place = tmp_path / "bucket"
    place.mkdir()

    def local(path: Any) -> str:
        text = os.fspath(path)
        assert text.startswith("gs://bucket/"), text
        return str(place / text.removeprefix("gs://bucket/"))

    def opened(original: Any, path: Any, mode: str) -> Any:
        assert mode in ("rb", "wb"), "objects cannot be appended to"
        return original(local(path), mode)

    with epath.testing.mock_epath(
        open=opened,
        exists=lambda original, path: original(local(path)),
        makedirs=lambda original, path, exist_ok: original(local(path), exist_ok=exist_ok),
    ):
        yield place


def test_a_remote_run_is_copied_at_sync_and_close_and_fetched_on_resume(bucket: Path) -> None:
    file = bucket / "run" / "metrics.jsonl"
    with open_log("gs://bucket/run", tensorboard=True) as log:
        log.log(1, {"loss": 1.0})
        assert not file.exists()
        log.sync()
        assert len(file.read_bytes().splitlines()) == 1
        log.log(2, {"loss": 2.0})
        log.log(3, {"loss": 3.0})
        assert len(file.read_bytes().splitlines()) == 1
    assert len(file.read_bytes().splitlines()) == 3
    with open_log("gs://bucket/run", resume_step=2, tensorboard=True) as log:
        log.log(3, {"loss": 30.0})
    assert [(e["step"], e["loss"]) for e in map(strict, file.read_text().splitlines())] == [(1, 1), (2, 2), (3, 30)]
    assert curves(bucket / "run" / "tensorboard") == {"loss": {1: 1.0, 2: 2.0, 3: 30.0}}


def test_a_remote_run_is_copied_when_it_ends_by_an_error(bucket: Path) -> None:
    with pytest.raises(RuntimeError), open_log("gs://bucket/run") as log:
        log.log(1, {"loss": 1.0})
        raise RuntimeError
    assert len((bucket / "run" / "metrics.jsonl").read_bytes().splitlines()) == 1


# ---- speed -----------------------------------------------------------------------------------------------------------


def test_throughput_over_the_window() -> None:
    clock = Clock()
    speed = Throughput(total_steps=10, peak_flops=1e6, window=2, clock=clock)
    clock.now += 4.0
    assert speed.step(100, 1e6) == {"step_time": 4, "tokens_per_second": 25, "mfu": 0.25, "seconds_left": 36}
    clock.now += 1.0
    assert speed.step(150, 1e6) == {"step_time": 2.5, "tokens_per_second": 50, "mfu": 0.4, "seconds_left": 20}
    clock.now += 1.0
    third = speed.step(50, 0.5e6)  # the first step has left the window
    assert third == {"step_time": 1, "tokens_per_second": 100, "mfu": 0.75, "seconds_left": 7}
    assert set(third) <= TIME_KEYS


def test_throughput_leaves_pauses_out_of_the_speed_but_not_of_the_time_left() -> None:
    clock = Clock()
    speed = Throughput(total_steps=4, peak_flops=None, clock=clock)
    clock.now += 100.0  # compiling, or a held-out loss before the first step
    speed.pause()
    clock.now += 2.0
    assert speed.step(10, 1.0) == {"step_time": 2, "tokens_per_second": 5, "mfu": None, "seconds_left": 6}
    clock.now += 3.0
    speed.pause()
    clock.now += 1.0
    speed.pause()
    clock.now += 2.0
    # Two steps took 2 s each and the pauses between them 4 s, 2 s a step: two more take 8 s.
    assert speed.step(10, 1.0) == {"step_time": 2, "tokens_per_second": 5, "mfu": None, "seconds_left": 8}


def test_throughput_without_time_or_steps_left() -> None:
    speed = Throughput(total_steps=1, peak_flops=1.0, clock=Clock())
    assert speed.step(5, 5.0) == {"step_time": 0, "tokens_per_second": None, "mfu": None, "seconds_left": 0}


# ---- terminal --------------------------------------------------------------------------------------------------------

VALUES = {
    "loss": 1.23456,
    "epoch": 0.5,
    "learning_rate": 2e-5,
    "grad_norm": 0.98765,
    "tokens_per_second": 12345.6,
    "mfu": 0.4321,
    "seconds_left": 3725.4,
}


def plain(total: int, clock: Clock, *, is_main: bool = True) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(total_steps=total, is_main=is_main, console=RichConsole(file=out), clock=clock), out


def test_plain_lines() -> None:
    console, out = plain(100, Clock())
    with console:
        console.step(50, VALUES)
    assert out.getvalue() == (
        "step 50/100  epoch 0.50  loss 1.2346  lr 2.00e-05  grad norm 0.988  12,346 tok/s  MFU 43.2%  1:02:05 left\n"
    )


def test_what_is_not_known_is_not_shown() -> None:
    console, out = plain(9, Clock())
    with console:
        console.step(1, {"loss": math.nan, "mfu": None, "tokens_per_second": None})
    assert out.getvalue() == "step 1/9  loss nan\n"


def test_plain_lines_come_every_few_seconds_and_at_both_ends() -> None:
    clock = Clock()
    console, out = plain(100, clock)
    with console:
        for step in range(1, 101):
            console.step(step, {"loss": 1.0})
            clock.now += 0.25
        shown = out.getvalue()
    steps = [int(line.split("/")[0].removeprefix("step ")) for line in shown.splitlines()]
    assert steps == [1, 21, 41, 61, 81, 100], "every 5 seconds of 4 steps each"


def test_the_last_step_of_a_run_cut_short_is_shown() -> None:
    console, out = plain(100, Clock())
    with pytest.raises(KeyboardInterrupt), console:
        for step in (41, 42, 43):
            console.step(step, {"loss": 1.0})
        raise KeyboardInterrupt
    assert [line.split("  ")[0] for line in out.getvalue().splitlines()] == ["step 41/100", "step 43/100"]


def test_notes_and_held_out_losses_are_whole_lines_without_markup() -> None:
    console, out = plain(10, Clock())
    note = "resume: [bold]path[/bold] was " + "x" * 200
    console.note(note)
    with console:
        console.heldout(5, {"eval_loss": 1.5, "eval_entropy": 0.25})
    assert out.getvalue() == f"{note}\nstep 5/10  held out: eval_loss 1.5000  eval_entropy 0.2500\n"


def test_other_processes_print_nothing() -> None:
    console, out = plain(2, Clock(), is_main=False)
    with console:
        console.note("hello")
        console.step(1, VALUES)
        console.heldout(1, {"eval_loss": 1.0})
        console.step(2, VALUES)
    assert out.getvalue() == ""


def screen(output: str) -> list[str]:
    """What a terminal shows in the end: knows line ends, carriage return, cursor up, erase line; drops colours."""
    lines, row, column = [""], 0, 0
    for code, char in re.findall(r"\x1b\[([?0-9;]*[a-zA-Z])|(.|\n|\r)", output):
        if code.endswith(("m", "h", "l")):
            continue
        if code:
            assert code in ("2K", "1A"), code
            row, lines[row] = (row, "") if code == "2K" else (row - 1, lines[row])
        elif char == "\r":
            column = 0
        elif char == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        else:
            lines[row] = lines[row][:column].ljust(column) + char + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


def test_a_terminal_gets_a_bar_that_stays_below_the_lines() -> None:
    clock = Clock()
    out = io.StringIO()
    terminal = RichConsole(file=out, force_terminal=True, width=100, legacy_windows=False, _environ={})
    console = Console(total_steps=100, is_main=True, console=terminal, clock=clock)
    status = "epoch 0.50  loss {}  lr 2.00e-05  grad norm 0.988  12,346 tok/s  MFU 43.2%"
    with console:
        assert screen(out.getvalue()) == ["waiting for the first of 100 steps"]
        console.step(25, VALUES)
        console.step(26, {"loss": 9.0})  # too soon to be drawn
        assert screen(out.getvalue())[0] == status.format("1.2346")
        console.heldout(26, {"eval_loss": 1.5})
        clock.now += 1.0
        console.step(27, VALUES | {"loss": 2.0})
        console.step(28, VALUES | {"loss": 3.0})  # too soon, but the last
    heldout, above, bar, end = screen(out.getvalue())
    assert heldout == "step 26/100  held out: eval_loss 1.5000"
    assert above == status.format("3.0000")
    assert re.fullmatch(r"step 28/100 ━+[╸╺]?━+ 28% 1:02:05 left", bar) and len(bar) == 100
    assert end == ""
    assert out.getvalue().endswith("\x1b[?25h"), "the cursor is shown again"


def test_progress_goes_to_standard_error_and_tables_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    with Console(total_steps=1, is_main=True) as console:
        console.step(1, {"loss": 1.0})
    table("Parameters", ("name", "size"), [("a", 1)])
    captured = capsys.readouterr()
    assert captured.err == "step 1/1  loss 1.0000\n"
    assert "Parameters" in captured.out and "step" not in captured.out


def test_tables_cut_nothing_off_and_take_text_as_it_is() -> None:
    out = io.StringIO()
    name = "layers/" + "x" * 150
    rows = [(name, "[L, D]", 1234567), ("[bold]b", "", 3)]
    table("Sizes [of all]", ("parameter", "[shape]", "bytes"), rows, RichConsole(file=out, width=80))
    text = out.getvalue()
    lines = [[cell.strip() for cell in line.split("│")] for line in text.splitlines() if "│" in line]
    assert lines == [[name, "[L, D]", "1,234,567"], ["[bold]b", "", "3"]]
    assert "Sizes [of all]" in text and "[shape]" in text
    first, second = (line.rstrip() for line in text.splitlines() if "│" in line)
    assert len(first) == len(second), "numbers stand on the right"
