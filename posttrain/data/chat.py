"""Rows to token ids and which of them are trained: the heart of the data path, between `formats.py` and `packing.py`.

A token is trained when the model would have to produce it at inference. For a conversation that is read off the chat
template's own renderings, for any template: with F = render(messages), P_i = render(messages[:i], generation prompt)
and F_i = render(messages[:i+1]), the assistant turn i is trained on F_i[len(P_i) : end], where `end` is right behind
the stop token, the special token that only whitespace follows in F_i. It is exact only if

    F_i starts with P_i          what is trained follows what the model is fed,
    F starts with F_i[:end]      and later messages do not change it,
    ids(F)[:k] == ids(P_i)       token by token,

which is verified for every trained turn of every row; where it fails the row is refused with the reason. F is tokenized
once, so ids always equal `apply_chat_template(messages, tokenize=True)`. Masks go by position, never by token id.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, Int, Int32

from posttrain.data.files import BadRow
from posttrain.data.formats import Row
from posttrain.data.tokenizer import RenderError, Tokenizer
from posttrain.errors import UserError

LossOn = Literal["assistant", "completion", "last_assistant", "all"]
"""What is trained. `assistant`: every assistant turn, of a prompt-completion row those of the completion. `completion`:
all behind the prompt of prompt-completion rows. `last_assistant`: the last assistant turn only. `all`: every token.
A `text` row is trained as a whole, and of a prompt with a completion in strings the completion, unless `all`."""

_CHUNK_ROWS = 1024


@dataclass(frozen=True)
class Sample:
    """A tokenized row."""

    tokens: Int32[np.ndarray, "n"]
    loss_weights: Float32[np.ndarray, "n"]
    """1 where the model learns to predict this token from those before it; the first is always 0."""
    file: str
    line: int


@dataclass(frozen=True)
class _Span:
    """A stretch of trained text."""

    start: int
    """Character; the text before it is what the model is fed."""
    end: int | None
    """Character; None: to the end of the text."""
    stop_id: int | None
    """The token that has to end it."""
    message: int
    """Index of the message that it begins with."""


@dataclass(frozen=True)
class _Rendered:
    """A row as text, before it is tokenized."""

    row: Row
    text: str
    spans: tuple[_Span, ...]


def encode_rows(rows: Sequence[Row], tokenizer: Tokenizer, loss_on: LossOn) -> list[Sample | BadRow]:
    """Tokenize rows and mark what is trained; for a row that cannot be trained on exactly, why.

    Raises UserError for what is wrong with the tokenizer rather than a row, such as no chat template.
    """
    samples: list[Sample | BadRow] = []
    for start in range(0, len(rows), _CHUNK_ROWS):
        samples.extend(_encode_chunk(rows[start : start + _CHUNK_ROWS], tokenizer, loss_on))
    return samples


def _encode_chunk(rows: Sequence[Row], tokenizer: Tokenizer, loss_on: LossOn) -> list[Sample | BadRow]:
    results: dict[int, Sample | BadRow] = {}
    rendered: dict[int, _Rendered] = {}
    plain = [i for i, row in enumerate(rows) if not row.messages]
    for i, row in enumerate(rows):
        if row.messages:
            try:
                rendered[i] = _render(row, tokenizer, loss_on)
            except BadRow as bad:
                results[i] = bad
    encoded = tokenizer.encode_with_offsets([r.text for r in rendered.values()])
    for (i, conversation), (tokens, offsets) in zip(rendered.items(), encoded, strict=True):
        try:
            results[i] = _sample(rows[i], tokens, _conversation_weights(conversation, tokens, offsets, tokenizer))
        except BadRow as bad:
            results[i] = bad
    texts = [rows[i].text or rows[i].prompt + rows[i].completion for i in plain]
    for i, (tokens, offsets) in zip(plain, tokenizer.encode_with_offsets(texts, add_special_tokens=True), strict=True):
        try:
            results[i] = _plain_sample(rows[i], tokens, offsets, tokenizer, loss_on)
        except BadRow as bad:
            results[i] = bad
    return [results[i] for i in range(len(rows))]


def _sample(row: Row, tokens: Int32[np.ndarray, "n"], weights: Float32[np.ndarray, "n"]) -> Sample:
    weights[:1] = 0  # nothing stands before a segment's first token to predict it from
    if not weights.any():
        raise BadRow(row.file, row.line, "", "no token of this row would be trained; fix: leave it out")
    return Sample(tokens, weights, row.file, row.line)


# ---- plain text -----------------------------------------------------------------------------------------------------


def _plain_sample(
    row: Row,
    tokens: Int32[np.ndarray, "n"],
    offsets: Int32[np.ndarray, "n 2"],
    tokenizer: Tokenizer,
    loss_on: LossOn,
) -> Sample:
    """A text, or a prompt and completion in strings: as a generation from plain text would be fed, ended with eos."""
    if tokenizer.eos_id is None:
        raise UserError(
            f"{row.file}:{row.line}: a plain text must end with the tokenizer's end token, and {tokenizer.source} has "
            "none; fix: set tokenizer.eos_token"
        )
    start = 0
    if row.kind == "prompt_completion" and loss_on != "all":
        start = _completion_start(row.prompt, tokens, offsets, tokenizer)
    if tokens.size == 0 or tokens[-1] != tokenizer.eos_id:
        tokens = np.append(tokens, np.int32(tokenizer.eos_id))
    weights = np.zeros(len(tokens), np.float32)
    weights[start:] = 1
    return _sample(row, tokens, weights)


def _completion_start(
    prompt: str, tokens: Int32[np.ndarray, "n"], offsets: Int32[np.ndarray, "n 2"], tokenizer: Tokenizer
) -> int:
    """Index of the first token of the completion. A token that holds characters of both belongs to the prompt."""
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=True)
    if tokens[: len(prompt_ids)].tolist() == prompt_ids:
        return len(prompt_ids)
    behind = offsets[:, 0] >= len(prompt)
    start = int(behind.argmax()) if behind.any() else len(tokens)
    # Some tokenizers leave a token's leading space out of its offsets: what no earlier token covers is in this one.
    covered = int(offsets[:start, 1].max(initial=0))
    return start + 1 if covered < len(prompt) else start


# ---- conversations: rendering ---------------------------------------------------------------------------------------


def _render(row: Row, tokenizer: Tokenizer, loss_on: LossOn) -> _Rendered:
    """Render the whole conversation and find the text that is trained. Raises BadRow."""
    turns = _trained_turns(row, loss_on)
    try:
        text = tokenizer.render(row.messages)
    except RenderError as error:
        raise BadRow(row.file, row.line, "", f"{error}; fix: the row, or another chat template") from error
    left_out = tokenizer.roles_left_out(tuple(message["role"] for message in row.messages))
    if left_out:
        role = row.messages[left_out[0]]["role"]
        reason = f"the chat template leaves this message out (role {role!r}); fix: another role, or another template"
        raise BadRow(row.file, row.line, f"{row.message_key(left_out[0])}.role", reason)
    if loss_on == "all":
        spans = [_Span(start=0, end=None, stop_id=None, message=0)]
    elif loss_on == "completion":
        spans = [_completion_span(row, text, tokenizer)]
    else:
        spans = [_turn_span(row, index, text, tokenizer) for index in turns]
    return _Rendered(row, text, tuple(spans))


def _trained_turns(row: Row, loss_on: LossOn) -> list[int]:
    """Indices of the assistant turns to train, none for the ways to train that do not go by turns."""
    if loss_on == "completion" and row.kind != "prompt_completion":
        reason = (
            "data.loss_on is completion, but this row does not say where its prompt ends; "
            "fix: loss_on assistant or last_assistant, or columns prompt and completion"
        )
        raise BadRow(row.file, row.line, "messages", reason)
    if loss_on in ("completion", "all"):
        return []
    part = "messages" if row.kind == "messages" else "completion"
    turns = [i for i, m in enumerate(row.messages) if m["role"] == "assistant" and i >= row.prompt_length]
    if not turns:
        reason = "has no assistant message: nothing to train on; fix: add the answer, or leave the row out"
        raise BadRow(row.file, row.line, part, reason)
    turns = turns[-1:] if loss_on == "last_assistant" else turns
    for index in turns:
        key = row.message_key(index)
        if not row.messages[index]["content"].strip():
            reason = "is empty: the model would learn to say nothing; fix: leave the turn out, or the row"
            raise BadRow(row.file, row.line, f"{key}.content", reason)
        if index == 0:
            reason = "the conversation begins with the assistant: no prompt leads to this turn; fix: put one before it"
            raise BadRow(row.file, row.line, key, reason)
    return turns


def _render_prompt(row: Row, tokenizer: Tokenizer, stop: int, *, generation: bool = True) -> str:
    """What the model is fed before it produces message `stop`."""
    try:
        return tokenizer.render(row.messages[:stop], add_generation_prompt=generation)
    except RenderError as error:
        reason = f"what comes before cannot be rendered alone, as it would be at inference: {error}"
        raise BadRow(row.file, row.line, row.message_key(stop), reason) from error


def _turn_span(row: Row, index: int, text: str, tokenizer: Tokenizer) -> _Span:
    """The trained text of the assistant turn `index`, from behind its generation prompt through its stop token."""
    key = row.message_key(index)
    fed = _render_prompt(row, tokenizer, index)
    last = index == len(row.messages) - 1
    upto = text if last else _render_prompt(row, tokenizer, index + 1, generation=False)
    if not upto.startswith(fed):
        reason = (
            f"the turn does not begin as the chat template's generation prompt does: {_difference(fed, upto)}; "
            "fix: content that begins so, or another chat template"
        )
        raise BadRow(row.file, row.line, key, reason)
    end, stop_id = _turn_end(row, index, upto, len(fed), tokenizer)
    if not text.startswith(upto[:end]):
        reason = (
            "the chat template renders this turn differently once later messages follow, so that what is trained is "
            f"not what the model is fed: {_difference(upto[:end], text)}; fix: one assistant turn a row, or "
            "data.loss_on last_assistant, or a chat template that leaves earlier turns as they were"
        )
        raise BadRow(row.file, row.line, key, reason)
    return _Span(start=len(fed), end=end, stop_id=stop_id, message=index)


def _turn_end(row: Row, index: int, upto: str, start: int, tokenizer: Tokenizer) -> tuple[int, int]:
    """Where the turn that ends the text `upto` ends, behind its stop token, and the token's id. Raises BadRow."""
    stop = tokenizer.stop_at_end(upto, start)
    key, content = row.message_key(index), row.messages[index]["content"]
    for token in tokenizer.stop_texts:
        if token in content:
            reason = f"holds the stop token {token!r}: generation would end there; fix: remove it"
            raise BadRow(row.file, row.line, f"{key}.content", reason)
    if stop is not None:
        token = tokenizer.added_texts[stop[1]]
        if token not in content:
            return stop[0] + len(token), stop[1]
    reason = (
        f"the chat template does not end the assistant's turn with a special token (it ends with {upto[-24:]!r}), so "
        "the model would never learn to stop; fix: a template that does"
    )
    raise BadRow(row.file, row.line, key, reason)


