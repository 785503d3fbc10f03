"""Samples as they are trained on: truncated, filtered, limited, without duplicates if asked, and counted.

A view on the token caches, between them and the mixture and packing plan of `pipeline.py`. What is left out is left out
in this order, each step counting what it takes: samples without a trained token and those too long; those beyond
`limit`; exact duplicates among what remains; at last the held-out ones.
"""

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Int, Int8, UInt64

from posttrain.config import SourceConfig
from posttrain.data.cache import TokenCache
from posttrain.data.packing import index_dtype, random_stream, sorting_order
from posttrain.data.stats import DUPLICATE, OVER_LIMIT, TOO_LONG, TRUNCATED_AWAY, UNTRAINED, SourceStats

PackedSegment = tuple[np.ndarray, np.ndarray]
"""Token ids and loss weights of one segment."""

UNUSABLE = (UNTRAINED, TOO_LONG, TRUNCATED_AWAY)
"""Why a sample cannot be trained on."""


@dataclass(frozen=True)
class SampleTable:
    """The samples of several sources, by source, file and place in the file: 12 bytes a sample beside the caches."""

    keys: tuple[str, ...]
    """The sources, by their place in the config."""
    caches: tuple[TokenCache, ...]
    source_of: tuple[int, ...]
    """Which source each cache belongs to; ascending."""
    bounds: tuple[int, ...]
    """Cache `c` has the samples `bounds[c]` to `bounds[c + 1]`."""
    index: Int[np.ndarray, "samples"]
    """Each sample's number in its cache; ascending within it."""
    lengths: Int[np.ndarray, "samples"]
    """Tokens, after truncation."""
    trained: Int[np.ndarray, "samples"]
    """Tokens with a loss weight; never 0."""
    max_length: int
    """Most tokens of a sample, of a pair of each of its sides."""
    keep_end: bool
    """Truncated samples have lost their start, not their end."""
    partners: Int[np.ndarray, "samples"] | None = None
    """Of labelled answers, if asked for: the sample whose answer stands behind each one's prompt in a second segment,
    which `lengths` counts in (`mismatched.py`)."""

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

    @property
    def source_bounds(self) -> tuple[int, ...]:
        """Source `s` has the samples `source_bounds[s]` to `source_bounds[s + 1]`."""
        starts = (self.bounds[bisect_left(self.source_of, source)] for source in range(len(self.keys)))
        return (*starts, len(self))

    @property
    def truncated(self) -> Bool[np.ndarray, "samples"]:
        """Which samples have lost tokens to `max_length`."""
        truncated = np.empty(len(self), bool)
        for cache, part in self.parts():
            index = self.index[part]
            truncated[part] = self.lengths[part] < cache.offsets[index + 1] - cache.offsets[index]
        return truncated

    def source(self, sample: int) -> int:
        """Which source a sample belongs to, as an index into `keys`."""
        return self.source_of[self._cache(sample)]

    def where(self, sample: int) -> str:
        """`file:line` of a sample."""
        cache = self.caches[self._cache(sample)]
        return f"{cache.path}:{cache.lines[self.index[sample]]}"

    def segments(self, sample: int) -> list[PackedSegment]:
        """Token ids (int32) and loss weights (f32) of a sample, as views; of a pair those of its two sides, with
        `partners` also those of the mismatched answer."""
        cache = self.caches[self._cache(sample)]
        places = self._places(cache, int(self.index[sample]))
        segments = [(cache.tokens[place], cache.loss_weights[place]) for place in places]
        return segments if self.partners is None else [*segments, self._mismatched(sample, int(self.partners[sample]))]

    def segment_lengths(self, samples: Int[np.ndarray, "samples"]) -> Int[np.ndarray, "segments"]:
        """Tokens of each segment of these samples."""
        return np.array([len(ids) for sample in samples.tolist() for ids, _ in self.segments(sample)], np.int32)

    def _mismatched(self, sample: int, partner: int) -> PackedSegment:
        """The prompt of one sample with the answer of another, truncated like any other."""
        (prompt, _), (answer, weights) = self._halves(sample)[0], self._halves(partner)[1]
        kept = slice(-self.max_length, None) if self.keep_end else slice(self.max_length)
        weights = np.concatenate([np.zeros(len(prompt), np.float32), weights])
        return np.concatenate([prompt, answer])[kept], weights[kept]

    def _halves(self, sample: int) -> tuple[PackedSegment, PackedSegment]:
        """What stands before a whole sample's first trained token, and the rest."""
        cache, number = self.caches[self._cache(sample)], int(self.index[sample])
        start, end = int(cache.offsets[number]), int(cache.offsets[number + 1])
        border = start + 1 + int((cache.loss_weights[start + 1 : end] > 0).argmax())
        first, last = slice(start, border), slice(border, end)
        return (cache.tokens[first], cache.loss_weights[first]), (cache.tokens[last], cache.loss_weights[last])

    def margin(self, sample: int) -> float:
        """Of a pair: by how much its chosen side is better; 0 where the row does not say."""
        return float(self.caches[self._cache(sample)].margins[self.index[sample]])

    def label(self, sample: int) -> int:
        """Of a labelled answer: 1 if it is desirable, -1 if not; else 0."""
        return int(self.caches[self._cache(sample)].labels[self.index[sample]])

    def labels(self) -> Int8[np.ndarray, "samples"]:
        """Of all samples."""
        labels = np.empty(len(self), np.int8)
        for cache, part in self.parts():
            labels[part] = cache.labels[self.index[part]]
        return labels

    def _places(self, cache: TokenCache, number: int) -> list[slice]:
        return segment_places(cache, number, self.max_length, self.keep_end)

    def take(self, kept: Bool[np.ndarray, "samples"]) -> "SampleTable":
        """The samples that are marked."""
        if self.partners is not None:
            raise ValueError("samples are taken before they are matched with each other's answers")
        counts = [int(np.count_nonzero(kept[part])) for _, part in self.parts()]
        return replace(
            self,
            bounds=tuple(np.cumsum([0, *counts]).tolist()),
            index=self.index[kept],
            lengths=self.lengths[kept],
            trained=self.trained[kept],
        )

    def hashes(self) -> UInt64[np.ndarray, "samples"]:
        """Of each sample's tokens and weights, whole: equal for equal samples.

        That any two different ones among ten million share their 64 bits has a chance of three in a million.
        """
        hashes = np.empty(len(self), np.uint64)
        for cache, part in self.parts():
            hashes[part] = cache.hashes[self.index[part]]
        return hashes

    def parts(self) -> Iterator[tuple[TokenCache, slice]]:
        """Every cache, and where its samples are."""
        for cache, (start, end) in zip(self.caches, pairwise(self.bounds), strict=True):
            yield cache, slice(start, end)

    def numbers(self) -> Int[np.ndarray, "samples"]:
        """Each sample's number among all samples of the caches, which no filter, limit or truncation changes."""
        numbers = self.index.astype(np.int64)
        first = 0
        for cache, part in self.parts():
            numbers[part] += first
            first += cache.num_samples
        return numbers

    def first_of_row(self) -> Int[np.ndarray, "samples"]:
        """For each sample the first one made of the same record: of a conversation that had to be split, a ranking, a
        tree."""
        own = np.arange(len(self), dtype=index_dtype(len(self)))
        begins = np.ones(len(self), bool)
        for cache, part in self.parts():
            records = np.cumsum(cache.begins, dtype=index_dtype(cache.num_samples))
            begins[part][1:] = np.diff(records[self.index[part]]) != 0
        return np.maximum.accumulate(np.where(begins, own, 0))

    def _cache(self, sample: int) -> int:
        return bisect_right(self.bounds, sample) - 1


