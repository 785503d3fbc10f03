"""From a config to everything a run needs, built and checked: `train`, `evaluate`, `plan` and `inspect` share it.

Order: what the config alone can tell, then the model's `config.json`, then the devices, then the data, then weights.
"""

import inspect
import math
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import pydantic
from etils import epath
from jax.sharding import Mesh

from posttrain.config import Config, MeshConfig, ModelConfig, ObjectiveConfig, describe_errors, dump_config
from posttrain.data.pipeline import build_datasets
from posttrain.data.tokenizer import Tokenizer
from posttrain.errors import UserError, UserErrors
from posttrain.models import hf
from posttrain.models.decoder import ComputeOptions, DecoderConfig, Remat, abstract_decoder
from posttrain.objectives import supervised
from posttrain.parallel.mesh import barrier, check_mesh, make_mesh, row_shards, start_processes
from posttrain.parallel.sharding import flatten, place
from posttrain.records import Objective
from posttrain.train.metrics import table
from posttrain.train.optim import make_optimizer
from posttrain.train.resume import run_clock
from posttrain.train.setup import Experiment, ModelSetup
from posttrain.train.step import LossSums

OBJECTIVE_MODULES = (supervised,)


def check_config(config: Config) -> list[str]:
    """Problems that need no file and no device: combinations, and what is not served yet."""
    data, model, problems = config.data, config.model, check_mesh(config.mesh)
    unserved = {
        "model.lora": model.lora,
        "reference": config.reference,
        "tokenizer.add_special_tokens": config.tokenizer.add_special_tokens,
        "log.wandb": config.log.wandb,
    }
    problems += [f"{key} = {value!r}: not served yet; leave it out" for key, value in unserved.items() if value]
    if model.remat == "offload":
        problems.append("model.remat = offload: not served yet; use none, minimal, dots or full")
    if not model.path:
        problems.append("model.path is empty: give a Hugging Face directory or a hub id")
    for i, source in enumerate(data.train):
        if not source.path:
            problems.append(f"data.train.{i}.path is empty: give a JSONL, JSON or Parquet file")
        if source.weight != 1.0:
            problems.append(f"data.train.{i}.weight = {source.weight}: only 1.0 is served yet")
    if data.max_length > data.row_length:
        problems.append(
            f"data.max_length = {data.max_length} is over data.row_length = {data.row_length}: "
            "a sample must fit into a row; raise row_length or lower max_length"
        )
    if data.heldout.path and "fraction" in data.heldout.model_fields_set and data.heldout.fraction > 0.0:
        problems.append("data.heldout: both path and fraction are given; keep one (fraction: 0 with a path)")
    if config.log.profile_steps is not None and not 0 <= config.log.profile_steps[0] < config.log.profile_steps[1]:
        problems.append(f"log.profile_steps = {config.log.profile_steps}: give first < last, counted from 0")
    try:
        build_objective(config.objective)
    except UserErrors as error:
        problems += error.problems
    return problems


def build_objective(config: ObjectiveConfig) -> Objective:
    """The loss function named in the config, called with its own parameters. Raises `UserErrors`."""
    makers = {
        name: function
        for module in OBJECTIVE_MODULES
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and inspect.signature(function).return_annotation is Objective
    }
    if config.name not in makers:
        raise UserErrors([f"objective.name = {config.name!r}: known are {', '.join(sorted(makers))}"])
    maker = makers[config.name]
    fields: dict[str, Any] = {
        name: (parameter.annotation, parameter.default)
        for name, parameter in inspect.signature(maker).parameters.items()
    }
    forbid = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    schema = pydantic.create_model(f"objective {config.name}", __config__=forbid, **fields)
    try:
        values = schema.model_validate(config.model_extra or {})
    except pydantic.ValidationError as error:
        raise UserErrors([f"objective.{line}" for line in describe_errors(error, schema)]) from error
    return maker(**dict(values))


def batch_split(config: Config, sizes: dict[str, int]) -> tuple[int, int]:
    """(accumulation steps, rows of one). Raises `UserErrors` when the mesh cannot split the rows so."""
    shards, rows = row_shards(sizes), config.train.global_batch_size
    micro = shards if config.train.micro_batch_size is None else config.train.micro_batch_size
    split = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1 and name != "tensor") or "1 device"
    problems = []
    if micro % shards:
        problems.append(
            f"train.micro_batch_size = {micro}: the mesh splits rows over {shards} ({split}), which must divide it; "
            f"the nearest that works is {max(1, round(micro / shards)) * shards}"
        )
    elif rows % micro:
        problems.append(
            f"train.global_batch_size = {rows}: it must be a multiple of the rows of one accumulation step, {micro} "
            f"({split}); the nearest that works is {max(1, round(rows / micro)) * micro}"
        )
    if problems:
        raise UserErrors(problems)
    return rows // micro, micro


def setup_model(config: ModelConfig, mesh_config: MeshConfig) -> ModelSetup:
    """Reads the model's `config.json`, starts the devices and places every parameter; loads nothing yet."""
    directory = hf.resolve_model(config.path, config.revision)
    decoder_config, raw = hf.load_config(directory)
    start_processes(mesh_config)
    mesh = make_mesh(mesh_config)
    compute = config.dtype
    if compute == "auto":
        compute = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    attention = "chunked" if config.attention == "auto" else config.attention
    options = ComputeOptions(attention, cast(Remat, config.remat))
    decoder = abstract_decoder(decoder_config, dtype=jnp.dtype(config.params_dtype), options=options)
    shapes = flatten(decoder.shapes)
    placements = {path: place(axes, shapes[path].shape, mesh) for path, axes in decoder.axes.items()}
    return ModelSetup(directory, decoder_config, raw, decoder, mesh, placements, jnp.dtype(compute))