def _completion_span(row: Row, text: str, tokenizer: Tokenizer) -> _Span:
    """All behind the prompt; if an assistant turn is the end, through its stop token."""
    first, last = row.prompt_length, len(row.messages) - 1
    fed = _render_prompt(row, tokenizer, first, generation=row.messages[first]["role"] == "assistant")
    if not text.startswith(fed):
        reason = (
            f"the completion does not continue the rendered prompt: {_difference(fed, text)}; "
            "fix: data.loss_on last_assistant, or another chat template"
        )
        raise BadRow(row.file, row.line, "completion", reason)
    if row.messages[last]["role"] != "assistant":
        return _Span(start=len(fed), end=None, stop_id=None, message=first)
    end, stop_id = _turn_end(row, last, text, len(fed), tokenizer)
    return _Span(start=len(fed), end=end, stop_id=stop_id, message=first)


def _common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many elements two sequences have in common at the start."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def _difference(expected: str, found: str) -> str:
    """Where two texts part, in a few words."""
    at = _common_prefix(expected, found)
    return f"{expected[at : at + 24]!r} against {found[at : at + 24]!r} behind {expected[max(0, at - 16) : at]!r}"


# ---- conversations: tokens ------------------------------------------------------------------------------------------


def _conversation_weights(
    conversation: _Rendered, tokens: Int32[np.ndarray, "n"], offsets: Int32[np.ndarray, "n 2"], tokenizer: Tokenizer
) -> Float32[np.ndarray, "n"]:
    """1 on the tokens of the spans, once each boundary is verified in token ids. Raises BadRow."""
    weights = np.zeros(len(tokens), np.float32)
    cuts = np.flatnonzero(tokenizer.is_cut(tokens))
    for span in conversation.spans:
        start = _start_token(conversation, span, tokens, offsets, cuts, tokenizer) if span.start else 0
        end = len(tokens) if span.end is None else _end_token(conversation, span, tokens, offsets)
        weights[start:end] = 1
    return weights


