"""Files to records: the exact line of each, whatever the file looks like, and every way in which one can be broken."""

import bz2
import gzip
import json
import pickle
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from posttrain.data.files import BadRow, Record, read_records
from posttrain.errors import UserError


def read(path: Path | str) -> list[tuple[int, object]]:
    """(line, value) of each record, (line, reason) of each bad one."""
    records = list(read_records(str(path)))
    assert all(record.file == str(path) for record in records)
    return [(r.line, r.value if isinstance(r, Record) else r.reason) for r in records]


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.ndjson", "rows.json", "ROWS.JSONL"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_json_lines(tmp_path: Path, name: str, bom: bytes, newline: bytes) -> None:
    path = write(tmp_path / name, bom + newline.join([b'{"a": 1}', b"", b"  ", b' {"a": 4}\t', b'{"a": 5}']))
    assert read(path) == [(1, {"a": 1}), (4, {"a": 4}), (5, {"a": 5})]


def test_line_separators_inside_strings_are_text(tmp_path: Path) -> None:
    text = "a\u2028b\u2029c\x85d"
    path = write(tmp_path / "rows.jsonl", json.dumps({"t": text}, ensure_ascii=False) + "\n" + '{"t": "e"}')
    assert read(path) == [(1, {"t": text}), (2, {"t": "e"})]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_json_list(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, '\ufeff\n [\n {"a": 1}, {"a":\n 2}\n,\n\n{"a": "x\\ny"}, 4\n]\n')
    assert read(path) == [(3, {"a": 1}), (3, {"a": 2}), (7, {"a": "x\ny"}), (7, 4)]


def test_empty_lists_and_files_have_no_records(tmp_path: Path) -> None:
    for content in ("", "\n \n", "[]", " [ ]\n"):
        assert read(write(tmp_path / "rows.json", content)) == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"a": 1', "not valid JSON: Expecting ',' delimiter at column 8"),
        ('{"a": 1}}', "not valid JSON: Extra data at column 9"),
        ("{'a': 1}", "not valid JSON: Expecting property name enclosed in double quotes at column 2"),
        ('{"a": "x', "not valid JSON: Unterminated string starting at at column 7"),
        ('{"a": 1, "b": {"c": 1, "d": 2, "c": 3}}', "the key 'c' appears twice in one object"),
        ('{"a": NaN}', "NaN is no JSON value"),
        ('{"a": [-Infinity]}', "-Infinity is no JSON value"),
        ('{"a": ' + "9" * 5000 + "}", "JSON that cannot be read: Exceeds the limit"),
        ("[" * 100_000, "JSON that cannot be read: maximum recursion depth"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 8 of the line"),
    ],
)
def test_a_broken_line_is_one_bad_row(tmp_path: Path, line: str | bytes, reason: str) -> None:
    line = line if isinstance(line, bytes) else line.encode()
    path = write(tmp_path / "rows.jsonl", b'{"a": 0}\n\n' + line + b'\n{"a": 4}\n')
    first, (number, found), last = read(path)
    assert first == (1, {"a": 0}) and last == (4, {"a": 4})
    assert number == 3 and isinstance(found, str) and found.startswith(reason)


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ('[{"a": 1},\n {"a": }]', 2, "Expecting value at column 8"),
        ('[{"a": 1},\n {"a": 2}', 2, "Expecting ',' or ']' at column 10"),
        ('[{"a": 1},\n {"a": 2},\n]', 3, "Expecting value at column 1"),
        ('[{"a": 1}\n {"a": 2}]', 2, "Expecting ',' or ']' at column 2"),
        ('[{"a": 1}]\n\n7', 3, "Extra data at column 1"),
    ],
)
def test_a_broken_list_is_read_up_to_the_break(tmp_path: Path, text: str, line: int, reason: str) -> None:
    *before, (number, found) = read(write(tmp_path / "rows.json", text))
    assert before[0] == (1, {"a": 1})
    assert (number, found) == (line, f"not valid JSON: {reason}; what follows cannot be read")


