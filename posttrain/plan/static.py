"""`python -m posttrain.plan.static`: what can be told of a search's candidates without compiling them.

Every one is built by the code that trains with it, down to abstract arrays. So what is refused is refused by the checks
of a run, in their words, and the bytes of parameters, optimizer state and batch are those of the run. Reads
`{"config", "topology", "slices", "rows_per_device"}` from standard input; writes `{"facts", "candidates"}`, or
`{"problems"}`, as JSON to standard output. A process of its own, as `worker.py` is.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from posttrain.config import Config, parse_config
from posttrain.data.tokenizer import Tokenizer
from posttrain.errors import UserError, UserErrors
from posttrain.experiment import build_step, check_config, load_tokenizer, mesh_facts
from posttrain.parallel.mesh import make_mesh, resolve_sizes
from posttrain.parallel.sharding import flatten
from posttrain.plan.candidates import Candidate, Facts, Static, as_configured, combinations
from posttrain.plan.topology import described_devices
from posttrain.plan.worker import bytes_of, parameter_counts, serve
from posttrain.train.flops import attended_pairs, train_flops
from posttrain.train.setup import StepSetup


def examine(request: dict[str, Any]) -> dict[str, Any]:
    """Facts and candidates of a request, as plain data. Raises `UserError` where no candidate could be built."""
    config = parse_config(request["config"], "config")
    devices = described_devices(request["topology"], request["slices"])
    per_device: Sequence[int] = request["rows_per_device"]
    batches = [rows * len(devices) for rows in per_device] or [config.train.global_batch_size]
    tokenizer = load_tokenizer(config) if config.tokenizer.add_special_tokens else None
    first = _own_problems(config, tokenizer, devices)
    own = _as_configured(config, len(devices), request["slices"])
    found = combinations(
        config,
        devices=len(devices),
        slices=request["slices"],
        batches=batches,
        experts=first.model.config.moe is not None,
    )
    if own is not None and own.rows in batches and own not in found:
        found.insert(0, own)
    builds: dict[Any, Static | StepSetup] = {}
    examined = [_examine(candidate, config, tokenizer, devices, builds, own) for candidate in found]
    facts = _facts(first, devices, request["slices"])
    return {
        "facts": dataclasses.asdict(facts),
        "candidates": [dataclasses.asdict(one) for one in examined],
        "own": own and dataclasses.asdict(own),
    }


def _as_configured(config: Config, devices: int, slices: int) -> Candidate | None:
    """None where the config's own mesh is none of so many devices: its other settings may still be searched."""
    try:
        return as_configured(config, resolve_sizes(config.mesh, devices, slices=slices, **mesh_facts(config)))
    except UserError:
        return None


def _own_problems(config: Config, tokenizer: Tokenizer | None, devices: Sequence[Any]) -> StepSetup:
    """The model on one device, where no mesh and no batch can be wrong. Raises `UserErrors` with what else is."""
    mesh = config.mesh.model_copy(update=dict.fromkeys(type(config.mesh).model_fields, 1))
    train = config.train.model_copy(update={"micro_batch_size": config.train.global_batch_size})
    remat = config.model.model_copy(update={"remat": "full"})
    alone = config.model_copy(update={"mesh": mesh, "train": train, "model": remat})
    if problems := check_config(alone):
        raise UserErrors(problems)
    return build_step(alone, tokenizer, make_mesh(mesh, devices[:1]))[0]


def _examine(
    candidate: Candidate,
    base: Config,
    tokenizer: Tokenizer | None,
    devices: Sequence[Any],
    builds: dict[Any, Static | StepSetup],
    own: Candidate | None,
) -> Static:
    """`builds` keeps what was built before: remat and compiler options change no shape."""
    config = candidate.config(base)
    if problems := check_config(config):
        return Static(candidate, tuple(problems))
    key = (candidate.mesh, candidate.rows, candidate.micro)
    if key not in builds:
        builds[key] = _build(candidate, config, tokenizer, devices)
    built = builds[key]
    if isinstance(built, Static):
        return dataclasses.replace(built, candidate=candidate)
    whole = dict.fromkeys(text for placement in built.model.placements.values() for text in placement.repeated)
    if whole and (own is None or candidate.mesh != own.mesh):
        return Static(candidate, (f"the mesh does not divide the model: {'; '.join(whole)} would be kept whole",))
    state = built.abstract_state()
    sizes = (bytes_of(part) for part in (state.params, state.opt_state, built.abstract_batch()))
    return Static(candidate, (), *sizes, host=bytes_of(state.opt_state, host=True))


def _build(
    candidate: Candidate, config: Config, tokenizer: Tokenizer | None, devices: Sequence[Any]
) -> Static | StepSetup:
    try:
        return build_step(config, tokenizer, make_mesh(config.mesh, devices))[0]
    except UserErrors as error:
        return Static(candidate, error.problems)
    except UserError as error:
        return Static(candidate, (str(error),))


def _facts(setup: StepSetup, devices: Sequence[Any], slices: int) -> Facts:
    config, params = setup.model.config, setup.abstract_state().params
    length = setup.config.data.row_length
    flops = train_flops(
        config,
        tokens=length,
        attended=attended_pairs(config, np.array([length])),
        adapter=setup.adapter_weights,
    )
    parameters, trained = parameter_counts(setup)
    shapes = {path: (leaf.shape, leaf.dtype.name) for path, leaf in flatten(params).items()}
    described = json.dumps([setup.model.raw_config, sorted(shapes.items())], sort_keys=True)
    moe = config.moe
    return Facts(
        devices[0].device_kind,
        len(devices),
        slices,
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads_width=config.num_attention_heads * config.head_dim,
        kv_width=config.num_key_value_heads * config.head_dim,
        mlp_width=config.intermediate_size if moe is None else moe.num_experts_per_tok * moe.moe_intermediate_size,
        row_length=length,
        compute_bytes=setup.model.compute_dtype.itemsize,
        flops_per_token=flops / length,
        parameters=parameters,
        trained=trained,
        fingerprint=hashlib.sha256(described.encode()).hexdigest(),
    )


if __name__ == "__main__":
    serve(examine)