def _start_token(
    conversation: _Rendered,
    span: _Span,
    tokens: Int32[np.ndarray, "n"],
    offsets: Int32[np.ndarray, "n 2"],
    cuts: Int[np.ndarray, "c"],
    tokenizer: Tokenizer,
) -> int:
    """How many tokens the model is fed before the span, once they are the first tokens of the row.

    Text is tokenized piece by piece between added tokens, so only what follows the last of them (`cuts`) before the
    boundary can come out differently when the text ends there. The text from that token on is a turn's header, the same
    in every row: its ids are remembered.
    """
    text = conversation.text
    before = int(np.searchsorted(offsets[cuts, 1], span.start, side="right")) - 1
    if before >= 0:
        cut = int(cuts[before])
        header = tokenizer.encode_cached(text[offsets[cut, 0] : span.start])
        if tuple(tokens[cut : cut + len(header)].tolist()) == header:
            return cut + len(header)
    fed = tokenizer.encode(text[: span.start])
    if tokens[: len(fed)].tolist() == fed:
        return len(fed)
    row, at = conversation.row, _common_prefix(tokens.tolist(), fed)
    content = row.messages[span.message]["content"]
    fix = "no whitespace at its start" if content[:1].isspace() else "a chat template made for this tokenizer"
    has, needed = tokenizer.decode(tokens[at : at + 1].tolist()), tokenizer.decode(fed[at : at + 1])
    reason = (
        f"is tokenized together with the end of its prompt: the row has {has!r} where the model is fed {needed!r} "
        f"at inference; fix: {fix}"
    )
    raise BadRow(row.file, row.line, f"{row.message_key(span.message)}.content", reason)


def _end_token(
    conversation: _Rendered, span: _Span, tokens: Int32[np.ndarray, "n"], offsets: Int32[np.ndarray, "n 2"]
) -> int:
    """Index behind the span's stop token."""
    last = int((offsets[:, 1] >= span.end).argmax())
    if tokens[last] != span.stop_id:
        row = conversation.row
        reason = "the tokenizer does not cut the turn's stop token out of the text; fix: make it a special token"
        raise BadRow(row.file, row.line, row.message_key(span.message), reason)
    return last + 1
