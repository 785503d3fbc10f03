"""`inspect` in the terminal: what is trained can be told with colours and without, and no text steers the terminal."""

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from posttrain.cli import main
from posttrain.config import dump_config
from posttrain.data.inspect import Inspection, InspectOptions
from posttrain.data.inspect_rows import parts
from posttrain.data.inspect_text import OTHER_WEIGHT, SPECIAL, TRAINED, show, tokens_text, visible
from tests.data.inspect_cases import (
    HOSTILE,
    SIDE_CUT,
    inspected,
    inspected_answers,
    make_config,
    write_labelled,
    write_pairs,
)

OPTIONS = InspectOptions(samples=200, rows=3)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inspect")


@pytest.fixture(scope="module")
def inspection(directory: Path) -> Inspection:
    return inspected(directory, OPTIONS)


def printed(
    inspection: Inspection, options: InspectOptions = OPTIONS, *, colour: bool = False, width: int = 100
) -> str:
    output = io.StringIO()
    system = "truecolor" if colour else None
    show(inspection, options, Console(file=output, force_terminal=colour, color_system=system, width=width))
    return output.getvalue()


def test_says_what_there_is(inspection: Inspection) -> None:
    text = printed(inspection)
    numbers = next(line.split() for line in text.splitlines() if line.startswith("data.train.0   "))
    head = next(line for line in text.splitlines() if "Rows" in line and "Tokens" in line)
    assert re.split(r"\s{2,}", head.strip())[:3] == ["Rows", "Samples", "Tokens"] and numbers[1:3] == ["60", "54"]
    for said in (
        "chats.jsonl:53: messages[0].role: unknown role 'usr'",
        '{"messages": [{"role": "us',
        "Bad rows: 4 of 4",
    ):
        assert said in text
    assert "1 sample (1.6%) left out: without a token to train on." in text
    assert "<|im_end|> (3)" in text or re.search(r"Stop tokens +<\|im_end\|> \(\d+\)", text)


def test_lines_of_a_file_are_whole_and_without_colours(inspection: Inspection) -> None:
    text = printed(inspection, width=40)
    assert "\x1b" not in text
    assert "row_length" in text and any(len(line) > 100 for line in text.splitlines())


def test_packed_rows_without_colours(inspection: Inspection) -> None:
    text = printed(inspection)
    row = inspection.packed[0]
    body = text[text.index(f"Step {row.step}, row {row.row}:") :]
    for segment in row.samples:
        assert f"── {segment.file}:{segment.line}  {len(segment.tokens)} tokens" in body
    assert body.count("⟦") == body.count("⟧") > 0
    padding = row.row_length - row.tokens
    assert f"[{padding} place{'s' * (padding != 1)} of padding]" in body


def test_brackets_hold_exactly_what_is_trained(inspection: Inspection) -> None:
    for sample in inspection.samples:
        text = tokens_text(*parts(sample, inspection.tokenizer), plain=True).plain
        inside = "".join(re.findall(r"⟦(?:0\.5: )?(.*?)⟧", text, flags=re.DOTALL))
        trained = [t for t, w in zip(sample.tokens.tolist(), sample.loss_weights.tolist(), strict=True) if w]
        expected = visible(inspection.tokenizer.decode(trained)).replace("\n", "↵\n")
        assert inside == expected
        assert ("⟦0.5: " in text) == ("other weights" in sample.flags)
        assert ("✂" in text) == ("truncated" in sample.flags)


def test_styles_hold_exactly_what_is_trained(inspection: Inspection) -> None:
    for sample in inspection.samples:
        text = tokens_text(*parts(sample, inspection.tokenizer), plain=False)
        trained, special = "", ""
        for span in text.spans:
            part = text.plain[span.start : span.end]
            style = str(span.style)
            trained += part if style.startswith((TRAINED, OTHER_WEIGHT)) else ""
            special += part if style.endswith(SPECIAL) else ""
        ids = [t for t, w in zip(sample.tokens.tolist(), sample.loss_weights.tolist(), strict=True) if w]
        assert trained == visible(inspection.tokenizer.decode(ids)).replace("\n", "↵")
        assert special == "".join(
            inspection.tokenizer.added_texts[t] for t in sample.tokens.tolist() if t in inspection.tokenizer.added_ids
        )
        other = any(str(span.style).startswith(OTHER_WEIGHT) for span in text.spans)
        assert other == ("other weights" in sample.flags)


