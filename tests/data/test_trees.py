"""Message trees and HH text to conversations: what is left out, the order, and that each answer is trained once."""

import json
import math
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import pytest

from posttrain.config import DataConfig, SourceConfig
from posttrain.data.files import BadRow, Record
from posttrain.data.formats import read_record, read_rows, to_rows
from posttrain.data.messages import Talk
from posttrain.data.pairs import encode_pairs
from posttrain.data.problems import Problems
from posttrain.data.rankings import ALL_EQUAL, UNRANKED
from posttrain.data.rows import Row
from posttrain.data.samples import sample_table
from posttrain.data.sources import tokenize_sources
from posttrain.data.trees import REMOVED, UNANSWERED, read_hh
from tests.data.chat_cases import load


def node(text: Any, /, *replies: dict[str, Any], **values: Any) -> dict[str, Any]:
    """A message; those whose text is in capitals are the assistant's."""
    return {"text": text, "role": "assistant" if text.isupper() else "prompter", "replies": list(replies), **values}


def read(tree: Any, /, **source: Any) -> tuple[list[Row], dict[str, int]]:
    """(the rows, what is left out)"""
    made, left_out = read_record(Record("t.jsonl", 3, {"prompt": tree, "message_tree_id": "x"}), SourceConfig(**source))
    assert all(isinstance(r, Row) and (r.file, r.line) == ("t.jsonl", 3) for r in made)
    return [r for r in made if isinstance(r, Row)], dict(left_out)


def rows(tree: Any, which: Literal["all", "best"] = "all") -> list[Row]:
    made, _ = read(tree, tree=which)
    assert {r.kind for r in made} <= {"messages"}
    return made


def joined(messages: Sequence[dict[str, Any]]) -> str:
    return " ".join(m["content"] for m in messages)


def told(made: list[Row]) -> list[str]:
    return [joined(r.messages) for r in made]


def weights(made: list[Row]) -> list[tuple[float | None, ...]]:
    return [r.weights for r in made]


TREE = node("q", node("A", node("r", node("B"), node("C")), node("s"), rank=1), node("D", node("t", node("E")), rank=0))


def test_every_path_is_a_row_and_each_answer_has_weight_once() -> None:
    made = rows(TREE)
    assert told(made) == ["q A r B", "q A r C", "q D t E"]
    assert weights(made) == [(None, 1.0, None, 1.0), (0.0, 0.0, 0.0, 1.0), (0.0, 1.0, None, 1.0)]
    assert [m["role"] for m in made[0].messages] == ["user", "assistant", "user", "assistant"]
    assert [made[1].message_key(i) for i in range(4)] == [
        *("prompt", "prompt.replies[0]", "prompt.replies[0].replies[0]", "prompt.replies[0].replies[0].replies[1]"),
    ]


def test_the_best_line_goes_by_rank() -> None:
    (made,) = rows(TREE, "best")
    assert told([made]) == ["q D t E"] and made.weights == ()
    ties = node("q", node("A", rank=1), node("B", rank=None), node("C", rank=0), node("D", rank=0))
    assert told(rows(ties, "best")) == ["q C"]
    assert told(rows(node("q", node("A"), node("B")), "best")) == ["q A"]
    assert told(rows(node("q", node("A"), node("B", rank=7)), "best")) == ["q B"]


def test_what_is_left_out() -> None:
    tree = node(
        "q",
        node("A", node("r", node("B")), deleted=True),
        node("C", node("s", node("D"), review_result=False)),
        node("E", node("t", node("u")), review_result=None, deleted=False),
    )
    assert told(rows(tree)) == ["q C", "q E"]
    assert told(rows(tree, "best")) == ["q C"]
    for empty in (
        node("q"),
        node("q", node("A"), deleted=True),
        node("q", node("A", deleted=True)),
        node("q", node("r")),
    ):
        assert rows(empty) == [] and rows(empty, "best") == []
    assert read(tree) == (rows(tree), {REMOVED: 2, UNANSWERED: 2})
    assert read(node("q", deleted=True)) == ([], {REMOVED: 1})
    assert read(node("q", node("A"), node("r"))) == (rows(node("q", node("A"))), {UNANSWERED: 1})


def test_a_deep_tree() -> None:
    tree = node("A")
    for number in range(3000):
        tree = node("q" if number % 2 == 0 else "B", tree)
    (made,) = rows(tree)
    assert len(made.messages) == 3001


