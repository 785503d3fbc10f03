"""Rows of Parquet files and records of ArrayRecord files, by number: random access under `files.py`.

Both know how many rows they hold, so any stretch of them can be read on its own.
"""

from collections.abc import Iterator
from typing import Any

from posttrain.data.storage import ByteFile, reading
from posttrain.errors import UserError

_BATCH_ROWS = 256
_READ_AHEAD = 1 << 20


class ParquetRows:
    """The rows of an open Parquet file. Holds a batch of rows and some pages, never a whole row group."""

    def __init__(self, file: ByteFile, path: str):
        import pyarrow
        import pyarrow.parquet

        self._path = path
        self._failures = (pyarrow.ArrowException, UnicodeDecodeError)
        with reading(path):
            try:
                self._file = pyarrow.parquet.ParquetFile(file, buffer_size=_READ_AHEAD, pre_buffer=False)
            except self._failures as error:
                raise self._unreadable(error) from error
        metadata = self._file.metadata
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
        self._starts = [0]
        for group in groups:
            self._starts.append(self._starts[-1] + group.num_rows)
        self._group_bytes = [group.total_byte_size for group in groups]
        self._group = -1
        self._at = 0
        self._batch: Any = ()
        self._batches: Iterator[Any] = iter(())
        """The row group that is being decoded, its row where the held batch begins, that batch, those behind it."""

    @property
    def num_rows(self) -> int:
        return self._starts[-1]

    def num_bytes(self) -> int:
        """Of all rows, decompressed."""
        return sum(self._group_bytes)

    def read(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """Rows `start` to `stop` as columns. Goes on where the last call stopped, or decodes a row group anew."""
        try:
            for group in range(len(self._group_bytes)):
                first, end = self._starts[group], self._starts[group + 1]
                if first < stop and start < end:
                    with reading(self._path):
                        yield from self._read_group(group, max(start, first), min(stop, end))
        except self._failures as error:
            raise self._unreadable(error) from error

    def _read_group(self, group: int, start: int, stop: int) -> Iterator[dict[str, Any]]:
        if self._group != group or self._at > start:
            self._group, self._at, self._batch = group, self._starts[group], ()
            self._batches = self._file.iter_batches(batch_size=_BATCH_ROWS, row_groups=[group])
        while True:
            end = self._at + len(self._batch)
            if end > start:
                first = max(start - self._at, 0)
                yield from self._batch.slice(first, min(stop, end) - self._at - first).to_pylist()
            if end >= stop:
                return
            batch = next(self._batches, None)
            if batch is None:
                raise self._unreadable("it has fewer rows than it says")
            self._at, self._batch = end, batch

    def _unreadable(self, error: object) -> UserError:
        return UserError(f"{self._path}: not a readable Parquet file: {error}")


class ArrayRecords:
    """The records of a local ArrayRecord file, as bytes."""

    def __init__(self, local: str, path: str):
        from array_record.python.array_record_module import ArrayRecordReader

        self._path = path
        with reading(path):
            with open(local, "rb") as file:  # the library says nothing of files that are not there
                self._size = file.seek(0, 2)
            self._reader = ArrayRecordReader(local, "readahead_buffer_size:0,max_parallelism:0")
        if not self._reader.ok():
            raise UserError(f"{path}: not a readable ArrayRecord file (cut off, or of another kind)")

    @property
    def num_rows(self) -> int:
        return self._reader.num_records()

    def num_bytes(self) -> int:
        """Of the file."""
        return self._size

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        """Records `start` to `stop`."""
        for first in range(start, stop, _BATCH_ROWS):
            last = min(first + _BATCH_ROWS, stop)
            with reading(self._path):
                try:
                    records = self._reader.read(first, last)
                except (ValueError, RuntimeError, IndexError) as error:
                    raise self._damaged(first, last) from error
            if len(records) != last - first or not self._reader.ok():
                raise self._damaged(first, last)
            yield from records

    def _damaged(self, first: int, last: int) -> UserError:
        return UserError(f"{self._path}: cannot be read: damaged between records {first + 1} and {last}")
