"""Samples and bad rows with the rows of the files that they come from, as `inspect` shows them.

Under `inspect.py`. The files are read once more, for the raw text of the rows that are shown.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, zip_longest
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32, UInt64

from posttrain.data.chat import Sample
from posttrain.data.files import JSON_SUFFIXES, BadRow, Record, read_records
from posttrain.data.formats import to_rows
from posttrain.data.inspect_answers import LABELS, PAIRS
from posttrain.data.inspect_samples import HELD_OUT, Place, SourceFile
from posttrain.data.rows import Row
from posttrain.data.samples import UNUSABLE
from posttrain.data.stats import DUPLICATE, OVER_LIMIT, TOO_LONG, TRUNCATED_AWAY
from posttrain.data.storage import open_bytes
from posttrain.data.token_text import Piece, pieces
from posttrain.data.tokenizer import Tokenizer
from posttrain.data.turns import NOTE_SPLIT
from posttrain.errors import UserError

MISMATCHED = "mismatched"
"""A segment of a prompt with the answer to another one."""

Encode = Callable[[Sequence[Row]], Sequence[tuple[Sample, ...] | BadRow]]
"""Rows to samples, or to why not."""

_READ_ROWS = 500_000
"""Rows of a file that are read again, at most: some seconds' worth."""
_SORTED_REJECTS = 100_000
"""Bad rows whose reasons are sorted by kind."""
_PARTICULARS = re.compile(r"""'[^']*'|"[^"]*"|\d+""")
"""What differs between reasons of one kind."""
_RAW_CHARACTERS = 20_000
"""Of a row's raw text, what is kept."""


@dataclass(frozen=True)
class Segment:
    """What the model sees as one: a sample, or one side of a pair with its prompt."""

    tokens: Int32[np.ndarray, "n"]
    """Truncated; whole where the sample is dropped."""
    loss_weights: Float32[np.ndarray, "n"]
    """The first is 0: nothing predicts it."""
    cut_before: int = 0
    cut_behind: int = 0
    """Tokens lost to truncation."""
    border: int = 0
    """Of a sample that is dropped for its length, the position where truncation would cut the segment; else 0."""

    @classmethod
    def of(cls, tokens: Int32[np.ndarray, "n"], loss_weights: Float32[np.ndarray, "n"], **cut: int) -> "Segment":
        """A copy of what is in a cache."""
        weights = np.array(loss_weights)
        weights[:1] = 0
        return cls(np.array(tokens), weights, **cut)

    @property
    def trained(self) -> int:
        """How many tokens are trained."""
        return int(np.count_nonzero(self.loss_weights))


@dataclass(frozen=True)
class ShownSample:
    """A sample as the model sees it, and where it comes from."""

    key: str
    """Of its source."""
    file: str
    line: int
    segments: tuple[Segment, ...]
    """One, or the chosen and the rejected side of a pair; in a packed row perhaps a labelled answer and then a
    mismatched one."""
    fate: str
    """One of `FATES`."""
    label: int = 0
    """Of a labelled answer: 1 if it is desirable, -1 if not; else 0."""
    margin: float = 0.0
    """Of a pair: by how much the chosen answer is better; 0 where the row does not say."""
    notes: tuple[str, ...] = ()
    alike: bool = False
    """Whether another sample is exactly the same."""
    has_tools: bool = False
    raw: str = ""
    """The row in the file, as JSON; empty where it was not read again."""

    @property
    def names(self) -> tuple[str, ...]:
        """What the segments are; one that is all of a sample is nothing else."""
        if not self.label:
            return PAIRS if len(self.segments) > 1 else ("",)
        return (LABELS[self.label < 0], MISMATCHED)[: len(self.segments)]

    @property
    def tokens(self) -> Int32[np.ndarray, "n"]:
        """Of all its segments, end to end."""
        return np.concatenate([segment.tokens for segment in self.segments])

    @property
    def loss_weights(self) -> Float32[np.ndarray, "n"]:
        """Of all its segments, end to end."""
        return np.concatenate([segment.loss_weights for segment in self.segments])

    @property
    def flags(self) -> tuple[str, ...]:
        """What is remarkable about it: one of these is one of the page's filters."""
        named = {
            "dropped": self.fate in UNUSABLE,
            "left out": self.fate in (OVER_LIMIT, DUPLICATE),
            LABELS[0]: self.label > 0,
            LABELS[1]: self.label < 0,
            "truncated": any(segment.cut_before or segment.cut_behind for segment in self.segments),
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


# ---- reading the files again ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """What stands on a line."""

    records: tuple[Record, ...] = ()
    rows: tuple[tuple[Record, Row], ...] = ()


def read_again(file: SourceFile, lines: set[int]) -> dict[int, Found]:
    """The rows on the given lines of a file. One that cannot be read any more has none: the cache is what counts."""
    found: dict[int, Found] = defaultdict(Found)
    last = max(lines, default=0)
    try:
        for record in islice(read_records(file.cache.path) if lines else (), _READ_ROWS):
            if record.line > last:
                break
            if record.line in lines and isinstance(record, Record):
                rows = [(record, row) for row in to_rows(record, file.source) if isinstance(row, Row)]
                before = found[record.line]
                found[record.line] = Found((*before.records, record), (*before.rows, *rows))
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
    encode: Encode,
    *,
    alike: UInt64[np.ndarray, "hashes"],
) -> list[ShownSample]:
    """The samples, each with its row where that can be read again.

    Args:
      files: all of them.
      places: of the samples.
      encode: makes the samples of rows, as the run does.
      alike: hashes that several samples share.
    """
    wanted: dict[int, set[int]] = defaultdict(set)
    for number, sample in places:
        wanted[number].add(int(files[number].cache.lines[sample]))
    found = {number: read_again(files[number], lines) for number, lines in wanted.items()}
    shown = []
    for number, sample in places:
        file = files[number]
        plain = plain_sample(file, sample, alike)
        rows = found[number].get(plain.line, Found()).rows
        shown.append(_with_row(plain, file, sample, rows, encode))
    return shown