def load_tokenizer(config: Config) -> Tokenizer:
    """The model's tokenizer, or the one that the config names; a template that writes the date writes the run's."""
    chosen = config.tokenizer
    path, revision = (chosen.path, None) if chosen.path else (config.model.path, config.model.revision)
    load = partial(
        Tokenizer.load, path, revision=revision, chat_template=chosen.chat_template, eos_token=chosen.eos_token
    )
    tokenizer = load()
    return load(clock=run_clock(epath.Path(config.run.dir))) if tokenizer.writes_date else tokenizer


def build(config: Config) -> Experiment:
    """Everything but the weights. Raises `UserErrors` with all that the config alone gets wrong, at once."""
    problems = check_config(config)
    if problems:
        raise UserErrors(problems)
    model = setup_model(config.model, config.mesh)
    reduced = config.train.grad_reduce_dtype
    if reduced is not None and reduced != model.compute_dtype.name:
        raise UserError(
            f"train.grad_reduce_dtype = {reduced}: only the compute dtype ({model.compute_dtype.name}) is served yet; "
            "leave it null"
        )
    hf.check_weights(model.directory, model.config)
    accumulation, micro_rows = batch_split(config, dict(model.mesh.shape))
    shapes = {path: leaf.shape for path, leaf in flatten(model.decoder.shapes).items()}
    optimizer = partial(make_optimizer, config.optimizer, shapes)
    optimizer(total_steps=1)  # its patterns are checked before the data is read, which tells the number of steps
    tokenizer = load_tokenizer(config)
    _check_vocabulary(tokenizer, model.config)
    data = build_datasets(
        config.data,
        tokenizer,
        global_batch_size=config.train.global_batch_size,
        max_steps=config.train.max_steps,
        seed=config.run.seed,
        heldout_batch_size=micro_rows,
        rejects_dir=config.run.dir,
        barrier=barrier,
        is_main=jax.process_index() == 0,
    )
    loss = LossSums(model.decoder, build_objective(config.objective), model.compute_dtype)
    return Experiment(
        config, model, tokenizer, data, loss, optimizer(total_steps=data.train.num_steps), accumulation, micro_rows
    )


def _check_vocabulary(tokenizer: Tokenizer, model: DecoderConfig) -> None:
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"tokenizer: it has {tokenizer.vocab_size} tokens, the model's embedding only {model.vocab_size}; "
            "they do not belong together (check tokenizer.path)"
        )


def describe(experiment: Experiment) -> None:
    """Prints the resolved config and the parameter, sharding and batch tables."""
    if jax.process_index() != 0:
        return
    config, model, data = experiment.config, experiment.model, experiment.data
    print(dump_config(config))
    columns = ("parameter", "shape", "split over", "MiB per device", "kept whole", "trained")
    table("Parameters", columns, _parameter_rows(experiment))
    train = data.train
    rows = [
        ("mesh", _mesh_text(model.mesh)),
        ("compute, parameters", f"{model.compute_dtype}, {config.model.params_dtype}"),
        ("attention, remat", f"{model.decoder.options.attention}, {model.decoder.options.remat}"),
        ("rows per optimizer step", f"{train.global_batch_size} of {train.row_length} tokens"),
        ("accumulation steps x rows", f"{experiment.accumulation} x {experiment.micro_rows}"),
        ("rows per device and accumulation step", f"{experiment.micro_rows // row_shards(model.mesh.shape)}"),
        ("training samples, tokens", f"{len(train.table):,}, {train.table.num_tokens:,}"),
        ("trained tokens", f"{train.table.num_trained_tokens:,}"),
        ("packed rows, filled", f"{train.num_rows:,}, {train.efficiency:.1%}"),
        ("held-out samples", f"{len(data.heldout.table):,}" if data.heldout else "none"),
        ("optimizer steps", f"{train.num_steps:,} ({', '.join(map(str, train.steps_per_epoch[:8]))} per epoch)"),
    ]
    table("Batches", ("what", "value"), rows)


def _parameter_rows(experiment: Experiment) -> list[tuple[str, ...]]:
    rows, total, per_device = [], 0, 0.0
    for path, leaf in flatten(experiment.model.decoder.shapes).items():
        placement = experiment.model.placements[path]
        mebibytes = leaf.dtype.itemsize * math.prod(placement.sharding.shard_shape(leaf.shape)) / 2**20
        axes = ", ".join(str(entry or "-") for entry in placement.sharding.spec)
        chosen = experiment.optimizer.trained.get(path, False)
        trained = (
            "yes" if chosen is True else "no" if chosen is False else f"{int(chosen.sum())} of {len(chosen)} layers"
        )
        shape = " x ".join(map(str, leaf.shape))
        rows.append((path, shape, axes, f"{mebibytes:.2f}", "; ".join(placement.repeated), trained))
        total, per_device = total + math.prod(leaf.shape), per_device + mebibytes
    return [*rows, ("total", f"{total:,}", "", f"{per_device:.2f}", "", "")]


def _mesh_text(mesh: Mesh) -> str:
    named = " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1) or "1 device"
    return f"{named} ({mesh.size} {jax.devices()[0].device_kind}, {jax.process_count()} processes)"
