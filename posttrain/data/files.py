"""Files to records: JSON Lines, JSON lists and Parquet, anywhere fsspec reaches, each record with its exact place.

The start of the data path: `formats.py` makes rows of the records. A record that cannot be read becomes a BadRow, so
that one pass over a file finds everything that is wrong with it.
"""

import json
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, runtime_checkable

import fsspec

from posttrain.errors import UserError

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz")
PARQUET_SUFFIX = ".parquet"


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
    """Of the line where it starts, from 1, as editors count; of a Parquet file the number of the row, from 1."""
    value: Any

    @property
    def columns(self) -> dict[str, Any]:
        """The value as a row's columns, those with null left out; none where it is no object."""
        return {k: v for k, v in self.value.items() if v is not None} if isinstance(self.value, dict) else {}


@runtime_checkable
class ByteFile(Protocol):
    """What is needed of an open file: fsspec, the compression modules and Python have classes of their own."""

    def read(self, size: int = -1, /) -> bytes: ...
    def seek(self, offset: int, /) -> int: ...
    def __iter__(self) -> Iterator[bytes]: ...


class _NotStrictJson(ValueError):
    """JSON that Python would read and other programs would read differently, or not at all."""


def read_records(path: str) -> Iterator[Record | BadRow]:
    """The records of a file, in order. Raises UserError where the file as a whole cannot be read."""
    name = path.lower()
    for suffix in COMPRESSED_SUFFIXES:
        name = name.removesuffix(suffix)
    if name.endswith(JSON_SUFFIXES):
        with _open(path) as file:
            first = _first_byte(file, path)
            yield from _json_list(file, path) if first == b"[" else _json_lines(file, path)
    elif name.endswith(PARQUET_SUFFIX) and name == path.lower():
        with _open(path) as file:
            yield from _parquet_rows(file, path)
    else:
        known = ", ".join((*JSON_SUFFIXES, PARQUET_SUFFIX))
        raise UserError(f"{path}: unknown kind of file; known endings: {known} (JSON also with .gz)")


@contextmanager
def _open(path: str) -> Iterator[ByteFile]:
    """The file's bytes, decompressed. What goes wrong while it is open becomes a UserError too."""
    try:
        opened = fsspec.open(path, "rb", compression="infer")
    except (ValueError, ImportError) as error:
        raise UserError(f"{path}: cannot be opened: {error}") from error
    try:
        with opened as file:
            yield file  # pyright: ignore[reportReturnType]  # the type of open_files, for several paths, too
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise UserError(f"{path}: a directory; fix: name the file in it") from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path}: cannot be read: {str(error) or type(error).__name__}") from error


def _first_byte(file: ByteFile, path: str) -> bytes:
    """The first byte that is no whitespace, or none. Leaves the file behind its byte order mark."""
    head = file.read(4)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path}: the file is UTF-16; fix: save it as UTF-8")
    start = 3 if head.startswith(b"\xef\xbb\xbf") else 0
    file.seek(start)
    while (byte := file.read(1)).isspace():
        pass
    file.seek(start)
    return byte


# ---- JSON -----------------------------------------------------------------------------------------------------------


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


def _json_lines(file: ByteFile, path: str) -> Iterator[Record | BadRow]:
    first = True
    # Iterating bytes splits at \n only; str.splitlines would also split at U+2028, legal inside JSON strings.
    for line, raw in enumerate(file, 1):
        raw = raw.rstrip(b" \t\r\n")
        if not raw:
            continue
        try:
            text = raw.decode("utf-8")
            yield Record(path, line, _STRICT.decode(text))
        except UnicodeDecodeError as error:
            yield BadRow(path, line, "", f"not UTF-8 at byte {error.start + 1} of the line; fix: save it as UTF-8")
        except _NotStrictJson as error:
            yield BadRow(path, line, "", str(error))
        except json.JSONDecodeError as error:
            if first and error.pos == len(error.doc):
                raise UserError(
                    f"{path}:{line}: a JSON value over several lines; fix: a list of rows, or one row on each line"
                ) from error
            yield BadRow(path, line, "", f"not valid JSON: {error.msg} at column {error.colno}; fix: correct the line")
        except (ValueError, RecursionError) as error:
            yield BadRow(path, line, "", f"JSON that cannot be read: {error}")
        first = False


def _json_list(file: ByteFile, path: str) -> Iterator[Record | BadRow]:
    """The elements of one list, decoded one by one so that each has its line and its own errors."""
    raw = file.read()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8; fix: save the file as UTF-8") from error
    line, counted = 1, 0
    position = _skip_space(text, text.index("[") + 1)
    more = text[position : position + 1] != "]"
    while more:
        line += text.count("\n", counted, position)
        counted = position
        try:
            try:
                value, position = _STRICT.raw_decode(text, position)
                yield Record(path, line, value)
            except _NotStrictJson as error:
                _, position = _LENIENT.raw_decode(text, position)
                yield BadRow(path, line, "", str(error))
        except json.JSONDecodeError as error:
            yield _broken_list(path, text, error.pos, error.msg)
            return
        except (ValueError, RecursionError) as error:
            yield BadRow(path, line, "", f"JSON that cannot be read, nor what follows: {error}")
            return
        position = _skip_space(text, position)
        more = text[position : position + 1] == ","
        if more:
            position = _skip_space(text, position + 1)
    if text[position : position + 1] != "]":
        yield _broken_list(path, text, position, "Expecting ',' or ']'")
    elif text[position + 1 :].strip():
        yield _broken_list(path, text, _skip_space(text, position + 1), "Extra data")


def _broken_list(path: str, text: str, position: int, problem: str) -> BadRow:
    line = text.count("\n", 0, position) + 1
    column = position - text.rfind("\n", 0, position)
    return BadRow(path, line, "", f"not valid JSON: {problem} at column {column}; what follows cannot be read")


def _skip_space(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\t", "\r", "\n"):
        position += 1
    return position


# ---- Parquet --------------------------------------------------------------------------------------------------------


def _parquet_rows(file: ByteFile, path: str) -> Iterator[Record | BadRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        line = 0
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024):
            for value in batch.to_pylist():
                line += 1
                yield Record(path, line, value)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable Parquet file: {error}") from error
