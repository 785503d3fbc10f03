"""What an `Inspection` says in words and numbers: headline, what needs attention, the table of sources, the lengths.

Shared by `inspect_text.py` and `inspect_page.py`, so that terminal and page tell the same.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from posttrain.data.inspect import Inspection
from posttrain.data.packed import PackedDataset
from posttrain.data.stats import DUPLICATE, FIXES, SourceStats
from posttrain.data.turns import NOTE_SPLIT

Level = Literal["stop", "warn", "info", "good"]
LEVEL_WORDS: dict[Level, str] = {"stop": "Error", "warn": "Check", "info": "Note", "good": "Fine"}

_KINDS_TOLD = 4
_TRAINED = "Trained on"

Cell = tuple[str, str]
"""A cell's text and a smaller remark on it, perhaps empty."""


@dataclass(frozen=True)
class Notice:
    """Something that the user should know of the data."""

    level: Level
    """stop: training refuses to start; warn: something is lost or odd; info: worth knowing; good: nothing to do."""
    text: str
    fix: str = ""
    flag: str = ""
    """The flag of the samples in question (`ShownSample.flags`, or `rejected`)."""


def percent(part: float | int, whole: float | int) -> str:
    """A share, never rounded to all or nothing that it is not."""
    share = part / whole if whole else 0.0
    if 0 < share < 1e-4:
        return "< 0.01%"
    if 1 - 1e-4 < share < 1:
        return "> 99.99%"
    digits = 0 if share in (0, 1) or 0.1 <= share <= 0.99 else 1 if 0.001 <= share <= 0.999 else 2
    return f"{share:.{digits}%}"


