"""GSM8K's files to the three data sets of the chain: chats of right solutions, and pairs of a right and a wrong one.

    python configs/chain/prepare.py GSM8K OUT        # GSM8K holds train.jsonl and example_model_solutions.jsonl

https://github.com/openai/grade-school-math has both under grade_school_math/data. OUT gets chats.jsonl (problems of
train.jsonl with their solutions), pairs.jsonl and heldout.jsonl (of example_model_solutions.jsonl, whose problems are
others): model-written right and wrong solutions to one problem. No problem is in both. Training problems give up to
three pairs, held-out ones one each, so that held-out pairs are independent. The same files give the same pairs.
"""

import argparse
import hashlib
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HELDOUT_SHARE = 0.4
PAIRS_A_PROBLEM = 3
SYSTEM = "Solve the problem step by step."


def rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file."""
    if not path.is_file():
        raise SystemExit(f"{path}: not there; download it from https://github.com/openai/grade-school-math")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def prompt(question: str) -> list[dict[str, str]]:
    """The messages before an answer."""
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]


def answer(text: str) -> list[dict[str, str]]:
    """An answer in the form of the model-written solutions, whose result stands behind `A:`."""
    return [{"role": "assistant", "content": text.replace("\n#### ", "\nA: ")}]


def lot(text: str) -> float:
    """A number from 0 to 1 that only the text decides."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def pairs(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Every right solution of a problem with every wrong one, in an order drawn by lot."""
    solutions = [value for value in row.values() if isinstance(value, dict)]
    right = [solution["solution"] for solution in solutions if solution["is_correct"]]
    wrong = [solution["solution"] for solution in solutions if not solution["is_correct"]]
    both = sorted(itertools.product(right, wrong), key=lambda pair: lot("\n".join(pair)))
    question = prompt(row["question"])
    return [{"prompt": question, "chosen": answer(good), "rejected": answer(bad)} for good, bad in both]


def write(path: Path, made: Iterable[dict[str, Any]]) -> None:
    """Writes JSON Lines and says how many."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in made]
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{path}: {len(lines):,} rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gsm8k", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    problems = rows(arguments.gsm8k / "train.jsonl")
    compared = rows(arguments.gsm8k / "example_model_solutions.jsonl")
    arguments.out.mkdir(parents=True, exist_ok=True)
    chats = ({"messages": prompt(row["question"]) + answer(row["answer"])} for row in problems)
    write(arguments.out / "chats.jsonl", chats)
    heldout = [row for row in compared if lot(row["question"]) < HELDOUT_SHARE]
    training = [row for row in compared if lot(row["question"]) >= HELDOUT_SHARE]
    write(arguments.out / "pairs.jsonl", (pair for row in training for pair in pairs(row)[:PAIRS_A_PROBLEM]))
    write(arguments.out / "heldout.jsonl", (pair for row in heldout for pair in pairs(row)[:1]))


if __name__ == "__main__":
    main()
