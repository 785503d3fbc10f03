"""Which text of a conversation is trained: read off the chat template's own renderings, for any template.

With P_i = render(messages[:i], generation prompt) and F_i = render(messages[:i+1]), the assistant turn i is trained on
F_i[len(P_i) : end], where `end` is right behind the stop token, the special token that only whitespace follows in F_i.
It is exact only if F_i starts with P_i: what is trained follows what the model is fed. A turn of another role has no
generation prompt: its content is trained, and the stop token behind it.

All turns whose F_i[:end] the rendering F of the whole conversation starts with share one sample, F. Where a template
renders a turn differently once later messages follow (it strips the thinking from history, say), that turn gets a
sample F_i of its own, together with the earlier ones that F_i agrees with: each trained turn is trained once, behind
exactly what the model would be fed. What fails is refused with the reason. `chat.py` verifies the same in token ids.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from posttrain.data.files import BadRow
from posttrain.data.messages import says_something
from posttrain.data.rows import Row
from posttrain.data.template import RESERVED_KWARGS, before_thinking, closes_thinking, starts_thinking
from posttrain.data.tokenizer import RenderError, Tokenizer

NOTE_SPLIT = "conversations split, because the template renders earlier turns differently later"
NOTE_USER_END = "conversations that do not end with the assistant"
NOTE_PROMPT = "conversations with turns put behind the generation prompt, which the template renders otherwise later"
NOTE_STOP = "conversations with turns that the template ends without a stop token: the end token was added"
_NOTED = {
    "tools": "conversations whose tools the chat template leaves out",
    "reasoning_content": "conversations with reasoning that the chat template leaves out",
}
"""What a template may leave out without being refused: the answer is still the answer."""

_NOT_FOR_TRAINING = {
    "preference": "is a preference pair; fix: the source's preference: chosen, to train on the chosen answer",
    "unpaired_preference": "has a labelled answer; fix: the source's preference: chosen, to train on the true ones",
    "prompt": "has a prompt and no answer: nothing to train on; fix: add the completion",
    "stepwise_supervision": "has labelled steps, which supervised fine-tuning does not use; fix: other data",
}


@dataclass(frozen=True)
class Span:
    """A stretch of trained text."""

    start: int
    """Character."""
    fed: tuple[int, ...]
    """Characters that the model may have been fed when it goes on as the text does; one has to hold in tokens too. More
    than `start` where the generation prompt opens the thinking, which is trained with the turn."""
    end: int | None
    """Character; None: to the end of the text."""
    stop_id: int | None
    """The token that has to end it, if one has to."""
    message: int
    """Index of the message that it begins with."""
    weight: float = 1.0


@dataclass(frozen=True)
class Rendered:
    """A row, or a part of it, as text, before it is tokenized."""

    row: Row
    text: str
    spans: tuple[Span, ...]
    notes: tuple[str, ...] = ()


def render_row(row: Row, tokenizer: Tokenizer, loss_on: tuple[str, ...]) -> tuple[Rendered, ...]:
    """The texts of a conversation's samples, one or more, with what is trained of each. Raises BadRow."""
    if row.kind in _NOT_FOR_TRAINING:
        raise BadRow(row.file, row.line, "", f"the row {_NOT_FOR_TRAINING[row.kind]}")
    if reserved := sorted(set(row.template_kwargs) & set(RESERVED_KWARGS)):
        raise BadRow(
            row.file, row.line, f"chat_template_kwargs.{reserved[0]}", "is set by the rendering; fix: remove it"
        )
    weights = _trained_turns(row, loss_on)
    try:
        text = _render(row, tokenizer, len(row.messages))
    except RenderError as error:
        raise BadRow(row.file, row.line, "", f"{error}; fix: the row, or another chat template") from error
    notes = (NOTE_USER_END,) if row.messages[-1]["role"] != "assistant" else ()
    if loss_on in (("all",), ("completion",)):
        last = len(row.messages) - 1
        notes += _check_complete(row, last, tokenizer)
        if row.messages[last]["role"] == "assistant":
            _check_thinking(row, last, text)
        _check_calls(row, range(last), tokenizer)
        span = Span(0, (0,), None, None, 0) if loss_on == ("all",) else _completion_span(row, text, tokenizer)
        return (Rendered(row, text, (span,), notes),)
    turns = [_turn(row, turn, weight, text, tokenizer) for turn, weight in weights.items() if weight]
    _check_calls(row, (index for index in range(len(row.messages)) if not weights.get(index)), tokenizer)
    notes = tuple(dict.fromkeys((*notes, *(note for turn in turns for note in turn.notes))))
    texts: dict[str, list[Span]] = {}
    for upto, span in ((turn.upto, turn.span) for turn in reversed(turns)):
        trained = upto if span.end is None else upto[: span.end]
        carrier = next((other for other in (*texts, text) if other.startswith(trained)), upto)
        texts.setdefault(carrier, []).append(span)
    parts = [(part, spans[::-1]) for part, spans in texts.items()] or [(text, [])]
    if len(parts) > 1:
        notes = (*notes, NOTE_SPLIT)
    return tuple(
        Rendered(row, part, tuple(spans), () if number else notes)
        for number, (part, spans) in enumerate(reversed(parts))
    )


