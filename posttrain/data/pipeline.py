"""Samples -> batches of packed rows, a loader that starts at any step, and the data sets of a run from its config.

The last step of the data path. `PackedDataset` is random access over steps: step `s` and a row number fix which samples
are read, whoever reads them, so processes read only their own rows and a resumed run needs no state but the step.
"""

import hashlib
import logging
import threading
from bisect import bisect_right
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import grain
import numpy as np
from jaxtyping import Int

from posttrain.config import DataConfig
from posttrain.data.mixture import Mixture, epoch_counts, epoch_use
from posttrain.data.packing import Plan, plan_rows
from posttrain.data.samples import SampleTable, count_by_source, sample_table
from posttrain.data.sources import tokenize_sources
from posttrain.data.split import Overlap, find_overlap, split_heldout
from posttrain.data.stats import SourceStats, check_kept, log_epoch_use, log_source
from posttrain.data.tokenizer import Tokenizer
from posttrain.errors import UserError, UserErrors
from posttrain.records import Batch

log = logging.getLogger(__name__)

_PLANS_HELD = 2


# ---- rows and steps -------------------------------------------------------------------------------------------------


PackedSegment = tuple[np.ndarray, np.ndarray]
"""Token ids and loss weights of one sample."""


def assemble(rows: Sequence[Sequence[PackedSegment]], row_length: int) -> Batch:
    """Packed rows `[len(rows), row_length]` of the given samples, as numpy arrays; a row without any is all padding."""
    shape = (len(rows), row_length)
    tokens, segment_ids, positions = np.zeros((3, *shape), np.int32)
    loss_weights = np.zeros(shape, np.float32)
    for row, segments in enumerate(rows):
        at = 0
        for segment, (ids, weights) in enumerate(segments, 1):
            place = slice(at, at + len(ids))
            tokens[row, place] = ids
            segment_ids[row, place] = segment
            positions[row, place] = np.arange(len(ids), dtype=np.int32)
            loss_weights[row, place] = weights
            loss_weights[row, at] = 0.0
            at += len(ids)
    return Batch(tokens=tokens, segment_ids=segment_ids, positions=positions, loss_weights=loss_weights)


