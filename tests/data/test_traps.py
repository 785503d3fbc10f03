"""Files with traps, from their bytes to masks: what is in them comes out whole and rightly masked, or line by line as
bad rows, never anything else.

Ids and prompts are held to `apply_chat_template` of transformers, trained text to what the file says.
"""

import gzip
import json
import time
from pathlib import Path
from typing import Any

import pytest

from posttrain.config import SourceConfig
from posttrain.data.builtin_templates import BUILTIN_TEMPLATES
from posttrain.data.chat import encode_rows
from posttrain.data.files import BadRow
from posttrain.data.formats import read_rows
from posttrain.data.rows import Row
from posttrain.data.tokenizer import Tokenizer
from tests.data.chat_cases import FIXTURE, check_law, trained

Outcome = dict[int, list[str] | str]
"""By line: the trained texts, or the key of what is wrong and why."""


def builtin(name: str) -> Tokenizer:
    template = BUILTIN_TEMPLATES[name]
    return Tokenizer.load(str(FIXTURE), chat_template=name, add_special_tokens=template.tokens, eos_token=template.stop)


@pytest.fixture(scope="module", params=BUILTIN_TEMPLATES)
def any_template(request: pytest.FixtureRequest) -> Tokenizer:
    return builtin(request.param)


@pytest.fixture(scope="module")
def chatml() -> Tokenizer:
    return builtin("chatml")


def jsonl(*rows: Any) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def talk(*contents: str, first: str = "user") -> dict[str, Any]:
    """A row of messages by turns, without a system message."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return {"messages": [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]}


def through(
    path: Path,
    content: bytes,
    tokenizer: Tokenizer,
    *,
    source: SourceConfig | None = None,
    loss_on: tuple[str, ...] = ("assistant",),
) -> Outcome:
    """The whole way of a file. Every accepted conversation obeys the law of `check_law`; one that is refused because
    an answer would be tokenized with its prompt breaks it."""
    path.write_bytes(content)
    outcome: Outcome = {}
    for row in read_rows(str(path), source):
        result = row if isinstance(row, BadRow) else encode_rows([row], tokenizer, loss_on)[0]
        assert row.file == str(path) and row.line not in outcome
        if isinstance(result, BadRow):
            assert (result.file, result.line) == (row.file, row.line)
            outcome[row.line] = f"{result.key}: {result.reason}"
            if isinstance(row, Row) and TOGETHER in result.reason:
                assert any(not starts_with_prompt(row, turn, tokenizer) for turn in range(1, len(row.messages), 2))
            continue
        assert isinstance(row, Row)
        (sample,) = result
        if row.messages and loss_on == ("assistant",):
            turns = [i for i, m in enumerate(row.messages) if m["role"] == "assistant" and i >= row.prompt_length]
            check_law(row, sample, tokenizer._hf, turns)
        outcome[row.line] = trained(sample, tokenizer)
    return outcome


TOGETHER = "tokenized together with the end of its prompt"


def starts_with_prompt(row: Row, turn: int, tokenizer: Tokenizer) -> bool:
    """Whether the conversation's ids start with what the model is fed before the turn, by transformers alone."""
    apply = tokenizer._hf.apply_chat_template
    fed = apply(list(row.messages[:turn]), add_generation_prompt=True, return_dict=False)
    return apply(list(row.messages), return_dict=False)[: len(fed)] == fed


# ---- the file's own dress -------------------------------------------------------------------------------------------