def sample_table(
    caches: Mapping[str, Sequence[TokenCache]],
    sources: Mapping[str, SourceConfig],
    *,
    max_length: int,
    truncation: str,
    seed: int,
    drop_duplicates: bool = False,
) -> tuple[SampleTable, tuple[SourceStats, ...]]:
    """The samples to train on, or to hold out, and what became of each source.

    Args:
      caches: of each source, by its place in the config, those of its files.
      sources: what the config says of them; `path` and `limit` are read.
      max_length: most tokens of a sample.
      truncation: keeps the first (`keep_start`) or the last (`keep_end`) `max_length` tokens of an over-long sample, or
        drops it (`drop`).
      seed: chooses the samples under a limit. Each draws a lot by its number in the source, and the lowest are used: a
        higher limit adds samples and takes none away.
      drop_duplicates: uses exactly equal samples once, the first of them. They are looked for among those that the
        limits leave, in all sources together.

    A sample's first token is never trained on, whatever its weight: nothing predicts it.
    """
    dropped = {key: Counter[str]() for key in caches}
    tables = []
    for number, (key, files) in enumerate(caches.items()):
        table = _join(
            key,
            [_usable(cache, max_length, truncation, dropped[key]) for cache in files],
            files,
            max_length,
            truncation,
        )
        limit = sources[key].limit
        if limit is not None and len(table) > limit:
            dropped[key][OVER_LIMIT] = len(table) - limit
            table = table.take(within_limit(table.numbers(), limit, seed=seed, source=number))
        tables.append(table)
    table = _stack(tables)
    del tables
    again = first_alike(table.hashes()) != np.arange(len(table), dtype=index_dtype(len(table)))
    duplicates = dict(zip(table.keys, count_by_source(table, again), strict=True))
    if drop_duplicates and any(duplicates.values()):
        table = table.take(~again)
        for key, count in duplicates.items():
            dropped[key][DUPLICATE] = count
    truncated = dict(zip(table.keys, count_by_source(table, table.truncated), strict=True))
    return table, tuple(
        _stats(table, number, sources[key].path, truncated[key], duplicates[key], +dropped[key])
        for number, key in enumerate(table.keys)
    )


