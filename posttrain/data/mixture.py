"""Which samples an epoch takes of each source, and in which order: the mixture, between samples and packing plan.

Each source is an endless stream: one random permutation of its samples after another. Epoch `e` takes the positions
`e * n` to `(e + 1) * n` of it, so every epoch goes on where the last one stopped, nothing comes again before everything
was seen, and any epoch is known without those before it.
"""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from jaxtyping import Int

from posttrain.config import SourceConfig
from posttrain.data.packing import index_dtype, random_stream, sorting_order
from posttrain.data.samples import SampleTable
from posttrain.data.stats import EpochUse
from posttrain.errors import UserErrors


def epoch_counts(sizes: Sequence[int], sources: Sequence[SourceConfig]) -> tuple[int, ...]:
    """How many samples of each source an epoch draws.

    Args:
      sizes: samples of each source; not 0.
      sources: `weight`, of all or of none, and `repeat` are read.

    Without weights every source is used whole, `repeat` times. With weights p (normalised) it is `round(p * N)` samples
    of each, N as large as it can be without more than `repeat` passes over any source: the source that is shortest for
    its weight is used up, of the others an epoch takes a part.

    Raises:
      UserErrors: a weight so small that an epoch would have no sample of its source.
    """
    most = [size * source.repeat for size, source in zip(sizes, sources, strict=True)]
    weights = [Fraction(source.weight) for source in sources if source.weight is not None]
    if not weights:
        return tuple(most)
    if len(weights) != len(sources):
        raise ValueError("a mixture needs a weight of every source, or of none")
    shares = [weight / sum(weights) for weight in weights]
    half = Fraction(1, 2)
    # floor(p N + 1/2) <= most, for the largest whole N
    limits = [-((-(limit + half)) // share) - 1 for limit, share in zip(most, shares, strict=True)]
    total = min(limits)
    counts = tuple(int(share * total + half) for share in shares)
    if 0 in counts:
        shortest = limits.index(total)
        raise UserErrors(
            [
                f"data.train.{index}.weight = {sources[index].weight}: an epoch of {total} samples would have none of "
                f"this source; raise the weight, or data.train.{shortest}.repeat, which bounds the epoch"
                for index, count in enumerate(counts)
                if count == 0
            ]
        )
    return counts


class Mixture:
    """The samples of every epoch, for sources whose samples are numbered one source after another."""

    def __init__(self, sizes: Sequence[int], counts: Sequence[int], *, seed: int):
        """`sizes`: samples of each source; `counts`: how many of them an epoch draws; `seed`: chooses the streams."""
        self.sizes = tuple(sizes)
        self.counts = tuple(counts)
        self._seed = seed
        self._held: dict[int, tuple[int, np.ndarray]] = {}
        """Of each source the last pass that goes on in the next epoch, and its permutation."""

    def draws(self, source: int, epoch: int) -> Int[np.ndarray, "draws"]:
        """The samples of one source in an epoch, in the order of its stream."""
        size, count = self.sizes[source], self.counts[source]
        start, end = epoch * count, (epoch + 1) * count
        parts = []
        for number in range(start // size, -(-end // size)):
            first = number * size
            parts.append(self._pass(source, number)[max(start - first, 0) : end - first])
        if end % size == 0:
            self._held.pop(source, None)
        dtype = index_dtype(sum(self.sizes))
        draws = np.concatenate(parts).astype(dtype, copy=False)
        draws += dtype(sum(self.sizes[:source]))
        return draws

    def order(self, epoch: int) -> Int[np.ndarray, "draws"] | None:
        """All samples of an epoch in the order to train on: sources at random, each in the order of its stream.

        None where an epoch is every sample once: then any permutation of all of them serves.
        """
        if self.counts == self.sizes:
            return None
        lots = random_stream("samples", seed=self._seed, epoch=epoch).random_raw(sum(self.counts))
        start = 0
        for count in self.counts:  # places are drawn for a source, and taken by its samples as they come
            lots[start : start + count].sort()
            start += count
        draws = np.concatenate([self.draws(source, epoch) for source in range(len(self.sizes))])
        return draws[sorting_order(lots)]

    def _pass(self, source: int, number: int) -> Int[np.ndarray, "samples"]:
        """One permutation of a source, counted from 0."""
        held = self._held.get(source)
        if held is not None and held[0] == number:
            return held[1]
        stream = random_stream("passes", seed=self._seed, epoch=number, source=source)
        permutation = sorting_order(stream.random_raw(self.sizes[source]))
        self._held[source] = number, permutation
        return permutation


def epoch_use(table: SampleTable, mixture: Mixture) -> tuple[EpochUse, ...]:
    """What the first epoch takes of each source."""
    bounds = table.source_bounds
    taken: list[tuple[int, int, int]] = []
    for source, (size, count) in enumerate(zip(mixture.sizes, mixture.counts, strict=True)):
        repeat, rest = divmod(count, size)
        whole = slice(bounds[source], bounds[source + 1])
        columns = (table.lengths, table.trained)
        tokens = [repeat * int(column[whole].sum(dtype=np.int64)) for column in columns]
        if rest:
            drawn = mixture.draws(source, 0)[repeat * size :]
            tokens = [n + int(column[drawn].sum(dtype=np.int64)) for n, column in zip(tokens, columns, strict=True)]
        taken.append((count, tokens[0], tokens[1]))
    totals = [sum(column) for column in zip(*taken, strict=True)]
    return tuple(
        EpochUse(size, *numbers, *(number / total for number, total in zip(numbers, totals, strict=True)))
        for size, numbers in zip(mixture.sizes, taken, strict=True)
    )
