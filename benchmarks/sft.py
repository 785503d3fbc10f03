"""Full fine-tuning speed and memory, the peer run beside it in the same quiet session.

    python benchmarks/sft.py --model MODEL --data chat.jsonl [--steps 8] [--peer 'COMMAND']

Runs the very train step on packed rows of 1024 tokens, one row a step, float32, one device; counts real tokens only.
`--peer` is a command that prints `RESULT {json}` with the same keys, see `main` (for example a TRL script in an
environment of its own); the two run in turn, `--rounds` times, and the medians' ratio is printed.
"""

import argparse
import json
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """This process's own figures: prints nothing."""
    import jax
    import numpy as np

    from posttrain.config import parse_config
    from posttrain.experiment import build
    from posttrain.train.flops import StepFlops, peak_flops
    from posttrain.train.heldout import global_batches
    from posttrain.train.loop import compile_step

    raw = {
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
    experiment = build(parse_config(raw, "benchmark"))
    peak, _ = peak_flops(jax.devices())
    started = time.monotonic()
    step = compile_step(experiment)
    compile_seconds = time.monotonic() - started
    state = experiment.initial_state()
    flops = StepFlops(experiment.model.config)
    seconds, cpu, tokens, work, losses = [], [], [], [], []
    for index, batch in global_batches(experiment.data.train, experiment.mesh, experiment.micro_rows):
        started, cpu_started = time.monotonic(), time.process_time()
        state, logged = step(state, batch)
        jax.block_until_ready(logged)
        seconds.append(time.monotonic() - started)
        cpu.append(time.process_time() - cpu_started)
        tokens.append(float(np.asarray(logged["num_tokens"])))
        work.append(flops(experiment.data.train, index))
        losses.append(round(float(logged["loss"]), 4))
    skip = arguments.skip
    return {
        "nonpad_tok_per_s": round(sum(tokens[skip:]) / sum(seconds[skip:]), 1),
        "best_step_tok_per_s": round(max(t / s for t, s in zip(tokens[skip:], seconds[skip:], strict=True)), 1),
        "tok_per_cpu_s": round(sum(tokens[skip:]) / sum(cpu[skip:]), 1),
        "mfu": round(sum(work[skip:]) / sum(seconds[skip:]) / peak, 3) if peak else None,
        "matmul_gflops": round(peak / 1e9) if peak else None,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "compile_s": round(compile_seconds, 1),
        "step_s": [round(s, 2) for s in seconds],
        "tokens": tokens,
        "loss": losses,
    }


def run(command: list[str]) -> dict[str, Any]:
    """The figures that a command prints behind `RESULT `."""
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(next(line for line in printed.splitlines() if line.startswith("RESULT ")).removeprefix("RESULT "))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--skip", type=int, default=2)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--row-length", type=int, default=1024)
    parser.add_argument("--data-axis", type=int, default=1)
    parser.add_argument("--fsdp", type=int, default=1)
    parser.add_argument("--remat", default="dots")
    parser.add_argument("--peer")
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.peer is None:
        print("RESULT " + json.dumps(measure(arguments)))
        return
    own = [
        sys.executable,
        __file__,
        *(f"--{k.replace('_', '-')}={v}" for k, v in vars(arguments).items() if v and k != "peer"),
    ]
    rounds = [(run(own), run(shlex.split(arguments.peer))) for _ in range(arguments.rounds)]
    units = {
        "nonpad_tok_per_s": "real tokens/s",
        "best_step_tok_per_s": "real tokens/s, best step",
        "tok_per_cpu_s": "real tokens/CPU s",
        "peak_rss_mb": "MB peak",
    }
    for name, unit in units.items():
        ours, peers = (statistics.median(pair[side][name] for pair in rounds) for side in (0, 1))
        print(f"{unit}: posttrain {ours:.0f}, peer {peers:.0f}, ratio {ours / peers:.2f}")
    print(json.dumps(rounds))


if __name__ == "__main__":
    main()
