"""The length of a run by its data: counted as its rows make it."""

import math
from pathlib import Path

import pytest

from posttrain.config import Config, parse_config
from posttrain.errors import UserError
from posttrain.plan.length import run_length
from tests.tiny import write_chats, write_model


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("files")
    write_model(root / "model")
    write_chats(root / "chats.jsonl", 50)
    return root


def config(files: Path, run: dict | None = None, **data: object) -> Config:
    raw = {"path": str(files / "model")}, {"global_batch_size": 4, **(run or {})}
    source = [{"path": str(files / "chats.jsonl")}]
    given = {"train": source, "heldout": {"fraction": 0.0}, "max_length": 128, "row_length": 128, **data}
    return parse_config({"model": raw[0], "train": raw[1], "data": given}, "test")


def test_every_sample_a_row_without_packing(files: Path) -> None:
    found = run_length(config(files, packing=False, epochs=3))
    assert (found.epoch_steps, found.steps) == (math.ceil(50 / 4), 3 * math.ceil(50 / 4))
    assert found.filled == pytest.approx(found.epoch_tokens / (50 * 128))


def test_packing_makes_it_shorter(files: Path) -> None:
    alone, packed = run_length(config(files, packing=False)), run_length(config(files))
    assert packed.epoch_tokens == alone.epoch_tokens
    rows = math.ceil(packed.epoch_tokens / 128)
    assert math.ceil(rows / 4) <= packed.steps < alone.steps
    assert 0.8 < packed.filled <= 1


def test_a_limit_of_steps_counts(files: Path) -> None:
    found = run_length(config(files, {"max_steps": 7}))
    assert found.steps == 7


def test_absent_data_are_named(files: Path) -> None:
    with pytest.raises(UserError, match=r"none\.jsonl"):
        run_length(config(files, train=[{"path": "none.jsonl"}]))