_Columns = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Number in the cache, length and trained tokens of each sample."""


def segment_places(cache: TokenCache, number: int, max_length: int, keep_end: bool) -> list[slice]:
    """Where a sample's segments lie in the cache: one, or the two sides of a pair, each truncated."""
    start, end, split = int(cache.offsets[number]), int(cache.offsets[number + 1]), int(cache.splits[number])
    borders = (start, start + split, end) if split else (start, end)
    return [
        slice(max(low, high - max_length), high) if keep_end else slice(low, min(high, low + max_length))
        for low, high in pairwise(borders)
    ]


def unusable(
    cache: TokenCache, max_length: int, truncation: str
) -> tuple[Int8[np.ndarray, "samples"], Int[np.ndarray, "samples"]]:
    """Of each sample of a cache the reason (a place in `UNUSABLE`) for which it is no use, -1 for none; and how many of
    its tokens are trained once it is truncated. Of a pair each side must have some."""
    whole = np.diff(cache.offsets)
    over_long = np.maximum(cache.splits, whole - cache.splits) > max_length
    trained = np.array(cache.trained)
    reasons = np.full(len(trained), -1, np.int8)
    reasons[trained == 0] = UNUSABLE.index(UNTRAINED)
    if truncation == "drop":
        reasons[over_long & (reasons < 0)] = UNUSABLE.index(TOO_LONG)
    for sample in np.flatnonzero(over_long & (reasons < 0)).tolist():  # about 1 us each
        places = segment_places(cache, sample, max_length, truncation == "keep_end")
        counts = [np.count_nonzero(cache.loss_weights[place.start + 1 : place.stop]) for place in places]
        trained[sample] = sum(counts) if all(counts) else 0
    reasons[(trained == 0) & (reasons < 0)] = UNUSABLE.index(TRUNCATED_AWAY)
    return reasons, trained


def _usable(cache: TokenCache, max_length: int, truncation: str, dropped: Counter[str]) -> _Columns:
    """The cache's samples, truncated, that have a token to train on; adds to `dropped` why the others have not."""
    reasons, trained = unusable(cache, max_length, truncation)
    for number, reason in enumerate(UNUSABLE):
        dropped[reason] += int(np.count_nonzero(reasons == number))
    kept = reasons < 0
    first = np.array(cache.splits, np.int64)
    second = np.diff(cache.offsets) - first  # all of a single sample
    lengths = np.minimum(first, max_length) + np.minimum(second, max_length)
    return np.flatnonzero(kept).astype(np.int32), lengths[kept].astype(np.int32), trained[kept]