def plural(count: int, noun: str) -> str:
    """`1 row`, `2,000 rows`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


# ---- headline -------------------------------------------------------------------------------------------------------


def headline(inspection: Inspection) -> list[tuple[str, str, str]]:
    """(what, value, remark) of the numbers that matter most."""
    datasets = inspection.datasets
    if datasets is None:
        trained = [of for of in inspection.stats if of.key != "data.heldout"]
        return [
            ("Usable samples", f"{sum(of.samples for of in trained):,}", f"of {sum(of.rows for of in trained):,} rows"),
            ("Bad rows", f"{inspection.bad_rows:,}", ""),
            ("Optimizer steps", "0", "training would not start"),
        ]
    train = datasets.train
    trained_tokens = sum(of.epoch.trained_tokens for of in datasets.stats if of.epoch is not None)
    held = len(datasets.heldout.table) if datasets.heldout else 0
    per_sample = f"{train.num_tokens / train.num_samples:,.0f} a sample"
    filled = f"{percent(train.efficiency, 1)} filled, {train.row_length:,} tokens each"
    return [
        ("Samples per epoch", f"{train.num_samples:,}", f"from {plural(_train_sources(inspection), 'source')}"),
        ("Tokens per epoch", f"{train.num_tokens:,}", per_sample),
        ("Tokens trained on", f"{trained_tokens:,}", f"{percent(trained_tokens, train.num_tokens)} of all tokens"),
        ("Packed rows", f"{train.num_rows:,}", filled),
        ("Optimizer steps", f"{train.num_steps:,}", f"{_epochs(train)}, {plural(train.global_batch_size, 'row')} each"),
        ("Held out", f"{held:,}", _overlap_remark(inspection) if held else "no samples"),
    ]


def _epochs(train: PackedDataset) -> str:
    epochs = train.epoch(train.num_steps)
    return plural(round(epochs), "epoch") if epochs == round(epochs) else f"{epochs:.2f} epochs"


def _train_sources(inspection: Inspection) -> int:
    return sum(of.key != "data.heldout" for of in inspection.stats)


def _overlap_remark(inspection: Inspection) -> str:
    overlap = inspection.datasets.overlap if inspection.datasets else None
    if overlap is None or not overlap.prompts:
        return "samples, none also in training"
    if overlap.samples:
        return f"samples, {overlap.samples:,} also in training"
    return f"samples, {overlap.prompts:,} share a prompt with training"


# ---- what needs attention -------------------------------------------------------------------------------------------


def notices(inspection: Inspection) -> list[Notice]:
    """What the user should know, the gravest first."""
    found = [
        *_stops(inspection),
        *_losses(inspection),
        *_heldout(inspection),
        *_packing(inspection),
        *_tokens(inspection),
        *_marks(inspection),
    ]
    if not any(notice.level in ("stop", "warn") for notice in found):
        text = "No row was rejected and no sample was dropped or cut, and none is there twice."
        found.append(Notice("good", text))
    order: Sequence[Level] = tuple(LEVEL_WORDS)
    return sorted(found, key=lambda notice: order.index(notice.level))


def _stops(inspection: Inspection) -> Iterator[Notice]:
    data, bad = inspection.data, inspection.bad_rows
    if inspection.problem:
        yield Notice("stop", f"Training refuses this data:\n{inspection.problem}", flag="dropped")
    if not bad:
        return
    rows = sum(of.rows for of in inspection.stats)
    told = _KINDS_TOLD if len(inspection.reject_kinds) > _KINDS_TOLD + 1 else _KINDS_TOLD + 1
    kinds = [f"{plural(count, 'row')}: {reason}" for count, reason in inspection.reject_kinds[:told]]
    more = sum(count for count, _ in inspection.reject_kinds[told:])
    kinds += [f"{plural(more, 'row')}: other reasons"] if more else []
    text = "\n".join([f"{bad:,} of {plural(rows, 'row')} ({percent(bad, rows)}) cannot be used.", *kinds, ""])
    if data.on_bad_row == "error":
        fix = "Training stops at them: correct them, or set data.on_bad_row to skip."
        yield Notice("stop", text, fix, "rejected")
    elif bad > data.max_bad_rows:
        fix = f"That is more than data.max_bad_rows = {data.max_bad_rows:,}: correct them, or raise it."
        yield Notice("stop", text, fix, "rejected")
    else:
        yield Notice("warn", text, "They are skipped and written to rejects.jsonl.", "rejected")


def _losses(inspection: Inspection) -> Iterator[Notice]:
    data = inspection.data
    samples = sum(of.samples + sum(of.dropped.values()) for of in inspection.stats)
    dropped = sum((Counter(of.dropped) for of in inspection.stats), Counter())
    for reason, count in dropped.items():
        faulty = reason in FIXES
        text = f"{plural(count, 'sample')} ({percent(count, samples)}) left out: {reason}."
        fix = f"{FIXES[reason].capitalize()}." if faulty else ""
        yield Notice("warn" if faulty else "info", text, fix, "dropped" if faulty else "left out")
    truncated = sum(of.truncated for of in inspection.stats)
    if truncated:
        end = "start" if data.truncation == "keep_end" else "end"
        text = (
            f"{plural(truncated, 'sample')} ({percent(truncated, samples)}) longer than data.max_length = "
            f"{data.max_length:,}: cut at the {end}."
        )
        lost = " A cut answer has no stop token." if end == "end" else ""
        yield Notice("warn", text, f"Raise data.max_length, or set data.truncation to drop.{lost}", "truncated")
    duplicates = sum(of.duplicates for of in inspection.stats)
    if duplicates and DUPLICATE not in dropped:
        text = f"{plural(duplicates, 'sample')} ({percent(duplicates, samples)}) exactly like an earlier one."
        yield Notice("warn", text, "Set data.drop_duplicates to true to use each once.", "duplicate")
    left_out = sum(of.left_out for of in inspection.stats)
    if left_out:
        yield Notice("info", f"{plural(left_out, 'row')} left out by the options of the source.")
    for note, count in sum((Counter(of.notes) for of in inspection.stats), Counter()).items():
        yield Notice("info", f"{count:,} {note}.", flag="split" if note == NOTE_SPLIT else "")


def _heldout(inspection: Inspection) -> Iterator[Notice]:
    datasets = inspection.datasets
    if datasets is None:
        return
    if datasets.heldout is None:
        fix = "Set data.heldout.fraction or data.heldout.path."
        yield Notice("warn", "Nothing is held out: overfitting would not show.", fix)
    elif datasets.overlap is not None and datasets.overlap.prompts:
        overlap = datasets.overlap
        text = (
            f"Of {plural(overlap.heldout, 'held-out sample')}, {overlap.samples:,} are exactly among the training "
            f"samples, and {overlap.prompts:,} share a prompt with one: their loss says little about new data."
        )
        yield Notice("warn", text, "Remove them, or let data.heldout.path name other data.", "held out")


def _packing(inspection: Inspection) -> Iterator[Notice]:
    datasets = inspection.datasets
    if datasets is None:
        return
    train = datasets.train
    if train.num_rows < train.global_batch_size:
        text = (
            f"An epoch has {plural(train.num_rows, 'row')}, fewer than train.global_batch_size = "
            f"{train.global_batch_size}: every step is filled up with empty rows."
        )
        yield Notice("warn", text, "Lower train.global_batch_size or data.row_length.")
    elif train.efficiency < 0.9:
        why = "data.packing is off" if not inspection.data.packing else "there are few samples, or long ones"
        text = f"Only {percent(train.efficiency, 1)} of the places in packed rows hold tokens: {why}."
        yield Notice("warn", text, "The rest is computed for nothing.")


def _tokens(inspection: Inspection) -> Iterator[Notice]:
    tokenizer = inspection.tokenizer
    if not tokenizer.stop_ids:
        text = "The tokenizer has no stop token: the model would never learn to end its turn."
        yield Notice("stop", text, "Set tokenizer.eos_token, or a chat template that ends turns with a special token.")
    if tokenizer.pad_id is not None and tokenizer.pad_id == tokenizer.eos_id:
        yield Notice(
            "info", "The padding token is also the end token. Masks go by position: ends of turns are trained."
        )
    if tokenizer.chat_template is None:
        fix = "Conversations need one: set tokenizer.chat_template."
        yield Notice("info", "The tokenizer has no chat template.", fix)
    tokens = sum(of.tokens for of in inspection.stats)
    trained = sum(of.trained_tokens for of in inspection.stats)
    if tokens and trained < 0.02 * tokens:
        text = f"Only {percent(trained, tokens)} of all tokens are trained on."
        yield Notice("warn", text, f"Is data.loss_on = {', '.join(inspection.data.loss_on)} meant?")


def _marks(inspection: Inspection) -> Iterator[Notice]:
    marks = inspection.marks
    differ = marks.compared - marks.equal
    if differ:
        text = f"The template's own marks differ from what is trained in {differ:,} of {plural(marks.compared, 'row')}"
        ends = "all" if marks.ends_only == differ else f"{marks.ends_only:,}"
        only = f", in {ends} of them only at the ends of turns" if marks.ends_only else ""
        yield Notice("warn" if differ > marks.ends_only else "info", f"{text}{only}.")


def marks_text(inspection: Inspection) -> str:
    """How far the template's own marks agree with what is trained."""
    marks, tokenizer = inspection.marks, inspection.tokenizer
    if tokenizer.chat_template is None or not tokenizer.template().has_marks:
        return (
            "The chat template has no {% generation %} marks, and needs none: what is trained on is read off its "
            "renderings and checked token by token for every row."
        )
    text = f"Compared in {plural(marks.compared, 'row')}: {marks.equal:,} are marked as they are trained here"
    if marks.ends_only:
        text += f", {marks.ends_only:,} differ only at the ends of turns (stop tokens, whitespace)"
    if more := marks.compared - marks.equal - marks.ends_only:
        text += f", {more:,} differ in more than that"
    if marks.incomparable:
        text += f". {plural(marks.incomparable, 'row')} could not be compared: split, or not trained on as a whole"
    return f"{text}. What is trained here always includes the stop token, and nothing that the model is fed."


