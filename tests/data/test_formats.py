"""Records to canonical rows: every known form, and a bad row with its key for all that is not served or not right."""

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.data.files import BadRow, Record
from posttrain.data.formats import KINDS, Row, read_rows, to_row
from posttrain.errors import UserError

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}


def row(value: Any, format: str = "auto") -> Row:
    made = to_row(Record("f.jsonl", 7, value), format)
    assert isinstance(made, Row), str(made)
    assert (made.file, made.line) == ("f.jsonl", 7)
    return made


def bad(value: Any, format: str = "auto") -> BadRow:
    made = to_row(Record("f.jsonl", 7, value), format)
    assert isinstance(made, BadRow), made
    assert (made.file, made.line) == ("f.jsonl", 7)
    return made


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(value) + "\n" for value in rows))
    return str(path)


# ---- what is served -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["auto", "messages"])
def test_messages(format: str) -> None:
    tool = {"role": "tool", "content": "3", "name": "add", "tool_call_id": "x1"}
    messages = [{"role": "system", "content": ""}, {"role": "developer", "content": "d"}, USER, tool, ANSWER]
    made = row({"messages": messages, "id": 5, "source": {"a": 1}, "prompt": "unused"}, format)
    assert made == Row("f.jsonl", 7, "messages", messages=tuple(messages))
    assert [made.message_key(i) for i in (0, 4)] == ["messages[0]", "messages[4]"]


@pytest.mark.parametrize("format", ["auto", "prompt_completion"])
def test_conversational_prompt_and_completion(format: str) -> None:
    made = row({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}, format)
    assert made.messages == (USER, ANSWER, USER, ANSWER) and made.prompt_length == 3
    assert [made.message_key(i) for i in (0, 2, 3)] == ["prompt[0]", "prompt[2]", "completion[0]"]


def test_strings() -> None:
    made = row({"prompt": "", "completion": " b"})
    assert (made.kind, made.prompt, made.completion, made.messages) == ("prompt_completion", "", " b", ())
    assert row({"text": "some text"}).text == "some text"
    assert row({"text": "a", "messages": None, "label": None}, "auto").kind == "text"


def test_keys_with_nothing_in_them_are_as_if_absent() -> None:
    empty = {"tool_calls": [], "weight": None, "reasoning_content": "", "name": None}
    made = row({"messages": [USER, {**ANSWER, **empty}], "tools": [], "images": None, "chat_template_kwargs": {}})
    assert made.messages == (USER, ANSWER)


def test_a_named_format_decides_between_kinds() -> None:
    both = {"messages": [USER, ANSWER], "text": "rendered"}
    assert bad(both).reason.startswith("the row is of several kinds (messages, text); fix: set the source's format")
    assert row(both, "messages").kind == "messages"
    assert row(both, "text").kind == "text"


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "column",
    ["tools", "chat_template_kwargs", "chosen", "rejected", "label", "images", "image", "documents", "completions"],
)
@pytest.mark.parametrize("value", [False, [0], {"a": 1}, "x"])
def test_unserved_columns(column: str, value: Any) -> None:
    for base in ({"messages": [USER, ANSWER]}, {"text": "a"}, {"prompt": "a", "completion": "b"}, {"other": 1}):
        refused = bad({**base, column: value})
        assert refused.key == column and "not served yet; fix:" in refused.reason


@pytest.mark.parametrize(
    "key",
    ["weight", "loss_weight", "train", "tool_calls", "thinking", "reasoning_content", "function_call", "images"],
)
def test_unserved_message_keys(key: str) -> None:
    refused = bad({"messages": [USER, {**ANSWER, key: 0}]})
    assert refused.key == f"messages[1].{key}" and "not served yet; fix:" in refused.reason
    assert bad({"prompt": [USER], "completion": [{**ANSWER, key: [1]}]}).key == f"completion[0].{key}"


@pytest.mark.parametrize(
    ("value", "key", "reason"),
    [
        ([1], "", "a row is a JSON object, not a list"),
        ("text", "", "a row is a JSON object, not a string"),
        ({"messages": "Hi"}, "messages", "must be a list of messages, not a string"),
        ({"messages": {}}, "messages", "must be a list of messages, not an object"),
        ({"messages": []}, "messages", "has no messages"),
        ({"messages": ["Hi"]}, "messages[0]", "must be an object with role and content, not a string"),
        ({"messages": [USER, {"content": "a"}]}, "messages[1].role", "missing or null"),
        ({"messages": [{"role": None, "content": "a"}]}, "messages[0].role", "missing or null"),
        ({"messages": [{"role": "human", "content": "a"}]}, "messages[0].role", "unknown role 'human'; fix: user"),
        ({"messages": [{"role": "User", "content": "a"}]}, "messages[0].role", "unknown role 'User'; fix: one of"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "messages[0].role", "unknown role ['user']"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing or null"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "messages[1].content", "missing or null"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "must be a string, not a number"),
        ({"messages": [{"role": "user", "content": True}]}, "messages[0].content", "must be a string, not a boolean"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
            "messages[0].content",
            "a list of content parts is not served yet",
        ),
        (
            {"messages": [{"role": "user", "content": "a\ud800b"}]},
            "messages[0].content",
            "has a lone surrogate '\\ud800' at character 1",
        ),
        ({"text": 3}, "text", "must be a string, not a number"),
        ({"text": " \n"}, "text", "is empty: there is nothing to train on"),
        ({"text": "\udfff"}, "text", "has a lone surrogate"),
        ({"prompt": "a", "completion": ""}, "completion", "is empty: there is nothing to train on"),
        ({"prompt": "a\udc00", "completion": "b"}, "prompt", "has a lone surrogate"),
        (
            {"prompt": "a", "completion": [ANSWER]},
            "prompt",
            "must be a list of messages, not a string (prompt and comp",
        ),
        ({"prompt": [USER], "completion": "b"}, "completion", "must be a list of messages, not a string (prompt and"),
        ({"prompt": [], "completion": [ANSWER]}, "prompt", "has no messages"),
        ({"prompt": [USER], "completion": []}, "completion", "has no messages"),
        (
            {"prompt": [USER]},
            "",
            "the row has no known set of columns: it has prompt; known: messages | prompt + compl",
        ),
        ({}, "", "the row has no known set of columns: it has none; known: "),
    ],
)
def test_bad_values(value: Any, key: str, reason: str) -> None:
    refused = bad(value)
    assert refused.key == key and refused.reason.startswith(reason)


def test_a_named_format_misses_its_columns() -> None:
    refused = bad({"prompt": "a", "text": "b"}, "prompt_completion")
    assert refused.key == "completion" and refused.reason.endswith("it has prompt, text; known: prompt + completion")


def test_one_bad_row_names_all_its_problems() -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "value": "hi"}], "loss_weight": 0.0},
        {"role": "gpt", "weight": 1},
    ]
    refused = bad({"messages": messages, "tools": "[{}]"})
    assert refused.key == "tools"
    assert refused.reason.endswith(
        "(also: messages[0].content: a list of content parts is not served yet; messages[0].loss_weight: weights by "
        "message are not served yet; messages[1].role: unknown role 'gpt'; and 2 more)"
    )


