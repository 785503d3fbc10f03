"""Sentencepiece vocabularies in GGUF files: ids by hand, and the vectors of llama.cpp for every vocabulary at hand.

The environment variable POSTTRAIN_VOCABULARIES names a folder with a tokenizer in each of the folders qwen3, llama3,
llama3_1 and gpt2 (`make acceptance` fetches them).
"""

import itertools
import json
import os
from pathlib import Path

import pytest
from etils import epath
from gguf import GGUFReader, TokenType
from tokenizers import Tokenizer as FastTokenizer

from posttrain.data.chat import encode_rows
from posttrain.data.files import BadRow
from posttrain.data.formats import read_rows
from posttrain.data.rows import Row
from posttrain.data.tokenizer import Tokenizer
from posttrain.errors import UserError
from posttrain.models.gguf import import_gguf
from posttrain.models.gguf_tokenizer import build_tokenizer, write_tokenizer
from tests.data.chat_cases import check_law, trained
from tests.models.test_gguf import ARCHITECTURE, gguf_tensors, hf_tensors, write_gguf

SPECIAL = [("<unk>", TokenType.UNKNOWN), ("<s>", TokenType.CONTROL), ("</s>", TokenType.CONTROL)]
BYTES = [(f"<0x{byte:02X}>", TokenType.BYTE) for byte in range(256)]
PIECES = {"▁abc": -9, "bc": -3, "▁ab": -2, "ab": -1, "aa": -5, "aaa": -6, "▁": -10, "a": -11, "b": -12, "c": -13}
"""Text and score: the order of the ids is not that of the scores."""
EXTRA = [("<|end|>", TokenType.CONTROL), ("<tool>", TokenType.USER_DEFINED)]
FILLERS = [("[PAD1]", TokenType.UNKNOWN), ("[PAD2]", TokenType.UNUSED)]


def metadata(**changes) -> dict:
    pieces = [*SPECIAL, *BYTES, *((text, TokenType.NORMAL) for text in PIECES), *EXTRA, *FILLERS]
    values = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [text for text, _ in pieces],
        "tokenizer.ggml.token_type": [int(kind) for _, kind in pieces],
        "tokenizer.ggml.scores": [float(PIECES.get(text, 0)) for text, _ in pieces],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    changes = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return {key: value for key, value in {**values, **changes}.items() if value is not None}


