"""Messages in any spelling to canonical ones: roles, content, reasoning, tool calls, weights; and what is refused."""

import json
from typing import Any

import pytest

from posttrain.data.messages import ALIASES, Talk, read_talk
from posttrain.data.problems import Problems
from posttrain.data.rows import ROLES

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2]}}}
BARE = {"name": "add", "arguments": {"a": 1, "b": [2]}}


def read(*messages: Any, **options: Any) -> Talk:
    problems = Problems()
    talk = read_talk(list(messages), "messages", problems, **options)
    assert problems == []
    return talk


def message(value: Any, **options: Any) -> dict[str, Any]:
    return read(value, **options).messages[0]


def weight(**values: Any) -> float | None:
    return read({"role": "assistant", "content": "a", **values}).weights[0]


def wrong(value: Any, **options: Any) -> list[tuple[str, str]]:
    problems = Problems()
    read_talk([value], "messages", problems, **options)
    return problems


# ---- roles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
def test_roles_are_kept(role: str) -> None:
    assert read({"role": role, "content": "é"}) == Talk(({"role": role, "content": "é"},), (None,), ("messages[0]",))


@pytest.mark.parametrize(
    ("alias", "role"),
    [
        *(("human", "user"), ("user", "user"), ("prompter", "user"), ("Human", "user")),
        *(("gpt", "assistant"), ("bot", "assistant"), ("model", "assistant"), ("assistant", "assistant")),
        *(("system", "system"), ("observation", "tool"), ("function", "tool"), ("tool", "tool")),
    ],
)
def test_sharegpt_roles(alias: str, role: str) -> None:
    assert message({"from": alias, "value": "a"}) == {"role": role, "content": "a"}
    assert message({"role": alias, "content": "a"}, aliases=True) == {"role": role, "content": "a"}
    assert message({"from": alias, "content": "a", "role": None}) == {"role": role, "content": "a"}


@pytest.mark.parametrize(
    ("role", "reason"),
    [
        (None, "missing or null; fix: one of system, developer, user, assistant, tool"),
        ("human", "unknown role 'human'; fix: user"),
        ("gpt", "unknown role 'gpt'; fix: assistant"),
        ("function", "unknown role 'function'; fix: tool"),
        ("function_call", "unknown role 'function_call'; fix: assistant, with tool_calls"),
        ("User", "unknown role 'User'; fix: one of system, developer, user, assistant, tool"),
        (["user"], "unknown role ['user']; fix: one of system, developer, user, assistant, tool"),
    ],
)
def test_other_roles_are_refused(role: Any, reason: str) -> None:
    assert wrong({"role": role, "content": "a"}) == [("messages[0].role", reason)]


def test_unknown_sharegpt_roles_are_refused() -> None:
    ((key, reason),) = wrong({"from": "narrator", "value": "a"})
    assert key == "messages[0].from" and reason == f"unknown role 'narrator'; fix: one of {', '.join(ALIASES)}"
    assert wrong({"from": "human", "role": "user", "content": "a"})[0][0] == "messages[0].from"
    assert wrong({"role": "user", "content": "a", "value": "b"})[0][0] == "messages[0].value"


# ---- content --------------------------------------------------------------------------------------------------------


def test_parts_become_content_reasoning_and_calls() -> None:
    for name, other in (("text", "thinking"), ("value", "value"), ("content", "content")):
        parts = [
            {"type": "reasoning", other: "One. "},
            {"type": "thinking", other: "Two."},
            {"type": "text", name: "Let me "},
            {"type": "text", name: "see."},
            {"type": "tool_call", "value": json.dumps(BARE)},
            {"type": "tool_call", "value": [BARE, CALL]},
        ]
        assert message({"role": "assistant", "content": parts}) == {
            "role": "assistant",
            "content": "Let me see.",
            "reasoning_content": "One. Two.",
            "tool_calls": [CALL, CALL, CALL],
        }
    nulls = {"type": "text", "text": "a", "image": None, "value": None}
    assert message({"role": "user", "content": [nulls]}) == {"role": "user", "content": "a"}
    assert message({"from": "human", "value": [nulls]}) == {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("parts", "key", "reason"),
    [
        ([{"type": "image", "image": "x"}], "[0]", "images, audio and video are not served"),
        ([{"type": "image_url", "image_url": {"url": "x"}}], "[0]", "images, audio and video are not served"),
        (["a"], "[0]", "must be a content part, not a string"),
        ([{"text": "a"}], "[0].type", "unknown type of content part None"),
        ([{"type": "tool_use", "name": "f"}], "[0].type", "unknown type of content part 'tool_use'"),
        ([{"type": "text"}], "[0]", "needs one of text, value, content"),
        ([{"type": "text", "text": "a", "value": "b"}], "[0]", "needs one of text, value, content"),
        ([{"type": "text", "text": "a", "weight": 0}], "[0]", "needs one of text, value, content"),
        ([{"type": "text", "text": 3}], "[0]", "must hold a string, not a number"),
        ([{"type": "text", "text": "a"}, {"type": "reasoning", "text": "b"}], "[1]", "reasoning stands behind a later"),
        ([{"type": "tool_call", "value": BARE}, {"type": "text", "text": "b"}], "[1]", "text stands behind a later"),
        ([{"type": "tool_call", "value": "{"}], "[0]", "is a string that holds no valid JSON"),
        ([{"type": "reasoning", "text": "b"}], "", "missing or null"),
        ([], "", "missing or null"),
    ],
)
def test_bad_parts(parts: list[Any], key: str, reason: str) -> None:
    first, why = wrong({"role": "assistant", "content": parts})[0]
    assert first == f"messages[0].content{key}" and why.startswith(reason)


