"""Paths to bytes: which files a path or pattern names, and one file open for reading, decompressed.

The very start of the data path, under `files.py`, which makes records of the bytes. Local or anywhere fsspec reaches:
`hf://datasets/ORG/NAME/...`, `gs://`, `s3://`, ... What goes wrong there is a UserError that starts with the path.
"""

import bz2
import glob
import gzip
import io
import lzma
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, cast, runtime_checkable

import fsspec
import pyarrow
from fsspec.implementations.local import LocalFileSystem

from posttrain.errors import UserError

COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")

_MAGIC = "*?["
_SCRATCH = "posttrain-"
_REMOTE_FAILURES = (
    ("aiohttp", "ClientError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("httpx", "HTTPError"),
)
"""What stores' libraries raise that is no OSError; they are extras, so it is looked up where they are loaded."""


@runtime_checkable
class ByteFile(Protocol):
    """What is needed of an open file: fsspec, the compression modules and Python have classes of their own."""

    def read(self, size: int = -1, /) -> bytes: ...
    def seek(self, offset: int, whence: int = 0, /) -> int: ...
    def __iter__(self) -> Iterator[bytes]: ...


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Makes UserErrors of what goes wrong while `path` is read."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise UserError(f"{path}: a directory; fix: name the file in it") from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError, *_remote_failures()) as error:
        raise UserError(f"{path}: cannot be read: {str(error) or type(error).__name__}") from error


def _remote_failures() -> tuple[type[Exception], ...]:
    found = (getattr(sys.modules.get(module), name, None) for module, name in _REMOTE_FAILURES)
    return tuple(failure for failure in found if failure is not None)


def file_system(path: str) -> tuple[Any, str]:
    """The fsspec file system of a path, and the path's name there."""
    try:
        return fsspec.core.url_to_fs(_expand_home(path))
    except (ValueError, ImportError) as error:  # a protocol that is unknown, or whose package is missing: says which
        raise UserError(f"{path}: cannot be opened: {error}") from error


def local_path(path: str) -> Path | None:
    """Where a file lies on this machine; None where it does not."""
    files, name = file_system(path)
    return Path(name) if isinstance(files, LocalFileSystem) else None


def _expand_home(path: str) -> str:
    return str(Path(path).expanduser()) if path.startswith("~") else path


# ---- which files ----------------------------------------------------------------------------------------------------


def find_files(path: str, suffixes: tuple[str, ...]) -> list[str]:
    """The files that a path or pattern (`chats/*.jsonl`, `hf://datasets/org/name/**/*.parquet`) names, in sorted order.

    A file that exists under the very name is that file, whatever is in its name. `suffixes` are the endings of data
    files, to propose a pattern where the path is a directory. Raises UserError.
    """
    files, name = file_system(path)
    found, said = [], ""
    with reading(path):
        try:
            kind = files.info(name)["type"]
            if kind == "directory":
                raise UserError(
                    f"{path}: a directory; fix: name its files, e.g. {_pattern_for(path, files, name, suffixes)}"
                )
            return [_expand_home(path)]
        except FileNotFoundError as error:
            said = "" if isinstance(files, LocalFileSystem) else f" ({error})"
        except OSError:  # stores say many things of names with wildcards in them; a plain name has to be there
            if not _is_pattern(path):
                raise
        if not _is_pattern(path):
            raise UserError(f"{path}: there is no such file; check the path{said}")
        found = _matches(path, files)
    if not found:
        raise UserError(f"{path}: the pattern names no file; check it (** stands for any folders)")
    return found


def _is_pattern(path: str) -> bool:
    web = path.startswith(("http://", "https://"))  # whose servers list nothing, and whose ? is no wildcard
    return any(char in path for char in _MAGIC) and not web


def _matches(path: str, files: Any) -> list[str]:
    if "::" in path:
        raise UserError(f"{path}: a pattern in a chained URL is not served; fix: name the files")
    path = _expand_home(path)
    if isinstance(files, LocalFileSystem):
        pattern = path.removeprefix("file://")
        return sorted(name for name in glob.glob(pattern, recursive=True) if Path(name).is_file())
    first = min(path.index(char) for char in _MAGIC if char in path)
    fixed = path[: path.rindex("/", 0, first)]
    _, top = file_system(fixed)
    found = files.glob(top + path[len(fixed) :], detail=True)
    return sorted(fixed + name[len(top) :] for name, info in found.items() if info["type"] == "file")


def _pattern_for(directory: str, files: Any, name: str, suffixes: tuple[str, ...]) -> str:
    """A pattern with the ending that most files of the directory have."""
    names = [entry["name"] for entry in files.ls(name, detail=True) if entry["type"] == "file"]
    endings = [suffix + compressed for suffix in suffixes for compressed in ("", *COMPRESSED_SUFFIXES)]
    counts = {ending: sum(name.endswith(ending) for name in names) for ending in endings}
    best = max(counts, key=lambda ending: counts[ending])
    return f"{directory.rstrip('/')}/{'' if counts[best] else '**/'}*{best}"


# ---- open files -----------------------------------------------------------------------------------------------------


class _Borrowed:
    """An open file as Arrow takes it, which would close it when it is done."""

    closed = False

    def __init__(self, file: Any):
        self.read = file.read

    def close(self) -> None:
        pass


class _Zstandard(io.RawIOBase):
    """Zstandard frames through Arrow, which every installation has. Seeking back starts over."""

    def __init__(self, file: Any):
        super().__init__()
        self._file = file
        self._start()

    def _start(self) -> None:
        self._file.seek(0)
        self._stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(_Borrowed(self._file), mode="r"), "zstd")
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        if whence != io.SEEK_SET:
            raise io.UnsupportedOperation("only from the start")
        if offset < self._at:
            self._start()
        while self._at < offset and (data := self._stream.read(min(offset - self._at, 1 << 20))):
            self._at += len(data)
        return self._at


