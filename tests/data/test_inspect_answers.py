"""`inspect` of pairs and labelled answers: what is shown is what is trained on, what is counted is what is there."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from posttrain.data.inspect import Inspection, InspectOptions
from posttrain.data.inspect_answers import LABELS, PAIRS, Answers, length_bias, measure
from posttrain.data.inspect_lengths import answer_histogram, answer_table, answers_text, lengths_text, packing_text
from posttrain.data.inspect_rows import ShownSample, parts
from posttrain.data.inspect_samples import TRAINED_ON
from posttrain.data.inspect_summary import headline, notices, source_table
from posttrain.data.stats import DUPLICATE, OVER_LIMIT, TRUNCATED_AWAY
from posttrain.errors import UserErrors
from tests.data.inspect_cases import (
    ALIKE,
    BAD_PAIRS,
    CONTRADICTED,
    FIXTURE,
    HOSTILE_PAIR,
    LOST,
    MAX_LENGTH,
    SIDE_CUT,
    inspected_answers,
    make_config,
    write_labelled,
    write_pairs,
)

HF = AutoTokenizer.from_pretrained(str(FIXTURE))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inspect")


@pytest.fixture(scope="module")
def rows(directory: Path) -> list[dict[str, Any]]:
    return write_pairs(directory)


@pytest.fixture(scope="module")
def pairs(directory: Path, rows: list[dict[str, Any]]) -> Inspection:
    return inspected_answers(directory, "sigmoid", "answers.jsonl")


@pytest.fixture(scope="module")
def labelled_rows(directory: Path) -> list[dict[str, Any]]:
    return write_labelled(directory)


@pytest.fixture(scope="module")
def labelled(directory: Path, labelled_rows: list[dict[str, Any]]) -> Inspection:
    return inspected_answers(directory, "kto", "labelled.jsonl")


def ids(text: str) -> list[int]:
    return HF(text, add_special_tokens=False)["input_ids"]


def rendered(prompt: list[dict[str, str]], answer: list[dict[str, str]]) -> tuple[list[int], int, int]:
    """(ids of ChatML by hand, tokens of the prompt, trained tokens), by `transformers` alone."""
    fed = f"<|im_start|>user\n{prompt[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
    stopped = f"{fed}{answer[0]['content']}<|im_end|>"
    return ids(f"{stopped}\n"), len(ids(fed)), len(ids(stopped)) - len(ids(fed))


def by_line(inspection: Inspection) -> dict[int, ShownSample]:
    return {sample.line: sample for sample in inspection.samples}


def used_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that become pairs to train on."""
    return [row for line, row in enumerate(rows, 1) if line not in BAD_PAIRS and line != LOST]


def trained_lengths(rows: list[dict[str, Any]], side: str) -> list[int]:
    """Trained tokens of an answer of every usable row, truncated."""
    made = [rendered(row["prompt"], row[side]) for row in used_rows(rows)]
    return [min(trained, MAX_LENGTH - prompt) for _, prompt, trained in made]


# ---- pairs ----------------------------------------------------------------------------------------------------------


def test_sides_are_what_transformers_renders(rows: list[dict[str, Any]], pairs: Inspection) -> None:
    shown = by_line(pairs)
    assert set(shown) == set(range(1, 28)) - BAD_PAIRS.keys()
    for line, sample in shown.items():
        for side, segment in zip(PAIRS, sample.segments, strict=True):
            whole, prompt, trained = rendered(rows[line - 1]["prompt"], rows[line - 1][side])
            kept = whole if line == LOST else whole[:MAX_LENGTH]
            assert segment.tokens.tolist() == kept
            weights = [0.0] * prompt + [1.0] * trained + [0.0] * (len(whole) - prompt - trained)
            assert segment.loss_weights.tolist() == weights[: len(kept)], (
                "the stop token is trained, the newline is not"
            )


def test_what_becomes_of_pairs(pairs: Inspection) -> None:
    shown = by_line(pairs)
    assert [reject.line for reject in pairs.rejects] == list(BAD_PAIRS)
    for reject, words in zip(pairs.rejects, BAD_PAIRS.values(), strict=True):
        assert words in reject.reason
    flags = {line: set(sample.flags) - {"held out"} for line, sample in shown.items()}
    expected = {line: {"duplicate"} for line in ALIKE} | {SIDE_CUT: {"truncated"}, LOST: {"dropped"}}
    assert flags == {line: expected.get(line, set()) for line in shown}
    chosen, rejected = shown[SIDE_CUT].segments
    assert (chosen.cut_behind, rejected.cut_behind > 100) == (0, True), "only the side that lost tokens is marked"
    assert shown[LOST].fate == TRUNCATED_AWAY and {side.border for side in shown[LOST].segments} == {MAX_LENGTH}
    assert [shown[line].margin for line in (4, 5, 6)] == [0.5, 2.5, 0.0]
    assert json.loads(shown[HOSTILE_PAIR].raw)["rejected"][0]["content"] == "No."


