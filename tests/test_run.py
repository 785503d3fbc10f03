"""Whole runs through the command line: trained, killed, stopped, resumed, moved to another mesh."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.tiny import write_chats, write_model

ROOT = Path(__file__).parent.parent
TIMES = ("time", "step_time", "tokens_per_second", "mfu", "seconds_left")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, chats and a config that trains on them for 12 steps."""
    root = tmp_path_factory.mktemp("files")
    write_model(root / "model")
    write_chats(root / "chats.jsonl", 120)
    config = {
        "model": {"path": str(root / "model")},
        "data": {
            "train": [{"path": str(root / "chats.jsonl")}],
            "heldout": {"fraction": 0.1},
            "max_length": 128,
            "row_length": 128,
            "cache_dir": str(root / "tokens"),
        },
        "train": {"global_batch_size": 4, "max_steps": 12},
        "optimizer": {"learning_rate": 1e-2},
        "mesh": {"fsdp": 4},
        "checkpoint": {"every": 3},
        "evaluate": {"every": 4},
        "log": {"tensorboard": False},
    }
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    return root


def start(
    files: Path, run: Path, *overrides: str, processes: int = 1, command: str = "train"
) -> list[subprocess.Popen]:
    """The processes of one run."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "xla-tests")}
    if processes > 1:
        with socket.socket() as s:
            s.bind(("localhost", 0))
            environment["JAX_COORDINATOR_ADDRESS"] = f"localhost:{s.getsockname()[1]}"
        environment["JAX_NUM_PROCESSES"] = str(processes)
    words = [
        sys.executable,
        "-m",
        "posttrain.cli",
        command,
        str(files / "config.yaml"),
        "--run.dir",
        str(run),
        *overrides,
    ]
    return [
        subprocess.Popen(
            words,
            env=environment | ({"JAX_PROCESS_ID": str(i)} if processes > 1 else {}),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]


def finish(started: list[subprocess.Popen], code: int = 0) -> str:
    """What the first process printed, once all have ended with this exit code."""
    printed = []
    for process in started:
        try:
            out, err = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            for other in started:
                other.kill()
            raise
        assert process.returncode == code, err
        printed.append(out + err)
    return printed[0]


def logged(run: Path) -> list[dict[str, Any]]:
    """Every logged value but times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def weights(run: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(run / "export" / "model.safetensors")


def assert_same_run(found: Path, expected: Path) -> None:
    """Bit for bit: every logged value and every exported weight."""
    assert logged(found) == logged(expected)
    other = weights(expected)
    for name, value in weights(found).items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)


@pytest.fixture(scope="module")
def uninterrupted(files: Path) -> Path:
    run = files / "uninterrupted"
    finish(start(files, Path(os.path.relpath(run, ROOT))))
    return run


def test_a_run_logs_what_it_did_and_learns(uninterrupted: Path) -> None:
    lines = logged(uninterrupted)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert {"loss", "entropy", "mean_token_accuracy", "num_tokens", "learning_rate", "grad_norm", "epoch"} <= set(
        steps[0]
    )
    heldout = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert {0, 4, 8, 12} <= set(heldout)
    assert heldout[12] < heldout[0] - 0.5
    exported = {path.name for path in (uninterrupted / "export").iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
    } <= exported


def test_a_finished_run_is_left_as_it_is(files: Path, uninterrupted: Path) -> None:
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    finish(start(files, uninterrupted))
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_goes_on_bit_for_bit(
    files: Path, uninterrupted: Path, tmp_path: Path, number: signal.Signals
) -> None:
    started = start(files, tmp_path / "run")
    wait_for_step(tmp_path / "run", 4)
    started[0].send_signal(number)
    said = finish(started, 128 + number)
    assert "saved" in said
    finish(start(files, tmp_path / "run", "--run.resume", "must"))
    assert_same_run(tmp_path / "run", uninterrupted)