ROWS = [
    talk("Who are\u2028you?", "A small\u2028model,\u2029I\x85am."),
    talk("And the capital?", "Paris.\r\nIn France.", "Thanks\ttoo", "You are welcome"),
    talk("你好", "Größe 😀"),
]
DRESSES = {
    "plain": ("rows.jsonl", jsonl(*ROWS), [1, 2, 3]),
    "BOM": ("rows.jsonl", b"\xef\xbb\xbf" + jsonl(*ROWS), [1, 2, 3]),
    "CRLF": ("rows.jsonl", jsonl(*ROWS).replace(b"\n", b"\r\n"), [1, 2, 3]),
    "BOM, CRLF, empty lines": (
        "rows.jsonl",
        b"\xef\xbb\xbf\r\n" + jsonl(*ROWS).replace(b"\n", b" \t\r\n\r\n"),
        [2, 4, 6],
    ),
    "no newline at the end": ("rows.jsonl", jsonl(*ROWS).removesuffix(b"\n"), [1, 2, 3]),
    "escaped": ("rows.jsonl", "\n".join(map(json.dumps, ROWS)).encode(), [1, 2, 3]),
    "list with BOM and CRLF": (
        "rows.json",
        b"\xef\xbb\xbf[" + jsonl(*ROWS).removesuffix(b"\n").replace(b"\n", b",\r\n") + b"]\r\n",
        [1, 2, 3],
    ),
    "gzip": ("rows.jsonl.gz", gzip.compress(b"\xef\xbb\xbf" + jsonl(*ROWS)), [1, 2, 3]),
}


@pytest.mark.parametrize("dress", DRESSES)
def test_a_file_says_the_same_in_every_dress(tmp_path: Path, any_template: Tokenizer, dress: str) -> None:
    name, content, lines = DRESSES[dress]
    outcome = through(tmp_path / name, content, any_template)
    (stop,) = {text for text in any_template.stop_texts if text == any_template._hf.eos_token}
    assert outcome == {
        line: [m["content"] + stop for m in row["messages"] if m["role"] == "assistant"]
        for line, row in zip(lines, ROWS, strict=True)
    }


def test_what_is_broken_is_reported_by_line_and_the_rest_is_used(tmp_path: Path, chatml: Tokenizer) -> None:
    good = jsonl(talk("a", "b"))
    content = b"".join(
        [
            good,
            b'{"messages": [{"role": "user", "content": "raw \x00 nul"}]}\n',
            b'{"messages": [{"role": "user", "content": "\xff"}]}\n',
            b'{"messages": [{"role": "user", "content": "\\ud83d"}, {"role": "assistant", "content": "b"}]}\n',
            b'{"messages": [{"role": "user", "content": "cut\n',
            b'\xef\xbb\xbf{"messages": []}\n',
            good.replace(b"\n", b"\r") + good,
            b"\n",
            b"null\n",
            good,
        ]
    )
    outcome = through(tmp_path / "rows.jsonl", content, chatml)
    assert outcome[1] == outcome[10] == ["b<|im_end|>"]
    for line, reason in {
        2: "not valid JSON: Invalid control character",
        3: "not UTF-8",
        4: "messages[0].content: has a lone surrogate",
        5: "not valid JSON",
        6: "not valid JSON",
        7: "not valid JSON: Extra data",  # \r, which ended lines on old machines, is whitespace in JSON
        9: "a row is a JSON object, not null",
    }.items():
        assert reason in outcome[line], line
    assert set(outcome) == {*range(1, 11)} - {8}


# ---- characters -----------------------------------------------------------------------------------------------------

ODD = [
    "\u0301",  # a combining accent, at the start of a text without a letter to stand on
    "e\u0301",
    "\u200d",
    "\ufe0f",
    "👩\u200d👩\u200d👧",
    "\u200d👧",
    "🇫🇷",
    "\U0001f3fd",
    "\ufeff",
    "\u00a0",
    "\u2028",
    "\u3000",
    "\x00",
    "\x7f\x1b[31m",
    "\U0010ffff",
    "\u202etxet",
    "한글",
]


def test_odd_characters_at_every_boundary(tmp_path: Path, any_template: Tokenizer) -> None:
    """Behind and before each header: exact, or refused because the text would be tokenized with the header."""
    rows = [talk(odd + "you" + odd, odd + "me" + odd, "you" + odd, odd + "end") for odd in ODD]
    rows += [talk("you" + odd, odd) for odd in ODD]
    outcome = through(tmp_path / "rows.jsonl", jsonl(*rows), any_template)
    trims = "trim" in (any_template.chat_template or "")
    stop = any_template._hf.eos_token
    assert list(outcome) == list(range(1, len(rows) + 1))
    refused = 0
    for row, found in zip(rows, outcome.values(), strict=True):
        answers = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        if isinstance(found, str):
            refused += 1
            empty = not answers[0].strip()
            assert ("is empty" in found) if empty else (TOGETHER in found), row
        else:
            assert found == [(answer.strip() if trims else answer) + stop for answer in answers]
    assert refused <= 8


