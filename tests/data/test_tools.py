"""Tool schemas, tool calls and template arguments in any spelling, and what is refused of them."""

import json
from typing import Any

import pytest

from posttrain.data.problems import Problems
from posttrain.data.tools import read_calls, read_template_kwargs, read_tools

SCHEMA = {
    "name": "add",
    "description": "Adds.",
    "parameters": {"type": "object", "properties": {"a": {"default": None}}},
}
TOOL = {"type": "function", "function": SCHEMA}


def tools(value: Any, **options: Any) -> tuple[dict[str, Any], ...]:
    problems = Problems()
    made = read_tools(value, "tools", problems, **options)
    assert problems == []
    return made


def calls(value: Any, **options: Any) -> list[dict[str, Any]]:
    problems = Problems()
    made = read_calls(value, "calls", problems, **options)
    assert problems == []
    return made


@pytest.mark.parametrize(
    "value",
    [
        [TOOL],
        [SCHEMA],
        [{"function": SCHEMA}],
        [{"type": "function", **SCHEMA}],
        [json.dumps(TOOL)],
        json.dumps([TOOL]),
        json.dumps([SCHEMA]),
    ],
)
def test_tool_schemas(value: Any) -> None:
    assert tools(value) == (TOOL,)


@pytest.mark.parametrize("value", [None, [], "[]", "", " ", "null", {}])
def test_no_tools(value: Any) -> None:
    assert tools(value) == ()


def test_what_else_a_schema_has_is_kept() -> None:
    tool = {"type": "function", "function": {**SCHEMA, "strict": True}, "extra": 1}
    assert tools([tool]) == (tool,)


def test_keys_keep_their_order() -> None:
    """Templates write schemas and calls out as JSON, in this order."""
    schema = {"function": {"description": "d", "name": "f"}, "type": "function"}
    assert json.dumps(read_tools([schema], "tools", Problems())) == json.dumps([schema])
    call = {"id": "1", "function": {"arguments": {}, "name": "f"}, "type": "function"}
    assert json.dumps(read_calls([call], "tool_calls", Problems())) == json.dumps([call])


def test_nulls_of_tables() -> None:
    filled = {"type": "function", "function": {**SCHEMA, "strict": None}, "extra": None}
    bare = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {"a": {}}}}
    assert tools([filled], nulls_fill=True) == ({"type": "function", "function": bare},)
    assert tools([json.dumps(TOOL)], nulls_fill=True)[0]["function"]["name"] == "add"
    arguments = {"a": 1, "b": None, "c": [{"d": None}]}
    call = {"name": "add", "arguments": arguments}
    assert calls([call], nulls_fill=True)[0]["function"]["arguments"] == {"a": 1, "c": [{}]}
    assert calls([call])[0]["function"]["arguments"] == arguments
    as_text = {"name": "add", "arguments": json.dumps(arguments)}
    assert calls([as_text], nulls_fill=True)[0]["function"]["arguments"] == json.dumps(arguments)


@pytest.mark.parametrize(
    ("value", "key", "reason"),
    [
        ("[{", "tools", "is a string that holds no valid JSON"),
        ("add, subtract", "tools", "is a string that holds no valid JSON"),
        ('[{"name": "f", "x": NaN}]', "tools", "is a string that holds no valid JSON (NaN is no JSON value)"),
        ({"name": "f"}, "tools", "must be a list of JSON schemas, not an object"),
        (3, "tools", "must be a list of JSON schemas, not a number"),
        ([3], "tools[0]", "must be a JSON schema, not a number"),
        ([None], "tools[0]", "is null"),
        ([TOOL, {}], "tools[1]", "has no function name"),
        ([{"type": "function", "function": {}}], "tools[0]", "has no function name"),
        ([{"name": 3}], "tools[0]", "has no function name"),
        ([{"type": "function", "function": "f"}], "tools[0].function", "must be an object, not a string"),
        ([{"type": "web_search", "name": "f"}], "tools[0].type", "must be 'function', not 'web_search'"),
        ([{"name": "f", "parameters": ["a"]}], "tools[0]", "parameters must be a JSON schema, not a list"),
        ([{"name": "f", "description": "\ud800"}], "tools[0].function.description", "has a lone surrogate"),
        ('[{"name": "f", "description": "\\ud800"}]', "tools[0].function.description", "has a lone surrogate"),
        ([{"name": "f", "\ud800": 1}], "tools[0].function.'\\ud800'", "has a lone surrogate"),
    ],
)
def test_bad_tool_schemas(value: Any, key: str, reason: str) -> None:
    problems = Problems()
    read_tools(value, "tools", problems)
    ((first, why),) = problems
    assert first == key and why.startswith(reason)


def test_calls_keep_what_they_have() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a":  1}'}, "index": 0}
    assert calls([call]) == [call]
    assert calls({"id": "c1", "name": "add", "arguments": {"a": None}}) == [
        {"type": "function", "function": {"name": "add", "arguments": {"a": None}}, "id": "c1"}
    ]
    assert calls([{"name": "now"}]) == [{"type": "function", "function": {"name": "now", "arguments": {}}}]


@pytest.mark.parametrize(
    ("value", "key", "reason"),
    [
        ("add(1)", "calls", "is a string that holds no valid JSON"),
        (3, "calls", "must be a tool call or a list of them, not a number"),
        (["add"], "calls[0]", "must be an object, not a string"),
        ([{"arguments": {}}], "calls[0]", "has no function name"),
        ([{"name": "", "arguments": {}}], "calls[0]", "has no function name"),
        ([{"function": "add"}], "calls[0].function", "must be an object, not a string"),
        ([{"type": "custom", "name": "f"}], "calls[0].type", "must be 'function', not 'custom'"),
        ([{"name": "f", "parameters": {"a": 1}}], "calls[0]", "has 'parameters'; fix: call it arguments"),
        ([{"name": "f", "arguments": "a=1"}], "calls[0].arguments", "is a string that holds no valid JSON"),
        (
            [{"name": "f", "arguments": "[1]"}],
            "calls[0].arguments",
            "must be an object, not a string that holds a list",
        ),
        ([{"name": "f", "arguments": "null"}], "calls[0].arguments", "must be an object, not a string that holds null"),
        ([{"name": "f", "arguments": [1]}], "calls[0].arguments", "must be an object, not a list"),
        ([{"name": "f", "arguments": {"a": "\udc00"}}], "calls[0].function.arguments.a", "has a lone surrogate"),
        ([{"name": "f", "arguments": '{"a": "\\udc00"}'}], "calls[0].arguments.a", "has a lone surrogate"),
    ],
)
def test_bad_calls(value: Any, key: str, reason: str) -> None:
    problems = Problems()
    read_calls(value, "calls", problems)
    ((first, why),) = problems
    assert first == key and why.startswith(reason)


def test_template_kwargs() -> None:
    problems = Problems()
    for value in ({"enable_thinking": False, "x": None}, '{"enable_thinking": false, "x": null}'):
        assert read_template_kwargs(value, "k", problems) == {"enable_thinking": False, "x": None}
    filled = read_template_kwargs({"enable_thinking": False, "x": None}, "k", problems, nulls_fill=True)
    assert filled == {"enable_thinking": False}
    for empty in (None, {}, "", "{}"):
        assert read_template_kwargs(empty, "k", problems) == {}
    assert problems == []
    read_template_kwargs("true", "k", problems)
    read_template_kwargs({"a": "\ud800"}, "k", problems)
    assert [key for key, _ in problems] == ["k", "k.a"]
