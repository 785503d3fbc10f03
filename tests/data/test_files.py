"""Files to records: the exact line of each, whatever the file looks like, and every way in which one can be broken."""

import bz2
import gzip
import json
import lzma
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from posttrain.data.files import BadRow, Record, open_records, read_records
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
        ('{"a": "x', "not valid JSON: Unterminated string starting at column 7"),
        ('{"a": 1, "b": {"c": 1, "d": 2, "c": 3}}', "the key 'c' appears twice in one object"),
        ('{"a": NaN}', "NaN is no JSON value"),
        ('{"a": [-Infinity]}', "-Infinity is no JSON value"),
        ('{"a": ' + "9" * 5000 + "}", "JSON that cannot be read: Exceeds the limit"),
        ("[" * 100_000, "JSON that cannot be read: maximum recursion depth"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 8 of the line"),
        (b"\0\0\0\0", "not valid JSON: Expecting value at column 1; fix: remove the NUL bytes"),
        (b'{"a": "\0"}', "not valid JSON: Invalid control character at column 8; fix: remove the NUL bytes"),
        (b'{"a": 1}\r{"a": 2}', "not valid JSON: Extra data at column 10; fix: end every row with a newline; carriage"),
        (b'\xef\xbb\xbf{"a": 1}', "not valid JSON: Expecting value at column 1; fix: remove the byte order mark"),
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


def zstd(content: bytes) -> bytes:
    return pyarrow.compress(content, "zstd", asbytes=True)


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


@pytest.mark.parametrize(("ending", "compress"), COMPRESS.items())
def test_compressed_json(tmp_path: Path, ending: str, compress: Any) -> None:
    content = b'{"a": 1}\n\n{"a": 3}\n'
    assert read(write(tmp_path / f"rows.jsonl{ending}", compress(content))) == [(1, {"a": 1}), (3, {"a": 3})]
    assert read(write(tmp_path / f"ROWS.JSON{ending.upper()}", compress(b'[{"a": 1}]'))) == [(1, {"a": 1})]
    joined = write(tmp_path / f"joined.jsonl{ending}", compress(content) + compress(b'{"a": 4}'))
    assert read(joined) == [(1, {"a": 1}), (3, {"a": 3}), (4, {"a": 4})]


def write_array_record(path: Path, records: list[bytes], group: int = 1) -> Path:
    writer = ArrayRecordWriter(str(path), f"group_size:{group}")
    for record in records:
        writer.write(record)
    writer.close()
    return path


@pytest.mark.parametrize("name", ["rows.array_record", "rows.arrayrecord"])
@pytest.mark.parametrize("group", [1, 7])
def test_array_records(tmp_path: Path, name: str, group: int) -> None:
    values = [{"text": f"{i} \u2028", "id": i} for i in range(600)]
    path = write_array_record(tmp_path / name, [json.dumps(value).encode() for value in values], group)
    assert read(path) == [(i + 1, value) for i, value in enumerate(values)]
    broken = write_array_record(tmp_path / name, [b'{"a": 1}', b"{", b'{"a": "\xff"}', b'{"a": 2}'])
    (_, first), (two, reason), (three, utf8), (four, last) = read(broken)
    assert (first, last, two, three, four) == ({"a": 1}, {"a": 2}, 2, 3, 4)
    assert str(reason).startswith("not valid JSON") and str(utf8).startswith("not UTF-8 at byte 8")


# ---- parts ----------------------------------------------------------------------------------------------------------


def in_parts(path: Path, size: int, order: random.Random | None = None) -> list[tuple[int, object]]:
    """As `read`, but part by part, in order or by chance, the lines counted up afterwards."""
    found: dict[int, tuple[list[Record | BadRow], int]] = {}
    with open_records(str(path), again=True) as file:
        parts = file.parts(size)
        with open_records(str(path), again=True) as other:
            assert other.parts(size) == parts
        assert [part.first_in_file for part in parts] == [True] + [False] * (len(parts) - 1)
        numbers = list(range(len(parts)))
        if order:
            order.shuffle(numbers)
        for number in numbers:
            found[number] = (list(file.read(parts[number])), file.lines_read)
    lines, joined = 0, []
    for number in range(len(parts)):
        records, lines_read = found[number]
        joined += [(r.line + lines, r.value if isinstance(r, Record) else r.reason) for r in records]
        lines += lines_read
    return joined


def messy_lines(draw: random.Random) -> bytes:
    pieces = [b"", b" ", b"{", b'{"n": NaN}', b"\r", b"\xff", b"\0\0", b"7"]
    lines = [draw.choice(pieces) if draw.random() < 0.3 else row(draw) for _ in range(draw.randrange(2, 60))]
    return b"".join(line + draw.choice([b"\n", b"\r\n", b"\n\n"]) for line in [b'{"first": 1}', *lines])


def row(draw: random.Random) -> bytes:
    text = "".join(draw.choice('a\u2028\x85\\"\u00e9\U0001f600 ') for _ in range(draw.choice([0, 3, 9, 200])))
    return json.dumps({"text": text}, ensure_ascii=False).encode()


@pytest.mark.parametrize("ending", ["", *COMPRESS])
@pytest.mark.parametrize("seed", range(6))
def test_the_parts_of_json_lines_are_its_lines(tmp_path: Path, ending: str, seed: int) -> None:
    draw = random.Random(seed)
    content = draw.choice([b"", b"\xef\xbb\xbf"]) + messy_lines(draw)
    content = content if draw.random() < 0.5 else content.rstrip()
    path = write(tmp_path / f"rows.jsonl{ending}", COMPRESS.get(ending, bytes)(content))
    expected = read(path)
    for size in (1, 2, 7, 50, 333, len(content), len(content) + 1):
        assert in_parts(path, size) == expected, size
        assert in_parts(path, size, draw) == expected, size


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("tail", ["]", "\n]\n", "", "]]", " 7]", ",]"])
def test_the_parts_of_a_json_list_are_its_elements(tmp_path: Path, seed: int, tail: str) -> None:
    draw = random.Random(seed)
    elements = [draw.choice(['{"a": 1, "a": 2}', "[NaN]", row(draw).decode()]) for _ in range(draw.randrange(1, 40))]
    text = draw.choice(["", "\ufeff", "\n "]) + "[\n" + draw.choice([",", ",\n", "\n ,"]).join(elements) + tail
    path = write(tmp_path / "rows.json", text)
    expected = read(path)
    for size in (1, 30, 333, len(text) + 1):
        assert in_parts(path, size, draw) == expected, size


def test_a_break_in_a_list_ends_its_last_part(tmp_path: Path) -> None:
    rows = ['{"a": 1}', '{"a": 2}', '{"a" 3}', '{"a": 4}']
    path = write(tmp_path / "rows.json", "[" + ",\n".join(rows) + "]")
    assert len(read(path)) == 3
    for size in (1, 5, 12, 20):
        assert in_parts(path, size) == read(path)


@pytest.mark.parametrize("group_rows", [10, 1000, 5000])
@pytest.mark.parametrize("size", [300, 5_000, 1 << 20])
def test_the_parts_of_parquet_are_its_rows(tmp_path: Path, group_rows: int, size: int) -> None:
    values = [{"text": str(i) * (i % 7), "turns": [{"n": i}] * (i % 3)} for i in range(3000)]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), path, row_group_size=group_rows)
    expected = [(i + 1, value) for i, value in enumerate(values)]
    assert in_parts(path, size) == expected
    if size > 300:
        assert in_parts(path, size, random.Random(0)) == expected


