"""The data as the model sees it, gathered into one record: what `posttrain inspect` shows.

Stands beside the data path and changes nothing in it: the data sets are those that training builds, only that bad rows
do not stop it here. `inspect_text.py` shows the record in the terminal, `inspect_page.py` as a page.
"""

import logging
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import count, islice

import numpy as np
from jaxtyping import Int, UInt64

from posttrain.config import DataConfig, SourceConfig
from posttrain.data.inspect_answers import LABELS, PAIRS, Answers, measure
from posttrain.data.inspect_marks import Marks, compare_marks
from posttrain.data.inspect_rows import (
    Reject,
    Segment,
    ShownSample,
    plain_sample,
    reject_kinds,
    show_rejects,
    show_samples,
)
from posttrain.data.inspect_samples import SourceFile, alike_hashes, choose, find, source_files
from posttrain.data.packed import PackedDataset
from posttrain.data.pairs import RowsKind
from posttrain.data.pipeline import Datasets
from posttrain.data.samples import SampleTable, sample_table
from posttrain.data.sources import ENCODERS, tokenize_sources
from posttrain.data.stats import SourceStats
from posttrain.data.tokenizer import Tokenizer
from posttrain.errors import UserError, UserErrors

_PICTURED_ROWS = 24
_MARKED_SAMPLES = 300
"""Samples whose rows are compared with the template's own marks."""
_MARKED_SHOWN = 12


@dataclass(frozen=True)
class InspectOptions:
    """What `inspect` shows."""

    rows: int = 2
    """Packed rows shown in the terminal; with --find, samples."""
    epoch: int | None = None
    """Show rows of this epoch, counted from 0."""
    step: int | None = None
    """Show rows of this optimizer step, counted from 0."""
    html: str | None = None
    """Write a page to this file: everything that is shown here, and more samples, with search."""
    samples: int = 60
    """Samples on the page: some of every source, with truncated, split, dropped and rejected ones."""
    find: str | None = None
    """Show only samples with this text, whatever its capitals."""

    def check(self) -> None:
        """Raises UserError."""
        if self.rows < 0 or self.samples < 1:
            raise UserError(f"--rows {self.rows}, --samples {self.samples}: give at least 0 rows and 1 sample")
        if self.epoch is not None and self.step is not None:
            raise UserError("--epoch and --step: give one of them")
        if self.find == "":
            raise UserError("--find: give the text to look for")


@dataclass(frozen=True)
class PackedRow:
    """A row of a batch."""

    step: int
    row: int
    """In the step's global batch."""
    row_length: int
    samples: tuple[ShownSample, ...]

    @property
    def tokens(self) -> int:
        """Tokens in the row, without padding."""
        return sum(len(sample.tokens) for sample in self.samples)


@dataclass(frozen=True)
class Inspection:
    """What a run would be trained on, and what of it is shown."""

    data: DataConfig
    rows: RowsKind
    """What the objective is trained on."""
    tokenizer: Tokenizer
    stats: tuple[SourceStats, ...]
    """Of each training source, then of the held-out file."""
    files: tuple[SourceFile, ...]
    datasets: Datasets | None
    """None where no run could be built of the data."""
    problem: str
    """Then why."""
    packed: tuple[PackedRow, ...]
    samples: tuple[ShownSample, ...]
    matches: int | None
    """With a text to find: samples that hold it."""
    rejects: tuple[Reject, ...]
    reject_kinds: tuple[tuple[int, str], ...]
    """(how many, example) of the kinds of reasons for which rows are rejected, the most frequent first."""
    marks: Marks

    @property
    def noun(self) -> str:
        """What a sample is called."""
        return "pair" if self.rows == "pairs" else "sample"

    @property
    def train_files(self) -> list[SourceFile]:
        """Those of the training sources."""
        return [file for file in self.files if file.key != "data.heldout"]

    @cached_property
    def lengths(self) -> Int[np.ndarray, "segments"]:
        """Tokens of all samples, of pairs of all their sides, of the training sources before truncation and filtering,
        ascending."""
        return np.sort(np.concatenate([np.zeros(0, np.int64), *(file.lengths for file in self.train_files)]))

    @cached_property
    def answers(self) -> Answers | None:
        """The answers measured, where the objective tells some from others."""
        if self.rows == "single":
            return None
        return measure(self.train_files, PAIRS if self.rows == "pairs" else LABELS)

    @property
    def bad_rows(self) -> int:
        """Rows that cannot be used."""
        return sum(source.bad_rows for source in self.stats)


