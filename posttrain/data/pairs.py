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
from posttrain.data.problems import Problems
from posttrain.data.rows import Row
from posttrain.data.tokenizer import Tokenizer

RowsKind = Literal["single", "pairs", "labelled"]
"""What an objective is trained on: single samples, pairs of answers to one prompt, or answers labelled good or bad."""


def encode_pairs(
    rows: Sequence[Row], tokenizer: Tokenizer, loss_on: tuple[str, ...] = ("assistant",)
) -> list[tuple[Sample, ...] | BadRow]:
    """The pair of each preference row, as `encode_rows` returns samples; of other rows, and of pairs whose sides do not
    agree, why not."""
    results: list[tuple[Sample, ...] | BadRow | None] = [check_pair(row) for row in rows]
    sides = [side for row, bad in zip(rows, results, strict=True) if bad is None for side in sides_of(row)]
    encoded = iter(encode_rows(sides, tokenizer, loss_on))
    for i, row in enumerate(rows):
        if results[i] is None:
            results[i] = _pair(row, next(encoded), next(encoded))
    return [result for result in results if result is not None]


def check_pair(row: Row) -> BadRow | None:
    """Why a row is no pair of different answers."""
    if row.kind == "messages" and row.keys and row.keys[0] == row.origin:  # only a tree's root is a whole column
        reason = "the row is a conversation of a message tree, and this objective compares pairs; "
        return BadRow(
            row.file, row.line, row.origin, reason + "fix: the source's tree: pairs (--data.train.0.tree pairs)"
        )
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


def sides_of(row: Row) -> tuple[Row, Row]:
    """The chosen and the rejected answer, each as a row of prompt and completion."""
    chosen = replace(row, kind="prompt_completion", rejected="", rejected_messages=(), margin=None)
    return chosen, replace(
        chosen,
        messages=row.rejected_messages,
        completion=row.rejected,
        weights=(),
        keys=row.rejected_keys,
        origin="rejected",
    )


def whole_answer(row: Row, side: tuple[Sample, ...] | BadRow, name: str) -> Sample | BadRow:
    """The one sample of an answer, or why it is none; `name` is what the row calls it."""
    if isinstance(side, BadRow):
        return side
    first, *others = side
    if others:
        reason = "the chat template renders its turns differently once others follow, so it is no single sequence; "
        return BadRow(row.file, row.line, name, reason + "fix: data.loss_on last_assistant, or another template")
    if not first.loss_weights.any():
        return BadRow(row.file, row.line, name, "has no trained token; fix: weights by message, or data.loss_on")
    return first


def _pair(
    row: Row, chosen: tuple[Sample, ...] | BadRow, rejected: tuple[Sample, ...] | BadRow
) -> tuple[Sample, ...] | BadRow:
    one, other = whole_answer(row, chosen, "chosen"), whole_answer(row, rejected, "rejected")
    if isinstance(one, BadRow) or isinstance(other, BadRow):
        problems = Problems()
        for bad in (part for part in (one, other) if isinstance(part, BadRow)):
            problems.add(bad.key, bad.reason)
        return problems.bad_row(row.file, row.line)
    prompt, other_prompt = (part.tokens[: np.flatnonzero(part.loss_weights)[0]] for part in (one, other))
    if not np.array_equal(prompt, other_prompt):
        reason = "chosen and rejected do not begin with the same prompt, token by token; fix: the same prompt for both"
        return BadRow(row.file, row.line, "rejected", reason)
    if np.array_equal(one.tokens, other.tokens):
        reason = "is the same as chosen, token by token: there is nothing to prefer; fix: leave it out"
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
