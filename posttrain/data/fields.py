"""The columns of one record while a row is made of them: what the readers of all forms share.

Under `forms.py`, `pair_forms.py` and `rankings.py`, which hold the readers. What is wrong with a record is added to
`Fields.problems`, what is not used of it to `Fields.left_out`.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from posttrain.config import SourceConfig
from posttrain.data.files import PARQUET_SUFFIX, Record
from posttrain.data.messages import Talk, read_message, read_talk
from posttrain.data.problems import Problems, is_empty, type_name
from posttrain.data.rows import Kind, Row
from posttrain.data.tools import read_template_kwargs, read_tools

_DOCUMENTS = "are not served as a column; fix: write them into a message"
_MESSAGE_COLUMNS = frozenset(
    ("messages", "conversations", "prompt", "completion", "chosen", "rejected", "completions", "scores", "ranks")
)
"""Columns that say nothing of how a conversation is rendered."""


@dataclass(frozen=True, slots=True)
class Fields:
    """A record's columns while they are read."""

    record: Record
    columns: Mapping[str, Any]
    """By their usual names, without those that are null."""
    source: SourceConfig
    """How the record is to be read."""
    problems: Problems
    left_out: Counter[str]
    """What becomes part of no row though nothing is wrong with it: how much, by reason."""

    def key(self, column: str) -> str:
        """What the file calls a column."""
        return self.source.columns.get(column, column)

    @property
    def nulls_fill(self) -> bool:
        return self.record.file.lower().endswith(PARQUET_SUFFIX)

    def text(self, column: str, *, may_be_empty: bool = False) -> str:
        return self.checked_text(self.columns.get(column), self.key(column), may_be_empty=may_be_empty)

    def checked_text(self, value: Any, key: str, *, may_be_empty: bool = False) -> str:
        if not isinstance(value, str):
            self.problems.add(key, f"must be a string, not {type_name(value)}")
            return ""
        if not may_be_empty and not value.strip():
            self.problems.add(key, "is empty: there is nothing to train on")
        self.problems.check_text(value, key)
        return value

    def talk(self, column: str, *, aliases: bool = False, other: str = "") -> Talk:
        """The messages of a column, as `read_talk` reads them."""
        value, key = self.columns.get(column), self.key(column)
        return read_talk(value, key, self.problems, aliases=aliases, nulls_fill=self.nulls_fill, other=other)

    def answer(self, value: Any, key: str, *, other: str = "") -> Talk:
        """The messages of an answer: a list, or one message."""
        if not isinstance(value, dict):
            return read_talk(value, key, self.problems, nulls_fill=self.nulls_fill, other=other)
        message, weight = read_message(value, key, self.problems, nulls_fill=self.nulls_fill)
        return Talk((message,), (weight,), (key,))

    def conversation(self) -> tuple[Talk, str]:
        """(the messages of `conversations`, else `messages`, behind those of a system column; the column)."""
        if "conversations" not in self.columns:
            return self.talk("messages"), "messages"
        return self.with_system(self.talk("conversations", aliases=True)), "conversations"

    def with_system(self, talk: Talk) -> Talk:
        """The messages behind the one that a `system` column holds."""
        if is_empty(self.columns.get("system")):
            return talk
        system = {"role": "system", "content": self.text("system", may_be_empty=True)}
        if talk.messages and talk.messages[0]["role"] == "system":
            if talk.messages[0].get("content") != system["content"]:
                self.problems.add(self.key("system"), f"differs from {talk.keys[0]}; fix: keep one of them")
            return talk
        return Talk((system,), (None,), (self.key("system"),)) + talk

    def row(self, kind: Kind, talk: Talk, *, origin: str = "", keys: bool = True, **values: Any) -> Row:
        """A conversational row. `keys`: its messages are not where `Row.message_key` would look for them."""
        said = any(weight is not None for weight in talk.weights)
        if self.columns.keys() - _MESSAGE_COLUMNS:
            values.update(self._rendering())
        return Row(
            self.record.file,
            self.record.line,
            kind,
            messages=talk.messages,
            weights=talk.weights if said else (),
            keys=talk.keys if keys else (),
            origin=origin,
            **values,
        )

    def _rendering(self) -> dict[str, Any]:
        """What else the chat template is given."""
        columns, problems, fill = self.columns, self.problems, self.nulls_fill
        if not is_empty(columns.get("documents")):
            problems.add(self.key("documents"), _DOCUMENTS)
        found = [name for name in ("tools", "functions") if not is_empty(columns.get(name))]
        if len(found) > 1:
            problems.add(self.key("functions"), f"the row has {self.key('tools')} too; fix: keep one of them")
        tools = read_tools(columns[found[0]], self.key(found[0]), problems, nulls_fill=fill) if found else ()
        kwargs = columns.get("chat_template_kwargs")
        key = self.key("chat_template_kwargs")
        return {"tools": tools, "template_kwargs": read_template_kwargs(kwargs, key, problems, nulls_fill=fill)}

    def strings(self, kind: Kind, **values: Any) -> Row:
        """A row without messages, which no chat template renders."""
        for name in ("tools", "functions", "chat_template_kwargs"):
            if not is_empty(self.columns.get(name)) and self.columns[name] not in ("[]", "{}", "null"):
                reason = "is for the chat template, and a row of strings is not rendered by it; fix: messages"
                self.problems.add(self.key(name), reason)
        return Row(self.record.file, self.record.line, kind, **values)
