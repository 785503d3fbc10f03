"""Rows, tokenizers and the law that the tests of chat masks share."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from posttrain.data.chat import Sample, encode_rows
from posttrain.data.files import BadRow
from posttrain.data.rows import Row
from posttrain.data.tokenizer import Tokenizer

FIXTURE = Path(__file__).parent.parent / "fixtures" / "chat"
TEMPLATES = FIXTURE / "templates"
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Who are you?"}
ANSWER = {"role": "assistant", "content": "A small model 😀."}
USER_2 = {"role": "user", "content": " And the capital of France?\n"}
ANSWER_2 = {"role": "assistant", "content": "Paris,\n\nI am told."}
LONG = (USER, ANSWER, USER_2, ANSWER_2)


def load(template: str | None, **options: Any) -> Tokenizer:
    path = str(TEMPLATES / f"{template}.jinja") if template not in (None, "chatml") else template
    return Tokenizer.load(str(FIXTURE), chat_template=path, **options)


def with_template(source: str) -> Tokenizer:
    """The fixture's tokenizer with a template of its own."""
    hf = AutoTokenizer.from_pretrained(FIXTURE)
    hf.chat_template = source
    return Tokenizer(hf, source="fixture")


def fed(row: Row, index: int, tokenizer: Tokenizer, **kwargs: Any) -> list[int]:
    """What `transformers` feeds the model before it produces message `index`."""
    return tokenizer._hf.apply_chat_template(
        list(row.messages[:index]),
        tools=list(row.tools) or None,
        add_generation_prompt=True,
        return_dict=False,
        **{**row.template_kwargs, **kwargs},
    )


def chat(*messages: dict[str, Any], prompt: int | None = None) -> Row:
    kind = "messages" if prompt is None else "prompt_completion"
    return Row("chats.jsonl", 17, kind, messages=messages, prompt_length=prompt or 0)


def encode(row: Row, tokenizer: Tokenizer, loss_on: str = "assistant") -> Sample:
    samples = encode_all(row, tokenizer, loss_on)
    assert len(samples) == 1, samples
    return samples[0]


def encode_all(row: Row, tokenizer: Tokenizer, *loss_on: str) -> tuple[Sample, ...]:
    """All the samples of a row."""
    (samples,) = encode_rows([row], tokenizer, loss_on or ("assistant",))
    assert isinstance(samples, tuple), str(samples)
    for sample in samples:
        check_sample(row, sample)
    return samples


def check_sample(row: Row, sample: Sample) -> None:
    assert (sample.file, sample.line) == (row.file, row.line)
    assert sample.tokens.dtype == np.int32 and sample.loss_weights.dtype == np.float32
    assert sample.tokens.shape == sample.loss_weights.shape and sample.loss_weights[0] == 0


def refused(row: Row, tokenizer: Tokenizer, loss_on: str = "assistant") -> BadRow:
    (bad,) = encode_rows([row], tokenizer, (loss_on,))
    assert isinstance(bad, BadRow), bad
    assert (bad.file, bad.line) == (row.file, row.line)
    return bad


def trained(sample: Sample, tokenizer: Tokenizer) -> list[str]:
    """The text of each trained stretch."""
    runs = itertools.groupby(range(len(sample.tokens)), key=lambda i: bool(sample.loss_weights[i]))
    return [tokenizer.decode(sample.tokens[list(run)].tolist()) for on, run in runs if on]


def check_law(row: Row, sample: Sample, hf: Any, turns: list[int]) -> None:
    """Ids and prefixes as `transformers` gives them."""
    messages = list(row.messages)
    assert sample.tokens.tolist() == hf.apply_chat_template(messages, tokenize=True, return_dict=False)
    starts = np.flatnonzero(np.diff(sample.loss_weights, prepend=0) > 0).tolist()
    assert len(starts) == len(turns)
    for turn, start in zip(turns, starts, strict=True):
        fed = hf.apply_chat_template(messages[:turn], tokenize=True, add_generation_prompt=True, return_dict=False)
        assert sample.tokens[:start].tolist() == fed


def plain(prompt: str, completion: str) -> Row:
    return Row("pairs.jsonl", 3, "prompt_completion", prompt=prompt, completion=completion)
