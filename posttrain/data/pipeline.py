"""The data sets of a run from its config: the last step of the data path."""

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from posttrain.config import DataConfig
from posttrain.data.mismatched import with_partners
from posttrain.data.mixture import Mixture, epoch_counts, epoch_use
from posttrain.data.packed import PackedDataset, plan_fingerprint
from posttrain.data.pairs import RowsKind
from posttrain.data.samples import SampleTable, count_by_source, sample_table
from posttrain.data.sources import tokenize_sources
from posttrain.data.split import Overlap, find_overlap, split_heldout
from posttrain.data.stats import SourceStats, check_kept, log_epoch_use, log_source
from posttrain.data.tokenizer import Tokenizer
from posttrain.errors import UserError, UserErrors

log = logging.getLogger(__name__)


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
    rows: RowsKind = "single",
    mismatched: bool = False,
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
      rows: what the objective is trained on.
      mismatched: of labelled answers, whether each has a second segment, its prompt with another's answer.
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
        sources | heldout_sources,
        tokenizer,
        data,
        rows=rows,
        rejects_dir=rejects_dir,
        is_main=is_main,
        barrier=barrier,
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
    if rows == "labelled":
        _check_labels(table)
    if mismatched:
        table, heldout = with_partners(table), with_partners(heldout) if len(heldout) else heldout
    bounds = table.source_bounds
    sizes = np.diff(bounds).tolist()
    mixture = Mixture(sizes, epoch_counts(sizes, data.train), seed=seed)
    stats = tuple(replace(of, epoch=use) for of, use in zip(stats, epoch_use(table, mixture), strict=True))
    dataset = partial(PackedDataset, row_length=data.row_length, seed=seed, packing=data.packing, rows=rows)
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


def _check_labels(table: SampleTable) -> None:
    """Raises `UserError` where all labels are the same: nothing would tell a good answer from a bad one."""
    labels = table.labels()
    desirable = int(np.count_nonzero(labels == 1))
    log.info("labelled answers to train on: %d desirable, %d undesirable", desirable, len(labels) - desirable)
    if desirable in (0, len(labels)):
        raise UserError(
            f"data.train: all {len(labels)} labels are {str(desirable > 0).lower()}; answers of both kinds are needed: "
            "add the other kind, or fine-tune on good answers with objective.name sft"
        )


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