def plain_sample(file: SourceFile, sample: int, alike: UInt64[np.ndarray, "hashes"]) -> ShownSample:
    """A sample as it is in its cache; `alike` are the hashes that several samples share."""
    places = zip(file.whole(sample), file.kept(sample), strict=True)
    too_long = file.fate(sample) in (TOO_LONG, TRUNCATED_AWAY)
    return ShownSample(
        key=file.key,
        file=file.cache.path,
        line=int(file.cache.lines[sample]),
        segments=tuple(_segment(file, whole, kept, with_border=too_long) for whole, kept in places),
        fate=file.fate(sample),
        label=int(file.cache.labels[sample]),
        margin=float(file.cache.margins[sample]),
        alike=bool(np.isin(file.cache.hashes[sample], alike)),
    )


def _segment(file: SourceFile, whole: slice, kept: slice, *, with_border: bool) -> Segment:
    length = whole.stop - whole.start
    border = length - file.max_length if file.keep_end else file.max_length
    return Segment.of(
        file.cache.tokens[kept],
        file.cache.loss_weights[kept],
        cut_before=kept.start - whole.start,
        cut_behind=whole.stop - kept.stop,
        border=border if with_border and length > file.max_length else 0,
    )


def _with_row(
    shown: ShownSample,
    file: SourceFile,
    sample: int,
    rows: Sequence[tuple[Record, Row]],
    encode: Encode,
) -> ShownSample:
    """With raw text and notes of the row, of those on its line, that gives this very sample."""
    place = slice(int(file.cache.offsets[sample]), int(file.cache.offsets[sample + 1]))
    tokens, weights = file.cache.tokens[place], file.cache.loss_weights[place]
    for (record, row), made in zip(rows, encode([row for _, row in rows]), strict=True):
        parts: tuple[Sample, ...] = () if isinstance(made, BadRow) else made
        if any(np.array_equal(p.tokens, tokens) and np.array_equal(p.loss_weights, weights) for p in parts):
            notes = tuple(dict.fromkeys(note for part in parts for note in part.notes))
            return replace(shown, notes=notes, has_tools=_has_tools(row), raw=_as_json(record))
    return shown


def _has_tools(row: Row) -> bool:
    messages = row.messages + row.rejected_messages
    return bool(row.tools) or any(m["role"] == "tool" or bool(m.get("tool_calls")) for m in messages)


# ---- what is shown as one -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Of a sample what is shown as one: all of it; of two segments the prompt, if both have it, and each answer."""

    name: str
    """`prompt`, or one of `ShownSample.names`; empty for all of a sample."""
    pieces: tuple[Piece, ...]
    segment: Segment
    """Whose tokens they are; a shared prompt has those of the first."""
    cut_before: int
    cut_behind: int
    """Tokens lost right before and right behind the part."""

    @property
    def weights(self) -> Float32[np.ndarray, "n"]:
        """Of the part's tokens."""
        if not self.pieces:
            return self.segment.loss_weights[:0]
        last = self.pieces[-1]
        return self.segment.loss_weights[self.pieces[0].start : last.start + len(last.ids)]


def parts(sample: ShownSample, tokenizer: Tokenizer) -> list[Part]:
    """The parts of a sample, in order. Segments that truncation has robbed of different parts of their prompt are shown
    whole."""
    found = [tuple(pieces(tokenizer, segment.tokens)) for segment in sample.segments]
    if len(found) == 1:
        (segment,) = sample.segments
        return [Part("", found[0], segment, segment.cut_before, segment.cut_behind)]
    first, second = sample.segments
    prompt = _shared_prompt(first, second)
    starts = set.intersection(*({piece.start for piece in side} for side in found))
    prompt = max((start for start in starts if start <= prompt), default=0)  # a character may reach over the border
    made = [Part("prompt", tuple(p for p in found[0] if p.start < prompt), first, first.cut_before, 0)]
    for name, segment, side in zip(sample.names, sample.segments, found, strict=True):
        answer = tuple(piece for piece in side if piece.start >= prompt)
        made.append(Part(name, answer, segment, 0 if prompt else segment.cut_before, segment.cut_behind))
    return made if prompt else made[1:]


def _shared_prompt(first: Segment, second: Segment) -> int:
    """Tokens before both answers, where both segments have kept the same ones and would be cut at the same place."""
    prompt = min(int(np.argmax(segment.loss_weights != 0)) for segment in (first, second))
    borders = {segment.border for segment in (first, second) if 0 < segment.border < prompt}
    alike = np.array_equal(first.tokens[:prompt], second.tokens[:prompt])
    same = first.cut_before == second.cut_before and (not borders or first.border == second.border)
    return prompt if alike and same else 0


# ---- bad rows -------------------------------------------------------------------------------------------------------


def show_rejects(files: Sequence[SourceFile], count: int, text: str = "") -> list[Reject]:
    """Bad rows, at most `count` of each file, first the first of every file; with a text, those that hold it."""
    rejects: list[list[Reject]] = []
    for file in files:
        if not file.cache.bad_rows:
            continue
        told = list(islice(file.cache.rejects(), None if text else count))
        read = read_again(file, {reject["line"] for reject in told})
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