class PackedDataset:
    """Global batches of packed rows, by step.

    Every epoch has its own plan, a function of (`seed`, epoch), and ends with its last step: rows missing there are
    empty (segment 0, weight 0). With `max_steps` epochs follow each other until that step, planned as they are reached.
    An epoch is every sample once, or what a `mixture` draws for it.
    """

    def __init__(
        self,
        table: SampleTable,
        *,
        row_length: int,
        global_batch_size: int,
        seed: int,
        epochs: int = 1,
        max_steps: int | None = None,
        shuffle: bool = True,
        packing: bool = True,
        max_segments: int | None = None,
        mixture: Mixture | None = None,
    ):
        if len(table) == 0:
            raise ValueError("a data set needs at least one sample")
        self.table = table
        self.row_length = row_length
        self.global_batch_size = global_batch_size
        self._plan_epoch = partial(
            plan_rows, table.lengths, row_length, seed=seed, packing=packing, shuffle=shuffle, max_segments=max_segments
        )
        self._shuffle = shuffle
        self._mixture = mixture
        self._lock = threading.Lock()  # the loader's thread and the loop both plan
        self._plans: dict[int, Plan] = {}
        self._ends: list[int] = []
        """The step after each epoch's last."""
        first = self._plan(0)
        self.num_rows = first.num_rows
        """Rows of the first epoch, without those that fill its last batch."""
        self.num_samples = len(first.sample_ids)
        """Segments in these rows; the same in every epoch."""
        self.num_tokens = first.num_tokens
        self.efficiency = first.efficiency
        """Tokens per place in these rows, 0 to 1."""
        while max_steps is None and len(self._ends) < epochs:
            self._plan(len(self._ends))
        self.num_steps = self._ends[-1] if max_steps is None else max_steps

    @property
    def steps_per_epoch(self) -> list[int]:
        """Steps of each epoch that the run reaches; of a last one that it leaves early, the whole epoch's."""
        self._locate(self.num_steps - 1)
        ends = self._ends[: bisect_right(self._ends, self.num_steps - 1) + 1]
        return np.diff(ends, prepend=0).tolist()

    def epoch(self, step: int) -> float:
        """Epochs behind a run that has done `step` steps."""
        if step == 0:
            return 0.0
        epoch, first, _ = self._locate(step - 1)
        return epoch + (step - first) / (self._ends[epoch] - first)

    def read(self, step: int, rows: Int[np.ndarray, "rows"]) -> Batch:
        """The given rows of one step's global batch: `[len(rows), row_length]` numpy arrays."""
        return assemble(
            [[self.table.segment(int(sample)) for sample in self._samples(step, int(row))] for row in rows],
            self.row_length,
        )

    def segment_lengths(self, step: int) -> Int[np.ndarray, "segments"]:
        """Tokens of every segment in a step's global batch."""
        rows = [self._samples(step, row) for row in range(self.global_batch_size)]
        return self.table.lengths[np.concatenate(rows)]

    def plan(self, epoch: int) -> Plan:
        """The rows of an epoch that the run reaches."""
        with self._lock:
            while epoch >= len(self._ends):
                self._plan(len(self._ends))
            return self._plan(epoch)

    def describe(self, step: int, row: int) -> list[str]:
        """`file:line` of every segment of a row."""
        return [self.table.where(int(sample)) for sample in self._samples(step, row)]

    def loader(
        self, rows: Int[np.ndarray, "rows"], start_step: int = 0, stop_step: int | None = None, prefetch: int = 2
    ) -> Generator[tuple[int, Batch], None, None]:
        """(step, its batch of `rows`) from `start_step` up to `stop_step` (default: the last), read ahead by a thread.

        Ends only at `stop_step`: what goes wrong while reading is raised here. Closing the generator ends the thread.
        """
        stop = self.num_steps if stop_step is None else stop_step
        if not 0 <= start_step <= stop <= self.num_steps:
            raise ValueError(f"steps {start_step} to {stop} of a data set with {self.num_steps} steps")
        return self._load(rows, start_step, stop, prefetch)

    def _load(
        self, rows: Int[np.ndarray, "rows"], start: int, stop: int, prefetch: int
    ) -> Generator[tuple[int, Batch], None, None]:
        if start == stop:
            return
        in_this_thread = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)  # more threads slow down reads of RAM
        steps = grain.MapDataset.range(start, stop).map(lambda step: self.read(int(step), rows))
        batches = iter(
            grain.experimental.ThreadPrefetchIterDataset(
                steps.to_iter_dataset(in_this_thread), prefetch_buffer_size=prefetch
            )
        )
        try:
            for step in range(start, stop):
                try:
                    batch = next(batches)
                except StopIteration as error:
                    raise RuntimeError(f"the data ended at step {step} of {stop}") from error
                yield step, batch
        finally:
            batches.close()

    def _samples(self, step: int, row: int) -> Int[np.ndarray, "segments"]:
        """The samples in one row of a step's global batch; none in a row that only fills the batch."""
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of a data set with {self.num_steps} steps")
        if not 0 <= row < self.global_batch_size:
            raise IndexError(f"row {row} of a global batch of {self.global_batch_size} rows")
        _, first, plan = self._locate(step)
        index = (step - first) * self.global_batch_size + row
        return plan.row(index) if index < plan.num_rows else plan.sample_ids[:0]

    def _locate(self, step: int) -> tuple[int, int, Plan]:
        """(epoch of a step, that epoch's first step, its plan)."""
        with self._lock:
            while step >= self._ends[-1]:
                self._plan(len(self._ends))
            epoch = bisect_right(self._ends, step)
            return epoch, self._ends[epoch - 1] if epoch else 0, self._plan(epoch)

    def _plan(self, epoch: int) -> Plan:
        """The plan of an epoch, at most the one after those that are known; the last few used are held."""
        key = epoch if self._shuffle or self._mixture else 0  # otherwise all epochs are alike
        plan = self._plans.pop(key, None) or self._plan_epoch(
            epoch=key, order=self._mixture.order(key) if self._mixture else None
        )
        self._plans[key] = plan
        while len(self._plans) > _PLANS_HELD:
            del self._plans[next(iter(self._plans))]
        if epoch == len(self._ends):
            steps = -(-plan.num_rows // self.global_batch_size)
            self._ends.append(steps + (self._ends[-1] if self._ends else 0))
        return plan


def plan_fingerprint(dataset: PackedDataset) -> str:
    """Equal where two processes, or two runs, have planned the same rows of the same samples (about 0.1 s of 10 M)."""
    plan = dataset.plan(0)
    digest = hashlib.blake2b(digest_size=8)
    digest.update(repr((dataset.num_steps, dataset.table.bounds, dataset.table.keep_end)).encode())
    for array in (dataset.table.index, plan.sample_ids, plan.row_offsets, plan.row_tokens):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


# ---- from the config ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Datasets:
    """What a run trains on and is measured on."""

    train: PackedDataset
    heldout: PackedDataset | None
    stats: tuple[SourceStats, ...]
    """Of each training source, then of the held-out file."""
    overlap: Overlap | None
    """Of held-out and training samples."""

    @property
    def fingerprint(self) -> str:
        """Equal for equal samples; with the config, fixes every row of every step."""
        tables = [self.train.table] + ([self.heldout.table] if self.heldout else [])
        checksums = " ".join(f"{cache.checksum:08x}" for table in tables for cache in table.caches)
        return hashlib.blake2b(checksums.encode(), digest_size=8).hexdigest()


def build_datasets(
    data: DataConfig,
    tokenizer: Tokenizer,
    *,
    global_batch_size: int,
    max_steps: int | None,
    seed: int,
    rejects_dir: str | Path | None,
    heldout_batch_size: int | None = None,
    barrier: Callable[[str], None] = lambda name: None,
    gather: Callable[[str], Sequence[str]] = lambda text: [text],
    is_main: bool = True,
) -> Datasets:
    """Tokenizes what is not yet tokenized and plans the run.

    Args:
      data: the config's section.
      tokenizer: encodes the rows.
      global_batch_size: rows per step.
      heldout_batch_size: rows per held-out batch, by default the same; nothing but the number of empty rows in the last
        one depends on it.
      max_steps: steps of the run; None for `data.epochs` epochs.
      seed: chooses the held-out samples, those under a limit, and the order of the others.
      rejects_dir: gets `rejects.jsonl` when bad rows are skipped; None: nothing does.
      barrier: waits for all processes; called with a name.
      gather: gives every process the texts of all, by process number; called once, with what tells plans apart.
      is_main: whether this process tokenizes first, shows progress and warns.

    Raises:
      UserError: what is wrong with the data, as far as possible all at once; or the processes have planned different
        rows.
    """
    sources = {f"data.train.{index}": source for index, source in enumerate(data.train)}
    heldout_sources = {} if data.heldout.path is None else {"data.heldout": data.heldout.as_source()}
    caches = tokenize_sources(
        sources | heldout_sources, tokenizer, data, rejects_dir=rejects_dir, is_main=is_main, barrier=barrier
    )
    tabulate = partial(sample_table, max_length=data.max_length, truncation=data.truncation, seed=seed)
    table, stats = tabulate({key: caches[key] for key in sources}, sources, drop_duplicates=data.drop_duplicates)
    check_kept(stats)
    if heldout_sources:
        heldout, heldout_stats = tabulate({key: caches[key] for key in heldout_sources}, heldout_sources)
        check_kept(heldout_stats)
    else:
        table, heldout, stats = _split(table, stats, data.heldout.fraction, seed)
        heldout_stats = ()
    bounds = table.source_bounds
    sizes = np.diff(bounds).tolist()
    mixture = Mixture(sizes, epoch_counts(sizes, data.train), seed=seed)
    stats = tuple(replace(of, epoch=use) for of, use in zip(stats, epoch_use(table, mixture), strict=True))
    dataset = partial(PackedDataset, row_length=data.row_length, seed=seed, packing=data.packing)
    train = dataset(
        table, global_batch_size=global_batch_size, epochs=data.epochs, max_steps=max_steps, mixture=mixture
    )
    measured = overlap = None
    if len(heldout):
        measured = dataset(heldout, global_batch_size=heldout_batch_size or global_batch_size, shuffle=False)
        overlap = find_overlap(table, heldout)
    datasets = Datasets(train, measured, stats + heldout_stats, overlap)
    _check_agreement(gather(f"{datasets.fingerprint} {plan_fingerprint(train)}"))
    if is_main:
        _log_datasets(datasets)
    return datasets


def _split(
    table: SampleTable, stats: tuple[SourceStats, ...], fraction: float, seed: int
) -> tuple[SampleTable, SampleTable, tuple[SourceStats, ...]]:
    """Training samples, held-out samples, and the stats with how many of each source are held out."""
    marked = split_heldout(table, fraction, seed=seed)
    counts = count_by_source(table, marked)
    if 2 * sum(counts) > len(table):
        raise UserError(
            f"data.heldout.fraction={fraction} holds out {sum(counts)} of {len(table)} samples, more than is left; at "
            "most 0.5, and samples that are exactly alike, or of one row, stay together"
        )
    used_up = [
        f"{of.key}: all its {count} samples are held out; give data.heldout.path, or data.heldout.fraction 0"
        for of, count in zip(stats, counts, strict=True)
        if count == of.samples
    ]
    if used_up:
        raise UserErrors(used_up)
    stats = tuple(replace(of, heldout=count) for of, count in zip(stats, counts, strict=True))
    return table.take(~marked), table.take(marked), stats


def _check_agreement(texts: Sequence[str]) -> None:
    """Raises `UserError` when not all processes have the same samples and the same plan."""
    samples, plans = zip(*(text.split() for text in texts), strict=True)
    for what, found, fix in (
        ("read other samples", samples, "give all of them the same data files and tokenizer"),
        ("planned other rows", plans, "install the same versions of posttrain and NumPy everywhere"),
    ):
        others = [str(process) for process, text in enumerate(found) if text != found[0]]
        if others:
            raise UserError(f"data: of {len(texts)} processes, {', '.join(others)} {what} than process 0; {fix}")


# ---- what is told of them -------------------------------------------------------------------------------------------


def _log_datasets(datasets: Datasets) -> None:
    for source in datasets.stats:
        log_source(source)
    log_epoch_use(datasets.stats)
    train = datasets.train
    if train.num_rows < train.global_batch_size:
        log.warning(
            "an epoch has %d rows, fewer than train.global_batch_size=%d: every step is padded with empty rows",
            train.num_rows,
            train.global_batch_size,
        )
    _log_overlap(datasets.overlap)


def _log_overlap(overlap: Overlap | None) -> None:
    if overlap is None:
        log.info("nothing is held out")
    elif overlap.prompts:
        log.warning(
            "held out: %d of %d samples are exactly among the training samples, and %d have a prompt that is there: "
            "their loss says little about new data",
            overlap.samples,
            overlap.heldout,
            overlap.prompts,
        )
