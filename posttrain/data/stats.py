"""What became of the data, counted by source: refused where most of it is lost, and told in the log.

Filled in by `samples.py` and `pipeline.py`; the tables of a dry run and `inspect` show the same numbers.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from posttrain.errors import UserErrors

log = logging.getLogger(__name__)

UNTRAINED = "without a token to train on"
TOO_LONG = "longer than data.max_length"
TRUNCATED_AWAY = "without a token to train on after truncation"
OVER_LIMIT = "beyond the limit"
DUPLICATE = "exactly like an earlier sample"
"""Why samples are left out."""

FIXES = {
    UNTRAINED: "check data.loss_on against the rows",
    TOO_LONG: "raise data.max_length, or set data.truncation to keep_start",
    TRUNCATED_AWAY: "raise data.max_length, or try another data.truncation",
}
"""What helps where the config asked for something else; the other reasons are what it asked for."""


@dataclass(frozen=True)
class EpochUse:
    """What an epoch (the first; the others are alike) takes of one source."""

    available: int
    """Samples that there are to train on: without the held-out ones."""
    samples: int
    tokens: int
    trained_tokens: int
    sample_share: float
    """Share of all samples of the epoch, 0 to 1; so the other two of its tokens and its trained tokens."""
    token_share: float
    trained_share: float

    @property
    def passes(self) -> float:
        """How often an epoch goes through the source; below 1, the share of it that one epoch uses."""
        return self.samples / self.available


@dataclass(frozen=True)
class SourceStats:
    """What became of one source, summed over its files."""

    key: str
    """Its place in the config, e.g. `data.train.0`."""
    path: str
    """As the config names it."""
    files: int
    rows: int
    """Records read, bad ones included."""
    left_out: int
    """Records that give nothing, though nothing is wrong with them."""
    bad_rows: int
    """Records of which no sample could be made."""
    samples: int
    """Kept, before the held-out split."""
    tokens: int
    """Of the kept samples, truncated."""
    trained_tokens: int
    truncated: int
    """Kept samples that lost tokens to `max_length`."""
    dropped: Mapping[str, int]
    """Samples left out, by reason."""
    duplicates: int
    """Samples exactly like an earlier one of any source, dropped or not."""
    notes: Mapping[str, int]
    """What is remarkable about samples, and about what is left out, by how many."""
    heldout: int = 0
    """Kept samples that are held out."""
    epoch: EpochUse | None = None
    """None of a held-out file."""


def check_kept(stats: Sequence[SourceStats]) -> None:
    """Refuses data of which most is dropped: then it is the config that is wrong, not some samples.

    Raises:
      UserErrors: names each source of which nothing is left; otherwise, where most samples of all sources together drop
        out, every source that loses some: how many, for which reasons, and what helps.
    """
    faulty = {source.key: Counter({r: n for r, n in source.dropped.items() if r in FIXES}) for source in stats}
    usable = {s.key: s.samples + sum(s.dropped.values()) - faulty[s.key].total() for s in stats}
    empty = [source for source in stats if not source.samples]
    if empty:
        raise UserErrors([_nothing_left(source, faulty[source.key]) for source in empty])
    lost = sum((counts.total() for counts in faulty.values()), 0)
    if lost > sum(usable.values()):
        problems = [
            f"{key}: {counts.total()} of {counts.total() + usable[key]} samples drop out ({_reasons(counts)}); "
            f"{_helps(counts)}"
            for key, counts in faulty.items()
            if counts
        ]
        if len(stats) > 1:
            problems.append(f"together {lost} of {lost + sum(usable.values())} samples drop out, which is most of them")
        raise UserErrors(problems)


def _nothing_left(source: SourceStats, faulty: Counter[str]) -> str:
    if DUPLICATE in source.dropped:
        return f"{source.key}: all samples of {source.path} are exactly like earlier ones; leave this source out"
    if faulty:
        return (
            f"{source.key}: no sample of {source.path} is left: all {faulty.total()} drop out ({_reasons(faulty)}); "
            f"{_helps(faulty)}"
        )
    why = [f"{source.bad_rows} are bad"] if source.bad_rows else []
    why += [f"{source.left_out} are left out{_noted(source)}"] if source.left_out else []
    gone = f"of {source.rows} rows {' and '.join(why)}" if why else "it has no rows"
    return f"{source.key}: {source.path} gives no sample: {gone}"


def _noted(source: SourceStats) -> str:
    return f" ({', '.join(f'{count} {note}' for note, count in source.notes.items())})" if source.notes else ""


def _reasons(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.items())


def _helps(counts: Counter[str]) -> str:
    return "; ".join(FIXES[reason] for reason in counts)


def log_source(source: SourceStats) -> None:
    """One line: what there is, what was lost (then a warning), what else is worth knowing."""
    lost = [f"{source.truncated} truncated"] if source.truncated else []
    lost += [f"{count} dropped, {reason}" for reason, count in source.dropped.items() if reason in FIXES]
    lost += [f"{source.bad_rows} bad rows skipped"] if source.bad_rows else []
    if source.duplicates and DUPLICATE not in source.dropped:
        hint = "" if source.epoch is None else " (data.drop_duplicates would use them once)"
        lost.append(f"{source.duplicates} {DUPLICATE}{hint}")
    told = [f"{count} left out, {reason}" for reason, count in source.dropped.items() if reason not in FIXES]
    told += [f"{source.left_out} rows left out"] if source.left_out else []
    told += [f"{count} x {note}" for note, count in source.notes.items()]
    told += [f"{source.heldout} held out"] if source.heldout else []
    log.log(
        logging.WARNING if lost else logging.INFO,
        "%s, %s: %d samples, %d tokens, %d trained on%s",
        source.key,
        source.path if source.files == 1 else f"{source.path} ({source.files} files)",
        source.samples,
        source.tokens,
        source.trained_tokens,
        "".join(f"; {text}" for text in lost + told),
    )


def log_epoch_use(stats: Sequence[SourceStats]) -> None:
    """What an epoch takes of each source, where that is not simply all of the only one."""
    trained = [(source.key, source.epoch) for source in stats if source.epoch is not None]
    for key, use in trained:
        if len(trained) > 1 or use.samples != use.available:
            log.info(
                "an epoch takes %s of %s samples of %s (%.4g passes): %.1f%% of its samples, %.1f%% of its tokens, "
                "%.1f%% of its trained tokens",
                f"{use.samples:,}",
                f"{use.available:,}",
                key,
                use.passes,
                100 * use.sample_share,
                100 * use.token_share,
                100 * use.trained_share,
            )
