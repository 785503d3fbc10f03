"""Where a train step on CPU spends its time, beside this machine's own rate of matrix products.

    python benchmarks/step_profile.py --model MODEL --data chat.jsonl [--row-length 1024] [--top 15]

Runs the step that `sft.py` times, the last time under JAX's profiler, and joins what every thread did with the compiled
program: matrix products, sums, moves (copies, slices, transposes: what writes its operands elsewhere), elementwise
work, the runtime itself, and the rest. Seconds are of all threads together; a step that filled every core would have as
many a second as there are cores. Of a matrix product only the thread that began it is in the trace: what others do for
it is in the rest, with waiting. How long all products would take at the machine's own rate (that of MFU,
`train/flops.py`, measured in the same process) tells the two apart.
"""

import argparse
import os
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import measuring
from jax.profiler import ProfileData

from posttrain.config import parse_config
from posttrain.experiment import build
from posttrain.plan.hlo import Computation, Instruction, Module, parse
from posttrain.plan.program import product_flops
from posttrain.train.flops import peak_flops
from posttrain.train.heldout import global_batches
from posttrain.train.loop import compile_step
from posttrain.train.metrics import table

MOVES = frozenset(
    (
        *(
            "parameter",
            "constant",
            "bitcast",
            "tuple",
            "get-tuple-element",
            "copy",
            "transpose",
            "reshape",
            "broadcast",
        ),
        *("slice", "dynamic-slice", "dynamic-update-slice", "concatenate", "pad", "gather", "convert", "iota"),
        *("compare", "select", "clamp"),
    )
)
"""What a fusion that only moves consists of; the last line are those of its indices."""
THREADS = "XLAEigen"
"""How the names of the threads begin, behind a prefix, that run operations."""


@dataclass
class Spent:
    """Of one operation."""

    calls: int = 0
    seconds: float = 0.0


def spent(trace: str) -> dict[str, Spent]:
    """By operation, over all threads: the time in it and in nothing that it called."""
    found: dict[str, Spent] = defaultdict(Spent)
    profile = ProfileData.from_file(str(next(Path(trace).rglob("*.xplane.pb"))))
    for line in (line for plane in profile.planes for line in plane.lines if THREADS in line.name):
        around: list[tuple[float, str]] = []
        for start, negative, name in sorted((e.start_ns, -e.duration_ns, e.name) for e in line.events):
            duration = -negative
            while around and around[-1][0] <= start:
                around.pop()
            if around:
                found[around[-1][1]].seconds -= duration / 1e9
            found[name].calls += 1
            found[name].seconds += duration / 1e9
            around.append((start + duration, name))
    return found


def kind_and_flops(module: Module, computation: Computation, one: Instruction) -> tuple[str, float]:
    """What an operation is, and how many FLOPs of matrix products a call of it does."""
    inside = [module.computations[name] for name in one.called("calls")] or [computation]
    members = [(c, i) for c in inside for i in (c if c is not computation else [one])]
    flops = sum(product_flops(c, i) for c, i in members if i.opcode in ("dot", "convolution"))
    if flops:
        return "matrix products", flops
    opcodes = {i.opcode for _, i in members}
    if opcodes & {"reduce", "reduce-window"}:
        return "sums", 0.0
    return ("moves" if opcodes <= MOVES else "elementwise"), 0.0


def main(arguments: argparse.Namespace) -> None:
    """Profiles the last step and prints two tables."""
    experiment = build(parse_config(measuring.config(arguments), "benchmark"))
    peak, what = peak_flops(jax.devices())
    assert peak is not None
    step, state = compile_step(experiment), experiment.initial_state()
    module = parse(step.compiled.as_text())
    operations = {i.name: kind_and_flops(module, c, i) for c in module.computations.values() for i in c}
    results = {i.name: i.shapes for c in module.computations.values() for i in c}
    with tempfile.TemporaryDirectory() as trace:
        for index, batch in global_batches(experiment.data.train, experiment.mesh, experiment.micro_rows):
            if last := index == arguments.steps - 1:
                jax.profiler.start_trace(trace)
            started = time.monotonic()
            state, logged = step(state, batch)
            jax.block_until_ready(logged)
            wall = time.monotonic() - started
            if last:
                jax.profiler.stop_trace()
        found = spent(trace)

    cores, kinds = os.cpu_count() or 1, defaultdict(Spent)
    for name, time_in in found.items():
        kind = operations[name][0] if name in operations else "runtime"
        kinds[kind].calls += time_in.calls
        kinds[kind].seconds += time_in.seconds
    kinds["the rest"].seconds = wall * cores - sum(k.seconds for k in kinds.values())
    flops = sum(operations[name][1] * t.calls for name, t in found.items() if name in operations)
    print(f"step {wall:.2f} s, {cores} cores; {what}")
    print(f"matrix products: {flops / 1e9:,.0f} GFLOP, {flops / peak * cores:.2f} thread s at that rate")
    rows = [(k, t.calls, round(t.seconds, 3), round(100 * t.seconds / (wall * cores), 1)) for k, t in kinds.items()]
    table("all", ("kind", "calls", "thread s", "%"), sorted(rows, key=lambda row: -row[2]))
    print()
    longest = sorted(((t.seconds, name) for name, t in found.items() if name in operations), reverse=True)
    table(
        "the longest",
        ("operation", "kind", "result", "calls", "thread s", "GFLOP"),
        [
            (
                name,
                operations[name][0],
                " ".join(str(list(shape.dims)) for shape in results[name]),
                found[name].calls,
                round(seconds, 3),
                round(operations[name][1] * found[name].calls / 1e9, 1),
            )
            for seconds, name in longest[: arguments.top]
        ],
    )


if __name__ == "__main__":
    options = measuring.parser(__doc__, steps=4, row_length=1024)
    options.add_argument("--top", type=int, default=15)
    main(options.parse_args())
