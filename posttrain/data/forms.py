"""The forms of rows: a reader for each, from the columns of one record to canonical rows.

`formats.py` finds out which form a record has and calls its reader: one of these, or of `pair_forms.py` and
`rankings.py` where answers are compared. A reader takes what its form needs and adds what is wrong with it to
`Fields.problems`; with a problem the rows that it returns are thrown away.
"""

from dataclasses import replace
from typing import Any

from posttrain.data.fields import Fields
from posttrain.data.messages import Talk
from posttrain.data.pair_forms import read_margin, read_preference, talk_pair
from posttrain.data.problems import type_name
from posttrain.data.rankings import read_tree_pairs
from posttrain.data.rows import Kind, Row
from posttrain.data.trees import read_tree

# ---- texts and conversations ----------------------------------------------------------------------------------------


def read_text(fields: Fields) -> list[Row]:
    if isinstance(fields.columns.get("role"), str):
        reason = "is one message of a conversation (it has a role), no text of its own; fix: conversations, or trees"
        fields.problems.add(fields.key("text"), reason)
    return [fields.strings("text", text=fields.text("text"))]


def read_messages(fields: Fields) -> list[Row]:
    origin = fields.source.columns.get("messages", "")
    talk = fields.with_system(fields.talk("messages"))
    return [fields.row("messages", talk, origin=origin, keys="system" in fields.columns)]


def read_sharegpt(fields: Fields) -> list[Row]:
    """`conversations`; with chosen and rejected or a label it is the conversation of those."""
    if "chosen" in fields.columns and "rejected" in fields.columns:
        return read_preference(fields)
    if "label" in fields.columns:
        return read_unpaired_preference(fields)
    talk, column = fields.conversation()
    return [fields.row("messages", talk, origin=fields.key(column), keys="system" in fields.columns)]


def read_tree_rows(fields: Fields) -> list[Row]:
    """A message tree, as `read_tree` reads it: a row of each conversation; or its pairs."""
    if fields.source.tree == "pairs":
        return read_tree_pairs(fields)
    key = fields.key("prompt")
    talks = read_tree(fields.columns["prompt"], key, fields.problems, fields.left_out, fields.source.tree)
    return [fields.row("messages", talk, origin=key) for talk in talks]


# ---- prompts and completions ----------------------------------------------------------------------------------------


def read_prompt(fields: Fields) -> list[Row]:
    if isinstance(fields.columns["prompt"], str):
        return [fields.strings("prompt", prompt=fields.text("prompt"))]
    talk = fields.talk("prompt")
    return [
        fields.row("prompt", talk, prompt_length=len(talk), origin=fields.source.columns.get("prompt", ""), keys=False)
    ]


def read_prompt_completion(fields: Fields, kind: Kind = "prompt_completion", **values: Any) -> list[Row]:
    columns = fields.columns
    if isinstance(columns["prompt"], str) and isinstance(columns["completion"], str):
        prompt, completion = fields.text("prompt", may_be_empty=True), fields.text("completion")
        return [fields.strings(kind, prompt=prompt, completion=completion, **values)]
    other = f" ({fields.key('prompt')} and {fields.key('completion')}: both strings or both lists)"
    prompt, completion = fields.talk("prompt", other=other), fields.talk("completion", other=other)
    return [
        fields.row(kind, prompt + completion, prompt_length=len(prompt), keys=bool(fields.source.columns), **values)
    ]


def read_unpaired_preference(fields: Fields) -> list[Row]:
    """A completion with a label; of a whole conversation the last answer is the completion."""
    label = _label(fields)
    if "completion" in fields.columns and "prompt" in fields.columns:
        return read_prompt_completion(fields, "unpaired_preference", label=label)
    talk, column = fields.conversation()
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
        return talk_pair(fields, prompt, chosen, rejected, origin=fields.key("chosen"), margin=read_margin(fields))
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
    return fields.with_system(talk)


def _alpaca_answer(fields: Fields, value: Any, key: str) -> Talk:
    return Talk(({"role": "assistant", "content": fields.checked_text(value, key)},), (None,), (key,))
