"""Messages in any spelling to canonical ones (`Row.messages`), with the weight that each says of itself.

`formats.py` calls it for every column that holds messages. A message has `role` and `content`, or `from` and `value` as
in ShareGPT, whose names of roles are translated. Content comes as a string or in parts (text, reasoning, tool calls),
reasoning and tool calls also under their own keys. What could be read in two ways is refused: training on the wrong
reading would look fine.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.data.problems import Problems, is_empty, type_name
from posttrain.data.rows import ROLES
from posttrain.data.tools import read_calls

ALIASES: Mapping[str, str] = {
    **{role: role for role in ROLES},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "bot", "model", "chatgpt", "function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("observation", "function", "function_response", "tool_response", "ipython"), "tool"),
}
"""Roles by the names they have in ShareGPT files and message trees, in lower case."""

_CALL_ROLES = ("function_call", "tool_call")
"""ShareGPT's turns whose text is a tool call, or a list of them, in JSON."""

MEDIA = ("image", "images", "video", "videos", "audio", "audios")
NO_MEDIA = "images, audio and video are not served; fix: rows of text only"

_REASONING = ("reasoning_content", "thinking", "reasoning")
_CALLS = ("tool_calls", "function_call")
_FLAGS = ("train", "training", "trainable")
_NUMBERS = ("weight", "loss_weight", "loss", "loss_mask")
_LEAST, _MOST = 1e-30, 1e30
"""The weights that float32 can hold, and sum up."""
_DETAIL = "training on parts of a message is not served; fix: train or weight for the message as a whole"
_ROLE_FIX = "fix: one of " + ", ".join(ROLES)
_NO_CONTENT = "missing or null; fix: give the message's text"
_REFUSED = {
    "mask": "can be meant in two ways; fix: train: true or false",
    "train_detail": _DETAIL,
    "training_detail": _DETAIL,
    **dict.fromkeys(MEDIA, NO_MEDIA),
}
_COMMON = frozenset(("role", "content", "from", "value"))
_READ = _COMMON | frozenset((*_REASONING, *_CALLS, *_FLAGS, *_NUMBERS, *_REFUSED))
"""The keys that mean something here; all others are kept for the template."""

_PARTS: Mapping[str, int] = {"reasoning": 0, "thinking": 0, "text": 1, "tool_call": 2}
"""The types of content parts, and the order in which a canonical message holds them."""
_PART_VALUES = ("text", "value", "content", "thinking", "reasoning", "tool_call")
_MEDIA_PARTS = ("image", "video", "audio", "input_image", "input_audio", "image_url", "video_url", "audio_url", "file")


@dataclass(frozen=True, slots=True)
class Talk:
    """Messages and what belongs to each, in sequences of one length."""

    messages: tuple[dict[str, Any], ...] = ()
    weights: tuple[float | None, ...] = ()
    keys: tuple[str, ...] = ()
    """Where in the file each stands."""

    def __len__(self) -> int:
        return len(self.messages)

    def __add__(self, other: "Talk") -> "Talk":
        return Talk(self.messages + other.messages, self.weights + other.weights, self.keys + other.keys)

    def part(self, start: int, stop: int | None = None) -> "Talk":
        return Talk(self.messages[start:stop], self.weights[start:stop], self.keys[start:stop])


def read_talk(
    value: Any, key: str, problems: Problems, *, aliases: bool = False, nulls_fill: bool = False, other: str = ""
) -> Talk:
    """The messages of a list. `aliases`: `role` may have ShareGPT's names too. `nulls_fill`: see `tools.py`.

    `other` is said where it is no list at all. A malformed message adds to `problems` and is as good as it gets here.
    """
    if not isinstance(value, list):
        problems.add(key, f"must be a list of messages, not {type_name(value)}{other}")
        return Talk()
    if not value:
        problems.add(key, "has no messages")
    messages: list[dict[str, Any]] = []
    weights: list[float | None] = []
    for index, message in enumerate(value):
        plain = isinstance(message, dict) and len(message) == 2 and type(message.get("content")) is str
        if plain and type(role := message.get("role")) is str and role in ROLES:
            if not message["content"].isascii():
                problems.check_text(message["content"], f"{key}[{index}].content")
            messages.append(message)
            weights.append(None)
        else:
            made, weight = read_message(message, f"{key}[{index}]", problems, aliases=aliases, nulls_fill=nulls_fill)
            messages.append(made)
            weights.append(weight)
    return Talk(tuple(messages), tuple(weights), tuple([f"{key}[{i}]" for i in range(len(messages))]))


