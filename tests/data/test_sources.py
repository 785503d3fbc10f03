"""Data files to token caches: when a file is tokenized anew, what becomes of bad rows, and who builds first."""

import gzip
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from fsspec.implementations.memory import MemoryFileSystem
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from posttrain.config import DataConfig, SourceConfig
from posttrain.data import fileversion, progress, sources
from posttrain.data.cache import TokenCache
from posttrain.data.chat import Sample
from posttrain.data.sources import tokenize_sources
from posttrain.data.tokenizer import Tokenizer
from posttrain.errors import UserError, UserErrors


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    """One token a byte, and ChatML's marks."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    directory = tmp_path_factory.mktemp("tokenizer")
    backend.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.load(str(directory), chat_template="chatml")


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """How many rows each call of `encode_rows` got."""
    calls: list[int] = []
    encode_rows = sources.encode_rows

    def counting(rows, tokenizer, loss_on):
        calls.append(len(rows))
        return encode_rows(rows, tokenizer, loss_on)

    monkeypatch.setitem(sources.ENCODERS, "single", counting)
    return calls


def chat(answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": answer}]}


def write(path: Path, rows: list[Any]) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def tokenize(
    tmp_path: Path, tokenizer: Tokenizer, *paths: str, format: str = "auto", **options: Any
) -> list[TokenCache]:
    who = {name: options.pop(name) for name in ("is_main", "barrier", "part_bytes", "rejects_dir") if name in options}
    data = DataConfig(**{"cache_dir": str(tmp_path / "cache"), **options})
    named = {f"data.train.{i}": SourceConfig(path=path, format=format) for i, path in enumerate(paths)}  # pyright: ignore
    caches = tokenize_sources(named, tokenizer, data, **{"rejects_dir": tmp_path / "run", **who})
    assert list(caches) == list(named)
    return [cache for of_source in caches.values() for cache in of_source]


def texts(cache: TokenCache, tokenizer: Tokenizer) -> list[str]:
    return [
        tokenizer.decode(cache.tokens[a:b].tolist()) for a, b in zip(cache.offsets[:-1], cache.offsets[1:], strict=True)
    ]


def test_rows_become_samples_with_their_lines(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [chat("one"), "", chat("two"), {"text": "three"}])
    (cache,) = tokenize(tmp_path, tokenizer, path)
    turns = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"
    assert texts(cache, tokenizer)[:2] == [turns.format("one"), turns.format("two")]
    assert texts(cache, tokenizer)[2].startswith("three")
    assert cache.lines.tolist() == [1, 3, 4]
    assert cache.trained[:2].tolist() == [4, 4]  # three bytes and the stop token
    assert cache.path == path


def test_parquet_and_json_lists_are_read_too(tmp_path, tokenizer):
    rows = [chat("one"), chat("two")]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    caches = tokenize(tmp_path, tokenizer, str(tmp_path / "a.parquet"), str(tmp_path / "a.json"))
    assert texts(caches[0], tokenizer) == texts(caches[1], tokenizer)
    assert caches[0].lines.tolist() == [1, 2]


def test_a_file_is_tokenized_once(tmp_path, tokenizer, encoded):
    path = write(tmp_path / "a.jsonl", [chat("one")])
    first = tokenize(tmp_path, tokenizer, path)
    second = tokenize(tmp_path, tokenizer, path, max_length=16, truncation="drop", epochs=3)
    assert encoded == [1]
    assert texts(first[0], tokenizer) == texts(second[0], tokenizer)
    os.utime(path, (0, 0))
    moved = str(Path(path).rename(tmp_path / "b.jsonl"))
    assert tokenize(tmp_path, tokenizer, moved)[0].path == moved
    assert encoded == [1]


def test_the_kind_of_file_is_part_of_the_key(tmp_path, tokenizer):
    """The same bytes under another ending are read in another way, or not at all."""
    tokenize(tmp_path, tokenizer, write(tmp_path / "a.jsonl", [chat("a")]))
    with pytest.raises(UserError, match=r"a\.csv: unknown kind of file"):
        tokenize(tmp_path, tokenizer, write(tmp_path / "a.csv", [chat("a")]))


def test_whatever_changes_the_tokens_tokenizes_anew(tmp_path, tokenizer, encoded, monkeypatch):
    path = write(tmp_path / "a.jsonl", [chat("one")])
    (before,) = tokenize(tmp_path, tokenizer, path)
    stat = os.stat(path)
    write(tmp_path / "a.jsonl", [chat("two")])  # the same size ...
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # ... and time
    (after,) = tokenize(tmp_path, tokenizer, path)
    assert "one" in texts(before, tokenizer)[0]
    assert "two" in texts(after, tokenizer)[0]
    (on_all,) = tokenize(tmp_path, tokenizer, path, loss_on="all")
    assert on_all.trained[0] > after.trained[0]
    tokenize(tmp_path, tokenizer, path, format="messages")
    other = Tokenizer.load(tokenizer.source, chat_template="chatml", eos_token="<|im_start|>")
    tokenize(tmp_path, other, path)
    monkeypatch.setattr(sources, "_code_fingerprint", lambda: "another version")
    tokenize(tmp_path, tokenizer, path)
    assert encoded == [1] * 6


def test_the_code_that_encodes_is_part_of_the_key(tmp_path, monkeypatch):
    package = tmp_path / "data"
    package.mkdir()
    monkeypatch.setattr(sources, "__file__", str(package / "sources.py"))
    uses = "from posttrain.data.{} import x\n"

    def fingerprint(**files: str) -> str:
        for name, content in files.items():
            (package / f"{name}.py").write_text(content)
        sources._code_fingerprint.cache_clear()
        return sources._code_fingerprint()

    first = fingerprint(
        sources=uses.format("chat"), chat="def f():\n    " + uses.format("turns"), turns="", packing="a"
    )
    assert fingerprint(packing=uses.format("sources")) == first  # what only reads caches
    assert fingerprint(turns="a") not in (first, fingerprint(turns="b"))
    assert fingerprint(turns="", sources=uses.format("chat") + "b") != first
    assert fingerprint(sources=uses.format("chat")) == first
    sources._code_fingerprint.cache_clear()


def test_the_code_that_encodes_is_found():
    """From sources.py by its imports; what reads caches is not among it."""
    found, new = set(), {"sources"}
    while new:
        found |= new
        new = {m for name in new for m in sources._imported(Path(sources.__file__).with_name(f"{name}.py"))} - found
    assert {"chat", "formats", "files", "tokenizer", "rows", "blocks", "cache"} <= found
    assert not {"pipeline", "samples", "packing", "inspect"} & found


def put(url: str, answer: str) -> str:
    """Puts one conversation into a remote store."""
    fsspec.filesystem("memory").pipe_file(url.removeprefix("memory:/"), json.dumps(chat(answer)).encode())
    return url


def test_a_remote_file_is_known_by_what_its_store_says(tmp_path, tokenizer, encoded, monkeypatch):
    url = put("memory://bucket/a.jsonl", "one")
    tokenize(tmp_path, tokenizer, url)
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "open", None)  # its bytes are not read again
        (cache,) = tokenize(tmp_path, tokenizer, url)
    assert "one" in texts(cache, tokenizer)[0]
    put(url, "two")
    (cache,) = tokenize(tmp_path, tokenizer, url)
    assert "two" in texts(cache, tokenizer)[0]
    assert cache.path == url
    assert encoded == [1, 1]


def test_a_remote_file_of_which_the_store_says_little_is_known_by_its_bytes(tmp_path, tokenizer, encoded, monkeypatch):
    monkeypatch.setattr(fileversion, "_REMOTE_VERSION_FACTS", ("etag",))
    for answer in ("one", "one", "two"):
        (cache,) = tokenize(tmp_path, tokenizer, put("memory://bucket/b.jsonl", answer))
        assert answer in texts(cache, tokenizer)[0]
    assert encoded == [1, 1]


@pytest.mark.parametrize("remote", [False, True])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, tokenizer, monkeypatch, remote):
    url = "memory://bucket/changing.jsonl"
    path = put(url, "one") if remote else write(tmp_path / "changing.jsonl", [chat("one")])
    encode_rows = sources.encode_rows

    def changing(rows, tokenizer, loss_on):
        put(url, "more") if remote else write(Path(path), [chat("one"), chat("more")])
        return encode_rows(rows, tokenizer, loss_on)

    monkeypatch.setitem(sources.ENCODERS, "single", changing)
    with pytest.raises(UserError, match=r"changing\.jsonl: changed while it was read; start again"):
        tokenize(tmp_path, tokenizer, path)
    monkeypatch.undo()
    (cache,) = tokenize(tmp_path, tokenizer, path)
    assert cache.num_samples == (1 if remote else 2)


# ---- several files, parts, counts -----------------------------------------------------------------------------------


def test_a_pattern_gives_a_cache_for_each_of_its_files_in_order(tmp_path, tokenizer):
    for name in ("c", "a", "b"):
        write(tmp_path / f"{name}.jsonl", [chat(name)])
    write(tmp_path / "other.jsonl", [chat("other")])
    source = {
        "data.train.0": SourceConfig(path=str(tmp_path / "[abc].jsonl")),
        "data.heldout": SourceConfig(path=str(tmp_path / "other.jsonl")),
    }
    caches = tokenize_sources(source, tokenizer, DataConfig(cache_dir=str(tmp_path / "cache")))
    assert [cache.path for cache in caches["data.train.0"]] == [str(tmp_path / f"{name}.jsonl") for name in "abc"]
    for cache, name in zip(caches["data.train.0"], "abc", strict=True):
        assert texts(cache, tokenizer)[0].endswith(f"assistant\n{name}<|im_end|>\n")
    assert [cache.path for cache in caches["data.heldout"]] == [str(tmp_path / "other.jsonl")]


def messy(number: int) -> Any:
    if number % 11 == 5:
        return NO_TURNS
    if number % 17 == 3:
        return BROKEN
    return "" if number % 13 == 7 else chat("x" * (1 + number % 7))


FORMS = ["jsonl", "jsonl.gz", "json", "parquet", "array_record"]


def write_form(path: Path, rows: list[Any]) -> str:
    if path.name.endswith("jsonl"):
        return write(path, rows)
    values = [row for row in rows if isinstance(row, dict)]
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(Path(write(path.with_suffix(""), rows)).read_bytes()))
    elif path.suffix == ".json":
        path.write_text(json.dumps(values, indent=1))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), path, row_group_size=7)
    else:
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for value in values:
            writer.write(json.dumps(value).encode())
        writer.close()
    return str(path)


@pytest.mark.parametrize("form", FORMS)
def test_the_division_into_parts_changes_no_byte(tmp_path, tokenizer, form):
    path = write_form(tmp_path / f"a.{form}", [messy(number) for number in range(150)])
    contents, checksums = [], []
    for directory, part_bytes in (("whole", 1 << 20), ("parts", 700), ("many", 60)):
        options = {"cache_dir": str(tmp_path / directory), "on_bad_row": "skip", "part_bytes": part_bytes}
        (cache,) = tokenize(tmp_path, tokenizer, path, **options)
        contents.append({file.name: file.read_bytes() for file in cache.directory.iterdir()})
        checksums.append(cache.checksum)
    assert cache.bad_rows > 5 and cache.num_samples > 90
    assert contents[0] == contents[1] == contents[2]
    assert len(set(checksums)) == 1


def test_remote_files_fall_into_parts_too(tmp_path, tokenizer):
    rows = [messy(number) for number in range(150)]
    for form in FORMS:
        local = write_form(tmp_path / f"a.{form}", rows)
        url = f"memory://parts/a.{form}"
        fsspec.filesystem("memory").pipe_file(f"/parts/a.{form}", Path(local).read_bytes())
        one, other = (
            tokenize(tmp_path, tokenizer, path, on_bad_row="skip", part_bytes=700)[0] for path in (local, url)
        )
        assert one.directory != other.directory
        for name in ("tokens", "loss_weights", "lines", "offsets"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_lines_of_samples_and_rejects_are_the_files(tmp_path, tokenizer):
    rows = [messy(number) for number in range(150)]
    path = write(tmp_path / "a.jsonl", rows)
    (cache,) = tokenize(tmp_path, tokenizer, path, on_bad_row="skip", part_bytes=300)
    good = [line for line, row in enumerate(rows, 1) if isinstance(row, dict) and row != NO_TURNS]
    bad = [line for line, row in enumerate(rows, 1) if row in (NO_TURNS, BROKEN)]
    assert cache.lines.tolist() == good
    assert [reject["line"] for reject in cache.rejects()] == bad
    assert (cache.rows, cache.bad_rows, cache.left_out) == (len(good) + len(bad), len(bad), 0)
    rejects = [json.loads(line) for line in (tmp_path / "run" / "rejects.jsonl").read_text().splitlines()]
    assert [(reject["line"], reject["row"]) for reject in rejects] == [
        (line, NO_TURNS if rows[line - 1] == NO_TURNS else None) for line in bad
    ]


def test_hashes_are_those_of_tokens_weights_and_prompts(tmp_path, tokenizer):
    again = {"messages": [*chat("a")["messages"], *chat("b")["messages"]]}
    path = write(tmp_path / "a.jsonl", [chat("a"), chat("b"), chat("a"), again, {"text": ""}, {"text": "a"}])
    (cache,) = tokenize(tmp_path, tokenizer, path, on_bad_row="skip")
    for number in range(cache.num_samples):
        place = slice(int(cache.offsets[number]), int(cache.offsets[number + 1]))
        tokens, weights = cache.tokens[place].astype("<i4"), cache.loss_weights[place].astype("<f4")
        digest = hashlib.blake2b(tokens.tobytes() + weights.tobytes()).digest()
        assert cache.hashes[number] == int.from_bytes(digest[:8], "little")
        first = next(i for i, weight in enumerate(weights) if i and weight)
        digest = hashlib.blake2b(tokens[:first].tobytes()).digest()
        assert cache.prompt_hashes[number] == int.from_bytes(digest[:8], "little")
    assert cache.hashes[0] == cache.hashes[2] != cache.hashes[1]
    assert cache.prompt_hashes[0] == cache.prompt_hashes[1] == cache.prompt_hashes[3]


def test_samples_without_a_trained_token_have_no_prompt_hash_and_notes_are_counted(tmp_path, tokenizer, monkeypatch):
    """What the encoder says of a row is kept: several samples, none that is trained on, notes."""
    rows = [chat("a"), chat("b"), chat("c")]

    def fake(rows, tokenizer, loss_on):
        def sample(row, weight: float, *notes: str) -> Sample:
            weights = np.array([0, weight, 0], np.float32)
            return Sample(np.arange(3, dtype=np.int32), weights, row.file, row.line, notes)

        first, second, third = rows
        return [
            (sample(first, 0),),
            (sample(second, 1, "split", "odd"), sample(second, 0.5)),
            (sample(third, 1, "odd"),),
        ]

    monkeypatch.setitem(sources.ENCODERS, "single", fake)
    (cache,) = tokenize(tmp_path, tokenizer, write(tmp_path / "a.jsonl", rows))
    assert cache.lines.tolist() == [1, 2, 2, 3]
    assert cache.trained.tolist() == [0, 1, 1, 1]
    assert cache.prompt_hashes[0] == 0 and len(set(cache.prompt_hashes[1:].tolist())) == 1
    assert cache.notes == {"odd": 2, "split": 1}
    assert (cache.rows, cache.num_samples) == (3, 4)


def test_rows_that_the_source_leaves_out_are_counted(tmp_path, tokenizer):
    rows = [{"prompt": "p", "completion": "c", "label": label} for label in (True, False, True, False, False)]
    source = {"data.train.0": SourceConfig(path=write(tmp_path / "a.jsonl", rows), preference="chosen")}
    caches = tokenize_sources(source, tokenizer, DataConfig(cache_dir=str(tmp_path / "cache")))
    (cache,) = caches["data.train.0"]
    assert (cache.rows, cache.left_out, cache.num_samples, cache.bad_rows) == (5, 3, 2, 0)


def test_a_big_file_of_no_known_form_is_refused_at_once(tmp_path, tokenizer, encoded):
    path = write(tmp_path / "a.jsonl", [{"unknown": 1}] * 2000)
    with pytest.raises(UserError, match="no row of a known form in 1000 rows"):
        tokenize(tmp_path, tokenizer, path, part_bytes=1000)
    assert encoded == []


# ---- bad rows -------------------------------------------------------------------------------------------------------

NO_TURNS = {"messages": []}
BROKEN = '{"messages": '


def test_all_bad_rows_of_all_files_are_reported_at_once(tmp_path, tokenizer):
    one = write(tmp_path / "one.jsonl", [chat("a"), NO_TURNS, BROKEN])
    two = write(tmp_path / "two.jsonl", [chat("b"), {"unknown": 1}])
    with pytest.raises(UserErrors) as caught:
        tokenize(tmp_path, tokenizer, one, two)
    problems = caught.value.problems
    assert len(problems) == 4
    assert problems[0].startswith(f"{one}:2: messages: ")
    assert problems[1].startswith(f"{one}:3: ") and "JSON" in problems[1]
    assert problems[2].startswith(f"{two}:2: ")
    assert "known: " in problems[2]
    assert problems[3].startswith("3 of 5 rows are bad and data.on_bad_row is error")


def test_many_bad_rows_are_counted_and_some_shown(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [chat("a"), *[NO_TURNS] * 700])
    with pytest.raises(UserErrors) as caught:
        tokenize(tmp_path, tokenizer, path)
    assert len(caught.value.problems) == 22
    assert caught.value.problems[20] == "... and 680 more bad rows"
    assert "700 of 701 rows are bad" in caught.value.problems[21]


def test_skipped_rows_are_written_to_rejects(tmp_path, tokenizer, encoded, monkeypatch):
    no_answer = {"messages": [{"role": "user", "content": "hi"}]}
    path = write(tmp_path / "a.jsonl", [chat("a"), BROKEN, NO_TURNS, no_answer, chat("b")])
    with pytest.raises(UserErrors):
        tokenize(tmp_path, tokenizer, path)
    (cache,) = tokenize(tmp_path, tokenizer, path, on_bad_row="skip")
    assert encoded == [3]  # the first try has left the cache
    assert cache.lines.tolist() == [1, 5]
    rejects = [json.loads(line) for line in (tmp_path / "run" / "rejects.jsonl").read_text().splitlines()]
    assert [reject["line"] for reject in rejects] == [2, 3, 4]
    assert [reject["row"] for reject in rejects] == [None, NO_TURNS, no_answer]
    assert {reject["file"] for reject in rejects} == {path}
    assert all(reject["reason"] for reject in rejects)
    assert rejects[1]["key"] == "messages"

    def never(path: str) -> None:
        raise AssertionError("the data file was read again")

    monkeypatch.setattr(sources, "read_records", never)  # a resumed run finds its rejects written
    tokenize(tmp_path, tokenizer, path, on_bad_row="skip")


def test_too_many_bad_rows_are_an_error_even_when_they_are_skipped(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [chat("a"), NO_TURNS, NO_TURNS])
    tokenize(tmp_path, tokenizer, path, on_bad_row="skip", max_bad_rows=2)
    with pytest.raises(UserErrors, match=r"2 rows are bad, more than data\.max_bad_rows=1"):
        tokenize(tmp_path, tokenizer, path, on_bad_row="skip", max_bad_rows=1)


def test_rows_that_share_a_line_are_not_confused(tmp_path, tokenizer):
    (tmp_path / "a.json").write_text(json.dumps([chat("a"), NO_TURNS]))
    tokenize(tmp_path, tokenizer, str(tmp_path / "a.json"), on_bad_row="skip")
    (reject,) = map(json.loads, (tmp_path / "run" / "rejects.jsonl").read_text().splitlines())
    assert reject["row"] is None


# ---- unusable files, several processes ------------------------------------------------------------------------------


def test_all_unusable_files_are_named(tmp_path, tokenizer):
    good = write(tmp_path / "a.jsonl", [chat("a")])
    with pytest.raises(UserErrors) as caught:
        tokenize(tmp_path, tokenizer, "", str(tmp_path / "b.jsonl"), good, str(tmp_path), "nonsense://a.jsonl")
    problems = caught.value.problems
    assert len(problems) == 4
    assert problems[0].startswith("data.train.0.path: is not set")
    assert problems[1].startswith(f"data.train.1.path: {tmp_path}/b.jsonl: there is no such file")
    assert problems[2].startswith(
        f"data.train.3.path: {tmp_path}: a directory; fix: name its files, e.g. {tmp_path}/*.jsonl"
    )
    assert problems[3].startswith("data.train.4.path: nonsense://a.jsonl: cannot be opened: Protocol not known")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not at all PAR1")
    with pytest.raises(UserError, match=r"a\.parquet: not a readable Parquet file"):
        tokenize(tmp_path, tokenizer, str(tmp_path / "a.parquet"))


def test_what_is_wrong_with_all_files_alike_is_said_once(tmp_path, tokenizer):
    bare = Tokenizer(Tokenizer.load(tokenizer.source)._hf, source="bare")
    paths = [write(tmp_path / f"{name}.jsonl", [chat(name)]) for name in "ab"]
    with pytest.raises(UserError, match="no chat template") as caught:
        tokenize(tmp_path, bare, *paths)
    assert not isinstance(caught.value, UserErrors)


def test_every_process_may_build_and_comes_to_the_barrier_with_its_caches(tmp_path, tokenizer, encoded):
    path = write(tmp_path / "a.jsonl", [chat("a"), NO_TURNS])
    encoded_at_barrier: list[list[int]] = []

    def barrier(name: str) -> None:
        encoded_at_barrier.append(list(encoded))

    options = {"on_bad_row": "skip", "barrier": barrier}
    (cache,) = tokenize(tmp_path, tokenizer, path, is_main=False, **options)
    assert not (tmp_path / "run" / "rejects.jsonl").exists()  # the main process writes it
    (again,) = tokenize(tmp_path, tokenizer, path, is_main=True, **options)
    assert (tmp_path / "run" / "rejects.jsonl").exists()
    assert encoded_at_barrier == [[1], [1]]
    own_disk = str(tmp_path / "another")
    (other,) = tokenize(tmp_path, tokenizer, path, is_main=False, cache_dir=own_disk, **options)
    assert encoded_at_barrier[2:] == [[1, 1]]
    assert cache.checksum == again.checksum == other.checksum


def test_a_process_that_fails_keeps_nobody_waiting(tmp_path, tokenizer):
    """It does not come to the barrier: who waits there hears that it has ended, and bad rows are everybody's."""
    came: list[str] = []
    with pytest.raises(UserError, match="there is no such file"):
        tokenize(tmp_path, tokenizer, str(tmp_path / "none.jsonl"), barrier=came.append)
    assert came == []
    path = write(tmp_path / "a.jsonl", [chat("a"), NO_TURNS])
    for is_main in (True, False):
        with pytest.raises(UserErrors, match="1 of 2 rows are bad"):
            tokenize(tmp_path, tokenizer, path, barrier=came.append, is_main=is_main)
    assert came == ["token caches"] * 2