# ---- sources --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SourceTable:
    """Rows of cells, one for each source; the first column names it."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    remarks: tuple[str, ...]
    """Of each source what numbers do not say, perhaps nothing."""
    total: tuple[Cell, ...] | None
    """Of all training sources, where there are several."""


def source_table(inspection: Inspection) -> SourceTable:
    """What became of each source; columns without anything in them are left out."""
    wide = [_source_cells(of, inspection) for of in inspection.stats]
    names = tuple(wide[0]) if wide else ()
    total = _total_cells(inspection) if _train_sources(inspection) > 1 else None
    always = ("Source", "Rows", "Samples", "Tokens", _TRAINED)
    empty = {("", ""), ("0", "")}
    columns = tuple(name for name in names if name in always or any(row[name] not in empty for row in wide))
    return SourceTable(
        columns,
        tuple(tuple(row[name] for name in columns) for row in wide),
        tuple(_remarks(of) for of in inspection.stats),
        None if total is None else tuple(total.get(name, ("", "")) for name in columns),
    )


def _source_cells(of: SourceStats, inspection: Inspection) -> dict[str, Cell]:
    use = of.epoch
    share: Cell = ("", "")
    if use is not None and (_train_sources(inspection) > 1 or use.samples != use.available):
        passes = "" if use.passes == 1 else f", {use.passes:.3g} passes"
        share = (percent(use.token_share, 1), f"{percent(use.sample_share, 1)} of samples{passes}")
    directory, _, name = of.path.rpartition("/")
    where = f"{of.key} in {directory}" if directory else of.key
    return {
        "Source": (name, where if of.files == 1 else f"{where}, {plural(of.files, 'file')}"),
        "Rows": (f"{of.rows:,}", f"{of.left_out:,} left out" if of.left_out else ""),
        "Samples": (f"{of.samples:,}", ""),
        "Tokens": (f"{of.tokens:,}", ""),
        _TRAINED: (f"{of.trained_tokens:,}", percent(of.trained_tokens, of.tokens)),
        "Share of tokens": share,
        "Held out": (f"{of.heldout:,}", ""),
        "Cut": (f"{of.truncated:,}", ""),
        "Dropped": (f"{sum(of.dropped.values()):,}", ""),
        "Duplicates": (f"{of.duplicates:,}", ""),
        "Bad rows": (f"{of.bad_rows:,}", ""),
    }


def _remarks(of: SourceStats) -> str:
    remarks = [f"{count:,} left out: {reason}" for reason, count in of.dropped.items()]
    return "; ".join(remarks + [f"{count:,} {note}" for note, count in of.notes.items()])


def _total_cells(inspection: Inspection) -> dict[str, Cell]:
    stats = [of for of in inspection.stats if of.key != "data.heldout"]
    tokens, trained = sum(of.tokens for of in stats), sum(of.trained_tokens for of in stats)
    return {
        "Source": ("All training sources", ""),
        "Rows": (f"{sum(of.rows for of in stats):,}", ""),
        "Samples": (f"{sum(of.samples for of in stats):,}", ""),
        "Tokens": (f"{tokens:,}", ""),
        _TRAINED: (f"{trained:,}", percent(trained, tokens)),
        "Held out": (f"{sum(of.heldout for of in stats):,}", ""),
        "Cut": (f"{sum(of.truncated for of in stats):,}", ""),
        "Dropped": (f"{sum(sum(of.dropped.values()) for of in stats):,}", ""),
        "Duplicates": (f"{sum(of.duplicates for of in stats):,}", ""),
        "Bad rows": (f"{sum(of.bad_rows for of in stats):,}", ""),
    }


# ---- lengths and packing --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Histogram:
    """How many samples have `edges[i]` to `edges[i + 1] - 1` tokens."""

    edges: tuple[int, ...]
    counts: tuple[int, ...]


def length_histogram(inspection: Inspection) -> Histogram:
    """Buckets that grow with the length, two to each doubling; one begins right behind `data.max_length`."""
    lengths = inspection.lengths
    if not len(lengths):
        return Histogram((), ())
    border = inspection.data.max_length + 1
    powers = [2**k for k in range(int(lengths[-1]).bit_length() + 2)]
    edges = sorted({*powers, *(3 * power // 2 for power in powers[1:])})
    edges = sorted({border, *(edge for edge in edges if abs(edge - border) > 0.12 * border)})
    counts = np.diff(np.searchsorted(lengths, edges))
    filled = np.flatnonzero(counts)
    first, last = int(filled[0]), int(filled[-1])
    return Histogram(tuple(edges[first : last + 2]), tuple(counts[first : last + 1].tolist()))


def lengths_text(inspection: Inspection) -> str:
    """The lengths in a sentence."""
    lengths, limit = inspection.lengths, inspection.data.max_length
    if not len(lengths):
        return "There are no samples."
    half, most = (int(lengths[int(share * (len(lengths) - 1))]) for share in (0.5, 0.95))
    over = len(lengths) - int(np.searchsorted(lengths, limit, side="right"))
    text = f"Half of the samples have up to {plural(half, 'token')}, 95% up to {most:,}, the longest {lengths[-1]:,}."
    return f"{text} {f'{over:,} are' if over != 1 else '1 is'} over data.max_length = {limit:,}." if over else text


def packing_text(inspection: Inspection) -> str:
    """The packing in a sentence."""
    if inspection.datasets is None:
        return "There are no packed rows: no run could be built of this data."
    train = inspection.datasets.train
    return (
        f"{plural(train.num_rows, 'row')} of {train.row_length:,} tokens hold {plural(train.num_samples, 'sample')}: "
        f"{train.num_samples / train.num_rows:.1f} a row, {percent(train.efficiency, 1)} filled."
    )


def token_names(inspection: Inspection, ids: Sequence[int | None]) -> str:
    """Tokens by text and id."""
    tokenizer = inspection.tokenizer
    known = [id for id in ids if id is not None]
    return ", ".join(f"{tokenizer.added_texts.get(id) or tokenizer.decode([id])} ({id})" for id in known) or "none"


def tokenizer_facts(inspection: Inspection) -> list[tuple[str, str]]:
    """(what, value) of the tokenizer."""
    tokenizer, data = inspection.tokenizer, inspection.data
    return [
        ("Tokenizer", tokenizer.source),
        ("Vocabulary", f"{tokenizer.vocab_size:,} ids, {len(tokenizer.added_tokens):,} of them added tokens"),
        ("Stop tokens", token_names(inspection, tokenizer.stop_ids)),
        ("BOS, EOS, PAD", "; ".join(token_names(inspection, [id]) for id in _ends(inspection))),
        ("Trained on", f"{', '.join(data.loss_on)} (data.loss_on)"),
        ("Sample, row", f"up to {data.max_length:,} tokens (data.max_length), {data.row_length:,} (data.row_length)"),
    ]


def _ends(inspection: Inspection) -> tuple[int | None, ...]:
    return inspection.tokenizer.bos_id, inspection.tokenizer.eos_id, inspection.tokenizer.pad_id
