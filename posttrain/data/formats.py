"""Dataset files to canonical rows: the first stop of the data path.

A file is JSON Lines, a JSON list or Parquet, anywhere fsspec reaches. A row is a conversation (`messages`), a prompt
with its completion (strings or lists of messages), or a plain `text`. What this module does not know it refuses with
file, line and key; what means something that is not served yet (content parts, per-message weights, tools, preference
columns, ...) is refused too, for ignoring it would train on something else than the user wrote.
"""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from posttrain.data.files import BadRow, Record, read_records
from posttrain.errors import UserError

Kind = Literal["messages", "prompt_completion", "text"]

KINDS: Mapping[Kind, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
"""The kinds of row, each with the columns that make it."""

ROLES = ("system", "developer", "user", "assistant", "tool")

_ROLE_ALIASES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "function": "tool"}

_PREFERENCE = "preference data is not served yet; fix: give the wanted answers as messages or prompt and completion"
_MEDIA = "images, audio and video are not served yet; fix: rows of text only"
_TOOLS = "tool schemas are not served yet; fix: leave these rows out"
_UNSERVED_COLUMNS = {
    "tools": _TOOLS,
    "functions": _TOOLS,
    "documents": "documents are not served yet; fix: write them into a message",
    "chat_template_kwargs": "template arguments by row are not served yet; fix: leave these rows out",
    **dict.fromkeys(("chosen", "rejected", "label", "labels", "completions", "margin"), _PREFERENCE),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _MEDIA),
}

_WEIGHTS = "weights by message are not served yet; fix: remove the key, and choose what is trained with data.loss_on"
_REASONING = "reasoning is not served yet; fix: remove it, or write it into content as the model's template does"
_UNSERVED_MESSAGE_KEYS = {
    **dict.fromkeys(("weight", "loss_weight", "loss", "train", "trainable", "mask"), _WEIGHTS),
    **dict.fromkeys(("thinking", "reasoning_content", "reasoning"), _REASONING),
    **dict.fromkeys(("tool_calls", "function_call"), "tool calls are not served yet; fix: leave these rows out"),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _MEDIA),
}

_UNKNOWN_ROWS_HELD = 1000
"""A file that starts with so many rows of no known kind is taken for one of another format."""


@dataclass(frozen=True)
class Row:
    """One row in canonical form: a conversation in `messages`, or `prompt` and `completion`, or `text`."""

    file: str
    line: int
    """As in `Record`."""
    kind: Kind
    messages: tuple[dict[str, Any], ...] = ()
    """The whole conversation, of a prompt-completion row the prompt's messages first. Keys with null are left out."""
    prompt_length: int = 0
    """How many of `messages` are the prompt."""
    prompt: str = ""
    completion: str = ""
    text: str = ""

    def message_key(self, index: int) -> str:
        """Where in the file message `index` stands, e.g. `completion[0]`."""
        if self.kind == "messages":
            return f"messages[{index}]"
        inside_prompt = index < self.prompt_length
        return f"prompt[{index}]" if inside_prompt else f"completion[{index - self.prompt_length}]"


class _UnknownKind(BadRow):
    """A row with the columns of no known kind."""


def read_rows(path: str, format: str = "auto") -> Iterator[Row | BadRow]:
    """The rows of a file in order, with a BadRow in the place of each that cannot be used.

    `format` is one of `KINDS`, or `auto`: by each row's columns. Columns that mean nothing here (id, source, ...) are
    ignored. Raises UserError where the file cannot be read or holds no row of a known kind.
    """
    if format != "auto" and format not in KINDS:
        near = difflib.get_close_matches(format, KINDS, n=1)
        raise UserError(
            f"{path}: format {format!r} is unknown; known: auto, {', '.join(KINDS)}"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )
    count = 0
    recognized = False
    held: list[_UnknownKind] = []
    for record in read_records(path):
        count += 1
        row = record if isinstance(record, BadRow) else to_row(record, format)
        if isinstance(row, _UnknownKind) and not recognized:
            held.append(row)
            if len(held) == _UNKNOWN_ROWS_HELD:
                break
            continue
        if row is not record:
            recognized = True
            yield from held
            held.clear()
        yield row
    if count == 0:
        raise UserError(f"{path}: the file holds no rows")
    if held:
        raise UserError(f"{path}: no row of a known kind in {len(held)} rows; the first, {held[0].where}")


