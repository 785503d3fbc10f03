"""Rankings to pairs of answers: which pairs, what is left out and counted, what is refused; from files to samples."""

import json
import math
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from posttrain.config import DataConfig, Pairs, SourceConfig
from posttrain.data.files import BadRow, Record
from posttrain.data.formats import read_record, read_rows
from posttrain.data.pairs import encode_pairs
from posttrain.data.rankings import ALL_EQUAL, UNRANKED, choose_pairs
from posttrain.data.rows import Row
from posttrain.data.samples import sample_table
from posttrain.data.sources import tokenize_sources
from posttrain.data.split import split_heldout
from posttrain.errors import UserErrors
from tests.data.chat_cases import load

USER = {"role": "user", "content": "Hi"}


def said(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def made(value: dict[str, Any], **source: Any) -> tuple[list[Row], dict[str, int]]:
    """(the rows, what is left out)"""
    rows, left_out = read_record(Record("r.jsonl", 7, value), SourceConfig(**source))
    assert not [str(row) for row in rows if isinstance(row, BadRow)]
    assert all((row.file, row.line) == ("r.jsonl", 7) for row in rows)
    return [row for row in rows if isinstance(row, Row)], dict(left_out)


def pairs(value: dict[str, Any], **source: Any) -> list[tuple[str, str]]:
    """(chosen, rejected) of each pair of strings."""
    rows, _ = made(value, **source)
    assert {(row.kind, row.prompt, row.messages) for row in rows} <= {("preference", value["prompt"], ())}
    return [(row.completion, row.rejected) for row in rows]


def bad(value: dict[str, Any], **source: Any) -> BadRow:
    (row,), left_out = read_record(Record("r.jsonl", 7, value), SourceConfig(**source))
    assert isinstance(row, BadRow), row
    assert (row.file, row.line) == ("r.jsonl", 7) and not left_out
    return row


def strings(**columns: Any) -> dict[str, Any]:
    return {"prompt": "Hi", "completions": ["a", "b", "c"], **columns}


# ---- which pairs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"scores": [1, 3, 2.5]}, [("b", "a"), ("b", "c"), ("c", "a")]),
        ({"ranks": [1, 3, 2]}, [("a", "b"), ("a", "c"), ("c", "b")]),
        ({"scores": [2, 1, 2.0]}, [("a", "b"), ("c", "b")]),  # equals give no pair
        ({"ranks": [0, 0, 1]}, [("a", "c"), ("b", "c")]),
        ({"scores": [-1, None, 10**12]}, [("c", "a")]),
        ({"ranks": [None, 2.0, 1.0]}, [("c", "b")]),  # as a table has whole numbers beside nulls
        ({"scores": [0.1, 0.2, 0.3], "label": True, "id": 3}, [("b", "a"), ("c", "a"), ("c", "b")]),
    ],
)
def test_better_answers_are_chosen(columns: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert sorted(pairs(strings(**columns))) == expected
    assert sorted(pairs(strings(**columns), format="ranking")) == expected


@pytest.mark.parametrize(
    ("ranks", "which", "expected"),
    [
        ([0, 1, 2, 3], "all", [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]),
        ([3, 1, 0, 2], "neighbours", [(1, 3), (2, 1), (3, 0)]),
        ([3, 1, 0, 2], "best_worst", [(2, 0)]),
        ([5, 0, 5, 0], "all", [(1, 0), (1, 2), (3, 0), (3, 2)]),
        ([5, 0, 5, 0], "neighbours", [(1, 0), (1, 2), (3, 0), (3, 2)]),
        ([5, 0, 5, 0], "best_worst", [(1, 0)]),
        ([-2.5, 7, -2.5, 1], "neighbours", [(0, 3), (2, 3), (3, 1)]),
        ([1, 1, 1], "all", []),
        ([1, 1, 1], "neighbours", []),
        ([1, 1, 1], "best_worst", []),
    ],
)
def test_which_pairs(ranks: list[float], which: Pairs, expected: list[tuple[int, int]]) -> None:
    assert choose_pairs(ranks, which) == expected


def test_pairs_of_random_rankings() -> None:
    """Against the definitions: any two unequal ones, and of those the ones with nothing between."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        ranks = rng.integers(0, 5, rng.integers(2, 8)).tolist()
        every = {(i, j) if ranks[i] < ranks[j] else (j, i) for i, j in combinations(range(len(ranks)), 2)}
        every = {(i, j) for i, j in every if ranks[i] != ranks[j]}
        near = {(i, j) for i, j in every if not any(ranks[i] < rank < ranks[j] for rank in ranks)}
        assert set(choose_pairs(ranks, "all")) == every
        assert set(choose_pairs(ranks, "neighbours")) == near
        best_worst = choose_pairs(ranks, "best_worst")
        assert [(ranks[i], ranks[j]) for i, j in best_worst] == [(min(ranks), max(ranks))] * bool(every)


@pytest.mark.parametrize(("which", "count"), [("all", 3), ("best_worst", 1), ("neighbours", 2)])
def test_pairs_by_config(which: Pairs, count: int) -> None:
    found = pairs(strings(scores=[1, 3, 2]), pairs=which)
    assert len(found) == count and set(found) <= {("b", "a"), ("b", "c"), ("c", "a")}


def test_margins_only_where_asked_for() -> None:
    value = strings(scores=[1, 3, 2.5])
    assert {row.margin for row in made(value)[0]} == {None}
    rows, _ = made(value, margins=True)
    assert {(row.completion, row.rejected): row.margin for row in rows} == {
        ("b", "a"): 2.0,
        ("b", "c"): 0.5,
        ("c", "a"): 1.5,
    }


# ---- conversations --------------------------------------------------------------------------------------------------


def test_conversations() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    value = {"prompt": [USER], "completions": [[said("a")], said("b"), [said("c")]], "scores": [1, 3, 2]}
    rows, left_out = made({**value, "tools": tools, "chat_template_kwargs": {"x": 1}})
    found = [(row.messages[1]["content"], row.rejected_messages[1]["content"]) for row in rows]
    assert found == [("b", "a"), ("b", "c"), ("c", "a")] and left_out == {}
    for row in rows:
        assert (row.kind, row.prompt_length, len(row.messages)) == ("preference", 1, 2)
        assert row.messages[0] == row.rejected_messages[0] == USER
        assert list(row.tools) == tools and row.template_kwargs == {"x": 1}
    assert rows[1].keys == ("prompt[0]", "completions[1]") and rows[1].origin == "completions[1]"
    assert rows[1].rejected_keys == ("prompt[0]", "completions[2][0]")


def test_completions_that_repeat_the_prompt() -> None:
    value = {"prompt": [USER], "completions": [[USER, said("a")], [USER, said("b")]], "ranks": [1, 0]}
    ((row,), _) = made(value)
    assert (row.messages, row.rejected_messages) == ((USER, said("b")), (USER, said("a")))
    assert row.keys == ("prompt[0]", "completions[1][1]")


def test_columns_by_other_names() -> None:
    value = {"question": "Hi", "answers": ["a", "b"], "reward": [0, 1]}
    names = {"prompt": "question", "completions": "answers", "scores": "reward"}
    ((row,), _) = made(value, columns=names)
    assert (row.prompt, row.completion, row.rejected) == ("Hi", "b", "a")
    assert bad({**value, "answers": ["a", ""]}, columns=names).key == "answers[1]"
    assert bad({**value, "reward": [0, "1"]}, columns=names).key == "reward[1]"


def test_a_ranking_and_something_else() -> None:
    refused = bad(strings(scores=[1, 2, 3], labels=[True, True, False]))
    assert "of several forms (ranking, stepwise_supervision)" in refused.reason
    assert "of several forms (messages, ranking)" in bad(strings(scores=[1, 2, 3], messages=[USER])).reason
    refused = bad(strings(), format="ranking")
    assert refused.key == "scores" and "prompt + completions + scores | prompt + completions + ranks" in refused.reason
    (row,), _ = made(strings(scores=None))
    assert row.kind == "prompt"


# ---- for supervised fine-tuning -------------------------------------------------------------------------------------


def test_the_best_answer_once() -> None:
    ((row,), _) = made(strings(scores=[1, 3, 3]), preference="chosen", pairs="all")
    assert row == Row("r.jsonl", 7, "prompt_completion", prompt="Hi", completion="b")
    value = {"prompt": [USER], "completions": [[said("a")], [said("b")]], "ranks": [5, 2]}
    ((row,), _) = made(value, preference="chosen")
    assert (row.kind, row.messages, row.prompt_length) == ("prompt_completion", (USER, said("b")), 1)
    assert row.keys == ("prompt[0]", "completions[1][0]") and row.rejected_messages == row.rejected_keys == ()
    ((row,), left_out) = made(strings(scores=[2, 2, None]), preference="chosen")
    assert row.completion == "a" and left_out == {UNRANKED: 1}


# ---- left out, and counted ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"scores": [2, 2, 2]}, {ALL_EQUAL: 1}),
        ({"ranks": [0, 0, 0]}, {ALL_EQUAL: 1}),
        ({"scores": [None, 1, None]}, {UNRANKED: 3}),
        ({"scores": [None, 1, 1]}, {UNRANKED: 1, ALL_EQUAL: 1}),
        ({"ranks": [None, None, None]}, {UNRANKED: 3}),
    ],
)
def test_rankings_without_a_preference(columns: dict[str, Any], expected: dict[str, int]) -> None:
    assert made(strings(**columns)) == ([], expected)


def test_answers_without_a_score() -> None:
    rows, left_out = made(strings(scores=[1, None, 2]))
    assert [(row.completion, row.rejected) for row in rows] == [("c", "a")] and left_out == {UNRANKED: 1}


# ---- bad input ------------------------------------------------------------------------------------------------------

TALKS = {"prompt": [USER], "completions": [[said("a")], [said("b")]], "scores": [1, 2]}


@pytest.mark.parametrize(
    ("value", "key", "reason"),
    [
        (strings(scores=[1, 2]), "scores", "has 2 numbers for 3 answers; fix: one for each, null where"),
        (strings(ranks=[1, 2, 3, 4]), "ranks", "has 4 numbers for 3 answers"),
        (strings(scores=[1, 2, 3], ranks=[2, 1, 0]), "ranks", "the row has scores too; fix: keep one of them"),
        (strings(scores=3), "scores", "must be a list of numbers, one for each answer, not a number"),
        (strings(scores={"a": 1}), "scores", "must be a list of numbers, one for each answer, not an object"),
        (strings(scores=[1, "2", 3]), "scores[1]", "must be a finite number, not '2'"),
        (strings(scores=[1, True, 3]), "scores[1]", "must be a finite number, not True"),
        (strings(scores=[1, math.nan, 3]), "scores[1]", "must be a finite number, not nan"),
        (strings(scores=[math.inf, 1, 3]), "scores[0]", "must be a finite number, not inf"),
        (strings(scores=[1, -math.inf, 3]), "scores[1]", "must be a finite number, not -inf"),
        (strings(scores=[1, 2, 10**400]), "scores[2]", "must be a number from -1e+30 to 1e+30"),
        (strings(ranks=[1, 0.5, 2]), "ranks[1]", "must be a whole number, not 0.5"),
        (strings(ranks=[True, 1, 2]), "ranks[0]", "must be a finite number, not True"),
        ({**strings(scores=[1]), "completions": ["a"]}, "completions", "must be a list of two answers or more, not 1;"),
        ({**strings(scores=[]), "completions": []}, "completions", "must be a list of two answers or more, not 0"),
        ({**strings(scores=[1]), "completions": "a"}, "completions", "must be a list of two answers or more, not a st"),
        ({**strings(scores=[1, 2]), "completions": ["a", ""]}, "completions[1]", "is empty: there is nothing to train"),
        ({**strings(scores=[1, 2]), "completions": [" \n", "b"]}, "completions[0]", "is empty: there is nothing to t"),
        ({**strings(scores=[1, 2]), "completions": ["a", None]}, "completions[1]", "must be a string, not null"),
        (
            {**strings(scores=[1, 2]), "completions": ["a", [said("b")]]},
            "prompt",
            "must be a list of messages, not a string (prompt and completions: all strings or all lists of messages)",
        ),
        ({**strings(scores=[1, 2]), "completions": ["a", "\ud800"]}, "completions[1]", "has a lone surrogate"),
        ({**strings(scores=[1, 2]), "completions": ["a", "a"]}, "completions[0]", "is the same answer as completions"),
        (strings(scores=[1, 2, 3], tools=[{"name": "f"}]), "tools", "is for the chat template, and a row of strings"),
        ({**TALKS, "prompt": "Hi"}, "prompt", "must be a list of messages, not a string (prompt and completions: all"),
        ({**TALKS, "prompt": []}, "prompt", "has no messages"),
        (
            {**TALKS, "completions": [[said("a")], "b"]},
            "completions[1]",
            "must be a list of messages, not a string (pr",
        ),
        ({**TALKS, "completions": [[said("a")], []]}, "completions[1]", "has no messages"),
        ({**TALKS, "completions": [[said("a")], None]}, "completions[1]", "must be a list of messages, not null"),
        ({**TALKS, "completions": [[said("a")], [said("  ")]]}, "completions[1][0]", "is empty: there is nothing to p"),
        ({**TALKS, "completions": [[said("a")], said("")]}, "completions[1]", "is empty: there is nothing to prefer"),
        (
            {**TALKS, "completions": [[said("a")], [{"role": "assistant", "content": None}]]},
            "completions[1][0].content",
            "missing or null",
        ),
        (
            {**TALKS, "completions": [[said("a")], [said("a")]]},
            "completions[0]",
            "is the same answer as completions[1], and ranked otherwise; fix: leave one of them out",
        ),
        (
            {**TALKS, "completions": [[said("a", weight=0.5)], [said("b")]]},
            "completions[0][0]",
            "weight 0.5 in a rejected answer is not served",
        ),
        ({**TALKS, "tools": "[{}]"}, "tools[0]", "has no function name"),
    ],
)
def test_bad_rankings(value: dict[str, Any], key: str, reason: str) -> None:
    refused = bad(value)
    assert refused.key == key and refused.reason.startswith(reason)


def test_ranks_tell_no_margin() -> None:
    refused = bad(strings(ranks=[1, 2, 3]), margins=True)
    assert refused.key == "ranks" and refused.reason.startswith("ranks say no margin, and the source's margins is true")


def test_equal_answers_with_equal_scores_are_two_of_a_kind() -> None:
    assert pairs({**strings(scores=[2, 2, 1]), "completions": ["a", "a", "b"]}) == [("a", "b"), ("a", "b")]


def test_all_problems_of_a_ranking_at_once() -> None:
    value = {"prompt": "", "completions": ["a", "", " "], "scores": [1, math.nan], "ranks": [1], "images": ["x.png"]}
    assert str(bad(value)) == (
        "r.jsonl:7: images: images, audio and video are not served; fix: rows of text only (also: ranks: the row has "
        "scores too; scores: has 2 numbers for 3 answers; scores[1]: must be a finite number, not nan; and 2 more)"
    )


def test_a_table(tmp_path: Path) -> None:
    """Parquet can hold NaN, which JSON cannot, and whole numbers as floats."""
    values = [
        {"prompt": "p", "completions": ["a", "b"], "ranks": [1.0, None]},
        {"prompt": "p", "completions": ["a", "b"], "ranks": [1.0, 0.0]},
        {"prompt": "p", "completions": ["a", "b"], "ranks": [math.nan, 0.0]},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), tmp_path / "rows.parquet")
    row, refused = read_rows(str(tmp_path / "rows.parquet"))
    assert isinstance(row, Row) and (row.line, row.completion, row.rejected) == (2, "b", "a")
    assert isinstance(refused, BadRow) and (refused.line, refused.key) == (3, "ranks[0]")


# ---- from files to samples ------------------------------------------------------------------------------------------


def ranking(number: int, scores: list[Any]) -> dict[str, Any]:
    answers = [[said(f"Answer {number} {letter}.")] for letter in "abcdefgh"[: len(scores)]]
    return {"prompt": [{"role": "user", "content": f"Question {number}?"}], "completions": answers, "scores": scores}


def data(tmp_path: Path, **values: Any) -> DataConfig:
    return DataConfig(cache_dir=str(tmp_path / "cache"), **values)


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_heldout_split_keeps_a_ranking_together(tmp_path: Path, name: str) -> None:
    """Also in a JSON list that stands on one line."""
    values = [ranking(number, [3, 1, 2]) for number in range(30)]
    text = json.dumps(values) if name == "rows.json" else "\n".join(map(json.dumps, values))
    (tmp_path / name).write_text(text)
    sources = {"data.train.0": SourceConfig(path=str(tmp_path / name))}
    tokenizer = load("chatml")
    caches = tokenize_sources(sources, tokenizer, data(tmp_path), rows="pairs", part_bytes=500)
    table, (stats,) = sample_table(caches, sources, max_length=100, truncation="drop", seed=0)
    assert (stats.rows, stats.samples, stats.left_out, len(table)) == (30, 90, 0, 90)
    assert table.first_of_row().tolist() == [first for first in range(0, 90, 3) for _ in range(3)]
    marked = split_heldout(table, 0.2, seed=0)
    assert marked.sum() == 18 and {of.sum() for of in marked.reshape(30, 3)} == {0, 3}
    texts = [tokenizer.decode(table.segments(sample)[0][0].tolist()) for sample in range(90)]
    assert all(f"Question {sample // 3}?" in text for sample, text in enumerate(texts))


def test_what_rankings_leave_out_is_counted(tmp_path: Path) -> None:
    values = [
        ranking(0, [1, 2]),
        ranking(1, [1, 1]),  # all equal
        ranking(2, [None, 1, 2, None]),
        ranking(3, [None, None]),
        ranking(0, [1, 2]),  # the same pair again
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, values)))
    sources = {"data.train.0": SourceConfig(path=str(path))}
    caches = tokenize_sources(sources, load("chatml"), data(tmp_path), rows="pairs")
    for drop, samples in ((False, 3), (True, 2)):
        _, (stats,) = sample_table(caches, sources, max_length=100, truncation="drop", seed=0, drop_duplicates=drop)
        assert (stats.rows, stats.samples, stats.left_out, stats.bad_rows) == (5, samples, 2, 0)
        assert stats.notes == {ALL_EQUAL: 1, UNRANKED: 4} and stats.duplicates == 1


def test_a_ranking_that_fails_is_one_bad_row(tmp_path: Path) -> None:
    """All of its pairs fail alike, for their prompt; the rows around it are used."""
    values = [ranking(0, [1, 2, 3, 4]), ranking(1, [1, 2, 3, 4]), ranking(2, [1, 2])]
    values[1]["chat_template_kwargs"] = {"add_generation_prompt": True}
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, values)))
    sources = {"data.train.0": SourceConfig(path=str(path))}
    with pytest.raises(UserErrors) as caught:
        tokenize_sources(sources, load("chatml"), data(tmp_path), rows="pairs")
    assert str(caught.value).count("rows.jsonl:2: chat_template_kwargs.add_generation_prompt: is set by the rend") == 1
    (cache,) = tokenize_sources(sources, load("chatml"), data(tmp_path, on_bad_row="skip"), rows="pairs")[
        "data.train.0"
    ]
    assert (cache.rows, cache.bad_rows, cache.num_samples) == (3, 1, 7)


def test_a_bad_answer_is_told_by_its_place() -> None:
    """What only the encoding finds: the stop token in a text, on either side."""
    value = {"prompt": [USER], "completions": [[said("ok")], [said("no<|im_end|>")], [said("or")]], "ranks": [0, 1, 2]}
    rows, _ = made(value)
    outcomes = encode_pairs(rows, load("chatml"))
    assert [bad.key for bad in outcomes if isinstance(bad, BadRow)] == ["completions[1][0].content"] * 2
    value["completions"][0] = [said("ok<|im_end|>")]
    (refused, *_) = encode_pairs(made(value)[0], load("chatml"))
    assert isinstance(refused, BadRow) and refused.key == "completions[0][0].content"
    assert "(also: completions[1][0].content: holds the stop token" in refused.reason


def test_best_answers_train_as_one_sample_each(tmp_path: Path) -> None:
    values = [ranking(number, [1, 3, 2]) for number in range(4)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, values)))
    sources = {"data.train.0": SourceConfig(path=str(path), preference="chosen")}
    tokenizer = load("chatml")
    (cache,) = tokenize_sources(sources, tokenizer, data(tmp_path))["data.train.0"]
    texts = [
        tokenizer.decode(cache.tokens[a:b].tolist()) for a, b in zip(cache.offsets, cache.offsets[1:], strict=False)
    ]
    assert len(texts) == 4 and all(f"Answer {number} b." in text for number, text in enumerate(texts))
    plain = {"data.train.0": SourceConfig(path=str(path))}
    with pytest.raises(UserErrors, match="is a preference pair; fix: the source's preference: chosen"):
        tokenize_sources(plain, tokenizer, data(tmp_path))