def gather(
    data: DataConfig,
    tokenizer: Tokenizer,
    build: Callable[[DataConfig], Datasets],
    options: InspectOptions,
    *,
    rows: RowsKind,
    seed: int,
) -> Inspection:
    """Builds the data sets and chooses what to show.

    Args:
      data: the config's section.
      tokenizer: of the run.
      build: the data sets of a section as the run builds them.
      options: what to show; checked.
      rows: what the objective is trained on.
      seed: chooses the samples that are shown, and as `run.seed` those that are used where `build` fails.

    Bad rows, and data of which too little is left to train on, do not stop it: they are shown. Raises UserError for
    what cannot be read at all, and for a step or epoch that the run does not reach.
    """
    options.check()
    sources = {f"data.train.{number}": source for number, source in enumerate(data.train)}
    if data.heldout.path is not None:
        sources["data.heldout"] = data.heldout.as_source()
    lenient = data.model_copy(update={"on_bad_row": "skip", "max_bad_rows": sys.maxsize})
    datasets, problem = None, ""
    with _quiet():
        try:
            datasets = build(lenient)
            stats = datasets.stats
            tables = (datasets.train.table, datasets.heldout.table if datasets.heldout else None)
        except UserError as error:
            problem = "\n".join(error.problems) if isinstance(error, UserErrors) else str(error)
            tables, stats = _tables(sources, tokenizer, lenient, rows, seed)
    files = source_files(*tables, sources, data, seed)
    alike = alike_hashes(files)
    if options.find is None:
        places, matches = choose(files, options.samples, alike=alike, seed=seed), None
    else:
        found = find(files, tokenizer, options.find)
        places = list(islice(found, options.samples))
        matches = len(places) + sum(1 for _ in found)
    encode = partial(ENCODERS[rows], tokenizer=tokenizer, loss_on=data.loss_on)
    return Inspection(
        data=data,
        rows=rows,
        tokenizer=tokenizer,
        stats=stats,
        files=tuple(files),
        datasets=datasets,
        problem=problem,
        packed=() if datasets is None else _packed_rows(datasets.train, files, alike, options),
        samples=tuple(show_samples(files, places, encode, alike=alike)),
        matches=matches,
        rejects=tuple(show_rejects(files, max(5, options.samples // 2), options.find or "")),
        reject_kinds=tuple(reject_kinds(files)),
        marks=compare_marks(
            files, choose(files, _MARKED_SAMPLES, alike=alike, seed=seed), tokenizer, shown=_MARKED_SHOWN
        ),
    )


def _tables(
    sources: Mapping[str, SourceConfig], tokenizer: Tokenizer, data: DataConfig, rows: RowsKind, seed: int
) -> tuple[tuple[SampleTable, SampleTable | None], tuple[SourceStats, ...]]:
    """(the samples to train on and to hold out, stats) without a run: as far as they go."""
    caches = tokenize_sources(sources, tokenizer, data, rows=rows)
    tabulate = partial(sample_table, max_length=data.max_length, truncation=data.truncation, seed=seed)
    keys = [key for key in sources if key != "data.heldout"]
    train, stats = tabulate({key: caches[key] for key in keys}, sources, drop_duplicates=data.drop_duplicates)
    if len(keys) == len(sources):
        return (train, None), stats
    heldout, heldout_stats = tabulate({"data.heldout": caches["data.heldout"]}, sources)
    return (train, heldout), stats + heldout_stats


@contextmanager
def _quiet() -> Iterator[None]:
    """What is logged while data sets are built is what is shown here."""
    loggers = [logging.getLogger(f"posttrain.data.{name}") for name in ("stats", "pipeline")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# ---- packed rows ----------------------------------------------------------------------------------------------------


def _packed_rows(
    train: PackedDataset, files: list[SourceFile], alike: UInt64[np.ndarray, "hashes"], options: InspectOptions
) -> tuple[PackedRow, ...]:
    """The rows from the asked step or epoch on, at least as many as the page pictures."""
    epoch, first_step, row = _locate(train, options)
    plan = train.plan(epoch)
    numbers = {(file.key, file.cache.path): number for number, file in enumerate(files)}

    def shown(sample: int) -> ShownSample:
        part = bisect_right(train.table.bounds, sample) - 1
        key = train.table.keys[train.table.source_of[part]]
        file = files[numbers[key, train.table.caches[part].path]]
        own = plain_sample(file, int(train.table.index[sample]), alike)
        others = train.table.segments(sample)[len(own.segments) :]
        return replace(own, segments=(*own.segments, *(Segment.of(*other) for other in others)))

    last = min(plan.num_rows, row + max(options.rows, _PICTURED_ROWS))
    return tuple(
        PackedRow(
            first_step + number // train.global_batch_size,
            number % train.global_batch_size,
            train.row_length,
            tuple(shown(sample) for sample in plan.row(number).tolist()),
        )
        for number in range(row, last)
    )


def _locate(train: PackedDataset, options: InspectOptions) -> tuple[int, int, int]:
    """(epoch, its first step, row of its plan) where the rows that were asked for begin."""
    if options.step is not None and not 0 <= options.step < train.num_steps:
        raise UserError(
            f"--step {options.step}: the run has {train.num_steps:,} steps; give 0 to {train.num_steps - 1}"
        )
    first = 0
    for epoch in count():
        steps = -(-train.plan(epoch).num_rows // train.global_batch_size)
        if options.step is not None and options.step < first + steps:
            return epoch, first, (options.step - first) * train.global_batch_size
        if options.step is None and epoch == (options.epoch or 0):
            return epoch, first, 0
        first += steps
        if first >= train.num_steps:
            break
    raise UserError(f"--epoch {options.epoch}: the run reaches epochs 0 to {epoch}; give one of them")
