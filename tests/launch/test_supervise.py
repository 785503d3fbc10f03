"""launch/supervise.sh and launch/local.sh with real processes: a fake `posttrain` that ends with given codes."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SUPERVISE, LOCAL = str(ROOT / "launch/supervise.sh"), str(ROOT / "launch/local.sh")

FAKE = """#!/usr/bin/env bash
# Ends with the codes in the file `codes`, one a start or a process; `wait` saves on SIGTERM, as training does.
echo "start ${JAX_PROCESS_ID:-} $*" >> "$HERE/starts"
line=$([ "${JAX_PROCESS_ID:-}" ] && echo $((JAX_PROCESS_ID + 1)) || wc -l < "$HERE/starts")
code=$(sed -n "${line}p" "$HERE/codes")
if [ "$code" = wait ]; then
    trap 'echo saved >> "$HERE/signals"; exit 143' TERM
    trap 'echo interrupted >> "$HERE/signals"; exit 130' INT
    touch "$HERE/waits${JAX_PROCESS_ID:-}"
    while true; do sleep 0.05; done
fi
exit "$code"
"""


@pytest.fixture(autouse=True)
def interrupts() -> Iterator[None]:
    """What is started here can be interrupted, even where this process was started without (`nohup`, `&`)."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Puts a `posttrain` on PATH that ends with these codes."""

    def make(*codes: int | str) -> Path:
        (tmp_path / "posttrain").write_text(FAKE)
        (tmp_path / "posttrain").chmod(0o755)
        (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.setenv("HERE", str(tmp_path))
        return tmp_path

    return make


def starts(here: Path) -> int:
    return len((here / "starts").read_text().splitlines())


def wait_for(file: Path) -> None:
    for _ in range(1200):
        if file.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{file} did not come")


def supervise(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SUPERVISE, "--pause", "0", *words, "posttrain", "train", "c"], capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("codes", "code", "count"),
    [
        ([0], 0, 1),
        ([2, 0], 2, 1),  # a wrong config
        ([130, 0], 130, 1),  # Ctrl-C
        ([143, 143, 143, 143, 0], 0, 5),  # preempted often: no failure
        ([1, 134, 75, 0], 0, 4),  # crashes, and a peer that did not come
        ([1, 1, 1, 0], 1, 3),  # gives up
        ([1, 1, 143, 1, 1, 0], 0, 6),  # 143 ends a row: the run had come further
        ([137, 2, 0], 2, 2),
    ],
)
def test_what_is_started_again(fake: Callable[..., Path], codes: list[int], code: int, count: int) -> None:
    here = fake(*codes)
    done = supervise("--failures", "2" if codes[:3] != [1, 134, 75] else "3")
    assert (done.returncode, starts(here)) == (code, count), done.stderr
    assert (here / "starts").read_text().splitlines()[-1] == "start  train c"


