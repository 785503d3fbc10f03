"""Masks and ids against `transformers`: what it renders, tokenizes and would feed at inference is the reference here.

For every accepted row the ids are those of `apply_chat_template(messages)`, each trained stretch follows exactly those
of `apply_chat_template(messages[:i], add_generation_prompt=True)`, and its text is the answer and the stop token.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from posttrain.data.chat import encode_rows
from posttrain.data.files import BadRow
from posttrain.data.rows import Row
from posttrain.data.tokenizer import Tokenizer
from posttrain.errors import UserError
from tests.data.chat_cases import (
    ANSWER,
    ANSWER_2,
    FIXTURE,
    LONG,
    SYSTEM,
    USER,
    USER_2,
    chat,
    check_law,
    encode,
    load,
    plain,
    refused,
    trained,
)


@pytest.fixture(scope="module")
def chatml() -> Tokenizer:
    return load("chatml")


# ---- masks by hand --------------------------------------------------------------------------------------------------


def test_a_mask_token_by_token() -> None:
    """The file's own ids, spelled out: header, answer, stop token, and the newline that is not trained."""
    content = json.loads((FIXTURE / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"] | {token["content"]: token["id"] for token in content["added_tokens"]}
    row = chat({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    sample = encode(row, load("chatml"))
    texts = {id: text for text, id in vocab.items()}
    cut = [texts[id] for id in sample.tokens.tolist()]
    header = sample.tokens.tolist().index(vocab["<|im_start|>"], 1)
    assert cut[header] == "<|im_start|>" and "".join(cut[header + 1 : -3]) == "assistantĊ"
    assert cut[-3:] == ["b", "<|im_end|>", "Ċ"]
    assert sample.loss_weights.tolist() == [0.0] * (len(cut) - 3) + [1.0, 1.0, 0.0]


STOPS = {
    "chatml": "<|im_end|>",
    "default_system": "<|im_end|>",
    "generation_marks": "<|im_end|>",
    "date": "<|im_end|>",
    "trims_content": "<|eot|>",
    "alternates": "<end_of_turn>",
    "instructions": "<|im_end|>",
}


@pytest.mark.parametrize("template", STOPS)
@pytest.mark.parametrize("first", [(), (SYSTEM,)])
def test_assistant_turns(template: str, first: tuple[dict[str, str], ...]) -> None:
    if template == "instructions" and first:
        pytest.skip("this template takes no system message")
    tokenizer = load(template)
    row = chat(*first, *LONG)
    sample = encode(row, tokenizer)
    space = " " if template == "instructions" else ""
    assert trained(sample, tokenizer) == [space + m["content"] + STOPS[template] for m in (ANSWER, ANSWER_2)]
    text = tokenizer.decode(sample.tokens.tolist())
    assert text == tokenizer.render(row.messages)
    assert text.count("<s>") == (template in ("trims_content", "alternates", "instructions"))  # one BOS, or none


@pytest.mark.parametrize("template", STOPS)
def test_ids_and_prefixes_are_those_of_transformers(template: str) -> None:
    if template == "date":
        pytest.skip("transformers' clock runs")
    tokenizer = load(template)
    hf = AutoTokenizer.from_pretrained(FIXTURE)
    hf.chat_template = tokenizer.chat_template
    row = chat(*LONG)
    check_law(row, encode(row, tokenizer), hf, [1, 3])
    check_law(row, encode(row, tokenizer, "last_assistant"), hf, [3])


def test_generation_marks_agree_with_the_derived_mask() -> None:
    tokenizer = load("generation_marks")
    hf = AutoTokenizer.from_pretrained(FIXTURE)
    hf.chat_template = tokenizer.chat_template
    marked = hf.apply_chat_template(list(LONG), return_dict=True, return_assistant_tokens_mask=True)
    assert encode(chat(*LONG), tokenizer).loss_weights.tolist() == marked["assistant_masks"]


def test_the_stop_token_is_trained_where_it_is_pad_and_eos_too(chatml: Tokenizer) -> None:
    assert chatml.pad_id == chatml.eos_id
    sample = encode(chat(*LONG), chatml)
    ends = np.flatnonzero(sample.tokens == chatml.eos_id)
    assert sample.loss_weights[ends].tolist() == [0, 1, 0, 1]  # of the users' turns it is context


def test_roles_beside_user_and_assistant_are_context(chatml: Tokenizer) -> None:
    tool = {"role": "tool", "content": "3"}
    developer = {"role": "developer", "content": "Be brief."}
    row = chat(developer, USER, ANSWER, tool, ANSWER_2, USER)
    sample = encode(row, chatml)
    assert trained(sample, chatml) == [ANSWER["content"] + "<|im_end|>", ANSWER_2["content"] + "<|im_end|>"]
    assert chatml.decode(sample.tokens.tolist()) == chatml.render(row.messages)


def test_two_answers_in_a_row_are_two_turns(chatml: Tokenizer) -> None:
    sample = encode(chat(USER, ANSWER, ANSWER_2), chatml)
    assert trained(sample, chatml) == [ANSWER["content"] + "<|im_end|>", ANSWER_2["content"] + "<|im_end|>"]


# ---- loss_on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss_on", "prompt", "expected"),
    [
        ("assistant", None, ["A1", "A2"]),
        ("assistant", 1, ["A1", "A2"]),
        ("assistant", 2, ["A2"]),
        ("assistant", 3, ["A2"]),
        ("last_assistant", None, ["A2"]),
        ("last_assistant", 1, ["A2"]),
        ("completion", 3, ["A2"]),
        ("completion", 1, ["A1\n<|im_start|>user\nU2<|im_end|>\n<|im_start|>assistant\nA2"]),
        ("completion", 2, ["<|im_start|>user\nU2<|im_end|>\n<|im_start|>assistant\nA2"]),
    ],
)
def test_loss_on(chatml: Tokenizer, loss_on: str, prompt: int | None, expected: list[str]) -> None:
    names = {"A1": ANSWER["content"] + "<|im_end|>", "A2": ANSWER_2["content"] + "<|im_end|>", "U2": USER_2["content"]}
    texts = [re.sub("A1|A2|U2", lambda m: names[m[0]], text) for text in expected]
    assert trained(encode(chat(*LONG, prompt=prompt), chatml, loss_on), chatml) == texts


@pytest.mark.parametrize("prompt", [None, 3])
def test_loss_on_all(chatml: Tokenizer, prompt: int | None) -> None:
    sample = encode(chat(*LONG, prompt=prompt), chatml, "all")
    assert sample.loss_weights.tolist() == [0.0] + [1.0] * (len(sample.tokens) - 1)
    assert encode(chat(USER), chatml, "all").loss_weights.sum() > 0


def test_a_completion_that_ends_with_the_user_is_trained_to_its_end(chatml: Tokenizer) -> None:
    sample = encode(chat(USER, ANSWER, USER_2, prompt=1), chatml, "completion")
    assert trained(sample, chatml)[0].endswith(USER_2["content"] + "<|im_end|>\n")


def test_completion_needs_a_prompt(chatml: Tokenizer) -> None:
    bad = refused(chat(*LONG), chatml, "completion")
    assert bad.key == "messages" and "does not say where its prompt ends" in bad.reason


# ---- plain text -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_on", ["assistant", "completion", "last_assistant", "all"])
def test_text_rows(chatml: Tokenizer, loss_on: str) -> None:
    for text in ("Paris is the capital.", "Paris.<|im_end|>"):
        sample = encode(Row("t.jsonl", 3, "text", text=text), chatml, loss_on)
        expected = "<s>" + text.removesuffix("<|im_end|>") + "<|im_end|>"
        assert chatml.decode(sample.tokens.tolist()) == expected
        assert sample.tokens[0] == chatml.bos_id and (sample.tokens == chatml.eos_id).sum() == 1
        assert sample.loss_weights.tolist() == [0.0] + [1.0] * (len(sample.tokens) - 1)


def byte_starts(tokens: np.ndarray) -> np.ndarray:
    """Where each token begins in the text's UTF-8, from the vocabulary: a byte-level token has a character per byte."""
    content = json.loads((FIXTURE / "tokenizer.json").read_text())
    lengths = {id: len(token) for token, id in content["model"]["vocab"].items()}
    lengths |= {token["id"]: len(token["content"].encode()) for token in content["added_tokens"]}
    return np.cumsum([0, 0, *(lengths[id] for id in tokens[1:-1].tolist())])


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("The capital of France?", " Paris."),
        ("The capital of France?", " Paris.<|im_end|>"),
        ("The capital of France? ", "the city"),  # " the" holds the prompt's last character
        ("日", "本語"),  # so does a token that holds parts of two characters
        ("你", "好"),
        ("é", "\u0301e"),
        ("<|im_start|>", "model"),
        ("one\n", "\n\ntwo"),
    ],
)
def test_strings_of_prompt_and_completion(chatml: Tokenizer, prompt: str, completion: str) -> None:
    sample = encode(plain(prompt, completion), chatml)
    text = "<s>" + prompt + completion.removesuffix("<|im_end|>") + "<|im_end|>"
    assert chatml.decode(sample.tokens.tolist()) == text
    expected = byte_starts(sample.tokens) >= len(prompt.encode())
    assert sample.loss_weights.tolist() == expected.tolist()
    everything = encode(plain(prompt, completion), chatml, "all")
    assert everything.loss_weights.tolist() == [0.0] + [1.0] * (len(everything.tokens) - 1)


def test_an_empty_prompt_trains_all_but_the_first_token(chatml: Tokenizer) -> None:
    sample = encode(plain("", "Paris"), chatml)
    assert trained(sample, chatml) == ["Paris<|im_end|>"]


def test_plain_text_needs_an_end_token(tmp_path: Path) -> None:
    hf = PreTrainedTokenizerFast(tokenizer_file=str(FIXTURE / "tokenizer.json"))
    with pytest.raises(UserError, match=r"t\.jsonl:3: .*has none; fix: set tokenizer\.eos_token"):
        encode_rows([Row("t.jsonl", 3, "text", text="a")], Tokenizer(hf, source="model"))


# ---- rows that cannot be trained on exactly -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "loss_on", "key", "reason"),
    [
        (chat(USER), "assistant", "messages", "has no assistant message"),
        (chat(USER, ANSWER, USER_2, prompt=2), "assistant", "completion", "has no assistant message"),
        (chat(USER), "last_assistant", "messages", "has no assistant message"),
        (chat(ANSWER, USER, ANSWER), "assistant", "messages[0]", "begins with the assistant: no prompt leads to this"),
        (chat(USER, {"role": "assistant", "content": ""}), "assistant", "messages[1].content", "is empty"),
        (chat(USER, {"role": "assistant", "content": " \n"}, prompt=1), "assistant", "completion[0].content", "is em"),
        (
            chat(USER, {"role": "assistant", "content": "a<|im_end|>b"}),
            "assistant",
            "messages[1].content",
            "holds the stop token '<|im_end|>'",
        ),
        (
            chat(USER, {"role": "assistant", "content": "\n\nParis"}),
            "assistant",
            "messages[1].content",
            "with the end of its prompt: the row has '\\n\\n\\n' where the model is fed '\\n' at inference; fix: no",
        ),
    ],
)
def test_refused_rows(chatml: Tokenizer, row: Row, loss_on: str, key: str, reason: str) -> None:
    bad = refused(row, chatml, loss_on)
    assert bad.key == key and reason in bad.reason


