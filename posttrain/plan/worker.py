"""`python -m posttrain.plan.worker`: compiles a run's train step, for a topology or for the devices that are here.

A process of its own, since libtpu is loaded once and configured by the environment (`topology.ENVIRONMENT`), and since
devices that are here are taken by one process. Reads `{"config", "topology", "slices"}` as JSON from standard input,
where no topology means the local mesh, and writes what `compile_plan` says as JSON to standard output; problems go out
as `{"problems": [...]}`.
"""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import jax
import numpy as np

from posttrain.config import Config, parse_config
from posttrain.data.tokenizer import Tokenizer
from posttrain.errors import UserError, UserErrors
from posttrain.experiment import build_step, check_config, load_tokenizer, mesh_facts, setup_reference
from posttrain.models.architecture import DecoderConfig
from posttrain.parallel.mesh import make_mesh
from posttrain.parallel.processes import start_processes
from posttrain.parallel.sharding import flatten
from posttrain.plan.memory import temporaries
from posttrain.plan.program import program_cost
from posttrain.plan.topology import described_devices
from posttrain.train.flops import attended_pairs, peak_flops, train_flops
from posttrain.train.loop import compile_step
from posttrain.train.setup import StepSetup

ONLINE = (
    "reference.logps = {}: every batch first passes through the reference, forward only, about a third of what a step "
    "computes; times and work are of the train step alone"
)


@dataclass(frozen=True)
class Memory:
    """Bytes of one device during the step."""

    params: int
    reference: int
    """Weights of the model that losses compare with, where it stays in memory (`reference.logps: online`)."""
    optimizer: int
    batch: int
    temporaries: int
    """All that lives within the step alone, the sum of the next three."""
    activations: int | None
    """Kept by the forward pass for the backward pass. None, as the next two, where the program's text tells of more
    than XLA's total."""
    gradients: int | None
    other: int | None
    """Weights cast or gathered, what lives within a layer, logits, and gaps (`memory.py`)."""
    results: int
    """Outputs that take the place of no argument."""
    peak: int
    """What lives at once: XLA's own figure, or the sum of arguments, results and temporaries where that is more, and
    the reference."""
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
    expert_flops: float
    """One product of all tokens with the matrices of the experts that they go to, in all layers; a layer has three."""
    parameters: int
    trained: int


@dataclass(frozen=True)
class Local:
    """The devices that are here."""

    devices: int
    """Of all processes."""
    here: int
    """Of this process."""
    platform: str
    peak_flops: float | None
    """What all of them could do together, FLOP/s; None where nothing is published."""
    peak_source: str


def compile_plan(request: dict[str, Any]) -> dict[str, Any]:
    """The figures of a request, as plain data. Raises `UserError` for what cannot be compiled."""
    config = parse_config(request["config"], "config")
    if problems := check_config(config):
        raise UserErrors(problems)
    local = not request["topology"]
    if local:
        start_processes(config.mesh)
    devices = jax.devices() if local else described_devices(request["topology"], request["slices"])
    mesh = make_mesh(config.mesh, devices, **mesh_facts(config))
    tokenizer = load_tokenizer(config) if config.tokenizer.add_special_tokens else None
    setup, _ = build_step(config, tokenizer, mesh)
    online = setup.loss.objective.needs_reference and config.reference.logps != "cached"
    reference = _reference_bytes(config, setup, tokenizer) if online else 0
    started = time.monotonic()
    compiled = compile_step(setup).compiled
    seconds = time.monotonic() - started
    text = compiled.as_text()
    assert text is not None
    cost = program_cost(text, dict(mesh.shape))
    return {
        "device_kind": devices[0].device_kind,
        "mesh": dict(mesh.shape),
        "num_layers": setup.model.config.num_hidden_layers,
        "attention": setup.model.decoder.options.attention,
        "compute_dtype": setup.model.compute_dtype.name,
        "accumulation": setup.accumulation,
        "memory": dataclasses.asdict(_memory(setup, compiled, text, reference)),
        "work": dataclasses.asdict(_work(setup)),
        "cost": dataclasses.asdict(cost),
        "sharding": _sharding(setup),
        "compile_seconds": seconds,
        "versions": {name: version(name) for name in (("jax", "jaxlib") if local else ("jax", "libtpu"))},
        "beside": [ONLINE.format(config.reference.logps)] if online else [],
        "local": dataclasses.asdict(_local_devices()) if local else None,
    }


