"""Samples and bad rows with the rows of the files that they come from, as `inspect` shows them.

Under `inspect.py`. The files are read once more, for the rows that are shown: for their raw text, and to compare what
is trained with the marks of a chat template that has some.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, zip_longest
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt64

from posttrain.data.chat import Sample, encode_rows, template_marks
from posttrain.data.files import JSON_SUFFIXES, BadRow, Record, read_records
from posttrain.data.formats import to_rows
from posttrain.data.inspect_samples import DROPPED_FATES, HELD_OUT, TRAINED_ON, Place, SourceFile
from posttrain.data.rows import Row
from posttrain.data.storage import open_bytes
from posttrain.data.tokenizer import Tokenizer
from posttrain.data.turns import NOTE_SPLIT
from posttrain.errors import UserError

_READ_ROWS = 500_000
"""Rows of a file that are read again, at most: some seconds' worth."""
_SHOWN_ENDS = 3
"""Rows whose marks differ only in the tokens that end turns: they are all alike."""
_SORTED_REJECTS = 100_000
"""Bad rows whose reasons are sorted by kind."""
_PARTICULARS = re.compile(r"""'[^']*'|"[^"]*"|\d+""")
"""What differs between reasons of one kind."""
_RAW_CHARACTERS = 20_000
"""Of a row's raw text, what is kept."""


@dataclass(frozen=True)
class ShownSample:
    """A sample as the model sees it, and where it comes from."""

    key: str
    """Of its source."""
    file: str
    line: int
    tokens: Int32[np.ndarray, "n"]
    """Truncated; whole where the sample is dropped."""
    loss_weights: Float32[np.ndarray, "n"]
    """The first is 0: nothing predicts it."""
    fate: str
    """One of `FATES`."""
    cut_before: int = 0
    cut_behind: int = 0
    """Tokens lost to truncation."""
    border: int = 0
    """Of a sample that is dropped for its length, the position where truncation would cut it; else 0."""
    notes: tuple[str, ...] = ()
    alike: bool = False
    """Whether another sample is exactly the same."""
    has_tools: bool = False
    raw: str = ""
    """The row in the file, as JSON; empty where it was not read again."""

    @property
    def flags(self) -> tuple[str, ...]:
        """What is remarkable about it: one of these is one of the page's filters."""
        named = {
            "dropped": self.fate in DROPPED_FATES,
            "left out": self.fate not in (*DROPPED_FATES, TRAINED_ON, HELD_OUT),
            "truncated": bool(self.cut_before or self.cut_behind),
            "split": NOTE_SPLIT in self.notes,
            "duplicate": self.alike,
            "held out": self.fate == HELD_OUT,
            "has tools": self.has_tools,
            "other weights": not bool(np.isin(self.loss_weights, (0, 1)).all()),
        }
        return tuple(name for name, on in named.items() if on)


@dataclass(frozen=True)
class Reject:
    """A row that cannot be used."""

    key: str
    """Of its source."""
    file: str
    line: int
    place: str
    """What in the row, e.g. `messages[2].content`."""
    reason: str
    raw: str = ""
    """The row, or the line where it cannot even be parsed."""


@dataclass(frozen=True)
class MarkedRow:
    """A conversation rendered whole: what is trained of it, and what the template's `{% generation %}` marks cover."""

    key: str
    file: str
    line: int
    tokens: Int32[np.ndarray, "n"]
    ours: Bool[np.ndarray, "n"]
    theirs: Bool[np.ndarray, "n"]


@dataclass(frozen=True)
class Marks:
    """The template's own marks against what is trained."""

    compared: int = 0
    equal: int = 0
    ends_only: int = 0
    """Rows that differ only in the tokens that end turns: stop tokens and whitespace."""
    incomparable: int = 0
    """Rows that are split, so that no sample is the whole conversation, or that cannot be trained on."""
    rows: tuple[MarkedRow, ...] = ()
    """Some that differ; first those that differ in more than ends."""


# ---- reading the files again ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """What stands on a line."""

    records: tuple[Record, ...] = ()
    rows: tuple[tuple[Record, Row], ...] = ()