_DECOMPRESSORS: dict[str, Callable[[Any], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file, mode="rb"),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": lambda file: io.BufferedReader(_Zstandard(file), 1 << 18),
}


@contextmanager
def open_bytes(path: str) -> Iterator[ByteFile]:
    """The file's bytes, decompressed by its ending. Read under `reading`."""
    files, name = file_system(path)
    with reading(path):
        opened = files.open(name, "rb")
    with opened as file:
        decompress = _DECOMPRESSORS.get(PurePosixPath(name).suffix.lower())
        if decompress is None:
            buffered = file if isinstance(files, LocalFileSystem) else io.BufferedReader(file, 1 << 20)
            yield cast(ByteFile, buffered)  # lines of fsspec's own files are slow
        else:
            with decompress(file) as stream:
                yield stream


@contextmanager
def local_copy(path: str) -> Iterator[str]:
    """The path itself where it is local, else a temporary copy: for what is read twice, or by libraries of their own.

    Raises UserError, also where the temporary directory (`TMPDIR`) has no room.
    """
    if local_path(path) is not None:
        yield _expand_home(path)
        return
    files, name = file_system(path)
    with tempfile.TemporaryDirectory(prefix=_SCRATCH) as scratch:
        copy = Path(scratch, PurePosixPath(name).name)
        with reading(path):
            remote = files.open(name, "rb")
        with remote, open(copy, "wb") as local:
            while True:
                with reading(path):
                    data = remote.read(1 << 22)
                if not data:
                    break
                try:
                    local.write(data)
                except OSError as error:
                    free = shutil.disk_usage(scratch).free
                    raise UserError(
                        f"{path}: cannot be copied to {scratch}, which has {free:,} bytes free: {error}; "
                        "fix: let TMPDIR name a directory with more room, or copy the file and name the copy"
                    ) from error
        yield str(copy)
