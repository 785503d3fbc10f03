"""`python -m posttrain.plan.worker`: compiles a run's train step for a topology and says what it costs.

A process of its own, since libtpu is loaded once and configured by the environment (`topology.ENVIRONMENT`). Reads
`{"config", "topology", "slices"}` as JSON from standard input and writes what `compile_plan` says as JSON to standard
output; problems go out as `{"problems": [...]}`.
"""

import dataclasses
import json
import math
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import jax
import numpy as np

from posttrain.config import parse_config
from posttrain.errors import UserError, UserErrors
from posttrain.experiment import build_step, check_config, load_tokenizer
from posttrain.parallel.mesh import make_mesh
from posttrain.parallel.sharding import flatten
from posttrain.plan.program import program_cost
from posttrain.plan.topology import described_devices
from posttrain.train.flops import attended_pairs, train_flops
from posttrain.train.loop import compile_step
from posttrain.train.setup import StepSetup


@dataclass(frozen=True)
class Memory:
    """Bytes of one device during the step."""

    params: int
    optimizer: int
    batch: int
    temporaries: int
    """Activations kept for the backward pass, gradients, gathered weights: all that lives within the step."""
    peak: int
    """What lives at once: XLA's own figure, or the sum of arguments, results and temporaries where that is more."""
    host: int


@dataclass(frozen=True)
class Work:
    """One optimizer step of the run, all devices together."""

    rows: int
    tokens: int
    """Places in the rows: real tokens where they are full."""
    model_flops: float
    """What the model's definition asks for with full rows of one segment each (`train/flops.py`)."""
    attention_flops: float
    """The part of them that attention kernels compute, forward and backward once."""
    parameters: int
    trained: int


def compile_plan(request: dict[str, Any]) -> dict[str, Any]:
    """The figures of a request, as plain data. Raises `UserError` for what cannot be compiled."""
    config = parse_config(request["config"], "config")
    if problems := check_config(config):
        raise UserErrors(problems)
    devices = described_devices(request["topology"], request["slices"])
    mesh = make_mesh(config.mesh, devices)
    tokenizer = load_tokenizer(config) if config.tokenizer.add_special_tokens else None
    setup, _ = build_step(config, tokenizer, mesh)
    started = time.monotonic()
    compiled = compile_step(setup).compiled
    seconds = time.monotonic() - started
    state = setup.abstract_state()
    found, text = compiled.memory_analysis(), compiled.as_text()
    assert found is not None and text is not None
    results = found.output_size_in_bytes - found.alias_size_in_bytes
    together = found.argument_size_in_bytes + results + found.temp_size_in_bytes
    memory = Memory(
        params=_bytes(state.params),
        optimizer=_bytes(state.opt_state),
        batch=_bytes(setup.abstract_batch()),
        temporaries=found.temp_size_in_bytes,
        peak=max(found.peak_memory_in_bytes, together),
        host=found.host_argument_size_in_bytes + found.host_temp_size_in_bytes,
    )
    cost = program_cost(text, dict(mesh.shape))
    return {
        "device_kind": devices[0].device_kind,
        "mesh": dict(mesh.shape),
        "num_layers": setup.model.config.num_hidden_layers,
        "attention": setup.model.decoder.options.attention,
        "compute_dtype": setup.model.compute_dtype.name,
        "accumulation": setup.accumulation,
        "memory": dataclasses.asdict(memory),
        "work": dataclasses.asdict(_work(setup)),
        "cost": dataclasses.asdict(cost),
        "sharding": _sharding(setup),
        "compile_seconds": seconds,
        "versions": {"jax": jax.__version__, "libtpu": version("libtpu")},
    }


def _work(setup: StepSetup) -> Work:
    config, adapter = setup.model.config, setup.adapter_weights
    rows, length = setup.config.train.global_batch_size, setup.config.data.row_length
    attended = attended_pairs(config, np.full(rows, length))
    with_attention = train_flops(config, tokens=rows * length, attended=attended, adapter=adapter)
    without = train_flops(config, tokens=rows * length, attended=0, adapter=adapter)
    params = setup.abstract_state().params
    trained, _ = setup.optimizer.split(params)
    counts = [sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)) for tree in (params, trained)]
    return Work(rows, rows * length, with_attention, with_attention - without, *counts)


def _bytes(tree: Any) -> int:
    """Of one device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _sharding(setup: StepSetup) -> list[dict[str, Any]]:
    """Every parameter: over which axes it is split, and its bytes on a device."""
    return [
        {
            "name": path,
            "shape": list(leaf.shape),
            "dtype": leaf.dtype.name,
            "split": [[entry] if isinstance(entry, str) else list(entry or ()) for entry in leaf.sharding.spec],
            "bytes": _bytes(leaf),
            "kept_whole": list(setup.model.placements[path].repeated),
        }
        for path, leaf in flatten(setup.model.abstract_params).items()
    ]


def main() -> None:
    request = json.load(sys.stdin)
    try:
        answer = compile_plan(request)
    except UserErrors as error:
        answer = {"problems": error.problems}
    except UserError as error:
        answer = {"problems": [str(error)]}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