def _trained_turns(row: Row, loss_on: tuple[str, ...]) -> dict[int, float]:
    """The weight of each message that the row or `loss_on` speaks of; none where `loss_on` goes by no messages."""
    if loss_on == ("completion",) and row.kind != "prompt_completion":
        reason = (
            "data.loss_on is completion, but this row does not say where its prompt ends; "
            "fix: loss_on assistant or last_assistant, or columns prompt and completion"
        )
        raise BadRow(row.file, row.line, row.origin or "messages", reason)
    if loss_on in (("completion",), ("all",)):
        weighted = next((i for i, weight in enumerate(row.weights) if weight is not None), None)
        if weighted is not None:
            reason = f"has a weight, and data.loss_on {loss_on[0]} goes by no message; fix: data.loss_on assistant"
            raise BadRow(row.file, row.line, row.message_key(weighted), reason)
        return {}
    roles = ("assistant",) if loss_on == ("last_assistant",) else loss_on
    chosen = [i for i, m in enumerate(row.messages) if m["role"] in roles and i >= row.prompt_length]
    weights = dict.fromkeys(chosen[-1:] if loss_on == ("last_assistant",) else chosen, 1.0)
    weights |= {i: weight for i, weight in enumerate(row.weights) if weight is not None}
    if not weights:
        part = row.origin or ("messages" if row.kind == "messages" else "completion")
        names = " or ".join(roles)
        reason = f"has no {names} message: nothing to train on; fix: add the answer, or leave the row out"
        raise BadRow(row.file, row.line, part, reason)
    return dict(sorted(weights.items()))


@dataclass(frozen=True)
class _Turn:
    upto: str
    """The conversation's text up to the end of the turn."""
    span: Span
    notes: tuple[str, ...] = ()


def _turn(row: Row, index: int, weight: float, text: str, tokenizer: Tokenizer) -> _Turn:
    """What is trained of message `index`. Raises BadRow."""
    last = index == len(row.messages) - 1
    upto = text if last else _render_part(row, tokenizer, index + 1, index)
    notes = _check_complete(row, index, tokenizer)
    if row.messages[index]["role"] == "assistant":
        turn = _assistant_turn(row, index, weight, upto, text, tokenizer)
    else:
        turn = _Turn(upto, _content_span(row, index, weight, upto, tokenizer))
    return replace(turn, notes=notes + turn.notes)