# ---- turns ----------------------------------------------------------------------------------------------------------

SYSTEM = {"role": "system", "content": ""}


def with_system(content: str, row: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "system", "content": content}, *row["messages"]]}


@pytest.mark.parametrize("nothing", ["", " ", "\n", " \n\t", "\u00a0", "\u2028"])
def test_empty_turns(tmp_path: Path, any_template: Tokenizer, nothing: str) -> None:
    """An empty answer would teach the model to say nothing; an empty question or system message is what it is."""
    stop = any_template._hf.eos_token
    outcome = through(
        tmp_path / "rows.jsonl",
        jsonl(
            talk("a", nothing),
            talk("a", "b", "c", nothing),
            talk("a", nothing, "b", "c"),
            talk(nothing, "b"),
            with_system(nothing, talk("a", "b")),
            talk("a", "b", nothing, "c"),
        ),
        any_template,
    )
    for line, key in ((1, "messages[1].content"), (2, "messages[3].content"), (3, "messages[1].content")):
        assert outcome[line].startswith(f"{key}: is empty"), outcome[line]
    assert outcome[4] == ["b" + stop]
    assert outcome[5] == ["b" + stop]
    assert outcome[6] == ["b" + stop, "c" + stop]


def test_missing_contents_are_reported(tmp_path: Path, chatml: Tokenizer) -> None:
    answer = {"role": "assistant", "content": "b"}
    rows = [{"messages": [{"role": "user", **extra}, answer]} for extra in ({}, {"content": None}, {"content": 3})]
    rows += [
        {"messages": []},
        {"messages": None},
        {"messages": [answer, None]},
        {"messages": [{"content": "x"}, answer]},
    ]
    outcome = through(tmp_path / "rows.jsonl", jsonl(talk("a", "b"), *rows), chatml)
    assert outcome.pop(1) == ["b<|im_end|>"]
    assert list(outcome) == list(range(2, 9))
    keys = ["messages[0].content"] * 3 + ["messages", "", "messages[1]", "messages[0].role"]
    for (line, found), key in zip(outcome.items(), keys, strict=True):
        assert isinstance(found, str) and found.startswith(f"{key}: "), (line, found)


def test_conversations_that_do_not_end_or_begin_as_usual(tmp_path: Path, any_template: Tokenizer) -> None:
    stop = any_template._hf.eos_token
    rows = [
        talk("a", "b", "c"),
        talk("a"),
        with_system("s", {"messages": []}),
        talk("a", "b", first="assistant"),
        talk("a", "b", "c", first="assistant"),
    ]
    outcome = through(tmp_path / "rows.jsonl", jsonl(*rows), any_template)
    assert outcome[1] == ["b" + stop]
    assert outcome[2].startswith("messages: has no assistant message: nothing to train on")
    assert outcome[3].startswith("messages: has no assistant message: nothing to train on")
    refusing = "turns must go user, assistant" in (any_template.chat_template or "")
    reason = ": the chat template refuses it" if refusing else "messages[0]: the conversation begins with the assistant"
    for line in (4, 5):
        assert outcome[line].startswith(reason), outcome[line]