def _read_again(file: SourceFile, lines: set[int]) -> dict[int, _Found]:
    """The rows on the given lines of a file. One that cannot be read any more has none: the cache is what counts."""
    found: dict[int, _Found] = defaultdict(_Found)
    last = max(lines, default=0)
    try:
        for record in islice(read_records(file.cache.path) if lines else (), _READ_ROWS):
            if record.line > last:
                break
            if record.line in lines and isinstance(record, Record):
                rows = [(record, row) for row in to_rows(record, file.source) if isinstance(row, Row)]
                before = found[record.line]
                found[record.line] = _Found((*before.records, record), (*before.rows, *rows))
    except UserError:
        return {}
    return found


def _raw_lines(file: SourceFile, lines: set[int]) -> dict[int, str]:
    """Lines of a JSON file as they are, for rows that cannot be parsed."""
    if not lines or not any(suffix in file.cache.path.lower() for suffix in JSON_SUFFIXES):
        return {}
    try:
        with open_bytes(file.cache.path) as opened:
            numbered = enumerate(islice(opened, max(lines)), 1)
            return {
                line: _cut(raw.decode("utf-8", "replace").rstrip("\r\n")) for line, raw in numbered if line in lines
            }
    except (UserError, OSError, EOFError):
        return {}


def _cut(text: str) -> str:
    return text if len(text) <= _RAW_CHARACTERS else f"{text[:_RAW_CHARACTERS]}\n… ({len(text):,} characters)"


def _as_json(record: Record) -> str:
    text = json.dumps(record.value, ensure_ascii=False, indent=1, default=str)
    return _cut(text.encode("utf-8", "backslashreplace").decode("utf-8"))  # JSON can escape half a surrogate pair


# ---- samples --------------------------------------------------------------------------------------------------------


def show_samples(
    files: Sequence[SourceFile],
    places: Sequence[Place],
    tokenizer: Tokenizer,
    loss_on: tuple[str, ...],
    *,
    alike: UInt64[np.ndarray, "hashes"],
) -> list[ShownSample]:
    """The samples, each with its row where that can be read again; `alike`: hashes that several samples share."""
    wanted: dict[int, set[int]] = defaultdict(set)
    for number, sample in places:
        wanted[number].add(int(files[number].cache.lines[sample]))
    found = {number: _read_again(files[number], lines) for number, lines in wanted.items()}
    shown = []
    for number, sample in places:
        file = files[number]
        plain = plain_sample(file, sample, alike)
        rows = found[number].get(plain.line, _Found()).rows
        shown.append(_with_row(plain, file, sample, rows, tokenizer, loss_on))
    return shown


def plain_sample(file: SourceFile, sample: int, alike: UInt64[np.ndarray, "hashes"]) -> ShownSample:
    """A sample as it is in its cache; `alike` are the hashes that several samples share."""
    whole, kept = file.whole(sample), file.kept(sample)
    weights = np.array(file.cache.loss_weights[kept])
    weights[:1] = 0
    return ShownSample(
        key=file.key,
        file=file.cache.path,
        line=int(file.cache.lines[sample]),
        tokens=np.array(file.cache.tokens[kept]),
        loss_weights=weights,
        fate=file.fate(sample),
        cut_before=kept.start - whole.start,
        cut_behind=whole.stop - kept.stop,
        border=file.border(sample),
        alike=bool(np.isin(file.cache.hashes[sample], alike)),
    )


def _with_row(
    shown: ShownSample,
    file: SourceFile,
    sample: int,
    rows: Sequence[tuple[Record, Row]],
    tokenizer: Tokenizer,
    loss_on: tuple[str, ...],
) -> ShownSample:
    """With raw text and notes of the row, of those on its line, that gives this very sample."""
    tokens, weights = file.cache.tokens[file.whole(sample)], file.cache.loss_weights[file.whole(sample)]
    for (record, row), made in zip(rows, encode_rows([row for _, row in rows], tokenizer, loss_on), strict=True):
        parts: tuple[Sample, ...] = () if isinstance(made, BadRow) else made
        if any(np.array_equal(p.tokens, tokens) and np.array_equal(p.loss_weights, weights) for p in parts):
            notes = tuple(dict.fromkeys(note for part in parts for note in part.notes))
            return replace(shown, notes=notes, has_tools=_has_tools(row), raw=_as_json(record))
    return shown


