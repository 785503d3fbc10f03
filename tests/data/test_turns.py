"""Which text is trained under templates that do things: split conversations, tools, thinking, weights by message.

What `transformers` renders and would feed at inference is the reference, as in test_chat.py.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from posttrain.data.chat import encode_rows, template_marks
from posttrain.data.rows import Row
from posttrain.data.tokenizer import Tokenizer
from posttrain.data.turns import NOTE_PROMPT, NOTE_SPLIT, NOTE_STOP, NOTE_USER_END
from posttrain.errors import UserError
from tests.data.chat_cases import (
    ANSWER,
    ANSWER_2,
    FIXTURE,
    LONG,
    SYSTEM,
    TEMPLATES,
    USER,
    USER_2,
    chat,
    encode,
    encode_all,
    fed,
    load,
    refused,
    trained,
    with_template,
)


def test_thoughts_stripped_from_history_split_the_conversation() -> None:
    tokenizer = load("strips_thinking")
    thought = "<think>\n\n</think>\n\n"
    single = encode(chat(SYSTEM, USER, ANSWER), tokenizer)
    assert trained(single, tokenizer) == [thought + ANSWER["content"] + "<|im_end|>"]
    row = chat(*LONG)
    first, second = encode_all(row, tokenizer)
    assert trained(first, tokenizer) == [thought + ANSWER["content"] + "<|im_end|>"]
    assert trained(second, tokenizer) == [thought + ANSWER_2["content"] + "<|im_end|>"]
    assert first.tokens.tolist() == tokenizer._hf.apply_chat_template(list(LONG[:2]), return_dict=False)
    assert second.tokens.tolist() == tokenizer._hf.apply_chat_template(list(LONG), return_dict=False)
    for sample, turn in ((first, 1), (second, 3)):
        start = int(sample.loss_weights.argmax())
        assert sample.tokens[:start].tolist() == fed(row, turn, tokenizer)
    assert first.notes == (NOTE_SPLIT,) and second.notes == ()
    last = encode(row, tokenizer, "last_assistant")
    assert trained(last, tokenizer) == trained(second, tokenizer) and last.notes == ()
    assert trained(encode(chat(*LONG, prompt=3), tokenizer), tokenizer) == trained(last, tokenizer)
    bad = refused(chat(*LONG, prompt=1), tokenizer, "completion")
    assert bad.key == "completion[0]" and "differently once others follow" in bad.reason


def test_turns_that_agree_share_a_sample() -> None:
    """Of two turns behind one question (a call and what follows it) the template strips nothing."""
    tokenizer = load("strips_thinking")
    call = {"role": "assistant", "content": "Let me see."}
    row = chat(USER, ANSWER, USER_2, call, {"role": "tool", "content": "3"}, ANSWER_2)
    samples = encode_all(row, tokenizer)
    counts = [[text[-len("<|im_end|>") :] for text in trained(sample, tokenizer)] for sample in samples]
    assert sum(map(len, counts)) == 3  # each turn once, wherever
    for sample in samples:
        starts = np.flatnonzero(np.diff(sample.loss_weights, prepend=0) > 0).tolist()
        allowed = [fed(row, turn, tokenizer) for turn in (1, 3, 5)]
        assert all(sample.tokens[:start].tolist() in allowed for start in starts)


def test_a_generation_prompt_that_the_answer_does_not_continue() -> None:
    tokenizer = load("opens_thinking")
    bad = refused(chat(USER, ANSWER), tokenizer)
    assert bad.key == "messages[1]" and "does not begin as the chat template's generation prompt does" in bad.reason
    assert "'<think>\\n' against 'A small model" in bad.reason
    bad = refused(chat(USER, ANSWER, prompt=1), tokenizer, "completion")
    assert bad.key == "completion" and "does not continue the rendered prompt" in bad.reason
    thinking = {"role": "assistant", "content": "<think>\nHm.</think>Paris"}
    # The prompt opens the thinking; its mark is trained with the turn all the same.
    assert trained(encode(chat(USER, thinking), tokenizer), tokenizer) == ["<think>\nHm.</think>Paris<|im_end|>"]


CLOSES = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
<think>
</think>
{% endif %}"""


