"""Full fine-tuning speed and memory, the peer run beside it in the same quiet session.

    python benchmarks/sft.py --model MODEL --data chat.jsonl [--steps 8] [--peer 'COMMAND']

Runs the very train step on packed rows of 1024 tokens, one row a step, float32, one device; counts real tokens only.
`--peer` is a command that prints `RESULT {json}` with the same keys (for example a TRL script in an environment of its
own); the two run in turn, `--rounds` times, and the medians' ratio is printed.
"""

import argparse
import tempfile
from typing import Any

import measuring


def describe(arguments: argparse.Namespace) -> dict[str, Any]:
    """The config that is measured."""
    return {
        "run": {"dir": tempfile.mkdtemp()},
        "model": {"path": arguments.model, "remat": arguments.remat},
        "data": {
            "train": [{"path": arguments.data}],
            "heldout": {"fraction": 0.0},
            "max_length": arguments.row_length,
            "row_length": arguments.row_length,
        },
        "train": {"global_batch_size": arguments.rows, "max_steps": arguments.steps},
        "optimizer": {"learning_rate": 1e-5},
        "mesh": {"data": arguments.data_axis, "fsdp": arguments.fsdp},
    }


if __name__ == "__main__":
    measuring.main(__file__, measuring.parser(__doc__, steps=8, row_length=1024).parse_args(), describe)
