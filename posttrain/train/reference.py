"""The reference model's log-probabilities: of preference losses that compare the trained model with where it started.

Cached, they are computed once, before training, by the same packed forward pass as in training, and kept on disk under
a name that hashes everything they depend on (weights, samples, precision), so that other runs use them and the
reference is not in memory while training. Online, it stays in memory and every batch is passed through it.
"""

import hashlib
import json
import logging
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Float32

from posttrain.data.cache import default_cache_dir, writing
from posttrain.data.claims import sync, temporary_name
from posttrain.data.packed import PackedDataset, RefLogps, token_starts
from posttrain.objectives.logps import batch_stats
from posttrain.parallel.processes import barrier
from posttrain.parallel.sharding import batch_sharding, replicated
from posttrain.records import Batch, Params
from posttrain.train.heldout import global_batches
from posttrain.train.setup import Experiment, ModelSetup

log = logging.getLogger(__name__)


def with_reference(experiment: Experiment) -> Callable[[Params, Batch], Batch]:
    """Makes the data sets' batches hold the reference's log-probabilities, where the objective needs them.

    Returns what every batch on the devices must pass through, with the trained model's parameters: for a cached
    reference (whose numbers are read with the tokens) and without one it changes nothing.
    """
    setup, model = experiment.reference, experiment.model
    if setup is None:
        return lambda params, batch: batch
    sets = [data for data in (experiment.data.train, experiment.data.heldout) if data is not None]
    if experiment.config.reference.logps != "cached":
        # Without its adapter the trained model is the reference: one copy of the weights serves both.
        shared = model.lora is not None and experiment.config.reference.path is None
        held = None if shared else setup.load()
        step = jax.jit(lambda params, batch: _logps(setup, params, batch), out_shardings=batch_sharding(setup.mesh))

        def attach(params: Params, batch: Batch) -> Batch:
            with jax.set_mesh(setup.mesh):
                return replace(batch, ref_logps=step(model.split(params)[1] if held is None else held, batch))

        return attach
    missing = {}
    for data in sets:
        place = _place(experiment, data)
        if (found := _read(place, int(data.table.num_tokens))) is None:
            missing[place] = data
        else:
            data.ref_logps = RefLogps(data.table, found)
    if missing:
        params = setup.load()
        for place, data in missing.items():
            values = compute(setup, params, data, experiment.micro_rows)
            if jax.process_index() == 0:
                _write(place, values)
            data.ref_logps = RefLogps(data.table, values)
        barrier("reference log-probabilities")
    return lambda params, batch: batch


def compute(setup: ModelSetup, params: Params, data: PackedDataset, micro_rows: int) -> Float32[np.ndarray, "tokens"]:
    """The log-probability of every trained token of the data's samples, laid end to end; 0 for the others."""
    rows = PackedDataset(
        data.table,
        row_length=data.row_length,
        global_batch_size=micro_rows,
        seed=0,
        shuffle=False,
        rows=data.rows,
    )
    starts = token_starts(data.table)
    values = np.zeros(int(starts[-1]), np.float32)
    step = jax.jit(lambda params, batch: _logps(setup, params, batch), out_shardings=replicated(setup.mesh))
    log.info("computing the reference's log-probabilities of %d samples", len(data.table))
    plan = rows.plan(0)
    with jax.set_mesh(setup.mesh):
        for index, batch in global_batches(rows, setup.mesh, micro_rows):
            logps = np.asarray(jax.block_until_ready(step(params, batch)))[0]
            for row in range(micro_rows):
                number = index * micro_rows + row
                at = 0
                for sample in plan.row(number).tolist() if number < plan.num_rows else ():
                    count = int(starts[sample + 1] - starts[sample])
                    values[starts[sample] : starts[sample + 1]] = logps[row, at : at + count]
                    at += count
    return values


def _logps(setup: ModelSetup, params: Params, batch: Batch) -> Float[Array, "A B T"]:
    model = setup.model(params)

    def of_micro(_: None, micro: Batch) -> tuple[None, Float[Array, "B T"]]:
        stats = batch_stats(model, micro, needed=jnp.asarray(micro.loss_weights) > 0)
        return None, stats.logps

    return jax.lax.scan(of_micro, None, batch)[1]


# ---- on disk --------------------------------------------------------------------------------------------------------


def _place(experiment: Experiment, data: PackedDataset) -> Path:
    setup, table = experiment.reference, data.table
    assert setup is not None
    samples = hashlib.sha256(table.index.tobytes() + table.lengths.tobytes()).hexdigest()
    facts: dict[str, Any] = {
        "weights": setup.fingerprint,
        "vocabulary": setup.vocabulary,
        "quantized": None if setup.quantized is None else setup.quantized.kind,
        "data": [cache.checksum for cache in table.caches],
        "samples": [samples, table.bounds, table.max_length, table.keep_end, table.partners is not None],
        "compute": [str(setup.compute_dtype), experiment.config.model.params_dtype, experiment.config.model.attention],
    }
    cache_dir = experiment.config.data.cache_dir
    root = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    return root / f"{key}.ref_logps"


def _read(place: Path, count: int) -> Float32[np.ndarray, "tokens"] | None:
    """The numbers at `place`, or None where there are none. They end with their CRC."""
    found = None
    if place.exists():
        data = place.read_bytes()
        if len(data) == 4 * count + 4 and zlib.crc32(data[:-4]) == int.from_bytes(data[-4:], "little"):
            found = np.frombuffer(data[:-4], np.float32)
        else:
            log.warning("%s is damaged: the reference's log-probabilities are computed again", place)
    if jax.process_count() > 1:  # all of them compute, or none
        everywhere = multihost_utils.process_allgather(np.int32(found is not None))
        return found if bool(np.all(everywhere)) else None
    return found


def _write(place: Path, values: Float32[np.ndarray, "tokens"]) -> None:
    with writing(place.parent):
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_name(place)
        try:
            with open(temporary, "wb") as file:
                data = values.astype("<f4").tobytes()
                file.write(data + zlib.crc32(data).to_bytes(4, "little"))
                sync(file)
            temporary.rename(place)
        finally:
            temporary.unlink(missing_ok=True)