def _join(
    key: str, parts: Sequence[_Columns], caches: Sequence[TokenCache], max_length: int, truncation: str
) -> SampleTable:
    """The table of one source."""
    empty = np.zeros(0, np.int32)
    columns = [np.concatenate([empty, *column]) for column in zip(*parts, strict=True)] or [empty] * 3
    return SampleTable(
        keys=(key,),
        caches=tuple(caches),
        source_of=(0,) * len(caches),
        bounds=tuple(np.cumsum([0, *(len(index) for index, _, _ in parts)]).tolist()),
        index=columns[0],
        lengths=columns[1],
        trained=columns[2],
        max_length=max_length,
        keep_end=truncation == "keep_end",
    )


def _stack(tables: Sequence[SampleTable]) -> SampleTable:
    """One table of the sources' tables."""
    bounds = [0]
    for table in tables:
        bounds += [bounds[-1] + end for end in table.bounds[1:]]
    return SampleTable(
        keys=tuple(table.keys[0] for table in tables),
        caches=tuple(cache for table in tables for cache in table.caches),
        source_of=tuple(source for source, table in enumerate(tables) for _ in table.caches),
        bounds=tuple(bounds),
        index=np.concatenate([table.index for table in tables]),
        lengths=np.concatenate([table.lengths for table in tables]),
        trained=np.concatenate([table.trained for table in tables]),
        max_length=tables[0].max_length,
        keep_end=tables[0].keep_end,
    )


def _stats(
    table: SampleTable, source: int, path: str, truncated: int, duplicates: int, dropped: Mapping[str, int]
) -> SourceStats:
    caches = [cache for cache, of in zip(table.caches, table.source_of, strict=True) if of == source]
    part = slice(*table.source_bounds[source : source + 2])
    return SourceStats(
        key=table.keys[source],
        path=path,
        files=len(caches),
        rows=sum(cache.rows for cache in caches),
        left_out=sum(cache.left_out for cache in caches),
        bad_rows=sum(cache.bad_rows for cache in caches),
        samples=part.stop - part.start,
        tokens=int(table.lengths[part].sum(dtype=np.int64)),
        trained_tokens=int(table.trained[part].sum(dtype=np.int64)),
        truncated=truncated,
        dropped=dict(dropped),
        duplicates=duplicates,
        notes=dict(sum((Counter(cache.notes) for cache in caches), Counter())),
    )


def first_alike(hashes: UInt64[np.ndarray, "samples"]) -> Int[np.ndarray, "samples"]:
    """For each sample the first one with its hash: itself, where none came before."""
    order = sorting_order(hashes)
    ordered = hashes[order]
    begins = np.ones(len(hashes), bool)
    np.not_equal(ordered[1:], ordered[:-1], out=begins[1:])
    del ordered
    first = np.empty_like(order)
    first[order] = np.repeat(order[begins], np.diff(np.flatnonzero(begins), append=len(hashes)))
    return first


def count_by_source(table: SampleTable, marked: Bool[np.ndarray, "samples"]) -> list[int]:
    """How many samples of each source are marked."""
    bounds = table.source_bounds
    return [int(np.count_nonzero(marked[start:end])) for start, end in pairwise(bounds)]


def within_limit(
    numbers: Int[np.ndarray, "samples"], limit: int, *, seed: int, source: int
) -> Bool[np.ndarray, "samples"]:
    """Marks the `limit` samples of a source that are used: those whose lots, drawn by their `numbers`, are lowest."""
    stream = random_stream("limit", seed=seed, source=source)
    lots = stream.random_raw(int(numbers.max(initial=-1)) + 1)[numbers]
    marked = np.zeros(len(numbers), bool)
    marked[sorting_order(lots)[:limit]] = True
    return marked
