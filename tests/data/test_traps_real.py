"""The traps of `test_traps.py`, and real chats, with real tokenizers and their own templates.

The environment variable POSTTRAIN_VOCABULARIES names a folder with a tokenizer in each of the folders llama3_1, gemma3
and qwen3 (`make acceptance` fetches them).
"""

import os
import unicodedata
from pathlib import Path

import pytest

from posttrain.data.chat import encode_rows
from posttrain.data.files import BadRow
from posttrain.data.formats import read_rows
from posttrain.data.rows import Row
from posttrain.data.tokenizer import Tokenizer
from tests.data.chat_cases import trained
from tests.data.test_traps import ODD, jsonl, talk

REAL = {"llama3_1": ("<|eot_id|>", 1), "gemma3": ("<end_of_turn>", 1), "qwen3": ("<|im_end|>", 0)}
"""How turns end, how many BOS there are."""


@pytest.fixture(scope="module", params=REAL)
def real(request: pytest.FixtureRequest) -> tuple[Tokenizer, str, int]:
    path = Path(os.environ.get("POSTTRAIN_VOCABULARIES") or "/nonexistent", request.param)
    if not path.is_dir():
        pytest.skip(f"POSTTRAIN_VOCABULARIES names no folder with a folder {request.param}")
    tokenizer = Tokenizer.load(str(path))
    return (tokenizer, *REAL[request.param])


@pytest.mark.acceptance
def test_real_tokenizers_on_traps(tmp_path: Path, real: tuple[Tokenizer, str, int]) -> None:
    """Of one exchange each, which all three templates take: one BOS or none, the answer and its end, nothing else."""
    tokenizer, stop, count = real
    bos = tokenizer._hf.bos_token
    fake = tokenizer.render(talk("hm", "Trust me.")["messages"])
    questions = ["a", stop, f"a{stop}b", fake, "", " \n", "a\u2028b", "\u200d", "x" * 100_000, "\x00", *ODD]
    questions = [question for question in questions if not (bos and bos in question)]
    rows = [talk(question, "b") for question in questions] + [talk("a", f"b{odd}") for odd in ODD]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(jsonl(*rows))
    results = encode_rows([row for row in read_rows(str(path)) if isinstance(row, Row)], tokenizer)
    assert len(results) == len(rows)
    for row, result in zip(rows, results, strict=True):
        assert not isinstance(result, BadRow), (row, str(result))
        (sample,) = result
        messages = row["messages"]
        assert sample.tokens.tolist() == tokenizer._hf.apply_chat_template(messages, return_dict=False)
        assert (sample.tokens == tokenizer.bos_id).sum() == count
        assert (sample.tokens[0] == tokenizer.bos_id) == bool(count)
        (text,) = trained(sample, tokenizer)
        content = messages[1]["content"]
        # Qwen's tokenizer composes characters, the templates of the others trim.
        content = unicodedata.normalize("NFC", content) if stop == "<|im_end|>" else content.strip()
        assert text.removeprefix("<think>\n\n</think>\n\n") == content + stop
        (end,) = [int(i) for i in (sample.loss_weights > 0).nonzero()[0] if sample.tokens[i] in tokenizer.stop_ids]
        assert not sample.loss_weights[end + 1 :].any()


@pytest.mark.acceptance
@pytest.mark.parametrize("name", ["bench/chat.jsonl", "data/fastchat/dummy_conversation.json"])
def test_real_tokenizers_on_real_chats(shared: Path, real: tuple[Tokenizer, str, int], name: str) -> None:
    """Each answer is trained once, in samples that are the conversation up to a turn as transformers tokenizes it."""
    tokenizer, stop, count = real
    rows = [row for row in read_rows(str(shared / name)) if isinstance(row, Row)][:40]
    for row, result in zip(rows, encode_rows(rows, tokenizer), strict=True):
        assert not isinstance(result, BadRow), str(result)
        answers = [m["content"] for m in row.messages if m["role"] == "assistant"]
        found = [text for sample in result for text in trained(sample, tokenizer)]
        assert len(found) == len(answers)
        for text, answer in zip(found, answers, strict=True):
            assert text.removesuffix(stop).removeprefix("<think>\n\n</think>\n\n").strip() == answer.strip()
            assert text.endswith(stop)
        parts = [
            tokenizer._hf.apply_chat_template(list(row.messages[:end]), return_dict=False)
            for end in range(1, len(row.messages) + 1)
        ]
        for sample in result:
            ids = sample.tokens.tolist()
            assert ids in parts and ids.count(tokenizer.bos_id) == count
