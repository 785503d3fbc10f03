"""The law of meshes: no combination of axes changes loss or gradient, and every device holds its share of the state."""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from posttrain.config import MeshConfig, OptimizerConfig
from posttrain.models.architecture import DecoderConfig, MoEConfig
from posttrain.models.decoder import AbstractDecoder, ComputeOptions, abstract_decoder, init_params
from posttrain.objectives.router import RouterLosses
from posttrain.objectives.supervised import sft
from posttrain.parallel.mesh import AXES, make_mesh
from posttrain.parallel.sharding import batch_sharding, flatten, place, replicated, unflatten
from posttrain.records import Batch, Objective, Params, TrainState
from posttrain.train.optim import make_optimizer
from posttrain.train.step import LossSums, make_gradient_step, make_train_step

D, F, L, N, K, H, V, E = 32, 48, 2, 8, 4, 8, 256, 8
DENSE = DecoderConfig(250, D, F, L, N, K, H)
MODELS = {"dense": DENSE, "experts": DecoderConfig(250, D, F, L, N, K, H, moe=MoEConfig(E, 2, F // 2))}
OPTIONS = {"dense": ComputeOptions("chunked", "dots"), "experts": ComputeOptions("reference", "none", "blocks")}
T = 48

ALL = [
    *({axis: size} for axis in AXES for size in (2, 4, 8)),
    *({first: 4, second: 2} for first, second in itertools.permutations(AXES, 2)),
    *(dict.fromkeys(axes, 2) for axes in itertools.combinations(AXES, 3)),
]
QUICK = {
    "dense": [("replica", "data", "fsdp"), ("replica", "data", "context"), ("fsdp", "context", "tensor")],
    "experts": [("replica", "tensor", "expert"), ("data", "tensor", "expert"), ("fsdp", "context", "expert")],
}
"""Axes of 2 devices each, such that every two axes meet; the other combinations are marked `sweep`."""
CASES = [
    pytest.param(sizes, model, marks=() if sizes in [dict.fromkeys(q, 2) for q in quick] else pytest.mark.sweep)
    for model, quick in QUICK.items()
    for sizes in ALL
]


def mesh_of(sizes: dict[str, int]) -> Mesh:
    count = math.prod(sizes.values())
    return make_mesh(MeshConfig(**({"fsdp": 1} | sizes)), jax.devices()[:count])


def objective_of(model: str) -> Objective:
    return sft() if model == "dense" else RouterLosses(sft(), layers=L, balance=0.5, z=0.1)


@functools.cache
def described(model: str) -> AbstractDecoder:
    return abstract_decoder(MODELS[model], options=OPTIONS[model])


@functools.cache
def params(model: str) -> Params:
    """Large enough for attention and routers to be sharp."""
    made = jax.jit(init_params, static_argnums=0)(MODELS[model], jax.random.key(0))
    return jax.tree.map(lambda p: p * 3, made)


@functools.cache
def batch() -> Batch:
    """Eight packed rows, `[1, 8, T]`, with segments that begin and end within, at and across chunks of a split
    row, padding, and an empty row."""
    rng = np.random.default_rng(0)
    lengths = [[20, 12, 16], [48], [3, 40], [24, 24], [6, 6, 6, 6, 24], [1, 46], [17, 13, 9, 5], []]
    ids, positions = (np.zeros((8, T), np.int32) for _ in range(2))
    for row, segments in enumerate(lengths):
        ends = np.cumsum(segments, dtype=int)
        for number, (length, end) in enumerate(zip(segments, ends, strict=True), 1):
            ids[row, end - length : end], positions[row, end - length : end] = number, np.arange(length)
    tokens = rng.integers(0, 250, (8, T)).astype(np.int32)
    weights = ((ids > 0) & (positions > 0) & (rng.random((8, T)) < 0.7)).astype(np.float32)
    return jax.tree.map(lambda x: x[None], Batch(tokens, ids, positions, weights))


def loss_and_gradients(model: str, params: Params, batch: Batch) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    loss = LossSums(described(model), objective_of(model), jnp.float32)

    @jax.jit
    def compute(params: Params, batch: Batch) -> Any:
        totals = loss.totals(batch)
        gradients, sums, _ = make_gradient_step(loss)(params, batch, totals, None)
        return gradients, {name: value / totals[name] for name, value in sums.items()}

    gradients, values = compute(params, batch)
    return {name: float(value) for name, value in values.items()}, {
        p: np.asarray(g) for p, g in flatten(gradients).items()
    }


@functools.cache
def on_one_device(model: str) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    return loss_and_gradients(model, params(model), batch())


def placed(model: str, mesh: Mesh) -> Params:
    axes = described(model).axes
    return unflatten(
        {p: jax.device_put(v, place(axes[p], v.shape, mesh).sharding) for p, v in flatten(params(model)).items()}
    )


@pytest.mark.parametrize(("sizes", "model"), CASES, ids=str)
def test_the_mesh_changes_nothing(sizes: dict[str, int], model: str) -> None:
    mesh = mesh_of(sizes)
    with jax.set_mesh(mesh):
        values, gradients = loss_and_gradients(
            model, placed(model, mesh), jax.device_put(batch(), batch_sharding(mesh))
        )
    expected_values, expected = on_one_device(model)
    assert values == pytest.approx(expected_values, rel=1e-5)
    for path, leaf in expected.items():
        scale = np.abs(leaf).max()
        np.testing.assert_allclose(gradients[path], leaf, rtol=0, atol=2e-5 * scale, err_msg=path)


def bytes_on_a_device(model: str, sizes: dict[str, int]) -> int:
    """Of all parameters, in f32, by the shapes of a decoder and what each axis splits."""
    n = {axis: sizes.get(axis, 1) for axis in AXES}
    whole = n["fsdp"] * n["expert"] * n["context"]
    within = math.gcd(n["tensor"], K)  # what does not divide the key heads leaves them whole
    within = n["tensor"] if within == n["tensor"] else 1
    attention = L * (2 * D * N * H // n["tensor"] + 2 * D * K * H // within) // whole
    if model == "dense":
        mixing = 3 * L * D * F // n["tensor"] // whole
    else:
        experts = 3 * L * E * D * (F // 2) // (n["expert"] * n["fsdp"] * n["context"] * n["tensor"])
        mixing = experts + L * D * E // whole
    tables = 2 * V * D // n["tensor"] // whole
    norms = (2 * L + 1) * D
    return 4 * (attention + mixing + tables + norms)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("sizes", ALL, ids=str)
def test_parameters_are_split_as_the_axes_say(sizes: dict[str, int], model: str) -> None:
    mesh, axes = mesh_of(sizes), described(model).axes
    shards = [
        place(axes[path], leaf.shape, mesh).sharding.shard_shape(leaf.shape)
        for path, leaf in flatten(described(model).shapes).items()
    ]
    assert 4 * sum(math.prod(shard) for shard in shards) == bytes_on_a_device(model, sizes)


@pytest.mark.parametrize(
    ("sizes", "model"),
    [({"fsdp": 2, "context": 2, "tensor": 2}, "dense"), ({"replica": 2, "expert": 4}, "experts")],
    ids=str,
)
def test_a_step_leaves_the_state_split(sizes: dict[str, int], model: str) -> None:
    """Parameters and both moments, as they come out of the compiled step."""
    mesh, start = mesh_of(sizes), placed(model, mesh_of(sizes))
    optimizer = make_optimizer(OptimizerConfig(), {p: v.shape for p, v in flatten(start).items()}, 10)
    moments = optimizer.abstract_state(jax.tree.map(as_shape, start), replicated(mesh))
    opt_state = jax.tree.map(lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding), moments)
    key = jax.device_put(jax.random.key_data(jax.random.key(0)), replicated(mesh))
    state = TrainState(start, opt_state, jax.device_put(jnp.int32(0), replicated(mesh)), key)
    step = jax.jit(make_train_step(LossSums(described(model), objective_of(model), jnp.float32), optimizer))
    with jax.set_mesh(mesh):
        after, logged = step(state, jax.device_put(batch(), batch_sharding(mesh)))
    assert float(logged["finite"]) == 1.0
    held = [
        sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))
        for tree in (after.params, after.opt_state)
    ]
    expected = bytes_on_a_device(model, sizes)
    assert held == [expected, 2 * expected + 4]  # and the count of steps


def as_shape(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
