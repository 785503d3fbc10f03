"""Data files -> token caches: the first step of the data path. Reads rows, encodes them, and holds the bad-row policy.

A file is tokenized when no cache fits its content, its format, the tokenizer, `loss_on` and this very code. Local files
are known by their bytes, remote ones by what their store says changes with the content.
"""

import functools
import hashlib
import importlib.metadata
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import fsspec
from etils import epath
from fsspec.implementations.local import LocalFileSystem
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from posttrain.config import DataConfig, SourceConfig
from posttrain.data.cache import CacheWriter, TokenCache, open_cache
from posttrain.data.chat import Sample, encode_rows
from posttrain.data.files import JSON_SUFFIXES, BadRow, Record, read_records
from posttrain.data.formats import Row, read_rows
from posttrain.data.tokenizer import Tokenizer
from posttrain.errors import UserError, UserErrors

log = logging.getLogger(__name__)

_BATCH_ROWS = 256
_SHOWN_BAD_ROWS = 20
_CODE_THAT_ONLY_READS = {"packing.py", "samples.py", "pipeline.py", "inspect.py"}
_REMOTE_VERSION_FACTS = (
    *("etag", "ETag", "md5Hash", "crc32c", "generation", "version_id", "sha256", "blob_id"),
    *("mtime", "updated", "LastModified", "last_modified", "created"),
)


def tokenize_sources(
    sources: Mapping[str, SourceConfig],
    tokenizer: Tokenizer,
    data: DataConfig,
    *,
    rejects_dir: str | Path,
    is_main: bool = True,
    barrier: Callable[[str], None] = lambda name: None,
) -> list[TokenCache]:
    """The token cache of every source, built where there is none.

    Args:
      sources: by their place in the config, e.g. `data.train.0`, for error messages.
      tokenizer: encodes the rows.
      data: `loss_on`, `on_bad_row`, `max_bad_rows` and `cache_dir` are read.
      rejects_dir: gets `rejects.jsonl` when bad rows are skipped; any path that epath opens.
      is_main: whether this process builds first, shows progress and writes the rejects.
      barrier: waits for all processes; called once, with a name. The others open what the main process built, or build
        for themselves when their disk does not have it.

    Raises:
      UserError: all unreadable files, and all bad rows that `on_bad_row` does not let pass, together.
    """
    if is_main:
        try:
            caches = _open_all(sources, tokenizer, data, is_main=True)
        finally:  # the others must not wait for a process that has failed: they meet the same error themselves
            barrier("token cache")
    else:
        barrier("token cache")
        caches = _open_all(sources, tokenizer, data, is_main=False)
    bad_rows = sum(cache.bad_rows for cache in caches)
    if bad_rows and (data.on_bad_row == "error" or bad_rows > data.max_bad_rows):
        raise _bad_rows_error(caches, bad_rows, data)
    if bad_rows and is_main:
        _write_rejects(caches, epath.Path(rejects_dir))
        log.warning("skipped %d bad rows: see %s", bad_rows, epath.Path(rejects_dir) / "rejects.jsonl")
    return caches


def _open_all(
    sources: Mapping[str, SourceConfig], tokenizer: Tokenizer, data: DataConfig, *, is_main: bool
) -> list[TokenCache]:
    """Opens or builds each cache; raises the errors of all files together."""
    caches: list[TokenCache] = []
    errors: list[UserError] = []
    for key, source in sources.items():
        try:
            version = _FileVersion.of(key, source.path)
            facts = {
                "data": version.identity,
                "suffixes": Path(source.path).suffixes[-2:],  # which decide how the bytes are read
                "format": source.format,
                "loss_on": data.loss_on,
                "tokenizer": tokenizer.fingerprint,
                "code": _code_fingerprint(),
            }
            build = functools.partial(
                _tokenize, key=key, source=source, version=version, tokenizer=tokenizer, data=data, is_main=is_main
            )
            caches.append(open_cache(source.path, facts, build, cache_dir=data.cache_dir))
        except UserError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise UserErrors([str(error) for error in errors])
    return caches