def test_a_long_run_ends_a_row_of_failures(fake: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    here = fake(*[1] * 6, 0)
    monkeypatch.setenv("POSTTRAIN_HEALTHY_SECONDS", "0")  # every run counts as a long one
    assert supervise("--failures", "1").returncode == 0 and starts(here) == 7


def test_pauses_grow(fake: Callable[..., Path]) -> None:
    fake(1, 1, 0)
    begin = time.monotonic()
    done = subprocess.run([SUPERVISE, "--pause", "1", "posttrain"], capture_output=True, text=True)
    assert done.returncode == 0 and 3 <= time.monotonic() - begin < 6
    assert "failure 1 in a row, starting again in 1 s" in done.stderr and "again in 2 s" in done.stderr


@pytest.mark.parametrize("words", [("--failures", "two"), ("--pause", "0.5"), ("--failures", "08")])
def test_wrong_numbers_are_refused_before_anything_starts(fake: Callable[..., Path], words: tuple[str, str]) -> None:
    here = fake(1, 0)
    done = supervise(*words)
    assert done.returncode == 2 and f"'{words[1]}'" in done.stderr and not (here / "starts").exists()
    assert subprocess.run([SUPERVISE, "--dir"], capture_output=True).returncode == 2


def test_another_process_with_the_old_number_is_not_taken_for_the_run(tmp_path: Path) -> None:
    """As after a reboot."""
    (tmp_path / "pid").write_text(f"{os.getpid()}\n")
    status = subprocess.run([SUPERVISE, "--status", str(tmp_path)], capture_output=True, text=True)
    assert status.stdout == "gone\n"
    stop = subprocess.run([SUPERVISE, "--stop", str(tmp_path)], capture_output=True, text=True)
    assert stop.returncode == 0 and "nothing runs" in stop.stderr


def test_a_command_that_does_not_exist_is_not_tried_again() -> None:
    done = subprocess.run([SUPERVISE, "--pause", "0", "no-such-command"], capture_output=True, text=True)
    assert done.returncode == 127 and "not started again" in done.stderr


@pytest.mark.parametrize(("number", "said", "code"), [("TERM", "saved", 143), ("INT", "interrupted", 130)])
def test_a_signal_is_passed_on_once_and_ends_it(fake: Callable[..., Path], number: str, said: str, code: int) -> None:
    """To the whole process group, as a terminal and some schedulers send it: posttrain takes a second one for haste."""
    here = fake("wait", 0)
    started = subprocess.Popen([SUPERVISE, "posttrain"], stderr=subprocess.DEVNULL, process_group=0)
    wait_for(here / "waits")
    os.killpg(started.pid, getattr(signal, f"SIG{number}"))
    assert started.wait(20) == code and starts(here) == 1
    assert (here / "signals").read_text() == f"{said}\n"


def test_a_signal_between_two_tries_ends_it_at_once(fake: Callable[..., Path]) -> None:
    here = fake(1, 0)
    with subprocess.Popen([SUPERVISE, "--pause", "600", "posttrain"], stderr=subprocess.PIPE, text=True) as started:
        assert started.stderr is not None and "starting again in 600 s" in started.stderr.readline()
        started.terminate()
        assert started.wait(20) == 1 and starts(here) == 1


def test_detached_it_can_be_watched_and_stopped(fake: Callable[..., Path]) -> None:
    here = fake("wait", 0)
    run = here / "runs" / "mine"

    def status() -> str:
        return subprocess.run([SUPERVISE, "--status", run], capture_output=True, text=True).stdout.strip()

    assert status() == "gone"
    words = [SUPERVISE, "--detach", "--dir", run, "posttrain"]
    assert subprocess.run(words, timeout=10).returncode == 0
    wait_for(here / "waits")
    assert status() == "runs"
    again = subprocess.run(words, capture_output=True, text=True)
    assert again.returncode == 2 and "runs already" in again.stderr and starts(here) == 1
    assert subprocess.run([SUPERVISE, "--stop", run]).returncode == 0
    wait_for(run / "code")
    assert status() == "143" and "exit code 143 after SIGTERM" in (run / "log").read_text()


def test_the_log_is_copied_at_the_end(fake: Callable[..., Path]) -> None:
    here = fake(0)
    (here / "gcloud").write_text('#!/usr/bin/env bash\necho "$*" >> "$HERE/gcloud-said"\n')
    (here / "gcloud").chmod(0o755)
    assert supervise("--dir", str(here / "d"), "--copy-to", "gs://b/log").returncode == 0
    assert (here / "gcloud-said").read_text() == f"storage cp --quiet {here}/d/log gs://b/log\n"


def local(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([LOCAL, *words], capture_output=True, text=True)


@pytest.mark.parametrize(("codes", "code"), [((0, 0, 0), 0), ((0, 134, 2), 2), ((143, 143, 143), 143), ((0, 1, 1), 1)])
def test_local_ends_with_the_code_that_tells_most(fake: Callable[..., Path], codes: tuple[int, ...], code: int) -> None:
    """A wrong input counts over the crashes of those who waited for that process."""
    here = fake(*codes)
    assert local("3", "posttrain", "train").returncode == code
    lines = (here / "starts").read_text().splitlines()
    assert sorted(lines) == ["start 0 train", "start 1 train", "start 2 train"]


def test_local_passes_a_signal_on_once_to_every_process(fake: Callable[..., Path]) -> None:
    here = fake("wait", "wait")
    started = subprocess.Popen([LOCAL, "2", "posttrain"], process_group=0)
    wait_for(here / "waits0")
    wait_for(here / "waits1")
    os.killpg(started.pid, signal.SIGINT)
    assert started.wait(20) == 130
    assert (here / "signals").read_text() == "interrupted\n" * 2


def test_local_logs_each_process_to_its_own_file(tmp_path: Path) -> None:
    done = local("--logs", str(tmp_path), "2", "bash", "-c", 'echo "process $JAX_PROCESS_ID of $JAX_NUM_PROCESSES"')
    assert done.returncode == 0 and done.stdout == ""
    assert [(tmp_path / f"process-{i}.log").read_text() for i in (0, 1)] == ["process 0 of 2\n", "process 1 of 2\n"]
