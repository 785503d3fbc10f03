"""Which text is trained where a template or a row invites a mistake: short contents, text that looks like a stop token,
calls and thinking that a template would drop."""

from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from posttrain.data.rows import Row
from posttrain.data.tokenizer import Tokenizer
from posttrain.data.turns import NOTE_STOP
from tests.data.chat_cases import ANSWER, FIXTURE, USER, chat, encode, refused, trained, with_template

CALL = {"type": "function", "function": {"name": "clock", "arguments": {"city": "Paris"}}}
TOOL = {"type": "function", "function": {"name": "clock", "description": "What time it is.", "parameters": {}}}
CALLS: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "noon"}

PLAIN = """{% if tools %}<|im_start|>system
{{ tools | tojson }}<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
WITH_CALLS = PLAIN.replace(
    "{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls %}<call>{{ c.function | tojson }}</call>{% endfor %}"
)


@pytest.mark.parametrize("content", ["user", "clock", "What time", "m", "function"])
def test_content_that_also_stands_elsewhere(content: str) -> None:
    """In the header of its own turn, or in the tools that are written before it."""
    row = Row("k.jsonl", 1, "messages", messages=({"role": "user", "content": content}, ANSWER), tools=(TOOL,))
    tokenizer = with_template(PLAIN)
    assert trained(encode(row, tokenizer, "user"), tokenizer) == [content + "<|im_end|>"]


def test_ordinary_text_that_is_one_token_stops_nothing() -> None:
    """As GLM's turns that end with `</tool_call>`, which its tokenizer has as a token that is not special."""
    hf = AutoTokenizer.from_pretrained(FIXTURE)
    hf.add_tokens([AddedToken("</call>", special=False, normalized=False)])
    hf.chat_template = WITH_CALLS.replace("<|im_end|>\n{% endfor %}", "\n{% endfor %}")
    tokenizer = Tokenizer(hf, source="fixture")
    sample = encode(chat(USER, CALLS), tokenizer)
    call = '<call>{"name": "clock", "arguments": {"city": "Paris"}}</call>'
    assert trained(sample, tokenizer) == [call + "<|im_end|>"]
    assert sample.notes == (NOTE_STOP,)
    hf.add_tokens([AddedToken("</call>", special=True, normalized=False)])  # as Llama's <|eom_id|>
    tokenizer = Tokenizer(hf, source="fixture")
    assert trained(encode(chat(USER, CALLS), tokenizer), tokenizer) == [call]


def test_a_stop_token_in_arguments_is_refused() -> None:
    function = {"name": "clock", "arguments": {"city": "a<|im_end|>b"}}
    row = chat(USER, {**CALLS, "tool_calls": [{"type": "function", "function": function}]})
    bad = refused(row, with_template(WITH_CALLS))
    assert bad.key == "messages[1].tool_calls" and "holds the stop token" in bad.reason


@pytest.mark.parametrize("loss_on", ["assistant", "last_assistant", "all", "completion"])
def test_calls_that_a_template_never_writes_are_refused(loss_on: str) -> None:
    """Also those of a turn that is not trained: the answer to their result would be learned from nothing."""
    row = chat(USER, CALLS | {"content": "Let me see."}, RESULT, ANSWER, prompt=1)
    bad = refused(row, with_template(PLAIN), loss_on)
    assert bad.key == "completion[0].tool_calls" and "leaves this part of the turn out" in bad.reason
    assert encode(row, with_template(WITH_CALLS), loss_on).loss_weights.any()


@pytest.mark.parametrize("loss_on", ["assistant", "all", "completion"])
def test_thinking_that_a_template_drops_is_refused(loss_on: str) -> None:
    row = chat(USER, {"role": "assistant", "content": "<think>Hm.</think>Paris"}, prompt=1)
    bad = refused(row, with_template(PLAIN.replace("m.content", "m.content.split('</think>')[-1]")), loss_on)
    assert "leaves the thinking out" in bad.reason


def test_calls_without_content_under_a_template_that_needs_one() -> None:
    tokenizer = with_template(WITH_CALLS.replace("m.content", "m.content.strip()", 1))
    calls = {key: value for key, value in CALLS.items() if key != "content"}
    assert encode(chat(USER, calls), tokenizer).tokens.tolist() == encode(chat(USER, CALLS), tokenizer).tokens.tolist()