@functools.cache
def _code_fingerprint() -> str:
    """Changes with whatever turns rows into tokens: the code of this package, and the libraries under it."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.name not in _CODE_THAT_ONLY_READS:
            digest.update(path.name.encode() + path.read_bytes())
    for library in ("tokenizers", "transformers", "jinja2"):
        digest.update(f"{library} {importlib.metadata.version(library)}".encode())
    return digest.hexdigest()


# ---- which content a path has ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _FileVersion:
    """A file's content, told apart from any other content that its path may have had."""

    identity: dict[str, str]
    records: int | None = None
    """About what line number the last record has, for the progress bar; None where that takes reading the file."""
    local: Path | None = None
    stat: tuple[int, int] | None = None

    @classmethod
    def of(cls, key: str, path: str) -> "_FileVersion":
        """Raises UserError where `path` cannot be read."""
        if not path:
            raise UserError(f"{key}.path: is not set; name a JSONL, JSON or Parquet file")
        try:
            files, name = fsspec.core.url_to_fs(path)
            if not files.exists(name):
                raise UserError(f"{key}.path: there is no file {path!r}; check the path")
            if files.isdir(name):
                raise UserError(f"{key}.path: {path!r} is a directory; name a file in it")
            local = Path(name) if isinstance(files, LocalFileSystem) else None
            if local is None:
                info = files.info(name)
                facts = {fact: str(info[fact]) for fact in _REMOTE_VERSION_FACTS if info.get(fact) is not None}
                if facts:
                    return cls({"path": path, "size": str(info.get("size")), **facts})
            stat = _stat(local) if local else None
            digest, newlines = hashlib.sha256(), 0
            with files.open(name, "rb") as file:
                while chunk := cast(bytes, file.read(1 << 22)):
                    digest.update(chunk)
                    newlines += chunk.count(b"\n")
        except (OSError, ValueError, ImportError) as error:  # the latter two: a protocol unknown or not installed
            raise UserError(f"{key}.path: cannot read {path!r}: {error}") from error
        if name.endswith(".parquet"):
            records = _parquet_rows(local) if local else None
        else:
            records = newlines if name.endswith(JSON_SUFFIXES) else None
        return cls({"sha256": digest.hexdigest()}, records, local, stat)

    def check_unchanged(self, key: str) -> None:
        """Raises UserError when a local file is not the one that was hashed any more."""
        if self.local is not None and _stat(self.local) != self.stat:
            raise UserError(f"{key}.path: {self.local} changed while it was read; start again when it is complete")