def pieces_of(text: str, values: dict) -> list[str]:
    ids = build_tokenizer(values).encode(text, add_special_tokens=False).ids
    return [values["tokenizer.ggml.tokens"][id] for id in ids]


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("", []),
        ("ab", ["▁ab"]),
        # "ab" (-1) joins before "bc" (-3), then "▁ab" (-2); nothing joins that with "c" but "▁abc" (-9).
        ("abc", ["▁abc"]),
        ("cabc", ["▁", "c", "ab", "c"]),
        ("bc", ["▁", "bc"]),
        (" ab", ["▁", "▁ab"]),
        ("ab ab", ["▁ab", "▁ab"]),
        # Of equal pairs the leftmost joins first: aa aa a, then the last two.
        ("aaaaa", ["▁", "aa", "aaa"]),
        ("é\n", ["▁", "<0xC3>", "<0xA9>", "<0x0A>"]),
        ("ab\u200dab", ["▁ab", "<0xE2>", "<0x80>", "<0x8D>", "ab"]),
        # Each stretch between special tokens has its space.
        ("ab</s>ab<tool> ab", ["▁ab", "</s>", "▁ab", "<tool>", "▁", "▁ab"]),
        ("<|end|>\nab", ["<|end|>", "▁", "<0x0A>", "ab"]),
        # What only fills the embedding up is no token.
        ("[PAD1]a", ["▁", "<0x5B>", "<0x50>", "<0x41>", "<0x44>", "<0x31>", "<0x5D>", "a"]),
        ("[PAD2]", ["▁", "<0x5B>", "<0x50>", "<0x41>", "<0x44>", "<0x32>", "<0x5D>"]),
    ],
)
def test_pieces_join_by_score(text, want):
    values = metadata()
    assert pieces_of(text, values) == want
    tokenizer = build_tokenizer(values)
    if not any(name in text for name, _ in SPECIAL + EXTRA):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def join_by_the_book(text: str, scores: dict[str, float]) -> list[str]:
    """Sentencepiece's encoding, spelled out: the best pair joins, of equal ones the leftmost."""
    symbols = list(text)
    while True:
        pairs = [(scores[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in scores]
        if not pairs:
            return symbols
        at = -max(pairs)[1]
        symbols[at : at + 2] = ["".join(symbols[at : at + 2])]


def test_runs_with_pieces_of_one_score():
    """As the runs of spaces of Mistral."""
    scores = {"▁": 0.0, "a": 0.0, **{"a" * n: -1e9 for n in (*range(2, 15), 16)}}
    values = metadata(tokens=["<unk>", *scores], token_type=[2, *[1] * len(scores)], scores=[0.0, *scores.values()])
    for length in range(1, 80):
        assert pieces_of("a" * length, values) == join_by_the_book("▁" + "a" * length, scores)


def test_bytes_and_special_tokens_are_made_by_no_join():
    new = [*"<0x41>", "<0", "<0x", "<0x4", "1>"]
    values = metadata()
    for key, more in (("tokens", new), ("token_type", [1] * len(new)), ("scores", [-1.0] * len(new))):
        values[f"tokenizer.ggml.{key}"] += more
    assert pieces_of("<0x41>", values) == ["▁", "<0x4", "1>"]


def test_user_defined_pieces_with_spaces():
    """Spelled with spaces they are cut out of the text; with the stand-in, as in older files, they are joined."""
    for prefix, first in ((True, ["▁"]), (False, [])):
        for spelled, after in (("  ", first), ("▁▁", [])):
            values = metadata(add_space_prefix=prefix)
            tokens = values["tokenizer.ggml.tokens"]
            values["tokenizer.ggml.tokens"] = [spelled if text == "<tool>" else text for text in tokens]
            assert pieces_of("a  b", values) == [*first, "a", spelled, *after, "b"]
            assert pieces_of("a   b", values) == [*first, "a", spelled, *after, "▁", "b"]


def test_without_a_space_before_the_text():
    values = metadata(add_space_prefix=False)
    assert pieces_of("ab ab<tool>ab", values) == ["ab", "▁ab", "<tool>", "ab"]
    tokenizer = build_tokenizer(values)
    assert tokenizer.decode(tokenizer.encode(" ab").ids) == " ab"


def test_without_bytes_what_is_not_covered_is_unknown():
    values = metadata()
    kinds = values["tokenizer.ggml.token_type"]
    values["tokenizer.ggml.token_type"] = [TokenType.UNUSED if k == TokenType.BYTE else k for k in kinds]
    assert pieces_of("aéñb", values) == ["▁", "a", "<unk>", "b"]


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({}, [1, "ab"]),
        ({"bos_token_id": None, "eos_token_id": None, "unknown_token_id": None}, [1, "ab"]),
        ({"add_bos_token": False}, ["ab"]),
        ({"add_eos_token": True}, [1, "ab", 2]),
        ({"bos_token_id": 2}, [2, "ab"]),
    ],
)
def test_bos_and_eos(changes, want):
    values = metadata(**changes)
    ab = values["tokenizer.ggml.tokens"].index("▁ab")
    assert build_tokenizer(values).encode("ab").ids == [ab if part == "ab" else part for part in want]


def test_phi3_swallows_whitespace_behind_its_special_tokens():
    values = {**metadata(), "general.name": "Phi3"}
    want = ["<|end|>", "▁ab", "</s>", "▁ab", "<s>", "▁", "▁ab"]
    assert pieces_of("<|end|>\n  ab</s> ab<s> ab", values) == want


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": None}, r"tokenizer\.ggml\.scores: 0 scores for 273 tokens"),
        ({"token_type": [1, 2]}, "273 tokens with 2 token types"),
        ({"unknown_token_id": 999}, r"unknown_token_id: 999 is not one of the 273 tokens"),
        ({"tokens": ["a"] * 273}, "'a' occurs more than once"),
    ],
)
def test_broken_vocabularies_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        build_tokenizer(metadata(**changes))


def test_an_imported_file_loads_with_its_template(tmp_path):
    values = {
        **ARCHITECTURE,
        **metadata(eot_token_id=269),
        "tokenizer.chat_template": "{{ messages[0].content }}<|end|>",
    }
    tensors = gguf_tensors(hf_tensors(len(values["tokenizer.ggml.tokens"])))
    import_gguf(write_gguf(tmp_path / "model.gguf", values, tensors), tmp_path / "out")
    tokenizer = Tokenizer.load(str(tmp_path / "out"))
    direct = build_tokenizer(values)
    for text in ("", " ab", "abc</s> ab é", "cab<tool> a"):
        assert tokenizer.encode(text) == direct.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, add_special_tokens=True) == direct.encode(text).ids
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 271)
    assert tokenizer.stop_ids == (2, 269)
    tokenizer.save(tmp_path / "saved")
    assert Tokenizer.load(str(tmp_path / "saved")).encode("abc</s> ab é") == direct.encode("abc</s> ab é").ids[1:]