def test_untrained_turns_need_not_be_right(chatml: Tokenizer) -> None:
    """An empty or odd answer that is only context is rendered as it is."""
    odd = {"role": "assistant", "content": "\n\n<|im_end|>"}
    for first in (ANSWER, odd, {"role": "assistant", "content": ""}):
        sample = encode(chat(USER, first, USER_2, ANSWER_2), chatml, "last_assistant")
        assert trained(sample, chatml) == [ANSWER_2["content"] + "<|im_end|>"]
    assert trained(encode(chat(ANSWER, USER, ANSWER_2), chatml, "last_assistant"), chatml) == [
        ANSWER_2["content"] + "<|im_end|>"
    ]


def test_good_and_bad_rows_keep_their_order(chatml: Tokenizer) -> None:
    rows = [chat(*LONG), chat(USER), Row("t", 1, "text", text="Paris"), plain("a", " b"), chat(SYSTEM, USER, ANSWER)]
    together = encode_rows(rows * 500, chatml)
    assert len(together) == 2500 and encode_rows([], chatml) == []
    for i, result in enumerate(together):
        (alone,) = encode_rows([rows[i % 5]], chatml) if i < 5 else (together[i % 5],)
        assert type(result) is type(alone) is (BadRow if i % 5 == 1 else tuple)
        if isinstance(result, tuple) and isinstance(alone, tuple):
            np.testing.assert_array_equal(result[0].tokens, alone[0].tokens)
            np.testing.assert_array_equal(result[0].loss_weights, alone[0].loss_weights)