@pytest.mark.parametrize(
    ("tree", "key", "reason"),
    [
        (node("q", node("A", role="narrator")), "prompt.replies[0].role", "unknown role 'narrator'; fix: prompter or"),
        (node("q", node("A", text=None)), "prompt.replies[0].text", "must be a string, not null"),
        (node("q", node("A\ud800")), "prompt.replies[0].text", "has a lone surrogate"),
        (node("q", node("A", rank="1")), "prompt.replies[0].rank", "must be a finite number, not '1'"),
        (
            {"text": "q", "role": "prompter", "replies": {}},
            "prompt.replies",
            "must be a list of messages, not an object",
        ),
        ({"text": "q", "role": "prompter", "replies": [3]}, "prompt.replies[0]", "must be a message with text, role"),
    ],
)
def test_bad_trees(tree: Any, key: str, reason: str) -> None:
    (made,) = to_rows(Record("t.jsonl", 3, {"prompt": tree}), SourceConfig())
    assert isinstance(made, BadRow) and made.key == key and made.reason.startswith(reason)


# ---- pairs of siblings ----------------------------------------------------------------------------------------------


def pairs(tree: Any, /, **source: Any) -> list[tuple[str, str]]:
    """(chosen, rejected) of each pair, each with its prompt."""
    made, _ = read(tree, tree="pairs", **source)
    assert {(r.kind, r.weights, r.margin) for r in made} <= {("preference", (), None)}
    for r in made:
        assert r.messages[:-1] == r.rejected_messages[:-1] and r.prompt_length == len(r.messages) - 1
    return [(joined(r.messages), joined(r.rejected_messages)) for r in made]


def test_siblings_are_paired_behind_the_whole_conversation() -> None:
    tree = node(
        "q",
        node("A", node("r", node("B", rank=1), node("C", rank=0)), rank=1),
        node("D", node("s", node("E")), rank=0),
        node("F", rank=2),
    )
    expected = [("q A", "q F"), ("q D", "q A"), ("q D", "q F"), ("q A r C", "q A r B")]
    assert sorted(pairs(tree)) == sorted(expected)
    assert pairs(tree, pairs="best_worst") == [("q D", "q F"), ("q A r C", "q A r B")]
    assert sorted(pairs(tree, pairs="neighbours")) == [("q A", "q F"), ("q A r C", "q A r B"), ("q D", "q A")]
    made, left_out = read(tree, tree="pairs")
    assert left_out == {UNRANKED: 1}  # E, which nothing is beside
    last = made[-1]
    assert last.keys == (
        "prompt",
        "prompt.replies[0]",
        *["prompt.replies[0].replies[0]" + k for k in ("", ".replies[1]")],
    )
    assert last.rejected_keys[3] == "prompt.replies[0].replies[0].replies[0]" and last.origin == last.keys[3]


def test_only_answers_are_paired() -> None:
    """Prompts that reply to a message are ranked too; and a tree may begin with the assistant."""
    assert pairs(node("A", node("q", rank=0), node("r", node("B", rank=0), node("C", rank=1), rank=1))) == [
        ("A r B", "A r C"),
    ]
    assert pairs(node("q", node("A", rank=0), node("s", rank=1))) == []


def test_what_gives_no_pair_is_counted() -> None:
    tree = node(
        "q",
        node("A", rank=0),
        node("B", rank=None),
        node("C", rank=0),
        node("D", node("r", node("E"), node("F", rank=0)), rank=3, deleted=True),
        node("G", node("s", node("H"), node("I", rank=1), review_result=False), rank=1),
    )
    assert pairs(tree) == [("q A", "q G"), ("q C", "q G")]
    assert read(tree, tree="pairs")[1] == {UNRANKED: 1, REMOVED: 2}
    equal = node("q", node("A", rank=1), node("B", rank=1), node("C"))
    assert read(equal, tree="pairs") == ([], {UNRANKED: 1, ALL_EQUAL: 1})
    assert read(node("q", node("A"), node("B", rank=7)), tree="pairs") == ([], {UNRANKED: 2})
    assert read(node("q"), tree="pairs") == ([], {UNANSWERED: 1})
    assert read(node("q", deleted=True), tree="pairs") == ([], {REMOVED: 1})