def to_row(record: Record, format: str) -> Row | BadRow:
    """The record in canonical form, or what is wrong with it; `format` as in `read_rows`."""
    if not isinstance(record.value, dict):
        return BadRow(record.file, record.line, "", f"a row is a JSON object, not {_type(record.value)}")
    columns = record.columns
    problems = [(k, why) for k, why in _UNSERVED_COLUMNS.items() if not _is_empty(columns.get(k))]
    kind = _kind(record, columns, format)
    if isinstance(kind, BadRow):
        return _bad_row(record, problems) if problems else kind
    if kind == "messages":
        messages = _messages(columns, "messages", problems)
        row = Row(record.file, record.line, kind, messages=messages)
    elif kind == "text":
        row = Row(record.file, record.line, kind, text=_string(columns, "text", problems))
    elif isinstance(columns["prompt"], str) and isinstance(columns["completion"], str):
        completion = _string(columns, "completion", problems)
        row = Row(record.file, record.line, kind, prompt=columns["prompt"], completion=completion)
        _check_encodable(row.prompt, "prompt", problems)
    else:
        prompt = _messages(columns, "prompt", problems)
        completion = _messages(columns, "completion", problems)
        row = Row(record.file, record.line, kind, messages=prompt + completion, prompt_length=len(prompt))
    return _bad_row(record, problems) if problems else row


def _kind(record: Record, columns: Mapping[str, Any], format: str) -> Kind | BadRow:
    wanted: list[Kind] = [kind for kind in KINDS if format in ("auto", kind)]
    found: list[Kind] = [kind for kind in wanted if all(name in columns for name in KINDS[kind])]
    if len(found) > 1:
        reason = f"the row is of several kinds ({', '.join(found)}); fix: set the source's format to one of them"
        return BadRow(record.file, record.line, "", reason)
    if found:
        return found[0]
    key = "" if format == "auto" else next(name for name in KINDS[wanted[0]] if name not in columns)
    known = " | ".join(" + ".join(KINDS[kind]) for kind in wanted)
    reason = f"the row has no known set of columns: it has {', '.join(columns) or 'none'}; known: {known}"
    return _UnknownKind(record.file, record.line, key, reason)


def _messages(columns: Mapping[str, Any], name: str, problems: list[tuple[str, str]]) -> tuple[dict[str, Any], ...]:
    value = columns[name]
    if not isinstance(value, list):
        other = " (prompt and completion: both strings or both lists)" if name != "messages" else ""
        problems.append((name, f"must be a list of messages, not {_type(value)}{other}"))
        return ()
    if not value:
        problems.append((name, "has no messages"))
    messages = []
    for index, message in enumerate(value):
        key = f"{name}[{index}]"
        if not isinstance(message, dict):
            problems.append((key, f"must be an object with role and content, not {_type(message)}"))
            continue
        message = {k: v for k, v in message.items() if v is not None}
        _check_message(message, key, problems)
        messages.append({k: v for k, v in message.items() if k not in _UNSERVED_MESSAGE_KEYS})
    return tuple(messages)


def _check_message(message: dict[str, Any], key: str, problems: list[tuple[str, str]]) -> None:
    role, content = message.get("role"), message.get("content")
    if role is None:
        problems.append((f"{key}.role", "missing or null; fix: one of " + ", ".join(ROLES)))
    elif role not in ROLES:
        near = _ROLE_ALIASES.get(role) if isinstance(role, str) else None
        problems.append((f"{key}.role", f"unknown role {role!r}; fix: " + (near or "one of " + ", ".join(ROLES))))
    if isinstance(content, str):
        _check_encodable(content, f"{key}.content", problems)
    elif content is None:
        problems.append((f"{key}.content", "missing or null; fix: give the message's text"))
    elif isinstance(content, list):
        problems.append((f"{key}.content", "a list of content parts is not served yet; fix: one string"))
    else:
        problems.append((f"{key}.content", f"must be a string, not {_type(content)}"))
    for name, why in _UNSERVED_MESSAGE_KEYS.items():
        if not _is_empty(message.get(name)):
            problems.append((f"{key}.{name}", why))


def _string(columns: Mapping[str, Any], name: str, problems: list[tuple[str, str]]) -> str:
    value = columns[name]
    if not isinstance(value, str):
        problems.append((name, f"must be a string, not {_type(value)}"))
        return ""
    if not value.strip():
        problems.append((name, "is empty: there is nothing to train on"))
    _check_encodable(value, name, problems)
    return value


def _check_encodable(text: str, key: str, problems: list[tuple[str, str]]) -> None:
    """JSON can escape half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        at = text[error.start]
        problems.append((key, f"has a lone surrogate {at!r} at character {error.start}; fix: remove it"))


def _bad_row(record: Record, problems: list[tuple[str, str]]) -> BadRow:
    """One BadRow for a row, however much is wrong with it: the first problem leads, the others are named."""
    (key, reason), others = problems[0], problems[1:]
    shown = "; ".join(f"{k}: {why.split('; fix:')[0]}" for k, why in others[:3])
    more = f"; and {len(others) - 3} more" if len(others) > 3 else ""
    return BadRow(record.file, record.line, key, reason + (f" (also: {shown}{more})" if others else ""))


def _is_empty(value: Any) -> bool:
    """Null, or an empty list, object or string: a key that is there and says nothing."""
    return value is None or (isinstance(value, list | dict | str) and not value)


def _type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
