"""Samples -> batches of packed rows, and a loader that starts at any step; `pipeline.py` makes a run's data sets of it.

`PackedDataset` is random access over steps: step `s` and a row number fix which samples are read, whoever reads them,
so processes read only their own rows and a resumed run needs no state but the step.
"""

import hashlib
import threading
from bisect import bisect_right
from collections.abc import Generator, Sequence
from dataclasses import replace
from functools import partial

import grain
import numpy as np
from jaxtyping import Float32, Int

from posttrain.data.mixture import Mixture
from posttrain.data.packing import Plan, plan_rows
from posttrain.data.pairs import RowsKind
from posttrain.data.samples import PackedSegment, SampleTable
from posttrain.records import Batch

_PLANS_HELD = 2

_TOKENS_A_SAMPLE = 64
"""A row of pairs or labelled answers has places for as many as it could hold if they had only so many tokens."""


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


Side = tuple[int, float]
"""What a segment is, as in `Batch.sides`, and its margin."""


def with_sides(batch: Batch, sides: Sequence[Sequence[Side]], slots: int) -> Batch:
    """Packed rows that say what each segment is. `sides` has one for each segment of each row; `slots` is the size of
    the per-segment arrays."""
    kinds, margins = np.zeros((len(sides), slots), np.int32), np.zeros((len(sides), slots), np.float32)
    for row, of_row in enumerate(sides):
        for segment, (kind, margin) in enumerate(of_row):
            kinds[row, segment], margins[row, segment] = kind, margin
    return replace(batch, sides=kinds, margins=margins)


def segment_slots(rows: RowsKind, row_length: int, *, mismatched: bool) -> int | None:
    """Segments of a row of pairs or labelled answers that the per-segment arrays have room for; of others None."""
    samples = _samples_a_row(rows, row_length)
    return None if samples is None else samples * (2 if rows == "pairs" or mismatched else 1)


def _samples_a_row(rows: RowsKind, row_length: int) -> int | None:
    return None if rows == "single" else max(1, row_length // _TOKENS_A_SAMPLE)


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
        rows: RowsKind = "single",
        mixture: Mixture | None = None,
    ):
        if len(table) == 0:
            raise ValueError("a data set needs at least one sample")
        self.table = table
        self.row_length = row_length
        self.global_batch_size = global_batch_size
        self.rows: RowsKind = rows
        samples_a_row = _samples_a_row(rows, row_length)
        self.slots = segment_slots(rows, row_length, mismatched=table.partners is not None)
        """Of rows of pairs and labelled answers: the size of the per-segment arrays."""
        self.ref_logps: RefLogps | None = None
        """The reference model's log-probabilities, once they are known."""
        self._plan_epoch = partial(
            plan_rows,
            table.lengths,
            row_length,
            seed=seed,
            packing=packing,
            shuffle=shuffle,
            max_segments=samples_a_row,
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
        samples = [self._samples(step, int(row)).tolist() for row in rows]
        segments = [[part for sample in of_row for part in self.table.segments(sample)] for of_row in samples]
        batch = assemble(segments, self.row_length)
        if self.slots is not None:
            sides = [[side for sample in of_row for side in self._sides(sample)] for of_row in samples]
            batch = with_sides(batch, sides, self.slots)
        if self.ref_logps is not None:
            batch = replace(batch, ref_logps=self.ref_logps.rows(samples, self.row_length))
        return batch

    def _sides(self, sample: int) -> list[Side]:
        """What a sample's segments are."""
        if self.rows == "pairs":
            return [(1, self.table.margin(sample)), (-1, 0.0)]
        own = (self.table.label(sample), 0.0)
        return [own] if self.table.partners is None else [own, (2, 0.0)]

    def segment_lengths(self, step: int) -> Int[np.ndarray, "segments"]:
        """Tokens of every segment in a step's global batch."""
        rows = [self._samples(step, row) for row in range(self.global_batch_size)]
        return self.table.segment_lengths(np.concatenate(rows))

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
    digest.update(
        repr((dataset.num_steps, dataset.table.bounds, dataset.table.max_length, dataset.table.keep_end)).encode()
    )
    digest.update(repr(dataset.table.partners is not None).encode())
    for array in (dataset.table.index, plan.sample_ids, plan.row_offsets, plan.row_tokens):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


class RefLogps:
    """The reference model's log-probability of every token of a sample table that is trained; 0 for the others."""

    def __init__(self, table: SampleTable, values: Float32[np.ndarray, "tokens"]):
        self._starts = token_starts(table)
        self.values = values
        """The samples' tokens, truncated, end to end."""

    def rows(self, samples: Sequence[Sequence[int]], row_length: int) -> Float32[np.ndarray, "B T"]:
        """Those of packed rows of samples."""
        rows = np.zeros((len(samples), row_length), np.float32)
        for row, of_row in enumerate(samples):
            at = 0
            for sample in of_row:
                part = self.values[self._starts[sample] : self._starts[sample + 1]]
                rows[row, at : at + len(part)] = part
                at += len(part)
        return rows


def token_starts(table: SampleTable) -> Int[np.ndarray, "samples_and_one"]:
    """Where each sample begins when the tokens of all lie end to end, and where the last one ends."""
    starts = np.zeros(len(table) + 1, np.int64)
    np.cumsum(table.lengths, out=starts[1:])
    return starts
