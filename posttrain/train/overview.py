"""What a run is about to do, as tables: its resolved config, parameters, batches and sources."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from posttrain.config import dump_config
from posttrain.data.stats import SourceStats
from posttrain.parallel.mesh import row_shards
from posttrain.parallel.sharding import flatten
from posttrain.train.metrics import table
from posttrain.train.setup import Experiment


def describe(experiment: Experiment) -> None:
    """Prints the resolved config and the parameter, sharding and batch tables."""
    if jax.process_index() != 0:
        return
    config, model, data = experiment.config, experiment.model, experiment.data
    asked = config.tokenizer.add_special_tokens
    print(dump_config(config))
    columns = ("parameter", "shape", "split over", "MiB per device", "kept whole", "trained")
    table("Parameters", columns, _parameter_rows(experiment))
    train = data.train
    uses = [source.epoch for source in data.stats if source.epoch is not None]
    rows = [
        ("mesh", _mesh_text(model.mesh)),
        ("compute, parameters", f"{model.compute_dtype}, {config.model.params_dtype}"),
        *([("new tokens", model.new_rows.describe(asked))] if asked else []),
        *([("adapter", model.lora.adapter.describe())] if model.lora else []),
        *(
            [("score head", "new: zeros" if model.new_score else "that of the model")]
            if model.config.num_labels
            else []
        ),
        ("attention, remat", f"{model.decoder.options.attention}, {model.decoder.options.remat}"),
        *([("experts", _experts_text(experiment))] if model.config.moe else []),
        ("rows per optimizer step", f"{train.global_batch_size} of {train.row_length} tokens"),
        ("accumulation steps x rows", f"{experiment.accumulation} x {experiment.micro_rows}"),
        ("rows per device and accumulation step", f"{experiment.micro_rows // row_shards(model.mesh.shape)}"),
        ("samples, tokens of an epoch", f"{train.num_samples:,}, {train.num_tokens:,}"),
        ("trained tokens of an epoch", f"{sum(use.trained_tokens for use in uses):,}"),
        ("packed rows, filled", f"{train.num_rows:,}, {train.efficiency:.1%}"),
        ("held-out samples", f"{len(data.heldout.table):,}" if data.heldout else "none"),
        ("optimizer steps", f"{train.num_steps:,} ({', '.join(map(str, train.steps_per_epoch[:8]))} per epoch)"),
    ]
    table("Batches", ("what", "value"), rows)
    columns = ("source", "samples", "used an epoch", "passes", "of all samples", "of all tokens", "of trained tokens")
    table("Sources, as an epoch mixes them", columns, _source_rows(data.stats))


def _source_rows(stats: Sequence[SourceStats]) -> list[tuple[str, ...]]:
    return [
        (
            f"{source.key} {source.path}",
            f"{use.available:,}",
            f"{use.samples:,}",
            f"{use.passes:.4g}",
            f"{use.sample_share:.1%}",
            f"{use.token_share:.1%}",
            f"{use.trained_share:.1%}",
        )
        for source in stats
        if (use := source.epoch) is not None
    ]


def _parameter_rows(experiment: Experiment) -> list[tuple[str, ...]]:
    rows, total, per_device = [], 0, 0.0
    for path, leaf in flatten(experiment.model.decoder.shapes).items():
        placement = experiment.model.placements[path]
        mebibytes = leaf.dtype.itemsize * math.prod(placement.sharding.shard_shape(leaf.shape)) / 2**20
        axes = ", ".join(str(entry or "-") for entry in placement.sharding.spec)
        chosen = experiment.optimizer.trained.get(path, False)
        trained = "yes" if chosen is True else "no"
        if isinstance(chosen, np.ndarray):
            trained = f"{int(chosen.sum())} of {len(chosen)} {'layers' if path.startswith('layers/') else 'rows'}"
        shape = " x ".join(map(str, leaf.shape))
        rows.append((path, shape, axes, f"{mebibytes:.2f}", "; ".join(placement.repeated), trained))
        total, per_device = total + math.prod(leaf.shape), per_device + mebibytes
    return [*rows, ("total", f"{total:,}", "", f"{per_device:.2f}", "", "")]


def _experts_text(experiment: Experiment) -> str:
    moe, coefficients = experiment.model.config.moe, experiment.loss.objective.coefficients
    assert moe is not None
    losses = [f"{name} {value:g}" for name, value in coefficients.items() if name.startswith("router_")]
    chosen = f"{moe.num_experts_per_tok} of {moe.num_experts} a token, {experiment.model.decoder.options.grouped}"
    return f"{chosen}; {', '.join(losses) or 'no router losses'}"


def _mesh_text(mesh: Mesh) -> str:
    named = " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1) or "1 device"
    return f"{named} ({mesh.size} {jax.devices()[0].device_kind}, {jax.process_count()} processes)"