def read_message(
    value: Any, key: str, problems: Problems, *, aliases: bool = False, nulls_fill: bool = False
) -> tuple[dict[str, Any], float | None]:
    """(the canonical message, its weight). What is wrong with it is added to `problems`."""
    if not isinstance(value, dict):
        problems.add(key, f"must be an object with role and content, not {type_name(value)}")
        return {"role": "user", "content": ""}, None
    given = {name: item for name, item in value.items() if item is not None}
    role, is_call = _role(given, key, problems, aliases)
    name = "value" if "value" in given and "content" not in given else "content"
    if "value" in given and name == "content":
        problems.add(f"{key}.value", "the message has both content and value; fix: keep one")
    content = given.get(name)
    if isinstance(content, str) and not is_call and given.keys() <= _COMMON:
        problems.check_text(content, f"{key}.{name}")
        return {"role": role, "content": content}, None
    at = f"{key}.{name}"
    message = _with_content(role, content, at, given, key, is_call, problems, nulls_fill)
    for spelling, why in _REFUSED.items():
        if not is_empty(given.get(spelling)):
            problems.add(f"{key}.{spelling}", why)
    for spelling, item in given.items():
        if spelling not in _READ:
            problems.check_json(item, f"{key}.{spelling}")
            message[spelling] = item
    return message, _weight(given, key, problems)


def _with_content(
    role: str,
    content: Any,
    at: str,
    given: Mapping[str, Any],
    key: str,
    is_call: bool,
    problems: Problems,
    nulls_fill: bool,
) -> dict[str, Any]:
    """The canonical message as far as content, reasoning and tool calls go; `content` stands `at` this place."""
    reasoning: list[tuple[str, Any]] = []
    calls: list[tuple[str, list[dict[str, Any]]]] = []

    def take_calls(value: Any, place: str) -> None:
        before = len(problems)
        found = read_calls(value, place, problems, nulls_fill=nulls_fill)
        if found or len(problems) > before:
            calls.append((place, found))

    if is_call:
        take_calls(content, at)
        content = None
    elif isinstance(content, list):
        content, thoughts, made = _read_parts(content, at, problems, nulls_fill)
        reasoning += [(at, thoughts)] if thoughts else []
        calls += [(at, made)] if made is not None else []
    reasoning += [(f"{key}.{name}", given[name]) for name in _REASONING if not is_empty(given.get(name))]
    for name in _CALLS:
        if name in given:
            take_calls(given[name], f"{key}.{name}")
    message: dict[str, Any] = {"role": role}
    if isinstance(content, str):
        problems.check_text(content, at)
        message["content"] = content
    elif content is not None:
        problems.add(at, f"must be a string, not {type_name(content)}")
    elif not calls:
        problems.add(at, "holds no tool call; fix: JSON with name and arguments" if is_call else _NO_CONTENT)
    _put_reasoning(message, reasoning, problems)
    if isinstance(given.get("reasoning"), str) and given["reasoning"]:
        message["reasoning"] = given["reasoning"]  # some templates read this name only
    _put_calls(message, calls, problems)
    return message


def _role(given: Mapping[str, Any], key: str, problems: Problems, aliases: bool) -> tuple[str, bool]:
    """(the role, whether the turn's text is a tool call)."""
    if "from" in given and "role" in given:
        problems.add(f"{key}.from", "the message has both role and from; fix: keep one")
        return "user", False
    name = "from" if "from" in given else "role"
    role = given.get(name)
    if role is None:
        problems.add(f"{key}.role", f"missing or null; {_ROLE_FIX}")
        return "user", False
    alias = role.lower() if isinstance(role, str) else ""
    if aliases or name == "from":
        if alias in ALIASES:
            return ALIASES[alias], alias in _CALL_ROLES
        problems.add(f"{key}.{name}", f"unknown role {role!r}; fix: one of {', '.join(ALIASES)}")
        return "user", False
    if isinstance(role, str) and role in ROLES:
        return role, False
    near = None if role != alias else "assistant, with tool_calls" if alias in _CALL_ROLES else ALIASES.get(alias)
    problems.add(f"{key}.role", f"unknown role {role!r}; fix: {near or 'one of ' + ', '.join(ROLES)}")
    return "user", False


def says_something(message: Mapping[str, Any]) -> bool:
    """Whether a message has text, reasoning or tool calls."""
    said = (message.get(part) for part in ("content", "reasoning_content", "tool_calls"))
    return any(value.strip() if isinstance(value, str) else value for value in said)