def _has_tools(row: Row) -> bool:
    return bool(row.tools) or any(m["role"] == "tool" or bool(m.get("tool_calls")) for m in row.messages)


# ---- bad rows -------------------------------------------------------------------------------------------------------


def show_rejects(files: Sequence[SourceFile], count: int, text: str = "") -> list[Reject]:
    """Bad rows, at most `count` of each file, first the first of every file; with a text, those that hold it."""
    rejects: list[list[Reject]] = []
    for file in files:
        if not file.cache.bad_rows:
            continue
        told = list(islice(file.cache.rejects(), None if text else count))
        read = _read_again(file, {reject["line"] for reject in told})
        raw = {line: _as_json(of.records[0]) for line, of in read.items() if len(of.records) == 1}
        raw = _raw_lines(file, {reject["line"] for reject in told} - raw.keys()) | raw
        found = [_reject(file, reject, raw.get(reject["line"], "")) for reject in told]
        wanted = text.casefold()
        rejects.append([r for r in found if wanted in f"{r.place}: {r.reason}\n{r.raw}".casefold()][:count])
    return [reject for rank in zip_longest(*rejects) for reject in rank if reject is not None]


def reject_kinds(files: Sequence[SourceFile]) -> list[tuple[int, str]]:
    """(how many, the first reason) of the bad rows whose reasons are alike but for names and numbers, most first."""
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    for reject in islice((reject for file in files for reject in file.cache.rejects()), _SORTED_REJECTS):
        text = f"{reject['key']}: {reject['reason']}" if reject["key"] else reject["reason"]
        kind = _PARTICULARS.sub("", text)
        counts[kind] += 1
        first.setdefault(kind, text)
    return [(count, first[kind]) for kind, count in counts.most_common()]


def _reject(file: SourceFile, told: Mapping[str, Any], raw: str) -> Reject:
    return Reject(file.key, file.cache.path, told["line"], told["key"], told["reason"], raw)


# ---- the template's own marks ---------------------------------------------------------------------------------------


def compare_marks(files: Sequence[SourceFile], places: Sequence[Place], tokenizer: Tokenizer, *, shown: int) -> Marks:
    """Compares the rows of the samples, each once; at most `shown` of those that differ are kept.

    What is trained is that of `loss_on: assistant`, without the row's own weights: what marks speak of. Nothing is
    compared where the template has no marks.
    """
    if tokenizer.chat_template is None or not tokenizer.template().has_marks:
        return Marks()
    wanted: dict[int, set[int]] = defaultdict(set)
    for number, sample in places:
        wanted[number].add(int(files[number].cache.lines[sample]))
    outcomes = [
        _compare(files[number], row, tokenizer)
        for number, lines in wanted.items()
        for found in _read_again(files[number], lines).values()
        for _, row in found.rows
        if row.messages
    ]
    rows = [row for row in outcomes if row is not None]
    differ = [row for row in rows if not np.array_equal(row.ours, row.theirs)]
    ends = [_differs_in_ends(row, tokenizer) for row in differ]
    order = sorted(range(len(differ)), key=lambda i: (ends[i], len(differ[i].tokens)))
    return Marks(
        compared=len(rows),
        equal=len(rows) - len(differ),
        ends_only=sum(ends),
        incomparable=len(outcomes) - len(rows),
        rows=tuple(differ[i] for i in order[: max(_SHOWN_ENDS, min(shown, len(differ) - sum(ends)))]),
    )


def _compare(file: SourceFile, row: Row, tokenizer: Tokenizer) -> MarkedRow | None:
    marked = template_marks(row, tokenizer)
    (samples,) = encode_rows([replace(row, kind="messages", prompt_length=0, weights=())], tokenizer, ("assistant",))
    if marked is None or isinstance(samples, BadRow) or len(samples) != 1:
        return None
    tokens, theirs = marked
    if not np.array_equal(samples[0].tokens, tokens):
        return None
    return MarkedRow(file.key, row.file, row.line, tokens, samples[0].loss_weights != 0, theirs)


def _differs_in_ends(row: MarkedRow, tokenizer: Tokenizer) -> bool:
    others = row.tokens[row.ours != row.theirs].tolist()
    return all(token in tokenizer.stop_ids or not tokenizer.decode([token]).strip() for token in others)
