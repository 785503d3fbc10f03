"""Plans of runs that keep optimizer state and activations in the host's memory, compiled for v5e."""

from pathlib import Path

import pytest

from posttrain.plan.command import compile_in_worker
from tests.plan.test_command import TINY, config


@pytest.mark.acceptance
def test_moments_and_activations_leave_the_device(tmp_path: Path) -> None:
    pytest.importorskip("libtpu")
    run = config(tmp_path)
    host = config(tmp_path, model={"path": str(tmp_path), "remat": "offload"}, optimizer={"memory": "host"})
    device, both = (compile_in_worker(c, "v5e:2x2", 1) for c in (run, host))
    before, after = device["memory"], both["memory"]
    moments = before["optimizer"] - 4  # the counter stays
    assert before["host"] == 0 and moments == 2 * (before["params"])
    assert after["params"] == before["params"] and after["optimizer"] == 4
    # Of a row of 1024 tokens in bf16: each layer's input, its attention's output and (in f32) log-sum-exps.
    layer = 1024 * (2 * 256 + 2 * 4 * 128)
    kept = TINY["num_hidden_layers"] * layer
    assert kept <= after["host"] - moments <= 1.05 * kept
    # All of it goes out and comes back once.
    assert device["cost"]["host_bytes"] == 0
    assert both["cost"]["host_bytes"] == pytest.approx(2 * after["host"], rel=0.05)
    # The embedding, the head and their moments are on the device while they are updated.
    tables = 2 * 2 * 4 * 4096 * 256 // 4
    assert after["peak"] < before["peak"] - moments + 2 * tables