def test_prompt_once_and_both_answers(rows: list[dict[str, Any]], pairs: Inspection) -> None:
    for line, sample in by_line(pairs).items():
        made = parts(sample, pairs.tokenizer)
        assert [part.name for part in made] == ["prompt", "chosen", "rejected"]
        tokens = [[id for piece in part.pieces for id in piece.ids] for part in made]
        assert [tokens[0] + answer for answer in tokens[1:]] == [side.tokens.tolist() for side in sample.segments]
        weights = [part.weights.tolist() for part in made]
        assert [weights[0] + answer for answer in weights[1:]] == [s.loss_weights.tolist() for s in sample.segments]
        assert not any(weights[0]) and all(answer[0] == 1 for answer in weights[1:])
        question = rows[line - 1]["prompt"][0]["content"]
        text = "".join(piece.text for piece in made[0].pieces)
        assert text == f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def test_sides_cut_at_different_places_share_no_prompt(directory: Path, pairs: Inspection) -> None:
    found = inspected_answers(directory, "sigmoid", "answers.jsonl", truncation="keep_end")
    shown = by_line(found)
    cut = parts(shown[SIDE_CUT], found.tokenizer)
    assert [part.name for part in cut] == ["chosen", "rejected"]
    assert [part.cut_before > 0 for part in cut] == [False, True]
    for part, segment in zip(cut, shown[SIDE_CUT].segments, strict=True):
        assert [id for piece in part.pieces for id in piece.ids] == segment.tokens.tolist()
    assert [part.name for part in parts(shown[1], found.tokenizer)] == ["prompt", "chosen", "rejected"]


