"""Files to records: JSON Lines, JSON lists, Parquet and ArrayRecord, each record with its exact place.

The start of the data path, on the bytes of `storage.py`: `formats.py` makes rows of the records. A record that cannot
be read becomes a BadRow, so that one pass over a file finds everything that is wrong with it. A file falls into parts
that are a function of the file alone and can be read one by one, so that processes can share it (`shards.py`).

Nothing but a JSON list is ever held whole: of a list, its text (1 to 4 bytes a character, plus the bytes while it is
decoded). Big data is better kept as JSON Lines or Parquet.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, runtime_checkable

from posttrain.data.storage import COMPRESSED_SUFFIXES, ByteFile, local_copy, open_bytes, reading
from posttrain.data.tables import ArrayRecords, ParquetRows
from posttrain.errors import UserError

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
PARQUET_SUFFIX = ".parquet"
ARRAY_RECORD_SUFFIXES = (".array_record", ".arrayrecord")
SUFFIXES = (*JSON_SUFFIXES, PARQUET_SUFFIX, *ARRAY_RECORD_SUFFIXES)

_SIGNATURES = {
    b"\x1f\x8b": "compressed with gzip; fix: let its name end in .gz",
    b"BZh": "compressed with bzip2; fix: let its name end in .bz2",
    b"\xfd7zXZ\x00": "compressed with xz; fix: let its name end in .xz",
    b"\x28\xb5\x2f\xfd": "compressed with Zstandard; fix: let its name end in .zst",
    b"PAR1": "a Parquet file; fix: let its name end in .parquet",
}
_PART_ROWS = 1 << 14
"""A part of a table has at most so many rows, however small they seem to be."""


class BadRow(UserError):
    """A row that cannot be used: where it is, what is wrong and the fix."""

    def __init__(self, file: str, line: int, key: str, reason: str):
        super().__init__(file, line, key, reason)
        self.file = file
        self.line = line
        """As in `Record`."""
        self.key = key
        """What in the row, e.g. `messages[2].content`; empty where it is the row itself."""
        self.reason = reason

    @property
    def where(self) -> str:
        return f"line {self.line}: {self.key + ': ' if self.key else ''}{self.reason}"

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.key + ': ' if self.key else ''}{self.reason}"


@dataclass(frozen=True)
class Record:
    """A JSON value or a Parquet row."""

    file: str
    line: int
    """Of the line where it starts, from 1, as editors count; in Parquet and ArrayRecord the row's number, from 1."""
    value: Any

    @property
    def columns(self) -> dict[str, Any]:
        """The value as a row's columns, those with null left out; none where it is no object."""
        return {k: v for k, v in self.value.items() if v is not None} if isinstance(self.value, dict) else {}


@dataclass(frozen=True)
class Part:
    """A stretch of a file that is read on its own."""

    start: int
    """A byte of JSON Lines (decompressed; the lines that begin before `stop` belong to it), a character of a JSON list,
    or a row from 0."""
    stop: int | None
    """None: to the end."""
    size: int
    """About how many bytes, for a progress bar."""
    first_line: int = 1
    """Line of the first record. Of JSON Lines always 1: no process counts the lines that others read."""
    first_in_file: bool = False


@runtime_checkable
class RecordFile(Protocol):
    """An open file of records."""

    lines_read: int
    """By how much the lines of the next part are to be counted up, after a part has been read to its end."""

    def parts(self, size: int) -> list[Part]:
        """The file in parts of about `size` bytes, in order; one where it is no bigger. Raises UserError."""
        ...

    def read(self, part: Part | None = None) -> Iterator[Record | BadRow]:
        """The records of a part, by default of the whole file. Raises UserError. Reading in order is cheapest."""
        ...


def read_records(path: str) -> Iterator[Record | BadRow]:
    """The records of one file, in order. Raises UserError where the file as a whole cannot be read."""
    with open_records(path) as file:
        yield from file.read()


@contextmanager
def open_records(path: str, *, again: bool = False) -> Iterator[RecordFile]:
    """Opens one file by its ending; `again` where it will be read more than once, as parts are. Raises UserError."""
    name = path.lower()
    for suffix in COMPRESSED_SUFFIXES:
        name = name.removesuffix(suffix)
    compressed = len(name) < len(path)
    if name.endswith(JSON_SUFFIXES):
        if compressed and again:
            with local_copy(path) as local, open_bytes(local) as file:
                yield _json_file(file, path, compressed=True)
        else:
            with open_bytes(path) as file:
                yield _json_file(file, path, compressed=compressed)
    elif name.endswith(PARQUET_SUFFIX) and not compressed:
        with open_bytes(path) as file:
            yield _Table(ParquetRows(file, path), path)
    elif name.endswith(ARRAY_RECORD_SUFFIXES) and not compressed:
        with local_copy(path) as local:
            yield _Table(ArrayRecords(local, path), path)
    else:
        raise UserError(
            f"{path}: unknown kind of file; known endings: {', '.join(SUFFIXES)} "
            f"(JSON also with {', '.join(COMPRESSED_SUFFIXES)})"
        )


