"""Conversations that are written as no list of messages: OpenAssistant's message trees and the text of HH.

`formats.py` makes rows of what these functions return.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from posttrain.data.messages import ALIASES, Talk
from posttrain.data.problems import Number, Problems, type_name

REMOVED = "messages of trees left out with all that follows: they are deleted or did not pass review"
UNANSWERED = "prompts of trees left out, because nobody answered them"
"""Why messages are left out."""

# ---- message trees --------------------------------------------------------------------------------------------------


@dataclass
class _Node:
    """A message with the replies to it that are kept."""

    key: str
    message: dict[str, Any]
    rank: Number | None
    """Among its siblings, 0 best."""
    replies: list["_Node"] = field(default_factory=list)

    @property
    def answers(self) -> bool:
        return self.message["role"] == "assistant"


def read_tree(
    value: Any, key: str, problems: Problems, left_out: Counter[str], which: Literal["all", "best"]
) -> list[Talk]:
    """The conversations of an OpenAssistant tree (`text`, `role`, `replies`), each ending with an answer.

    Messages that are deleted or did not pass review (`review_result` false) are left out with all that follows them,
    and so are prompts that nobody answered; `left_out` counts both. `best`: one conversation, at each turn the reply of
    the lowest rank (none is worst; of equals the first). `all`: every path from the root to a leaf, in which each
    answer has weight 1 in the first path that it is in and 0 in the others, so that it is trained once; a prompt has no
    weight in the first and 0 in the others.
    """
    root = _read_node(value, key, problems, left_out)
    if problems or root is None or not _has_answer(root, left_out):
        return []
    if which == "best":
        return [_best(root)]
    return list(_paths(root))


def read_siblings(
    value: Any, key: str, problems: Problems, left_out: Counter[str]
) -> Iterator[tuple[Talk, list[Talk], list[Number | None]]]:
    """(the conversation up to a message, the answers to it, their ranks) for every message of a tree that has answers.

    As in `read_tree` for what is left out, but that only a tree without any answer counts as unanswered. Other replies
    to a message, prompts, are no answers.
    """
    root = _read_node(value, key, problems, left_out)
    path: list[_Node] = []
    waiting = [(root, 0)] if root is not None and not problems else []
    answered = not waiting
    while waiting:
        node, depth = waiting.pop()
        del path[depth:]
        path.append(node)
        waiting.extend((reply, depth + 1) for reply in reversed(node.replies))
        answers = [reply for reply in node.replies if reply.answers]
        answered = answered or bool(answers)
        if answers:
            yield _talk(path), [_talk([answer]) for answer in answers], [answer.rank for answer in answers]
    left_out[UNANSWERED] += not answered


def _read_node(root: Any, key: str, problems: Problems, left_out: Counter[str]) -> _Node | None:
    """The tree without what is left out. Goes by a stack: nothing bounds the depth of a tree but the file's own."""
    top: list[_Node] = []
    waiting: list[tuple[Any, str, list[_Node]]] = [(root, key, top)]
    while waiting:
        value, at, siblings = waiting.pop()
        if not isinstance(value, dict):
            problems.add(at, f"must be a message with text, role and replies, not {type_name(value)}")
            continue
        if value.get("deleted") is True or value.get("review_result") is False:
            left_out[REMOVED] += 1
            continue
        role, text, replies = value.get("role"), value.get("text"), value.get("replies")
        if not isinstance(role, str) or ALIASES.get(role) not in ("system", "user", "assistant"):
            problems.add(f"{at}.role", f"unknown role {role!r}; fix: prompter or assistant")
        if not isinstance(text, str):
            problems.add(f"{at}.text", f"must be a string, not {type_name(text)}")
        else:
            problems.check_text(text, f"{at}.text")
        if not isinstance(replies, list | None):
            problems.add(f"{at}.replies", f"must be a list of messages, not {type_name(replies)}")
            replies = None
        rank = None if value.get("rank") is None else problems.number(value["rank"], f"{at}.rank")
        message = {"role": ALIASES.get(str(role), "user"), "content": text}
        node = _Node(at, message, rank)
        siblings.append(node)
        under = [(reply, f"{at}.replies[{i}]", node.replies) for i, reply in enumerate(replies or ())]
        waiting.extend(reversed(under))
    return top[0] if top else None


def _has_answer(root: _Node, left_out: Counter[str]) -> bool:
    """Drops every branch that ends without an answer; whether anything is left."""
    order = [root]
    for node in order:
        order.extend(node.replies)
    for node in reversed(order):
        node.replies = [reply for reply in node.replies if reply.answers or reply.replies]
    left_out[UNANSWERED] += sum(not (node.answers or node.replies) for node in order)
    return root.answers or bool(root.replies)


def _best(root: _Node) -> Talk:
    path = [root]
    while path[-1].replies:
        path.append(min(path[-1].replies, key=lambda r: float("inf") if r.rank is None else r.rank))
    return _talk(path)


def _paths(root: _Node) -> Iterator[Talk]:
    """Every path from the root to a leaf, depth first."""
    path: list[_Node] = []
    seen = 0  # how many nodes at the start of the path were in one before
    waiting = [(root, 0)]
    while waiting:
        node, depth = waiting.pop()
        seen = min(seen, depth)
        del path[depth:]
        path.append(node)
        waiting.extend((reply, depth + 1) for reply in reversed(node.replies))
        if not node.replies:
            yield _talk(path, _weights(path, seen))
            seen = len(path)


def _weights(path: list[_Node], seen: int) -> tuple[float | None, ...]:
    return tuple(0.0 if i < seen else 1.0 if node.answers else None for i, node in enumerate(path))


def _talk(path: list[_Node], weights: tuple[float | None, ...] = ()) -> Talk:
    return Talk(tuple(n.message for n in path), weights or (None,) * len(path), tuple(n.key for n in path))


# ---- HH text --------------------------------------------------------------------------------------------------------

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def is_hh(text: Any) -> bool:
    """Whether a text is written as in the HH data."""
    return isinstance(text, str) and text.startswith("\n\nHuman:")


def read_hh(text: Any, key: str, problems: Problems) -> Talk:
    """The messages of `\\n\\nHuman: ...\\n\\nAssistant: ...`, without the whitespace around each."""
    if not isinstance(text, str):
        problems.add(key, f"must be a string, not {type_name(text)}")
        return Talk()
    before, *rest = _TURN.split(text)
    if before.strip() or not rest:
        problems.add(key, r"must begin with '\n\nHuman:' or '\n\nAssistant:'; fix: the text, or the source's format")
        return Talk()
    problems.check_text(text, key)
    speakers, said = rest[::2], rest[1::2]
    messages = [{"role": _ROLES[who], "content": what.strip()} for who, what in zip(speakers, said, strict=True)]
    return Talk(tuple(messages), (None,) * len(messages), (key,) * len(messages))
