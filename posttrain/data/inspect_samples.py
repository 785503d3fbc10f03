"""Which samples `inspect` shows: what became of every sample of a file, a spread over all of it, a search for a text.

Under `inspect.py`, over the token caches: what is shown is what is trained on.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, zip_longest

import numpy as np
from jaxtyping import Bool, Int, Int8, UInt64

from posttrain.config import DataConfig, SourceConfig
from posttrain.data.cache import TokenCache
from posttrain.data.samples import UNUSABLE, SampleTable, segment_places, unusable, within_limit
from posttrain.data.stats import DUPLICATE, OVER_LIMIT
from posttrain.data.tokenizer import Tokenizer
from posttrain.data.turns import NOTE_SPLIT

TRAINED_ON, HELD_OUT = "trained on", "held out"
FATES = (TRAINED_ON, HELD_OUT, *UNUSABLE, OVER_LIMIT, DUPLICATE)
"""What becomes of a sample; `SourceFile.fates` holds places in this."""

_SPREAD_OVER = 1 << 20
"""Of a file's samples, the first so many take part in the random choice."""

_SCANNED_TOKENS = 1 << 24
"""Of a file's weights, the first so many are looked through for unusual ones."""

Place = tuple[int, int]
"""A sample: the number of its `SourceFile`, and its own number in that file's cache."""


@dataclass(frozen=True)
class SourceFile:
    """One data file: its cache, and what became of each of its samples."""

    key: str
    """Of its source, e.g. `data.train.0`."""
    source: SourceConfig
    cache: TokenCache
    max_length: int
    keep_end: bool
    fates: Int8[np.ndarray, "samples"]

    @cached_property
    def lengths(self) -> Int[np.ndarray, "segments"]:
        """Tokens of all samples, before truncation; of pairs of each of their sides, with the prompt."""
        chosen = self.cache.splits
        return np.concatenate([chosen[chosen > 0], np.diff(self.cache.offsets) - chosen])

    @cached_property
    def longest(self) -> Int[np.ndarray, "samples"]:
        """Tokens of each sample, before truncation; of a pair those of its longer side."""
        return np.maximum(self.cache.splits, np.diff(self.cache.offsets) - self.cache.splits)

    @property
    def used(self) -> Bool[np.ndarray, "samples"]:
        """Which samples are trained on or held out."""
        return self.fates < 2

    def fate(self, sample: int) -> str:
        """One of `FATES`."""
        return FATES[self.fates[sample]]

    def whole(self, sample: int) -> list[slice]:
        """Where a sample's segments lie in the cache: one, or the two sides of a pair."""
        return segment_places(self.cache, sample, int(self.longest[sample]), self.keep_end)

    def kept(self, sample: int) -> list[slice]:
        """What truncation leaves of them; all of an unusable sample, so that one sees why."""
        if self.fate(sample) in UNUSABLE:
            return self.whole(sample)
        return segment_places(self.cache, sample, self.max_length, self.keep_end)


def source_files(
    train: SampleTable, heldout: SampleTable | None, sources: Mapping[str, SourceConfig], data: DataConfig, seed: int
) -> list[SourceFile]:
    """The files under the tables, in the config's order; `seed` is the one that the tables were made with."""
    files: dict[str, dict[str, SourceFile]] = {}
    for table, fate in ((train, TRAINED_ON), (heldout, HELD_OUT)):
        if table is None:
            continue
        for number, (cache, part) in enumerate(table.parts()):
            key = table.keys[table.source_of[number]]
            of_source = files.setdefault(key, {})
            if cache.path not in of_source:
                of_source[cache.path] = _source_file(key, sources[key], cache, data)
            of_source[cache.path].fates[table.index[part]] = FATES.index(fate)
    for number, key in enumerate(train.keys):
        limit = sources[key].limit
        if limit is not None:
            _mark_over_limit([*files[key].values()], limit, seed=seed, source=number)
    return [file for of_source in files.values() for file in of_source.values()]


