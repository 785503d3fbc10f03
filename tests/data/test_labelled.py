"""Labelled answers: from rows to samples, and each prompt with the answer to another."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain.config import DataConfig
from posttrain.data.chat import Sample
from posttrain.data.files import BadRow
from posttrain.data.labelled import NOTE_UNPAIRED, encode_labelled
from posttrain.data.mismatched import with_partners
from posttrain.data.packed import PackedDataset
from posttrain.data.pipeline import build_datasets
from posttrain.data.rows import Row
from posttrain.data.samples import SampleTable, sample_table
from posttrain.data.tokenizer import Tokenizer
from posttrain.errors import UserError
from tests.data.chat_cases import ANSWER, ANSWER_2, LONG, USER, load
from tests.data.fake_caches import fake_cache


@pytest.fixture(scope="module")
def chatml() -> Tokenizer:
    return load("chatml")


def labelled(label: bool, answer: dict = ANSWER) -> Row:
    return Row("kto.jsonl", 3, "unpaired_preference", messages=(USER, answer), prompt_length=1, label=label)


def test_an_answer_is_encoded_as_for_fine_tuning(chatml: Tokenizer) -> None:
    for label in (True, False):
        ((sample,),) = encode_labelled([labelled(label)], chatml)
        assert isinstance(sample, Sample) and sample.label == (1 if label else -1) and sample.split == 0
        whole = chatml._hf.apply_chat_template([USER, ANSWER], return_dict=False)
        fed = chatml._hf.apply_chat_template([USER], add_generation_prompt=True, return_dict=False)
        (trained,) = np.nonzero(sample.loss_weights)
        assert sample.tokens.tolist() == whole and trained[0] == len(fed)
        assert chatml.decode(sample.tokens[trained].tolist()) == ANSWER["content"] + "<|im_end|>"


def test_a_pair_is_two_labelled_answers(chatml: Tokenizer) -> None:
    pair = Row("p.jsonl", 5, "preference", messages=(USER, ANSWER), rejected_messages=(USER, ANSWER_2), prompt_length=1)
    found = encode_labelled([labelled(False), pair, labelled(True, ANSWER_2)], chatml)
    assert [[s.label for s in row] for row in found if isinstance(row, tuple)] == [[-1], [1, -1], [1]]
    chosen, rejected = found[1]
    assert chosen.notes == (NOTE_UNPAIRED,) and rejected.notes == ()
    for sample, answer in ((chosen, ANSWER), (rejected, ANSWER_2)):
        assert sample.tokens.tolist() == chatml._hf.apply_chat_template([USER, answer], return_dict=False)


@pytest.mark.parametrize(
    ("row", "key", "reason"),
    [
        (
            Row("k.jsonl", 1, "messages", messages=LONG),
            "",
            "takes labelled answers; fix: columns prompt, completion and",
        ),
        (labelled(True, {"role": "assistant", "content": " "}), "completion[0].content", "is empty"),
        (
            Row("k.jsonl", 1, "preference", messages=(USER, ANSWER), rejected_messages=(USER, ANSWER), prompt_length=1),
            "rejected",
            "is the same as chosen",
        ),
    ],
)
def test_what_is_no_labelled_answer_is_refused(chatml: Tokenizer, row: Row, key: str, reason: str) -> None:
    (bad,) = encode_labelled([row], chatml)
    assert isinstance(bad, BadRow) and bad.key == key and reason in bad.reason


# ---- answers to other prompts ---------------------------------------------------------------------------------------


def answers(prompts: list[int], lengths: list[int]) -> SampleTable:
    """Samples of a two-token prompt `[100 + p, p]` and an answer of so many tokens, which no other has, all trained."""
    made, first = [], 1000
    for prompt, length in zip(prompts, lengths, strict=True):
        made.append(([100 + prompt, prompt, *range(first, first + length)], [0.0, 0.0] + [1.0] * length))
        first += 100
    cache = fake_cache("kto.jsonl", made, labels=[1 if i % 2 else -1 for i in range(len(made))])
    sources = {"data.train.0": cache_source()}
    table, _ = sample_table({"data.train.0": [cache]}, sources, max_length=12, truncation="keep_start", seed=0)
    return table


def cache_source() -> Any:
    return DataConfig(train=({"path": "kto.jsonl"},)).train[0]


@pytest.mark.parametrize(
    ("prompts", "partners"),
    [
        ([1, 2, 3, 4], [3, 0, 1, 2]),
        ([1, 1, 2, 2, 2, 3], [5, 5, 1, 1, 1, 4]),
        ([1, 2, 2, 1], [2, 0, 0, 2]),
        ([1, 2, 1, 1], [1, 0, 1, 1]),
    ],
)
def test_the_partner_is_the_sample_before_with_another_prompt(prompts: list[int], partners: list[int]) -> None:
    table = answers(prompts, list(range(3, 3 + len(prompts))))
    plain = [table.segments(i)[0] for i in range(len(table))]
    matched = with_partners(table)
    for i, partner in enumerate(partners):
        (own, own_weights), (other, other_weights) = matched.segments(i)
        assert own.tolist() == plain[i][0].tolist() and own_weights.tolist() == plain[i][1].tolist()
        assert other.tolist() == plain[i][0][:2].tolist() + plain[partner][0][2:].tolist()
        assert other_weights.tolist() == [0.0, 0.0] + [1.0] * (len(other) - 2)
        assert prompts[partner] != prompts[i] and matched.lengths[i] == len(own) + len(other)
    assert matched.segment_lengths(np.arange(len(table))).sum() == matched.num_tokens


def test_mismatched_answers_are_truncated_and_taken_last() -> None:
    matched = with_partners(answers([1, 2], [3, 11]))  # 12 tokens at most
    lengths = [[len(ids) for ids, _ in matched.segments(i)] for i in range(2)]
    assert lengths == [[5, 12], [12, 5]] and matched.lengths.tolist() == [17, 17]
    with pytest.raises(ValueError, match="before they are matched"):
        matched.take(np.array([True, False]))
    with pytest.raises(UserError, match=r"all 2 labelled answers have the same prompt.*apo_zero_unpaired"):
        with_partners(answers([1, 1], [3, 4]))


@pytest.mark.parametrize("mismatched", [True, False])
def test_rows_say_what_each_segment_is(mismatched: bool) -> None:
    table = answers([1, 2, 3, 4], [3, 4, 5, 6])
    table = with_partners(table) if mismatched else table
    data = PackedDataset(table, row_length=32, global_batch_size=4, seed=0, shuffle=False, rows="labelled")
    batch = data.read(0, np.arange(4))
    every = 2 if mismatched else 1
    assert batch.sides.shape == (4, every) and data.num_samples == 4
    found = {}
    for row in range(4):
        for segment in range(1, int(batch.segment_ids[row].max()) + 1):
            ids = batch.tokens[row, batch.segment_ids[row] == segment]
            found[ids[1], int(ids[2])] = int(batch.sides[row, segment - 1])
    expected = {(p, 1000 + 100 * (p - 1)): -1 if p % 2 else 1 for p in (1, 2, 3, 4)}
    if mismatched:
        expected |= {(p, 1000 + 100 * ((p - 2) % 4)): 2 for p in (1, 2, 3, 4)}
    assert found == expected


# ---- a run's data ---------------------------------------------------------------------------------------------------


def build(tmp_path: Path, rows: list[dict], **options: Any) -> Any:
    (tmp_path / "kto.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(
        train=({"path": str(tmp_path / "kto.jsonl")},),
        heldout={"fraction": 0.25},
        max_length=64,
        row_length=128,
        cache_dir=str(tmp_path / "cache"),
    )
    arguments = {"global_batch_size": 2, "max_steps": None, "seed": 0, "rejects_dir": None, "rows": "labelled"}
    return build_datasets(data, load("chatml"), **arguments, **options)


def test_labels_reach_the_batches_from_a_file(tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {i}?", "completion": f" It is {i}.", "label": i % 3 == 0} for i in range(24)]
    datasets = build(tmp_path, rows, mismatched=True)
    assert len(datasets.train.table) == 18 and len(datasets.heldout.table) == 6
    sides = [datasets.train.read(step, np.arange(2)).sides for step in range(datasets.train.num_steps)]
    counts = {kind: sum(int((of == kind).sum()) for of in sides) for kind in (1, -1, 2)}
    labels = datasets.train.table.labels()
    assert counts == {1: int((labels == 1).sum()), -1: int((labels == -1).sum()), 2: 18} and 0 < counts[1] < 18


def test_labels_of_one_kind_are_refused(tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {i}?", "completion": f" It is {i}.", "label": True} for i in range(8)]
    with pytest.raises(UserError, match=r"data\.train: all 6 labels are true; answers of both kinds are needed"):
        build(tmp_path, rows)


def test_the_same_answer_with_the_other_label_is_no_duplicate(tmp_path: Path) -> None:
    row = {"prompt": "What?", "completion": " It.", "label": True}
    rows = [row, row, {**row, "label": False}, *({**row, "prompt": f"Which {i}?", "label": False} for i in range(9))]
    (stats,) = build(tmp_path, rows).stats
    assert stats.duplicates == 1