def _reference_bytes(config: Config, setup: StepSetup, tokenizer: Tokenizer | None) -> int:
    """Of one device: what stays in memory of a reference that is asked for every batch (`train/reference.py`)."""
    if setup.model.lora is not None and config.reference.path is None:
        return 0  # the trained model without its adapter
    return bytes_of(setup_reference(config, setup.model, tokenizer, setup.mesh).abstract_params)


def _memory(setup: StepSetup, compiled: Any, text: str, reference: int) -> Memory:
    """What XLA says of the program, its temporaries split by what they are for; and the reference's weights."""
    state, found = setup.abstract_state(), compiled.memory_analysis()
    host = found.host_argument_size_in_bytes + found.host_temp_size_in_bytes
    results = found.output_size_in_bytes - found.alias_size_in_bytes
    together = found.argument_size_in_bytes + results + found.temp_size_in_bytes
    trained, _ = setup.optimizer.split(state.params)
    parts = temporaries(text, {math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(trained)})
    rest = found.temp_size_in_bytes - parts.activations - parts.gradients
    told = rest >= 0
    return Memory(
        params=bytes_of(state.params),
        reference=reference,
        optimizer=bytes_of(state.opt_state),
        batch=bytes_of(setup.abstract_batch()),
        temporaries=found.temp_size_in_bytes,
        activations=parts.activations if told else None,
        gradients=parts.gradients if told else None,
        other=rest if told else None,
        results=results,
        peak=max(found.peak_memory_in_bytes - host, together) + reference,  # XLA's figure counts the host's memory too
        host=host,
    )


def _local_devices() -> Local:
    peak, source = peak_flops(jax.devices())
    return Local(jax.device_count(), jax.local_device_count(), jax.default_backend(), peak, source)


def _work(setup: StepSetup) -> Work:
    config, adapter = setup.model.config, setup.adapter_weights
    rows, length = setup.config.train.global_batch_size, setup.config.data.row_length
    attended = attended_pairs(config, np.full(rows, length))
    with_attention = train_flops(config, tokens=rows * length, attended=attended, adapter=adapter)
    without = train_flops(config, tokens=rows * length, attended=0, adapter=adapter)
    experts = _expert_flops(config, rows * length)
    return Work(rows, rows * length, with_attention, with_attention - without, experts, *parameter_counts(setup))


def parameter_counts(setup: StepSetup) -> tuple[int, int]:
    """(all parameters, those that are trained)."""
    params = setup.abstract_state().params
    trained, _ = setup.optimizer.split(params)
    every, some = (sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)) for tree in (params, trained))
    return every, some


def _expert_flops(config: DecoderConfig, tokens: int) -> float:
    moe = config.moe
    if moe is None:
        return 0.0
    each = moe.num_experts_per_tok * config.hidden_size * moe.moe_intermediate_size
    return 2.0 * config.num_hidden_layers * tokens * each


def bytes_of(tree: Any, *, host: bool = False) -> int:
    """Of one device's own memory; with `host`, of what it keeps in the host's instead."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if (leaf.sharding.memory_kind in (None, "device")) != host]
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _sharding(setup: StepSetup) -> list[dict[str, Any]]:
    """Every parameter: over which axes it is split, and its bytes on a device."""
    return [
        {
            "name": path,
            "shape": list(leaf.shape),
            "dtype": leaf.dtype.name,
            "split": [[entry] if isinstance(entry, str) else list(entry or ()) for entry in leaf.sharding.spec],
            "bytes": bytes_of(leaf),
            "kept_whole": list(setup.model.placements[path].repeated),
        }
        for path, leaf in flatten(setup.model.abstract_params).items()
    ]


def serve(ask: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answers the request on standard input, on standard output."""
    request = json.load(sys.stdin)
    try:
        answer = ask(request)
    except UserErrors as error:
        answer = {"problems": error.problems}
    except UserError as error:
        answer = {"problems": [str(error)]}
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        fix = "Fewer rows at a time (train.micro_batch_size), model.remat full or more chips need less; --search tries"
        answer = {"problems": [f"the compiled step does not fit: {str(error).splitlines()[0]} {fix}"]}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    serve(compile_plan)
