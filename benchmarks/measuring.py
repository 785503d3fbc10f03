"""What the training benchmarks share: the very train step timed on real rows, and a peer's command in turn with it."""

import argparse
import json
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

UNITS = {
    "nonpad_tok_per_s": "real tokens/s",
    "best_step_tok_per_s": "real tokens/s, best step",
    "tok_per_cpu_s": "real tokens/CPU s",
    "peak_rss_mb": "MB peak",
}


def config(arguments: argparse.Namespace, **sections: dict[str, Any]) -> dict[str, Any]:
    """Full fine-tuning as the options say; what `sections` give is added to it."""
    raw = {
        "run": {"dir": tempfile.mkdtemp()},
        "model": {"path": arguments.model, "dtype": arguments.dtype, "remat": arguments.remat},
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
    return raw | {name: raw.get(name, {}) | values for name, values in sections.items()}


def time_steps(raw: dict[str, Any], skip: int) -> dict[str, Any]:
    """Figures of the train step that a config describes, over its steps but for the first `skip`: real tokens only."""
    import jax
    import numpy as np

    from posttrain.config import parse_config
    from posttrain.experiment import build
    from posttrain.train.flops import StepFlops, peak_flops
    from posttrain.train.heldout import global_batches
    from posttrain.train.loop import compile_step
    from posttrain.train.reference import with_reference

    experiment = build(parse_config(raw, "benchmark"))
    peak, _ = peak_flops(jax.devices())
    started = time.monotonic()
    attach_reference = with_reference(experiment)
    reference_seconds = time.monotonic() - started
    started = time.monotonic()
    step = compile_step(experiment)
    compile_seconds = time.monotonic() - started
    state = experiment.initial_state()
    flops = StepFlops(experiment.model.config, experiment.adapter_weights)
    seconds, cpu, tokens, work, losses = [], [], [], [], []
    for index, batch in global_batches(experiment.data.train, experiment.mesh, experiment.micro_rows):
        started, cpu_started = time.monotonic(), time.process_time()
        state, logged = step(state, attach_reference(state.params, batch))
        jax.block_until_ready(logged)
        seconds.append(time.monotonic() - started)
        cpu.append(time.process_time() - cpu_started)
        tokens.append(float(np.asarray(logged["num_tokens"])))
        work.append(flops(experiment.data.train, index))
        losses.append(round(float(logged["loss"]), 4))
    return {
        "nonpad_tok_per_s": round(sum(tokens[skip:]) / sum(seconds[skip:]), 1),
        "best_step_tok_per_s": round(max(t / s for t, s in zip(tokens[skip:], seconds[skip:], strict=True)), 1),
        "tok_per_cpu_s": round(sum(tokens[skip:]) / sum(cpu[skip:]), 1),
        "mfu": round(sum(work[skip:]) / sum(seconds[skip:]) / peak, 3) if peak else None,
        "matmul_gflops": round(peak / 1e9) if peak else None,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "compile_s": round(compile_seconds, 1),
        "reference_s": round(reference_seconds, 1),
        "step_s": [round(s, 2) for s in seconds],
        "tokens": tokens,
        "loss": losses,
    }


def parser(description: str | None, *, steps: int, row_length: int) -> argparse.ArgumentParser:
    """The options that all of them have."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--model", required=True)
    result.add_argument("--data", required=True)
    result.add_argument("--steps", type=int, default=steps)
    result.add_argument("--skip", type=int, default=2)
    result.add_argument("--rows", type=int, default=1)
    result.add_argument("--row-length", type=int, default=row_length)
    result.add_argument("--data-axis", type=int, default=1)
    result.add_argument("--fsdp", type=int, default=1)
    result.add_argument("--remat", default="dots")
    result.add_argument("--dtype", default="float32", help="compute dtype; parameters stay float32")
    result.add_argument("--peer")
    result.add_argument("--rounds", type=int, default=2)
    return result


def main(script: str, arguments: argparse.Namespace, describe: Callable[[argparse.Namespace], dict[str, Any]]) -> None:
    """Measures once and prints `RESULT {json}`; with a peer, runs both in turn and prints the medians' ratios.

    Every measurement is a process of its own, so that its peak memory is its own. `describe` makes the config.
    """
    if arguments.peer is None:
        print("RESULT " + json.dumps(time_steps(describe(arguments), arguments.skip)))
        return
    own = [
        sys.executable,
        script,
        *(f"--{k.replace('_', '-')}={v}" for k, v in vars(arguments).items() if v and k != "peer"),
    ]
    rounds = [(_run(own), _run(shlex.split(arguments.peer))) for _ in range(arguments.rounds)]
    for name, unit in UNITS.items():
        ours, peers = (statistics.median(pair[side][name] for pair in rounds) for side in (0, 1))
        print(f"{unit}: posttrain {ours:.0f}, peer {peers:.0f}, ratio {ours / peers:.2f}")
    print(json.dumps(rounds))


def _run(command: list[str]) -> dict[str, Any]:
    """The figures that a command prints behind `RESULT `."""
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(next(line for line in printed.splitlines() if line.startswith("RESULT ")).removeprefix("RESULT "))
