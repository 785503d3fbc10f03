"""Which samples `inspect` shows: what became of every sample of a file, a spread over all of it, a search for a text.

Under `inspect.py`, over the token caches: what is shown is what is trained on.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, zip_longest

import numpy as np
from jaxtyping import Int, Int8, UInt64

from posttrain.config import DataConfig, SourceConfig
from posttrain.data.cache import TokenCache
from posttrain.data.samples import SampleTable
from posttrain.data.stats import DUPLICATE, OVER_LIMIT, TOO_LONG, TRUNCATED_AWAY, UNTRAINED
from posttrain.data.tokenizer import Tokenizer
from posttrain.data.turns import NOTE_SPLIT

TRAINED_ON, HELD_OUT = "trained on", "held out"
FATES = (TRAINED_ON, HELD_OUT, UNTRAINED, TOO_LONG, TRUNCATED_AWAY, f"{OVER_LIMIT}, or {DUPLICATE}")
"""What becomes of a sample; `SourceFile.fates` holds indices into this."""
DROPPED_FATES = (UNTRAINED, TOO_LONG, TRUNCATED_AWAY)

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
    def lengths(self) -> Int[np.ndarray, "samples"]:
        """Tokens, before truncation."""
        return np.diff(self.cache.offsets)

    def fate(self, sample: int) -> str:
        """One of `FATES`."""
        return FATES[self.fates[sample]]

    def whole(self, sample: int) -> slice:
        """A sample's tokens in the cache."""
        return slice(int(self.cache.offsets[sample]), int(self.cache.offsets[sample + 1]))

    def kept(self, sample: int) -> slice:
        """Those that truncation leaves; all of a dropped sample, so that one sees why."""
        whole = self.whole(sample)
        if self.fate(sample) in DROPPED_FATES:
            return whole
        if self.keep_end:
            return slice(max(whole.start, whole.stop - self.max_length), whole.stop)
        return slice(whole.start, min(whole.stop, whole.start + self.max_length))

    def border(self, sample: int) -> int:
        """Where truncation would cut a sample that is dropped for its length; 0 for all others."""
        if self.fate(sample) not in (TOO_LONG, TRUNCATED_AWAY):
            return 0
        return int(self.lengths[sample]) - self.max_length if self.keep_end else self.max_length


def source_files(
    train: SampleTable, heldout: SampleTable | None, sources: Mapping[str, SourceConfig], data: DataConfig
) -> list[SourceFile]:
    """The files under the tables, in the config's order."""
    files: dict[tuple[str, str], tuple[TokenCache, Int8[np.ndarray, "samples"]]] = {}
    for table, fate in ((train, TRAINED_ON), (heldout, HELD_OUT)):
        if table is None:
            continue
        for number, (cache, part) in enumerate(table.parts()):
            key = (table.keys[table.source_of[number]], cache.path)
            _, fates = files.setdefault(key, (cache, _why_left_out(cache, data)))
            fates[table.index[part]] = FATES.index(fate)
    keep_end = data.truncation == "keep_end"
    return [
        SourceFile(key, sources[key], cache, data.max_length, keep_end, fates)
        for (key, _), (cache, fates) in files.items()
    ]


def _why_left_out(cache: TokenCache, data: DataConfig) -> Int8[np.ndarray, "samples"]:
    """For each sample the fate that it has unless it is trained on or held out."""
    fates = np.full(cache.num_samples, len(FATES) - 1, np.int8)
    over_long = np.diff(cache.offsets) > data.max_length
    for sample in np.flatnonzero(over_long & (cache.trained > 0)).tolist():
        start, end = int(cache.offsets[sample]), int(cache.offsets[sample + 1])
        start = end - data.max_length if data.truncation == "keep_end" else start
        if not cache.loss_weights[start + 1 : start + data.max_length].any():
            fates[sample] = FATES.index(TRUNCATED_AWAY)
    if data.truncation == "drop":
        fates[over_long] = FATES.index(TOO_LONG)
    fates[cache.trained == 0] = FATES.index(UNTRAINED)
    return fates


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
    if NOTE_SPLIT in file.cache.notes:  # else they may be different rows on one line
        same = np.diff(file.cache.lines) == 0
        parts_of_one[1:] |= same
        parts_of_one[:-1] |= same
    kept = file.fates < 2
    weights = file.cache.loss_weights[:_SCANNED_TOKENS]
    unusual = np.flatnonzero((weights != 0) & (weights != 1))
    marked = [
        *(file.fates == fate for fate in range(2, len(FATES))),
        kept & (file.lengths > file.max_length),
        kept & parts_of_one,
        np.isin(file.cache.hashes, alike),
        file.fates == FATES.index(HELD_OUT),
    ]
    weighted = np.unique(np.searchsorted(file.cache.offsets, unusual, side="right") - 1)
    return [*map(np.flatnonzero, marked), weighted, np.argsort(-file.lengths, kind="stable")[:1]]


def find(files: Sequence[SourceFile], tokenizer: Tokenizer, text: str) -> Iterator[Place]:
    """The samples with this text in what their tokens decode to, whatever the capitals; one after another."""
    wanted = text.casefold()
    for number, file in enumerate(files):
        for sample in range(file.cache.num_samples):
            if wanted in tokenizer.decode(file.cache.tokens[file.kept(sample)].tolist()).casefold():
                yield number, sample
