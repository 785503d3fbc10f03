"""Masks with real templates, tokenizers and chats.

The environment variable POSTTRAIN_TRL_TEMPLATES names the `chat_templates` folder of an installed TRL wheel.
"""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from posttrain.data.chat import LossOn, Sample, encode_rows
from posttrain.data.files import BadRow
from posttrain.data.formats import Row, read_rows
from posttrain.data.tokenizer import Tokenizer
from tests.data.chat_cases import (
    ANSWER,
    ANSWER_2,
    FIXTURE,
    LONG,
    SYSTEM,
    USER,
    chat,
    check_law,
    encode,
    refused,
    trained,
)


def trl_templates() -> list[Path]:
    return sorted(Path(os.environ.get("POSTTRAIN_TRL_TEMPLATES") or "/nonexistent").glob("*.jinja"))


def with_tokens_of(template: str) -> Tokenizer:
    """The fixture's tokenizer with the special tokens that a template writes."""
    hf = AutoTokenizer.from_pretrained(FIXTURE)
    pattern = r"<\|[^|<>{}\s]+\|>|<[a-z_]+_of_[a-z]+>|<\|?turn\|?>|<\uff5c[^\uff5c<>{}]+\uff5c>"
    tokens = sorted(set(re.findall(pattern, template)) - set(hf.get_vocab()))
    hf.add_special_tokens({"additional_special_tokens": tokens})
    hf.chat_template = template
    return Tokenizer(hf, source="fixture")


@pytest.fixture(scope="module")
def trl() -> dict[str, str]:
    found = {path.stem: path.read_text() for path in trl_templates()}
    if not found:
        pytest.skip("POSTTRAIN_TRL_TEMPLATES does not name the chat_templates folder of a TRL wheel")
    return found


@pytest.mark.acceptance
@pytest.mark.parametrize(
    ("name", "turns", "stop"),
    [
        ("llama3", 2, "<|eot_id|>"),
        ("llama3_1", 2, "<|eot_id|>"),
        ("llama3_2", 2, "<|eot_id|>"),
        ("gemma3", 2, "<end_of_turn>"),
        ("gemma4", 2, "<turn|>"),
        ("qwen2_5", 2, "<|im_end|>"),
        ("qwen3_instruct_2507", 2, "<|im_end|>"),
        ("cohere", 2, "<|END_OF_TURN_TOKEN|>"),
        ("qwen3", 1, "<|im_end|>"),
        ("gptoss", 1, "<|return|>"),
    ],
)
def test_stock_templates_are_accepted(trl: dict[str, str], name: str, turns: int, stop: str) -> None:
    tokenizer = with_tokens_of(trl[name])
    row = chat(SYSTEM, *LONG[: 2 * turns])
    sample = encode(row, tokenizer)
    stretches = trained(sample, tokenizer)
    assert [text[-len(m["content"] + stop) :] for text, m in zip(stretches, (ANSWER, ANSWER_2), strict=False)] == [
        m["content"] + stop for m in (ANSWER, ANSWER_2)[:turns]
    ]
    check_law(row, sample, tokenizer._hf, [2, 4][:turns])
    if turns == 1:
        assert "renders this turn differently once later messages follow" in refused(chat(*LONG), tokenizer).reason
        encode(chat(*LONG), tokenizer, "last_assistant")


@pytest.mark.acceptance
def test_masks_agree_with_the_marks_of_trl(trl: dict[str, str]) -> None:
    """TRL's marked templates train the same tokens, but for what the model is fed or never has to produce."""
    compared, differ = 0, {}
    for name, template in trl.items():
        if not re.search(r"\{%-?\s*generation", template):
            continue
        tokenizer = with_tokens_of(template)
        for row in (chat(USER, ANSWER), chat(*LONG)):
            (sample,) = encode_rows([row], tokenizer, "assistant")
            if isinstance(sample, BadRow):
                continue
            marked = tokenizer._hf.apply_chat_template(
                list(row.messages), return_dict=True, return_assistant_tokens_mask=True
            )
            theirs = np.array(marked["assistant_masks"], np.float32)
            compared += 1
            assert not ((sample.loss_weights > 0) & (theirs == 0)).any(), name
            more = np.flatnonzero((theirs > 0) & (sample.loss_weights == 0))
            # Whitespace behind the stop token, and headers that the generation prompt writes.
            text = tokenizer.decode(sample.tokens[more].tolist())
            if text.strip():
                differ[name] = text
    assert compared >= 20
    assert set(differ) <= {"gptoss_training", "muse_glimmer_training", "qwen3_5_nothink_training"}


@pytest.mark.acceptance
@pytest.mark.parametrize("loss_on", ["assistant", "last_assistant", "all"])
def test_real_chats_with_smollm2(shared: Path, smollm2: Path, loss_on: LossOn) -> None:
    tokenizer = Tokenizer.load(str(smollm2))
    hf = AutoTokenizer.from_pretrained(smollm2)
    rows = [row for row in read_rows(str(shared / "bench" / "chat.jsonl")) if isinstance(row, Row)]
    for row, sample in zip(rows, encode_rows(rows, tokenizer, loss_on), strict=True):
        assert isinstance(sample, Sample), str(sample)
        turns = [i for i, m in enumerate(row.messages) if m["role"] == "assistant"]
        if loss_on == "all":
            assert sample.tokens.tolist() == hf.apply_chat_template(list(row.messages), return_dict=False)
            continue
        turns = turns[-1:] if loss_on == "last_assistant" else turns
        check_law(row, sample, hf, turns)
        assert trained(sample, tokenizer) == [row.messages[i]["content"] + "<|im_end|>" for i in turns]
