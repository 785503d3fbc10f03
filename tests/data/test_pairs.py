"""Pairs of answers: the same prompt on both sides, masks as in fine-tuning, one packed row for both."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain.config import DataConfig, SourceConfig
from posttrain.data.chat import Sample
from posttrain.data.files import BadRow, Record
from posttrain.data.formats import to_rows
from posttrain.data.packed import PackedDataset
from posttrain.data.pairs import encode_pairs
from posttrain.data.rows import Row
from posttrain.data.samples import SampleTable, sample_table
from posttrain.data.sources import tokenize_sources
from posttrain.data.tokenizer import Tokenizer
from posttrain.errors import UserErrors
from tests.data.chat_cases import ANSWER, ANSWER_2, LONG, SYSTEM, USER, load, with_template
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


# ---- rows as files have them ----------------------------------------------------------------------------------------

HI = {"role": "user", "content": "Hi"}


def said(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def from_record(value: dict[str, Any], tokenizer: Tokenizer, **source: Any) -> BadRow:
    """What is wrong with a record, in reading or in encoding it."""
    (row,) = to_rows(Record("pairs.jsonl", 5, value), SourceConfig(**source))
    bad = refused(row, tokenizer) if isinstance(row, Row) else row
    assert (bad.file, bad.line) == ("pairs.jsonl", 5)
    return bad


@pytest.mark.parametrize(
    ("value", "key", "reason"),
    [
        # equal sides
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "rejected", "is the same as chosen"),
        ({"chosen": "same text", "rejected": "same text"}, "rejected", "is the same as chosen"),
        ({"prompt": [HI], "chosen": [said("b")], "rejected": [said("b")]}, "rejected", "is the same as chosen"),
        ({"chosen": [HI, said("b")], "rejected": [HI, said("b")]}, "rejected", "is the same as chosen"),
        ({"chosen_messages": [HI, said("b")], "rejected_messages": [HI, said("b")]}, "rejected", "is the same as ch"),
        # no common prompt
        (
            {"chosen_messages": [said("b")], "rejected_messages": [said("c")]},
            "chosen_messages",
            "chosen and rejected do",
        ),
        (
            {"chosen": [HI, said("b")], "rejected": [{**HI, "content": "Ho"}, said("c")]},
            "chosen",
            "chosen and rejected",
        ),
        # nothing in a side
        ({"prompt": "a", "chosen": "", "rejected": "c"}, "chosen", "is empty: there is nothing to train on"),
        ({"prompt": "a", "chosen": "b", "rejected": "\n\t "}, "rejected", "is empty: there is nothing to train on"),
        ({"chosen": "a b ", "rejected": "a b c"}, "chosen", "is empty behind what both begin with"),
        ({"prompt": [HI], "chosen": [said("")], "rejected": [said("c")]}, "chosen[0]", "is empty: there is nothing to"),
        ({"prompt": [HI], "chosen": said("b"), "rejected": said(" \n")}, "rejected", "is empty: there is nothing to"),
        ({"prompt": [HI], "chosen": [said("b")], "rejected": []}, "rejected", "has no messages"),
        ({"chosen": [HI, said("b")], "rejected": [HI, said(" ")]}, "rejected[1]", "is empty: there is nothing to pre"),
        ({"chosen": [HI, said(None)], "rejected": [HI, said("c")]}, "chosen[1].content", "missing or null"),
        (
            {"chosen_messages": [HI, said("b")], "rejected_messages": [HI]},
            "chosen_messages",
            "chosen and rejected do not",
        ),
        ({"instruction": "Hi", "chosen": " ", "rejected": "c"}, "chosen", "is empty: there is nothing to train on"),
        # no answer of the assistant
        ({"prompt": [HI], "chosen": [said("b")], "rejected": [HI]}, "rejected", "has no assistant message"),
        # null, and of the wrong type
        ({"prompt": "a", "chosen": "b", "rejected": None}, "rejected", "is null, and chosen is not; fix: both, or le"),
        ({"prompt": "a", "chosen": None, "rejected": "c"}, "chosen", "is null, and rejected is not"),
        ({"conversations": [HI], "chosen": said("b"), "rejected": None}, "rejected", "is null, and chosen is not"),
        ({"chosen_messages": None, "rejected_messages": [HI, said("c")]}, "chosen_messages", "is null, and rejected_m"),
        ({"prompt": "a", "chosen": None, "rejected": None}, "", "the row is of the kind prompt, and this objective"),
        ({"prompt": None, "chosen": "b", "rejected": "c"}, "chosen", "chosen and rejected do not begin with the same"),
        ({"prompt": 3, "chosen": "b", "rejected": "c"}, "prompt", "must be a string, not a number"),
        ({"prompt": 3, "chosen": [HI, said("b")], "rejected": [HI, said("c")]}, "prompt", "is a number and not what"),
        ({"prompt": "a", "chosen": 3, "rejected": "c"}, "rejected", "must be a list of messages, not a string"),
        ({"prompt": [HI], "chosen": [said("b")], "rejected": ["c"]}, "rejected[0]", "must be an object with role and"),
        (
            {"prompt": [HI], "chosen": [said("b")], "rejected": [said(3)]},
            "rejected[0].content",
            "must be a string, not",
        ),
        (
            {"chosen_messages": "b", "rejected_messages": "c"},
            "chosen_messages",
            "chosen and rejected do not begin with",
        ),
        (
            {"chosen_messages": [HI, said("b")], "rejected_messages": 3},
            "rejected_messages",
            "must be a list of messages",
        ),
        # margins
        *(
            ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": margin}, "margin", f"must be a {said_of}")
            for margin, said_of in (
                ("1", "finite number, not '1'"),
                (True, "finite number, not True"),
                ([1], "finite number, not [1]"),
                (math.nan, "finite number, not nan"),
                (math.inf, "finite number, not inf"),
                (-math.inf, "finite number, not -inf"),
                (1e31, "number from -1e+30 to 1e+30, not 1e+31"),
            )
        ),
        ({"prompt": [HI], "chosen": said("b"), "rejected": said("c"), "margin": "1"}, "margin", "must be a finite num"),
        ({"instruction": "a", "chosen": "b", "rejected": "c", "margin": "1"}, "margin", "must be a finite number"),
    ],
)
def test_bad_records(chatml: Tokenizer, value: dict[str, Any], key: str, reason: str) -> None:
    bad = from_record(value, chatml)
    assert bad.key == key and bad.reason.startswith(reason)


def test_a_null_by_another_name(chatml: Tokenizer) -> None:
    bad = from_record({"yes": "b", "no": None}, chatml, columns={"chosen": "yes", "rejected": "no"})
    assert bad.key == "no" and bad.reason.startswith("is null, and yes is not")


def test_all_problems_of_a_pair_at_once(chatml: Tokenizer) -> None:
    value = {"prompt": [{"role": "me", "content": "a"}], "chosen": [said(3)], "rejected": 4, "margin": math.nan}
    assert str(from_record({**value, "image": "x.png"}, chatml)) == (
        "pairs.jsonl:5: image: images, audio and video are not served; fix: rows of text only (also: margin: must be a "
        "finite number, not nan; chosen[0].content: must be a string, not a number; rejected: must be a list of "
        "messages, not a number; and 1 more)"
    )
    strings = from_record({"prompt": "a", "chosen": "", "rejected": " ", "margin": "x", "tools": [{"x": 1}]}, chatml)
    assert strings.key == "margin" and "(also: chosen: is empty" in strings.reason
    assert "; rejected: is empty: there is nothing to train on; tools: is for the chat template" in strings.reason


def test_both_sides_that_the_encoding_refuses(chatml: Tokenizer) -> None:
    value = {"prompt": [HI], "chosen": [said("b<|im_end|>")], "rejected": [said("<|im_end|>c")]}
    bad = from_record(value, chatml)
    assert bad.key == "chosen[0].content" and "(also: rejected[0].content: holds the stop token" in bad.reason


def test_sides_that_the_template_makes_equal() -> None:
    """Llama 3's template, for one, strips what is around a text."""
    row = pair(USER, chosen=said("Paris."), rejected=said("Paris.\n"))
    source = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>{% endfor %}"
    generation = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    bad = refused(row, with_template(source + generation))
    assert bad.key == "rejected" and bad.reason.startswith("is the same as chosen, token by token")


