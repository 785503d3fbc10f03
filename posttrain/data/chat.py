"""Rows to token ids and which of them are trained: the heart of the data path, between `formats.py` and `packing.py`.

A token is trained when the model would have to produce it at inference. For a conversation that is read off the chat
template's own renderings (`turns.py`), and verified in token ids here: what stands before a trained turn is, token by
token, what the model is fed. Each sample's text is tokenized once and whole, so ids always equal
`apply_chat_template(messages, tokenize=True)`. Masks go by position, never by token id.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32

from posttrain.data.files import BadRow
from posttrain.data.rows import Row
from posttrain.data.tokenizer import RenderError, Tokenizer
from posttrain.data.turns import Rendered, Span, common_prefix, render_row
from posttrain.errors import UserError

_CHUNK_ROWS = 1024


@dataclass(frozen=True)
class Sample:
    """A tokenized row, or one of the parts of a conversation that had to be split."""

    tokens: Int32[np.ndarray, "n"]
    loss_weights: Float32[np.ndarray, "n"]
    """The weight with which the model learns to predict this token from those before it; the first is always 0."""
    file: str
    line: int
    notes: tuple[str, ...] = ()
    """What is worth counting about the row; on the first of its samples."""
    split: int = 0
    """Of a pair of answers: how many of the tokens are the chosen one, prompt included; the rest are the rejected one,
    with its prompt. 0 for a single sample."""
    label: int = 0
    """Of a labelled answer: 1 if it is desirable, -1 if not; else 0."""
    margin: float = 0.0
    """Of a pair: by how much the chosen answer is better, if the row says so."""
    begins: bool = True
    """Whether it is the first sample of its record, which may give several."""


def encode_rows(
    rows: Sequence[Row], tokenizer: Tokenizer, loss_on: tuple[str, ...] = ("assistant",)
) -> list[tuple[Sample, ...] | BadRow]:
    """Tokenize rows and mark what is trained: the samples of each row, one or more; for a row that cannot be trained on
    exactly, why.

    `loss_on` as in `DataConfig`. A sample without a trained token (all its weights are 0 by the row's own weights) is
    returned too. Raises UserError for what is wrong with the tokenizer rather than a row, such as no chat template.
    """
    results: list[tuple[Sample, ...] | BadRow] = []
    for start in range(0, len(rows), _CHUNK_ROWS):
        results.extend(_encode_chunk(rows[start : start + _CHUNK_ROWS], tokenizer, loss_on))
    return results


def _encode_chunk(
    rows: Sequence[Row], tokenizer: Tokenizer, loss_on: tuple[str, ...]
) -> list[tuple[Sample, ...] | BadRow]:
    results: dict[int, tuple[Sample, ...] | BadRow] = {}
    rendered: dict[int, tuple[Rendered, ...]] = {}
    plain = [i for i, row in enumerate(rows) if not row.messages and row.kind in ("text", "prompt_completion")]
    for i in sorted(set(range(len(rows))) - set(plain)):
        try:
            rendered[i] = render_row(rows[i], tokenizer, loss_on)
        except BadRow as bad:
            results[i] = bad
    encoded = iter(tokenizer.encode_with_offsets([r.text for parts in rendered.values() for r in parts]))
    for i, parts in rendered.items():
        ids = [next(encoded) for _ in parts]
        try:
            results[i] = tuple(
                _conversation_sample(part, tokens, offsets, tokenizer)
                for part, (tokens, offsets) in zip(parts, ids, strict=True)
            )
        except BadRow as bad:
            results[i] = bad
    texts = [rows[i].text or rows[i].prompt + rows[i].completion for i in plain]
    for i, (tokens, offsets) in zip(plain, tokenizer.encode_with_offsets(texts, add_special_tokens=True), strict=True):
        try:
            results[i] = (_plain_sample(rows[i], tokens, offsets, tokenizer, loss_on),)
        except BadRow as bad:
            results[i] = bad
    return [results[i] for i in range(len(rows))]


def template_marks(row: Row, tokenizer: Tokenizer) -> tuple[Int32[np.ndarray, "n"], Bool[np.ndarray, "n"]] | None:
    """The ids of a conversation rendered whole, and which of them the template's own `{% generation %}` marks cover;
    None where it has no marks, or refuses the row."""
    if not row.messages or not tokenizer.template(row.tools).has_marks:
        return None
    try:
        text = tokenizer.render(row.messages, tools=row.tools, template_kwargs=row.template_kwargs)
        spans = tokenizer.template(row.tools).marks(row.messages, row.tools, row.template_kwargs)
    except RenderError:
        return None
    ((tokens, offsets),) = tokenizer.encode_with_offsets([text])
    marked = np.zeros(len(tokens), bool)
    for start, end in spans:
        marked |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
    return tokens, marked


def _check_rows(row: Row, tokens: Int32[np.ndarray, "n"], tokenizer: Tokenizer) -> None:
    """Raises BadRow where the model has no embedding for one of the tokens."""
    if tokenizer.embedding_rows is not None and tokens.max(initial=0) >= tokenizer.embedding_rows:
        token = tokenizer.decode(tokens[tokens >= tokenizer.embedding_rows][:1].tolist())
        reason = f"{token!r} is a token that the model has no embedding for; fix: take it out of the text"
        raise BadRow(row.file, row.line, "", reason)


# ---- plain text -----------------------------------------------------------------------------------------------------


def _plain_sample(
    row: Row,
    tokens: Int32[np.ndarray, "n"],
    offsets: Int32[np.ndarray, "n 2"],
    tokenizer: Tokenizer,
    loss_on: tuple[str, ...],
) -> Sample:
    """A text, or a prompt and completion in strings: as a generation from plain text would be fed, ended with eos."""
    if tokenizer.eos_id is None:
        raise UserError(
            f"{row.file}:{row.line}: a plain text must end with the tokenizer's end token, and {tokenizer.source} has "
            "none; fix: set tokenizer.eos_token"
        )
    start = 0
    if row.kind == "prompt_completion" and loss_on != ("all",):
        start = _completion_start(row.prompt, tokens, offsets, tokenizer)
    if tokens.size == 0 or tokens[-1] != tokenizer.eos_id:
        tokens = np.append(tokens, np.int32(tokenizer.eos_id))
    weights = np.zeros(len(tokens), np.float32)
    weights[start:] = 1
    weights[:1] = 0  # nothing stands before a segment's first token to predict it from
    _check_rows(row, tokens, tokenizer)
    if not weights.any():
        raise BadRow(row.file, row.line, "", "no token of this row would be trained; fix: leave it out")
    return Sample(tokens, weights, row.file, row.line)


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


# ---- conversations --------------------------------------------------------------------------------------------------


def _conversation_sample(
    part: Rendered, tokens: Int32[np.ndarray, "n"], offsets: Int32[np.ndarray, "n 2"], tokenizer: Tokenizer
) -> Sample:
    """The spans' weights on their tokens, once each boundary is verified in token ids. Raises BadRow."""
    _check_rows(part.row, tokens, tokenizer)
    weights = np.zeros(len(tokens), np.float32)
    cuts = np.flatnonzero(tokenizer.is_cut(tokens))
    for span in part.spans:
        start = _start_token(part, span, tokens, offsets, cuts, tokenizer) if span.start else 0
        end = len(tokens) if span.end is None else _end_token(part, span, tokens, offsets)
        weights[start:end] = span.weight
    weights[:1] = 0  # nothing stands before a segment's first token to predict it from
    return Sample(tokens, weights, part.row.file, part.row.line, part.notes)


def _start_token(
    part: Rendered,
    span: Span,
    tokens: Int32[np.ndarray, "n"],
    offsets: Int32[np.ndarray, "n 2"],
    cuts: Int[np.ndarray, "c"],
    tokenizer: Tokenizer,
) -> int:
    """How many tokens stand before the span, once what the model is fed is how the row begins. Raises BadRow."""
    counts = {fed: _tokens_before(fed, part.text, tokens, offsets, cuts, tokenizer) for fed in (*span.fed, span.start)}
    start = counts[span.start]
    if start is not None and any(counts[fed] is not None for fed in span.fed):
        return start
    row, fed = part.row, tokenizer.encode(part.text[: span.fed[0]])
    at = common_prefix(tokens.tolist(), fed)
    content = row.messages[span.message].get("content", "")
    fix = "no whitespace at its start" if content[:1].isspace() else "a chat template made for this tokenizer"
    has, needed = tokenizer.decode(tokens[at : at + 1].tolist()), tokenizer.decode(fed[at : at + 1])
    reason = (
        f"is tokenized together with the end of its prompt: the row has {has!r} where the model is fed {needed!r} "
        f"at inference; fix: {fix}"
    )
    raise BadRow(row.file, row.line, f"{row.message_key(span.message)}.content", reason)


def _tokens_before(
    end: int,
    text: str,
    tokens: Int32[np.ndarray, "n"],
    offsets: Int32[np.ndarray, "n 2"],
    cuts: Int[np.ndarray, "c"],
    tokenizer: Tokenizer,
) -> int | None:
    """How many of the tokens are those of `text[:end]`; None where they are no start of them.

    Text is tokenized piece by piece between added tokens, so only what follows the last of them (`cuts`) before the
    boundary can come out differently when the text ends there. The text from that token on is a turn's header, the same
    in every row: its ids are remembered.
    """
    before = int(np.searchsorted(offsets[cuts, 1], end, side="right")) - 1
    if before >= 0:
        cut = int(cuts[before])
        header = tokenizer.encode_cached(text[offsets[cut, 0] : end])
        if tuple(tokens[cut : cut + len(header)].tolist()) == header:
            return cut + len(header)
    fed = tokenizer.encode(text[:end])
    return len(fed) if tokens[: len(fed)].tolist() == fed else None


def _end_token(part: Rendered, span: Span, tokens: Int32[np.ndarray, "n"], offsets: Int32[np.ndarray, "n 2"]) -> int:
    """Index behind the span's stop token."""
    last = int((offsets[:, 1] >= span.end).argmax())
    if span.stop_id is not None and tokens[last] != span.stop_id:
        row = part.row
        reason = "the tokenizer does not cut the turn's stop token out of the text; fix: make it a special token"
        raise BadRow(row.file, row.line, row.message_key(span.message), reason)
    return last + 1