def test_the_best_of_siblings_once() -> None:
    tree = node("q", node("A", rank=1), node("B", node("r", node("C", rank=0), node("D", rank=1)), rank=0), node("E"))
    made, left_out = read(tree, tree="pairs", preference="chosen")
    assert told(made) == ["q B", "q B r C"] and left_out == {UNRANKED: 1}
    assert {(r.kind, r.rejected_messages) for r in made} == {("prompt_completion", ())}
    assert [r.prompt_length for r in made] == [1, 3]


@pytest.mark.parametrize(
    ("tree", "key", "reason"),
    [
        (node("q", node("A", rank="1")), "prompt.replies[0].rank", "must be a finite number, not '1'"),
        (node("q", node("A", rank=True)), "prompt.replies[0].rank", "must be a finite number, not True"),
        (node("q", node("A", rank=math.nan)), "prompt.replies[0].rank", "must be a finite number, not nan"),
        (
            node("q", node("A", rank=0), node("A", rank=1)),
            "prompt.replies[1]",
            "is the same answer as prompt.replies[0], and ranked otherwise; fix: leave one of them out",
        ),
        (node("q", node("A", rank=0), node(" ", role="assistant", rank=1)), "prompt.replies[1]", "is empty: there is"),
    ],
)
def test_bad_siblings(tree: Any, key: str, reason: str) -> None:
    (made,) = to_rows(Record("t.jsonl", 3, {"prompt": tree}), SourceConfig(tree="pairs"))
    assert isinstance(made, BadRow) and made.key == key and made.reason.startswith(reason)


def test_all_problems_of_siblings_at_once() -> None:
    tree = node("q", node("A", node("r", node("B", rank=0), node("B", rank=1)), rank=0), node("A", rank=1))
    (made,) = to_rows(Record("t.jsonl", 3, {"prompt": tree}), SourceConfig(tree="pairs"))
    assert isinstance(made, BadRow) and made.key == "prompt.replies[1]"
    assert "(also: prompt.replies[0].replies[0].replies[1]: is the same answer as" in made.reason


def test_ranks_of_trees_tell_no_margin() -> None:
    source = SourceConfig(tree="pairs", margins=True)
    (made,) = to_rows(Record("t.jsonl", 3, {"prompt": node("q", node("A", rank=0), node("B", rank=1))}), source)
    assert isinstance(made, BadRow) and made.reason.startswith("ranks say no margin")


def test_an_objective_of_pairs_names_what_reads_a_tree_as_pairs() -> None:
    for column, columns in (("prompt", {}), ("tree", {"prompt": "tree"})):
        record = Record("t.jsonl", 3, {column: node("q", node("A", rank=0), node("B", rank=1))})
        made = [row for row in to_rows(record, SourceConfig(columns=columns)) if isinstance(row, Row)]
        assert len(made) == 2
        for refused in encode_pairs(made, load("chatml")):
            assert isinstance(refused, BadRow) and refused.key == column
            assert refused.reason == (
                "the row is a conversation of a message tree, and this objective compares pairs; "
                "fix: the source's tree: pairs (--data.train.0.tree pairs)"
            )


# ---- HH text --------------------------------------------------------------------------------------------------------


def hh(text: Any) -> tuple[Talk, Problems]:
    problems = Problems()
    return read_hh(text, "chosen", problems), problems


def test_hh_text() -> None:
    text = "\n\nHuman: Hi: there\n\nAssistant: One.\n\nTwo. \nHuman: no turn\n\nHuman:\n\nAssistant: Three.\n"
    talk, problems = hh(text)
    assert problems == []
    assert [(m["role"], m["content"]) for m in talk.messages] == [
        *(("user", "Hi: there"), ("assistant", "One.\n\nTwo. \nHuman: no turn"), ("user", ""), ("assistant", "Three.")),
    ]
    assert talk.keys == ("chosen",) * 4 and talk.weights == (None,) * 4


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Human: Hi", "must begin with"),
        ("Well.\n\nHuman: Hi", "must begin with"),
        (None, "must be a string, not null"),
        ("\n\nHuman: \ud800", "has a lone surrogate"),
    ],
)
def test_bad_hh_text(text: Any, reason: str) -> None:
    _, problems = hh(text)
    ((key, why),) = problems
    assert key == "chosen" and why.startswith(reason)