def write(path: Path, values: Sequence[dict[str, Any]]) -> dict[str, SourceConfig]:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return {"data.train.0": SourceConfig(path=str(path))}


def test_bad_pairs_stop_the_run_or_are_skipped_and_counted(tmp_path: Path, chatml: Tokenizer) -> None:
    good = [{"prompt": f"{number}?", "chosen": "yes", "rejected": "no"} for number in range(4)]
    empty = {"prompt": "a", "chosen": "b", "rejected": " "}
    equal = {"prompt": "a", "chosen": "b", "rejected": "b"}
    sources = write(tmp_path / "pairs.jsonl", [*good[:2], empty, *good[2:], equal, good[0]])
    with pytest.raises(UserErrors) as caught:
        tokenize_sources(sources, chatml, DataConfig(cache_dir=str(tmp_path)), rows="pairs")
    assert "pairs.jsonl:3: rejected: is empty" in str(caught.value)
    assert "pairs.jsonl:6: rejected: is the same as chosen" in str(caught.value)
    data = DataConfig(cache_dir=str(tmp_path), on_bad_row="skip")
    caches = tokenize_sources(sources, chatml, data, rows="pairs", rejects_dir=tmp_path / "run")
    rejects = [json.loads(line) for line in (tmp_path / "run" / "rejects.jsonl").read_text().splitlines()]
    assert [(reject["line"], reject["key"]) for reject in rejects] == [(3, "rejected"), (6, "rejected")]
    for drop, samples in ((False, 5), (True, 4)):
        _, (stats,) = sample_table(caches, sources, max_length=100, truncation="drop", seed=0, drop_duplicates=drop)
        assert (stats.rows, stats.bad_rows, stats.samples, stats.duplicates) == (7, 2, samples, 1)


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
    data = PackedDataset(made, row_length=64, global_batch_size=2, seed=0, rows="pairs")
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