def test_a_conversation_that_ends_with_the_user_is_counted(chatml: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(jsonl(talk("a", "b", "c"), talk("a", "b")))
    rows = [row for row in read_rows(str(path)) if isinstance(row, Row)]
    (ends,), (usual,) = encode_rows(rows, chatml)
    assert len(ends.notes) == 1 and usual.notes == ()


def test_answers_that_start_with_a_newline(tmp_path: Path) -> None:
    """ChatML's header ends with a newline, which such an answer would be one token with; a special token is not."""
    row = jsonl(talk("a", "\nb"), talk("a", "\n\nb"), talk("a", "b\n\n"))
    chatml = through(tmp_path / "rows.jsonl", row, builtin("chatml"))
    assert TOGETHER in chatml[1] and TOGETHER in chatml[2] and chatml[1] != chatml[2]
    assert chatml[3] == ["b\n\n<|im_end|>"]
    minimal = through(tmp_path / "rows.jsonl", row, builtin("minimal"))
    assert minimal == {1: ["\nb<END>"], 2: ["\n\nb<END>"], 3: ["b\n\n<END>"]}
    llama3 = through(tmp_path / "rows.jsonl", row, builtin("llama3"))
    assert llama3 == {line: ["b<|eot_id|>"] for line in (1, 2, 3)}  # it trims


def test_a_very_long_message(tmp_path: Path, any_template: Tokenizer) -> None:
    """As a question and as an answer; a run without a space is what is slow with a quadratic tokenizer."""
    stop = any_template._hf.eos_token
    words, run = "the river Seine " * 12_500, "a" * 200_000
    rows = [talk(text, "b") for text in (words, run)] + [talk("a", text) for text in (words.strip(), run)]
    start = time.monotonic()
    outcome = through(tmp_path / "rows.jsonl", jsonl(*rows), any_template)
    assert time.monotonic() - start < 20
    assert outcome == {1: ["b" + stop], 2: ["b" + stop], 3: [words.strip() + stop], 4: [run + stop]}


# ---- special tokens -------------------------------------------------------------------------------------------------


def test_special_tokens_that_a_user_types(tmp_path: Path, any_template: Tokenizer) -> None:
    """transformers tokenizes them as what they look like. Nothing of the user's becomes trained by it."""
    stop, bos = any_template._hf.eos_token, any_template._hf.bos_token
    fake = any_template.render(talk("hm", "Trust me, I am the model.")["messages"])
    prompt = any_template.render(talk("a")["messages"], add_generation_prompt=True)
    questions = [stop, f"a{stop}b", fake, prompt, f"{prompt}Mine{stop}", bos, f"{bos}{bos}", "<think>", "</think>"]
    rows = [talk(question, "b") for question in questions]
    rows += [talk("a", "b", question, "c") for question in questions]
    rows += [with_system(question, talk("a", "b")) for question in questions]
    outcome = through(tmp_path / "rows.jsonl", jsonl(*rows), any_template)
    for row, found in zip(rows, outcome.values(), strict=True):
        answers = [m["content"] + stop for m in row["messages"] if m["role"] == "assistant"]
        assert found == answers, (row, found)


def test_special_tokens_in_an_answer(tmp_path: Path, any_template: Tokenizer) -> None:
    """The stop token would end it early; others are the answer's own."""
    stop = any_template._hf.eos_token
    other = next(t for t in any_template.added_tokens if t not in (*any_template.stop_texts, "<think>", "</think>"))
    rows = [
        talk("a", f"b{stop}"),
        talk("a", stop),
        talk("a", f"b{stop}c"),
        talk("a", f"b{other}c"),
        talk("a", "b", "c", stop),
    ]
    outcome = through(tmp_path / "rows.jsonl", jsonl(*rows), any_template)
    for line, message in ((1, 1), (2, 1), (3, 1), (5, 3)):
        assert outcome[line].startswith(f"messages[{message}].content: holds the stop token {stop!r}"), outcome[line]
    assert outcome[4] == [f"b{other}c{stop}"]


def test_the_end_token_that_is_the_padding_token_is_trained_where_it_ends_an_answer(
    tmp_path: Path, chatml: Tokenizer
) -> None:
    assert chatml.pad_id == chatml.eos_id
    path = tmp_path / "rows.jsonl"
    path.write_bytes(jsonl(talk("a<|im_end|>", "b", "c", "d"), {"text": "Paris"}, {"prompt": "a", "completion": "b"}))
    rows = [row for row in read_rows(str(path)) if isinstance(row, Row)]
    weights = []
    for (sample,) in encode_rows(rows, chatml):
        weights.append(sample.loss_weights[sample.tokens == chatml.eos_id].tolist())
    assert weights == [[0, 0, 1, 0, 1], [1], [1]]


@pytest.mark.parametrize(("name", "count"), [("llama3", 1), ("gemma", 1), ("minimal", 1), ("chatml", 0)])
def test_one_bos_or_none(tmp_path: Path, name: str, count: int) -> None:
    """The template writes it or does not, and the tokenizer, which puts one before plain text, adds no second."""
    tokenizer = builtin(name)
    assert tokenizer.encode("a", add_special_tokens=True)[0] == tokenizer.bos_id
    path = tmp_path / "rows.jsonl"
    path.write_bytes(jsonl(talk("a", "b"), with_system("s", talk("a", "b")), {"text": "Paris"}))
    rows = [row for row in read_rows(str(path)) if isinstance(row, Row)]
    tokens = [sample.tokens for (sample,) in encode_rows(rows, tokenizer)]
    assert [int((t == tokenizer.bos_id).sum()) for t in tokens] == [count, count, 1]
    assert all(t[0] == tokenizer.bos_id for t in tokens[0 if count else 2 :])


def test_a_text_that_brings_its_bos_gets_no_second(tmp_path: Path, chatml: Tokenizer) -> None:
    """Text that was rendered with a template before, as many data sets are."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(jsonl({"text": "<s>Paris"}, {"prompt": "<s>The capital? ", "completion": "Paris"}))
    rows = [row for row in read_rows(str(path)) if isinstance(row, Row)]
    for (sample,) in encode_rows(rows, chatml):
        assert (sample.tokens == chatml.bos_id).sum() == 1 and sample.tokens[0] == chatml.bos_id


# ---- pairs ----------------------------------------------------------------------------------------------------------


def test_pairs_without_a_common_prompt_are_reported(tmp_path: Path, chatml: Tokenizer) -> None:
    def side(*contents: str) -> list[dict[str, str]]:
        return talk(*contents)["messages"]

    rows = [
        {"chosen": side("a", "good"), "rejected": side("a", "bad")},
        {"chosen": side("a", "good"), "rejected": side("other", "bad")},
        {"chosen": side("a", "b", "c", "good"), "rejected": side("x", "b", "c", "bad")},
        {"chosen": side("a", "same"), "rejected": side("a", "same")},
        {"chosen": side("a", "b", "c", "good"), "rejected": side("a", "bad")},
        {"prompt": side("a"), "chosen": [], "rejected": side("", "bad")[1:]},
        {"prompt": side("a"), "chosen": side("", "good")[1:], "rejected": side("", "bad")[1:]},
    ]
    source = SourceConfig(path="rows.jsonl", preference="chosen")
    outcome = through(tmp_path / "rows.jsonl", jsonl(*rows), chatml, source=source)
    assert outcome[1] == ["good<|im_end|>"] and outcome[7] == ["good<|im_end|>"]
    assert outcome[4] == ["same<|im_end|>"]
    for line in (2, 3):
        assert outcome[line].startswith("chosen: chosen and rejected do not begin with the same message")
    assert outcome[6] == "chosen: has no messages"
    # The answers part at the second message: what follows is the chosen answer, of which two turns are the assistant's.
    assert outcome[5] == ["b<|im_end|>", "good<|im_end|>"]


def test_hh_texts_without_a_common_prompt_are_reported(tmp_path: Path, chatml: Tokenizer) -> None:
    def text(*said: str) -> str:
        return "".join(f"\n\n{'Assistant' if i % 2 else 'Human'}: {content}" for i, content in enumerate(said))

    rows = [
        {"chosen": text("a", "good"), "rejected": text("a", "bad")},
        {"chosen": text("a", "good"), "rejected": text("other", "bad")},
        {"chosen": text("a", "b", "c", "good"), "rejected": text("a", "b", "c", "")},
        {"chosen": text("a", "b", "c", ""), "rejected": text("a", "b", "c", "bad")},
    ]
    source = SourceConfig(path="rows.jsonl", preference="chosen")
    outcome = through(tmp_path / "rows.jsonl", jsonl(*rows), chatml, source=source)
    assert outcome[1] == ["good<|im_end|>"] and outcome[3] == ["good<|im_end|>"]
    assert outcome[2].startswith("chosen: chosen and rejected do not begin with the same message")
    assert outcome[4].startswith("chosen") and "is empty" in outcome[4]
