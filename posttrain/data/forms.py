"""The forms of rows: a reader for each, from the columns of one record to canonical rows.

`formats.py` finds out which form a record has and calls its reader. A reader takes what its form needs and adds what is
wrong with it to `Fields.problems`; with a problem the rows that it returns are thrown away.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from posttrain.data.files import PARQUET_SUFFIX, Record
from posttrain.data.messages import Talk, read_message, read_talk
from posttrain.data.problems import Problems, is_empty, type_name
from posttrain.data.rows import Kind, Row
from posttrain.data.tools import read_template_kwargs, read_tools
from posttrain.data.trees import read_hh, read_tree

_DOCUMENTS = "are not served as a column; fix: write them into a message"
_NO_PROMPT = (
    "chosen and rejected do not begin with the same {what}, so the pair has no prompt; "
    "fix: a prompt column, or leave the pair out"
)


@dataclass(frozen=True, slots=True)
class Fields:
    """A record's columns while they are read."""

    record: Record
    columns: Mapping[str, Any]
    """By their usual names, without those that are null."""
    names: Mapping[str, str]
    """What the file calls them, where that is something else."""
    tree: Literal["all", "best"]
    problems: Problems

    def key(self, column: str) -> str:
        return self.names.get(column, column)

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

    def row(self, kind: Kind, talk: Talk, *, origin: str = "", keys: bool = True, **values: Any) -> Row:
        """A conversational row. `keys`: its messages are not where `Row.message_key` would look for them."""
        said = any(weight is not None for weight in talk.weights)
        rest = self.columns.keys() - _MESSAGE_COLUMNS
        if rest:
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


_MESSAGE_COLUMNS = frozenset(("messages", "conversations", "prompt", "completion", "chosen", "rejected"))
"""Columns that say nothing of how a conversation is rendered."""


# ---- texts and conversations ----------------------------------------------------------------------------------------


def read_text(fields: Fields) -> list[Row]:
    if isinstance(fields.columns.get("role"), str):
        reason = "is one message of a conversation (it has a role), no text of its own; fix: conversations, or trees"
        fields.problems.add(fields.key("text"), reason)
    return [fields.strings("text", text=fields.text("text"))]


def read_messages(fields: Fields) -> list[Row]:
    origin = fields.names.get("messages", "")
    return [
        fields.row(
            "messages", _with_system(fields, fields.talk("messages")), origin=origin, keys="system" in fields.columns
        )
    ]


def read_sharegpt(fields: Fields) -> list[Row]:
    """`conversations`; with chosen and rejected or a label it is the conversation of those."""
    if "chosen" in fields.columns and "rejected" in fields.columns:
        return read_preference(fields)
    if "label" in fields.columns:
        return read_unpaired_preference(fields)
    talk, column = _conversation(fields)
    return [fields.row("messages", talk, origin=fields.key(column), keys="system" in fields.columns)]


def _conversation(fields: Fields) -> tuple[Talk, str]:
    """(the messages of `conversations`, else `messages`, behind those of a system column; the column)."""
    if "conversations" not in fields.columns:
        return fields.talk("messages"), "messages"
    return _with_system(fields, fields.talk("conversations", aliases=True)), "conversations"


def _with_system(fields: Fields, talk: Talk) -> Talk:
    """The messages behind the one that a `system` column holds."""
    if is_empty(fields.columns.get("system")):
        return talk
    system = {"role": "system", "content": fields.text("system", may_be_empty=True)}
    if talk.messages and talk.messages[0]["role"] == "system":
        if talk.messages[0].get("content") != system["content"]:
            fields.problems.add(fields.key("system"), f"differs from {talk.keys[0]}; fix: keep one of them")
        return talk
    return Talk((system,), (None,), (fields.key("system"),)) + talk


def read_tree_rows(fields: Fields) -> list[Row]:
    """A message tree, as `read_tree` reads it: a row of each conversation."""
    key = fields.key("prompt")
    talks = read_tree(fields.columns["prompt"], key, fields.problems, fields.tree)
    return [fields.row("messages", talk, origin=key) for talk in talks]


