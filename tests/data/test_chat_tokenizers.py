"""Masks with tokenizers of every kind, on odd texts at every boundary: exact, or refused for a reason that holds."""

import random
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from posttrain.data.chat import encode_rows
from posttrain.data.files import BadRow
from posttrain.data.tokenizer import Tokenizer
from tests.data.chat_cases import FIXTURE, chat, check_law, encode, load, plain, trained

PIECES = [
    "Paris",
    " is",
    "the capital",
    "\n",
    "\n\n",
    "  ",
    "\t",
    "é",
    "é",
    "你好",
    "日本語",
    "😀",
    "👩‍👩‍👧",
    "1234",
    ".",
    "?!",
    "ﬁ",
    "<",
    "<|",
    "¼",
]


def make_backend(kind: str) -> Backend:
    """Tokenizers with the traits of real ones, trained on a few lines."""
    text = (FIXTURE / "make_tokenizer.py").read_text()
    special = ["<unk>", "<s>", "<|im_end|>", "<|im_start|>", "<|eot|>"]
    if kind == "byte_level_with_prefix_space":
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
        backend.normalizer = normalizers.NFC()
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
    elif kind == "byte_fallback":  # Llama 2, Mistral
        backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special[:1] + bytes_, show_progress=False)
    elif kind == "metaspace_first":  # Llama 2 as converted with legacy=False
        backend = Backend(models.BPE(unk_token="<unk>", fuse_unk=True))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special[:1], show_progress=False)
    else:  # T5, Gemma 1: sentencepiece unigram
        backend = Backend(models.Unigram())
        backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" ", "▁")])
        trainer = trainers.UnigramTrainer(
            vocab_size=300, special_tokens=special[:1], unk_token="<unk>", show_progress=False
        )
    backend.train_from_iterator(text.splitlines(keepends=True), trainer)
    backend.add_special_tokens(
        [AddedToken(t, normalized=False, rstrip=t == "<|im_start|>", lstrip=t == "<|eot|>") for t in special]
    )
    # Found in normalized text, as whole words, and whitespace: not to be relied on as cuts.
    backend.add_tokens([AddedToken("capital", normalized=True), AddedToken("is", single_word=True), AddedToken("\n\n")])
    return backend


@pytest.mark.parametrize("template", ["chatml", "trims_content", "instructions", "no_header"])
@pytest.mark.parametrize(
    "kind", ["byte_level", "byte_level_with_prefix_space", "byte_fallback", "metaspace_first", "unigram"]
)
def test_random_conversations_are_exact_or_refused(tmp_path: Path, kind: str, template: str) -> None:
    """Odd texts at every boundary: what is accepted obeys the law, and what is refused breaks it."""
    if kind == "byte_level":
        hf = AutoTokenizer.from_pretrained(FIXTURE)
    else:
        backend = make_backend(kind)
        hf = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<|im_end|>")
    if template == "no_header":  # the answer follows the prompt's text, with no token between
        hf.chat_template = (
            "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        )
    else:
        hf.chat_template = load(template).chat_template
    tokenizer = Tokenizer(hf, source=kind)
    random_ = random.Random(f"{kind} {template}")

    def message(role: str) -> dict[str, str]:
        return {"role": role, "content": "".join(random_.choices(PIECES, k=random_.randint(1, 4))) or "x"}

    rows = [chat(*(message(role) for role in ("user", "assistant") * random_.randint(1, 3))) for _ in range(150)]
    accepted = 0
    for row, result in zip(rows, encode_rows(rows, tokenizer), strict=True):
        turns = [i for i, m in enumerate(row.messages) if m["role"] == "assistant"]
        if not isinstance(result, BadRow):
            accepted += 1
            (sample,) = result
            check_law(row, sample, hf, turns)
            continue
        if result.reason.startswith("is empty"):
            continue
        assert "is tokenized together with the end of its prompt" in result.reason
        whole = hf.apply_chat_template(list(row.messages), return_dict=False)
        prefixes = [
            hf.apply_chat_template(list(row.messages[:turn]), add_generation_prompt=True, return_dict=False)
            for turn in turns
        ]
        assert any(whole[: len(prefix)] != prefix for prefix in prefixes)
    assert accepted > 20


def test_offsets_without_the_leading_space() -> None:
    """The token " the" is the prompt's where the prompt ends with its space, though its offsets begin behind it."""
    backend = make_backend("byte_level_with_prefix_space")
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer = Tokenizer(hf, source="trimmed")
    ((ids, offsets),) = tokenizer.encode_with_offsets(["What is the"], add_special_tokens=True)
    assert offsets[-1].tolist() == [8, 11] and tokenizer.decode(ids[-1:].tolist()) == " the"
    assert trained(encode(plain("What is ", "the user"), tokenizer), tokenizer) == [" user<|im_end|>"]
    assert trained(encode(plain("What is", " the user"), tokenizer), tokenizer) == [" the user<|im_end|>"]
