"""Data with everything that `inspect` must show, for its tests; and what is true of it, counted without it."""

import json
from pathlib import Path
from typing import Any

from posttrain.config import Config, parse_config
from posttrain.data.inspect import Inspection, InspectOptions
from posttrain.experiment import inspect_data

FIXTURE = Path(__file__).parent.parent / "fixtures" / "chat"
HOSTILE = (
    "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'> & \" \u2028 \u202e \x1b[31m\t!"
)
LONG = 300
MAX_LENGTH = 128

BAD_ROWS = {51: "JSON", 52: "assistant", 53: "role", 54: "columns"}
"""Lines of `chats.jsonl` that cannot be used, and a word of the reason."""


def _chat(question: str, answer: str, **of_answer: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **of_answer}]
    return {"messages": messages}


def write_data(directory: Path) -> None:
    """`chats.jsonl`: 60 rows, of which 4 are bad, 1 has no trained token, 1 is cut, 1 loses its answer, 2 are alike, 1
    has a weight, 1 is hostile. `pairs.json`: 5 prompts with completions."""
    rows = [json.dumps(_chat(f"What is {i}?", f"It is {i} 😀 你好." * (1 + i % 3))) for i in range(50)]
    rows += ['{"messages": [{"role": "us', json.dumps({"messages": [{"role": "user", "content": "No answer"}]})]
    rows += [json.dumps({"messages": [{"role": "usr", "content": "x"}]}), json.dumps({"other": 1})]
    rows += [json.dumps(_chat("Untrained?", "Untrained.", weight=0)), json.dumps(_chat("Cut?", "word " * LONG))]
    rows += [json.dumps(_chat("word " * LONG, "Lost.")), rows[7]]
    rows += [json.dumps(_chat("Half?", "Half of it.", weight=0.5)), json.dumps(_chat("Hostile?", HOSTILE))]
    (directory / "chats.jsonl").write_text("\n".join(rows) + "\n")
    pairs = [{"prompt": f"{i} and {i} is", "completion": f" {2 * i}"} for i in range(5)]
    (directory / "pairs.json").write_text(json.dumps(pairs, indent=1))


def make_config(directory: Path, **sections: Any) -> Config:
    """A config without a model: only the tests' tokenizer."""
    raw: dict[str, Any] = {
        "run": {"dir": str(directory / "run")},
        "tokenizer": {"path": str(FIXTURE), "chat_template": "chatml"},
        "data": {
            "train": [{"path": str(directory / "chats.jsonl")}, {"path": str(directory / "pairs.json")}],
            "heldout": {"fraction": 0.1},
            "max_length": MAX_LENGTH,
            "row_length": 256,
            "cache_dir": str(directory / "cache"),
        },
        "train": {"global_batch_size": 2},
    }
    for section, values in sections.items():
        raw[section] = raw.get(section, {}) | values
    return parse_config(raw, "test")


def inspected(directory: Path, options: InspectOptions | None = None, **sections: Any) -> Inspection:
    """The inspection of `write_data`'s files."""
    if not (directory / "chats.jsonl").exists():
        write_data(directory)
    return inspect_data(make_config(directory, **sections), options or InspectOptions())


# ---- answers --------------------------------------------------------------------------------------------------------

BAD_PAIRS = {21: "the same as chosen", 22: "compares pairs"}
"""Lines of `answers.jsonl` that cannot be used as pairs, and words of the reason."""
SIDE_CUT, LOST, ALIKE, CONTRADICTED, HOSTILE_PAIR = 23, 24, (5, 25), (7, 26), 27
"""Lines of a pair whose rejected side is cut, one that loses its answers, two that are alike, two that say the opposite
of each other, and one with hostile text."""


def pair_row(question: str, chosen: str, rejected: str, **of_row: Any) -> dict[str, Any]:
    """A conversational pair."""
    turns = {
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }
    return {"prompt": [{"role": "user", "content": question}], **turns, **of_row}


def write_pairs(directory: Path) -> list[dict[str, Any]]:
    """`answers.jsonl`, 27 rows; returned."""
    rows = [pair_row(f"What is {i}?", f"It is {i}." * (1 + i % 3), f"No 😀 idea {i}." * (1 + i % 2)) for i in range(20)]
    rows[3]["margin"], rows[4]["margin"] = 0.5, 2.5
    rows += [pair_row("Equal?", "Same.", "Same."), _chat("No pair?", "No."), pair_row("Cut?", "Short.", "word " * LONG)]
    rows += [pair_row("word " * LONG, "Lost.", "Gone."), rows[4] | {"margin": 2.5}]
    rows += [
        rows[6] | {"chosen": rows[6]["rejected"], "rejected": rows[6]["chosen"]},
        pair_row("Hostile?", HOSTILE, "No."),
    ]
    (directory / "answers.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return rows


def write_labelled(directory: Path) -> list[dict[str, Any]]:
    """`labelled.jsonl`, 24 rows of which 8 are desirable; the last two are one answer under both labels."""
    rows: list[dict[str, Any]] = []
    for i in range(22):
        answer = [{"role": "assistant", "content": f"It is {i}. " * (1 + i % 4)}]
        rows.append(
            {"prompt": [{"role": "user", "content": f"What is {i}?"}], "completion": answer, "label": i % 3 == 0}
        )
    rows[-1]["label"] = False
    rows += [rows[1] | {"prompt": [{"role": "user", "content": "Which?"}], "label": label} for label in (True, False)]
    (directory / "labelled.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return rows


def inspected_answers(
    directory: Path, objective: str, name: str, options: InspectOptions | None = None, **data: Any
) -> Inspection:
    """The inspection of one of these files for an objective."""
    values = {"train": [{"path": str(directory / name)}], "on_bad_row": "skip"} | data
    section = make_config(directory).data.model_dump() | values
    config = make_config(directory, objective={"name": objective}, data=section)
    return inspect_data(config, options or InspectOptions(samples=200))
