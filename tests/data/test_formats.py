"""Records to canonical rows: every form by its columns and by name, what is refused, and whole files."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from posttrain.config import Format, SourceConfig
from posttrain.data.files import BadRow, Record, read_records
from posttrain.data.formats import COLUMNS, read_rows, to_rows
from posttrain.data.rows import Row
from posttrain.errors import UserError

SYSTEM = {"role": "system", "content": "Be short."}
USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
OTHER = {"role": "assistant", "content": "Go away"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def rows(value: Any, format: Format = "auto", **source: Any) -> list[Row]:
    made = to_rows(Record("f.jsonl", 7, value), SourceConfig(format=format, **source))
    assert all((r.file, r.line) == ("f.jsonl", 7) for r in made)
    assert not [str(r) for r in made if isinstance(r, BadRow)]
    return [r for r in made if isinstance(r, Row)]


def row(value: Any, format: Format = "auto", **source: Any) -> Row:
    (made,) = rows(value, format, **source)
    return made


def bad(value: Any, format: Format = "auto", **source: Any) -> BadRow:
    (made,) = to_rows(Record("f.jsonl", 7, value), SourceConfig(format=format, **source))
    assert isinstance(made, BadRow), made
    assert (made.file, made.line) == ("f.jsonl", 7)
    return made


def keys(made: Row) -> list[str]:
    return [made.message_key(i) for i in range(len(made.messages))]


def write(path: Path, values: list[Any]) -> str:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(path)


# ---- texts, conversations, prompts and completions ------------------------------------------------------------------


@pytest.mark.parametrize("format", ["auto", "messages"])
def test_messages(format: Format) -> None:
    tool = {"role": "tool", "content": "3", "name": "add", "tool_call_id": "x1"}
    messages = [{"role": "system", "content": ""}, {"role": "developer", "content": "d"}, USER, tool, ANSWER]
    made = row({"messages": messages, "id": 5, "source": {"a": 1}, "prompt": "unused"}, format)
    assert made == Row("f.jsonl", 7, "messages", messages=tuple(messages))
    assert keys(made) == [f"messages[{i}]" for i in range(5)]


@pytest.mark.parametrize("format", ["auto", "prompt_completion"])
def test_conversational_prompt_and_completion(format: Format) -> None:
    made = row({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}, format)
    assert made == Row("f.jsonl", 7, "prompt_completion", messages=(USER, ANSWER, USER, ANSWER), prompt_length=3)
    assert keys(made) == ["prompt[0]", "prompt[1]", "prompt[2]", "completion[0]"]


def test_a_system_column_beside_messages() -> None:
    made = row({"system": "Be brief.", "messages": [{"role": "user", "content": "Hi"}]})
    assert [m["role"] for m in made.messages] == ["system", "user"] and keys(made) == ["system", "messages[0]"]
    given = [{"role": "system", "content": "Be long."}, {"role": "user", "content": "Hi"}]
    assert bad({"system": "Be brief.", "messages": given}).reason.startswith("differs from messages[0]")


def test_a_single_message_is_no_text() -> None:
    refused = bad({"text": "Hi", "role": "prompter", "parent_id": None})
    assert refused.key == "text" and "one message of a conversation" in refused.reason


def test_strings() -> None:
    made = row({"prompt": "", "completion": " b"})
    assert made == Row("f.jsonl", 7, "prompt_completion", prompt="", completion=" b")
    assert row({"text": "some text"}) == Row("f.jsonl", 7, "text", text="some text")
    assert row({"text": "a", "messages": None, "label": None}).kind == "text"
    assert row({"prompt": "a", "answer": "b"}) == Row("f.jsonl", 7, "prompt", prompt="a")


def test_prompts() -> None:
    made = row({"prompt": [SYSTEM, USER], "ground_truth": "x", "label": 3})
    assert made == Row("f.jsonl", 7, "prompt", messages=(SYSTEM, USER), prompt_length=2)
    assert keys(made) == ["prompt[0]", "prompt[1]"]
    assert row({"prompt": "a", "completion": "b"}, "prompt").kind == "prompt"


@pytest.mark.parametrize("format", ["auto", "sharegpt"])
def test_sharegpt(format: Format) -> None:
    call = {"name": "add", "arguments": {"a": 1}}
    talk = [
        {"from": "human", "value": "Hi"},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "Hello"},
    ]
    called = {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]}
    expected = (USER, called, {"role": "tool", "content": "3"}, ANSWER)
    made = row({"conversations": talk, "tools": json.dumps([TOOL["function"]])}, format)
    assert made == Row("f.jsonl", 7, "messages", messages=expected, tools=(TOOL,), origin="conversations")
    assert keys(made)[1] == "conversations[1]"
    with_system = row({"conversations": talk[:1] + talk[3:], "system": "Be short."}, format)
    assert with_system.messages == (SYSTEM, USER, ANSWER)
    assert keys(with_system) == ["system", "conversations[0]", "conversations[1]"]
    own = [{"from": "system", "value": "Be short."}, *talk[:1], *talk[3:]]
    assert row({"conversations": own, "system": "Be short."}, format).messages == (SYSTEM, USER, ANSWER)
    assert bad({"conversations": own, "system": "Be long."}, format).reason.startswith("differs from conversations[0]")


def test_sharegpt_with_roles() -> None:
    talk = [{"role": "human", "content": "Hi"}, {"role": "gpt", "content": "Hello"}]
    assert row({"conversations": talk}).messages == (USER, ANSWER)
    assert bad({"messages": talk}).key == "messages[0].role"
    assert row({"messages": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}).messages == (
        USER,
        ANSWER,
    )


def test_stepwise_supervision() -> None:
    value = {"prompt": "2+2*3?", "completions": ["2*3=6", "2+6=9"], "labels": [True, False]}
    made = row(value)
    assert made == Row(
        "f.jsonl", 7, "stepwise_supervision", prompt="2+2*3?", completions=("2*3=6", "2+6=9"), labels=(True, False)
    )
    assert row(value, "stepwise_supervision", preference="chosen") == made
    assert bad({**value, "labels": [True]}).reason.startswith("has 1 labels for 2 steps")
    assert bad({**value, "labels": [1, 0]}).reason.startswith("must be a list of true and false")
    assert bad({**value, "completions": ["a", ""]}).key == "completions[1]"
    assert bad({**value, "completions": []}).key == "completions"


# ---- preference -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "origin", "places"),
    [
        ({"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]}, "chosen", ["prompt[0]", "chosen[0]"]),
        ({"prompt": [USER], "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, "chosen", ["prompt[0]", "chosen[1]"]),
        ({"prompt": "Hi", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, "chosen", ["chosen[0]", "chosen[1]"]),
        ({"chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, "chosen", ["chosen[0]", "chosen[1]"]),
        (
            {"chosen_messages": [USER, ANSWER], "rejected_messages": [USER, OTHER]},
            "chosen_messages",
            ["chosen_messages[0]", "chosen_messages[1]"],
        ),
        (
            {"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "Hello"}}
            | {"rejected": {"from": "gpt", "value": "Go away"}},
            "chosen",
            ["conversations[0]", "chosen"],
        ),
        ({"messages": [USER], "chosen": ANSWER, "rejected": OTHER}, "chosen", ["messages[0]", "chosen"]),
        ({"prompt": [USER], "chosen": ANSWER, "rejected": OTHER}, "chosen", ["prompt[0]", "chosen"]),
        (
            {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: Go away "},
            "chosen",
            ["chosen", "chosen"],
        ),
        ({"instruction": "Hi", "chosen": "Hello", "rejected": "Go away"}, "chosen", ["instruction", "chosen"]),
    ],
)
def test_every_spelling_of_a_pair(value: dict[str, Any], origin: str, places: list[str]) -> None:
    made = row({**value, "margin": 2, "id": 1})
    assert made == Row(
        *("f.jsonl", 7, "preference"),
        messages=(USER, ANSWER),
        prompt_length=1,
        rejected_messages=(USER, OTHER),
        margin=2.0,
        origin=origin,
        keys=tuple(places),
        rejected_keys=(places[0], places[1].replace("chosen", "rejected")),
    )
    assert keys(made) == places
    chosen = row(value, preference="chosen")
    assert (chosen.kind, chosen.messages, chosen.prompt_length) == ("prompt_completion", (USER, ANSWER), 1)
    assert (chosen.rejected_messages, chosen.rejected_keys, chosen.margin) == ((), (), None)
    assert keys(chosen) == places


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt_length"),
    [
        ([SYSTEM, USER, ANSWER, USER, ANSWER], [SYSTEM, USER, ANSWER, USER, OTHER], 4),
        ([USER, ANSWER, USER, ANSWER], [USER, OTHER, USER, OTHER], 1),
        ([USER, ANSWER], [USER, ANSWER, USER, ANSWER], 1),  # the shorter one keeps an answer
        ([USER, ANSWER, USER, ANSWER], [USER, ANSWER], 1),
        ([USER, ANSWER], [USER, ANSWER], 1),
    ],
)
def test_the_prompt_of_an_implicit_pair(chosen: list[Any], rejected: list[Any], prompt_length: int) -> None:
    made = row({"chosen": chosen, "rejected": rejected})
    assert made.messages == tuple(chosen) and made.rejected_messages == tuple(rejected)
    assert made.prompt_length == prompt_length


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Q: Why? A: Because.", "Q: Why? A: No.", "Q: Why? A:"),  # a space goes with the completion
        ("The sky is blue.", "The sky is green.", "The sky is"),
        ("one two", "one two three", "one tw"),  # neither completion is empty
        ("line\nyes", "line\nno", "line\n"),
    ],
)
def test_the_prompt_of_an_implicit_pair_of_strings(chosen: str, rejected: str, prompt: str) -> None:
    made = row({"chosen": chosen, "rejected": rejected})
    assert (made.kind, made.prompt, made.messages) == ("preference", prompt, ())
    assert (prompt + made.completion, prompt + made.rejected) == (chosen, rejected)
    assert made.completion and made.rejected


def test_a_pair_of_strings_with_a_prompt() -> None:
    made = row({"prompt": "a", "chosen": "b", "rejected": "c", "margin": 0.5})
    assert made == Row("f.jsonl", 7, "preference", prompt="a", completion="b", rejected="c", margin=0.5)
    made = row({"prompt": "a", "chosen": "b", "rejected": "c"}, preference="chosen")
    assert made == Row("f.jsonl", 7, "prompt_completion", prompt="a", completion="b")


def test_hh_with_a_prompt_has_to_be_named() -> None:
    value = {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Hello", "rejected": " Go away"}
    assert row(value).messages == ()
    made = row(value, "hh")
    assert (made.messages, made.rejected_messages) == ((USER, ANSWER), (USER, OTHER))


@pytest.mark.parametrize(
    ("value", "key", "reason"),
    [
        ({"chosen": [ANSWER], "rejected": [OTHER]}, "chosen", "chosen and rejected do not begin with the same message"),
        ({"chosen": [SYSTEM, ANSWER], "rejected": [USER, OTHER]}, "chosen", "chosen and rejected do not begin"),
        ({"chosen": "yes", "rejected": "no"}, "chosen", "chosen and rejected do not begin with the same text"),
        ({"chosen": " yes", "rejected": " no"}, "chosen", "chosen and rejected do not begin with the same text"),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"},
            "chosen",
            "chosen and rejected do not begin with the same message",
        ),
        ({"chosen": ANSWER, "rejected": OTHER}, "", "the pair has no prompt; fix: a column prompt"),
        ({"prompt": "a", "chosen": "", "rejected": "c"}, "chosen", "is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "rejected", "is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": [OTHER]}, "chosen", "must be a list of messages, not a string"),
        ({"prompt": [USER], "chosen": "b", "rejected": "c"}, "chosen", "must be a list of messages, not a string"),
        ({"prompt": "a", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, "prompt", "is a string and not what"),
        ({"prompt": [USER], "chosen": [], "rejected": [OTHER]}, "chosen", "has no messages"),
        ({"prompt": [USER], "chosen": 3, "rejected": [OTHER]}, "chosen", "must be a list of messages, not a number"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "1"}, "margin", "must be a finite number, not '1'"),
        (
            {"prompt": [USER], "chosen": [ANSWER], "rejected": [{**OTHER, "weight": 0.5}]},
            "rejected[0]",
            "weight 0.5 in a rejected answer is not served",
        ),
        (
            {"chosen": [{**USER, "weight": 0}, ANSWER], "rejected": [{**USER, "weight": 1}, OTHER]},
            "chosen",
            "chosen and rejected give their prompt different weights",
        ),
    ],
)
def test_bad_pairs(value: Any, key: str, reason: str) -> None:
    refused = bad(value)
    assert refused.key == key and refused.reason.startswith(reason)


@pytest.mark.parametrize(
    ("value", "prompt_length"),
    [
        ({"prompt": [USER], "completion": [ANSWER]}, 1),
        ({"messages": [USER, ANSWER]}, 1),
        ({"messages": [SYSTEM, USER, ANSWER, USER, ANSWER]}, 4),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, 1),
        ({"instruction": "Hi", "output": "Hello"}, 1),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": {}}]}, ANSWER, ANSWER]}, 1),
    ],
)
@pytest.mark.parametrize("label", [True, False])
def test_unpaired_preference(value: dict[str, Any], prompt_length: int, label: bool) -> None:
    made = row({**value, "label": label})
    assert (made.kind, made.label, made.prompt_length) == ("unpaired_preference", label, prompt_length)
    for_training = rows({**value, "label": label}, preference="chosen")
    assert [(r.kind, r.label, r.messages) for r in for_training] == (
        [("prompt_completion", None, made.messages)] if label else []
    )
    assert not for_training or keys(for_training[0]) == keys(made)


def test_unpaired_preference_in_strings() -> None:
    made = row({"prompt": "a", "completion": "b", "label": False})
    assert made == Row("f.jsonl", 7, "unpaired_preference", prompt="a", completion="b", label=False)


@pytest.mark.parametrize("label", [0, 1, "true", "science", [True]])
def test_a_label_is_true_or_false(label: Any) -> None:
    """1 and 0 could mean classes: what trains on unwanted answers has to be said exactly."""
    for value in (
        {"messages": [USER, ANSWER]},
        {"prompt": "a", "completion": "b"},
        {"instruction": "a", "output": "b"},
    ):
        refused = bad({**value, "label": label})
        assert refused.key == "label" and refused.reason.startswith("must be true or false")
    assert row({"messages": [USER, ANSWER], "label": label}, "messages").kind == "messages"
    assert row({"text": "a", "label": label}).kind == "text"


@pytest.mark.parametrize("messages", [[USER, ANSWER, USER], [ANSWER], [USER]])
def test_a_label_needs_an_answer_behind_a_prompt(messages: list[Any]) -> None:
    refused = bad({"messages": messages, "label": True})
    assert refused.key == f"messages[{len(messages) - 1}]" and "what the label judges" in refused.reason


def test_pairs_without_a_common_prefix_are_told_by_line(tmp_path: Path) -> None:
    pairs = [(f"\n\nHuman: {i}", f"\n\nHuman: {i if i not in (2, 5, 6, 9) else -i}") for i in range(12)]
    values = [{"chosen": f"{c}\n\nAssistant: yes", "rejected": f"{r}\n\nAssistant: no"} for c, r in pairs]
    found = list(read_rows(write(tmp_path / "pairs.jsonl", values)))
    assert [r.line for r in found] == list(range(1, 13))
    assert [r.line for r in found if isinstance(r, BadRow)] == [3, 6, 7, 10]


# ---- Alpaca ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["auto", "alpaca"])
def test_alpaca(format: Format) -> None:
    made = row({"instruction": "Add.", "input": "1 2", "output": "3"}, format)
    messages = ({"role": "user", "content": "Add.\n1 2"}, {"role": "assistant", "content": "3"})
    assert (made.kind, made.messages, made.prompt_length) == ("prompt_completion", messages, 1)
    assert keys(made) == ["instruction", "output"]
    for empty in ("", None):
        assert row({"instruction": "Hi", "input": empty, "output": "Hello"}, format).messages == (USER, ANSWER)


def test_alpaca_with_all_it_can_have() -> None:
    value = {"instruction": "Hi", "output": "Hello", "system": "Be short.", "history": [["One?", "Two."], ["3?", "4."]]}
    made = row({**value, "tools": [TOOL]})
    said = [(m["role"], m["content"]) for m in made.messages]
    assert said == [
        *(("system", "Be short."), ("user", "One?"), ("assistant", "Two."), ("user", "3?"), ("assistant", "4.")),
        *(("user", "Hi"), ("assistant", "Hello")),
    ]
    assert made.prompt_length == 6 and made.tools == (TOOL,)
    assert keys(made)[:3] == ["system", "history[0][0]", "history[0][1]"] and keys(made)[5:] == [
        "instruction",
        "output",
    ]


def test_self_instruct() -> None:
    instances = [{"input": "1 2", "output": "3"}, {"input": "", "output": "4"}]
    made = rows({"instruction": "Add.", "instances": instances, "is_classification": False})
    assert [[m["content"] for m in r.messages] for r in made] == [["Add.\n1 2", "3"], ["Add.", "4"]]
    assert keys(made[1]) == ["instruction", "instances[1].output"]
    refused = bad({"instruction": "Add.", "instances": [{"input": "1"}]})
    assert (refused.key, refused.reason) == ("instances[0].output", "must be a string, not null")


@pytest.mark.parametrize(
    ("value", "key", "reason"),
    [
        ({"instruction": "a", "output": ""}, "output", "is empty: there is nothing to train on"),
        ({"instruction": "a", "output": 3}, "output", "must be a string, not a number"),
        ({"instruction": "", "input": "", "output": "b"}, "instruction", "is empty, and so is the input"),
        ({"instruction": "a", "input": 3, "output": "b"}, "input", "must be a string, not a number"),
        ({"instruction": "a", "output": "b", "history": [["x"]]}, "history[0]", "must be a list of two strings"),
        ({"instruction": "a", "output": "b", "history": "x"}, "history", "must be a list of pairs, not a string"),
        ({"instruction": "a", "output": "b", "system": 1}, "system", "must be a string, not a number"),
        (
            {"instruction": "a", "output": "b", "chosen": "c", "rejected": "d"},
            "chosen",
            "the row has output and chosen",
        ),
        ({"instruction": "a", "instances": []}, "instances", "must be a list of objects"),
    ],
)
def test_bad_alpaca(value: Any, key: str, reason: str) -> None:
    refused = bad(value)
    assert refused.key == key and refused.reason.startswith(reason)


# ---- what stands beside ---------------------------------------------------------------------------------------------


def test_tools_and_template_kwargs() -> None:
    both = {"tools": [TOOL], "chat_template_kwargs": {"enable_thinking": False}}
    for value in (
        {"messages": [USER, ANSWER]},
        {"prompt": [USER], "completion": [ANSWER]},
        {"prompt": [USER]},
        {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        {"prompt": [USER], "completion": [ANSWER], "label": True},
    ):
        made = row({**value, **both})
        assert made.tools == (TOOL,) and made.template_kwargs == {"enable_thinking": False}
        in_text = {"functions": json.dumps([TOOL["function"]]), "chat_template_kwargs": '{"enable_thinking": false}'}
        assert row({**value, **in_text}) == made
    (refused,) = (bad({"messages": [USER, ANSWER], "tools": [TOOL], "functions": [TOOL]}),)
    assert refused.key == "functions" and refused.reason.startswith("the row has tools too")


@pytest.mark.parametrize("value", [{"text": "a"}, {"prompt": "a"}, {"prompt": "a", "completion": "b"}])
@pytest.mark.parametrize(
    "column", [{"tools": [TOOL]}, {"functions": '[{"name": "f"}]'}, {"chat_template_kwargs": {"a": 1}}]
)
def test_strings_are_not_rendered(value: dict[str, Any], column: dict[str, Any]) -> None:
    refused = bad({**value, **column})
    assert [refused.key] == list(column) and "a row of strings is not rendered" in refused.reason


@pytest.mark.parametrize("empty", [None, [], "", "[]"])
def test_columns_with_nothing_in_them_are_as_if_absent(empty: Any) -> None:
    assert row({"text": "a", "tools": empty, "images": []}) == row({"text": "a"})
    made = row({"messages": [USER, ANSWER], "tools": empty, "image": None, "documents": [], "chat_template_kwargs": {}})
    assert made == row({"messages": [USER, ANSWER]})


@pytest.mark.parametrize("column", ["images", "image", "audio", "videos"])
def test_media(column: str) -> None:
    for value in ({"messages": [USER, ANSWER]}, {"text": "a"}, {"prompt": "a", "completion": "b"}, {"other": 1}):
        refused = bad({**value, column: ["cat.png"]})
        assert refused.key == column and refused.reason.startswith("images, audio and video are not served; fix:")
    assert bad({"messages": [USER, ANSWER], "documents": [{"text": "a"}]}).key == "documents"


# ---- which form it is -----------------------------------------------------------------------------------------------


def test_a_named_format_decides_between_forms() -> None:
    both = {"messages": [USER, ANSWER], "text": "rendered"}
    assert bad(both).reason.startswith("the row is of several forms (messages, text); fix: set the source's format")
    assert row(both, "messages").kind == "messages"
    assert row(both, "text").kind == "text"
    ultrafeedback = {"prompt": "Hi", "messages": [USER, ANSWER], "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}
    assert "(preference, messages)" in bad(ultrafeedback).reason
    assert row(ultrafeedback, "preference").rejected_messages == (USER, OTHER)
    assert row(ultrafeedback, "messages").kind == "messages"


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ({"messages": [USER], "conversations": []}, "messages, sharegpt"),
        ({"messages": [USER], "prompt": "a", "completion": "b"}, "messages, prompt_completion"),
        ({"text": "a", "prompt": "a", "completion": "b"}, "text, prompt_completion"),
        ({"instruction": "a", "output": "b", "text": "c"}, "alpaca, text"),
        ({"prompt": "a", "completion": "b", "chosen": "c", "rejected": "d"}, "preference, prompt_completion"),
        (
            {"prompt": "a", "completion": "b", "completions": [], "labels": []},
            "prompt_completion, stepwise_supervision",
        ),
        ({"prompt": {"text": "a"}, "messages": []}, "messages, tree"),
    ],
)
def test_rows_of_several_forms(value: Any, found: str) -> None:
    assert bad(value).reason == f"the row is of several forms ({found}); fix: set the source's format to one of them"


def test_a_named_format_misses_its_columns() -> None:
    refused = bad({"prompt": "a", "text": "b"}, "prompt_completion")
    assert refused.key == "completion" and refused.reason.endswith("it has prompt, text; known: prompt + completion")
    refused = bad({"messages": [USER, ANSWER]}, "unpaired_preference")
    assert refused.key == "label"
    assert bad({"messages": [USER, ANSWER]}, "tree").key == "prompt"


def test_columns_by_other_names() -> None:
    renamed = {"prompt": "question", "completion": "answer"}
    made = row({"question": "a", "answer": "b", "prompt": "unused"}, columns=renamed)
    assert made == Row("f.jsonl", 7, "prompt_completion", prompt="a", completion="b")
    made = row({"question": [USER], "answer": [ANSWER]}, columns=renamed)
    assert made.messages == (USER, ANSWER) and keys(made) == ["question[0]", "answer[0]"]
    assert bad({"question": "a", "answer": ""}, columns=renamed).key == "answer"
    made = row({"talk": [USER, ANSWER]}, columns={"messages": "talk"})
    assert keys(made) == ["talk[0]", "talk[1]"]
    assert row(
        {"talk": [USER], "yes": ANSWER, "no": OTHER, "ok": 1},
        columns={"prompt": "talk", "chosen": "yes", "rejected": "no"},
    ).rejected_messages == (USER, OTHER)
    with_null = {"conversations": [{"from": "human", "value": "Hi"}], "persona": None}
    assert row(with_null, columns={"system": "persona"}).messages == (USER,)


def test_a_column_that_is_not_there() -> None:
    refused = bad({"question": "a", "answer": "b"}, columns={"prompt": "questions", "completion": "answer"})
    assert (refused.key, refused.reason) == (
        "questions",
        "the row has no such column, which the source's columns name for prompt; it has question, answer; "
        "did you mean 'question'?",
    )


def test_a_column_that_means_nothing() -> None:
    source = SourceConfig(path="data.jsonl", columns={"promt": "question"})
    with pytest.raises(UserError) as caught:
        to_rows(Record("data.jsonl", 1, {"question": "a"}), source)
    assert str(caught.value) == (
        "data.jsonl: columns: 'promt' is no column that means anything; did you mean 'prompt'?"
    )
    with pytest.raises(UserError, match="known: messages, conversations, prompt, completion, text, "):
        to_rows(Record("f", 1, {"x": "a"}), SourceConfig(columns={"xyz": "x"}))
    assert {"label", "margin", "system", "history", "input", "tools", "chat_template_kwargs"} < set(COLUMNS)


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "key", "reason"),
    [
        ([1], "", "a row is a JSON object, not a list"),
        ("text", "", "a row is a JSON object, not a string"),
        ({"text": 3}, "text", "must be a string, not a number"),
        ({"text": " \n"}, "text", "is empty: there is nothing to train on"),
        ({"text": "\udfff"}, "text", "has a lone surrogate"),
        ({"prompt": "a", "completion": ""}, "completion", "is empty: there is nothing to train on"),
        ({"prompt": "a\udc00", "completion": "b"}, "prompt", "has a lone surrogate"),
        (
            {"prompt": "a", "completion": [ANSWER]},
            "prompt",
            "must be a list of messages, not a string (prompt and completion: both",
        ),
        ({"prompt": [USER], "completion": "b"}, "completion", "must be a list of messages, not a string (prompt and"),
        ({"prompt": [], "completion": [ANSWER]}, "prompt", "has no messages"),
        ({"prompt": [USER], "completion": []}, "completion", "has no messages"),
        ({"prompt": 3}, "prompt", "must be a list of messages, not a number"),
        ({"question": "a"}, "", "the row has no known set of columns: it has question; known: messages | convers"),
        ({}, "", "the row has no known set of columns: it has none; known: "),
        ({"messages": [USER, ANSWER], "chat_template_kwargs": "[1]"}, "chat_template_kwargs", "must be an object of"),
    ],
)
def test_bad_values(value: Any, key: str, reason: str) -> None:
    refused = bad(value)
    assert refused.key == key and refused.reason.startswith(reason)


def test_one_bad_row_names_all_its_problems() -> None:
    messages = [
        {"role": "user", "content": [{"type": "image", "url": "x"}], "loss_weight": -1.0},
        {"role": "gpt", "weight": "1"},
    ]
    refused = bad({"messages": messages, "images": ["x"], "tools": "[{}]"})
    assert refused.key == "images"
    assert refused.reason.endswith(
        "(also: messages[0].content[0]: images, audio and video are not served; messages[0].content: missing or null; "
        "messages[0].loss_weight: must be a finite number, at least 0, not -1.0; and 4 more)"
    )


@pytest.mark.parametrize(
    "value", [{"\ud800": 1}, {"messages": [{**USER, "x": {"\ud800": "\ud800"}}]}, {"messages": [{"role": "\ud800"}]}]
)
def test_what_is_told_can_be_printed(value: Any) -> None:
    assert "\\ud800" in str(bad(value)).encode("utf-8").decode("utf-8")


def test_what_is_nested_too_deeply_is_told() -> None:
    deep: Any = "x"
    for _ in range(5000):
        deep = [deep]
    assert bad({"messages": [{**USER, "extra": deep}, ANSWER]}).reason.startswith("is nested too deeply")


# ---- whole files ----------------------------------------------------------------------------------------------------


def test_good_and_bad_rows_come_in_order(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = {"messages": [USER, ANSWER]}
    lines = [{"topic": "x"}, good, {"text": "a"}, {"messages": 1}, {"other": 2}]
    path.write_text("\n".join([*map(json.dumps, lines), "{", json.dumps(good)]))
    found = list(read_rows(str(path)))
    assert [(type(r) is Row, r.line) for r in found] == [
        *((False, 1), (True, 2), (True, 3), (False, 4)),
        *((False, 5), (False, 6), (True, 7)),
    ]
    assert all(r.file == str(path) for r in found)
    path.write_text("\n".join([json.dumps({"topic": "x"}), "{", json.dumps(good)]))
    assert [r.line for r in read_rows(str(path))] == [1, 2, 3]


@pytest.mark.parametrize("count", [1, 1500])
def test_a_file_of_something_else(tmp_path: Path, count: int) -> None:
    path = write(tmp_path / "songs.jsonl", [{"title": "a", "verses": []}] * count)
    with pytest.raises(UserError) as caught:
        list(read_rows(path))
    assert str(caught.value) == (
        f"{path}: no row of a known form in {min(count, 1000)} rows; the first, line 1: the row has no known set of "
        "columns: it has title, verses; known: messages | conversations | prompt + completion | text | instruction + "
        "output | chosen + rejected | prompt + completion + label | prompt + completions + scores | "
        "prompt + completions + labels | prompt"
    )
    with pytest.raises(UserError, match=r"line 1: heading: the row has no such column"):
        list(read_rows(path, SourceConfig(columns={"text": "heading"})))


def test_a_part_of_a_file_may_hold_nothing_known(tmp_path: Path) -> None:
    path = write(tmp_path / "mixed.jsonl", [{"title": "a"}, {"title": "b"}, {"text": "c"}])
    records = list(read_records(path))
    assert [r.line for r in read_rows(path, SourceConfig(), records[:2])] == [1, 2]
    assert list(read_rows(path, SourceConfig(), [])) == []


def test_rows_that_are_left_out_are_of_a_known_form(tmp_path: Path) -> None:
    path = write(tmp_path / "kto.jsonl", [{"prompt": "a", "completion": "b", "label": False}, {"id": 1}])
    found = list(read_rows(path, SourceConfig(preference="chosen")))
    assert [r.line for r in found] == [2]


@pytest.mark.parametrize("content", ["", "\n\n", "[]"])
def test_a_file_without_rows(tmp_path: Path, content: str) -> None:
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(UserError, match=r"rows\.json: the file holds no rows"):
        list(read_rows(str(tmp_path / "rows.json")))


def test_a_table_fills_objects_with_nulls(tmp_path: Path) -> None:
    """Parquet gives all objects of a column the same keys. What a row did not have is not read as null."""
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    other = {"id": "c2", "type": "function", "function": {"name": "say", "arguments": {"text": "x"}}}
    schemas = [
        {"name": "add", "parameters": {"properties": {"a": {"type": "integer"}}}},
        {"name": "say", "parameters": {"properties": {"text": {"type": "string"}}}},
    ]
    tools = [{"type": "function", "function": schema} for schema in schemas]
    values = [
        {"messages": [USER, {"role": "assistant", "tool_calls": [call, other]}], "tools": tools},
        {"messages": [USER, ANSWER], "tools": None},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), tmp_path / "rows.parquet")
    (raw,) = [r.value for r in read_records(str(tmp_path / "rows.parquet")) if isinstance(r, Record)][:1]
    assert raw["messages"][0]["tool_calls"] is None
    assert raw["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"a": 1, "text": None}
    first, second = read_rows(str(tmp_path / "rows.parquet"))
    assert isinstance(first, Row) and isinstance(second, Row)
    assert first.messages == tuple(values[0]["messages"]) and first.tools == tuple(tools)
    assert second.messages == (USER, ANSWER) and second.tools == ()


# ---- files as they are found ----------------------------------------------------------------------------------------


def plain(path: Path) -> list[Any]:
    """The rows of a JSON or JSON Lines file by the standard library alone."""
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.split("\n") if line]


def read(path: Path, **source: Any) -> list[Row]:
    found = list(read_rows(str(path), SourceConfig(path=str(path), **source)))
    assert not [str(r) for r in found if isinstance(r, BadRow)]
    return [r for r in found if isinstance(r, Row)]


FILES: list[tuple[str, int, str, dict[str, Any]]] = [
    ("data/llama-factory-demo/v1_sft_demo.jsonl", 500, "messages", {}),
    ("data/llama-factory-demo/alpaca_en_demo.json", 999, "prompt_completion", {}),
    ("data/llama-factory-demo/identity.json", 91, "prompt_completion", {}),
    ("data/llama-factory-demo/glaive_toolcall_en_demo.json", 300, "messages", {}),
    ("data/llama-factory-demo/reason_tool_use_demo_50.jsonl", 50, "messages", {}),
    ("data/llama-factory-demo/dpo_en_demo.json", 300, "preference", {}),
    ("data/llama-factory-demo/kto_en_demo.json", 300, "unpaired_preference", {}),
    ("data/llama-factory-demo/v1_dpo_demo.jsonl", 10, "preference", {}),
    ("data/fastchat/dummy_conversation.json", 500, "messages", {}),
    ("data/self-instruct/seed_tasks.jsonl", 175, "prompt_completion", {}),
    ("data/self-instruct/user_oriented_instructions.jsonl", 252, "prompt_completion", {}),
    ("data/self-instruct/seed_tasks.jsonl", 175, "prompt", {"columns": {"prompt": "instruction"}}),
    ("data/gsm8k/train.jsonl", 7473, "prompt_completion", {"columns": {"prompt": "question", "completion": "answer"}}),
    ("data/gsm8k/test.jsonl", 1319, "prompt_completion", {"columns": {"prompt": "question", "completion": "answer"}}),
    ("data/ifeval/input_data.jsonl", 541, "prompt", {}),
    ("bench/chat.jsonl", 512, "messages", {}),
    ("bench/pref.jsonl", 128, "preference", {}),
    ("bench/prompts.jsonl", 64, "prompt", {}),
]


@pytest.mark.acceptance
@pytest.mark.parametrize(("name", "count", "kind", "source"), FILES)
def test_real_files(shared: Path, name: str, count: int, kind: str, source: dict[str, Any]) -> None:
    made = read(shared / name, **source)
    assert len(plain(shared / name)) == len(made) == count
    assert {r.kind for r in made} == {kind}
    assert [r.line for r in made] == sorted({r.line for r in made})


@pytest.mark.acceptance
def test_real_parts_and_weights(shared: Path) -> None:
    path = shared / "data" / "llama-factory-demo" / "v1_sft_demo.jsonl"
    for value, made in zip(plain(path), read(path), strict=True):
        assert [m["content"] for m in made.messages] == [m["content"][0]["value"] for m in value["messages"]]
        assert list(made.weights) == [m["loss_weight"] for m in value["messages"]] == [0.0, 1.0]
        assert all(set(m) == {"role", "content"} for m in made.messages)


@pytest.mark.acceptance
def test_real_tools(shared: Path) -> None:
    path = shared / "data" / "llama-factory-demo" / "reason_tool_use_demo_50.jsonl"
    calls = reasoned = 0
    for value, made in zip(plain(path), read(path), strict=True):
        assert list(made.tools) == json.loads(value["tools"])
        for given, message in zip(value["messages"], made.messages, strict=True):
            parts = [(part["type"], part["value"]) for part in given["content"]]
            assert "".join(text for kind, text in parts if kind == "text") == message.get("content", "")
            assert "".join(text for kind, text in parts if kind == "reasoning") == message.get("reasoning_content", "")
            assert [json.loads(text) for kind, text in parts if kind == "tool_call"] == [
                call["function"] for call in message.get("tool_calls", [])
            ]
            calls += len(message.get("tool_calls", []))
            reasoned += "reasoning_content" in message
    assert (calls, reasoned) == (68, 112)

    path = shared / "data" / "llama-factory-demo" / "glaive_toolcall_en_demo.json"
    roles = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
    calls = 0
    for value, made in zip(plain(path), read(path), strict=True):
        assert [tool["function"] for tool in made.tools] == json.loads(value["tools"])
        for given, message in zip(value["conversations"], made.messages, strict=True):
            assert message["role"] == roles[given["from"]]
            if given["from"] == "function_call":
                calls += 1
                assert message["tool_calls"] == [{"type": "function", "function": json.loads(given["value"])}]
                assert set(message) == {"role", "tool_calls"}
            else:
                assert message == {"role": roles[given["from"]], "content": given["value"]}
    assert calls == 211


@pytest.mark.acceptance
def test_real_preference(shared: Path) -> None:
    path = shared / "data" / "llama-factory-demo" / "dpo_en_demo.json"
    for value, made in zip(plain(path), read(path), strict=True):
        before = [m["value"] for m in value["conversations"]]
        assert [m["content"] for m in made.messages] == [*before, value["chosen"]["value"]]
        assert [m["content"] for m in made.rejected_messages] == [*before, value["rejected"]["value"]]
        assert made.prompt_length == len(before)
    assert len(read(path, preference="chosen")) == 300

    path = shared / "data" / "llama-factory-demo" / "kto_en_demo.json"
    labels = [value["label"] for value in plain(path)]
    assert [r.label for r in read(path)] == labels
    chosen = read(path, preference="chosen")
    assert len(chosen) == sum(labels) == 150
    assert all(r.prompt_length == len(r.messages) - 1 for r in chosen)

    path = shared / "data" / "llama-factory-demo" / "v1_dpo_demo.jsonl"
    for value, made in zip(plain(path), read(path), strict=True):
        assert made.prompt_length == 2 and made.weights == (0.0, 0.0, 1.0)
        assert made.rejected_messages[2]["content"] == value["rejected_messages"][2]["content"][0]["value"]


@pytest.mark.acceptance
def test_real_instructions(shared: Path) -> None:
    path = shared / "data" / "llama-factory-demo" / "alpaca_en_demo.json"
    with_input = 0
    for value, made in zip(plain(path), read(path), strict=True):
        user, assistant = made.messages
        with_input += bool(value["input"])
        joined = value["instruction"] + ("\n" + value["input"] if value["input"] else "")
        assert (user["content"], assistant["content"]) == (joined, value["output"])
    assert with_input == 412
    path = shared / "data" / "self-instruct" / "user_oriented_instructions.jsonl"
    outputs = [instance["output"] for value in plain(path) for instance in value["instances"]]
    assert [r.messages[1]["content"] for r in read(path)] == outputs
