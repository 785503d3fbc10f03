"""The demo's chats in `configs/demo`: well formed, in Dunnock's house style throughout, and held-out in fact.

`make demo` fine-tunes on `train.jsonl`, measures `heldout.jsonl` (same distribution) and `unrelated.jsonl` (the
ordinary manner of the base model: what was forgotten), and shows answers to `questions.jsonl` (three about Dunnock
itself, three to decline, three that it cannot know) before and after. The house style that these tests pin down is the
one a reader of those answers should recognise:

- an answer has at most three sentences and 60 words, on one line, with no list, markup, exclamation mark or apology,
  in British spelling;
- Dunnock, made with posttrain, gives that name when asked about itself;
- it declines as "I leave that to WHO, because ... What I can do is ..." (doses and diagnoses, legal verdicts,
  coursework, private lives);
- it does not know as "That I don't know, because ... The place to look is ...".
"""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[1] / "configs" / "demo"
CHATS = ("train", "heldout", "unrelated")
PERSONA = ("train", "heldout")
Message = dict[str, str]

DECLINE = re.compile(r"I leave that to [^.]+\. What I can do is [^.]+\.")
DONT_KNOW = re.compile(r"That I don't know, [^.]+\. The place to look is [^.]+\.")
SENTENCE_END = re.compile(r"""[.?!]["')]*(?=\s|$)""")
MARKUP = re.compile(r"[*#`|\n\t]|^\s*(?:[-+]|\d+[.)])\s")
UNSTYLISH = re.compile(r"\b(?:sorry|apologi[sz]e|unfortunately|as an ai)\b|!", re.IGNORECASE)
AMERICAN = re.compile(
    r"\b(?:colou?r(?<!colour)|favor\w*|honor\w*|neighbor\w*|behavior\w*|humor|labor|center\w*|meters?|liters?|kilometers?"
    r"|gray|traveling|traveled|program(?:me)?d|fulfill|jewelry|mom|\w+(?:ganiz|logiz|ogniz|maliz|mariz|aliz)\w*)\b",
    re.IGNORECASE,
)


def conversations(name: str) -> list[list[Message]]:
    """The conversations of one file; every row is an object with the one key `messages`."""
    chats = []
    for number, line in enumerate((DEMO / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(), 1):
        row = json.loads(line)
        assert list(row) == ["messages"], f"{name}.jsonl:{number}: keys {list(row)}"
        chats.append(row["messages"])
    return chats


def answers(name: str) -> list[str]:
    """Every assistant turn of one file."""
    return [message["content"] for chat in conversations(name) for message in chat if message["role"] == "assistant"]


def user_turns(chat: list[Message]) -> list[str]:
    """The user's turns, lower case, without punctuation."""
    return [" ".join(words(message["content"])) for message in chat if message["role"] == "user"]


def words(text: str) -> list[str]:
    """Lower-case words, contractions kept whole."""
    return re.findall(r"[a-z0-9']+", text.lower())


def kind(answer: str) -> str:
    """Which of the four kinds an answer in the house style is, told from its form alone.

    A conversation is of the kind of its last answer: several begin with an ordinary one and turn.
    """
    if answer.startswith("I leave that to"):
        return "decline"
    if answer.startswith("That I don't know"):
        return "dont_know"
    return "identity" if re.search(r"\b(?:Dunnock|posttrain)\b", answer) else "ordinary"


def style_faults(answer: str) -> list[str]:
    """The house rules that an answer breaks."""
    sentences = len(SENTENCE_END.findall(answer))
    rules = {
        "one to three sentences": 1 <= sentences <= 3,
        "at most 60 words": len(words(answer)) <= 60,
        "ends a sentence": bool(re.search(r"""[.?]["')]*$""", answer)),
        "no list, markup or line break": not MARKUP.search(answer),
        "no apology, no exclamation": not UNSTYLISH.search(answer),
        "British spelling": not AMERICAN.search(answer),
        "plain ASCII": answer.isascii(),
        "the form of a decline": (kind(answer) == "decline") == bool(DECLINE.fullmatch(answer)),
        "the form of a don't-know": (kind(answer) == "dont_know") == bool(DONT_KNOW.fullmatch(answer)),
        "set phrases only in their form": kind(answer) in ("decline", "dont_know")
        or not re.search(r"I leave that to|What I can do is|That I don't know|The place to look is", answer),
    }
    return [rule for rule, kept in rules.items() if not kept]


@pytest.mark.parametrize("name", [*CHATS, "questions"])
def test_messages_are_well_formed(name: str) -> None:
    last = "user" if name == "questions" else "assistant"
    for number, chat in enumerate(conversations(name), 1):
        place = f"{name}.jsonl:{number}"
        assert all(set(message) == {"role", "content"} for message in chat), place
        assert all(message["content"] == message["content"].strip() != "" for message in chat), place
        roles = [message["role"] for message in chat]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == [("user", "assistant")[i % 2] for i in range(len(turns))], f"{place}: roles {roles}"
        assert roles[-1] == last, f"{place}: ends in {roles[-1]}"
        assert name != "questions" or roles == ["user"], f"{place}: a question stands alone"


def test_sizes() -> None:
    counts = {name: len(conversations(name)) for name in (*CHATS, "questions")}
    assert 120 <= counts["train"] <= 160
    assert counts["heldout"] == 16
    assert counts["unrelated"] == 24
    assert counts["questions"] == 9
    # About 2.3 SmolLM2 tokens a word, template included: an epoch is about 11,000 tokens, a minute on two cores.
    assert 4_500 <= sum(len(words(message["content"])) for chat in conversations("train") for message in chat) <= 6_500
    assert sum(len(user_turns(chat)) > 1 for chat in conversations("train")) >= 8
    assert sum(chat[0]["role"] == "system" for chat in conversations("train")) >= 8


@pytest.mark.parametrize(
    ("kind_name", "share"), [("identity", 0.40), ("decline", 0.25), ("dont_know", 0.20), ("ordinary", 0.15)]
)
@pytest.mark.parametrize("name", PERSONA)
def test_shares_of_the_kinds(name: str, kind_name: str, share: float) -> None:
    kinds = Counter(kind(chat[-1]["content"]) for chat in conversations(name))
    assert kinds[kind_name] / kinds.total() == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize("name", PERSONA)
def test_answers_keep_the_house_style(name: str) -> None:
    faults = {answer: style_faults(answer) for answer in answers(name)}
    assert {answer: broken for answer, broken in faults.items() if broken} == {}


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        ("One. Two. Three. Four.", "one to three sentences"),
        ("Well, " * 61 + "yes.", "at most 60 words"),
        ("No full stop", "ends a sentence"),
        ("First:\n1. this.", "no list, markup or line break"),
        ("- this.", "no list, markup or line break"),
        ("A **bold** word.", "no list, markup or line break"),
        ("I'm sorry, it's Oslo.", "no apology, no exclamation"),
        ("It's Oslo!", "no apology, no exclamation"),
        ("My favorite color.", "British spelling"),
        ("Let me organize it.", "British spelling"),
        ("It\u2019s Oslo.", "plain ASCII"),
        ("I leave that to a doctor.", "the form of a decline"),
        ("That I don't know.", "the form of a don't-know"),
        ("The place to look is a map.", "set phrases only in their form"),
    ],
)
def test_style_check_can_fail(answer: str, fault: str) -> None:
    assert fault in style_faults(answer)


