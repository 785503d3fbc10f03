"""Which files a path or pattern names, on local disks and in stores, and what is said when it cannot be had."""

import errno
import gzip
import os
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled

from posttrain.data import storage
from posttrain.data.files import SUFFIXES, Record, read_records
from posttrain.data.storage import find_files, local_copy, local_path, open_bytes, reading
from posttrain.errors import UserError


def find(path: Path | str) -> list[str]:
    return find_files(str(path), SUFFIXES)


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    names = ["b.jsonl", "a.jsonl", "c.json", "deep/d.jsonl", "deep/er/e.jsonl", ".hidden.jsonl", ".git/f.jsonl"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    (tmp_path / "folder.jsonl").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.jsonl", ["a.jsonl"]),
        ("*.jsonl", ["a.jsonl", "b.jsonl"]),
        ("?.js*", ["a.jsonl", "b.jsonl", "c.json"]),
        ("[bc].*", ["b.jsonl", "c.json"]),
        ("*/*.jsonl", ["deep/d.jsonl"]),
        ("**/*.jsonl", ["a.jsonl", "b.jsonl", "deep/d.jsonl", "deep/er/e.jsonl"]),
        (".h*", [".hidden.jsonl"]),
    ],
)
def test_local_patterns(chats: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, names: list[str]) -> None:
    assert find(chats / pattern) == [str(chats / name) for name in names]
    monkeypatch.chdir(chats)
    assert find(pattern) == names
    monkeypatch.setenv("HOME", str(chats))
    assert find(f"~/{pattern}") == [str(chats / name) for name in names]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path: Path) -> None:
    for name in ("data[1].jsonl", "data1.jsonl"):
        (tmp_path / name).write_text("{}")
    assert find(tmp_path / "data[1].jsonl") == [str(tmp_path / "data[1].jsonl")]
    (tmp_path / "data[1].jsonl").unlink()
    assert find(tmp_path / "data[1].jsonl") == [str(tmp_path / "data1.jsonl")]


def test_the_home_directory_is_read_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}')
    monkeypatch.setenv("HOME", str(tmp_path))
    (record,) = read_records("~/a.jsonl")
    assert isinstance(record, Record) and record.value == {"a": 1}
    assert local_path("~/a.jsonl") == tmp_path / "a.jsonl"


def test_patterns_in_stores() -> None:
    store = fsspec.filesystem("memory")
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl.gz"):
        store.pipe_file(f"/patterns/{name}", gzip.compress(b'{"a": 1}') if name.endswith("gz") else b'{"a": 1}')
    assert find("memory://patterns/*.jsonl") == ["memory://patterns/a.jsonl", "memory://patterns/b.jsonl"]
    found = find("memory://patterns/**/*.jsonl*")
    assert found == [f"memory://patterns/{name}" for name in ("a.jsonl", "b.jsonl", "deep/c.jsonl.gz")]
    for path in found:
        (record,) = read_records(path)
        assert isinstance(record, Record) and record.value == {"a": 1} and record.file == path
        assert local_path(path) is None


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none.jsonl", "none.jsonl: there is no such file; check the path"),
        ("*.parquet", r"\*.parquet: the pattern names no file; check it"),
        ("", "a directory; fix: name its files, e.g. .*/\\*.jsonl$"),
        ("deep/", r"a directory; fix: name its files, e.g. .*/deep/\*.jsonl$"),
        (".git/..", r"a directory; fix: name its files, e.g. .*/\.\./\*.jsonl$"),
        ("folder.jsonl", r"a directory; fix: name its files, e.g. .*/folder.jsonl/\*\*/\*.jsonl$"),
    ],
)
def test_local_paths_that_name_nothing(chats: Path, path: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find(f"{chats}/{path}")


def test_a_directory_of_a_store_names_a_pattern_too() -> None:
    fsspec.filesystem("memory").pipe_file("/tables/part-0.parquet", b"")
    with pytest.raises(
        UserError, match=r"memory://tables: a directory; fix: name its files, e.g. memory://tables/\*.par"
    ):
        find("memory://tables")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gs://bucket/a.jsonl", "cannot be opened: .*gcsfs"),
        ("s3://bucket/*.jsonl", "cannot be opened: .*s3fs"),
        ("nonsense://a.jsonl", "cannot be opened: Protocol not known: nonsense"),
        ("simplecache::memory://a/*.jsonl", "a pattern in a chained URL is not served; fix: name the files"),
    ],
)
def test_stores_that_cannot_be_used_say_why(path: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        find(path)
    assert str(caught.value).startswith(path)


@pytest.mark.parametrize("name", ["a.jsonl", "**/*.parquet"])
def test_the_hub_without_a_network(name: str) -> None:
    with pytest.raises(UserError, match=r"cannot be read: .*offline mode is enabled.*HF_HUB_OFFLINE"):
        find(f"hf://datasets/organisation/name/{name}")


class Hub(MemoryFileSystem):
    """A store that fails as the hub does."""

    protocol = "fakehub"
    store: dict[str, Any] = {}  # noqa: RUF012 (as fsspec has it)
    pseudo_dirs = [""]  # noqa: RUF012
    failure: Exception | None = None

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("fakehub://", "memory://"))

    def info(self, path: str, **options: Any) -> Any:
        if self.failure:
            raise self.failure
        return super().info(path, **options)

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if self.failure:
            raise self.failure
        return super().open(path, mode, **options)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    fsspec.register_implementation("fakehub", Hub, clobber=True)
    monkeypatch.setattr(Hub, "failure", None)
    return Hub