# ---- llama.cpp's vectors ---------------------------------------------------------------------------------------------

VECTORS = "data/tok-llamacpp-vocab/ggml-vocab-{}.gguf"


def vectors(shared: Path, name: str) -> list[tuple[str, list[int]]]:
    """Texts and ids, made without what goes around a text (llama_tokenize with add_special false)."""
    texts = (shared / (VECTORS.format(name) + ".inp")).read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = (shared / (VECTORS.format(name) + ".out")).read_text().splitlines()
    assert len(lines) == 46 and texts.pop() == ""
    return list(zip(texts, ([int(id) for id in line.split()] for line in lines), strict=True))


@pytest.mark.acceptance
@pytest.mark.parametrize("name", ["llama-spm", "phi-3"])
def test_ids_of_sentencepiece_vocabularies(shared: Path, name: str) -> None:
    reader = GGUFReader(shared / VECTORS.format(name))
    tokenizer = build_tokenizer({key: field.contents() for key, field in reader.fields.items()})
    for text, ids in vectors(shared, name):
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids, text
        assert tokenizer.encode(text).ids == [1, *ids]
        assert tokenizer.decode(ids) == text


@pytest.mark.acceptance
def test_masks_with_phi3(shared: Path, tmp_path: Path) -> None:
    """Its special tokens swallow the newlines that the template writes behind them, and what an answer starts with."""
    reader = GGUFReader(shared / VECTORS.format("phi-3"))
    values = {key: field.contents() for key, field in reader.fields.items()}
    write_tokenizer(values, epath.Path(tmp_path))
    tokenizer = Tokenizer.load(str(tmp_path))
    assert tokenizer.stop_ids == (32000, 32007) and tokenizer.vocab_size == 32011
    rows = [row for row in read_rows(str(shared / "bench" / "chat.jsonl")) if isinstance(row, Row)]
    rows = [row for row in rows if row.messages[0]["role"] == "user"][:60]
    for row, result in zip(rows, encode_rows(rows, tokenizer), strict=True):
        assert not isinstance(result, BadRow), str(result)
        (sample,) = result
        check_law(row, sample, tokenizer._hf, [i for i, m in enumerate(row.messages) if m["role"] == "assistant"])
        for text, message in zip(trained(sample, tokenizer), row.messages[1::2], strict=True):
            # The space before each stretch is the tokenizer's; what it swallows is in no token.
            assert text.replace(" ", "") == (message["content"] + "<|end|>").replace(" ", "")


KNOWN = [
    ("qwen2", "qwen3"),
    ("deepseek-r1-qwen", "qwen3"),
    ("llama-bpe", "llama3"),
    ("llama-bpe", "llama3_1"),
    ("gpt-2", "gpt2"),
]
"""Vectors, and the folder with a tokenizer that has their vocabulary: later versions only added special tokens."""


@pytest.fixture
def vocabulary(request: pytest.FixtureRequest) -> Path:
    path = Path(os.environ.get("POSTTRAIN_VOCABULARIES") or "/nonexistent", request.param)
    if not path.is_dir():
        pytest.skip(f"POSTTRAIN_VOCABULARIES names no folder with a folder {request.param}")
    return path


@pytest.mark.acceptance
@pytest.mark.parametrize(("name", "vocabulary"), KNOWN, indirect=["vocabulary"])
def test_ids_of_byte_level_vocabularies(shared: Path, name: str, vocabulary: Path) -> None:
    tokenizer = Tokenizer.load(str(vocabulary))
    for text, ids in vectors(shared, name):
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == text


@pytest.mark.acceptance
@pytest.mark.parametrize(("name", "vocabulary"), KNOWN, indirect=["vocabulary"])
def test_the_table_of_splits_gives_the_same_ids(shared: Path, name: str, vocabulary: Path, tmp_path: Path) -> None:
    """The same vocabularies as a GGUF would hold them, where the split is known by its name only."""
    Tokenizer.load(str(vocabulary)).save(tmp_path)
    fast = FastTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    added = {token.content for token in fast.get_added_tokens_decoder().values()}
    tokens = sorted(fast.get_vocab().items(), key=lambda item: item[1])
    merges = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
    values = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": [text for text, _ in tokens],
        "tokenizer.ggml.token_type": [3 if text in added else 1 for text, _ in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.add_bos_token": False,
    }
    assert [id for _, id in tokens] == list(range(len(tokens)))
    tokenizer = build_tokenizer(values)
    for text, ids in vectors(shared, name):
        assert tokenizer.encode(text).ids == ids, text