# ---- prompts and completions ----------------------------------------------------------------------------------------


def read_prompt(fields: Fields) -> list[Row]:
    if isinstance(fields.columns["prompt"], str):
        return [fields.strings("prompt", prompt=fields.text("prompt"))]
    talk = fields.talk("prompt")
    return [fields.row("prompt", talk, prompt_length=len(talk), origin=fields.names.get("prompt", ""), keys=False)]


def read_prompt_completion(fields: Fields, kind: Kind = "prompt_completion", **values: Any) -> list[Row]:
    columns = fields.columns
    if isinstance(columns["prompt"], str) and isinstance(columns["completion"], str):
        prompt, completion = fields.text("prompt", may_be_empty=True), fields.text("completion")
        return [fields.strings(kind, prompt=prompt, completion=completion, **values)]
    other = f" ({fields.key('prompt')} and {fields.key('completion')}: both strings or both lists)"
    prompt, completion = fields.talk("prompt", other=other), fields.talk("completion", other=other)
    return [fields.row(kind, prompt + completion, prompt_length=len(prompt), keys=bool(fields.names), **values)]


def read_unpaired_preference(fields: Fields) -> list[Row]:
    """A completion with a label; of a whole conversation the last answer is the completion."""
    label = _label(fields)
    if "completion" in fields.columns and "prompt" in fields.columns:
        return read_prompt_completion(fields, "unpaired_preference", label=label)
    talk, column = _conversation(fields)
    start = len(talk)
    while start and talk.messages[start - 1]["role"] in ("assistant", "tool"):
        start -= 1
    if talk.messages and (talk.messages[-1]["role"] != "assistant" or not start):
        reason = "needs a prompt and then the assistant's answer, which is what the label judges"
        fields.problems.add(talk.keys[-1], f"{reason}; fix: leave the row out")
    row = fields.row(
        "unpaired_preference", talk, prompt_length=start, origin=fields.key(column), keys="system" in fields.columns
    )
    return [replace(row, label=label)]


def _label(fields: Fields) -> bool | None:
    label = fields.columns["label"]
    if isinstance(label, bool):
        return label
    reason = (
        "must be true or false, whether the answer is wanted; fix: true or false, or, where the column means something "
        "else, another name for it or the source's format (messages, prompt_completion)"
    )
    fields.problems.add(fields.key("label"), reason)
    return None


def read_stepwise_supervision(fields: Fields) -> list[Row]:
    prompt = fields.text("prompt")
    completions, labels = fields.columns["completions"], fields.columns["labels"]
    if not isinstance(completions, list) or not completions:
        fields.problems.add(fields.key("completions"), f"must be a list of steps, not {type_name(completions)}")
        completions = []
    steps = [fields.checked_text(s, f"{fields.key('completions')}[{i}]") for i, s in enumerate(completions)]
    if not isinstance(labels, list) or not all(isinstance(label, bool) for label in labels):
        fields.problems.add(fields.key("labels"), "must be a list of true and false, one for each step")
    elif len(labels) != len(steps):
        fields.problems.add(fields.key("labels"), f"has {len(labels)} labels for {len(steps)} steps; fix: one for each")
    else:
        return [fields.strings("stepwise_supervision", prompt=prompt, completions=tuple(steps), labels=tuple(labels))]
    return []


# ---- preference -----------------------------------------------------------------------------------------------------


