"""Directories with a tokenizer.model and no tokenizer.json, held to the sentencepiece library.

The models are trained here; for the acceptance tests POSTTRAIN_VOCABULARIES names a folder whose folder `mistral` has
the *.model.v* files of the package mistral-common (`make acceptance` fetches them).
"""

import io
import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from posttrain.data import tokenizer_files
from posttrain.data.tokenizer import Tokenizer
from posttrain.errors import UserError

SENTENCES = [
    "the cat sat on the mat, and the dog sat on the cat",
    "it is what it is: 12 mats, 345 cats & 6 dogs!",
    "where there is a mat there is a cat; there it sat",
    "das Mädchen saß auf der Matte - naïve café",
]
TEXTS = [
    *("", " ", "   ", "\n", "the cat", " the cat", "  the   cat  ", "the cat\n", "\t the\n\n  mat ", "▁the▁ cat▁"),
    *(
        "that mat's catsat",
        "aaaaaaaa",
        "\u00a0the\u2003cat",
        "café cafe\u0301",
        "ﬁt ①②",
        "你好 🙂👩‍👩‍👧",
        "\x00the",
        "<0x41>",
        "see a the",
    ),
]
CHATML = "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}"


def train(model_type: str, **options: Any) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 3),
        model_writer=model,
        model_type=model_type,
        vocab_size=options.pop("vocab_size", 90),
        minloglevel=2,
        **options,
    )
    return model.getvalue()


LLAMA = {
    "byte_fallback": True,
    "vocab_size": 340,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "split_digits": True,
}
MODELS = {
    "as Llama": ("bpe", LLAMA),
    "as Gemma": (
        "bpe",
        {**LLAMA, "add_dummy_prefix": False, "user_defined_symbols": ["\n\n", "▁▁", "▁▁▁", "<turn>", "a t"]},
    ),
    "plain bpe": ("bpe", {}),
    "unigram": ("unigram", {"vocab_size": 54}),
    "unigram as it is": ("unigram", {"vocab_size": 54, "normalization_rule_name": "identity"}),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> bytes:
    model_type, options = MODELS[request.param]
    return train(model_type, **options)


def directory(path: Path, model: bytes, **files: Any) -> str:
    path.mkdir(exist_ok=True)
    (path / "tokenizer.model").write_bytes(model)
    for name, value in files.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    return str(path)


def differences(tokenizer: Tokenizer, oracle: sentencepiece.SentencePieceProcessor, texts: list[str]) -> list[Any]:
    wanted = [(text, oracle.encode(text)) for text in texts]
    return [(text, want, got) for text, want in wanted if (got := tokenizer.encode(text)) != want]


def test_ids_and_text_are_those_of_the_library(tmp_path: Path, model: bytes) -> None:
    tokenizer = Tokenizer.load(directory(tmp_path / "model", model))
    oracle = sentencepiece.SentencePieceProcessor(model_proto=model)
    rng = random.Random(0)
    words = ["the", "cat", "t", "a", " ", "  ", "\n", "é", "12", ",", "sat"]
    texts = SENTENCES + TEXTS + ["".join(rng.choices(words, k=rng.randint(1, 9))) for _ in range(300)]
    assert differences(tokenizer, oracle, texts) == []
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, None)
    for text in texts:
        ids = oracle.encode(text)
        if oracle.unk_id() not in ids and "▁" not in text:  # which is read as a space
            assert tokenizer.decode(ids) == oracle.decode(ids)
    assert tokenizer.encode("the cat", add_special_tokens=True) == [1, *oracle.encode("the cat")]


def test_user_defined_pieces_come_before_any_other(tmp_path: Path) -> None:
    """Whatever their scores are; and one with a plain space is never found."""
    from sentencepiece import sentencepiece_model_pb2

    model_type, options = MODELS["as Gemma"]
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(train(model_type, **options))
    for piece in proto.pieces:
        piece.score = -1000 if piece.type == piece.USER_DEFINED else piece.score
    model = proto.SerializeToString()
    oracle = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert oracle.encode("a     the t", out_type=str) == ["a", "▁▁▁", "▁▁", "the", "▁", "t"]
    texts = [*TEXTS, "a     the t", *(" " * n + "the" for n in range(12)), "a t", "see a t\n\n\nit"]
    assert differences(Tokenizer.load(directory(tmp_path, model)), oracle, texts) == []


