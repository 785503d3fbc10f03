"""`inspect` on real files: its counts are those of the files' own JSON, and the page stays small."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from posttrain.config import parse_config
from posttrain.data.inspect import InspectOptions
from posttrain.data.inspect_answers import LABELS, PAIRS
from posttrain.data.inspect_page import page_html
from posttrain.data.inspect_summary import source_table
from posttrain.experiment import inspect_data
from tests.data.inspect_cases import FIXTURE

pytestmark = pytest.mark.acceptance


def test_counts_of_real_files(shared: Path, tmp_path: Path) -> None:
    files = ["llama-factory-demo/v1_sft_demo.jsonl", "llama-factory-demo/alpaca_en_demo.json"]
    paths = [shared / "data" / name for name in (*files, "fastchat/dummy_conversation.json")]
    raw = {
        "tokenizer": {"path": str(FIXTURE), "chat_template": "chatml"},
        "data": {
            "train": [{"path": str(path)} for path in paths],
            "max_length": 1024,
            "cache_dir": str(tmp_path / "cache"),
        },
    }
    found = inspect_data(parse_config(raw, "test"), InspectOptions(samples=100))
    table = source_table(found)
    counts = [dict(zip(table.columns, (text for text, _ in row), strict=True)) for row in table.rows]
    assert [row["Rows"] for row in counts] == ["500", "999", "500"]
    assert found.bad_rows == 0 and found.problem == ""
    rows = [json.loads(line) for line in paths[0].read_text().split("\n") if line]
    texts = [
        [(m["role"], "".join(part["value"] for part in m["content"]), m["loss_weight"]) for m in row["messages"]]
        for row in rows
    ]
    for row in json.loads(paths[1].read_text()):
        question = f"{row['instruction']}\n{row['input']}" if row["input"] else row["instruction"]
        texts.append([("user", question, 0.0), ("assistant", row["output"], 1.0)])
    for row in json.loads(paths[2].read_text()):
        names = {"human": ("user", 0.0), "gpt": ("assistant", 1.0)}
        turns = [(turn["value"], *names[turn["from"]]) for turn in row["conversations"]]
        texts.append([(role, text, weight) for text, role, weight in turns])
    distinct = len({json.dumps(text) for text in texts})
    assert sum(int(row["Duplicates"]) for row in counts) == len(texts) - distinct > 200
    page = page_html(found, name="real")
    assert 100_000 < len(page) < 3_000_000


def test_tool_calls_of_real_files(shared: Path, tmp_path: Path) -> None:
    """A template without a form for tools: every row with tools is rejected for this one reason, no other row is."""
    path = shared / "data" / "llama-factory-demo" / "glaive_toolcall_en_demo.json"
    raw = {
        "tokenizer": {"path": str(FIXTURE), "chat_template": "chatml"},
        "data": {"train": [{"path": str(path)}], "max_length": 8192, "cache_dir": str(tmp_path / "cache")},
    }
    found = inspect_data(parse_config(raw, "test"), InspectOptions(samples=1000))
    with_tools = sum(bool(json.loads(row["tools"] or "[]")) for row in json.loads(path.read_text()))
    assert [count for count, _ in found.reject_kinds] == [with_tools] and with_tools > 100
    assert len(found.samples) == 300 - with_tools and len(found.rejects) == min(500, with_tools)


def test_pairs_and_labels_of_real_files(shared: Path, tmp_path: Path) -> None:
    directory = shared / "data" / "llama-factory-demo"
    raw: dict[str, Any] = {
        "tokenizer": {"path": str(FIXTURE), "chat_template": "chatml"},
        "objective": {"name": "sigmoid"},
        "data": {
            "train": [{"path": str(directory / "dpo_en_demo.json")}],
            "max_length": 16384,
            "row_length": 32768,
            "cache_dir": str(tmp_path / "cache"),
        },
    }
    found = inspect_data(parse_config(raw, "test"), InspectOptions(samples=20))
    rows = json.loads((directory / "dpo_en_demo.json").read_text())
    hf = AutoTokenizer.from_pretrained(str(FIXTURE))
    lengths = [
        [len(hf(f"{row[side]['value']}<|im_end|>", add_special_tokens=False)["input_ids"]) for side in PAIRS]
        for row in rows
    ]
    assert found.bad_rows == 0 and found.answers is not None
    assert [sum(a > b for a, b in lengths), sum(a < b for a, b in lengths)] == [*found.answers.longer]
    for side, trained in zip(PAIRS, zip(*lengths, strict=True), strict=True):
        assert found.answers.trained[side].tolist() == [*trained]
    assert 100_000 < len(page_html(found, name="real")) < 3_000_000
    raw["objective"] = {"name": "kto"}
    raw["data"]["train"] = [{"path": str(directory / "kto_en_demo.json")}]
    labelled = inspect_data(parse_config(raw, "test"), InspectOptions(samples=20))
    labels = [row["label"] for row in json.loads((directory / "kto_en_demo.json").read_text())]
    assert labelled.answers is not None and labels.count(True) > 100 < labels.count(False)
    assert labelled.answers.counts == dict(zip(LABELS, (labels.count(True), labels.count(False)), strict=True))
