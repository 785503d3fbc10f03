"""DPO speed and memory, the peer run beside it in the same quiet session.

    python benchmarks/dpo.py --model MODEL --data pairs.jsonl [--steps 8] [--peer 'COMMAND']

Runs the very train step on packed pairs, answers of at most 512 tokens with their prompts, float32, one device, the
reference's log-probabilities computed before (their time is not counted, as the peer's is not); counts real tokens
only. `--peer` is a command that prints `RESULT {json}` with the same keys (for example a TRL script in an environment
of its own); the two run in turn, `--rounds` times, and the medians' ratio is printed.
"""

import argparse
from typing import Any

import measuring


def describe(arguments: argparse.Namespace) -> dict[str, Any]:
    """The config that is measured."""
    objective = {"name": "sigmoid", "beta": 0.1}
    return measuring.config(arguments, data={"max_length": arguments.max_length}, objective=objective)


if __name__ == "__main__":
    options = measuring.parser(__doc__, steps=8, row_length=1024)
    options.add_argument("--max-length", type=int, default=512)
    measuring.main(__file__, options.parse_args(), describe)
