"""Samples as they are trained on: truncated, filtered, split into training and held-out ones, and counted.

A view on the token caches, between them and the packed rows of `pipeline.py`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from posttrain.data.cache import TokenCache
from posttrain.data.packing import random_stream
from posttrain.errors import UserError

_FIXES = {
    "without a token to train on": "check data.loss_on against the rows",
    "longer than data.max_length": "raise data.max_length, or set data.truncation to keep_start",
    "without a token to train on after truncation": "raise data.max_length, or try another data.truncation",
}
"""Why a sample is dropped, and what helps."""
_UNTRAINED, _TOO_LONG, _TRUNCATED_AWAY = _FIXES


@dataclass(frozen=True)
class SourceStats:
    """What became of one data file."""

    path: str
    samples: int
    """Kept, before the held-out split."""
    tokens: int
    """Of the kept samples, truncated."""
    trained_tokens: int
    truncated: int
    """Kept samples that lost tokens to `max_length`."""
    dropped: Mapping[str, int]
    """Samples left out, by reason."""
    bad_rows: int
    """Rows of which no sample could be made."""


@dataclass(frozen=True)
class SampleTable:
    """The samples of several caches as they are trained on: truncated, and each with a token to train on."""

    caches: tuple[TokenCache, ...]
    source: Int[np.ndarray, "samples"]
    """Which cache each sample lies in."""
    starts: Int[np.ndarray, "samples"]
    """Its first token in that cache."""
    lengths: Int[np.ndarray, "samples"]
    trained: Int[np.ndarray, "samples"]
    """Tokens with a loss weight; never 0."""
    truncated: Bool[np.ndarray, "samples"]

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples."""
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def num_trained_tokens(self) -> int:
        """Tokens with a loss weight."""
        return int(self.trained.sum(dtype=np.int64))

    def take(self, indices: np.ndarray) -> "SampleTable":
        """The samples at `indices` (numbers, or a bool for each)."""
        columns = (self.source, self.starts, self.lengths, self.trained, self.truncated)
        return SampleTable(self.caches, *(column[indices] for column in columns))

    def numbers(self) -> Int[np.ndarray, "samples"]:
        """Each sample's number among all samples of the caches, which no filter or truncation changes."""
        numbers = np.zeros(len(self), np.int64)
        first = 0
        for source, cache in enumerate(self.caches):
            of_this = self.source == source
            numbers[of_this] = first + np.searchsorted(cache.offsets, self.starts[of_this], side="right") - 1
            first += cache.num_samples
        return numbers

    def where(self, index: int) -> str:
        """`file:line` of a sample."""
        cache = self.caches[self.source[index]]
        return f"{cache.path}:{cache.lines[np.searchsorted(cache.offsets, self.starts[index], side='right') - 1]}"


def sample_table(
    caches: Sequence[TokenCache], *, max_length: int, truncation: str
) -> tuple[SampleTable, tuple[SourceStats, ...]]:
    """Applies the truncation policy, and leaves out samples that then have no token to train on.

    `truncation` keeps the first (`keep_start`) or the last (`keep_end`) `max_length` tokens of an over-long sample, or
    drops it (`drop`). A sample's first token is never trained on, whatever its weight: nothing predicts it.
    """
    tables, stats = [], []
    for source, cache in enumerate(caches):
        lengths = np.diff(cache.offsets)
        over_long = lengths > max_length
        starts = cache.offsets[:-1] + np.where(over_long & (truncation == "keep_end"), lengths - max_length, 0)
        trained = cache.trained.copy()
        for sample in np.flatnonzero(over_long):
            start = int(starts[sample])
            trained[sample] = np.count_nonzero(cache.loss_weights[start + 1 : start + max_length])
        reasons = {
            _UNTRAINED: cache.trained == 0,
            _TOO_LONG: over_long & (truncation == "drop"),
            _TRUNCATED_AWAY: trained == 0,
        }
        kept = np.ones(cache.num_samples, bool)
        dropped = {}
        for reason, mask in reasons.items():
            dropped[reason] = int(np.count_nonzero(mask & kept))
            kept &= ~mask
        whole = SampleTable(
            tuple(caches),
            np.full(cache.num_samples, source, np.int32),
            starts,
            np.minimum(lengths, max_length).astype(np.int32),
            trained,
            over_long,
        )
        table = whole.take(kept)
        tables.append(table)
        stats.append(
            SourceStats(
                path=cache.path,
                samples=len(table),
                tokens=table.num_tokens,
                trained_tokens=table.num_trained_tokens,
                truncated=int(np.count_nonzero(table.truncated)),
                dropped={reason: count for reason, count in dropped.items() if count},
                bad_rows=cache.bad_rows,
            )
        )
    columns = ("source", "starts", "lengths", "trained", "truncated")
    joined = (np.concatenate([getattr(table, column) for table in tables]) for column in columns)
    return SampleTable(tuple(caches), *joined), tuple(stats)


def split_heldout(
    table: SampleTable, fraction: float, *, seed: int
) -> tuple[Int[np.ndarray, "train"], Int[np.ndarray, "heldout"]]:
    """(training, held-out) samples, both in order: a random `fraction`, at least one of two or more.

    Each sample draws its lot by its number in the data, so another `max_length` holds out nearly the same samples.
    """
    count = max(1, round(len(table) * fraction)) if fraction > 0 and len(table) > 1 else 0
    numbers = table.numbers()
    lots = random_stream("heldout", seed=seed).random_raw(int(numbers.max(initial=-1)) + 1)[numbers]
    order = np.argsort(lots, kind="stable")
    return np.sort(order[count:]), np.sort(order[:count])


def check_kept(key: str, stats: Sequence[SourceStats]) -> None:
    """Refuses data of which most is dropped: then it is the config that is wrong, not some samples.

    Raises:
      UserError: names the config key, how many samples are dropped for which reasons, and what helps.
    """
    kept = sum(source.samples for source in stats)
    dropped = sum((Counter(source.dropped) for source in stats), Counter())
    if dropped.total() > kept:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        fixes = "; ".join(_FIXES[reason] for reason in dropped)
        raise UserError(f"{key}: {dropped.total()} of {kept + dropped.total()} samples drop out ({reasons}); {fixes}")
    if kept == 0:
        raise UserError(f"{key}: no sample is left: all {sum(source.bad_rows for source in stats)} rows are bad")
