"""The forms of preference: a reader for each, from the columns of one record to pairs of answers.

`forms.py` is the same for rows that compare nothing, `rankings.py` for several answers at once. A pair is read so that
both sides have the same prompt, message by message or character by character.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from posttrain.data.fields import Fields
from posttrain.data.messages import Talk, says_something
from posttrain.data.problems import type_name
from posttrain.data.rows import Row
from posttrain.data.trees import read_hh

_LONG_NAMES = ("chosen_messages", "rejected_messages")
_NO_PROMPT = (
    "chosen and rejected do not begin with the same {what}, so the pair has no prompt; "
    "fix: a prompt column, or leave the pair out"
)


def read_preference(fields: Fields) -> list[Row]:
    """A pair: strings, lists of messages, or one message each behind a conversation.

    Without a prompt of its own a pair's prompt is what both begin with, at least the last message (character) left
    over for each. A prompt that both repeat is taken once.
    """
    columns = fields.columns
    names = ("chosen", "rejected") if "chosen" in columns and "rejected" in columns else _LONG_NAMES
    chosen, rejected = columns[names[0]], columns[names[1]]
    prompt = columns.get("prompt")
    margin = read_margin(fields)
    if isinstance(chosen, str) and isinstance(rejected, str) and not isinstance(prompt, list):
        return [_string_pair(fields, prompt, names, margin)]
    if isinstance(chosen, str) or isinstance(rejected, str):
        reason = "must be a list of messages, not a string (prompt, chosen and rejected: all strings or all lists)"
        fields.problems.add(fields.key(names[0] if isinstance(chosen, str) else names[1]), reason)
        return []
    talks = [fields.answer(columns[name], fields.key(name)) for name in names]
    before = None
    if isinstance(prompt, list):
        before = fields.talk("prompt")
        talks = without_prompt(before, talks)
    elif prompt is not None:
        _check_repeated(fields, prompt, talks)
    elif isinstance(chosen, dict):
        if "conversations" not in columns and "messages" not in columns:
            fields.problems.add("", "the pair has no prompt; fix: a column prompt, conversations or messages")
            return []
        before, _ = fields.conversation()
    return talk_pair(fields, before, *talks, origin=fields.key(names[0]), margin=margin)


def without_prompt(prompt: Talk, answers: Sequence[Talk]) -> list[Talk]:
    """The answers without the prompt, where all of them are whole conversations that begin with it."""
    if all(len(talk) > len(prompt) and talk.messages[: len(prompt)] == prompt.messages for talk in answers):
        return [talk.part(len(prompt)) for talk in answers]
    return list(answers)


def _check_repeated(fields: Fields, prompt: Any, talks: Sequence[Talk]) -> None:
    """A prompt in a string beside messages is no more than what these begin with, or the row is not understood."""
    for talk in talks:
        asked = next((m.get("content") for m in talk.messages if m["role"] == "user"), None)
        if asked != prompt:
            reason = f"is {type_name(prompt)} and not what the messages begin with; fix: a list of messages"
            fields.problems.add(fields.key("prompt"), reason)
            return


def talk_pair(
    fields: Fields, prompt: Talk | None, chosen: Talk, rejected: Talk, *, origin: str, margin: float | None = None
) -> list[Row]:
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
    # Fine-tuning on the chosen answers makes no use of the others.
    for answer in (chosen,) if fields.source.preference == "chosen" else (chosen, rejected):
        check_answer(fields, answer)
    for message, weight, key in zip(rejected.messages, rejected.weights, rejected.keys, strict=True):
        if weight not in (None, 1.0 if message["role"] == "assistant" else 0.0):
            problems.add(key, f"weight {weight} in a rejected answer is not served; fix: 1 for the assistant, else 0")
    row = fields.row("preference", prompt + chosen, prompt_length=len(prompt), origin=origin, margin=margin)
    sides = prompt + rejected
    return [replace(row, rejected_messages=sides.messages, rejected_keys=sides.keys)]


def check_answer(fields: Fields, answer: Talk) -> None:
    """Refuses a trained turn of the assistant that says nothing."""
    for message, weight, key in zip(answer.messages, answer.weights, answer.keys, strict=True):
        if message["role"] == "assistant" and weight != 0 and not says_something(message):
            fields.problems.add(key, "is empty: there is nothing to prefer, or to prefer to it; fix: leave it out")


def _shared_start(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many items two sequences begin with alike, short of the last of either."""
    longest = min(len(a), len(b)) - 1
    return next((i for i, (x, y) in enumerate(zip(a[:longest], b, strict=False)) if x != y), max(longest, 0))


def _string_pair(fields: Fields, prompt: Any, names: tuple[str, str], margin: float | None) -> Row:
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
        for name, answer in zip(names, (chosen, rejected), strict=True):
            if not answer.strip() and not fields.problems:
                reason = "is empty behind what both begin with; fix: a prompt column, or leave the pair out"
                fields.problems.add(fields.key(name), reason)
    return fields.strings("preference", prompt=prompt, completion=chosen, rejected=rejected, margin=margin)


def read_margin(fields: Fields) -> float | None:
    """By how much the chosen answer is better, where the row says so."""
    margin = fields.columns.get("margin")
    number = None if margin is None else fields.problems.number(margin, fields.key("margin"))
    return None if number is None else float(number)


def read_hh_pair(fields: Fields) -> list[Row]:
    """chosen and rejected as HH's texts, perhaps behind the prompt's."""
    before = fields.text("prompt") if "prompt" in fields.columns else ""
    talks = []
    for name in ("chosen", "rejected"):
        text = fields.columns[name]
        talks.append(read_hh(before + text if isinstance(text, str) else text, fields.key(name), fields.problems))
    return talk_pair(fields, None, *talks, origin=fields.key("chosen"), margin=read_margin(fields))