def read_preference(fields: Fields) -> list[Row]:
    """A pair: strings, lists of messages, or one message each behind a conversation.

    Without a prompt of its own a pair's prompt is what both begin with, at least the last message (character) left
    over for each. A prompt that both repeat is taken once.
    """
    columns = fields.columns
    names = ("chosen", "rejected") if "chosen" in columns and "rejected" in columns else _LONG_NAMES
    chosen, rejected = columns[names[0]], columns[names[1]]
    prompt = columns.get("prompt")
    if isinstance(chosen, str) and isinstance(rejected, str) and isinstance(prompt, str | None):
        return [_string_pair(fields, prompt, names)]
    if isinstance(chosen, str) or isinstance(rejected, str):
        reason = "must be a list of messages, not a string (prompt, chosen and rejected: all strings or all lists)"
        fields.problems.add(fields.key(names[0] if isinstance(chosen, str) else names[1]), reason)
        return []
    talks = (_answer(fields, names[0]), _answer(fields, names[1]))
    before = None
    if isinstance(prompt, list):
        before = fields.talk("prompt")
        if all(len(talk) > len(before) and talk.messages[: len(before)] == before.messages for talk in talks):
            talks = (talks[0].part(len(before)), talks[1].part(len(before)))
    elif prompt is not None:
        _check_repeated(fields, prompt, talks)
    elif isinstance(chosen, dict):
        if "conversations" not in columns and "messages" not in columns:
            fields.problems.add("", "the pair has no prompt; fix: a column prompt, conversations or messages")
            return []
        before, _ = _conversation(fields)
    return _talk_pair(fields, before, *talks, origin=fields.key(names[0]))


_LONG_NAMES = ("chosen_messages", "rejected_messages")


def _answer(fields: Fields, column: str) -> Talk:
    """The messages of one side of a pair: a list, or one message."""
    value, key = fields.columns[column], fields.key(column)
    if not isinstance(value, dict):
        return fields.talk(column)
    message, weight = read_message(value, key, fields.problems, nulls_fill=fields.nulls_fill)
    return Talk((message,), (weight,), (key,))


def _check_repeated(fields: Fields, prompt: Any, talks: tuple[Talk, Talk]) -> None:
    """A prompt in a string beside messages is no more than what these begin with, or the row is not understood."""
    for talk in talks:
        asked = next((m.get("content") for m in talk.messages if m["role"] == "user"), None)
        if asked != prompt:
            reason = f"is {type_name(prompt)} and not what the messages begin with; fix: a list of messages"
            fields.problems.add(fields.key("prompt"), reason)
            return


def _talk_pair(fields: Fields, prompt: Talk | None, chosen: Talk, rejected: Talk, *, origin: str) -> list[Row]:
    """The pair of two conversations behind a prompt, or of two whole ones that begin with it."""
    problems = fields.problems
    if problems:
        return []  # what is malformed is not to be compared
    if prompt is None:
        shared = _shared_start(chosen.messages, rejected.messages)
        if not shared:
            problems.add(origin, _NO_PROMPT.format(what="message"))
        if chosen.weights[:shared] != rejected.weights[:shared]:
            problems.add(origin, "chosen and rejected give their prompt different weights; fix: the same weights")
        prompt, chosen, rejected = chosen.part(0, shared), chosen.part(shared), rejected.part(shared)
    for message, weight, key in zip(rejected.messages, rejected.weights, rejected.keys, strict=True):
        if weight not in (None, 1.0 if message["role"] == "assistant" else 0.0):
            problems.add(key, f"weight {weight} in a rejected answer is not served; fix: 1 for the assistant, else 0")
    row = fields.row("preference", prompt + chosen, prompt_length=len(prompt), origin=origin, margin=_margin(fields))
    return [replace(row, rejected_messages=prompt.messages + rejected.messages)]


