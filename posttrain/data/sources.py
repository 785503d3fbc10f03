"""Data files -> token caches: the first step of the data path. Reads rows, encodes them, and holds the bad-row policy.

A file is tokenized when no cache fits its content, what its source says of reading it, the tokenizer, `loss_on` and
this very code. All processes of a run come here together and divide the work (`shards.py`).
"""

import ast
import functools
import hashlib
import importlib.metadata
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from etils import epath

from posttrain.config import DataConfig, SourceConfig
from posttrain.data.blocks import Block
from posttrain.data.cache import TokenCache
from posttrain.data.chat import Sample, encode_rows
from posttrain.data.files import SUFFIXES, BadRow, Part, Record, RecordFile, open_records, read_records
from posttrain.data.fileversion import FileVersion
from posttrain.data.formats import read_record, read_rows
from posttrain.data.labelled import encode_labelled
from posttrain.data.pairs import RowsKind, encode_pairs
from posttrain.data.progress import TokenizingReport
from posttrain.data.rows import Row
from posttrain.data.shards import CacheBuild, build_together
from posttrain.data.storage import COMPRESSED_SUFFIXES, find_files, local_path
from posttrain.data.tokenizer import Tokenizer
from posttrain.errors import UserError, UserErrors

log = logging.getLogger(__name__)

PART_BYTES = 4 << 20
"""About so much of a file is tokenized as one piece: some seconds of work."""

_BATCH_ROWS = 256
_SHOWN_BAD_ROWS = 20
_REJECTS = "rejects.jsonl"
ENCODERS = {"single": encode_rows, "pairs": encode_pairs, "labelled": encode_labelled}
"""Rows to samples, by what an objective is trained on."""
_NOT_CONTENT = {"path", "weight", "repeat", "limit"}
"""Fields of a source that change nothing of what its rows become."""


def tokenize_sources(
    sources: Mapping[str, SourceConfig],
    tokenizer: Tokenizer,
    data: DataConfig,
    *,
    rejects_dir: str | Path | None = None,
    is_main: bool = True,
    barrier: Callable[[str], None] = lambda name: None,
    rows: RowsKind = "single",
    part_bytes: int = PART_BYTES,
) -> dict[str, list[TokenCache]]:
    """The token caches of every source, built where there are none: one for each file that its path names, in order.

    All processes of a run call this; which of them tokenizes what makes no difference to the caches (compare their
    `checksum`).

    Args:
      sources: by their place in the config, e.g. `data.train.0`, for error messages.
      tokenizer: encodes the rows.
      data: `loss_on`, `on_bad_row`, `max_bad_rows` and `cache_dir` are read.
      rejects_dir: where the main process writes `rejects.jsonl` when bad rows are skipped; None: nowhere.
      is_main: whether this process shows progress and writes the rejects.
      barrier: waits for all processes; called once, with a name, by each that has its caches. One that fails does not
        come: the others meet its error themselves, or hear that it has ended.
      rows: what the objective is trained on.
      part_bytes: how much of a file is tokenized as one piece.

    Raises:
      UserError: all files that cannot be read, and all bad rows that `on_bad_row` does not let pass, together.
    """
    builds = _prepare(sources, tokenizer, data, rows, part_bytes)
    together = [build for of_source in builds.values() for build in of_source]
    with TokenizingReport(together, shown=is_main) as report:
        errors = build_together(together, report.update)
        if errors:
            raise _joined(errors)
    caches = {key: [build.cache for build in of_source if build.cache] for key, of_source in builds.items()}
    barrier("token caches")
    every = [cache for of_source in caches.values() for cache in of_source]
    bad_rows = sum(cache.bad_rows for cache in every)
    if bad_rows and (data.on_bad_row == "error" or bad_rows > data.max_bad_rows):
        raise _bad_rows_error(every, bad_rows, data)
    if bad_rows and is_main and rejects_dir is not None:
        write_rejects(every, rejects_dir)
    return caches


def _prepare(
    sources: Mapping[str, SourceConfig], tokenizer: Tokenizer, data: DataConfig, rows: RowsKind, part_bytes: int
) -> dict[str, list[CacheBuild]]:
    """Finds, identifies and opens all files before any of them is tokenized. Raises all that is wrong with them."""
    builds: dict[str, list[CacheBuild]] = {}
    errors: list[UserError] = []
    for key, source in sources.items():
        builds[key] = []
        try:
            if not source.path:
                raise UserError(f"is not set; name a data file ({', '.join(SUFFIXES)}) or a pattern")
            paths = find_files(source.path, SUFFIXES)
        except UserError as error:
            errors.append(UserError(f"{key}.path: {error}"))
            continue
        for path in paths:
            try:
                job = _FileJob(path, source, tokenizer, data.loss_on, rows, part_bytes)
                build = CacheBuild(job, cache_dir=data.cache_dir)
                if build.cache is None and local_path(path) is not None:
                    with open_records(path):
                        pass
                builds[key].append(build)
            except UserError as error:
                errors.append(error)
    if errors:
        raise _joined(errors)
    return builds


def _joined(errors: Sequence[UserError]) -> UserError:
    """The only error, or all that differ."""
    texts = list(dict.fromkeys(map(str, errors)))
    return errors[0] if len(texts) == 1 else UserErrors(texts)


@functools.cache
def _code_fingerprint() -> str:
    """Changes with whatever turns rows into tokens: the code that this module stands on, and the libraries under it."""
    here = Path(__file__)
    found, new = set(), {here.stem}
    digest = hashlib.sha256()
    while new:
        found |= new
        new = {name for module in new for name in _imported(here.with_name(f"{module}.py"))} - found
    for module in sorted(found):
        digest.update(module.encode() + here.with_name(f"{module}.py").read_bytes())
    for library in ("tokenizers", "transformers", "jinja2"):
        digest.update(f"{library} {importlib.metadata.version(library)}".encode())
    return digest.hexdigest()