def _assistant_turn(row: Row, index: int, weight: float, upto: str, text: str, tokenizer: Tokenizer) -> _Turn:
    """From behind the generation prompt of the assistant turn `index` through its stop token."""
    key, message, notes = row.message_key(index), row.messages[index], ()
    if not says_something(message):
        reason = "is empty: the model would learn to say nothing; fix: leave the turn out, or the row"
        raise BadRow(row.file, row.line, f"{key}.content", reason)
    prompts = _generation_prompts(row, tokenizer, index, upto)
    fed = tuple(len(prompt) for prompt in prompts if upto.startswith(prompt))
    if fed:
        start = min(before_thinking(upto[:length]) for length in fed)
        start = _marked_start(row, index, upto, start, tokenizer)
    else:
        upto, start = _behind_prompt(row, index, upto, prompts, tokenizer)
        fed, text, notes = (start,), upto, (NOTE_PROMPT,)
    end, stop_id = _turn_end(row, index, upto, max(fed), tokenizer)
    if stop_id is None:
        following = [token for token in tokenizer.stop_texts if text.startswith(upto[:end] + token)]
        if following:
            upto = upto[:end] + following[0]
        elif tokenizer.eos_id is not None:
            upto, notes = upto[:end] + tokenizer.added_texts[tokenizer.eos_id], (*notes, NOTE_STOP)
        end, stop_id = _turn_end(row, index, upto, max(fed), tokenizer)
    _check_thinking(row, index, upto[start:end])
    return _Turn(upto, Span(start, fed, end, stop_id, index, weight), notes)


def _behind_prompt(row: Row, index: int, upto: str, prompts: Sequence[str], tokenizer: Tokenizer) -> tuple[str, int]:
    """(the generation prompt with the turn behind it, where the turn begins), for templates that render what is before
    a turn differently once the turn is there: they close the thinking in the generation prompt alone, or write the
    system prompt and the tools before the last message only. Raises BadRow where turn and rest cannot be told apart."""
    for prompt in prompts:
        header = before_thinking(prompt)
        closed = closes_thinking(prompt) and upto.startswith(prompt[:header])
        if closed and not starts_thinking(upto[header:]):
            return prompt + upto[header:], len(prompt)
    if index and row.messages[index - 1]["role"] == "user":
        alone = replace(row, messages=row.messages[index - 1 : index + 1], prompt_length=0, weights=())
        try:
            prompt, whole = _generation_prompts(alone, tokenizer, 1)[0], _render(alone, tokenizer, 2)
        except (BadRow, RenderError):
            prompt = whole = ""
        turn = whole.removeprefix(prompt)
        if turn and turn != whole and upto.endswith(turn):
            return prompts[0] + turn, len(prompts[0])
    reason = (
        f"the turn does not begin as the chat template's generation prompt does: {_difference(prompts[0], upto)}; "
        "fix: content that begins so, chat_template_kwargs under which the prompt agrees, or another chat template"
    )
    raise BadRow(row.file, row.line, row.message_key(index), reason)


def _marked_start(row: Row, index: int, upto: str, start: int, tokenizer: Tokenizer) -> int:
    """`start`, or where in the generation prompt the template's own mark around this turn begins."""
    template = tokenizer.template(row.tools)
    if not template.has_marks:
        return start
    before = len(_render_part(row, tokenizer, index, index)) if index else 0
    marks = template.marks(row.messages[: index + 1], row.tools, row.template_kwargs)
    return next((begin for begin, end in marks if before <= begin < start <= end <= len(upto)), start)


def _content_span(row: Row, index: int, weight: float, upto: str, tokenizer: Tokenizer) -> Span:
    """The content of a message that is not the assistant's, through the stop token behind it."""
    key, content = row.message_key(index), row.messages[index].get("content", "")
    start = _content_start(row, index, upto, tokenizer)
    forms = (content, content.rstrip(), content.lstrip(), content.strip())
    said = next((form for form in forms if start is not None and upto.startswith(form, start)), None)
    if not content.strip() or start is None or said is None:
        why = "is empty" if not content.strip() else "is not written as it is by the chat template"
        raise BadRow(row.file, row.line, f"{key}.content", f"{why}, so it cannot be trained on; fix: weight 0")
    end = start + len(said)
    stop = tokenizer.stop_at_end(upto, end)
    if stop is None:
        return Span(start, (start,), end, None, index, weight)
    return Span(start, (start,), stop[0] + len(tokenizer.added_texts[stop[1]]), stop[1], index, weight)