def wait_for_step(run: Path, step: int) -> None:
    """Until that step is logged; the signal may still land anywhere after."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists() and any(line["step"] >= step for line in logged_so_far(run)):
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was never logged")


def logged_so_far(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


@pytest.mark.parametrize("after", [1, 3, 6])
def test_killed_and_resumed_equals_uninterrupted(files: Path, uninterrupted: Path, tmp_path: Path, after: int) -> None:
    started = start(files, tmp_path / "run")
    wait_for_step(tmp_path / "run", after)
    started[0].kill()
    started[0].communicate()
    finish(start(files, tmp_path / "run"))
    assert_same_run(tmp_path / "run", uninterrupted)


def test_resumed_on_another_mesh_the_rows_and_losses_are_the_same(
    files: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    started = start(files, tmp_path / "run")
    wait_for_step(tmp_path / "run", 5)
    started[0].kill()
    started[0].communicate()
    finish(start(files, tmp_path / "run", "--mesh.fsdp", "2", "--mesh.data", "1", "--mesh.tensor", "2"))
    assert_close_runs(tmp_path / "run", uninterrupted)


def assert_close_runs(found: Path, expected: Path) -> None:
    assert len(logged(found)) == len(logged(expected))
    for line, other in zip(logged(found), logged(expected), strict=True):
        for name, value in other.items():
            assert line[name] == pytest.approx(value, rel=1e-4), (name, line["step"])


@pytest.mark.slow
def test_two_processes_are_the_same_run_and_stop_at_the_same_step(
    files: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    started = start(files, tmp_path / "run", processes=2)
    wait_for_step(tmp_path / "run", 4)
    started[1].send_signal(signal.SIGTERM)  # one of them is enough
    finish(started, 128 + signal.SIGTERM)
    assert logged(tmp_path / "run")[-1]["step"] < 12
    finish(start(files, tmp_path / "run", processes=2))
    assert_close_runs(tmp_path / "run", uninterrupted)


def test_another_config_in_the_same_directory_is_refused_with_the_difference(files: Path, uninterrupted: Path) -> None:
    said = finish(start(files, uninterrupted, "--optimizer.learning_rate", "1e-3", "--run.seed", "7"), 2)
    assert "optimizer.learning_rate: the run in" in said and "has 0.01, this config has 0.001" in said
    assert "run.seed" in said


def test_resume_never_and_must(files: Path, uninterrupted: Path, tmp_path: Path) -> None:
    assert "has a checkpoint of step 12" in finish(start(files, uninterrupted, "--run.resume", "never"), 2)
    assert "there is no checkpoint" in finish(start(files, tmp_path / "new", "--run.resume", "must"), 2)


def test_an_export_without_checkpoints_is_not_written_over(files: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "export").mkdir(parents=True)
    assert "has an export but no checkpoint" in finish(start(files, tmp_path / "run"), 2)


def test_a_profile_that_the_run_s_end_cuts_short_is_written(files: Path, tmp_path: Path) -> None:
    finish(start(files, tmp_path / "run", "--train.max_steps", "2", "--log.profile_steps", "1", "9"))
    assert len(list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))) == 1


def test_other_data_under_the_same_name_is_refused(files: Path, tmp_path: Path) -> None:
    write_chats(tmp_path / "chats.jsonl", 60)
    overrides = ("--data.train.0.path", str(tmp_path / "chats.jsonl"), "--train.max_steps", "3")
    finish(start(files, tmp_path / "run", *overrides))
    write_chats(tmp_path / "chats.jsonl", 61)
    said = finish(start(files, tmp_path / "run", *overrides), 2)
    assert "the training data is not what it was" in said


def test_evaluate_gives_losses_and_gradient_norms(files: Path, uninterrupted: Path) -> None:
    first = finish(start(files, uninterrupted, "--json", "--gradient-norms", "--mesh.fsdp", "1", command="evaluate"))
    values = json.loads(first[first.index("{") : first.rindex("}") + 1])
    assert values["loss"] == pytest.approx(logged(uninterrupted)[0]["eval_loss"], rel=1e-5)
    assert len(values["gradient_norms"]) == 3 + 2 * 9 and all(norm > 0 for norm in values["gradient_norms"].values())


def test_evaluate_reads_the_whole_training_set_whatever_max_steps(files: Path, tmp_path: Path) -> None:
    overrides = ("--json", "--split", "train", "--train.max_steps", "1")
    said = finish(start(files, tmp_path / "run", *overrides, command="evaluate"))
    values = json.loads(said[said.index("{") : said.rindex("}") + 1])
    assert values["split"] == "train" and values["samples"] == 108 and 5 < values["loss"] < 7


def test_another_reduction_dtype_is_refused(files: Path, tmp_path: Path) -> None:
    said = finish(start(files, tmp_path / "run", "--train.grad_reduce_dtype", "bfloat16"), 2)
    assert "only the compute dtype (float32) is served yet" in said