def test_a_list_goes_on_behind_an_element_that_is_json_but_not_strict(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.json", '[{"a": 1, "a": 2},\n{"b": {"c": NaN}},\n{"d": 1}]')
    (one, twice), (two, nan), last = read(path)
    assert (one, two, last) == (1, 2, (3, {"d": 1}))
    assert twice == "the key 'a' appears twice in one object; fix: keep one"
    assert str(nan).startswith("NaN is no JSON value")


def test_columns_leave_out_null(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", '{"a": null, "b": 0}\n[1]')
    assert [r.columns for r in read_records(str(path)) if isinstance(r, Record)] == [{"b": 0}, {}]


@pytest.mark.parametrize("rows", [3, 3000])
def test_parquet(tmp_path: Path, rows: int) -> None:
    values = [{"messages": [{"role": "user", "content": f"{i}", "name": None}], "id": i} for i in range(rows)]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), path)
    assert read(path) == [(i + 1, value) for i, value in enumerate(values)]


def test_compressed_json(tmp_path: Path) -> None:
    content = b'{"a": 1}\n\n{"a": 3}\n'
    assert read(write(tmp_path / "rows.jsonl.gz", gzip.compress(content))) == [(1, {"a": 1}), (3, {"a": 3})]
    assert read(write(tmp_path / "rows.json.bz2", bz2.compress(b'[{"a": 1}]'))) == [(1, {"a": 1})]


def test_paths_that_fsspec_opens() -> None:
    with fsspec.open("memory://bucket/rows.jsonl", "wb") as file:
        file.write(b'{"a": 1}')  # pyright: ignore[reportAttributeAccessIssue]
    assert read("memory://bucket/rows.jsonl") == [(1, {"a": 1})]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.csv", b"a,b", r"unknown kind of file; known endings: \.jsonl, \.ndjson, \.json, \.parquet"),
        ("rows", b"{}", "unknown kind of file"),
        ("rows.parquet.gz", b"", "unknown kind of file"),
        ("rows.parquet", b"PAR1 no", "not a readable Parquet file"),
        ("rows.jsonl.gz", b"no gzip", "cannot be read"),
        ("rows.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99)[:-9], "cannot be read"),
        ("rows.jsonl.xz", b"\xfd7zXZ\x00broken", "cannot be read"),
        ("rows.jsonl", '{"a": 1}'.encode("utf-16"), "the file is UTF-16; fix: save it as UTF-8"),
        ("rows.json", b'[{"a": 1},\n"\xff"]', "2: not UTF-8"),
        ("rows.json", b'{\n "a": 1\n}', "1: a JSON value over several lines; fix: a list of rows"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=message) as caught:
        list(read_records(str(path)))
    assert str(caught.value).startswith(str(path)) and not isinstance(caught.value, BadRow)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.jsonl", "no such file"),
        ("folder.jsonl", "a directory; fix: name the file in it"),
        ("magic://bucket/rows.jsonl", "cannot be opened: Protocol not known"),
    ],
)
def test_paths_that_lead_nowhere(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    full = path if "://" in path else str(tmp_path / path)
    with pytest.raises(UserError, match=message) as caught:
        list(read_records(full))
    assert str(caught.value).startswith(full)


def test_a_bad_row_says_where_and_can_be_sent_to_another_process() -> None:
    bad = BadRow("chats.jsonl", 17, "messages[2].content", "missing; fix: give the text")
    assert str(bad) == "chats.jsonl:17: messages[2].content: missing; fix: give the text"
    assert str(BadRow("chats.jsonl", 17, "", "no JSON")) == "chats.jsonl:17: no JSON"
    copy = pickle.loads(pickle.dumps(bad))
    assert (copy.file, copy.line, copy.key, copy.reason) == (bad.file, bad.line, bad.key, bad.reason)