# ---- a real file ----------------------------------------------------------------------------------------------------


@pytest.mark.acceptance
def test_real_trees(shared: Path) -> None:
    path = shared / "data" / "oasst-sample" / "en_100_tree.jsonl"
    trees = [json.loads(line)["prompt"] for line in path.read_text(encoding="utf-8").split("\n") if line]

    def lines(tree: dict[str, Any], before: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
        """Every path to a message; none of this file's messages is deleted."""
        own = (*before, tree["text"])
        return [own, *(line for reply in tree["replies"] for line in lines(reply, own))]

    def answers(tree: dict[str, Any]) -> list[str]:
        own = [tree["message_id"]] if tree["role"] == "assistant" else []
        return own + [found for reply in tree["replies"] for found in answers(reply)]

    made = [r for r in read_rows(str(path)) if isinstance(r, Row)]
    assert len(trees) == 100 and {r.line for r in made} == set(range(1, 101))
    known = {line for tree in trees for line in lines(tree)}
    assert all(tuple(m["content"] for m in r.messages) in known for r in made)
    assert all(r.messages[-1]["role"] == "assistant" and r.weights[-1] == 1.0 for r in made)
    trained = sum(weight == 1.0 for r in made for m, weight in zip(r.messages, r.weights, strict=True))
    assert trained == sum(len(answers(tree)) for tree in trees) == 687
    places = [(r.line, r.message_key(i)) for r in made for i, weight in enumerate(r.weights) if weight == 1.0]
    assert len(set(places)) == 687
    best = [r for r in read_rows(str(path), SourceConfig(tree="best")) if isinstance(r, Row)]
    assert len(best) == 100
    for tree, row in zip(trees, best, strict=True):
        ranked = min(tree["replies"], key=lambda reply: reply.get("rank", 99))
        assert [m["content"] for m in row.messages[:2]] == [tree["text"], ranked["text"]]


def siblings(tree: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The assistant's replies to each message."""
    own = [[reply for reply in tree["replies"] if reply["role"] == "assistant"]]
    return own + [found for reply in tree["replies"] for found in siblings(reply)]


@pytest.mark.acceptance
def test_real_trees_as_pairs(shared: Path, tmp_path: Path) -> None:
    """Every two ranked answers to one message, by plain JSON; and as samples, nothing lost."""
    path = shared / "data" / "oasst-sample" / "en_100_tree.jsonl"
    trees = [json.loads(line)["prompt"] for line in path.read_text(encoding="utf-8").split("\n") if line]
    groups = [[r for r in group if r.get("rank") is not None] for tree in trees for group in siblings(tree)]
    ranked = [group for group in groups if len(group) > 1]
    expected = sorted(
        (better["text"], worse["text"])
        for group in ranked
        for one, other in combinations(group, 2)
        for better, worse in [sorted((one, other), key=lambda reply: reply["rank"])]
    )
    assert len(expected) == 754 and len(ranked) == 212

    def found(**source: Any) -> list[Row]:
        return [r for r in read_rows(str(path), SourceConfig(tree="pairs", **source)) if isinstance(r, Row)]

    made = found()
    assert sorted((r.messages[-1]["content"], r.rejected_messages[-1]["content"]) for r in made) == expected
    assert {r.line for r in made} <= set(range(1, 101))
    levels = [sorted(reply["rank"] for reply in group) for group in ranked]
    assert all(len(set(of)) == len(of) for of in levels)  # no two answers are equal
    assert len(found(pairs="neighbours")) == sum(len(of) - 1 for of in levels) == 429
    assert len(found(pairs="best_worst")) == len(found(preference="chosen")) == 212

    sources = {"data.train.0": SourceConfig(path=str(path), tree="pairs")}
    caches = tokenize_sources(sources, load("chatml"), DataConfig(cache_dir=str(tmp_path)), rows="pairs")
    table, (stats,) = sample_table(caches, sources, max_length=100_000, truncation="drop", seed=0)
    assert (stats.rows, stats.samples, stats.bad_rows, stats.dropped) == (100, 754, 0, {})
    assert stats.notes[UNRANKED] == 687 - sum(map(len, ranked)) and stats.left_out == 100 - len({r.line for r in made})
    assert {table.where(sample) for sample in range(754)} == {f"{path}:{r.line}" for r in made}
