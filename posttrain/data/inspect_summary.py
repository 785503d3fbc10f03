"""What an `Inspection` says in words and numbers: headline, what needs attention, the table of sources, the tokenizer.

With `inspect_lengths.py` shared by `inspect_text.py` and `inspect_page.py`, so that terminal and page tell the same.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from posttrain.data.inspect import Inspection
from posttrain.data.inspect_answers import length_bias
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
    datasets, noun = inspection.datasets, inspection.noun
    if datasets is None:
        trained = [of for of in inspection.stats if of.key != "data.heldout"]
        rows = sum(of.rows for of in trained)
        return [
            (
                f"Usable {noun}s",
                f"{sum(of.samples for of in trained):,}",
                f"of {plural(rows, 'row')}",
            ),
            ("Bad rows", f"{inspection.bad_rows:,}", ""),
            ("Optimizer steps", "0", "training would not start"),
        ]
    train = datasets.train
    trained_tokens = sum(of.epoch.trained_tokens for of in datasets.stats if of.epoch is not None)
    sources = plural(_train_sources(inspection), "source")
    held = len(datasets.heldout.table) if datasets.heldout else 0
    per_sample = f"{train.num_tokens / train.num_samples:,.0f} a {noun}"
    filled = f"{percent(train.efficiency, 1)} filled, {train.row_length:,} tokens each"
    return [
        (
            f"{noun.capitalize()}s per epoch",
            f"{train.num_samples:,}",
            f"from {sources}",
        ),
        ("Tokens per epoch", f"{train.num_tokens:,}", per_sample),
        ("Tokens trained on", f"{trained_tokens:,}", f"{percent(trained_tokens, train.num_tokens)} of all tokens"),
        ("Packed rows", f"{train.num_rows:,}", filled),
        ("Optimizer steps", f"{train.num_steps:,}", f"{_epochs(train)}, {plural(train.global_batch_size, 'row')} each"),
        ("Held out", f"{held:,}", _overlap_remark(inspection) if held else f"no {noun}s"),
    ]


def _epochs(train: PackedDataset) -> str:
    epochs = train.epoch(train.num_steps)
    return plural(round(epochs), "epoch") if epochs == round(epochs) else f"{epochs:.2f} epochs"


def _train_sources(inspection: Inspection) -> int:
    return sum(of.key != "data.heldout" for of in inspection.stats)


def _overlap_remark(inspection: Inspection) -> str:
    overlap = inspection.datasets.overlap if inspection.datasets else None
    if overlap is None or not overlap.prompts:
        return f"{inspection.noun}s, none also in training"
    if overlap.samples:
        return f"{inspection.noun}s, {overlap.samples:,} also in training"
    return f"{inspection.noun}s, {overlap.prompts:,} share a prompt with training"


# ---- what needs attention -------------------------------------------------------------------------------------------


def notices(inspection: Inspection) -> list[Notice]:
    """What the user should know, the gravest first."""
    found = [
        *_stops(inspection),
        *_losses(inspection),
        *_answers(inspection),
        *_heldout(inspection),
        *_packing(inspection),
        *_tokens(inspection),
        *_marks(inspection),
    ]
    if not any(notice.level in ("stop", "warn") for notice in found):
        text = f"No row was rejected and no {inspection.noun} was dropped or cut, and none is there twice."
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
    data, noun = inspection.data, inspection.noun
    samples = sum(of.samples + sum(of.dropped.values()) for of in inspection.stats)
    dropped = sum((Counter(of.dropped) for of in inspection.stats), Counter())
    for reason, count in dropped.items():
        faulty = reason in FIXES
        text = f"{plural(count, noun)} ({percent(count, samples)}) left out: {reason}."
        fix = f"{FIXES[reason].capitalize()}." if faulty else ""
        yield Notice("warn" if faulty else "info", text, fix, "dropped" if faulty else "left out")
    truncated = sum(of.truncated for of in inspection.stats)
    if truncated:
        with_side = "with a side " if inspection.rows == "pairs" else ""
        end = "start" if data.truncation == "keep_end" else "end"
        text = (
            f"{plural(truncated, noun)} ({percent(truncated, samples)}) {with_side}longer than data.max_length = "
            f"{data.max_length:,}: cut at the {end}."
        )
        lost = " A cut answer has no stop token." if end == "end" else ""
        yield Notice("warn", text, f"Raise data.max_length, or set data.truncation to drop.{lost}", "truncated")
    duplicates = sum(of.duplicates for of in inspection.stats)
    if duplicates and DUPLICATE not in dropped:
        text = f"{plural(duplicates, noun)} ({percent(duplicates, samples)}) exactly like an earlier one."
        yield Notice("warn", text, "Set data.drop_duplicates to true to use each once.", "duplicate")
    left_out = sum(of.left_out for of in inspection.stats)
    if left_out:
        yield Notice("info", f"{plural(left_out, 'row')} left out: nothing of them is used.")
    for note, count in sum((Counter(of.notes) for of in inspection.stats), Counter()).items():
        yield Notice("info", f"{count:,} {note}.", flag="split" if note == NOTE_SPLIT else "")


def _answers(inspection: Inspection) -> Iterator[Notice]:
    answers = inspection.answers
    if answers is None:
        return
    if answers.contradictions:
        same = "the same two answers the other way round" if inspection.rows == "pairs" else "the other label"
        text = (
            f"{plural(answers.contradictions, inspection.noun)} contradicted by another that is the same with {same}."
        )
        yield Notice("warn", text, "Remove one of the two.")
    if inspection.rows == "pairs" and (side := length_bias(answers)):
        longer, means = max(answers.longer), {kind: trained.mean() for kind, trained in answers.trained.items()}
        text = (
            f"The {side} answer is the longer one in {percent(longer, len(answers.prompts))} of the pairs (trained "
            f"tokens on average: chosen {means['chosen']:,.0f}, rejected {means['rejected']:,.0f}): length may be what "
            "is learned."
        )
        yield Notice("warn", text, "Even the lengths out, or use a loss of log-probabilities per token.")

    if inspection.rows == "labelled":
        (many, most), (few, least) = sorted(answers.counts.items(), key=lambda of: -of[1])
        if most > 2 * least > 0:
            text = f"There are {most / least:.1f} {many} answers to each {few} one."
            yield Notice("info", text, f"objective.{few}_weight can even that out.")


def _heldout(inspection: Inspection) -> Iterator[Notice]:
    datasets, noun = inspection.datasets, inspection.noun
    if datasets is None:
        return
    if datasets.heldout is None:
        fix = "Set data.heldout.fraction or data.heldout.path."
        yield Notice("warn", "Nothing is held out: overfitting would not show.", fix)
    elif datasets.overlap is not None and datasets.overlap.prompts:
        overlap = datasets.overlap
        text = (
            f"Of {plural(overlap.heldout, f'held-out {noun}')}, {overlap.samples:,} are exactly among the training "
            f"{noun}s, and {overlap.prompts:,} share a prompt with one: their loss says little about new data."
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
        few = f"there are few {inspection.noun}s, or long ones"
        why = few if inspection.data.packing else "data.packing is off"
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
class NumberTable:
    """Rows of cells; the first column names what the others count."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    remarks: tuple[str, ...] = ()
    """On each row what numbers do not say, perhaps nothing; or on none."""
    total: tuple[Cell, ...] | None = None
    """Of all rows, where that says more than they do."""