def _source_file(key: str, source: SourceConfig, cache: TokenCache, data: DataConfig) -> SourceFile:
    """A file whose samples are unusable, or else duplicates: what is used of them is not marked yet."""
    reasons, _ = unusable(cache, data.max_length, data.truncation)
    first = FATES.index(UNUSABLE[0])
    fates = np.where(reasons < 0, FATES.index(DUPLICATE), reasons + first).astype(np.int8)
    return SourceFile(key, source, cache, data.max_length, data.truncation == "keep_end", fates)


def _mark_over_limit(files: Sequence[SourceFile], limit: int, *, seed: int, source: int) -> None:
    """Tells the samples of a source that are beyond its limit from duplicates."""
    fates = np.concatenate([np.zeros(0, np.int8), *(file.fates for file in files)])
    numbers = np.flatnonzero(~np.isin(fates, [FATES.index(reason) for reason in UNUSABLE]))
    fates[numbers[~within_limit(numbers, limit, seed=seed, source=source)]] = FATES.index(OVER_LIMIT)
    start = 0
    for file in files:
        file.fates[:] = fates[start : start + len(file.fates)]
        start += len(file.fates)


def alike_hashes(files: Sequence[SourceFile]) -> UInt64[np.ndarray, "hashes"]:
    """Hashes that several samples of the files share, ascending."""
    hashes = np.concatenate([np.zeros(0, np.uint64), *(file.cache.hashes for file in files)])
    values, counts = np.unique(hashes, return_counts=True)
    return values[counts > 1]


def choose(files: Sequence[SourceFile], count: int, *, alike: UInt64[np.ndarray, "hashes"], seed: int) -> list[Place]:
    """`count` samples, or all: at most half of them remarkable ones (dropped, truncated, split, alike, held out, with
    weights of their own, the longest), the others at random, evenly over the files. The ordinary ones come first."""
    random = np.random.default_rng(seed)
    found = [_remarkable(file, alike) * 2 for file in files]
    remarkable = _spread(
        [int(samples[random.integers(len(samples))]) for samples in kinds if len(samples)] for kinds in found
    )
    remarkable = remarkable[: (count + 1) // 2]
    taken = set(remarkable)
    ordinary = _spread(random.permutation(min(file.cache.num_samples, _SPREAD_OVER)).tolist() for file in files)
    return [*[place for place in ordinary if place not in taken][: count - len(remarkable)], *remarkable]


def _spread(samples: Iterable[Sequence[int]]) -> list[Place]:
    """First the first of every file, then the second ones, ...; each once."""
    columns = [[(number, sample) for sample in of_file] for number, of_file in enumerate(samples)]
    places = chain.from_iterable(zip_longest(*columns))
    return list(dict.fromkeys(place for place in places if place is not None))


def _remarkable(file: SourceFile, alike: UInt64[np.ndarray, "hashes"]) -> list[Int[np.ndarray, "_"]]:
    """Samples by what is remarkable about them."""
    parts_of_one = np.zeros(file.cache.num_samples, bool)
    if NOTE_SPLIT in file.cache.notes:  # else they are answers of a ranking or a tree
        same = ~file.cache.begins[1:]
        parts_of_one[1:] |= same
        parts_of_one[:-1] |= same
    weights = file.cache.loss_weights[:_SCANNED_TOKENS]
    unusual = np.flatnonzero((weights != 0) & (weights != 1))
    marked = [
        *(file.fates == fate for fate in range(2, len(FATES))),
        file.used & (file.longest > file.max_length),
        file.used & parts_of_one,
        np.isin(file.cache.hashes, alike),
        file.fates == FATES.index(HELD_OUT),
    ]
    weighted = np.unique(np.searchsorted(file.cache.offsets, unusual, side="right") - 1)
    return [*map(np.flatnonzero, marked), weighted, np.argsort(-file.longest, kind="stable")[:1]]


def find(files: Sequence[SourceFile], tokenizer: Tokenizer, text: str) -> Iterator[Place]:
    """The samples with this text in what their tokens decode to, whatever the capitals; one after another."""
    wanted = text.casefold()
    for number, file in enumerate(files):
        for sample in range(file.cache.num_samples):
            tokens = (file.cache.tokens[place].tolist() for place in file.kept(sample))
            if any(wanted in tokenizer.decode(of_segment).casefold() for of_segment in tokens):
                yield number, sample
