"""Four processes of two devices each: the same loss and gradients as one process with one device."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.test_run import finish, start
from tests.tiny import write_chats, write_model


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and packed chats."""
    root = tmp_path_factory.mktemp("files")
    write_model(root / "model")
    write_chats(root / "chats.jsonl", 60)
    config = {
        "model": {"path": str(root / "model")},
        "data": {
            "train": [{"path": str(root / "chats.jsonl")}],
            "heldout": {"fraction": 0.0},
            "max_length": 128,
            "row_length": 256,
            "cache_dir": str(root / "tokens"),
        },
        "train": {"global_batch_size": 4, "max_steps": 2},
    }
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    return root


def evaluated(files: Path, processes: int, **sizes: int) -> dict[str, Any]:
    """Loss and gradient norms over the training set."""
    mesh = [word for axis, size in ({"fsdp": 1} | sizes).items() for word in (f"--mesh.{axis}", str(size))]
    options = ("--json", "--gradient-norms", "--split", "train", *mesh)
    said = finish(start(files, files / "run", *options, processes=processes, command="evaluate"))
    return json.loads(next(line for line in said.splitlines() if line.startswith("{")))


@pytest.fixture(scope="module")
def alone(files: Path) -> dict[str, Any]:
    return evaluated(files, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes", [{"fsdp": 2, "context": 4}, {"context": 8}, {"replica": 2, "context": 2, "tensor": 2}], ids=str
)
def test_four_processes_of_two_devices_agree_with_one(
    files: Path, alone: dict[str, Any], sizes: dict[str, int]
) -> None:
    """The tokens of a row are split within a process, between all of them, or between two."""
    found = evaluated(files, 4, **sizes)
    assert found["samples"] == alone["samples"] == 60
    assert found["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert found["gradient_norms"] == pytest.approx(alone["gradient_norms"], rel=2e-5)