# ---- whole files ----------------------------------------------------------------------------------------------------


def test_good_and_bad_rows_come_in_order(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = {"messages": [USER, ANSWER]}
    lines = [{"instruction": "x"}, good, {"text": "a"}, {"messages": 1}, {"other": 2}]
    path.write_text("\n".join([*map(json.dumps, lines), "{", json.dumps(good)]))
    found = list(read_rows(str(path)))
    assert [(type(r) is Row, r.line) for r in found] == [
        *((False, 1), (True, 2), (True, 3), (False, 4)),
        *((False, 5), (False, 6), (True, 7)),
    ]
    assert all(r.file == str(path) for r in found)


@pytest.mark.parametrize("count", [1, 1500])
def test_a_file_of_another_format(tmp_path: Path, count: int) -> None:
    path = write(tmp_path / "alpaca.jsonl", [{"instruction": "a", "input": "", "output": "b"}] * count)
    with pytest.raises(UserError) as caught:
        list(read_rows(path))
    assert str(caught.value) == (
        f"{path}: no row of a known kind in {min(count, 1000)} rows; the first, line 1: the row has no known set of "
        "columns: it has instruction, input, output; known: messages | prompt + completion | text"
    )


def test_refused_rows_are_of_a_known_kind(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", [{"chosen": "a", "rejected": "b"}, {"id": 1}])
    assert [(r.key, r.line) for r in read_rows(path) if isinstance(r, BadRow)] == [("chosen", 1), ("", 2)]


@pytest.mark.parametrize("content", ["", "\n\n", "[]"])
def test_a_file_without_rows(tmp_path: Path, content: str) -> None:
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(UserError, match=r"rows\.json: the file holds no rows"):
        list(read_rows(str(tmp_path / "rows.json")))


def test_an_unknown_format_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"format 'message' is unknown; known: auto, messages.*mean 'messages'\?"):
        list(read_rows("any.jsonl", "message"))
    assert set(KINDS) == {"messages", "prompt_completion", "text"}


# ---- files as they are found ----------------------------------------------------------------------------------------


@pytest.mark.acceptance
@pytest.mark.parametrize(
    ("name", "line", "key", "reason"),
    [
        ("llama-factory-demo/v1_sft_demo.jsonl", 1, "messages[0].content", "a list of content parts is not served yet"),
        ("llama-factory-demo/kto_en_demo.json", 2, "label", "preference data is not served yet"),
        ("llama-factory-demo/dpo_en_demo.json", 2, "chosen", "preference data is not served yet"),
        ("llama-factory-demo/glaive_toolcall_en_demo.json", 2, "tools", "tool schemas are not served yet"),
        ("llama-factory-demo/reason_tool_use_demo_50.jsonl", 1, None, "not served yet"),
    ],
)
def test_real_files_that_are_not_served_yet(shared: Path, name: str, line: int, key: str | None, reason: str) -> None:
    path = str(shared / "data" / name)
    found = list(read_rows(path))
    assert found and all(isinstance(r, BadRow) for r in found)
    first = found[0]
    assert isinstance(first, BadRow) and first.file == path and first.line == line
    assert key in (None, first.key) and reason in first.reason


@pytest.mark.acceptance
@pytest.mark.parametrize(
    "name",
    [
        "llama-factory-demo/alpaca_en_demo.json",
        "llama-factory-demo/v1_dpo_demo.jsonl",
        "fastchat/dummy_conversation.json",
    ],
)
def test_real_files_of_other_formats(shared: Path, name: str) -> None:
    path = str(shared / "data" / name)
    with pytest.raises(UserError, match="no row of a known kind") as caught:
        list(read_rows(path))
    assert str(caught.value).startswith(path)


@pytest.mark.acceptance
def test_the_benchmark_files_are_read(shared: Path) -> None:
    found = list(read_rows(str(shared / "bench" / "chat.jsonl")))
    assert len(found) == 512 and all(isinstance(r, Row) for r in found)
    assert [r.line for r in found] == list(range(1, 513))
