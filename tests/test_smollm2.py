"""The real SmolLM2-135M-Instruct against torch: log-probs on several meshes, packed or not, and greedy search."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.acceptance


@pytest.fixture(scope="module")
def reference(shared: Path) -> dict[str, np.ndarray]:
    file = shared / "reference" / "reference_smollm2.npz"
    if not file.is_file():
        pytest.skip(f"no {file}")
    return dict(np.load(file))


def posttrain(*words: str) -> list[dict[str, Any]]:
    """The JSON lines that a command prints."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "posttrain.cli", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--packed"],
        ["--mesh.data", "2", "--mesh.fsdp", "4"],
        ["--packed", "--mesh.fsdp", "2", "--mesh.tensor", "2"],
    ],
    ids=" ".join,
)
def test_log_probs_equal_torch(
    smollm2: Path, reference: dict[str, np.ndarray], tmp_path: Path, options: list[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": str(reference[f"text_{i}"])}) for i in range(8)) + "\n")
    found = posttrain("logprobs", str(smollm2), str(rows), *options)
    for i, row in enumerate(found):
        ids = reference[f"ids_{i}"].tolist()
        assert row["input_ids"][: len(ids)] == ids
        expected = reference[f"logprobs_{i}"]
        np.testing.assert_allclose(row["logprobs"][1 : len(ids)], expected, rtol=0, atol=5e-5, err_msg=f"row {i}")


def test_greedy_continuation_equals_torch(smollm2: Path, reference: dict[str, np.ndarray], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"input_ids": reference["greedy_prompt"].tolist()}) + "\n")
    count = len(reference["greedy_new"])
    [row] = posttrain("generate", str(smollm2), str(rows), "--max-new-tokens", str(count))
    assert row["completion_ids"] == reference["greedy_new"].tolist()
