"""Tokens that a run adds: their ids, how text is cut at them, and that saved files keep both, in `transformers` too."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from posttrain.data.tokenizer import Tokenizer
from posttrain.errors import UserError

FIXTURE = Path(__file__).parent.parent / "fixtures" / "chat"
CONTENT = json.loads((FIXTURE / "tokenizer.json").read_text())
IDS = {token["content"]: token["id"] for token in CONTENT["added_tokens"]} | CONTENT["model"]["vocab"]
SIZE = max(IDS.values()) + 1
PLAIN = "Ġcapital"
"""In the vocabulary, but not cut out of text."""


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """The fixture's files, for tests to change."""
    directory = tmp_path / "model"
    directory.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(FIXTURE / name, directory / name)
    return directory


def test_new_tokens_get_the_next_ids_in_the_order_given() -> None:
    for tokens in (("<B>", "<A>"), ("<A>", "<B>")):
        tokenizer = Tokenizer.load(str(FIXTURE), add_special_tokens=tokens)
        assert tokenizer.new_tokens == {tokens[0]: SIZE, tokens[1]: SIZE + 1}
        assert tokenizer.vocab_size == SIZE + 2
        assert tokenizer.encode("Paris<B><A>") == [
            *tokenizer.encode("Paris"),
            *map(tokenizer.new_tokens.get, ("<B>", "<A>")),
        ]
        assert {SIZE, SIZE + 1} <= tokenizer.cut_ids


def test_tokens_that_are_there_keep_their_ids_and_become_special() -> None:
    before = Tokenizer.load(str(FIXTURE))
    assert len(before.encode(f"x{PLAIN}y")) > 3
    tokenizer = Tokenizer.load(str(FIXTURE), add_special_tokens=("<|eot|>", "<think>", "<NEW>", PLAIN))
    assert tokenizer.new_tokens == {"<NEW>": SIZE}
    for token in ("<|eot|>", "<think>", PLAIN):
        assert tokenizer.encode(f"x{token}y")[1:-1] == [IDS[token]]
        assert tokenizer.decode(tokenizer.encode(f"x{token}y"), skip_special_tokens=True) == "xy"
    assert before.decode(before.encode("x<think>y"), skip_special_tokens=True) == "x<think>y"
    # Nothing else changes.
    for text in ("Paris is the capital of France.", "<|im_start|>user\nHi<|im_end|>"):
        assert tokenizer.encode(text) == before.encode(text)


def test_nothing_added_is_the_same_tokenizer() -> None:
    plain = Tokenizer.load(str(FIXTURE))
    kept = Tokenizer.load(str(FIXTURE), add_special_tokens=("<|eot|>", "<s>"))
    assert kept.new_tokens == {} and kept.fingerprint == plain.fingerprint
    assert Tokenizer.load(str(FIXTURE), add_special_tokens=("<NEW>",)).fingerprint != plain.fingerprint


def test_a_new_token_may_be_the_end_token() -> None:
    tokenizer = Tokenizer.load(str(FIXTURE), add_special_tokens=("<A>", "<END>"), eos_token="<END>")
    assert tokenizer.eos_id == SIZE + 1 and tokenizer.stop_ids == (SIZE + 1,)
    with pytest.raises(UserError, match=r"tokenizer\.eos_token: '<END>' is no token.*tokenizer\.add_special_tokens"):
        Tokenizer.load(str(FIXTURE), eos_token="<END>")


def test_saved_files_keep_them_for_transformers_and_for_us(tmp_path: Path, model_dir: Path) -> None:
    config = json.loads((model_dir / "tokenizer_config.json").read_text())
    (model_dir / "tokenizer_config.json").write_text(json.dumps(config | {"additional_special_tokens": ["<|eot|>"]}))
    added = ("<USER>", "<think>", PLAIN, "<END>")
    tokenizer = Tokenizer.load(str(model_dir), add_special_tokens=added, eos_token="<END>")
    tokenizer.save(tmp_path / "out")
    hf = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = f"Hi<USER>who<think>{PLAIN}<END> <|eot|>"
    assert hf(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
    assert hf.convert_tokens_to_ids(["<USER>", "<END>"]) == [SIZE, SIZE + 1]
    assert hf.eos_token == "<END>" and hf.bos_token == "<s>" and hf.pad_token == "<|im_end|>"
    assert {*added, "<|eot|>"} <= set(hf.all_special_tokens)
    again = Tokenizer.load(str(tmp_path / "out"), add_special_tokens=added)
    assert again.new_tokens == {} and again.fingerprint == tokenizer.fingerprint
    assert again.stop_ids == tokenizer.stop_ids == (SIZE + 1,)


def test_ids_with_gaps_are_refused_before_two_tokens_share_one(model_dir: Path) -> None:
    content = json.loads((model_dir / "tokenizer.json").read_text())
    content["added_tokens"], content["post_processor"] = [], None
    vocab = content["model"]["vocab"]
    last = max(vocab, key=vocab.__getitem__)
    vocab[last] += 5
    (model_dir / "tokenizer.json").write_text(json.dumps(content))
    (model_dir / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    assert Tokenizer.load(str(model_dir), add_special_tokens=("a",)).new_tokens == {}
    with pytest.raises(
        UserError, match=rf"add_special_tokens: the ids of .* have gaps below the highest, {vocab[last]}"
    ):
        Tokenizer.load(str(model_dir), add_special_tokens=("<A>",))