def test_it_survives_saving(tmp_path: Path, model: bytes) -> None:
    tokenizer = Tokenizer.load(directory(tmp_path / "model", model))
    tokenizer.save(tmp_path / "saved")
    again = Tokenizer.load(str(tmp_path / "saved"))
    for text in (*SENTENCES, *TEXTS):
        for special in (False, True):
            assert again.encode(text, add_special_tokens=special) == tokenizer.encode(text, add_special_tokens=special)


def test_the_models_differ_on_these_texts() -> None:
    """Or agreement with each would show little."""
    pieces = set()
    for model_type, options in MODELS.values():
        oracle = sentencepiece.SentencePieceProcessor(model_proto=train(model_type, **options))
        pieces.add(tuple(tuple(oracle.encode(text, out_type=str)) for text in TEXTS))
    assert len(pieces) == len(MODELS)


def test_special_tokens_and_template_come_from_the_files_beside_it(tmp_path: Path) -> None:
    model = train("bpe", **LLAMA)
    im_end = {"content": "<|im_end|>", "special": True, "normalized": False}
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "eos_token": "<|im_end|>",
        "added_tokens_decoder": {"340": im_end},
        "add_bos_token": False,
        "add_eos_token": True,
        "chat_template": CHATML,
    }
    tokenizer = Tokenizer.load(directory(tmp_path, model, tokenizer_config=config, config={"model_type": "llama"}))
    oracle = sentencepiece.SentencePieceProcessor(model_proto=model)
    want = [*oracle.encode("the cat"), 340]
    assert tokenizer.encode("the cat", add_special_tokens=True) == tokenizer.encode("the cat<|im_end|>") == want
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 340, 341)
    assert tokenizer.render([{"role": "user", "content": "a"}]) == "<|im_start|>a<|im_end|>"


def test_old_files_of_added_tokens_are_read(tmp_path: Path) -> None:
    files = {"added_tokens": {"<|im_end|>": 340, "<pad>": 341}, "special_tokens_map": {"pad_token": "<pad>"}}
    tokenizer = Tokenizer.load(directory(tmp_path, train("bpe", **LLAMA), **files))
    assert (tokenizer.added_tokens["<|im_end|>"], tokenizer.pad_id, tokenizer.vocab_size) == (340, 341, 342)


@pytest.mark.parametrize(("legacy", "space"), [(None, False), (False, False), (True, True)])
def test_where_the_space_is_put(tmp_path: Path, legacy: bool | None, space: bool) -> None:
    model = train("bpe", **LLAMA)
    tokenizer = Tokenizer.load(directory(tmp_path, model, tokenizer_config={"legacy": legacy}))
    oracle = sentencepiece.SentencePieceProcessor(model_proto=model)
    begins, within = oracle.piece_to_id("▁on"), oracle.piece_to_id("on")
    assert oracle.encode("on") == [begins] and within != oracle.unk_id()
    assert tokenizer.encode("on</s>on") == [begins, 2, begins if space else within]
    assert tokenizer.encode(" on") == oracle.encode(" on") == [oracle.piece_to_id("▁"), begins]


def test_no_space_if_the_config_says_so(tmp_path: Path) -> None:
    model = train("bpe", **LLAMA)
    tokenizer = Tokenizer.load(directory(tmp_path, model, tokenizer_config={"add_prefix_space": False}))
    oracle = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert tokenizer.encode("on it") == [oracle.piece_to_id("on"), *oracle.encode("it")]
    assert tokenizer.decode(tokenizer.encode(" the cat")) == " the cat"


def test_a_remote_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = train("bpe", **LLAMA)
    directory(tmp_path / "model", model)
    monkeypatch.setattr(tokenizer_files.epath, "Path", lambda path: Path(path.replace("gs://bucket", str(tmp_path))))
    tokenizer = Tokenizer.load("gs://bucket/model")
    assert tokenizer.encode("the cat") == sentencepiece.SentencePieceProcessor(model_proto=model).encode("the cat")