@pytest.mark.parametrize(
    ("value", "key", "reason"),
    [
        ("Hi", "", "must be an object with role and content, not a string"),
        (None, "", "must be an object with role and content, not null"),
        ({"role": "user"}, ".content", "missing or null; fix: give the message's text"),
        ({"role": "assistant", "content": None}, ".content", "missing or null"),
        ({"role": "assistant", "content": None, "tool_calls": []}, ".content", "missing or null"),
        ({"role": "assistant", "reasoning_content": "Hm."}, ".content", "missing or null"),
        ({"role": "user", "content": 3}, ".content", "must be a string, not a number"),
        ({"role": "user", "content": True}, ".content", "must be a string, not a boolean"),
        ({"role": "tool", "content": {"a": 1}}, ".content", "must be a string, not an object"),
        ({"role": "user", "content": "a\ud800b"}, ".content", "has a lone surrogate '\\ud800' at character 1"),
        ({"role": "user", "content": "a", "name": "\udc00"}, ".name", "has a lone surrogate"),
        ({"role": "user", "content": "a", "x": [{"y": "\udc00"}]}, ".x[0].y", "has a lone surrogate"),
        ({"role": "assistant", "content": "a", "thinking": "\udc00"}, ".thinking", "has a lone surrogate"),
        ({"role": "assistant", "content": "a", "reasoning": ["b"]}, ".reasoning", "must be a string, not a list"),
        ({"role": "user", "content": "a", "images": ["b"]}, ".images", "images, audio and video are not served"),
    ],
)
def test_bad_messages(value: Any, key: str, reason: str) -> None:
    ((first, why),) = wrong(value)
    assert first == f"messages[0]{key}" and why.startswith(reason)


def test_what_is_unknown_is_kept_for_the_template() -> None:
    value = {"role": "tool", "content": "3", "tool_call_id": "x", "name": "add", "extra": {"a": None}, "none": None}
    assert message(value) == {
        **{"role": "tool", "content": "3", "tool_call_id": "x", "name": "add"},
        "extra": {"a": None},
    }


@pytest.mark.parametrize("name", ["thinking", "reasoning_content", "reasoning"])
def test_reasoning(name: str) -> None:
    # Under `reasoning` it stays too: some templates read that name only.
    expected = {"role": "assistant", "content": "a", "reasoning_content": "Hm."}
    expected |= {"reasoning": "Hm."} if name == "reasoning" else {}
    assert message({"role": "assistant", "content": "a", name: "Hm."}) == expected
    assert message({"role": "assistant", "content": "a", name: "Hm.", "thinking": "Hm."}) == expected
    assert message({"role": "assistant", "content": "a", name: ""}) == {"role": "assistant", "content": "a"}


def test_reasoning_that_differs_is_refused() -> None:
    value = {"role": "assistant", "content": "a", "thinking": "x", "reasoning": "y"}
    assert wrong(value) == [("messages[0].reasoning", "differs from messages[0].thinking; fix: keep one of them")]
    parts = [{"type": "reasoning", "text": "x"}, {"type": "text", "text": "a"}]
    ((key, _),) = wrong({"role": "assistant", "content": parts, "reasoning_content": "y"})
    assert key == "messages[0].reasoning_content"


# ---- tool calls -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "calls",
    [
        {"tool_calls": [CALL]},
        {"tool_calls": CALL},
        {"tool_calls": [BARE]},
        {"tool_calls": json.dumps([CALL])},
        {"tool_calls": json.dumps(BARE)},
        {"function_call": BARE},
        {"function_call": json.dumps(BARE)},
        {"tool_calls": [{"function": BARE, "type": None, "id": None}]},
        {"tool_calls": [CALL], "function_call": BARE},
    ],
)
def test_tool_calls(calls: dict[str, Any]) -> None:
    assert message({"role": "assistant", "content": None, **calls}) == {"role": "assistant", "tool_calls": [CALL]}
    with_text = message({"role": "assistant", "content": "", **calls})
    assert with_text == {"role": "assistant", "content": "", "tool_calls": [CALL]}