def test_a_generation_prompt_that_closes_the_thinking() -> None:
    """The template writes the closed thinking in the prompt only, so a turn is put behind the prompt itself."""
    tokenizer = with_template(CLOSES)
    row = chat(*LONG)
    samples = encode_all(row, tokenizer)
    assert [trained(sample, tokenizer) for sample in samples] == [
        [m["content"] + "<|im_end|>"] for m in (ANSWER, ANSWER_2)
    ]
    for sample, turn in zip(samples, (1, 3), strict=True):
        start = int(sample.loss_weights.argmax())
        assert sample.tokens[:start].tolist() == fed(row, turn, tokenizer)
    assert NOTE_PROMPT in samples[0].notes


SYSTEM_LAST = """{% for m in messages %}
{% if m.role == 'user' %}
{{ '<|im_start|>' + (messages[0].content + ' ' if loop.last and messages[0].role == 'system' else '') }}
{{- m.content }}<|im_end|>
{%- elif m.role == 'assistant' %}
{{ m.content }}<|im_end|>
{%- endif %}
{% endfor %}"""


def test_a_system_prompt_that_moves_to_the_last_question() -> None:
    tokenizer = with_template(SYSTEM_LAST)
    row = chat(SYSTEM, *LONG)
    samples = encode_all(row, tokenizer)
    assert [trained(sample, tokenizer) for sample in samples] == [
        [m["content"] + "<|im_end|>"] for m in (ANSWER, ANSWER_2)
    ]
    for sample, turn in zip(samples, (2, 4), strict=True):
        start = int(sample.loss_weights.argmax())
        assert sample.tokens[:start].tolist() == fed(row, turn, tokenizer)
        assert SYSTEM["content"] in tokenizer.decode(sample.tokens[:start].tolist())


MODES = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}<think>
{{ (m.reasoning_content or '') + '\n' }}</think>
{% endif %}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>
{% else %}<think>
{% endif %}{% endif %}"""


def test_a_turn_may_answer_in_either_mode_of_thinking() -> None:
    """Without thinking the row agrees, in tokens, only with the prompt of a caller who turns thinking off."""
    tokenizer = with_template(MODES)
    row = chat(USER, ANSWER)
    sample = encode(row, tokenizer)
    off = fed(row, 1, tokenizer, enable_thinking=False)
    assert sample.tokens[: len(off)].tolist() == off
    assert trained(sample, tokenizer) == ["<think>\n\n</think>\n" + ANSWER["content"] + "<|im_end|>"]
    thinks = chat(USER, {**ANSWER, "reasoning_content": "Hm."})
    sample = encode(thinks, tokenizer)
    on = fed(thinks, 1, tokenizer)
    assert sample.tokens[: len(on)].tolist() == on
    assert trained(sample, tokenizer) == ["<think>\nHm.\n</think>\n" + ANSWER["content"] + "<|im_end|>"]


@pytest.mark.parametrize("content", ["Paris", "Paris</think>", "Paris<|eot|>"])
def test_a_template_without_a_stop_token_gets_the_end_token(content: str) -> None:
    tokenizer = load("no_stop")
    row = chat(USER, {"role": "assistant", "content": content})
    sample = encode(row, tokenizer)
    assert trained(sample, tokenizer) == [content + "<|im_end|>"]
    assert sample.tokens[-1] == tokenizer.eos_id and sample.notes == (NOTE_STOP,)
    hf = tokenizer._hf.apply_chat_template(list(row.messages), tokenize=False)
    assert tokenizer.decode(sample.tokens.tolist()) == hf.rstrip() + "<|im_end|>"


def test_a_next_header_that_stops_generation_is_the_stop_token(tmp_path: Path) -> None:
    """GLM ends no turn; its generation_config.json says that the next one's header stops it."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((FIXTURE / name).read_bytes())
    template = (
        "{% for m in messages %}{{ '<|im_start|>' if m.role == 'user' else '<|end|>' }}{{ m.content }}{% endfor %}"
    )
    prompt = "{% if add_generation_prompt %}<|end|>{% endif %}"
    (tmp_path / "chat_template.jinja").write_text(template + prompt)
    stop = AutoTokenizer.from_pretrained(FIXTURE).convert_tokens_to_ids("<|im_start|>")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [stop]}))
    tokenizer = Tokenizer.load(str(tmp_path))
    sample = encode(chat(*LONG), tokenizer)
    assert trained(sample, tokenizer) == [ANSWER["content"] + "<|im_start|>", ANSWER_2["content"] + "<|im_end|>"]