# ---- real files -----------------------------------------------------------------------------------------------------


@pytest.mark.acceptance
@pytest.mark.parametrize(
    ("name", "count", "sides"),
    [
        ("data/llama-factory-demo/dpo_en_demo.json", 300, lambda v: (v["chosen"]["value"], v["rejected"]["value"])),
        (
            "data/llama-factory-demo/v1_dpo_demo.jsonl",
            10,
            lambda v: tuple(v[f"{side}_messages"][-1]["content"][0]["value"] for side in ("chosen", "rejected")),
        ),
        ("bench/pref.jsonl", 128, lambda v: (v["chosen"][-1]["content"], v["rejected"][-1]["content"])),
    ],
)
def test_real_pairs(
    shared: Path, tmp_path: Path, chatml: Tokenizer, name: str, count: int, sides: Callable[[Any], tuple[str, str]]
) -> None:
    """Every pair of the file is a sample whose trained tokens say its two answers, with one prompt; none is lost."""
    text = (shared / name).read_text(encoding="utf-8")
    values = json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.split("\n") if line]
    assert len(values) == count
    sources = {"data.train.0": SourceConfig(path=str(shared / name))}
    caches = tokenize_sources(sources, chatml, DataConfig(cache_dir=str(tmp_path)), rows="pairs")
    made, (stats,) = sample_table(caches, sources, max_length=100_000, truncation="drop", seed=0)
    assert (stats.rows, stats.samples, stats.bad_rows, stats.left_out, stats.dropped) == (count, count, 0, 0, {})
    for number, value in enumerate(values):
        chosen, rejected = made.segments(number)
        assert tuple(answer_of(*side, chatml) for side in (chosen, rejected)) == tuple(map(str.strip, sides(value)))
        prompt, other = (ids[: weights.argmax()] for ids, weights in (chosen, rejected))
        assert np.array_equal(prompt, other) and len(prompt) > 1


def answer_of(ids: np.ndarray, weights: np.ndarray, tokenizer: Tokenizer) -> str:
    """What is trained, without the stop token."""
    return tokenizer.decode(ids[weights > 0].tolist()).removesuffix("<|im_end|>").strip()
