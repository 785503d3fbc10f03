"""A plan as tables and as plain data: everything that it knows is told, in both."""

import json
from typing import Any

import pytest

from posttrain.plan.candidates import Candidate
from posttrain.plan.length import RunLength
from posttrain.plan.predict import Prediction, plan_data, predict
from posttrain.plan.show import show
from tests.plan import search_cases as cases

LENGTH = RunLength(steps=300, epoch_steps=100, epoch_tokens=6_000_000, filled=0.9155)


def planned(**cost: Any) -> tuple[dict[str, Any], Prediction]:
    plan = cases.plan_of(Candidate((2, 1, 4, 1, 1, 1), "full", 16, 8, True))
    plan["cost"] |= cost
    plan["beside"] = ["what the reference computes"]
    found = predict(plan, cases.CHIP, tokens=300.0 * plan["work"]["tokens"], price=2.0, epoch_steps=100)
    return plan_data(plan, cases.CHIP, found, topology="v5p:2x2x1", slices=2, length=LENGTH), found


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    kernel = {"name": "a_kernel", "static": 1, "executed": 32.0, "recomputed": 0.0, "flops": None}
    loop = {"name": "while.1", "op_name": "jit(step)/while", "trips": None, "executed": 1.0}
    data, found = planned(host_bytes=30e9, recomputed_flops=2.5e15, kernels=[kernel], loops=[loop])
    show(data, found, "v5p:2x2x1, 2 slices", 95 * 2.0**30, length=LENGTH, missing="")
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split("│")[0].strip(): line.split("│")[1].strip() for line in lines if line.count("│") == 1}
    low, high = found.step_seconds
    assert rows["step"] == f"{low:.4g} to {high:.4g} s" and rows["chips"] == "8"
    assert rows["hours an epoch"] == f"{100 * low / 3600:.4g} to {100 * high / 3600:.4g} h"
    assert rows["cost"] == f"{300 * low / 3600 * 16:.4g} to {300 * high / 3600 * 16:.4g}"
    assert rows["of them recomputed"] == "2,500 TFLOP" and rows["read from and written to HBM"] == "500.00 GB"
    assert rows["to and from the host"] == "30.00 GB"
    assert rows["to and from the host, one after the other"] == "2000.0", "ms at 15 GB/s"
    text = "\n".join(lines)
    assert data["not_modelled"][0] == "what the reference computes"
    assert "2 slices (replica 2 x fsdp 4)" in text and "100 in an epoch of 6,000,000 tokens, which fill 91.5%" in text
    for told in ("a_kernel", "jit(step)/while", *data["assumptions"], *data["not_modelled"]):
        assert f"  - {told}" in lines
    assert "MaxText's Llama-2-70B on v5p-128 is published with 692 tokens/s a device (65.4% MFU" in text


def test_plain_data_is_whole() -> None:
    """What the tables say and what they leave out, so that nothing must be read off a terminal."""
    data = json.loads(json.dumps(planned()[0]))
    assert (data["topology"], data["slices"], data["chip"]) == ("v5p:2x2x1", 2, "v5p")
    assert {"params", "optimizer", "activations", "gradients", "other", "temporaries", "peak"} <= data["memory"].keys()
    assert {"executed_flops", "useful_flops", "recomputed_flops", "executed_over_useful"} <= data["prediction"].keys()
    assert {"step_seconds", "tokens_per_second", "mfu", "hours", "epoch_hours"} <= data["prediction"].keys()
    assert {"chip_hours", "cost", "fits", "chips", "host_seconds", "hbm_seconds"} <= data["prediction"].keys()
    (wire,) = data["prediction"]["wires"]
    assert wire.keys() == {"kind", "axes", "network", "executed", "payload_bytes", "wire_bytes", "seconds"}
    assert data["length"] == {"steps": 300, "epoch_steps": 100, "epoch_tokens": 6_000_000, "filled": 0.9155}
    assert data["assumptions"] and data["not_modelled"] and data["calibration"]["published_tokens_per_second"] == 692
    assert {"name", "split", "bytes"} <= data["sharding"][0].keys() and data["cost"]["hbm_bytes"]