def test_several_tokens_close_a_turn(tmp_path: Path) -> None:
    """The first that ends a generation is where the turn ends."""
    tokenizer = load("two_stops")
    assert trained(encode(chat(USER, ANSWER), tokenizer), tokenizer) == [ANSWER["content"] + "<|end|>\n<|im_end|>"]
    assert [trained(sample, tokenizer) for sample in encode_all(chat(*LONG), tokenizer)] == [
        [m["content"] + "<|end|>\n<|im_end|>"] for m in (ANSWER, ANSWER_2)
    ]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((FIXTURE / name).read_bytes())
    stops = [tokenizer.eos_id, *tokenizer.encode("<|end|>")]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    tokenizer = Tokenizer.load(str(tmp_path), chat_template=str(TEMPLATES / "two_stops.jinja"))
    expected = [m["content"] + "<|end|>" for m in (ANSWER, ANSWER_2)]
    assert trained(encode(chat(*LONG), tokenizer), tokenizer) == expected


def test_what_a_template_raises_is_the_reason() -> None:
    bad = refused(chat(USER, USER_2, ANSWER), load("alternates"))
    assert bad.key == "" and "Conversation roles must alternate user/assistant/user/assistant/..." in bad.reason
    assert "Only user and assistant roles" in refused(chat(SYSTEM, USER, ANSWER), load("instructions")).reason


def test_a_template_that_leaves_messages_out() -> None:
    tokenizer = load("only_user_and_assistant")
    for role in ("system", "developer", "tool"):
        # The content stands elsewhere in the conversation too: the role decides, not the text.
        row = chat(USER, {"role": role, "content": "model"}, ANSWER)
        bad = refused(row, tokenizer)
        assert bad.key == "messages[1].role" and f"leaves this message out (role '{role}')" in bad.reason
    assert refused(chat(USER, SYSTEM, ANSWER, prompt=1), tokenizer).key == "completion[0].role"
    encode(chat(*LONG), tokenizer)


def test_no_template_at_all() -> None:
    with pytest.raises(UserError, match="no chat template"):
        encode_rows([chat(*LONG)], load(None))


# ---- tools ----------------------------------------------------------------------------------------------------------

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Looks.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALLS = [
    {"type": "function", "function": {"name": "weather", "arguments": {"city": city}}} for city in ("Paris", "Bonn")
]
TOOL_TURNS = (
    USER,
    {"role": "assistant", "content": "", "tool_calls": CALLS},
    {"role": "tool", "content": "mild"},
    {"role": "tool", "content": "wet"},
    ANSWER,
)
TOOLS = """{% if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for call in m.tool_calls or [] %}[{{ call.function.name }} {{ ARGUMENTS }}]{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
AS_OBJECT = TOOLS.replace("ARGUMENTS", "call.function.arguments | tojson")
AS_TEXT = TOOLS.replace("ARGUMENTS", "'<' + call.function.arguments + '>'")


def tool_row(**changes: Any) -> Row:
    return Row("tools.jsonl", 4, "messages", messages=TOOL_TURNS, tools=(WEATHER,), **changes)


def test_tools_and_parallel_calls() -> None:
    tokenizer = with_template(AS_OBJECT)
    row = tool_row()
    sample = encode(row, tokenizer)
    calls = '[weather {"city": "Paris"}][weather {"city": "Bonn"}]<|im_end|>'
    assert trained(sample, tokenizer) == [calls, ANSWER["content"] + "<|im_end|>"]
    expected = tokenizer._hf.apply_chat_template(list(TOOL_TURNS), tools=[WEATHER], return_dict=False)
    assert sample.tokens.tolist() == expected
    starts = np.flatnonzero(np.diff(sample.loss_weights, prepend=0) > 0).tolist()
    assert [sample.tokens[:start].tolist() for start in starts] == [fed(row, turn, tokenizer) for turn in (1, 4)]


def with_arguments_as_text(turns: tuple[dict[str, Any], ...]) -> list[dict[str, Any]]:
    def text(call: dict[str, Any]) -> dict[str, Any]:
        return {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}

    return [{**m, "tool_calls": [text(c) for c in m["tool_calls"]]} if "tool_calls" in m else m for m in turns]


def test_arguments_take_the_form_that_the_template_can_write() -> None:
    """`transformers` fails on the one form and quotes the other twice; with the right one it agrees."""
    as_text = with_arguments_as_text(TOOL_TURNS)
    for template, right in ((AS_TEXT, as_text), (AS_OBJECT, list(TOOL_TURNS))):
        tokenizer = with_template(template)
        expected = tokenizer._hf.apply_chat_template(right, tools=[WEATHER], return_dict=False)
        for messages in (TOOL_TURNS, tuple(as_text)):
            row = Row("tools.jsonl", 4, "messages", messages=messages, tools=(WEATHER,))
            assert encode(row, tokenizer).tokens.tolist() == expected


PARTS = """{% for m in messages %}<|im_start|>{{ m.role }}
{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def test_content_takes_the_form_of_parts_where_the_template_reads_parts() -> None:
    tokenizer = with_template(PARTS)
    parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in LONG]
    sample = encode(chat(*LONG), tokenizer)
    assert sample.tokens.tolist() == tokenizer._hf.apply_chat_template(parts, return_dict=False)
    assert trained(sample, tokenizer) == [m["content"] + "<|im_end|>" for m in (ANSWER, ANSWER_2)]


