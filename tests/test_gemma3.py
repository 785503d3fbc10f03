"""The real Gemma 3 270M, a base model, from its GGUF file: log-probs and greedy search against torch, and a short
fine-tuning after which it answers and stops. About 4 minutes and 6 GB."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

pytestmark = pytest.mark.acceptance

EXPECTED = dict(np.load(Path(__file__).parent / "fixtures" / "gemma3_270m.npz"))
TEXTS = sum(name.startswith("text_") for name in EXPECTED)

CAPITALS = {
    "France": "Paris",
    "Japan": "Tokyo",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Germany": "Berlin",
    "Egypt": "Cairo",
    "Russia": "Moscow",
    "China": "Beijing",
    "Greece": "Athens",
    "Portugal": "Lisbon",
    "Sweden": "Stockholm",
    "Austria": "Vienna",
    "Ireland": "Dublin",
    "Poland": "Warsaw",
    "Cuba": "Havana",
    "Kenya": "Nairobi",
}
UNSEEN = ("Peru", "England", "India", "Norway")


def posttrain(*words: str) -> list[dict[str, Any]]:
    """The JSON lines that a command prints."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "posttrain.cli", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("options", [[], ["--packed", "--mesh.fsdp", "2", "--mesh.tensor", "2"]], ids=" ".join)
def test_log_probs_equal_torch(gemma3: Path, tmp_path: Path, options: list[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": str(EXPECTED[f"text_{i}"])}) + "\n" for i in range(TEXTS)))
    found = posttrain("logprobs", str(gemma3), str(rows), *options)
    assert len(found) == TEXTS
    for i, row in enumerate(found):
        ids = EXPECTED[f"ids_{i}"].tolist()
        assert row["input_ids"][: len(ids)] == ids
        np.testing.assert_allclose(row["logprobs"][1 : len(ids)], EXPECTED[f"logps_{i}"], rtol=0, atol=5e-5)


def test_greedy_continuation_equals_torch(gemma3: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"input_ids": EXPECTED["greedy_prompt"].tolist()}) + "\n")
    new = EXPECTED["greedy_new"].tolist()
    [row] = posttrain("generate", str(gemma3), str(rows), "--max-new-tokens", str(len(new)))
    assert row["completion_ids"] == new


def question(country: str) -> dict[str, str]:
    return {"role": "user", "content": f"What is the capital of {country}?"}


@pytest.fixture(scope="module")
def assistant(gemma3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported model after 12 steps on 16 short chats."""
    root = tmp_path_factory.mktemp("gemma3")
    chats = [[question(country), {"role": "assistant", "content": f"{city}."}] for country, city in CAPITALS.items()]
    (root / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    config = {
        "run": {"dir": str(root / "run")},
        "model": {"path": str(gemma3)},
        "tokenizer": {"chat_template": "gemma", "eos_token": "<end_of_turn>"},
        "data": {
            "train": [{"path": str(root / "chats.jsonl")}],
            "heldout": {"fraction": 0},
            "max_length": 64,
            "row_length": 192,
            "cache_dir": str(root / "tokens"),
        },
        "train": {"global_batch_size": 2, "max_steps": 12},
        "optimizer": {"learning_rate": 3e-5, "schedule": "constant"},
        "checkpoint": {"every": 1000},
        "log": {"tensorboard": False},
    }
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    posttrain("train", str(root / "config.yaml"))
    return root / "run" / "export"


def answers(model: Path, tmp_path: Path, *options: str) -> dict[str, dict[str, Any]]:
    countries = (*CAPITALS, *UNSEEN)
    rows = tmp_path / "questions.jsonl"
    rows.write_text("".join(json.dumps({"prompt": [question(country)]}) + "\n" for country in countries))
    found = posttrain("generate", str(model), str(rows), "--max-new-tokens", "12", *options)
    return dict(zip(countries, found, strict=True))


def test_fine_tuning_makes_it_answer_and_stop(gemma3: Path, assistant: Path, tmp_path: Path) -> None:
    before = answers(gemma3, tmp_path, "--chat-template", "gemma")
    assert {row["finish_reason"] for row in before.values()} == {"length"}
    after = answers(assistant, tmp_path)
    assert {row["finish_reason"] for row in after.values()} == {"stop"}
    assert {country: after[country]["completion"] for country in CAPITALS} == {k: f"{v}." for k, v in CAPITALS.items()}
    assert after["Peru"]["completion"] == "Lima."  # which it knows from elsewhere


def test_the_exported_model_stops_at_the_end_of_its_turn(assistant: Path) -> None:
    config = json.loads((assistant / "generation_config.json").read_text())
    assert config["eos_token_id"] == [106, 1]
    assert "<start_of_turn>" in (assistant / "chat_template.jinja").read_text()
