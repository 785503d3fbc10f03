"""Rows to samples for `posttrain logprobs`: every kind of row, in order, and every bad row told."""

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.data.chat import Sample, encode_rows
from posttrain.data.tokenizer import Tokenizer
from posttrain.errors import UserError, UserErrors
from posttrain.logprobs import read_samples

FIXTURE = Path(__file__).parent / "fixtures" / "chat"
TOKENIZER = Tokenizer.load(str(FIXTURE), chat_template="chatml")
USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def samples_of(path: str) -> list[Sample]:
    found = read_samples(path, TOKENIZER.vocab_size, lambda rows: encode_rows(rows, TOKENIZER))
    return [sample for of_row in found for sample in of_row]


def test_every_kind_of_row_in_order(tmp_path: Path) -> None:
    tree = {"text": "Hi", "role": "prompter", "replies": [{"text": t, "role": "assistant"} for t in ("Hello", "No.")]}
    path = write(
        tmp_path / "rows.jsonl",
        {"input_ids": [7, 5, 6]},
        {"messages": [USER, ANSWER]},
        {"prompt": tree},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"text": "Hello"},
    )
    found = samples_of(path)
    assert [s.line for s in found] == [1, 2, 3, 3, 4, 5]
    assert found[0].tokens.tolist() == [7, 5, 6] and found[0].loss_weights.tolist() == [0.0, 1.0, 1.0]
    conversation = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    for sample in (found[1], found[2], found[4]):
        assert sample.tokens.tolist() == TOKENIZER.encode(conversation)
        trained = sample.tokens[sample.loss_weights > 0].tolist()
        assert trained == TOKENIZER.encode("Hello<|im_end|>")


def test_every_bad_row_is_told(tmp_path: Path) -> None:
    pair = {"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]}
    rows = [{"messages": []}, {"text": "fine"}, {"input_ids": [-1]}, {"x": 1}, pair]
    path = write(tmp_path / "rows.jsonl", *rows)
    with pytest.raises(UserErrors) as caught:
        samples_of(path)
    starts = [
        f"{path}:{line}: {why}" for line, why in ((1, "messages: has no"), (3, "input_ids: "), (4, "the row has no"))
    ]
    assert len(caught.value.problems) == 4
    assert all(p.startswith(start) for p, start in zip(caught.value.problems, starts, strict=False))
    assert caught.value.problems[3].startswith(f"{path}:5: the row is a preference pair")
    with pytest.raises(UserError, match="no rows"):
        samples_of(write(tmp_path / "none.jsonl"))