def test_sharegpt_function_calls() -> None:
    both = message({"from": "function_call", "value": json.dumps([BARE, CALL])})
    assert both == {"role": "assistant", "tool_calls": [CALL, CALL]}
    assert message({"from": "tool_call", "value": json.dumps(BARE)})["tool_calls"] == [CALL]
    ((key, reason),) = wrong({"from": "function_call", "value": "add(1)"})
    assert key == "messages[0].value" and reason.startswith("is a string that holds no valid JSON")
    ((_, reason),) = wrong({"from": "function_call", "value": "[]"})
    assert reason.startswith("holds no tool call")


def test_tool_calls_of_others_and_calls_that_differ_are_refused() -> None:
    ((key, reason),) = wrong({"role": "user", "content": "a", "tool_calls": [CALL]})
    assert key == "messages[0].tool_calls" and reason.startswith("only the assistant calls tools, not the user")
    ((key, reason),) = wrong({"role": "assistant", "tool_calls": [CALL], "function_call": {**BARE, "name": "f"}})
    assert key == "messages[0].function_call" and "differ from those under messages[0].tool_calls" in reason


# ---- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["weight", "loss_weight", "loss", "loss_mask"])
@pytest.mark.parametrize(("value", "expected"), [(0, 0.0), (1, 1.0), (0.25, 0.25), (2, 2.0), (True, 1.0), (False, 0.0)])
def test_weights(name: str, value: Any, expected: float) -> None:
    assert weight(**{name: value}) == expected and isinstance(weight(**{name: value}), float)
    assert message({"role": "user", "content": "a", name: value}) == {"role": "user", "content": "a"}


@pytest.mark.parametrize("name", ["train", "training", "trainable"])
@pytest.mark.parametrize("value", [True, False, 0, 1])
def test_flags(name: str, value: Any) -> None:
    assert weight(**{name: value}) == float(value)


def test_weights_that_agree() -> None:
    assert weight() is None and weight(weight=None, train=None) is None
    assert weight(weight=0.5, train=True) == 0.5
    assert weight(weight=0, train=False, loss=False) == 0.0
    assert weight(weight=1, loss_weight=1.0) == 1.0
    talk = read({"role": "user", "content": "a"}, {"role": "assistant", "content": "a", "train": True})
    assert talk.weights == (None, 1.0)


@pytest.mark.parametrize(
    ("values", "key", "reason"),
    [
        ({"train": False, "weight": 1}, "train", "False contradicts weight 1"),
        ({"train": True, "weight": 0.0}, "train", "True contradicts weight 0.0"),
        ({"weight": 1, "loss_weight": 0.5}, "loss_weight", "0.5 contradicts weight 1"),
        ({"train": True, "trainable": False}, "trainable", "False contradicts train True"),
        ({"train": "yes"}, "train", "must be true or false, not 'yes'"),
        ({"train": 0.5}, "train", "must be true or false, not 0.5"),
        ({"weight": "1"}, "weight", "must be a finite number, at least 0, not '1'"),
        ({"weight": -1}, "weight", "must be a finite number, at least 0, not -1"),
        ({"loss_weight": float("inf")}, "loss_weight", "must be a finite number"),
        ({"loss_weight": float("nan")}, "loss_weight", "must be a finite number"),
        ({"weight": 1e60}, "weight", "must be 0, or from 1e-30 to 1e+30, not 1e+60"),
        ({"weight": 1e-60}, "weight", "must be 0, or from 1e-30 to 1e+30, not 1e-60"),
        ({"weight": 10**400}, "weight", "must be 0, or from 1e-30 to 1e+30"),
        ({"mask": True}, "mask", "can be meant in two ways"),
        ({"mask": 0}, "mask", "can be meant in two ways"),
        ({"train_detail": [{"begin_offset": 0}]}, "train_detail", "training on parts of a message"),
    ],
)
def test_weights_that_are_refused(values: dict[str, Any], key: str, reason: str) -> None:
    ((first, why),) = wrong({"role": "assistant", "content": "a", **values})
    assert first == f"messages[0].{key}" and why.startswith(reason)


# ---- lists ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "reason"),
    [("Hi", "must be a list of messages, not a string"), ({}, "must be a list of messages, not an object")],
)
def test_what_is_no_list(value: Any, reason: str) -> None:
    problems = Problems()
    assert read_talk(value, "messages", problems) == Talk()
    assert problems == [("messages", reason)]


def test_every_problem_has_its_key() -> None:
    problems = Problems()
    talk = [{"role": "user", "content": "a"}, {"role": "x", "content": 1, "weight": -1}, 3]
    read_talk(talk, "chosen", problems)
    assert [key for key, _ in problems] == ["chosen[1].role", "chosen[1].content", "chosen[1].weight", "chosen[2]"]
    bad = problems.bad_row("f.jsonl", 3)
    assert (bad.file, bad.line, bad.key) == ("f.jsonl", 3, "chosen[1].role")
    assert bad.reason.endswith(
        "(also: chosen[1].content: must be a string, not a number; chosen[1].weight: must be a finite number, at least "
        "0, not -1; chosen[2]: must be an object with role and content, not a number)"
    )
