"""Is the memory that `posttrain plan` predicts for the devices that are here what the first step takes?

    python benchmarks/plan_memory.py [--devices 1 8] [--remat none full] [--layers 16] [--rows 8] [--row-length 256]

A model of about 1 GB in f32 (16 layers of width 1024, 32,000 tokens; random, no files needed) is planned, then trained
for one step in a fresh process: full fine-tuning with AdamW, on one CPU device and on eight emulated ones with `fsdp`.
Predicted is what the step takes beside its arguments, temporaries and outputs that alias nothing, of all devices
together. Measured is the rise of the peak of resident memory during the first step, from after compilation with state
and batch in memory: writing 5 to /proc/self/clear_refs starts the peak (`VmHWM`) anew. What was freed before is given
back to the system first (`malloc_trim`), since it would be taken again without a rise. Needs Linux and some 10 GB.

Prints a table, one line `RESULT {json}` per case, and ends with code 1 where one is off by more than 15 %.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np

from posttrain.config import parse_config
from posttrain.experiment import build_step
from posttrain.parallel.mesh import make_mesh
from posttrain.parallel.processes import start_processes
from posttrain.plan.command import compile_in_worker
from posttrain.records import Batch, TrainState
from posttrain.train.loop import compile_step
from posttrain.train.metrics import table
from posttrain.train.setup import StepSetup

TOLERANCE = 0.15
VOCABULARY = 32_000


def describe(directory: Path, layers: int) -> None:
    """Writes the model's `config.json`."""
    model = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }
    (directory / "config.json").write_text(json.dumps(model))


def run_config(directory: Path, devices: int, remat: str, rows: int, row_length: int) -> dict[str, Any]:
    """All rows in one accumulation step."""
    return {
        "model": {"path": str(directory), "remat": remat},
        "data": {"train": [{"path": "none.jsonl"}], "row_length": row_length, "max_length": row_length},
        "train": {"global_batch_size": rows, "micro_batch_size": rows},
        "mesh": {"fsdp": devices},
    }


def random_state(setup: StepSetup) -> TrainState:
    """Random weights, a fresh optimizer."""
    abstract = setup.abstract_state()

    def weights(key: jax.Array) -> Any:
        leaves, tree = jax.tree.flatten(abstract.params)
        keys = jax.random.split(key, len(leaves))
        drawn = [0.02 * jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
        return jax.tree.unflatten(tree, drawn)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    params = jax.jit(weights, out_shardings=shardings.params)(jax.random.key(0))

    def zeros(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.jit(lambda: jnp.zeros(leaf.shape, leaf.dtype), out_shardings=leaf.sharding)()

    rest = (abstract.opt_state, abstract.step, abstract.key)
    return TrainState(params, *(jax.tree.map(zeros, part) for part in rest))


def random_batch(setup: StepSetup) -> Batch:
    """Full rows of one segment each."""
    abstract = setup.abstract_batch()
    shape = abstract.tokens.shape
    values = Batch(
        tokens=np.random.default_rng(0).integers(0, VOCABULARY, shape).astype(np.int32),
        segment_ids=np.ones(shape, np.int32),
        positions=np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape),
        loss_weights=np.ones(shape, np.float32),
    )
    return jax.tree.map(lambda value, leaf: jax.device_put(value, leaf.sharding), values, abstract)


def resident(name: str) -> int:
    """Bytes of resident memory now (`VmRSS`) or at most (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def measure(raw: dict[str, Any]) -> dict[str, Any]:
    """Runs one step; `rise` is that of the peak, in bytes."""
    config = parse_config(raw, "benchmark")
    start_processes(config.mesh)
    setup, _ = build_step(config, None, make_mesh(config.mesh))
    step = compile_step(setup)
    state, batch = random_state(setup), random_batch(setup)
    jax.block_until_ready((state, batch))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    state, logged = step(state, batch)
    jax.block_until_ready((state, logged))
    after = resident("VmHWM")
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
    return {"rise": after - before, "before": before, "params": size, "loss": float(logged["loss"])}


def compare(raw: dict[str, Any]) -> dict[str, Any]:
    """Prediction and measurement of one config, bytes."""
    plan = compile_in_worker(parse_config(raw, "benchmark"), "", 1)
    run = subprocess.run(
        [sys.executable, __file__, "--measure"], input=json.dumps(raw), stdout=subprocess.PIPE, text=True, check=True
    )
    measured = json.loads(run.stdout.splitlines()[-1])
    memory, here = plan["memory"], plan["local"]["here"]
    predicted = here * (memory["temporaries"] + memory["results"])
    case = {"devices": here, "remat": raw["model"]["remat"], "predicted": predicted}
    return case | measured | {"ratio": predicted / measured["rise"]}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--remat", nargs="+", default=["none", "full"])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--row-length", type=int, default=256)
    parser.add_argument("--measure", action="store_true", help="one step of the config on standard input")
    a = parser.parse_args()
    if a.measure:
        print(json.dumps(measure(json.load(sys.stdin))))
        return
    cases = []
    with tempfile.TemporaryDirectory() as name:
        describe(Path(name), a.layers)
        for devices in a.devices:
            for remat in a.remat:
                cases.append(compare(run_config(Path(name), devices, remat, a.rows, a.row_length)))
                print("RESULT " + json.dumps(cases[-1]), flush=True)
    rows = []
    for case in cases:
        sizes = (f"{case[key] / 1e6:,.0f}" for key in ("params", "predicted", "rise"))
        rows.append((f"{case['devices']}", case["remat"], *sizes, f"{case['ratio'] - 1:+.1%}"))
    table("Step memory, MB", ("devices", "remat", "weights", "predicted", "measured", "off by"), rows)
    raise SystemExit(int(any(abs(case["ratio"] - 1) > TOLERANCE for case in cases)))


if __name__ == "__main__":
    main()
