"""Tokens as the text that they stand for, piece by piece: what `inspect` shows, in the terminal and on its page."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32

from posttrain.data.tokenizer import Tokenizer

_LONGEST_CHARACTER = 32
"""Tokens that may make up one character; only broken text takes more than 4."""


@dataclass(frozen=True)
class Piece:
    """What is shown as one: a token, or the few that make up a character together."""

    start: int
    """Position of its first token."""
    ids: tuple[int, ...]
    text: str
    special: bool
    """Whether it is a special or added token, cut out before anything else is tokenized."""


def pieces(tokenizer: Tokenizer, tokens: Int32[np.ndarray, "n"]) -> list[Piece]:
    """The tokens as text; the texts end to end are what the tokenizer decodes all of them to.

    Byte-level tokens may hold parts of characters: such tokens are joined until the characters are whole. What is no
    character at all (a sample was cut within one) becomes U+FFFD.
    """
    ids: list[int] = tokens.tolist()
    found: list[Piece] = []
    context = start = 0  # what stands before `start` is done; from `context` on it decides on a space at the border
    before = ""

    def take(end: int, text: str, *, special: bool = False) -> None:
        nonlocal context, start, before
        found.append(Piece(start, tuple(ids[start:end]), text, special))
        context, start = start, end
        before = tokenizer.decode(ids[context:end])

    for end, token in enumerate(ids, 1):
        if token in tokenizer.added_ids:
            if start < end - 1:
                take(end - 1, tokenizer.decode(ids[context : end - 1])[len(before) :])
            take(end, tokenizer.added_texts[token], special=True)
            continue
        text = tokenizer.decode(ids[context:end])
        if not text.endswith("\ufffd") or end - start >= _LONGEST_CHARACTER:
            take(end, text[len(before) :])
    if start < len(ids):
        take(len(ids), tokenizer.decode(ids[context:])[len(before) :])
    return found