def _content_start(row: Row, index: int, upto: str, tokenizer: Tokenizer) -> int | None:
    """Where the content of message `index` stands in `upto`: where the template writes a word in its place, since the
    content may also stand in a header, in the tools or in the system prompt. None where that tells nothing."""
    word = "contentprobe"
    replaced = (*row.messages[:index], {**row.messages[index], "content": word})
    try:
        text = _render(replace(row, messages=replaced), tokenizer, index + 1)
    except RenderError:
        return None
    before, found, _ = text.partition(word)
    return len(before) if found and upto.startswith(before) else None


def _turn_end(row: Row, index: int, upto: str, start: int, tokenizer: Tokenizer) -> tuple[int, int | None]:
    """Where the turn that ends the text `upto` ends, behind its stop token, and the token's id; None where the template
    ends it without one and the end token can stand for it. Raises BadRow."""
    stop = tokenizer.stop_at_end(upto, start)
    key, message = row.message_key(index), row.messages[index]
    said = {part: message.get(part, "") for part in ("content", "reasoning_content")}
    said["tool_calls"] = json.dumps(message.get("tool_calls", ""), ensure_ascii=False)
    for token, (part, text) in product(tokenizer.stop_texts, said.items()):
        if token in text:
            reason = f"holds the stop token {token!r}: generation would end there; fix: remove it"
            raise BadRow(row.file, row.line, f"{key}.{part}", reason)
    if stop is not None:
        token = tokenizer.added_texts[stop[1]]
        if not any(token in text for text in said.values()):
            return stop[0] + len(token), stop[1]
    if tokenizer.eos_id in tokenizer.added_texts:
        return len(upto.rstrip()), None
    reason = (
        f"the chat template does not end the assistant's turn with a special token (it ends with {upto[-24:]!r}), and "
        "the tokenizer has no end token, so the model would never learn to stop; fix: tokenizer.eos_token"
    )
    raise BadRow(row.file, row.line, key, reason)


def _completion_span(row: Row, text: str, tokenizer: Tokenizer) -> Span:
    """All behind the prompt; if an assistant turn is the end, through its stop token."""
    first, last = row.prompt_length, len(row.messages) - 1
    fed = _render_part(row, tokenizer, first, first, generation=row.messages[first]["role"] == "assistant")
    if not text.startswith(fed):
        reason = (
            f"the completion does not continue the rendered prompt: {_difference(fed, text)}; "
            "fix: data.loss_on last_assistant, or another chat template"
        )
        raise BadRow(row.file, row.line, "completion", reason)
    for index in range(first, last):
        if row.messages[index]["role"] == "assistant":
            upto = _render_part(row, tokenizer, index + 1, index).rstrip()
            if not text.startswith(upto):
                reason = (
                    f"the chat template renders this turn differently once others follow: {_difference(upto, text)}; "
                    "fix: data.loss_on assistant, which splits the conversation"
                )
                raise BadRow(row.file, row.line, row.message_key(index), reason)
    if row.messages[last]["role"] != "assistant":
        return Span(len(fed), (len(fed),), None, None, first)
    end, stop_id = _turn_end(row, last, text, len(fed), tokenizer)
    if stop_id is None:
        reason = "the chat template ends the turn without a special token; fix: data.loss_on assistant, which adds one"
        raise BadRow(row.file, row.line, row.message_key(last), reason)
    return Span(len(fed), (len(fed),), end, stop_id, first)


# ---- checks ---------------------------------------------------------------------------------------------------------


