"""Masks with real tokenizers and chats."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from posttrain.data.chat import encode_rows
from posttrain.data.formats import read_rows
from posttrain.data.rows import Row
from posttrain.data.tokenizer import Tokenizer
from tests.data.chat_cases import check_law, trained


@pytest.mark.acceptance
@pytest.mark.parametrize("loss_on", ["assistant", "last_assistant", "all"])
def test_real_chats_with_smollm2(shared: Path, smollm2: Path, loss_on: str) -> None:
    tokenizer = Tokenizer.load(str(smollm2))
    hf = AutoTokenizer.from_pretrained(smollm2)
    rows = [row for row in read_rows(str(shared / "bench" / "chat.jsonl")) if isinstance(row, Row)]
    for row, samples in zip(rows, encode_rows(rows, tokenizer, (loss_on,)), strict=True):
        assert isinstance(samples, tuple) and len(samples) == 1, str(samples)
        sample = samples[0]
        turns = [i for i, m in enumerate(row.messages) if m["role"] == "assistant"]
        if loss_on == "all":
            assert sample.tokens.tolist() == hf.apply_chat_template(list(row.messages), return_dict=False)
            continue
        turns = turns[-1:] if loss_on == "last_assistant" else turns
        check_law(row, sample, hf, turns)
        assert trained(sample, tokenizer) == [row.messages[i]["content"] + "<|im_end|>" for i in turns]
