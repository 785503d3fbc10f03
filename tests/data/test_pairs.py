"""Pairs of answers: the same prompt on both sides, masks as in fine-tuning, one packed row for both."""

from dataclasses import replace

import numpy as np
import pytest

from posttrain.config import SourceConfig
from posttrain.data.chat import Sample
from posttrain.data.files import BadRow
from posttrain.data.packed import PackedDataset
from posttrain.data.pairs import encode_pairs
from posttrain.data.rows import Row
from posttrain.data.samples import SampleTable, sample_table
from posttrain.data.tokenizer import Tokenizer
from tests.data.chat_cases import ANSWER, ANSWER_2, LONG, SYSTEM, USER, load
from tests.data.fake_caches import fake_cache


@pytest.fixture(scope="module")
def chatml() -> Tokenizer:
    return load("chatml")


def pair(*prompt: dict, chosen: dict = ANSWER, rejected: dict = ANSWER_2, margin: float | None = None) -> Row:
    return Row(
        "pairs.jsonl",
        5,
        "preference",
        messages=(*prompt, chosen),
        rejected_messages=(*prompt, rejected),
        prompt_length=len(prompt),
        margin=margin,
    )


def encoded(row: Row, tokenizer: Tokenizer) -> Sample:
    (samples,) = encode_pairs([row], tokenizer)
    assert isinstance(samples, tuple) and len(samples) == 1, str(samples)
    return samples[0]


def refused(row: Row, tokenizer: Tokenizer) -> BadRow:
    (bad,) = encode_pairs([row], tokenizer)
    assert isinstance(bad, BadRow)
    return bad


def test_both_sides_are_what_transformers_renders(chatml: Tokenizer) -> None:
    row = pair(SYSTEM, USER, margin=0.5)
    sample = encoded(row, chatml)
    render = chatml._hf.apply_chat_template
    sides = [render(list(messages), return_dict=False) for messages in (row.messages, row.rejected_messages)]
    assert sample.tokens.tolist() == sides[0] + sides[1] and sample.split == len(sides[0]) and sample.margin == 0.5
    fed = render([SYSTEM, USER], add_generation_prompt=True, return_dict=False)
    for start, answer in ((0, ANSWER), (sample.split, ANSWER_2)):
        end = start + len(sides[bool(start)])
        (trained,) = np.nonzero(sample.loss_weights[start:end])
        assert sample.tokens[start : start + trained[0]].tolist() == fed
        assert chatml.decode(sample.tokens[start + trained].tolist()) == answer["content"] + "<|im_end|>"
    assert (sample.file, sample.line) == ("pairs.jsonl", 5)


def test_strings(chatml: Tokenizer) -> None:
    row = Row("pairs.jsonl", 5, "preference", prompt="The capital?", completion=" Paris.", rejected=" Bonn.")
    sample = encoded(row, chatml)
    texts = [chatml.decode(part.tolist()) for part in np.split(sample.tokens, [sample.split])]
    assert texts == ["<s>The capital? Paris.<|im_end|>", "<s>The capital? Bonn.<|im_end|>"]


@pytest.mark.parametrize(
    ("row", "key", "reason"),
    [
        (pair(USER, rejected=ANSWER), "rejected", "is the same as chosen"),
        (Row("p.jsonl", 1, "messages", messages=LONG), "", "of the kind messages, and this objective compares pairs"),
        (pair(USER, rejected={"role": "assistant", "content": " "}), "rejected[1].content", "is empty"),
        (pair(USER, rejected={"role": "user", "content": "No."}), "rejected", "has no assistant message"),
        (
            replace(pair(USER), rejected_messages=({"role": "user", "content": "Who am I?"}, ANSWER_2)),
            "rejected",
            "do not begin with the same prompt",
        ),
        (replace(pair(USER), weights=(None, 0.0)), "chosen", "has no trained token"),
    ],
)
def test_refused_pairs(chatml: Tokenizer, row: Row, key: str, reason: str) -> None:
    bad = refused(row, chatml)
    assert bad.key == key and reason in bad.reason


def test_a_side_that_the_template_would_split() -> None:
    row = Row("pairs.jsonl", 5, "preference", messages=LONG, rejected_messages=(*LONG[:3], ANSWER), prompt_length=1)
    assert "renders its turns differently once others follow" in refused(row, load("strips_thinking")).reason


# ---- samples and rows -----------------------------------------------------------------------------------------------


def table(
    sides: list[tuple[int, int, int]], max_length: int, truncation: str = "keep_start"
) -> tuple[SampleTable, dict]:
    """Pairs of (prompt, chosen, rejected) lengths; tokens count up, so that each is told from all others."""
    samples, splits, first = [], [], 0
    for prompt, chosen, rejected in sides:
        ids = list(range(first, first + 2 * prompt + chosen + rejected))
        weights = ([0.0] * prompt + [1.0] * chosen) + ([0.0] * prompt + [1.0] * rejected)
        samples.append((ids, weights))
        splits.append(prompt + chosen)
        first += len(ids)
    cache = fake_cache("pairs.jsonl", samples, splits=splits, margins=[float(i) for i in range(len(sides))])
    made, (stats,) = sample_table(
        {"data.train.0": [cache]},
        {"data.train.0": SourceConfig(path="pairs.jsonl")},
        max_length=max_length,
        truncation=truncation,
        seed=0,
    )
    return made, dict(stats.dropped)


@pytest.mark.parametrize(
    ("truncation", "expected"),
    [
        ("keep_start", [[(0, 8), (8, 6)], [(14, 10), (28, 5)]]),
        ("keep_end", [[(0, 8), (8, 6)], [(18, 10), (28, 5)], [(35, 10), (49, 10)]]),
        ("drop", [[(0, 8), (8, 6)]]),
    ],
)
def test_each_side_is_truncated_and_pairs_stay_whole(truncation: str, expected: list[list[tuple[int, int]]]) -> None:
    """(First token, tokens) of each side. Of the third pair no answer is left where the starts are kept: it is
    dropped, and counted."""
    made, dropped = table([(3, 5, 3), (2, 12, 3), (10, 2, 4)], 10, truncation)
    found = [[(int(ids[0]), len(ids)) for ids, _ in made.segments(sample)] for sample in range(len(made))]
    assert found == expected
    assert made.lengths.tolist() == [sum(size for _, size in pair) for pair in expected]
    assert sum(dropped.values()) == 3 - len(expected)
    assert made.segment_lengths(np.arange(len(made))).tolist() == [size for pair in expected for _, size in pair]


def test_a_row_holds_the_sides_of_a_pair_next_to_each_other() -> None:
    made, _ = table([(2, 3, 4)] * 5, 20)
    data = PackedDataset(made, row_length=64, global_batch_size=2, seed=0, pairs=True)
    assert data.slots == 2
    batches = [data.read(step, np.arange(2)) for step in range(data.num_steps)]
    seen = []
    for batch in batches:
        for row in range(2):
            ids = batch.segment_ids[row]
            assert batch.sides[row].tolist() == ([1, -1] if ids.any() else [0, 0])
            if ids.any():
                chosen, rejected = batch.tokens[row, ids == 1], batch.tokens[row, ids == 2]
                assert chosen[-1] + 1 == rejected[0]  # neighbours in the cache
                number = int(batch.margins[row, 0])
                assert chosen[0] == 11 * number and batch.margins[row, 1] == 0
                seen.append(number)
    assert sorted(seen) == [0, 1, 2, 3, 4]
