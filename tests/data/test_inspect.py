"""What `inspect` gathers: nothing stops it, every number is right, and the remarkable samples are among those shown."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from posttrain.data.inspect import Inspection, InspectOptions
from posttrain.data.inspect_lengths import length_histogram
from posttrain.data.inspect_samples import TRAINED_ON
from posttrain.data.inspect_summary import (
    headline,
    marks_text,
    notices,
    percent,
    source_table,
)
from posttrain.data.stats import TRUNCATED_AWAY, UNTRAINED
from posttrain.errors import UserError, UserErrors
from tests.data.chat_cases import TEMPLATES
from tests.data.inspect_cases import BAD_ROWS, FIXTURE, HOSTILE, MAX_LENGTH, inspected, make_config, write_data


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inspect")


@pytest.fixture(scope="module")
def inspection(directory: Path) -> Inspection:
    return inspected(directory, InspectOptions(samples=200))


def independent_lengths(directory: Path) -> list[int]:
    """Tokens of every usable row, by `transformers` alone."""
    hf = AutoTokenizer.from_pretrained(str(FIXTURE))
    chatml = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    lengths = []
    for number, line in enumerate((directory / "chats.jsonl").read_text().split("\n")[:-1], 1):
        if number not in BAD_ROWS:
            text = hf.apply_chat_template(json.loads(line)["messages"], chat_template=chatml, tokenize=False)
            lengths.append(len(hf(text, add_special_tokens=False)["input_ids"]))
    for row in json.loads((directory / "pairs.json").read_text()):
        lengths.append(len(hf(row["prompt"] + row["completion"])["input_ids"]) + 1)
    return lengths


def test_bad_rows_do_not_stop_it_and_are_shown(inspection: Inspection) -> None:
    assert inspection.problem == "" and inspection.datasets is not None
    assert inspection.bad_rows == len(BAD_ROWS)
    assert [reject.line for reject in inspection.rejects] == list(BAD_ROWS)
    for reject, word in zip(inspection.rejects, BAD_ROWS.values(), strict=True):
        assert word in f"{reject.place} {reject.reason}"
        assert reject.file.endswith("chats.jsonl")
    assert inspection.rejects[0].raw == '{"messages": [{"role": "us', "a line that is no JSON is shown as it is"
    assert json.loads(inspection.rejects[3].raw) == {"other": 1}


def test_what_training_would_do_with_bad_rows_is_said(directory: Path, inspection: Inspection) -> None:
    assert next((n.level, n.flag) for n in notices(inspection)) == ("stop", "rejected")
    skipping = inspected(directory, data=make_config(directory).data.model_dump() | {"on_bad_row": "skip"})
    assert [n.level for n in notices(skipping) if n.flag == "rejected"] == ["warn"]
    few = inspected(
        directory, data=make_config(directory).data.model_dump() | {"on_bad_row": "skip", "max_bad_rows": 3}
    )
    assert "data.max_bad_rows = 3" in next(n.fix for n in notices(few) if n.flag == "rejected")


def test_nothing_is_written_into_the_run_directory(directory: Path, inspection: Inspection) -> None:
    assert not (directory / "run").exists()


def test_every_sample_is_shown_with_its_fate(inspection: Inspection) -> None:
    assert len(inspection.samples) == 61, "56 usable rows of one file and 5 of the other"
    fates = {(Path(s.file).name, s.line): s.fate for s in inspection.samples}
    assert fates["chats.jsonl", 55] == UNTRAINED
    assert fates["chats.jsonl", 57] == TRUNCATED_AWAY
    assert inspection.datasets is not None and inspection.datasets.heldout is not None
    counts = Counter(fates.values())
    assert counts["held out"] == len(inspection.datasets.heldout.table)
    assert counts[TRAINED_ON] == len(inspection.datasets.train.table)


def test_flags(inspection: Inspection) -> None:
    flags = {(Path(s.file).name, s.line): set(s.flags) - {"held out"} for s in inspection.samples}
    expected = {55: {"dropped"}, 56: {"truncated"}, 57: {"dropped"}, 8: {"duplicate"}, 58: {"duplicate"}}
    expected[59] = {"other weights"}
    for (name, line), found in flags.items():
        assert found == (expected.get(line, set()) if name == "chats.jsonl" else set()), (name, line)


def test_samples_are_what_the_model_sees(inspection: Inspection) -> None:
    hf = AutoTokenizer.from_pretrained(str(FIXTURE))
    by_line = {s.line: s for s in inspection.samples if s.file.endswith("chats.jsonl")}
    hostile = by_line[60]
    text = f"<|im_start|>user\nHostile?<|im_end|>\n<|im_start|>assistant\n{HOSTILE}<|im_end|>\n"
    assert hostile.tokens.tolist() == hf(text, add_special_tokens=False)["input_ids"]
    trained = [t for t, w in zip(hostile.tokens.tolist(), hostile.loss_weights.tolist(), strict=True) if w]
    assert hf.decode(trained) == f"{HOSTILE}<|im_end|>"
    assert json.loads(hostile.raw)["messages"][1]["content"] == HOSTILE
    cut = by_line[56]
    (part,) = cut.segments
    assert len(cut.tokens) == MAX_LENGTH and part.cut_before == 0
    whole = f"<|im_start|>user\nCut?<|im_end|>\n<|im_start|>assistant\n{'word ' * 300}<|im_end|>\n"
    assert part.cut_behind == len(hf(whole, add_special_tokens=False)["input_ids"]) - MAX_LENGTH
    assert set(by_line[59].loss_weights.tolist()) == {0.0, 0.5}
    (lost,) = by_line[57].segments
    assert lost.border == MAX_LENGTH and lost.loss_weights[lost.border :].any() and not lost.cut_behind


def test_cut_at_the_start(directory: Path) -> None:
    data = make_config(directory).data.model_dump() | {"truncation": "keep_end"}
    found = inspected(directory, InspectOptions(samples=200), data=data)
    by_line = {s.line: s for s in found.samples if s.file.endswith("chats.jsonl")}
    (cut,) = by_line[56].segments
    assert cut.cut_before > 200 and cut.cut_behind == 0
    assert by_line[56].loss_weights[0] == 0, "nothing predicts the first token"
    assert by_line[57].fate in (TRAINED_ON, "held out"), "its answer is at the end, and kept"


def test_lengths_are_those_of_transformers(directory: Path, inspection: Inspection) -> None:
    lengths = independent_lengths(directory)
    assert inspection.lengths.tolist() == sorted(lengths)
    histogram = length_histogram(inspection)
    assert MAX_LENGTH + 1 in histogram.edges, "no bucket has samples on both sides of data.max_length"
    expected = [sum(a <= n < b for n in lengths) for a, b in zip(histogram.edges, histogram.edges[1:], strict=False)]
    assert histogram.counts == (tuple(expected),) and sum(expected) == len(lengths)


def test_summary_counts(directory: Path, inspection: Inspection) -> None:
    table = source_table(inspection)
    chats, pairs = (dict(zip(table.columns, row, strict=True)) for row in table.rows)
    assert [chats[name][0] for name in ("Rows", "Samples", "Dropped", "Cut", "Bad rows", "Duplicates")] == [
        *("60", "54", "2", "1", "4", "1")
    ]
    assert pairs["Rows"][0] == pairs["Samples"][0] == "5"
    lengths = [min(n, MAX_LENGTH) for n in independent_lengths(directory)]
    dropped = [min(n, MAX_LENGTH) for n in (len(s.tokens) for s in inspection.samples if "dropped" in s.flags)]
    assert table.total is not None
    total = dict(zip(table.columns, table.total, strict=True))
    assert total["Tokens"][0] == f"{sum(lengths) - sum(dropped):,}"
    shown = {name: value for name, value, _ in headline(inspection)}
    assert inspection.datasets is not None
    tokens = sum(len(s.tokens) for s in inspection.samples if s.fate == TRAINED_ON)
    trained = sum(int(np.count_nonzero(s.loss_weights)) for s in inspection.samples if s.fate == TRAINED_ON)
    assert shown["Tokens per epoch"] == f"{tokens:,}"
    assert shown["Tokens trained on"] == f"{trained:,}"


def test_packed_rows_are_those_of_training(inspection: Inspection) -> None:
    assert inspection.datasets is not None
    train = inspection.datasets.train
    for row in inspection.packed:
        batch = train.read(row.step, np.array([row.row]))
        tokens = np.concatenate([segment.tokens for segment in row.samples])
        weights = np.concatenate([segment.loss_weights for segment in row.samples])
        assert batch.tokens[0, : row.tokens].tolist() == tokens.tolist()
        assert batch.loss_weights[0, : row.tokens].tolist() == weights.tolist()
        assert not np.asarray(batch.segment_ids)[0, row.tokens :].any()
        assert [f"{s.file}:{s.line}" for s in row.samples] == train.describe(row.step, row.row)


def test_a_step_and_an_epoch(directory: Path) -> None:
    data = make_config(directory).data.model_dump() | {"epochs": 3}
    third = inspected(directory, InspectOptions(step=2), data=data)
    assert (third.packed[0].step, third.packed[0].row) == (2, 0)
    second = inspected(directory, InspectOptions(epoch=1), data=data)
    assert second.datasets is not None
    assert second.packed[0].step == second.datasets.train.steps_per_epoch[0]
    with pytest.raises(UserError, match=r"--epoch 3.*0 to 2"):
        inspected(directory, InspectOptions(epoch=3), data=data)
    with pytest.raises(UserError, match=r"--step 99"):
        inspected(directory, InspectOptions(step=99), data=data)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (InspectOptions(rows=-1), "--rows"),
        (InspectOptions(epoch=0, step=0), "one of them"),
        (InspectOptions(find=""), "--find"),
    ],
)
def test_wrong_options(directory: Path, options: InspectOptions, said: str) -> None:
    with pytest.raises(UserError, match=said):
        inspected(directory, options)


def test_find(directory: Path) -> None:
    found = inspected(directory, InspectOptions(find="WHAT IS 3", samples=4))
    texts = [json.loads(line) for line in (directory / "chats.jsonl").read_text().split("\n")[:50]]
    assert found.matches == sum("What is 3" in row["messages"][0]["content"] for row in texts) == 11
    assert len(found.samples) == 4
    assert found.rejects == ()
    assert [r.line for r in inspected(directory, InspectOptions(find="other")).rejects] == [54]


def test_a_few_samples_are_a_spread(directory: Path) -> None:
    few = inspected(directory, InspectOptions(samples=20))
    assert len(few.samples) == 20 and len({(s.file, s.line) for s in few.samples}) == 20
    flags = {flag for sample in few.samples for flag in sample.flags}
    assert flags == {"dropped", "truncated", "duplicate", "held out", "other weights"}
    assert {s.key for s in few.samples} == {"data.train.0", "data.train.1"}
    again = inspected(directory, InspectOptions(samples=20))
    assert [(s.file, s.line) for s in again.samples] == [(s.file, s.line) for s in few.samples]
    assert len(inspected(directory, InspectOptions(samples=1)).samples) == 1


def test_data_that_training_refuses_is_shown(directory: Path) -> None:
    data = make_config(directory).data.model_dump() | {"max_length": 8, "row_length": 8}
    found = inspected(directory, data=data)
    assert found.datasets is None and "drop out" in found.problem and found.packed == ()
    assert notices(found)[0].level == "stop" and "drop out" in notices(found)[0].text
    assert found.samples and found.rejects
    assert all("dropped" in s.flags for s in found.samples if s.file.endswith("chats.jsonl"))


def test_heldout_file_and_overlap(directory: Path) -> None:
    rows = (directory / "chats.jsonl").read_text().split("\n")
    (directory / "heldout.jsonl").write_text("\n".join([rows[0], rows[1].replace("It is", "Well, it is")]) + "\n")
    data = make_config(directory).data.model_dump()
    data["heldout"] = {"path": str(directory / "heldout.jsonl"), "fraction": 0}
    found = inspected(directory, InspectOptions(samples=200), data=data)
    assert [s.fate for s in found.samples if s.key == "data.heldout"] == ["held out", "held out"]
    assert any("1 are exactly among the training" in n.text and "2 share a prompt" in n.text for n in notices(found))


def test_files_that_cannot_be_read_stop_it(directory: Path) -> None:
    data = make_config(directory).data.model_dump() | {"train": ({"path": str(directory / "none.jsonl")},)}
    with pytest.raises(UserError, match=r"none\.jsonl"):
        inspected(directory, data=data)
    with pytest.raises(UserErrors, match=r"tokenizer\.path.*\n.*over data\.row_length|row_length.*\n.*tokenizer\.path"):
        inspected(
            directory, tokenizer={"path": None}, data=make_config(directory).data.model_dump() | {"row_length": 16}
        )


def test_rows_of_a_changed_file_are_not_mistaken(directory: Path, tmp_path: Path) -> None:
    """The cache is what is trained on; a row that no longer gives the sample is not shown beside it."""
    from posttrain.data.chat import encode_rows
    from posttrain.data.inspect_rows import show_samples
    from posttrain.data.inspect_samples import alike_hashes, choose

    write_data(tmp_path)
    found = inspected(tmp_path)
    (tmp_path / "chats.jsonl").write_text(json.dumps({"text": "Something else."}) + "\n")
    files = found.files[:1]
    alike = alike_hashes(files)
    places = choose(files, 10, alike=alike, seed=0)
    shown = show_samples(files, places, lambda rows: encode_rows(rows, found.tokenizer), alike=alike)
    assert len(shown) == 10 and all(sample.raw == "" for sample in shown)


def test_template_marks(directory: Path, tmp_path: Path) -> None:
    def with_template(name: str | Path) -> Inspection:
        return inspected(directory, InspectOptions(samples=200), tokenizer={"chat_template": str(name)})

    exact = with_template(TEMPLATES / "generation_marks.jinja")
    assert (exact.marks.compared, exact.marks.equal, exact.marks.rows) == (56, 56, ())
    assert "56 are marked as they are trained" in marks_text(exact)
    source = (TEMPLATES / "generation_marks.jinja").read_text()
    ends = tmp_path / "ends.jinja"
    ends.write_text(
        source.replace("+ '<|im_end|>' -}}\n{%- endgen", "-}}\n{%- endgen").replace(
            "{%- endgeneration -%}", "{%- endgeneration -%}{{- '<|im_end|>' -}}"
        )
    )
    without_stop = with_template(ends)
    assert (without_stop.marks.equal, without_stop.marks.ends_only) == (0, 56)
    stop = without_stop.tokenizer.added_tokens["<|im_end|>"]
    for row in without_stop.marks.rows:
        assert set(row.tokens[row.ours & ~row.theirs].tolist()) == {stop}
        assert not (row.theirs & ~row.ours).any()
    wrong = tmp_path / "wrong.jinja"
    wrong.write_text(source.replace("message['role'] == 'assistant'", "message['role'] == 'user'"))
    swapped = with_template(wrong)
    assert swapped.marks.compared == 56 and swapped.marks.equal == swapped.marks.ends_only == 0
    assert len(swapped.marks.rows) == 12
    assert any(n.level == "warn" and "own marks differ" in n.text for n in notices(swapped))
    none = with_template(TEMPLATES / "trims_content.jinja")
    assert none.marks.compared == 0 and "has no {% generation %} marks" in marks_text(none)


def test_tools(tmp_path: Path) -> None:
    template = tmp_path / "tools.jinja"
    template.write_text(
        "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}"
        "<|im_start|>{{ m.role }}\n{{ m.content or '' }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    turns = [{"role": "user", "content": "Look?"}, {"role": "assistant", "content": "I did."}]
    call = {"type": "function", "function": {"name": "look", "arguments": {}}}
    called = [turns[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    rows = [{"messages": turns}, {"messages": turns, "tools": [tool]}, {"messages": called}]
    (tmp_path / "chats.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    data = {"train": [{"path": str(tmp_path / "chats.jsonl")}], "heldout": {"fraction": 0}}
    found = inspected(tmp_path, tokenizer={"chat_template": str(template)}, data=data)
    assert found.rejects == ()
    assert {sample.line: "has tools" in sample.flags for sample in found.samples} == {1: False, 2: True, 3: True}


def test_split_conversations(tmp_path: Path) -> None:
    turns = [("user", "1?"), ("assistant", "One."), ("user", "2?"), ("assistant", "<think>Hm.</think>Two.")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    (tmp_path / "chats.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    template = str(TEMPLATES / "strips_thinking.jinja")
    source = {"path": str(tmp_path / "chats.jsonl")}
    data = {"train": [source], "heldout": {"fraction": 0}, "cache_dir": str(tmp_path / "cache")}
    found = inspected(tmp_path, tokenizer={"chat_template": template}, data=data)
    assert len(found.samples) == 6 and all("split" in sample.flags for sample in found.samples)
    assert any(n.flag == "split" and n.text.startswith("3 ") for n in notices(found))


def test_needs_no_device_and_no_weights(directory: Path) -> None:
    """In a process whose JAX would find no device at all."""
    write_data(directory)
    code = (
        "import json, sys\n"
        "from posttrain.config import parse_config\n"
        "from posttrain.data.inspect import InspectOptions\n"
        "from posttrain.experiment import inspect_data\n"
        "found = inspect_data(parse_config(json.load(sys.stdin), 'test'), InspectOptions())\n"
        "print(len(found.samples))\n"
    )
    environment = os.environ | {"JAX_PLATFORMS": "no_such_platform"}
    config = json.dumps(make_config(directory).model_dump(mode="json"))
    done = subprocess.run(
        [sys.executable, "-c", code], input=config, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["60"]


def test_percent_never_claims_all_or_nothing() -> None:
    assert [percent(part, 100_000) for part in (0, 1, 60, 500, 1_234, 50_000, 99_999, 100_000)] == [
        *("0%", "< 0.01%", "0.06%", "0.5%", "1.2%", "50%", "> 99.99%", "100%")
    ]
    assert percent(0, 0) == "0%"
