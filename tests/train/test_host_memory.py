"""Optimizer state and activations in the host's memory: the same run, whichever memory it used before."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file

from posttrain.config import Config, parse_config
from posttrain.experiment import build
from posttrain.train import loop
from posttrain.train.checkpoint import Checkpoints
from tests.tiny import write_chats, write_model

TIMES = ("time", "step_time", "tokens_per_second", "mfu", "seconds_left")
DEVICE: dict[str, dict[str, Any]] = {"model": {"remat": "full"}, "optimizer": {"memory": "device"}}
HOST: dict[str, dict[str, Any]] = {"model": {"remat": "offload"}, "optimizer": {"memory": "host"}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("host")
    write_model(directory / "model")
    write_chats(directory / "chats.jsonl", 60)
    return directory


def config(root: Path, run: str, memory: dict[str, dict[str, Any]]) -> Config:
    raw: dict[str, Any] = {
        "run": {"dir": str(root / run)},
        "model": {"path": str(root / "model")},
        "data": {
            "train": [{"path": str(root / "chats.jsonl")}],
            "heldout": {"fraction": 0.0},
            "max_length": 64,
            "row_length": 64,
            "cache_dir": str(root / "cache"),
        },
        "train": {"global_batch_size": 8, "micro_batch_size": 4, "max_steps": 4},
        "optimizer": {
            "learning_rate": 1e-2,
            "warmup_ratio": 0.0,
            "weight_decay": 0.1,
            "freeze": ["layers[0:1]/mlp/.*"],
        },
        "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
        "checkpoint": {"every": 2, "keep_best": 0},
        "log": {"tensorboard": False},
    }
    for name, section in memory.items():
        raw[name] = {**raw.get(name, {}), **section}
    return parse_config(raw, "test")


@pytest.fixture(scope="module")
def on_device(root: Path) -> Path:
    loop.run(build(config(root, "device", DEVICE)))
    return root / "device"


@pytest.fixture(scope="module")
def on_host(root: Path) -> Path:
    loop.run(build(config(root, "host", HOST)))
    return root / "host"


def assert_same_run(found: Path, expected: Path) -> None:
    """Every logged value and every exported weight, to the last roundings."""
    runs = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (found, expected)
    ]
    assert len(runs[0]) == len(runs[1]) == 4
    for line, other in zip(*runs, strict=True):
        values = {name: value for name, value in other.items() if name not in TIMES}
        assert {name: line[name] for name in values} == pytest.approx(values, rel=1e-5)
    found_weights, weights = (load_file(run / "export" / "model.safetensors") for run in (found, expected))
    for name, value in weights.items():
        np.testing.assert_allclose(found_weights[name], value, rtol=0, atol=1e-6, err_msg=name)


def test_the_host_s_memory_changes_nothing(on_host: Path, on_device: Path) -> None:
    assert_same_run(on_host, on_device)


@pytest.mark.parametrize(("before", "after"), [("device", "host"), ("host", "device")])
def test_a_run_goes_on_in_another_memory(root: Path, on_device: Path, on_host: Path, before: str, after: str) -> None:
    started = {"device": on_device, "host": on_host}
    run = root / f"{before}-{after}"
    shutil.copytree(started[before], run, ignore=shutil.ignore_patterns("export", "4"))
    loop.run(build(config(root, run.name, {"device": DEVICE, "host": HOST}[after])))
    assert_same_run(run, started[after])


@pytest.mark.parametrize(("memory", "kind"), [(DEVICE, "device"), (HOST, "pinned_host")])
def test_moments_lie_where_they_belong(root: Path, on_host: Path, memory: dict[str, dict[str, Any]], kind: str) -> None:
    """At the start, restored (from a run that had them on the host), and after a step."""
    experiment = build(config(root, "host", memory))
    checkpoints = Checkpoints(epath.Path(on_host), experiment.config.checkpoint, read_only=True)
    restored, _ = experiment.restore(checkpoints, 4)
    states = [experiment.initial_state(), restored]
    checkpoints.close()
    step = loop.compile_step(experiment)
    _, batch = next(iter(loop.global_batches(experiment.data.train, experiment.mesh, experiment.micro_rows, 0)))
    states.append(step(experiment.initial_state(), batch)[0])
    for state in states:
        moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
        assert len(moments) == 2 * len(experiment.optimizer.trained)
        assert {leaf.sharding.memory_kind for leaf in moments} == {kind}
        assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.params)} == {"device"}