# ---- content, reasoning and tool calls ------------------------------------------------------------------------------


def _read_parts(
    parts: Sequence[Any], key: str, problems: Problems, nulls_fill: bool
) -> tuple[str | None, str, list[dict[str, Any]] | None]:
    """(text, reasoning, tool calls) of content parts; None where there is no part of text, or of calls."""
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] | None = None
    reached = 0
    for index, part in enumerate(parts):
        at = f"{key}[{index}]"
        kind, value = _part(part, at, problems)
        if kind is None:
            continue
        if _PARTS[kind] < reached:
            problems.add(at, f"{kind} stands behind a later kind of part; fix: reasoning, then text, then tool calls")
        reached = max(reached, _PARTS[kind])
        if kind == "tool_call":
            calls = [*(calls or ()), *read_calls(value, at, problems, nulls_fill=nulls_fill)]
        elif not isinstance(value, str):
            problems.add(at, f"must hold a string, not {type_name(value)}")
        else:
            (texts if kind == "text" else thoughts).append(value)
    return "".join(texts) if texts else None, "".join(thoughts), calls


def _part(part: Any, key: str, problems: Problems) -> tuple[str | None, Any]:
    """(type, value) of a content part; no type, with a problem, where it is none that is served."""
    if not isinstance(part, dict):
        problems.add(key, f'must be a content part, not {type_name(part)}; fix: {{"type": "text", "text": ...}}')
        return None, None
    given = {name: item for name, item in part.items() if item is not None}
    kind = given.pop("type", None)
    if kind in _MEDIA_PARTS:
        problems.add(key, NO_MEDIA)
    elif not isinstance(kind, str) or kind not in _PARTS:
        problems.add(f"{key}.type", f"unknown type of content part {kind!r}; fix: one of {', '.join(_PARTS)}")
    elif len(given) != 1 or next(iter(given)) not in _PART_VALUES:
        problems.add(key, f"needs one of {', '.join(_PART_VALUES)} beside type; it has {', '.join(given) or 'none'}")
    else:
        return kind, next(iter(given.values()))
    return None, None


def _put_reasoning(message: dict[str, Any], found: Sequence[tuple[str, Any]], problems: Problems) -> None:
    """Sets `reasoning_content` from all places where the message has reasoning."""
    if not found:
        return
    (first, text), others = found[0], found[1:]
    if not isinstance(text, str):
        problems.add(first, f"must be a string, not {type_name(text)}")
        return
    for key, other in others:
        if other != text:
            problems.add(key, f"differs from {first}; fix: keep one of them")
    problems.check_text(text, first)
    message["reasoning_content"] = text


def _put_calls(message: dict[str, Any], found: Sequence[tuple[str, list[dict[str, Any]]]], problems: Problems) -> None:
    """Sets `tool_calls` from the one place where the message has them."""
    if not found:
        return
    (first, calls), others = found[0], found[1:]
    for key, other in others:
        if other != calls:
            problems.add(key, f"tool calls differ from those under {first}; fix: keep one of them")
    if calls and message["role"] != "assistant":
        problems.add(first, f"only the assistant calls tools, not the {message['role']}; fix: the role, or remove them")
    if calls:
        message["tool_calls"] = calls


# ---- weights --------------------------------------------------------------------------------------------------------


def _weight(given: Mapping[str, Any], key: str, problems: Problems) -> float | None:
    """What the message says of its own weight: a number, or a flag for 1 or 0."""
    flags = {name: given[name] for name in _FLAGS if name in given}
    numbers = {name: given[name] for name in _NUMBERS if name in given}
    for name, value in flags.items():
        if value not in (0, 1) or isinstance(value, str):
            problems.add(f"{key}.{name}", f"must be true or false, not {value!r}")
            return None
    for name, value in numbers.items():
        if isinstance(value, int | float) and (0 < value < _LEAST or _MOST < value < math.inf):
            problems.add(f"{key}.{name}", f"must be 0, or from {_LEAST:g} to {_MOST:g}, not {value!r}")
            return None
        if not isinstance(value, int | float) or not 0 <= value <= _MOST:
            problems.add(f"{key}.{name}", f"must be a finite number, at least 0, not {value!r}")
            return None
    said = {**numbers, **flags}
    if not said:
        return None
    first, value = next(iter(said.items()))
    for name, other in said.items():
        if (bool(other) != bool(value)) if name in flags or first in flags else other != value:
            problems.add(f"{key}.{name}", f"{other!r} contradicts {first} {value!r}; fix: keep one of them")
    return float(value)