def _check_complete(row: Row, index: int, tokenizer: Tokenizer) -> tuple[str, ...]:
    """Refuses a message or a call that the template would silently leave out of the conversation up to message `index`;
    notes that it leaves out the tools' descriptions, or the reasoning of that message."""
    template = tokenizer.template(row.tools)
    left_out = template.left_out(row.messages[: index + 1], row.tools, row.template_kwargs)
    for at, part in left_out:
        if part in _NOTED:
            continue
        role = row.messages[at]["role"]
        if role != "assistant":
            reason = (
                f"the chat template leaves this message out (role {role!r}); fix: another role, or another template"
            )
            raise BadRow(row.file, row.line, f"{row.message_key(at)}.role", reason)
        raise _part_left_out(row, at, part)
    return tuple(_NOTED[part] for _, part in left_out)


def _check_calls(row: Row, indices: Iterable[int], tokenizer: Tokenizer) -> None:
    """Refuses tool calls of turns that are not trained, which the template would never write: what follows on them
    would be learned from nothing."""
    template = tokenizer.template(row.tools)
    for index in indices:
        if not row.messages[index].get("tool_calls"):
            continue
        for at, part in template.left_out(row.messages[: index + 1], row.tools, row.template_kwargs):
            if at == index and part.startswith("tool_calls"):
                raise _part_left_out(row, at, part)


def _part_left_out(row: Row, index: int, part: str) -> BadRow:
    reason = "the chat template leaves this part of the turn out; fix: remove it, or another chat template"
    return BadRow(row.file, row.line, f"{row.message_key(index)}.{part}", reason)


def _check_thinking(row: Row, index: int, trained: str) -> None:
    """Refuses a turn of whose written-out thinking (`<think>...</think>` in its content) a part is not in the text."""
    content = row.messages[index].get("content", "")
    if "</think>" not in content:
        return
    pieces = [piece.strip() for end in content.split("</think>") for piece in end.split("<think>")]
    if any(piece not in trained for piece in pieces):
        reason = "the chat template leaves the thinking out of this turn; fix: another chat template"
        raise BadRow(row.file, row.line, f"{row.message_key(index)}.content", reason)


# ---- rendering ------------------------------------------------------------------------------------------------------


def _render(row: Row, tokenizer: Tokenizer, stop: int, *, generation: bool = False) -> str:
    """The messages before `stop` as text."""
    messages: Sequence[Mapping[str, Any]] = row.messages[:stop]
    return tokenizer.render(
        messages, tools=row.tools, template_kwargs=row.template_kwargs, add_generation_prompt=generation
    )


def _generation_prompts(row: Row, tokenizer: Tokenizer, index: int, upto: str = "") -> list[str]:
    """What the model may be fed before it produces message `index`: only the usual generation prompt, where the text
    `upto` goes on behind it whatever the model may think."""
    if index == 0:
        reason = "the conversation begins with the assistant: no prompt leads to this turn; fix: put one before it"
        raise BadRow(row.file, row.line, row.message_key(index), reason)
    template = tokenizer.template(row.tools)
    prompts = template.generation_prompts(row.messages[:index], row.tools, row.template_kwargs)
    try:
        usual = next(prompts)
        if upto.startswith(usual) and before_thinking(usual) == len(usual):
            return [usual]
        return list(dict.fromkeys((usual, *prompts)))
    except RenderError as error:
        raise _not_alone(row, index, error) from error


def _not_alone(row: Row, index: int, error: RenderError) -> BadRow:
    reason = f"what comes before cannot be rendered alone, as it would be at inference: {error}"
    return BadRow(row.file, row.line, row.message_key(index), reason)


def _render_part(row: Row, tokenizer: Tokenizer, stop: int, index: int, *, generation: bool = False) -> str:
    """`_render`, for what message `index` needs to be rendered."""
    try:
        return _render(row, tokenizer, stop, generation=generation)
    except RenderError as error:
        raise _not_alone(row, index, error) from error


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many elements two sequences have in common at the start."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def _difference(expected: str, found: str) -> str:
    """Where two texts part, in a few words."""
    at = common_prefix(expected, found)
    return f"{expected[at : at + 24]!r} against {found[at : at + 24]!r} behind {expected[max(0, at - 16) : at]!r}"
