"""Sample lengths -> which samples share a row: the packing plan, the step of the data path between tokens and batches.

The plan is global and a pure function of (lengths, options, seed, epoch, and the order that a mixture gives): no
process, worker or device count enters it, so every process computes the same one and reads only its own rows. Samples
are permuted, cut into windows of some thousand, and packed by best fit decreasing within each window: windows keep the
shuffle and the proportions of a mixture (a row only ever joins samples that came near each other), and memory stays at
a few integers a sample: about 25 bytes while planning, 4 and 12 a row in the plan.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int, UInt64

MIN_WINDOW = 1024
"""Below this many samples best fit has too little to choose from to fill its rows."""

_MIN_WINDOW_ROWS = 128
"""A window's last row may stay half empty; among this many that is of no account. Short samples widen the window."""

_CARRY_BELOW = 0.98
"""Rows of a window filled less than this try again with the next window's samples."""

_Stream = Literal["samples", "rows", "heldout", "limit", "passes"]
_STREAMS: dict[_Stream, int] = {"samples": 0, "rows": 1, "heldout": 2, "limit": 3, "passes": 4}


@dataclass(frozen=True)
class Plan:
    """Which samples lie in which row. Row `i` holds `sample_ids[row_offsets[i]:row_offsets[i + 1]]`, in that order."""

    row_length: int
    row_offsets: Int[np.ndarray, "rows_and_one"]
    sample_ids: Int[np.ndarray, "draws"]
    """Indices into the lengths that were planned; a sample that was drawn several times stands here as often."""
    row_tokens: Int[np.ndarray, "rows"]
    """Tokens in each row; the rest of `row_length` is padding."""

    @property
    def num_rows(self) -> int:
        """Rows of the epoch."""
        return len(self.row_tokens)

    @property
    def num_tokens(self) -> int:
        """Tokens in all rows."""
        return int(self.row_tokens.sum(dtype=np.int64))

    @property
    def efficiency(self) -> float:
        """Tokens per place in a row, 0 to 1; 1 for a plan without rows."""
        places = self.num_rows * self.row_length
        return self.num_tokens / places if places else 1.0

    def row(self, index: int) -> Int[np.ndarray, "segments"]:
        """The samples of row `index`, as indices into the lengths that were planned."""
        if not 0 <= index < self.num_rows:
            raise IndexError(f"row {index} of a plan with {self.num_rows} rows")
        return self.sample_ids[self.row_offsets[index] : self.row_offsets[index + 1]]


def random_stream(name: _Stream, *, seed: int, epoch: int = 0, source: int = 0) -> np.random.Philox:
    """Random 64-bit keys to sort by, through `.random_raw(count)`; `epoch` and `source` are whatever tells them apart.

    Raw Philox output, whose bits NumPy guarantees for all time; `Generator.permutation` carries no such promise, and a
    resumed run must find its data order again under another NumPy.
    """
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    return np.random.Philox(np.random.SeedSequence([seed, epoch, _STREAMS[name], source]))


def sorting_order(keys: UInt64[np.ndarray, "items"]) -> Int[np.ndarray, "items"]:
    """Indices that sort the keys, equal ones in their order: int32 where that is wide enough."""
    return np.argsort(keys, kind="stable").astype(index_dtype(len(keys)), copy=False)


def index_dtype(count: int) -> type[np.signedinteger]:
    """The smallest of int32 and int64 that numbers `count` things."""
    return np.int32 if count < 2**31 else np.int64