@pytest.mark.parametrize("size", [10, 1000, 1 << 20])
def test_the_parts_of_array_records_are_its_records(tmp_path: Path, size: int) -> None:
    path = write_array_record(tmp_path / "rows.array_record", [b'{"a": %d}' % i for i in range(700)])
    assert in_parts(path, size, random.Random(0)) == [(i + 1, {"a": i}) for i in range(700)]


def test_a_file_smaller_than_a_part_is_one_part(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"a": [1, 2]}), tmp_path / "rows.parquet")
    write(tmp_path / "rows.jsonl", '{"a": 1}\n{"a": 2}\n')
    write(tmp_path / "rows.json", '[{"a": 1}, {"a": 2}]')
    write(tmp_path / "rows.jsonl.gz", gzip.compress(b'{"a": 1}\n{"a": 2}\n', mtime=0))
    write_array_record(tmp_path / "rows.array_record", [b'{"a": 1}', b'{"a": 2}'])
    for path in tmp_path.iterdir():
        with open_records(str(path)) as file:
            assert len(file.parts(1 << 20)) == 1, path
            assert [r.value for r in file.read() if isinstance(r, Record)] == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.parquet", "rows.array_record"])
def test_files_without_rows_have_one_empty_part(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith("parquet"):
        pyarrow.parquet.write_table(pyarrow.table({"a": pyarrow.array([], pyarrow.int64())}), path)
    elif name.endswith("record"):
        write_array_record(path, [])
    else:
        write(path, gzip.compress(b"", mtime=0) if name.endswith("gz") else b"")
    assert in_parts(path, 10) == []


def test_reading_in_order_decompresses_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewinds = []
    rewind = gzip._GzipReader._rewind  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(gzip._GzipReader, "_rewind", lambda self: (rewinds.append(1), rewind(self)))  # pyright: ignore
    rows = [json.dumps({"text": random.Random(i).randbytes(40).hex()}) for i in range(20_000)]
    path = write(tmp_path / "rows.jsonl.gz", gzip.compress("\n".join(rows).encode(), 1))
    assert len(in_parts(path, 50_000)) == 20_000
    assert (
        len(rewinds) <= 5
    )  # looking at its head, counting its bytes, reading it; twice, for `in_parts` opens it twice


def test_paths_that_fsspec_opens() -> None:
    with fsspec.open("memory://bucket/rows.jsonl", "wb") as file:
        file.write(b'{"a": 1}')  # pyright: ignore[reportAttributeAccessIssue]
    assert read("memory://bucket/rows.jsonl") == [(1, {"a": 1})]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "rows.csv",
            b"a,b",
            r"unknown kind of file; known endings: \.jsonl, \.ndjson, \.json, \.parquet, \.array_record",
        ),
        ("rows", b"{}", "unknown kind of file"),
        ("rows.parquet.gz", b"", "unknown kind of file"),
        ("rows.parquet", b"PAR1 no", "not a readable Parquet file"),
        ("rows.jsonl.gz", b"no gzip", "cannot be read"),
        ("rows.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-9], "cannot be read"),
        ("rows.jsonl.xz", b"\xfd7zXZ\x00broken", "cannot be read"),
        ("rows.jsonl.bz2", bz2.compress(b'{"a": 1}\n' * 99)[:-9], "cannot be read"),
        ("rows.jsonl.zst", zstd(b'{"a": 1}\n' * 99)[:-9], "cannot be read"),
        ("rows.jsonl.zst", b"no zstandard", "cannot be read"),
        ("rows.array_record", b"no array record" * 99, "not a readable ArrayRecord file"),
        ("rows.array_record.gz", b"", "unknown kind of file"),
        ("rows.jsonl", '{"a": 1}'.encode("utf-16"), "the file is UTF-16; fix: save it as UTF-8"),
        ("rows.jsonl", '{"a": 1}'.encode("utf-16-le"), "the file is UTF-16; fix: save it as UTF-8"),
        ("rows.jsonl", '{"a": 1}'.encode("utf-16-be"), "the file is UTF-16; fix: save it as UTF-8"),
        ("rows.jsonl", gzip.compress(b"{}", mtime=0), "the file is compressed with gzip; fix: let its name end in .gz"),
        ("rows.jsonl", bz2.compress(b"{}"), "the file is compressed with bzip2"),
        ("rows.jsonl", lzma.compress(b"{}"), "the file is compressed with xz"),
        ("rows.jsonl", zstd(b"{}"), "the file is compressed with Zstandard"),
        ("rows.json", b"PAR1....PAR1", "the file is a Parquet file; fix: let its name end in .parquet"),
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


MEMORY = """
import resource, sys
import pyarrow.parquet
from posttrain.data.files import open_records
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
with open_records(sys.argv[1]) as file:
    next(iter(file.read()))
before, rows = peak(), 0
with open_records(sys.argv[2], again=True) as file:
    for part in file.parts(1 << 20):
        rows += sum(1 for _ in file.read(part))
print(rows, peak() - before)
"""


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet"])
def test_big_files_are_never_held_whole(tmp_path: Path, name: str) -> None:
    """60 MB of text, of Parquet in one row group."""

    def make(path: Path, rows: int) -> Path:
        draw = random.Random(0)
        values = [{"messages": [{"role": "user", "content": draw.randbytes(10_000).hex()}]} for _ in range(rows)]
        lines = "".join(json.dumps(value) + "\n" for value in values).encode()
        if name.endswith("parquet"):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), path, compression="none")
        else:
            path.write_bytes(gzip.compress(lines, 1) if name.endswith("gz") else lines)
        return path

    small, big = make(tmp_path / f"small.{name}", 1), make(tmp_path / f"big.{name}", 3000)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent.parent)}
    command = [sys.executable, "-c", MEMORY, str(small), str(big)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    rows, mebibytes = map(int, done.stdout.split())
    assert rows == 3000
    assert mebibytes < 30