PLAIN = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def test_what_a_template_leaves_out_of_a_turn() -> None:
    chatml = with_template(PLAIN)
    bad = refused(tool_row(), chatml)
    assert bad.key == "messages[1].tool_calls" and "leaves this part of the turn out" in bad.reason
    thinks = chat(USER, {**ANSWER, "reasoning_content": "Hm."})
    assert encode(thinks, chatml).notes == ("conversations with reasoning that the chat template leaves out",)
    untold = Row("tools.jsonl", 4, "messages", messages=(USER, ANSWER), tools=(WEATHER,))
    assert encode(untold, chatml).notes == ("conversations whose tools the chat template leaves out",)
    assert encode(chat(USER, ANSWER), chatml).notes == ()
    inline = {"role": "assistant", "content": "<think>Hm.</think>Paris"}
    strips = with_template(PLAIN.replace("m.content", "m.content.split('</think>')[-1]"))
    assert "leaves the thinking out" in refused(chat(USER, inline), strips).reason


# ---- weights and roles ----------------------------------------------------------------------------------------------


def weighted(*weights: float | None, **options: Any) -> Row:
    return Row("w.jsonl", 2, "messages", messages=LONG, weights=weights, **options)


def test_weights_by_message() -> None:
    chatml = load("chatml")
    plain = encode(chat(*LONG), chatml)
    ends = np.flatnonzero(plain.tokens == chatml.eos_id)
    for weights, expected in (
        ((None, 0.0, None, None), [0, 0, 0, 1]),
        ((0.0, 0.5, 0.0, 2.0), [0, 0.5, 0, 2]),
        ((None, None, 1.0, 0.0), [0, 1, 1, 0]),
        ((0.0, 0.0, 0.0, 0.0), [0, 0, 0, 0]),
    ):
        sample = encode(weighted(*weights), chatml)
        assert sample.tokens.tolist() == plain.tokens.tolist()
        assert sample.loss_weights[ends].tolist() == expected
    sample = encode(weighted(None, None, 1.0, 0.0), chatml, "last_assistant")
    assert sample.loss_weights[ends].tolist() == [0, 0, 1, 0]  # the weights win; what has none goes by loss_on
    for loss_on in ("all", "completion"):
        row = Row("w.jsonl", 2, "prompt_completion", messages=LONG, prompt_length=1, weights=(None, None, None, 1.0))
        assert "goes by no message" in refused(row, chatml, loss_on).reason


