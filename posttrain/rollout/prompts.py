"""Dataset rows to prompts: where a file of questions enters the engine.

A row is a `prompt` (a string, or the messages of a conversation), `messages`, or `input_ids`; other columns are kept
with it. A conversation is rendered, with the row's `tools` and `chat_template_kwargs`, up to the template's generation
prompt: what training taught the model to answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Int32

from posttrain.config import SourceConfig
from posttrain.data.files import BadRow, Record, read_records
from posttrain.data.formats import to_rows
from posttrain.data.template import RESERVED_KWARGS
from posttrain.data.tokenizer import RenderError, Tokenizer
from posttrain.errors import UserError, UserErrors

PROMPT_COLUMNS = ("prompt", "messages", "input_ids")

RENDERING_COLUMNS = ("tools", "functions", "documents", "chat_template_kwargs")
"""Columns that would change what a conversation is rendered to."""

_SOURCES = {"prompt": SourceConfig(format="prompt"), "messages": SourceConfig(format="messages")}
"""How `to_rows` reads a conversation in the column of this name."""

MOST_PROBLEMS_SHOWN = 50


@dataclass(frozen=True)
class Prompt:
    """What the model is to continue."""

    file: str
    line: int
    columns: Mapping[str, Any]
    """The whole row, as read."""
    ids: Int32[np.ndarray, "n"]


def read_prompts(
    path: str, tokenizer: Tokenizer, *, vocab_size: int, longest: int, reserved: tuple[str, ...] = ()
) -> list[Prompt]:
    """The prompts of a JSONL, JSON or Parquet file, in order.

    Raises `UserErrors` naming file, line and key of every row that cannot be used: malformed, longer than `longest`
    tokens, or with a column of a `reserved` name.
    """
    prompts, problems = [], []
    for record in read_records(path):
        try:
            prompts.append(_prompt(record, tokenizer, vocab_size, longest, reserved))
        except BadRow as bad:
            problems.append(str(bad))
    if problems:
        more = len(problems) - MOST_PROBLEMS_SHOWN
        raise UserErrors(problems[:MOST_PROBLEMS_SHOWN] + ([f"and {more} rows more"] if more > 0 else []))
    if not prompts:
        raise UserError(f"{path}: no rows")
    return prompts


def render_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    template_kwargs: Mapping[str, Any] = MappingProxyType({}),
) -> list[int]:
    """A conversation as the model sees it when it is its turn.

    Raises RenderError where the template refuses it, or would leave out a message or the tools.
    """
    for at, part in tokenizer.template(tools).left_out(messages, tools, template_kwargs):
        what = "the tools" if at < 0 else f"{messages[at]['role']} messages ({part})"
        raise RenderError(f"the chat template leaves out {what}, so the model would not see them")
    text = tokenizer.render(messages, tools=tools, template_kwargs=template_kwargs, add_generation_prompt=True)
    return tokenizer.encode(text)


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """A text to continue: with what the tokenizer puts before a text (BOS), without what it puts behind (EOS)."""
    body = tokenizer.encode(text)
    whole = tokenizer.encode(text, add_special_tokens=True)
    starts = [i for i in range(len(whole) - len(body) + 1) if whole[i : i + len(body)] == body]
    return whole[: starts[0] + len(body)] if starts and body else whole


def _prompt(
    record: Record | BadRow, tokenizer: Tokenizer, vocab_size: int, longest: int, reserved: tuple[str, ...]
) -> Prompt:
    if isinstance(record, BadRow):
        raise record
    columns = record.columns
    taken = [name for name in reserved if name in columns]
    if taken:
        raise _bad(record, taken[0], "the answer is written under this name; fix: rename the column")
    found = [name for name in PROMPT_COLUMNS if name in columns]
    if len(found) != 1:
        has = " and ".join(found) or ", ".join(columns) or "none of them"
        raise _bad(record, "", f"a row needs exactly one of {', '.join(PROMPT_COLUMNS)}; this one has {has}")
    key = found[0]
    value = columns[key]
    if key == "input_ids":
        ids = _checked_ids(record, value, vocab_size)
    elif key == "prompt" and isinstance(value, str):
        ids = _text_ids(record, value, tokenizer)
    elif key == "prompt" and not isinstance(value, list):
        raise _bad(record, key, "must be a string or a list of messages")
    else:
        ids = _conversation_ids(record, key, tokenizer)
    if not ids:
        raise _bad(record, key, "has no tokens, so there is nothing to continue; fix: give some text")
    if len(ids) > longest:
        raise _bad(
            record, key, f"has {len(ids)} tokens, and at most {longest} leave room for an answer; fix: shorten it"
        )
    return Prompt(record.file, record.line, record.value, np.asarray(ids, np.int32))


def _bad(record: Record, key: str, reason: str) -> BadRow:
    return BadRow(record.file, record.line, key, reason)


def _checked_ids(record: Record, ids: Any, vocab_size: int) -> list[int]:
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise _bad(record, "input_ids", "must be a list of whole numbers")
    outside = [i for i in ids if not 0 <= i < vocab_size]
    if outside:
        raise _bad(record, "input_ids", f"{outside[0]} is outside the vocabulary (0 to {vocab_size - 1})")
    return ids


def _text_ids(record: Record, text: str, tokenizer: Tokenizer) -> list[int]:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        reason = f"has a lone surrogate {text[error.start]!r} at character {error.start}; fix: remove it"
        raise _bad(record, "prompt", reason) from error
    return encode_text(tokenizer, text)


def _conversation_ids(record: Record, key: str, tokenizer: Tokenizer) -> list[int]:
    columns = record.columns
    relevant = {name: columns[name] for name in RENDERING_COLUMNS if name in columns}
    # In columns by their own names, so that what is wrong is told by them too.
    (row,) = to_rows(Record(record.file, record.line, {key: columns[key], **relevant}), _SOURCES[key])
    if isinstance(row, BadRow):
        raise row
    if reserved := sorted(set(row.template_kwargs) & set(RESERVED_KWARGS)):
        raise _bad(record, f"chat_template_kwargs.{reserved[0]}", "is set by the rendering; fix: remove it")
    if row.messages[-1]["role"] == "assistant":
        reason = "the conversation ends with the assistant, so it is not its turn; fix: remove the last message"
        raise _bad(record, f"{row.message_key(len(row.messages) - 1)}.role", reason)
    try:
        return render_prompt(tokenizer, row.messages, tools=row.tools, template_kwargs=row.template_kwargs)
    except RenderError as error:
        raise _bad(record, key, f"{error}; fix: the row, or another chat template") from error