def _imported(file: Path) -> set[str]:
    """The modules beside a file that it imports by name, wherever the import stands."""
    package = __name__.rpartition(".")[0]
    nodes = (node for node in ast.walk(ast.parse(file.read_bytes())) if isinstance(node, ast.ImportFrom))
    modules = {
        f"{node.module}.{alias.name}" if node.module == package else f"{node.module}"
        for node in nodes
        for alias in node.names
    }
    return {module.removeprefix(f"{package}.") for module in modules if module.startswith(f"{package}.")}


# ---- rows to samples ------------------------------------------------------------------------------------------------


class _FileJob:
    """How one data file becomes blocks of samples: a `Job` of `shards.py`. Raises UserError for an unreadable file."""

    def __init__(
        self,
        path: str,
        source: SourceConfig,
        tokenizer: Tokenizer,
        loss_on: tuple[str, ...],
        rows: RowsKind,
        part_bytes: int,
    ):
        self.path = path
        self._source, self._tokenizer, self._loss_on, self._part_bytes = source, tokenizer, loss_on, part_bytes
        self._encode = ENCODERS[rows]
        self._version = FileVersion.of(path)
        self.size = self._version.size
        self.facts = {
            "data": self._version.identity,
            "endings": [end.lower() for end in Path(path).suffixes if end.lower() in SUFFIXES + COMPRESSED_SUFFIXES],
            "source": source.model_dump(mode="json", exclude=_NOT_CONTENT),
            "loss_on": list(loss_on),
            "rows": rows,
            "tokenizer": tokenizer.fingerprint,
            "code": _code_fingerprint(),
        }
        self._stack = ExitStack()
        self._file: RecordFile | None = None

    def _open(self) -> RecordFile:
        if self._file is None:
            self._file = self._stack.enter_context(open_records(self.path, again=True))
        return self._file

    def close(self) -> None:
        """Closes the file until it is read again."""
        self._file = None
        self._stack.close()

    def parts(self) -> list[Part]:
        """The file's parts in order."""
        return self._open().parts(self._part_bytes)

    def blocks(self, part: Part) -> Iterator[Block]:
        """Every row of a part, as samples or as a reject."""
        if part.first_in_file:
            next(read_rows(self.path, self._source), None)  # refuses a file without rows, or of rows of no known form
        file = self._open()
        records = file.read(part)
        while batch := list(islice(records, _BATCH_ROWS)):
            yield self._block(batch)
        yield Block(lines_read=file.lines_read)
        self._version.check_unchanged()

    def _block(self, records: Sequence[Record | BadRow]) -> Block:
        made: list[tuple[Sequence[Row | BadRow], Mapping[str, int]]] = [
            ([record], {}) if isinstance(record, BadRow) else read_record(record, self._source) for record in records
        ]
        rows = [(number, row) for number, (of_record, _) in enumerate(made) for row in of_record]
        good = [(number, row) for number, row in rows if isinstance(row, Row)]
        bad = [(number, row) for number, row in rows if isinstance(row, BadRow)]
        samples: list[Sample] = []
        last = -1
        encoded = self._encode([row for _, row in good], self._tokenizer, self._loss_on)
        for (number, _), outcome in zip(good, encoded, strict=True):
            if isinstance(outcome, BadRow):
                bad.append((number, outcome))
                continue
            for sample in outcome:
                samples.append(replace(sample, begins=False) if number == last else sample)
                last = number
        alike = {(number, row.key, row.reason): row for number, row in bad}  # all pairs of a ranking may fail alike
        rejects = [
            {"line": row.line, "key": row.key, "reason": row.reason}
            for row in sorted(alike.values(), key=lambda row: row.line)
        ]
        left_out = sum(not of_record for of_record, _ in made)
        notes = sum((Counter(of) for _, of in made if of), Counter())
        return Block.of(samples, rejects, rows=len(records), left_out=left_out, notes=notes)


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
        rows = sum(cache.rows for cache in caches)
        problems.append(
            f"{bad_rows:,} of {max(rows, bad_rows):,} rows are bad and data.on_bad_row is error; correct them, or set "
            "data.on_bad_row to skip (they are then written to rejects.jsonl)"
        )
    else:
        problems.append(
            f"{bad_rows:,} rows are bad, more than data.max_bad_rows={data.max_bad_rows}; correct them or raise it"
        )
    return UserErrors(problems)


def write_rejects(caches: Iterable[TokenCache], directory: str | Path) -> None:
    """Writes rejects.jsonl: file, line, key, reason, and the row itself where it can be parsed; and says so.

    `directory` is any path that epath opens.
    """
    rejected = [cache for cache in caches if cache.bad_rows]
    rejects = [{"file": cache.path, **reject} for cache in rejected for reject in cache.rejects()]
    path = epath.Path(directory) / _REJECTS
    log.warning("skipped %d bad rows: see %s", len(rejects), path)
    if path.exists() and _without_rows(path.read_text()) == rejects:  # a resumed run: the data need not be read again
        return
    rows = {cache.path: _rows_at({reject["line"] for reject in cache.rejects()}, cache.path) for cache in rejected}
    lines = [json.dumps({**reject, "row": rows[reject["file"]].get(reject["line"])}, default=str) for reject in rejects]
    path.parent.mkdir(parents=True, exist_ok=True)
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