def plan_rows(
    lengths: Int[np.ndarray, "samples"],
    row_length: int,
    *,
    seed: int,
    epoch: int,
    packing: bool = True,
    shuffle: bool = True,
    order: Int[np.ndarray, "draws"] | None = None,
    window: int = 4096,
    max_segments: int | None = None,
) -> Plan:
    """The rows of one epoch.

    Args:
      lengths: tokens of each sample, 1 to `row_length`.
      row_length: places in a row.
      seed: with `epoch`, chooses the permutation of the samples and the order of the rows.
      epoch: counts from 0.
      packing: False gives every sample a row of its own.
      shuffle: False keeps the samples' order, up to what packing within a window moves.
      order: which samples to plan, in which order instead of that of `shuffle` (which still decides on the order of the
        rows); they may repeat and need not be all.
      window: samples packed together, at least `MIN_WINDOW`; widened where they make fewer than 128 rows.
      max_segments: most samples in a row; None for no limit.

    Every sample, or entry of `order`, lies in exactly one row: among those of its window, or of the next when its row
    found no company.

    Raises:
      ValueError: a length outside 1..row_length, a window below `MIN_WINDOW`, `max_segments` below 1.
    """
    if window < MIN_WINDOW:
        raise ValueError(f"window must be at least {MIN_WINDOW} samples, got {window}")
    if max_segments is not None and max_segments < 1:
        raise ValueError(f"max_segments must be at least 1, got {max_segments}")
    outside = np.flatnonzero((lengths < 1) | (lengths > row_length))
    if outside.size:
        first = int(outside[0])
        raise ValueError(f"sample {first} has {lengths[first]} tokens; a row holds samples of 1 to {row_length}")

    count = len(lengths)
    if order is None:
        order = np.arange(count, dtype=index_dtype(count))
        if shuffle:
            order = sorting_order(random_stream("samples", seed=seed, epoch=epoch).random_raw(count))
    if not packing:
        return Plan(row_length, np.arange(len(order) + 1), order, lengths[order])
    tokens = int(lengths[order].sum(dtype=np.int64))
    window = max(window, -(-_MIN_WINDOW_ROWS * row_length * len(order) // max(tokens, 1)))
    row_stream = random_stream("rows", seed=seed, epoch=epoch) if shuffle else None
    return _pack_windows(lengths, order, row_length, window, max_segments, row_stream)


def _pack_windows(
    lengths: Int[np.ndarray, "samples"],
    order: Int[np.ndarray, "draws"],
    row_length: int,
    window: int,
    max_segments: int | None,
    row_stream: np.random.Philox | None,
) -> Plan:
    """The rows of one window after another.

    A window's rows come in random order, because best fit makes the rows of long samples first; without a
    `row_stream`, by their first sample. Within a row samples keep the order in which they came.
    """
    sample_ids = np.empty_like(order)
    ends: list[np.ndarray] = [np.zeros(1, np.int64)]
    row_tokens: list[np.ndarray] = []
    carried = order[:0]
    done = 0
    for start in range(0, len(order), window):
        ids = np.concatenate([carried, order[start : start + window]])
        rows, count = _best_fit_decreasing(lengths[ids], row_length, max_segments)
        tokens = np.bincount(rows, weights=lengths[ids], minlength=count).astype(np.int32)
        carry = np.zeros(count, bool)
        if start + window < len(order):
            carry = _rows_to_carry(tokens, rows, row_length, len(carried), window // 8)
        if row_stream is None:
            key = np.full(count, len(ids))
            np.minimum.at(key, rows, np.arange(len(ids)))
        else:
            key = row_stream.random_raw(count)
        row_order = np.lexsort((key, carry))  # the carried rows last
        place = np.empty(count, np.int64)
        place[row_order] = np.arange(count)
        kept = count - int(np.count_nonzero(carry))
        row_ends = done + np.cumsum(np.bincount(place[rows], minlength=count)[:kept])
        ends.append(row_ends)
        row_tokens.append(tokens[row_order[:kept]])
        placed = int(row_ends[-1]) - done if kept else 0
        sample_ids[done : done + placed] = ids[np.argsort(place[rows], kind="stable")[:placed]]
        done += placed
        carried = ids[carry[rows]]
    return Plan(row_length, np.concatenate(ends), sample_ids, np.concatenate([np.zeros(0, np.int32), *row_tokens]))


def _best_fit_decreasing(
    lengths: Int[np.ndarray, "samples"], row_length: int, max_segments: int | None
) -> tuple[Int[np.ndarray, "samples"], int]:
    """(row of each sample, number of rows): longest first, each into the open row that it fills best.

    The open rows lie in one sorted list of `free places * 2**bits + row`, so the best row is a bisection away: about
    0.6 us a sample, whatever the row length.
    """
    bits = len(lengths).bit_length()
    row_mask = (1 << bits) - 1
    open_rows: list[int] = []
    segments: list[int] = []
    row_of = [0] * len(lengths)
    length_of = lengths.tolist()
    for sample in np.argsort(-lengths.astype(np.int64), kind="stable").tolist():
        length = length_of[sample]
        best = bisect_left(open_rows, length << bits)
        if best < len(open_rows):
            entry = open_rows.pop(best)
            row, free = entry & row_mask, (entry >> bits) - length
            segments[row] += 1
        else:
            row, free = len(segments), row_length - length
            segments.append(1)
        row_of[sample] = row
        if free and segments[row] != max_segments:
            insort(open_rows, free << bits | row)
    return np.array(row_of, np.int64), len(segments)


def _rows_to_carry(
    tokens: Int[np.ndarray, "rows"],
    rows: Int[np.ndarray, "samples"],
    row_length: int,
    num_carried: int,
    most: int,
) -> Bool[np.ndarray, "rows"]:
    """Which rows, of so many `tokens`, to open again among the next window's samples: the emptiest, of `most` samples.

    `rows` is the row of each sample. A sample is carried once (the first `num_carried` have been), so it stays near its
    place in the shuffle.
    """
    count = len(tokens)
    sizes = np.bincount(rows, minlength=count)
    fresh = np.ones(count, bool)
    fresh[rows[:num_carried]] = False
    candidates = np.flatnonzero(fresh & (tokens < _CARRY_BELOW * row_length))
    candidates = candidates[np.argsort(tokens[candidates], kind="stable")]
    candidates = candidates[np.cumsum(sizes[candidates]) <= most]
    carry = np.zeros(count, bool)
    carry[candidates] = True
    return carry
