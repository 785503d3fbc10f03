"""Data files to token caches: when a file is tokenized anew, what becomes of bad rows, and who builds first."""

import json
import os
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from posttrain.config import DataConfig, SourceConfig
from posttrain.data import sources
from posttrain.data.cache import TokenCache
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

    monkeypatch.setattr(sources, "encode_rows", counting)
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
    who = {name: options.pop(name) for name in ("is_main", "barrier") if name in options}
    data = DataConfig(**{"cache_dir": str(tmp_path / "cache"), **options})
    named = {f"data.train.{i}": SourceConfig(path=path, format=format) for i, path in enumerate(paths)}  # pyright: ignore
    return tokenize_sources(named, tokenizer, data, rejects_dir=tmp_path / "run", **who)


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

    def fingerprint(**files: str) -> str:
        for name, content in files.items():
            (package / f"{name}.py").write_text(content)
        sources._code_fingerprint.cache_clear()
        return sources._code_fingerprint()

    first = fingerprint(chat="a", packing="a", pipeline="a")
    assert fingerprint(packing="b", pipeline="b") == first
    assert fingerprint(chat="b") != first
    assert fingerprint(chat="a", templates="new") != first
    sources._code_fingerprint.cache_clear()


@pytest.fixture
def put(tmp_path, monkeypatch):
    """Puts one conversation into a remote store, and lets rows be read from a local copy."""
    copy = tmp_path / "copy.jsonl"
    read_rows = sources.read_rows
    monkeypatch.setattr(sources, "read_rows", lambda path, format: read_rows(str(copy), format))

    def put_chat(url: str, answer: str) -> str:
        write(copy, [chat(answer)])
        fsspec.filesystem("memory").pipe_file(url.removeprefix("memory:/"), copy.read_bytes())
        return url

    return put_chat


def test_a_remote_file_is_known_by_what_its_store_says(tmp_path, tokenizer, encoded, put, monkeypatch):
    found = []
    for answer, is_new in (("one", True), ("one", False), ("two", True)):
        url = put("memory://bucket/a.jsonl", answer) if is_new else "memory://bucket/a.jsonl"
        with monkeypatch.context() as patch:
            patch.setattr(MemoryFileSystem, "open", None)  # its bytes are not read for it
            found += texts(tokenize(tmp_path, tokenizer, url)[0], tokenizer)
    assert encoded == [1, 1]
    assert ["one" in text for text in found] == [True, True, False]


def test_a_remote_file_of_which_the_store_says_little_is_known_by_its_bytes(
    tmp_path, tokenizer, encoded, put, monkeypatch
):
    monkeypatch.setattr(sources, "_REMOTE_VERSION_FACTS", ("etag",))
    for answer in ("one", "one", "two"):
        (cache,) = tokenize(tmp_path, tokenizer, put("memory://bucket/b.jsonl", answer))
        assert answer in texts(cache, tokenizer)[0]
    assert encoded == [1, 1]


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, tokenizer, monkeypatch):
    path = write(tmp_path / "a.jsonl", [chat("one")])
    encode_rows = sources.encode_rows

    def appending(rows, tokenizer, loss_on):
        with open(path, "a") as file:
            file.write(json.dumps(chat("more")))
        return encode_rows(rows, tokenizer, loss_on)

    monkeypatch.setattr(sources, "encode_rows", appending)
    with pytest.raises(UserError, match=r"data\.train\.0\.path: .*a\.jsonl changed while it was read"):
        tokenize(tmp_path, tokenizer, path)


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
    assert "known: messages | prompt + completion | text" in problems[2]
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
    assert problems[1].startswith("data.train.1.path: there is no file")
    assert problems[2].startswith("data.train.3.path:")
    assert "is a directory" in problems[2]
    assert problems[3].startswith("data.train.4.path: cannot read 'nonsense://a.jsonl'")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not at all PAR1")
    with pytest.raises(UserError, match=r"a\.parquet: not a readable Parquet file"):
        tokenize(tmp_path, tokenizer, str(tmp_path / "a.parquet"))


def test_the_main_process_builds_before_the_barrier_and_the_others_after_it(tmp_path, tokenizer, encoded):
    path = write(tmp_path / "a.jsonl", [chat("a"), NO_TURNS])
    encoded_at_barrier: list[list[int]] = []

    def barrier(name: str) -> None:
        encoded_at_barrier.append(list(encoded))

    options = {"on_bad_row": "skip", "barrier": barrier}
    tokenize(tmp_path, tokenizer, path, is_main=True, **options)
    (tmp_path / "run" / "rejects.jsonl").unlink()
    (cache,) = tokenize(tmp_path, tokenizer, path, is_main=False, **options)
    assert encoded_at_barrier == [[1], [1]]
    assert encoded == [1]
    assert cache.num_samples == 1
    assert not (tmp_path / "run" / "rejects.jsonl").exists()  # the main process writes it
    own_disk = str(tmp_path / "another")
    tokenize(tmp_path, tokenizer, path, is_main=False, cache_dir=own_disk, **options)
    assert encoded_at_barrier[2:] == [[1]]
    assert encoded == [1, 1]


def test_a_main_process_that_fails_keeps_nobody_waiting(tmp_path, tokenizer):
    came: list[str] = []
    with pytest.raises(UserError, match="there is no file"):
        tokenize(tmp_path, tokenizer, str(tmp_path / "none.jsonl"), barrier=came.append)
    assert len(came) == 1


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_progress_is_shown_by_the_main_process_when_it_takes_long(
    tmp_path, tokenizer, monkeypatch, caplog, capsys, name
):
    monkeypatch.setattr(sources._Report, "_QUIET_SECONDS", 0.0)
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