def source_table(inspection: Inspection) -> NumberTable:
    """What became of each source, and of all training sources; columns without anything in them are left out."""
    wide = [_source_cells(of, inspection) for of in inspection.stats]
    names = tuple(wide[0]) if wide else ()
    total = _total_cells(inspection) if _train_sources(inspection) > 1 else None
    always = ("Source", "Rows", _samples_column(inspection), "Tokens", _TRAINED)
    empty = {("", ""), ("0", "")}
    columns = tuple(name for name in names if name in always or any(row[name] not in empty for row in wide))
    return NumberTable(
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
        share = (percent(use.token_share, 1), f"{percent(use.sample_share, 1)} of {inspection.noun}s{passes}")
    directory, _, name = of.path.rpartition("/")
    where = f"{of.key} in {directory}" if directory else of.key
    return {
        "Source": (name, where if of.files == 1 else f"{where}, {plural(of.files, 'file')}"),
        "Rows": (f"{of.rows:,}", f"{of.left_out:,} left out" if of.left_out else ""),
        _samples_column(inspection): (f"{of.samples:,}", ""),
        "Tokens": (f"{of.tokens:,}", ""),
        _TRAINED: (f"{of.trained_tokens:,}", percent(of.trained_tokens, of.tokens)),
        "Share of tokens": share,
        "Held out": (f"{of.heldout:,}", ""),
        "Cut": (f"{of.truncated:,}", ""),
        "Dropped": (f"{sum(of.dropped.values()):,}", ""),
        "Duplicates": (f"{of.duplicates:,}", ""),
        "Bad rows": (f"{of.bad_rows:,}", ""),
    }


def _samples_column(inspection: Inspection) -> str:
    return f"{inspection.noun.capitalize()}s"


def _remarks(of: SourceStats) -> str:
    remarks = [f"{count:,} left out: {reason}" for reason, count in of.dropped.items()]
    return "; ".join(remarks + [f"{count:,} {note}" for note, count in of.notes.items()])


def _total_cells(inspection: Inspection) -> dict[str, Cell]:
    stats = [of for of in inspection.stats if of.key != "data.heldout"]
    tokens, trained = sum(of.tokens for of in stats), sum(of.trained_tokens for of in stats)
    return {
        "Source": ("All training sources", ""),
        "Rows": (f"{sum(of.rows for of in stats):,}", ""),
        _samples_column(inspection): (f"{sum(of.samples for of in stats):,}", ""),
        "Tokens": (f"{tokens:,}", ""),
        _TRAINED: (f"{trained:,}", percent(trained, tokens)),
        "Held out": (f"{sum(of.heldout for of in stats):,}", ""),
        "Cut": (f"{sum(of.truncated for of in stats):,}", ""),
        "Dropped": (f"{sum(sum(of.dropped.values()) for of in stats):,}", ""),
        "Duplicates": (f"{sum(of.duplicates for of in stats):,}", ""),
        "Bad rows": (f"{sum(of.bad_rows for of in stats):,}", ""),
    }


# ---- tokenizer ------------------------------------------------------------------------------------------------------


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