def test_pairs(directory: Path) -> None:
    rows = write_pairs(directory)
    found = inspected_answers(directory, "sigmoid", "answers.jsonl", OPTIONS)
    text = printed(found)
    body = text[text.index("Step 0, row 0:") :]
    for row in found.packed[:3]:
        for sample in row.samples:
            data = rows[sample.line - 1]
            prompt, chosen, rejected = (data[name][0]["content"] for name in ("prompt", "chosen", "rejected"))
            start = body.index(f":{sample.line}  {len(sample.tokens)} tokens: chosen ")
            at = [body.index(head, start) for head in ("┌ Prompt", prompt, "┌ Chosen", "┌ Rejected")]
            assert at == sorted(at)
            if sample.line != SIDE_CUT:
                assert f"⟦{visible(chosen)}<|im_end|>⟧↵\n" in body[at[2] : at[3]]
                assert f"⟦{visible(rejected)}<|im_end|>⟧↵\n" in body[at[3] :]
    answers = text[text.index("\nAnswers\n") : text.index("What needs attention")]
    assert found.answers is not None
    bars = [int(count) for line in answers.splitlines() for count in re.findall(r"█ (\d+)", line)]
    assert sum(bars) == 2 * found.answers.counts["chosen"] == 48
    assert re.search(r"Chosen answers +\d", answers) and "Half up to" in answers
    (cut,) = [sample for sample in found.samples if sample.line == SIDE_CUT]
    shown = [tokens_text(part, plain=True).plain for part in parts(cut, found.tokenizer)]
    assert ["✂" in part for part in shown] == [False, False, True] and shown[2].endswith("tokens cut off here")


def test_labelled_answers(directory: Path) -> None:
    write_labelled(directory)
    found = inspected_answers(directory, "kto", "labelled.jsonl", OPTIONS)
    text = printed(found)
    body = text[text.index("Step 0, row 0:") :]
    for sample in found.packed[0].samples:
        label = "desirable" if sample.label > 0 else "undesirable"
        head = body[body.index(f":{sample.line}  ") :].split("\n")[0]
        assert f": {label} {sample.segments[0].trained} trained, mismatched " in head and f"({label}" in head
    assert "┌ Mismatched" in body and "8 (33%) are desirable" in text


def test_nothing_steers_the_terminal(directory: Path) -> None:
    options = InspectOptions(find="hostile", rows=1)
    text = printed(inspected(directory, options), options)
    assert "⟨U+001B⟩[31m" in text and "⟨U+202E⟩" in text and "⟨U+2028⟩" in text and "⇥!" in text
    assert not set(text) & set("\x1b\u202e\u2028\t")
    coloured = printed(inspected(directory, options), options, colour=True)
    codes = set(re.findall(r"\x1b[^m]*m", coloured))
    assert codes and "\x1b[31m" not in codes, "the only colours are our own"


def test_visible() -> None:
    assert visible("plain ü 你好 😀") == "plain ü 你好 😀"
    assert visible("a\tb\r\n\x07\u00ad\ufeff") == "a⇥b⟨U+000D⟩\n⟨U+0007⟩⟨U+00AD⟩⟨U+FEFF⟩"
    assert visible("👩\u200d🔬 क\u200cष") == "👩\u200d🔬 क\u200cष", "joiners belong to words and emoji"


def test_command(directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    inspected(directory)
    config = directory / "config.yaml"
    config.write_text(dump_config(make_config(directory)))
    page = directory / "new" / "page.html"
    with pytest.raises(SystemExit) as done:
        main(["inspect", str(config), "--rows", "1", "--html", str(page), "--data.max_length", "200"])
    assert done.value.code == 0
    output = capsys.readouterr().out
    assert "data.max_length = 200" in output and f"written: {page}" in output
    assert page.read_text().startswith("<!doctype html>") and "</html>" in page.read_text()
    with pytest.raises(SystemExit) as done:
        main(["inspect", str(config), "--find", "no such text anywhere"])
    assert done.value.code == 0 and "0 samples with 'no such text anywhere'" in capsys.readouterr().out
    with pytest.raises(SystemExit) as done:
        main(["inspect", str(config), "--step", "1000000"])
    assert done.value.code == 2 and "--step 1000000" in capsys.readouterr().err


def test_the_hostile_row_is_hostile() -> None:
    assert {"\x1b", "\u202e", "\u2028", "\t", "<"} <= set(HOSTILE) and "</script>" in json.dumps(HOSTILE)