class Response:
    headers: dict[str, str] = {}  # noqa: RUF012
    request = None


class WebFailure(Exception):
    """As aiohttp's and botocore's: no OSError."""


FAILURES = [
    (FileNotFoundError("organisation/name (repository not found)"), r"no such file; check the path \(.*repository not"),
    (OfflineModeIsEnabled("offline mode is enabled"), "cannot be read: offline mode is enabled"),
    (GatedRepoError("Access to it is restricted", response=Response()), "cannot be read: Access to it is restricted"),  # pyright: ignore[reportArgumentType]
    (PermissionError("Forbidden"), "cannot be read: Forbidden"),
    (WebFailure("connection reset"), "cannot be read: connection reset"),
]


@pytest.mark.parametrize(("failure", "message"), FAILURES)
def test_failures_of_stores_are_errors_of_the_path(
    hub: type[Hub], monkeypatch: pytest.MonkeyPatch, failure: Exception, message: str
) -> None:
    monkeypatch.setattr(storage, "_REMOTE_FAILURES", ((__name__, "WebFailure"), ("not.loaded", "Anything")))
    hub().pipe_file("/datasets/o/n/a.jsonl", b'{"a": 1}')
    assert find("fakehub://datasets/o/n/*.jsonl") == ["fakehub://datasets/o/n/a.jsonl"]
    assert len(list(read_records("fakehub://datasets/o/n/a.jsonl"))) == 1
    monkeypatch.setattr(Hub, "failure", failure)
    with pytest.raises(UserError, match=f"^fakehub://datasets/o/n/a.jsonl: .*{message}"):
        find("fakehub://datasets/o/n/a.jsonl")
    with pytest.raises(UserError, match=r"^fakehub://datasets/o/n/a\.jsonl: "):
        list(read_records("fakehub://datasets/o/n/a.jsonl"))


def test_a_failure_in_the_middle_of_a_file_is_an_error_too(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    hub().pipe_file("/datasets/long.jsonl", b'{"a": "%s"}\n' % (b"x" * 1000) * 2000)
    records = read_records("fakehub://datasets/long.jsonl")
    next(records)
    opened = hub().store["/datasets/long.jsonl"]

    def lost(*args: object) -> bytes:
        raise ConnectionResetError("connection reset by peer")

    monkeypatch.setattr(type(opened), "readinto", lost, raising=False)
    with pytest.raises(UserError, match=r"fakehub://datasets/long\.jsonl: cannot be read: connection reset by peer"):
        list(records)


def test_what_a_reader_does_with_the_records_is_not_taken_for_the_files_fault(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n{}\n")
    with pytest.raises(OSError, match="No space left"):
        for _ in read_records(str(tmp_path / "a.jsonl")):
            raise OSError(errno.ENOSPC, "No space left on device")


# ---- copies ---------------------------------------------------------------------------------------------------------


def test_remote_files_are_copied_and_local_ones_are_not(tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe_file("/copies/a.bin", b"x" * 9_000_000)
    with local_copy("memory://copies/a.bin") as copy:
        assert Path(copy).read_bytes() == b"x" * 9_000_000
    assert not Path(copy).exists()
    (tmp_path / "b.bin").write_bytes(b"y")
    with local_copy(str(tmp_path / "b.bin")) as copy:
        assert copy == str(tmp_path / "b.bin")
    assert (tmp_path / "b.bin").exists()
    with pytest.raises(UserError, match="memory://copies/none: no such file"), local_copy("memory://copies/none"):
        pass


def test_a_copy_that_does_not_fit_names_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    monkeypatch.setattr(storage, "Path", lambda *_: Path("/dev/full"))
    fsspec.filesystem("memory").pipe_file("/copies/c.bin", b"x" * 9_000_000)
    message = r"memory://copies/c\.bin: cannot be copied to .*No space left.*fix: let TMPDIR"
    with pytest.raises(UserError, match=message), local_copy("memory://copies/c.bin"):
        pass


def test_bytes_are_decompressed_by_the_ending(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.GZ"
    path.write_bytes(gzip.compress(b"one\ntwo\n"))
    with open_bytes(str(path)) as file, reading(str(path)):
        assert list(file) == [b"one\n", b"two\n"]
        assert file.seek(4) == 4 and file.read() == b"two\n"
