"""Tokens as text: end to end they are what the tokenizer decodes, whole characters, special tokens on their own."""

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from posttrain.data.token_text import pieces
from posttrain.data.tokenizer import Tokenizer
from tests.data.chat_cases import load


def metaspace_tokenizer() -> Tokenizer:
    """As Llama 2's: spaces are part of words, unknown characters fall back to bytes."""
    words = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁Hello", "▁world", "Hello", "a"]
    vocabulary = [(word, float(-i)) for i, word in enumerate(words)]
    backend = Backend(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>")
    return Tokenizer(hf, source="metaspace")


TOKENIZERS = {"byte level": load("chatml"), "metaspace": metaspace_tokenizer()}
TEXTS = ["Hello world", "Hello 你好 😀 a", " a  a\n\t", "<s>Hello world", "😀😀", "\ufffd", "a\ufffd\ufffda", ""]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_pieces_end_to_end_are_the_decoded_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    found = pieces(tokenizer, np.array(ids, np.int32))
    assert "".join(piece.text for piece in found) == tokenizer.decode(ids)
    assert [id for piece in found for id in piece.ids] == ids
    assert [piece.start for piece in found] == np.cumsum([0, *(len(piece.ids) for piece in found)])[:-1].tolist()


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_bytes_of_one_character_are_joined(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a😀好a")
    assert len(ids) > 4, "the characters must take several tokens for this test to mean anything"
    texts = [piece.text for piece in pieces(tokenizer, np.array(ids, np.int32))]
    assert "".join(texts).strip() == "a😀好a" and not any("\ufffd" in text for text in texts)
    assert "😀" in texts and "好" in texts


def test_a_character_cut_in_two_does_not_swallow_what_follows() -> None:
    tokenizer = TOKENIZERS["byte level"]
    cut = tokenizer.encode("a😀")[:-1]
    stop = tokenizer.added_tokens["<|im_end|>"]
    found = pieces(tokenizer, np.array([*cut, stop, *tokenizer.encode("b")], np.int32))
    assert [piece.text for piece in found][-2:] == ["<|im_end|>", "b"]
    assert [piece.special for piece in found][-3:] == [False, True, False]
    assert found[-3].text.endswith("\ufffd")
