"""A vocabulary that grows: which embedding rows belong to tokens that the model has never seen, and what they start as.

`experiment.py` grows the config before anything is placed, `hf.py` fills the rows while it reads the weights; a resumed
run takes them from its checkpoint, like any other.

Every new row, of the input embedding as of an untied head, starts as the mean of the rows of the tokens that the
tokenizer had before. A new token's logit is then the mean of the old ones, so its probability is at most their average
and the old tokens keep theirs almost unchanged (Hewitt 2021, Initializing New Word Embeddings for Pretrained Language
Models); small random rows have logits about 0, which may be far above all others. The mean is summed in float64 from
the files, block by block and only over the dims of a device's part: it is the same on every mesh, and no host holds the
embedding.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Bool, Float64, Shaped

from posttrain.data.tokenizer import Tokenizer
from posttrain.errors import UserError
from posttrain.models.architecture import DecoderConfig

log = logging.getLogger(__name__)

BLOCK_ROWS = 1024
"""Rows that are read at a time for the mean."""


@dataclass(frozen=True)
class NewRows:
    """Embedding rows without a trained value."""

    tokens: Mapping[str, int] = field(default_factory=dict)
    """The new tokens and their ids, which are consecutive."""
    known: int = 0
    """The rows below belong to tokens that the tokenizer had before."""

    def __bool__(self) -> bool:
        return bool(self.tokens)

    def mask(self, start: int, stop: int) -> Bool[np.ndarray, "rows"]:
        """Which of the rows `start` to `stop` are new."""
        return np.isin(np.arange(start, stop), list(self.tokens.values()))

    def describe(self, asked: Sequence[str]) -> str:
        """What became of the tokens that were to be added, in one line."""
        shown = ", ".join(f"{token} {id}" for token, id in self.tokens.items())
        parts = [f"{shown} (rows start as the mean of the {self.known:,} before)"] if shown else ["none"]
        kept = [token for token in asked if token not in self.tokens]
        return "; ".join(parts + ([f"in the vocabulary already, rows kept: {', '.join(kept)}"] if kept else []))


def grow_vocabulary(config: DecoderConfig, tokenizer: Tokenizer) -> tuple[DecoderConfig, NewRows]:
    """The config with a row for every new token, and which rows are new; the tokenizer learns how many rows there are.

    New tokens take rows that the model has beyond its tokenizer's vocabulary, if it has some. A tokenizer may have
    special tokens beyond the model's rows, as that of Gemma 3 has one for pictures: as long as none is added behind
    them they stay without a row, and text that holds one is refused; otherwise they get new rows too. Raises
    `UserError` where the tokenizer is that of another model.
    """
    known = tokenizer.vocab_size - len(tokenizer.new_tokens)
    without_row = {t: i for t, i in tokenizer.special_tokens.items() if config.vocab_size <= i < known}
    if known > config.vocab_size + len(without_row):
        raise UserError(
            f"tokenizer: it has {known} tokens, the model's embedding only {config.vocab_size}; "
            "they do not belong together (check tokenizer.path)"
        )
    new = without_row | tokenizer.new_tokens if tokenizer.new_tokens else {}
    grown = replace(config, vocab_size=max(config.vocab_size, *(id + 1 for id in new.values()), 0))
    # Of several models that a run uses, the smallest counts.
    tokenizer.embedding_rows = min(grown.vocab_size, tokenizer.embedding_rows or grown.vocab_size)
    if tokenizer.tokens_without_row:
        names = ", ".join(tokenizer.tokens_without_row)
        log.info("tokenizer: %s: the model has no embedding for it; rows whose text holds it are refused", names)
    return grown, NewRows(new, min(known, config.vocab_size))


def mean_row(read: Callable[[int, int], Shaped[np.ndarray, "rows *dims"]], count: int) -> Float64[np.ndarray, "*dims"]:
    """Mean of the rows 0 to `count`; `read(start, stop)` gives some of them."""
    total = np.zeros((), np.float64)
    for start in range(0, count, BLOCK_ROWS):
        total = total + read(start, min(start + BLOCK_ROWS, count)).astype(np.float64).sum(axis=0)
    return total / count