def test_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the hub's cache has it; `HF_HUB_OFFLINE` is set for all tests."""
    from huggingface_hub import constants

    model, commit = train("unigram", vocab_size=54), "0" * 40
    repository = tmp_path / "models--some--model"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    directory(repository / "snapshots" / commit, model, config={"model_type": "llama"})
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    oracle = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert differences(Tokenizer.load("some/model"), oracle, SENTENCES + TEXTS) == []


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "files", "message"),
    [
        (b"version https://git-lfs", {}, "tokenizer.model: no readable sentencepiece model"),
        (b"", {}, "tokenizer.model: no unknown piece"),
        (("word", {"vocab_size": 30}), {}, "tokenizer.model: neither BPE nor unigram"),
        (("bpe", {"treat_whitespace_as_suffix": True}), {}, "tokenizer.model: spaces as suffix"),
        (
            ("unigram", {"byte_fallback": True, "vocab_size": 310}),
            {},
            "tokenizer.model: byte pieces of a unigram model; no fast tokenizer has the same ids; fix: put the",
        ),
        (
            ("bpe", {**LLAMA, "user_defined_symbols": ["▁▁"]}),
            {},
            "user-defined pieces with spaces, and a space before the text",
        ),
        (("bpe", LLAMA), {"tokenizer_config": []}, "tokenizer_config.json: no JSON object"),
        (("bpe", LLAMA), {"tokenizer_config": {"auto_map": {}}}, "auto_map asks for code of the model's own"),
        (
            ("bpe", LLAMA),
            {"tokenizer_config": {"added_tokens_decoder": {"350": {"content": "<x>"}}}},
            "the added token <x> should have id 350",
        ),
    ],
)
def test_what_cannot_be_read_or_has_no_equal_is_refused(
    tmp_path: Path, model: bytes | tuple[str, dict[str, Any]], files: dict[str, Any], message: str
) -> None:
    data = model if isinstance(model, bytes) else train(model[0], **model[1])
    path = directory(tmp_path, data, **files)
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer.load(path)
    assert path in str(caught.value)


def test_a_broken_config_is_named(tmp_path: Path) -> None:
    path = directory(tmp_path, train("bpe", **LLAMA))
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json: no JSON"):
        Tokenizer.load(path)


def test_without_the_package_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = directory(tmp_path, train("bpe", **LLAMA))
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match="pip install sentencepiece"):
        Tokenizer.load(path)


# ---- real models ----------------------------------------------------------------------------------------------------


RUNS = [c * n for c in "a=-.\n 3x" for n in range(1, 70)]
"""Where many spellings have the same score."""


def lines(shared: Path) -> list[str]:
    text = (shared / "data" / "tok-spm-test" / "botchan.txt").read_text(encoding="utf-8")
    return [*text.split("\n"), text[:20_000], *TEXTS]


@pytest.mark.acceptance
def test_ids_of_the_librarys_own_test_model(shared: Path, tmp_path: Path) -> None:
    file = shared / "data" / "tok-spm-test" / "test_model.model"
    shutil.copy(file, tmp_path / "tokenizer.model")
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(file))
    tokenizer = Tokenizer.load(str(tmp_path))
    assert differences(tokenizer, oracle, lines(shared)) == []
    for text, want, got in differences(tokenizer, oracle, RUNS):
        scores = [sum(oracle.get_score(id) for id in ids) for ids in (want, got)]
        assert scores[0] == pytest.approx(scores[1], rel=1e-6), text
        assert oracle.decode(got) == oracle.decode(want) == text


@pytest.mark.acceptance
def test_ids_of_mistral(shared: Path, tmp_path: Path) -> None:
    files = sorted(Path(os.environ.get("POSTTRAIN_VOCABULARIES") or "/nonexistent", "mistral").glob("*.model.v*"))
    if not files:
        pytest.skip("POSTTRAIN_VOCABULARIES names no folder with a folder mistral that has *.model.v* files")
    for file in files:
        shutil.copy(file, tmp_path / "tokenizer.model")
        oracle = sentencepiece.SentencePieceProcessor(model_file=str(file))
        tokenizer = Tokenizer.load(str(tmp_path))
        texts = lines(shared) + RUNS
        assert differences(tokenizer, oracle, texts) == [], file.name
        for text in texts:
            assert tokenizer.decode(oracle.encode(text)) == text.replace("▁", " ")