def _stat(path: Path) -> tuple[int, int]:
    """Size and modification time."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _parquet_rows(path: Path) -> int | None:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_metadata(path).num_rows
    except pyarrow.ArrowException:  # the reader will say what is wrong with it
        return None


# ---- rows to samples ------------------------------------------------------------------------------------------------


def _tokenize(
    writer: CacheWriter,
    *,
    key: str,
    source: SourceConfig,
    version: _FileVersion,
    tokenizer: Tokenizer,
    data: DataConfig,
    is_main: bool,
) -> None:
    """Writes every row of `source`, as a sample or as a reject."""
    rows = read_rows(source.path, source.format)
    with _Report(source.path, version.records, shown=is_main) as report:
        while batch := list(islice(rows, _BATCH_ROWS)):
            encoded = encode_rows([row for row in batch if isinstance(row, Row)], tokenizer, data.loss_on)
            outcomes = [*encoded, *(row for row in batch if isinstance(row, BadRow))]
            samples = [outcome for outcome in outcomes if isinstance(outcome, Sample)]
            bad = sorted((outcome for outcome in outcomes if isinstance(outcome, BadRow)), key=lambda row: row.line)
            writer.append(samples, [{"line": row.line, "key": row.key, "reason": row.reason} for row in bad])
            report.update(batch[-1].line, writer.counts)
    version.check_unchanged(key)


class _Report:
    """How far tokenizing has come: a bar when it takes longer than some seconds, and a line in the log at the end."""

    _QUIET_SECONDS = 3.0

    def __init__(self, name: str, records: int | None, *, shown: bool):
        self._name, self._shown = name, shown
        self._start = time.perf_counter()
        self._counts: Mapping[str, int] = {}
        columns = (
            TextColumn("tokenizing {task.description}", markup=False),
            *((BarColumn(), TimeRemainingColumn()) if records else (TimeElapsedColumn(),)),
            TextColumn(
                "{task.fields[tokens]:,} tokens, {task.fields[speed]:,.0f}/s, {task.fields[bad_rows]:,} bad rows"
            ),
        )
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._progress.add_task(
            name.rsplit("/", 1)[-1], total=records, samples=0, tokens=0, bad_rows=0, speed=0.0
        )

    def __enter__(self) -> "_Report":
        return self

    def update(self, line: int, counts: Mapping[str, int]) -> None:
        """Takes note of the last line that was read, and of what there is so far."""
        self._counts = counts
        seconds = time.perf_counter() - self._start
        if self._shown and seconds > self._QUIET_SECONDS:
            self._progress.start()
        shown: dict[str, Any] = {**counts, "speed": counts["tokens"] / seconds}
        self._progress.update(self._task, completed=line, **shown)

    def __exit__(self, kind: object, *_: object) -> None:
        self._progress.stop()
        if self._shown and kind is None and self._counts:
            seconds = time.perf_counter() - self._start
            log.info(
                "tokenized %s: %s samples, %s tokens in %.1f s (%s tokens/s)",
                self._name,
                f"{self._counts['samples']:,}",
                f"{self._counts['tokens']:,}",
                seconds,
                f"{self._counts['tokens'] / seconds:,.0f}",
            )


# ---- bad rows -------------------------------------------------------------------------------------------------------


def _bad_rows_error(caches: Sequence[TokenCache], bad_rows: int, data: DataConfig) -> UserErrors:
    """Names the first bad rows of all files, and how many there are."""
    named = (
        str(BadRow(cache.path, reject["line"], reject["key"], reject["reason"]))
        for cache in caches
        for reject in cache.rejects()
    )
    problems = list(islice(named, _SHOWN_BAD_ROWS))
    if more := bad_rows - len(problems):
        problems.append(f"... and {more:,} more bad rows")
    if data.on_bad_row == "error":
        good = sum(cache.num_samples for cache in caches)
        problems.append(
            f"{bad_rows:,} of {bad_rows + good:,} rows are bad and data.on_bad_row is error; correct them, or set "
            "data.on_bad_row to skip (they are then written to rejects.jsonl)"
        )
    else:
        problems.append(
            f"{bad_rows:,} rows are bad, more than data.max_bad_rows={data.max_bad_rows}; correct them or raise it"
        )
    return UserErrors(problems)


def _write_rejects(caches: Sequence[TokenCache], directory: epath.Path) -> None:
    """Writes rejects.jsonl: file, line, key, reason, and the row itself where it can be parsed."""
    rejects = [{"file": cache.path, **reject} for cache in caches for reject in cache.rejects()]
    path = directory / "rejects.jsonl"
    if path.exists() and _without_rows(path.read_text()) == rejects:  # a resumed run: the data need not be read again
        return
    rows = {cache.path: _rows_at({reject["line"] for reject in cache.rejects()}, cache.path) for cache in caches}
    lines = [json.dumps({**reject, "row": rows[reject["file"]].get(reject["line"])}, default=str) for reject in rejects]
    directory.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def _without_rows(text: str) -> list[dict[str, Any]] | None:
    """What rejects.jsonl says but for the rows; None where it is not such a file."""
    try:
        return [{key: value for key, value in json.loads(line).items() if key != "row"} for line in text.splitlines()]
    except (json.JSONDecodeError, AttributeError):
        return None


def _rows_at(wanted: set[int], path: str) -> dict[int, Any]:
    """The file's records by line, without lines on which several start."""
    found: dict[int, list[Any]] = {}
    last = max(wanted, default=0)
    for record in read_records(path) if wanted else ():
        if record.line > last:
            break
        if record.line in wanted:
            found.setdefault(record.line, []).append(record.value if isinstance(record, Record) else None)
    return {line: values[0] for line, values in found.items() if len(values) == 1}