def _json_file(file: ByteFile, path: str, *, compressed: bool) -> "_JsonLines | _JsonList":
    """Lines or a list, by the first byte that is no whitespace."""
    with reading(path):
        head = file.read(8)
        for signature, what in _SIGNATURES.items():
            if head.startswith(signature):
                raise UserError(f"{path}: the file is {what}")
        if head.startswith((b"\xff\xfe", b"\xfe\xff")) or (b"\0" in head[:2] and head[:2] != b"\0\0"):
            raise UserError(f"{path}: the file is UTF-16; fix: save it as UTF-8")
        start = 3 if head.startswith(b"\xef\xbb\xbf") else 0
        file.seek(start)
        while (byte := file.read(1)).isspace():
            pass
        file.seek(start)
    return _JsonList(file, path) if byte == b"[" else _JsonLines(file, path, start, compressed=compressed)


# ---- JSON -----------------------------------------------------------------------------------------------------------


class _NotStrictJson(ValueError):
    """JSON that Python would read and other programs would read differently, or not at all."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _NotStrictJson(f"the key {twice!r} appears twice in one object; fix: keep one")
    return value


def _constant(name: str) -> NoReturn:
    raise _NotStrictJson(f"{name} is no JSON value; fix: null, or leave the key out")


_STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)
_LENIENT = json.JSONDecoder()


def _decode(raw: bytes, path: str, line: int, *, first: bool = False) -> Record | BadRow:
    """One JSON value that stands alone: a line (whether the file's `first`), or a record of ArrayRecord."""
    try:
        return Record(path, line, _STRICT.decode(raw.decode("utf-8")))
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 at byte {error.start + 1} of the line; fix: save it as UTF-8"
    except _NotStrictJson as error:
        reason = str(error)
    except json.JSONDecodeError as error:
        if first and error.pos == len(error.doc):
            raise UserError(
                f"{path}:{line}: a JSON value over several lines; fix: a list of rows, or one row on each line"
            ) from error
        reason = f"not valid JSON: {error.msg.removesuffix(' at')} at column {error.colno}; fix: {_json_fix(raw)}"
    except (ValueError, RecursionError) as error:
        reason = f"JSON that cannot be read: {error}"
    return BadRow(path, line, "", reason)


def _json_fix(raw: bytes) -> str:
    if raw.startswith(b"\xef\xbb\xbf"):
        return "remove the byte order mark, which may only begin the file"
    if b"\0" in raw:
        return "remove the NUL bytes (a copy that was cut off leaves such)"
    if b"\r" in raw:
        return "end every row with a newline; carriage returns alone end no line"
    return "correct the line"


class _JsonLines:
    """One JSON value a line. Lines end at \\n only: U+2028 and the like are legal inside JSON strings."""

    def __init__(self, file: ByteFile, path: str, start: int, *, compressed: bool):
        self._file, self._path, self._start, self._compressed = file, path, start, compressed
        self.lines_read = 0
        self._bound = self._at = start
        """The file stands at `_at`, where a line begins; none begins between `_bound` and there."""

    def parts(self, size: int) -> list[Part]:
        bytes_ = self._count_bytes() - self._start
        starts = range(self._start, self._start + max(bytes_, 1), size)
        parts = [Part(start, start + size, size, first_in_file=start == self._start) for start in starts[:-1]]
        return [*parts, Part(starts[-1], None, bytes_ - len(parts) * size, first_in_file=not parts)]

    def _count_bytes(self) -> int:
        self._bound, self._at = 1, 0  # nowhere
        with reading(self._path):
            if not self._compressed:
                return self._file.seek(0, 2)
            self._file.seek(0)
            count = 0
            while data := self._file.read(1 << 20):
                count += len(data)
            return count

    def read(self, part: Part | None = None) -> Iterator[Record | BadRow]:
        part = part or Part(self._start, None, 0)
        first = part.start == self._start
        self.lines_read = 0
        with reading(self._path):
            self._find(part.start)
            lines = iter(self._file)
            while (part.stop is None or self._at < part.stop) and (raw := next(lines, b"")):
                self._bound, self._at = self._at + 1, self._at + len(raw)
                self.lines_read += 1
                if raw := raw.rstrip(b" \t\r\n"):
                    yield _decode(raw, self._path, self.lines_read, first=first)
                    first = False

    def _find(self, start: int) -> None:
        """Goes to the first line that begins at or behind `start`."""
        if self._bound <= start <= self._at:
            return
        if start == self._start:
            self._at = self._file.seek(start)
        else:
            self._file.seek(start - 1)
            self._at = start - 1 + len(next(iter(self._file), b""))
        self._bound = start


class _JsonList:
    """One list, its elements decoded one by one so that each has its line and its own errors."""

    def __init__(self, file: ByteFile, path: str):
        self._path = path
        self.lines_read = 0
        with reading(path):
            raw = file.read()
        try:
            self._text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            line = raw.count(b"\n", 0, error.start) + 1
            raise UserError(f"{path}:{line}: not UTF-8; fix: save the file as UTF-8") from error
        self._first = _skip_space(self._text, self._text.index("[") + 1)

    def parts(self, size: int) -> list[Part]:
        starts, lines = [self._first], [self._line(self._first)]
        if len(self._text) - self._first > size:
            for position, record in self._elements(self._first, lines[0]):
                if position >= starts[-1] + size:
                    starts.append(position)
                    lines.append(record.line)
        stops = [*starts[1:], None]
        return [
            Part(start, stop, (len(self._text) if stop is None else stop) - start, line, start == self._first)
            for start, stop, line in zip(starts, stops, lines, strict=True)
        ]

    def read(self, part: Part | None = None) -> Iterator[Record | BadRow]:
        part = part or Part(self._first, None, 0, self._line(self._first))
        for _, record in self._elements(part.start, part.first_line, part.stop):
            yield record

    def _line(self, position: int) -> int:
        return self._text.count("\n", 0, position) + 1

    def _elements(self, position: int, line: int, stop: int | None = None) -> Iterator[tuple[int, Record | BadRow]]:
        """(where it starts, the element) from the one at `position`, in `line`, up to `stop` or to the end.

        What is wrong behind the last element comes as an element that starts nowhere, at -1.
        """
        text, path, counted = self._text, self._path, position
        more = position > self._first or text[position : position + 1] != "]"
        while more:
            line += text.count("\n", counted, position)
            counted = start = position
            if stop is not None and start >= stop:
                return
            try:
                try:
                    value, position = _STRICT.raw_decode(text, start)
                    record = Record(path, line, value)
                except _NotStrictJson as error:
                    _, position = _LENIENT.raw_decode(text, start)
                    record = BadRow(path, line, "", str(error))
            except json.JSONDecodeError as error:
                yield start, self._broken(error.pos, error.msg)
                return
            except (ValueError, RecursionError) as error:
                yield start, BadRow(path, line, "", f"JSON that cannot be read, nor what follows: {error}")
                return
            yield start, record
            position = _skip_space(text, position)
            more = text[position : position + 1] == ","
            if more:
                position = _skip_space(text, position + 1)
        if text[position : position + 1] != "]":
            yield -1, self._broken(position, "Expecting ',' or ']'")
        elif text[position + 1 :].strip():
            yield -1, self._broken(_skip_space(text, position + 1), "Extra data")

    def _broken(self, position: int, problem: str) -> BadRow:
        column = position - self._text.rfind("\n", 0, position)
        reason = f"not valid JSON: {problem.removesuffix(' at')} at column {column}; what follows cannot be read"
        return BadRow(self._path, self._line(position), "", reason)


def _skip_space(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\t", "\r", "\n"):
        position += 1
    return position


# ---- tables ---------------------------------------------------------------------------------------------------------


class _Table:
    """Numbered rows: those of Parquet as they are, ArrayRecord's as JSON."""

    lines_read = 0

    def __init__(self, rows: ParquetRows | ArrayRecords, path: str):
        self._rows, self._path = rows, path

    def parts(self, size: int) -> list[Part]:
        rows, bytes_ = self._rows.num_rows, self._rows.num_bytes()
        step = min(max(rows * size // max(bytes_, 1), 1), _PART_ROWS)
        starts = range(0, max(rows, 1), step)
        ends = [*starts[1:], rows]
        sizes = [bytes_ * (end - start) // max(rows, 1) for start, end in zip(starts, ends, strict=True)]
        return [Part(*part, part[0] + 1, part[0] == 0) for part in zip(starts, ends, sizes, strict=True)]

    def read(self, part: Part | None = None) -> Iterator[Record | BadRow]:
        start = 0 if part is None else part.start
        stop = self._rows.num_rows if part is None or part.stop is None else part.stop
        for line, row in enumerate(self._rows.read(start, stop), start + 1):
            yield _decode(row, self._path, line) if isinstance(row, bytes) else Record(self._path, line, row)