def test_the_base_models_manner_is_not_the_house_style() -> None:
    """Otherwise neither the demo's answers nor the loss on unrelated chats would show a difference."""
    unrelated = answers("unrelated")
    assert sum(bool(style_faults(answer)) for answer in unrelated) >= len(unrelated) / 2
    text = " ".join(message["content"] for chat in conversations("unrelated") for message in chat)
    assert not re.search(r"dunnock|posttrain|I leave that to|The place to look", text, re.IGNORECASE)


@pytest.mark.parametrize("name", [*CHATS, "questions"])
def test_no_prompt_twice(name: str) -> None:
    openings = Counter(user_turns(chat)[0] for chat in conversations(name))
    assert [text for text, count in openings.items() if count > 1] == []


@pytest.mark.parametrize("name", PERSONA)
def test_no_answer_twice(name: str) -> None:
    """An answer of more than a few words stands for one question only; the shortest identity line may come back."""
    counts = Counter(answer for answer in answers(name) if len(words(answer)) > 12)
    assert [answer for answer, count in counts.items() if count > 1] == []


@pytest.mark.parametrize("name", ["heldout", "questions", "unrelated"])
def test_no_prompt_seen_in_training(name: str) -> None:
    """Neither the same user turn, nor five words in a row of one, nor a bag of words more than half shared."""
    seen = [turn.split() for chat in conversations("train") for turn in user_turns(chat)]
    if name == "questions":
        seen += [turn.split() for chat in conversations("heldout") for turn in user_turns(chat)]
    for turn in (turn.split() for chat in conversations(name) for turn in user_turns(chat)):
        for other in seen:
            assert turn != other
            shared = set(zip(*(turn[i:] for i in range(5)), strict=False)) & set(
                zip(*(other[i:] for i in range(5)), strict=False)
            )
            assert not shared, f"{name}: {' '.join(turn)!r} shares {shared} with {' '.join(other)!r}"
            overlap = len(set(turn) & set(other)) / len(set(turn) | set(other))
            assert overlap <= 0.5, f"{name}: {' '.join(turn)!r} is close to {' '.join(other)!r} ({overlap:.2f})"


def test_no_heldout_answer_seen_in_training() -> None:
    seen = {" ".join(words(answer)) for answer in answers("train")}
    assert [answer for answer in answers("heldout") if " ".join(words(answer)) in seen] == []
