"""Training samples and held-out ones: how they are told apart, and what they have in common all the same.

A step of the data path between the sample table and the mixture: what is measured must not have been trained on.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int, UInt64

from posttrain.data.packing import random_stream, sorting_order
from posttrain.data.samples import SampleTable, first_alike

_CHUNK = 1 << 20


def split_heldout(table: SampleTable, fraction: float, *, seed: int) -> Bool[np.ndarray, "samples"]:
    """Marks the samples that are held out: a random `fraction`, at least one of two or more.

    Samples that are exactly alike, or made of the same row, are held out together or not at all. They draw one lot, by
    the number of their first one in the data, so another `max_length` holds out nearly the same samples.
    """
    heldout = np.zeros(len(table), bool)
    count = max(1, round(len(table) * fraction)) if fraction > 0 and len(table) > 1 else 0
    if count == 0:
        return heldout
    group = _connected(first_alike(table.hashes()), table.first_of_row())
    sizes = np.bincount(group, minlength=len(table))
    firsts = np.flatnonzero(sizes)
    numbers = table.numbers()[firsts]
    lots = random_stream("heldout", seed=seed).random_raw(int(numbers[-1]) + 1)[numbers]
    drawn = firsts[sorting_order(lots)]
    heldout[drawn[_fill(sizes[drawn], count)]] = True
    return heldout[group]


def _connected(*firsts: Int[np.ndarray, "samples"]) -> Int[np.ndarray, "samples"]:
    """The first sample of all that are connected with each one, directly or through others, in any of the relations.

    A relation is given by the first related sample of each.
    """
    group = firsts[0]
    while True:
        merged = group
        for first in firsts:
            least = merged.copy()
            np.minimum.at(least, first, merged)
            merged = least[first]
        if np.array_equal(merged, group):
            return group
        group = merged


def _fill(sizes: Int[np.ndarray, "groups"], count: int) -> Bool[np.ndarray, "groups"]:
    """Which groups make `count` samples: the first ones that fit, then single samples; at least one of two groups."""
    taken = np.cumsum(sizes) <= count
    missing = count - int(sizes[taken].sum())
    taken[np.flatnonzero(~taken & (sizes == 1))[:missing]] = True
    if not taken.any() and len(sizes) > 1:
        taken[np.argmin(sizes)] = True
    return taken


@dataclass(frozen=True)
class Overlap:
    """What held-out samples have in common with those trained on."""

    heldout: int
    """Held-out samples."""
    samples: int
    """Those that are exactly among the training samples."""
    prompts: int
    """Those whose prompt, all before the first trained token, is: these included. Samples without a prompt have none
    in common."""


def find_overlap(train: SampleTable, heldout: SampleTable) -> Overlap:
    """Looks up the held-out samples among all training samples, not only those that an epoch uses."""
    prompts = np.empty(len(heldout), np.uint64)
    prompted = np.empty(len(heldout), bool)
    for cache, part in heldout.parts():
        index = heldout.index[part]
        prompts[part] = cache.prompt_hashes[index]
        start = cache.offsets[index]  # of a text all but the first token is trained on, and one token is no prompt
        prompted[part] = (cache.loss_weights[start] == 0) & (cache.loss_weights[start + 1] == 0)
    alike = _found(heldout.hashes(), train, "hashes")
    return Overlap(
        len(heldout),
        samples=int(np.count_nonzero(alike)),
        prompts=int(np.count_nonzero(alike | (prompted & _found(prompts, train, "prompt_hashes")))),
    )


def _found(wanted: UInt64[np.ndarray, "wanted"], table: SampleTable, column: str) -> Bool[np.ndarray, "wanted"]:
    """Which hashes the table has in a column of its caches."""
    distinct, place = np.unique(wanted, return_inverse=True)
    found = np.zeros(len(distinct), bool)
    for cache, part in table.parts():
        for start in range(part.start, part.stop, _CHUNK):
            hashes = getattr(cache, column)[table.index[start : min(start + _CHUNK, part.stop)]]
            at = np.searchsorted(distinct, hashes)
            at[at == len(distinct)] = 0
            found[at[distinct[at] == hashes]] = True
    return found[place]
