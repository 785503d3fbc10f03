"""LoRA speed and memory, the peer run beside it in the same quiet session.

    python benchmarks/lora.py --model MODEL --data chat.jsonl [--steps 8] [--peer 'COMMAND']

Runs the very train step with an adapter of rank 16 on all linear layers, on packed rows of 1024 tokens, one row a step,
float32, one device; counts real tokens only. `--peer` is a command that prints `RESULT {json}` with the same keys (for
example a TRL script with PEFT in an environment of its own); the two run in turn, `--rounds` times, and the medians'
ratio is printed.
"""

import argparse
from typing import Any

import measuring


def describe(arguments: argparse.Namespace) -> dict[str, Any]:
    """The config that is measured."""
    adapter = {"lora": {"r": arguments.rank}}
    return measuring.config(arguments, model=adapter, optimizer={"learning_rate": 1e-4})


if __name__ == "__main__":
    parser = measuring.parser(__doc__, steps=8, row_length=1024)
    parser.add_argument("--rank", type=int, default=16)
    measuring.main(__file__, parser.parse_args(), describe)
