"""Rows to prompts: ids by the tokenizers library and hand-written ChatML; every bad row told with its place."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from posttrain.data.tokenizer import RenderError, Tokenizer
from posttrain.errors import UserError, UserErrors
from posttrain.rollout.prompts import MOST_PROBLEMS_SHOWN, encode_text, read_prompts, render_prompt

FIXTURE = Path(__file__).parent.parent / "fixtures" / "chat"
TOKENIZER = Tokenizer.load(str(FIXTURE), chat_template="chatml")
BACKEND = Backend.from_file(str(FIXTURE / "tokenizer.json"))
BOS = BACKEND.token_to_id("<s>")


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def read(path: str, **options: Any) -> list:
    return read_prompts(path, TOKENIZER, **{"vocab_size": TOKENIZER.vocab_size, "longest": 60, **options})


def ids(text: str) -> list[int]:
    return BACKEND.encode(text, add_special_tokens=False).ids


def test_each_kind_of_row_becomes_its_tokens(tmp_path: Path) -> None:
    talk = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Who are you?"}]
    path = write(
        tmp_path / "rows.jsonl",
        {"id": 7, "messages": talk, "label": "x", "chosen": None},
        {"prompt": "The capital of"},
        {"prompt": talk[1:], "tags": ["a"]},
        {"input_ids": [5, 6, 7]},
    )
    found = read(path)
    chat = "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n"
    assert [p.ids.tolist() for p in found] == [
        ids("<|im_start|>system\nBe short.<|im_end|>\n" + chat),
        [BOS, *ids("The capital of")],
        ids(chat),
        [5, 6, 7],
    ]
    assert [p.line for p in found] == [1, 2, 3, 4]
    assert found[0].columns == {"id": 7, "messages": talk, "label": "x", "chosen": None}


def test_tools_and_template_kwargs_are_rendered(tmp_path: Path) -> None:
    template = tmp_path / "tools.jinja"
    template.write_text(
        "{% for tool in tools or [] %}[{{ tool.function.name }}: {{ tool.function.description }}; "
        "{{ tool.function.parameters | tojson }}]{% endfor %}{{ style }}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = Tokenizer.load(str(FIXTURE), chat_template=str(template))
    user = {"role": "user", "content": "Hi"}
    function = {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}
    path = write(
        tmp_path / "rows.jsonl",
        {"messages": [user], "tools": [function], "chat_template_kwargs": {"style": "calm"}},
        {"prompt": [user], "tools": json.dumps([{"type": "function", "function": function}])},
        {"prompt": [user], "tools": []},
    )
    found = read_prompts(path, tokenizer, vocab_size=TOKENIZER.vocab_size, longest=300)
    tools, talk = '[add: Adds.; {"type": "object"}]', "<|im_start|>user\nHi<|im_end|><|im_start|>assistant\n"
    assert [p.ids.tolist() for p in found] == [ids(tools + "calm" + talk), ids(tools + talk), ids(talk)]


def test_tools_that_the_template_leaves_out_are_refused(tmp_path: Path) -> None:
    template = str(FIXTURE / "templates" / "only_user_and_assistant.jinja")
    tokenizer = Tokenizer.load(str(FIXTURE), chat_template=template)
    row = {"messages": [{"role": "user", "content": "Hi"}], "tools": [{"name": "add", "parameters": {}}]}
    with pytest.raises(UserErrors, match=r"rows.jsonl:1: messages: the chat template leaves out the tools"):
        read_prompts(write(tmp_path / "rows.jsonl", row), tokenizer, vocab_size=TOKENIZER.vocab_size, longest=60)


def test_a_text_gets_bos_but_no_eos() -> None:
    tokenizer = Tokenizer.load(str(FIXTURE), chat_template="chatml")
    stop = BACKEND.token_to_id("<|im_end|>")
    tokenizer._backend.post_processor = processors.TemplateProcessing(
        single="<s> $A <|im_end|>", special_tokens=[("<s>", BOS), ("<|im_end|>", stop)]
    )
    assert tokenizer.encode("Paris", add_special_tokens=True) == [BOS, *ids("Paris"), stop]
    assert encode_text(tokenizer, "Paris") == [BOS, *ids("Paris")]
    assert encode_text(TOKENIZER, "") == [BOS]


def test_every_bad_row_is_told_at_once(tmp_path: Path) -> None:
    user, assistant = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}
    cases: list[tuple[Any, str]] = [
        ("{broken", ": not valid JSON"),
        ([1, 2], ": a row needs exactly one of prompt, messages, input_ids; this one has none of them"),
        ({"question": "?"}, ": a row needs exactly one of prompt, messages, input_ids; this one has question"),
        ({"prompt": "a", "input_ids": [1]}, ": a row needs exactly one .* has prompt and input_ids"),
        ({"prompt": "a", "completion": "b"}, "completion: the answer is written under this name; fix: rename"),
        ({"messages": [user, assistant]}, r"messages\[1\].role: the conversation ends with the assistant"),
        ({"prompt": [user, assistant]}, r"prompt\[1\].role: the conversation ends with the assistant"),
        ({"messages": []}, "messages: has no messages"),
        ({"messages": "Hi"}, "messages: must be a list of messages"),
        ({"prompt": 3}, "prompt: must be a string or a list of messages"),
        ({"prompt": [{"role": "usr", "content": "Hi"}]}, r"prompt\[0\].role: unknown role 'usr'"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\].content: missing"),
        ({"messages": [user], "tools": [{"x": "f"}]}, r"tools\[0\]: has no function name"),
        ({"prompt": [user], "chat_template_kwargs": 1}, "chat_template_kwargs: must be an object"),
        (
            {"prompt": [user], "chat_template_kwargs": {"tools": 1}},
            "chat_template_kwargs.tools: is set by the rendering",
        ),
        ({"prompt": [user], "images": ["a"], "documents": ["x"]}, "documents: are not served as a column"),
        ({"input_ids": []}, "input_ids: has no tokens"),
        ({"input_ids": [1, True]}, "input_ids: must be a list of whole numbers"),
        ({"input_ids": [1, 5000]}, "input_ids: 5000 is outside the vocabulary"),
        ({"input_ids": list(range(61))}, "input_ids: has 61 tokens, and at most 60 leave room"),
        ({"prompt": "\ud800"}, "prompt: has a lone surrogate"),
        ({"prompt": "fine"}, ""),
    ]
    path = write(tmp_path / "rows.jsonl", *(row for row, _ in cases))
    with pytest.raises(UserErrors) as error:
        read(path, reserved=("completion", "finish_reason"))
    wrong = [(line, message) for line, (_, message) in enumerate(cases, 1) if message]
    assert len(error.value.problems) == len(wrong)
    for problem, (line, message) in zip(error.value.problems, wrong, strict=True):
        separator = "" if message.startswith(":") else ": "
        assert problem.startswith(f"{path}:{line}:"), problem
        assert re.match(re.escape(f"{path}:{line}") + separator + message, problem), problem


def test_many_bad_rows_are_counted(tmp_path: Path) -> None:
    with pytest.raises(UserErrors) as error:
        read(write(tmp_path / "rows.jsonl", *[{"x": 1}] * (MOST_PROBLEMS_SHOWN + 3)))
    assert len(error.value.problems) == MOST_PROBLEMS_SHOWN + 1
    assert error.value.problems[-1] == "and 3 rows more"


def test_an_empty_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no rows"):
        read(write(tmp_path / "rows.jsonl"))


def test_a_message_that_the_template_drops_is_refused() -> None:
    template = FIXTURE / "templates" / "only_user_and_assistant.jinja"
    tokenizer = Tokenizer.load(str(FIXTURE), chat_template=str(template))
    user = {"role": "user", "content": "Hi"}
    assert render_prompt(tokenizer, [user])
    with pytest.raises(RenderError, match="leaves out system messages"):
        render_prompt(tokenizer, [{"role": "system", "content": "Be short."}, user])
