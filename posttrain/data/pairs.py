"""Preference rows to pairs of token sequences: the way of `chat.py` for objectives that compare two answers.

Each side of a pair is encoded as the prompt with that answer would be for fine-tuning, so what is trained of it, and
what is refused, is the same. Both sides begin with the same prompt, token by token. A pair is one `Sample`: the chosen
side first, then the rejected one, each with its prompt.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from posttrain.data.chat import Sample, encode_rows
from posttrain.data.files import BadRow
from posttrain.data.rows import Row
from posttrain.data.tokenizer import Tokenizer

RowsKind = Literal["single", "pairs"]
"""What an objective is trained on: single samples, or pairs of answers to one prompt."""


def encode_pairs(
    rows: Sequence[Row], tokenizer: Tokenizer, loss_on: tuple[str, ...] = ("assistant",)
) -> list[tuple[Sample, ...] | BadRow]:
    """The pair of each preference row, as `encode_rows` returns samples; of other rows, and of pairs whose sides do not
    agree, why not."""
    results: list[tuple[Sample, ...] | BadRow | None] = [_unfit(row) for row in rows]
    sides = [side for row, bad in zip(rows, results, strict=True) if bad is None for side in _sides(row)]
    encoded = iter(encode_rows(sides, tokenizer, loss_on))
    for i, row in enumerate(rows):
        if results[i] is None:
            results[i] = _pair(row, next(encoded), next(encoded))
    return [result for result in results if result is not None]


def _unfit(row: Row) -> BadRow | None:
    """Why a row is no pair of different answers."""
    if row.kind != "preference":
        reason = (
            f"the row is of the kind {row.kind}, and this objective compares pairs; fix: columns chosen and rejected"
        )
        return BadRow(row.file, row.line, "", reason)
    if row.messages == row.rejected_messages and row.completion == row.rejected:
        return BadRow(
            row.file, row.line, "rejected", "is the same as chosen: there is nothing to prefer; fix: leave it out"
        )
    return None


def _sides(row: Row) -> tuple[Row, Row]:
    """The chosen and the rejected answer, each as a row of prompt and completion."""
    chosen = replace(row, kind="prompt_completion", rejected="", rejected_messages=(), margin=None)
    return chosen, replace(
        chosen, messages=row.rejected_messages, completion=row.rejected, weights=(), keys=(), origin="rejected"
    )


def _pair(
    row: Row, chosen: tuple[Sample, ...] | BadRow, rejected: tuple[Sample, ...] | BadRow
) -> tuple[Sample, ...] | BadRow:
    parts = []
    for side, name in ((chosen, "chosen"), (rejected, "rejected")):
        if isinstance(side, BadRow):
            return side
        first, *others = side
        if others:
            reason = "the chat template renders its turns differently once others follow, so it is no single sequence; "
            return BadRow(row.file, row.line, name, reason + "fix: data.loss_on last_assistant, or another template")
        if not first.loss_weights.any():
            return BadRow(row.file, row.line, name, "has no trained token; fix: weights by message, or data.loss_on")
        parts.append(first)
    one, other = parts
    prompt, other_prompt = (part.tokens[: np.flatnonzero(part.loss_weights)[0]] for part in parts)
    if not np.array_equal(prompt, other_prompt):
        reason = "chosen and rejected do not begin with the same prompt, token by token; fix: the same prompt for both"
        return BadRow(row.file, row.line, "rejected", reason)
    return (
        Sample(
            np.concatenate([one.tokens, other.tokens]),
            np.concatenate([one.loss_weights, other.loss_weights]),
            row.file,
            row.line,
            tuple(dict.fromkeys((*one.notes, *other.notes))),
            split=len(one.tokens),
            margin=row.margin or 0.0,
        ),
    )
