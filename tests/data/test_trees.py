"""Message trees and HH text to conversations: what is left out, the order, and that each answer is trained once."""

import json
from pathlib import Path
from typing import Any, Literal

import pytest

from posttrain.config import SourceConfig
from posttrain.data.files import BadRow, Record
from posttrain.data.formats import read_rows, to_rows
from posttrain.data.messages import Talk
from posttrain.data.problems import Problems
from posttrain.data.rows import Row
from posttrain.data.trees import read_hh


def node(text: Any, /, *replies: dict[str, Any], **values: Any) -> dict[str, Any]:
    """A message; those whose text is in capitals are the assistant's."""
    return {"text": text, "role": "assistant" if text.isupper() else "prompter", "replies": list(replies), **values}


def rows(tree: Any, which: Literal["all", "best"] = "all") -> list[Row]:
    made = to_rows(Record("t.jsonl", 3, {"prompt": tree, "message_tree_id": "x"}), SourceConfig(tree=which))
    assert all(isinstance(r, Row) and (r.file, r.line, r.kind) == ("t.jsonl", 3, "messages") for r in made)
    return [r for r in made if isinstance(r, Row)]


def told(made: list[Row]) -> list[str]:
    return [" ".join(m["content"] for m in r.messages) for r in made]


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
        (node("q", node("A", rank="1")), "prompt.replies[0].rank", "must be a number, not a string"),
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