def test_lengths_of_answers(rows: list[dict[str, Any]], pairs: Inspection) -> None:
    answers = pairs.answers
    assert answers is not None
    chosen, rejected = (trained_lengths(rows, side) for side in PAIRS)
    assert answers.trained["chosen"].tolist() == chosen and answers.trained["rejected"].tolist() == rejected
    assert answers.prompts.tolist() == [rendered(row["prompt"], row["chosen"])[1] for row in used_rows(rows)]
    longer = [c > r for c, r in zip(chosen, rejected, strict=True)]
    shorter = [c < r for c, r in zip(chosen, rejected, strict=True)]
    assert answers.longer == (sum(longer), sum(shorter)) and sum(longer) > 0 < sum(shorter)
    table = answer_table(pairs)
    assert table is not None
    cells = {cells[0][0]: [text for text, _ in cells[1:]] for cells in table.rows}
    assert cells["Chosen answers"][0] == f"{np.mean(chosen):,.1f}" and cells["Chosen answers"][-1] == str(max(chosen))
    assert cells["Rejected answers"][2] == str(sorted(rejected)[(len(rejected) - 1) // 2])
    histogram = answer_histogram(pairs)
    for counts, lengths in zip(histogram.counts, (chosen, rejected), strict=True):
        buckets = zip(histogram.edges, histogram.edges[1:], strict=False)
        assert list(counts) == [sum(a <= n < b for n in lengths) for a, b in buckets] and sum(counts) == len(lengths)


def test_words_on_pairs(rows: list[dict[str, Any]], pairs: Inspection) -> None:
    assert pairs.answers is not None and pairs.datasets is not None
    text = answers_text(pairs)
    longer, shorter = pairs.answers.longer
    assert f"the longer one in {round(100 * longer / 24)}% of 24 pairs" in text
    assert f"rejected one in {round(100 * shorter / 24)}%" in text
    assert "answer 22 different prompts" in text
    assert "Margins, in 3 pairs: from 0.5 to 2.5, 1.83 on average" in text
    sides = [rendered(row["prompt"], row[side])[0] for row in rows[:20] + rows[22:] for side in PAIRS]
    over = sum(len(side) > MAX_LENGTH for side in sides)
    assert over == 3 and lengths_text(pairs).endswith("3 are over data.max_length = 128: 1 chosen, 2 rejected.")
    assert pairs.lengths.tolist() == sorted(map(len, sides))
    train = pairs.datasets.train
    assert f"{train.num_rows} rows of 256 tokens hold {train.num_samples} pairs" in packing_text(pairs)
    assert headline(pairs)[0][:2] == ("Pairs per epoch", str(train.num_samples))
    columns = source_table(pairs)
    assert dict(zip(columns.columns, columns.rows[0], strict=True))["Pairs"][0] == "24"


def test_what_needs_attention_in_pairs(pairs: Inspection) -> None:
    assert pairs.answers is not None and pairs.answers.contradictions == len(CONTRADICTED) == 2
    found = [notice.text for notice in notices(pairs)]
    assert any(text.startswith("2 pairs contradicted") for text in found)
    assert any(text.startswith("1 pair (4.0%) with a side longer than data.max_length = 128") for text in found)
    assert any(text.startswith("1 pair (4.0%) left out: without a token") for text in found)
    assert any(text.startswith("1 pair (4.0%) exactly like an earlier one") for text in found)
    assert any("2 of 27 rows" in text and "the same as chosen" in text for text in found)
    assert any(text.startswith("The rejected answer is the longer one in 79% of the pairs") for text in found)


def test_length_bias(directory: Path, pairs: Inspection) -> None:
    def answers(chosen: int, rejected: int, equal: int = 0) -> Answers:
        assert pairs.answers is not None
        lengths = np.array([[2, 1]] * chosen + [[1, 2]] * rejected + [[1, 1]] * equal)
        return replace(pairs.answers, trained={"chosen": lengths[:, 0], "rejected": lengths[:, 1]})

    found = [length_bias(answers(*counts)) for counts in ((60, 40), (59, 41), (40, 60, 900), (4, 1), (9, 1), (0, 0, 5))]
    assert found == ["", "", "", "", "chosen", ""]
    assert length_bias(answers(61, 39)) == "chosen" and length_bias(answers(390, 610)) == "rejected"
    told = [{"prompt": f"{i} is", "chosen": " one more than that.", "rejected": " it."} for i in range(20)]
    (directory / "long.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in told))
    biased = inspected_answers(directory, "sigmoid", "long.jsonl")
    assert any("chosen answer is the longer one in 100%" in notice.text for notice in notices(biased))


def test_packed_pairs_are_those_of_training(pairs: Inspection) -> None:
    assert pairs.datasets is not None
    train = pairs.datasets.train
    assert any(len(row.samples) > 1 for row in pairs.packed)
    for row in pairs.packed:
        batch = train.read(row.step, np.array([row.row]))
        segments = [segment for sample in row.samples for segment in sample.segments]
        assert batch.tokens[0, : row.tokens].tolist() == [id for segment in segments for id in segment.tokens.tolist()]
        weights = [weight for segment in segments for weight in segment.loss_weights.tolist()]
        assert batch.loss_weights[0, : row.tokens].tolist() == weights and not batch.tokens[0, row.tokens :].any()
        assert [sample.names for sample in row.samples] == [PAIRS] * len(row.samples)
        assert batch.sides[0, : len(segments)].tolist() == [1, -1] * len(row.samples)


def test_find_looks_at_both_sides(directory: Path, pairs: Inspection) -> None:
    for text, lines in (("NO 😀 IDEA 7", {8}), ("hostile?", {27}), ("gone.", {24})):
        found = inspected_answers(directory, "sigmoid", "answers.jsonl", InspectOptions(find=text))
        assert {sample.line for sample in found.samples} == lines


def test_many_pairs_are_measured_in_part(pairs: Inspection) -> None:
    some = measure(pairs.train_files, PAIRS, most=8)
    assert len(some.prompts) == len(some.trained["chosen"]) == 8 and some.counts["chosen"] == 24
    assert "Lengths are those of 8 of 24 pairs" in answers_text(replace_answers(pairs, some))


def replace_answers(inspection: Inspection, answers: Answers) -> Inspection:
    """An inspection that has measured something else."""
    other = replace(inspection)
    other.__dict__["answers"] = answers
    return other


def test_a_row_must_hold_a_pair(directory: Path, rows: list[dict[str, Any]]) -> None:
    with pytest.raises(UserErrors, match=r"data.row_length = 200.*must hold a pair"):
        inspected_answers(directory, "sigmoid", "answers.jsonl", row_length=200)


# ---- what is left out on purpose ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "drop", "expected"),
    [
        (None, True, {DUPLICATE: 1}),
        (9, False, {OVER_LIMIT: 15}),
        (23, True, {OVER_LIMIT: 1, DUPLICATE: 1}),
        (9, True, {OVER_LIMIT: 15, DUPLICATE: 1}),
        (2, True, {OVER_LIMIT: 22}),
    ],
)
def test_the_limit_is_told_from_duplicates(
    directory: Path, rows: list[dict[str, Any]], limit: int | None, drop: bool, expected: dict[str, int]
) -> None:
    source = {"path": str(directory / "answers.jsonl"), "limit": limit}
    found = inspected_answers(directory, "sigmoid", "answers.jsonl", train=[source], drop_duplicates=drop)
    fates = Counter(sample.fate for sample in found.samples)
    assert {reason: fates[reason] for reason in (OVER_LIMIT, DUPLICATE) if fates[reason]} == expected
    assert {reason: n for reason, n in found.stats[0].dropped.items() if reason != TRUNCATED_AWAY} == expected
    for sample in found.samples:
        assert ("left out" in sample.flags) == (sample.fate in (OVER_LIMIT, DUPLICATE))
        assert sample.fate != DUPLICATE or sample.line == max(ALIKE), "the later one of two that are alike"
    assert found.datasets is not None and fates[TRAINED_ON] == len(found.datasets.train.table)


# ---- labelled answers -----------------------------------------------------------------------------------------------


def test_labels(labelled_rows: list[dict[str, Any]], labelled: Inspection) -> None:
    shown = by_line(labelled)
    assert len(shown) == len(labelled_rows)
    for line, row in enumerate(labelled_rows, 1):
        sample = shown[line]
        (segment,) = sample.segments
        whole, prompt, trained = rendered(row["prompt"], row["completion"])
        assert segment.tokens.tolist() == whole
        assert segment.loss_weights.nonzero()[0].tolist() == list(range(prompt, prompt + trained))
        assert (LABELS[0] in sample.flags, LABELS[1] in sample.flags) == (row["label"], not row["label"])


def test_lengths_by_label(labelled_rows: list[dict[str, Any]], labelled: Inspection) -> None:
    answers = labelled.answers
    assert answers is not None
    for kind, label in zip(LABELS, (True, False), strict=True):
        wanted = [row for row in labelled_rows if row["label"] is label]
        assert answers.counts[kind] == len(wanted)
        assert answers.trained[kind].tolist() == [rendered(row["prompt"], row["completion"])[2] for row in wanted]
    assert answers.counts == {"desirable": 8, "undesirable": 16}
    assert answers_text(labelled).startswith("Of 24 answers 8 (33%) are desirable and 16 (67%) are undesirable.")
    assert answers.contradictions == 2
    assert any(notice.text.startswith("2 samples contradicted") for notice in notices(labelled))
    table = answer_table(labelled)
    assert table is not None
    assert [cells[0][0] for cells in table.rows] == ["Prompts", "Desirable answers", "Undesirable answers"]


def test_packed_answers_with_mismatched_ones(labelled: Inspection) -> None:
    assert labelled.datasets is not None
    train = labelled.datasets.train
    for row in labelled.packed:
        batch = train.read(row.step, np.array([row.row]))
        segments = [segment for sample in row.samples for segment in sample.segments]
        assert batch.tokens[0, : row.tokens].tolist() == [id for segment in segments for id in segment.tokens.tolist()]
        weights = [weight for segment in segments for weight in segment.loss_weights.tolist()]
        assert batch.loss_weights[0, : row.tokens].tolist() == weights
        kinds = {1: LABELS[0], -1: LABELS[1], 2: "mismatched"}
        names = [name for sample in row.samples for name in sample.names]
        assert [kinds[side] for side in batch.sides[0, : len(segments)].tolist()] == names
        for sample in row.samples:
            prompt, own, other = parts(sample, labelled.tokenizer)
            assert prompt.name == "prompt" and own.pieces != other.pieces


def test_labels_of_one_kind_are_shown(directory: Path) -> None:
    rows = [{"prompt": f"{i} is", "completion": f" {i}", "label": True} for i in range(5)]
    (directory / "good.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    found = inspected_answers(directory, "kto", "good.jsonl", heldout={"fraction": 0})
    assert found.datasets is None and "all 5 labels are true" in found.problem
    assert len(found.samples) == 5 and notices(found)[0].level == "stop"
    assert found.answers is not None and found.answers.counts == {"desirable": 5, "undesirable": 0}
    assert answer_table(found) is not None and answer_histogram(found).counts[1] == (0,) * len(
        answer_histogram(found).edges[1:]
    )


def test_single_samples_have_no_answers(directory: Path, rows: list[dict[str, Any]]) -> None:
    section = make_config(directory).data.model_dump()
    section |= {"train": [{"path": str(directory / "answers.jsonl"), "preference": "chosen"}], "on_bad_row": "skip"}
    found = inspected_answers(directory, "sft", "answers.jsonl", **section)
    assert found.answers is None and answers_text(found) == "" and answer_table(found) is None
    assert all(sample.names == ("",) for sample in found.samples) and found.samples