def test_roles() -> None:
    chatml = load("chatml")
    (sample,) = encode_all(chat(SYSTEM, *LONG), chatml, "user", "system")
    assert trained(sample, chatml) == [m["content"] + "<|im_end|>" for m in (SYSTEM, USER, USER_2)]
    (sample,) = encode_all(chat(SYSTEM, *LONG), chatml, "assistant", "user")
    assert trained(sample, chatml) == [m["content"] + "<|im_end|>" for m in LONG]
    (sample,) = encode_all(tool_row(), with_template(AS_OBJECT), "tool")
    assert trained(sample, chatml) == ["mild<|im_end|>", "wet<|im_end|>"]
    (sample,) = encode_all(chat(*LONG, prompt=2), load("trims_content"), "user")
    assert trained(sample, load("trims_content")) == [USER_2["content"].strip() + "<|eot|>"]
    assert refused(chat(USER, ANSWER), chatml, "tool").reason.startswith("has no tool message")


def test_a_conversation_that_ends_with_the_user() -> None:
    chatml = load("chatml")
    sample = encode(chat(*LONG, USER), chatml)
    assert trained(sample, chatml) == [m["content"] + "<|im_end|>" for m in (ANSWER, ANSWER_2)]
    assert sample.tokens.tolist() == chatml._hf.apply_chat_template([*LONG, USER], return_dict=False)
    assert sample.notes == (NOTE_USER_END,)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (Row("p.jsonl", 1, "preference", messages=LONG, rejected_messages=LONG), "the source's preference: chosen"),
        (Row("p.jsonl", 1, "preference", prompt="a", completion="b", rejected="c"), "the source's preference: chosen"),
        (Row("p.jsonl", 1, "unpaired_preference", messages=LONG, label=True), "the source's preference: chosen"),
        (Row("p.jsonl", 1, "prompt", messages=(USER,)), "no answer"),
        (Row("p.jsonl", 1, "prompt", prompt="a"), "no answer"),
        (Row("p.jsonl", 1, "stepwise_supervision", prompt="a"), "labelled steps"),
    ],
)
def test_kinds_that_are_not_trained_on(row: Row, reason: str) -> None:
    assert reason in refused(row, load("chatml")).reason


# ---- variables of the template --------------------------------------------------------------------------------------


def test_template_kwargs_of_the_tokenizer_and_of_the_row() -> None:
    hf = AutoTokenizer.from_pretrained(FIXTURE)
    hf.chat_template = "{{ mood }}" + (load("chatml").chat_template or "")
    tokenizer = Tokenizer(hf, source="fixture", chat_template_kwargs={"mood": "calm"})
    assert tokenizer.decode(encode(chat(*LONG), tokenizer).tokens.tolist()).startswith("calm<|im_start|>")
    row = Row("k.jsonl", 1, "messages", messages=LONG, template_kwargs={"mood": "wild"})
    assert tokenizer.decode(encode(row, tokenizer).tokens.tolist()).startswith("wild<|im_start|>")
    assert tokenizer.fingerprint != Tokenizer(hf, source="fixture").fingerprint
    reserved = Row("k.jsonl", 1, "messages", messages=LONG, template_kwargs={"messages": []})
    assert refused(reserved, tokenizer).key == "chat_template_kwargs.messages"
    with pytest.raises(UserError, match=r"tokenizer\.chat_template_kwargs: tools is set by the rendering"):
        Tokenizer(hf, source="fixture", chat_template_kwargs={"tools": []})


TURNS = (
    "{% if m.role == 'assistant' %}{% generation %}<|im_start|>assistant\n{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endif %}"
)


def test_marks_of_the_template() -> None:
    tokenizer = load("generation_marks")
    row = chat(*LONG)
    found = template_marks(row, tokenizer)
    assert found is not None
    marked = tokenizer._hf.apply_chat_template(list(LONG), return_dict=True, return_assistant_tokens_mask=True)
    assert found[0].tolist() == marked["input_ids"] and found[1].tolist() == [m == 1 for m in marked["assistant_masks"]]
    assert template_marks(row, with_template(PLAIN)) is None
    # A mark that begins in the generation prompt: that header is trained too.
    header = PLAIN.replace("<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>", TURNS)
    tokenizer = with_template(header)
    sample, marks = encode(row, tokenizer), template_marks(row, tokenizer)
    assert marks is not None and marks[1].any()
    assert (sample.loss_weights > 0).tolist() == marks[1].tolist()
    assert sample.tokens.tolist() == marks[0].tolist()
