"""Tool schemas, tool calls and template arguments in any spelling to the one that chat templates take.

Columns and message keys come as JSON values or as strings that hold JSON, since tables hold no lists of unlike objects.
`nulls_fill` says that the values come from a table (Parquet), whose objects all have the same keys, with null for those
that a row did not have. Those nulls are dropped at any depth; elsewhere a null in a schema or in arguments is meant.
"""

from typing import Any

from posttrain.data.problems import Problems, is_empty, type_name, without_nulls

SCHEMA_FIX = 'fix: {"type": "function", "function": {"name": ..., "description": ..., "parameters": ...}}'
CALL_FIX = 'fix: {"type": "function", "function": {"name": ..., "arguments": {...}}}'


def read_tools(value: Any, key: str, problems: Problems, *, nulls_fill: bool = False) -> tuple[dict[str, Any], ...]:
    """The JSON schemas of a `tools` column: `{"type": "function", "function": {"name": ..., ...}}` each."""
    value = _parsed(value, key, problems)
    if is_empty(value):
        return ()
    if not isinstance(value, list):
        problems.add(key, f"must be a list of JSON schemas, not {type_name(value)}; {SCHEMA_FIX}")
        return ()
    tools = [_schema(item, f"{key}[{index}]", problems, nulls_fill) for index, item in enumerate(value)]
    return tuple(tool for tool in tools if tool is not None)


def _schema(value: Any, key: str, problems: Problems, nulls_fill: bool) -> dict[str, Any] | None:
    value = _parsed(value, key, problems)
    if value is None:
        if not problems or problems[-1][0] != key:
            problems.add(key, f"is null; {SCHEMA_FIX}")
        return None
    if not isinstance(value, dict):
        problems.add(key, f"must be a JSON schema, not {type_name(value)}; {SCHEMA_FIX}")
        return None
    tool = without_nulls(value) if nulls_fill else {name: item for name, item in value.items() if item is not None}
    kind, function = tool.get("type", "function"), tool.get("function")
    if kind != "function":
        problems.add(f"{key}.type", f"must be 'function', not {kind!r}; {SCHEMA_FIX}")
        return None
    if function is None:  # the schema of the function itself
        function = {name: item for name, item in tool.items() if name != "type"}
        tool = {"type": "function", "function": function}
    elif not isinstance(function, dict):
        problems.add(f"{key}.function", f"must be an object, not {type_name(function)}; {SCHEMA_FIX}")
        return None
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not name:
        problems.add(key, f"has no function name; {SCHEMA_FIX}")
    if not isinstance(parameters, dict | None):
        problems.add(key, f"parameters must be a JSON schema, not {type_name(parameters)}; {SCHEMA_FIX}")
    problems.check_json(tool, key)
    return tool if "type" in tool else {"type": "function", **tool}  # templates write the keys in their order


def read_calls(value: Any, key: str, problems: Problems, *, nulls_fill: bool = False) -> list[dict[str, Any]]:
    """The tool calls of a message: a list of calls or one call, each as the API has it or only `name`, `arguments`."""
    value = _parsed(value, key, problems)
    if is_empty(value):
        return []
    if isinstance(value, dict):
        calls = [_call(value, key, problems, nulls_fill)]
    elif isinstance(value, list):
        calls = [_call(item, f"{key}[{index}]", problems, nulls_fill) for index, item in enumerate(value)]
    else:
        problems.add(key, f"must be a tool call or a list of them, not {type_name(value)}; {CALL_FIX}")
        calls = []
    return [call for call in calls if call is not None]


def _call(value: Any, key: str, problems: Problems, nulls_fill: bool) -> dict[str, Any] | None:
    if not isinstance(value, dict):
        problems.add(key, f"must be an object, not {type_name(value)}; {CALL_FIX}")
        return None
    call = {name: item for name, item in value.items() if item is not None}
    kind, function = call.get("type", "function"), call.get("function")
    if kind != "function":
        problems.add(f"{key}.type", f"must be 'function', not {kind!r}; {CALL_FIX}")
    if function is None:
        function = {name: call.pop(name) for name in ("name", "arguments") if name in call}
    elif not isinstance(function, dict):
        problems.add(f"{key}.function", f"must be an object, not {type_name(function)}; {CALL_FIX}")
        return None
    function = {name: item for name, item in function.items() if item is not None}
    if not isinstance(function.get("name"), str) or not function["name"]:
        problems.add(key, f"has no function name; {CALL_FIX}")
    for misnamed in ("parameters", "input", "args"):
        if misnamed in function or misnamed in call:
            problems.add(key, f"has {misnamed!r}; fix: call it arguments")
    function["arguments"] = _arguments(function.get("arguments", {}), f"{key}.arguments", problems, nulls_fill)
    made = {"type": "function", **call} if "type" not in call else call
    made["function"] = function
    problems.check_json(made, key)
    return made


def _arguments(value: Any, key: str, problems: Problems, nulls_fill: bool) -> Any:
    """An object, or a string that holds one; either is kept as it is, for templates render them differently."""
    parsed = problems.parse_json(value, key) if isinstance(value, str) else value
    if isinstance(value, str):
        problems.check_json(parsed, key)
    if not isinstance(parsed, dict):
        if not problems or problems[-1][0] != key:
            holds = "a string that holds " if isinstance(value, str) else ""
            problems.add(key, f"must be an object, not {holds}{type_name(parsed)}; fix: {{name: value, ...}}")
        return {}
    return without_nulls(value) if nulls_fill and isinstance(value, dict) else value


def read_template_kwargs(value: Any, key: str, problems: Problems, *, nulls_fill: bool = False) -> dict[str, Any]:
    """The variables for the chat template of a `chat_template_kwargs` column."""
    value = _parsed(value, key, problems)
    if is_empty(value):
        return {}
    if not isinstance(value, dict):
        problems.add(key, f"must be an object of template variables, not {type_name(value)}; fix: {{name: value}}")
        return {}
    problems.check_json(value, key)
    return without_nulls(value) if nulls_fill else value


def _parsed(value: Any, key: str, problems: Problems) -> Any:
    """The value, read out of a string that holds JSON; an empty string is null."""
    if not isinstance(value, str):
        return value
    return problems.parse_json(value, key) if value.strip() else None
