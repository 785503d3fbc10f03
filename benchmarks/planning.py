"""Planning at scale: time and memory from the lengths of millions of samples to the rows of an epoch.

    python benchmarks/planning.py [--samples 10000000] [--row-length 8192] [--median 245] [--sigma 1.0] [--sources 2]

Lengths are lognormal and seeded; no tokens are read. The stages are those of a run: the sample table of the token
caches with its search for duplicates, the held-out split, the overlap of the two, and the plans of an epoch without and
with a mixture of unlike weights. `peak` is the growth of resident memory above what stood before the stage, at its
worst moment, and `held` what stays of it afterwards; `n/a` where the system does not tell (not Linux). Every plan is
checked: each sample lies in it as often as it was drawn, and no row is too full.
"""

import argparse
import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.config import SourceConfig
from posttrain.data.cache import TokenCache
from posttrain.data.mixture import Mixture, epoch_counts
from posttrain.data.packing import Plan, plan_rows
from posttrain.data.samples import sample_table
from posttrain.data.split import find_overlap, split_heldout

_CHUNK = 1 << 20


def synthetic_cache(source: int, samples: int, median: float, sigma: float, longest: int) -> TokenCache:
    """A cache of so many samples whose tokens are views of one zero: they take no memory and are not read."""
    rng = np.random.default_rng(source)
    offsets = np.zeros(samples + 1, np.int64)
    hashes = np.empty(samples, np.uint64)
    for start in range(0, samples, _CHUNK):  # temporaries would count as memory that planning does not need
        stop = min(samples, start + _CHUNK)
        offsets[start + 1 : stop + 1] = np.clip(rng.lognormal(np.log(median), sigma, stop - start), 2, longest)
        hashes[start:stop] = rng.integers(1, 2**64, stop - start, dtype=np.uint64)
    np.cumsum(offsets, out=offsets)
    total = int(offsets[-1])
    return TokenCache(
        path=f"synthetic-{source}.jsonl",
        directory=Path(),
        tokens=np.broadcast_to(np.int32(0), total),
        loss_weights=np.broadcast_to(np.float32(0), total),
        offsets=offsets,
        lines=np.arange(1, samples + 1),
        trained=np.full(samples, 1, np.int32),
        hashes=hashes,
        prompt_hashes=hashes,
        splits=np.broadcast_to(np.int32(0), samples),
        labels=np.broadcast_to(np.int8(0), samples),
        margins=np.broadcast_to(np.float32(0), samples),
        begins=np.broadcast_to(np.True_, samples),
        rows=samples,
        left_out=0,
        notes={},
        bad_rows=0,
        checksum=0,
    )


def memory(name: str) -> int | None:
    """Bytes of resident memory now (`VmRSS`) or at most (`VmHWM`)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(name))


@dataclass
class Stages:
    """Runs and prints one stage after another."""

    samples: int

    def __call__(self, name: str, stage: Callable[[], Any]) -> Any:
        """What the stage returns."""
        if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
            trim(0)  # what an earlier stage has freed would hide what this one takes
        if memory("VmHWM") is not None:
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before, start = memory("VmRSS"), time.perf_counter()
        result = stage()
        seconds, peak, after = time.perf_counter() - start, memory("VmHWM"), memory("VmRSS")
        peaks = "n/a"
        if before is not None and peak is not None and after is not None:
            peaks = f"{(peak - before) / self.samples:8.1f} {(after - before) / self.samples:8.1f}"
        print(f"{name:28} {seconds:8.2f} {self.samples / seconds / 1e6:8.2f} {peaks:>17}", flush=True)
        return result


def check(plan: Plan, lengths: np.ndarray, drawn: np.ndarray, row_length: int) -> None:
    """Each sample lies in the plan as often as it was drawn, and every row holds what it says and fits."""
    np.testing.assert_array_equal(np.bincount(plan.sample_ids, minlength=len(lengths)), drawn)
    tokens = np.add.reduceat(lengths[plan.sample_ids], plan.row_offsets[:-1], dtype=np.int64)
    np.testing.assert_array_equal(plan.row_tokens, tokens)
    assert int(tokens.max()) <= row_length


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(samples=10_000_000, row_length=8192, sources=2).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--median", type=float, default=245.0, help="tokens of the median sample; default 245")
    parser.add_argument("--sigma", type=float, default=1.0, help="of the logarithm of the lengths; default 1")
    a = parser.parse_args()

    sizes = [len(part) for part in np.array_split(np.empty(a.samples, bool), a.sources)]
    caches = {
        f"data.train.{source}": [synthetic_cache(source, size, a.median, a.sigma, a.row_length // 2)]
        for source, size in enumerate(sizes)
    }
    sources = {key: SourceConfig(path=files[0].path, weight=1.0 + i) for i, (key, files) in enumerate(caches.items())}
    print(f"{a.samples:,} samples of {a.sources} sources, rows of {a.row_length}")
    print(f"{'':28} {'seconds':>8} {'M/s':>8} {'peak B':>8} {'held B':>8}   a sample")
    stages = Stages(a.samples)
    table, _ = stages(
        "sample table, duplicates",
        lambda: sample_table(caches, sources, max_length=a.row_length // 2, truncation="keep_start", seed=0),
    )
    marked = stages("held-out split", lambda: split_heldout(table, 0.02, seed=0))
    train, heldout = stages("taking both parts", lambda: (table.take(~marked), table.take(marked)))
    del table, marked
    stages("overlap", lambda: find_overlap(train, heldout))
    sizes = np.diff(train.source_bounds).tolist()

    stages.samples = len(train)
    plan = stages("plan", lambda: plan_rows(train.lengths, a.row_length, seed=0, epoch=0))
    check(plan, train.lengths, np.ones(len(train), np.int64), a.row_length)
    results = [("plan", plan)]
    del plan

    mixture = Mixture(sizes, epoch_counts(sizes, list(sources.values())), seed=0)
    stages.samples = sum(mixture.counts)
    order = stages("order of a mixture, epoch 1", lambda: mixture.order(1))
    mixed = stages("plan of the mixture", lambda: plan_rows(train.lengths, a.row_length, seed=0, epoch=1, order=order))
    drawn = np.bincount(order, minlength=len(train)) if order is not None else np.ones(len(train), np.int64)
    check(mixed, train.lengths, drawn, a.row_length)
    for name, plan in [*results, ("plan of the mixture", mixed)]:
        print(
            f"{name}: {len(plan.sample_ids):,} samples in {plan.num_rows:,} rows, {plan.efficiency:.2%} filled: checked"
        )


if __name__ == "__main__":
    main()