def test_a_run_that_trains_nothing_writes_no_rejects(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [chat("a"), NO_TURNS])
    tokenize(tmp_path, tokenizer, path, on_bad_row="skip", rejects_dir=None)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_progress_is_shown_by_the_main_process_when_it_takes_long(
    tmp_path, tokenizer, monkeypatch, caplog, capsys, name
):
    monkeypatch.setattr(progress.TokenizingReport, "QUIET_SECONDS", 0.0)
    monkeypatch.setenv("FORCE_COLOR", "1")
    rows = [chat("a")] * 300
    path = tmp_path / name
    path.write_text(json.dumps(rows) if name == "a.json" else "\n".join(map(json.dumps, rows)))
    caplog.set_level("INFO")
    tokenize(tmp_path, tokenizer, str(path), cache_dir=str(tmp_path / "1"), is_main=False)
    assert capsys.readouterr().err == ""
    assert caplog.text == ""
    (cache,) = tokenize(tmp_path, tokenizer, str(path), cache_dir=str(tmp_path / "2"), is_main=True)
    assert f"tokenizing {name}" in capsys.readouterr().err.replace("\n", "")
    assert f"tokenized {path}: 300 samples, {len(cache.tokens):,} tokens" in caplog.text
    second = write(tmp_path / "second.jsonl", [chat("b")])
    tokenize(tmp_path, tokenizer, str(path), second, cache_dir=str(tmp_path / "3"))
    assert "tokenizing 2 files" in capsys.readouterr().err.replace("\n", "")
    assert "tokenized 2 files: 301 samples" in caplog.text


def test_the_loss_weights_are_those_of_the_encoder(tmp_path, tokenizer):
    """Across batches of rows: each sample keeps its own."""
    rows = [chat("x" * (1 + number % 7)) for number in range(600)]
    (cache,) = tokenize(tmp_path, tokenizer, write(tmp_path / "a.jsonl", rows))
    assert cache.num_samples == 600
    for number in range(600):
        place = slice(int(cache.offsets[number]), int(cache.offsets[number + 1]))
        trained = cache.tokens[place][cache.loss_weights[place] > 0]
        assert tokenizer.decode(trained.tolist()) == "x" * (1 + number % 7) + "<|im_end|>"
    np.testing.assert_array_equal(cache.trained, [2 + number % 7 for number in range(600)])