def _shared_start(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many items two sequences begin with alike, short of the last of either."""
    longest = min(len(a), len(b)) - 1
    return next((i for i, (x, y) in enumerate(zip(a[:longest], b, strict=False)) if x != y), max(longest, 0))


def _string_pair(fields: Fields, prompt: str | None, names: tuple[str, str]) -> Row:
    chosen, rejected = fields.text(names[0]), fields.text(names[1])
    if prompt is not None:
        prompt = fields.text("prompt", may_be_empty=True)
    else:
        shared = _shared_start(chosen, rejected)
        # As TRL's extract_prompt: the space between the two belongs to the completion, as tokenizers have it.
        shared -= chosen[shared - 1 : shared] == " "
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        if not prompt.strip() and not fields.problems:
            fields.problems.add(fields.key(names[0]), _NO_PROMPT.format(what="text"))
    return fields.strings("preference", prompt=prompt, completion=chosen, rejected=rejected, margin=_margin(fields))


_MOST_MARGIN = 1e30
"""A number of JSON can be beyond all floats."""


def _margin(fields: Fields) -> float | None:
    margin = fields.columns.get("margin")
    if margin is None:
        return None
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not abs(margin) <= _MOST_MARGIN:
        fields.problems.add(fields.key("margin"), f"must be a finite number, not {margin!r}")
        return None
    return float(margin)


def read_hh_pair(fields: Fields) -> list[Row]:
    """chosen and rejected as HH's texts, perhaps behind the prompt's."""
    before = fields.text("prompt") if "prompt" in fields.columns else ""
    talks = []
    for name in ("chosen", "rejected"):
        text = fields.columns[name]
        talks.append(read_hh(before + text if isinstance(text, str) else text, fields.key(name), fields.problems))
    return _talk_pair(fields, None, *talks, origin=fields.key("chosen"))


# ---- Alpaca ---------------------------------------------------------------------------------------------------------


def read_alpaca(fields: Fields) -> list[Row]:
    """`instruction` and `input` are the user's message, `output` the answer; or a pair, or a list of instances."""
    columns = fields.columns
    answers = [name for name in ("output", "instances", "chosen") if name in columns]
    if len(answers) != 1:
        reason = f"the row has {' and '.join(map(fields.key, answers))}; fix: keep one of them"
        fields.problems.add(fields.key(answers[1]), reason)
        return []
    if "instances" in columns:
        return _instances(fields)
    prompt = _alpaca_prompt(fields, columns.get("input"), fields.key("input"))
    if "chosen" in columns:
        chosen, rejected = (_alpaca_answer(fields, columns.get(n), fields.key(n)) for n in ("chosen", "rejected"))
        return _talk_pair(fields, prompt, chosen, rejected, origin=fields.key("chosen"))
    talk = prompt + _alpaca_answer(fields, columns["output"], fields.key("output"))
    row = fields.row("prompt_completion", talk, prompt_length=len(prompt), origin=fields.key("output"))
    return [replace(row, kind="unpaired_preference", label=_label(fields))] if "label" in columns else [row]


def _instances(fields: Fields) -> list[Row]:
    """Self-Instruct's rows: one instruction, and several inputs with their outputs."""
    value, key = fields.columns["instances"], fields.key("instances")
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        fields.problems.add(key, "must be a list of objects with input and output")
        return []
    rows = []
    for index, item in enumerate(value):
        prompt = _alpaca_prompt(fields, item.get("input"), f"{key}[{index}].input")
        talk = prompt + _alpaca_answer(fields, item.get("output"), f"{key}[{index}].output")
        rows.append(fields.row("prompt_completion", talk, prompt_length=len(prompt), origin=key))
    return rows


def _alpaca_prompt(fields: Fields, given: Any, given_key: str) -> Talk:
    """The messages before the answer: system, history, and the instruction with its input."""
    talk = Talk()
    history, key = fields.columns.get("history"), fields.key("history")
    for index, turn in enumerate(history if isinstance(history, list) else ()):
        if not isinstance(turn, list) or len(turn) != 2:
            fields.problems.add(f"{key}[{index}]", "must be a list of two strings: what was asked, and the answer")
            continue
        for place, role in enumerate(("user", "assistant")):
            at = f"{key}[{index}][{place}]"
            content = fields.checked_text(turn[place], at, may_be_empty=True)
            talk += Talk(({"role": role, "content": content},), (None,), (at,))
    if history is not None and not isinstance(history, list):
        fields.problems.add(key, f"must be a list of pairs, not {type_name(history)}")
    instruction = fields.text("instruction", may_be_empty=True)
    more = "" if given is None else fields.checked_text(given, given_key, may_be_empty=True)
    asked = "\n".join(part for part in (instruction, more) if part)
    if not asked.strip():
        fields.problems.add(fields.key("instruction"), "is empty, and so is the input; fix: leave the row out")
    talk += Talk(({"role": "user", "content": asked},), (None,), (fields.key("instruction"),))
    return _with_system(fields, talk)


def _alpaca_answer(fields: Fields, value: Any, key: str) -> Talk:
    return Talk(({"role": "assistant", "content": fields.checked_text(value, key)},), (None,), (key,))
