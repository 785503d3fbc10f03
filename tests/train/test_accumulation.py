"""Gradients added up over micro-batches: nothing changes by it but what it costs in memory, in the compiled program
(on TPU: `plan/test_regressions.py`). Of packing, adapters and other objectives their own tests say the first as well.
"""

from collections.abc import Callable
from functools import cache
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.config import MeshConfig, OptimizerConfig
from posttrain.models.architecture import MoEConfig
from posttrain.models.decoder import ComputeOptions, DecoderConfig, Remat, abstract_decoder, init_params
from posttrain.objectives.supervised import sft
from posttrain.parallel.mesh import make_mesh
from posttrain.parallel.sharding import batch_sharding, flatten, place, replicated, unflatten
from posttrain.records import Batch, Head, Metrics, Model, Objective, Params, Scalars, Statistics, TrainState
from posttrain.train.optim import make_optimizer
from posttrain.train.step import LossSums, make_train_step

# ---- memory ----------------------------------------------------------------------------------------------------------

# Parameters are nearly all of what the step holds: 8 rows of 8 tokens on 8 devices.
CONFIG = DecoderConfig(256, 256, 1024, 4, 2, 1, 128)
ROWS, T = 8, 8
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")


def temporaries(accumulation: int) -> tuple[int, int]:
    """(bytes of a device's temporaries, bytes of its share of the parameters, in f32)."""
    mesh = make_mesh(MeshConfig(fsdp=8))
    decoder = abstract_decoder(CONFIG, options=ComputeOptions("reference", "full"))
    shapes = flatten(decoder.shapes)
    placed = {
        path: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=place(decoder.axes[path], leaf.shape, mesh).sharding
        )
        for path, leaf in shapes.items()
    }
    optimizer = make_optimizer(OptimizerConfig(), {path: leaf.shape for path, leaf in shapes.items()}, 10)
    params, whole = unflatten(placed), replicated(mesh)
    state = TrainState(
        params,
        optimizer.abstract_state(params, whole),
        jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
        jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=whole),
    )
    ints, floats = (
        jax.ShapeDtypeStruct((accumulation, ROWS, T), dtype, sharding=batch_sharding(mesh))
        for dtype in (np.int32, np.float32)
    )
    step = make_train_step(LossSums(decoder, sft(), jnp.float32), optimizer)
    with jax.set_mesh(mesh):
        found = (
            jax.jit(step, donate_argnums=0).lower(state, Batch(ints, ints, ints, floats)).compile().memory_analysis()
        )
    assert found is not None
    share = sum(4 * int(np.prod(leaf.sharding.shard_shape(leaf.shape))) for leaf in placed.values())
    return found.temp_size_in_bytes, share


def test_beside_the_sum_there_is_one_layer_s_gradient() -> None:
    """A single step holds the whole gradient, in f32 as the sum is. All that several add is less than the gradient of
    a layer and that of embedding and head."""
    single, share = temporaries(1)
    several, many = temporaries(4)[0], temporaries(16)[0]
    D, F, N, K, H = (getattr(CONFIG, name) for name in SIZES)
    layer, tables = 4 * D * (2 * N * H + 2 * K * H + 3 * F) // 8, 2 * 4 * CONFIG.padded_vocab_size * D // 8
    assert CONFIG.num_hidden_layers * layer + tables < share < 1.03 * (CONFIG.num_hidden_layers * layer + tables)
    assert several - single < layer + tables, (single, several, layer, tables)
    assert many - several < 0.05 * layer, (several, many, layer)


# ---- values ----------------------------------------------------------------------------------------------------------

SMALL = DecoderConfig(250, 32, 48, 3, 4, 2, 8)
MODELS = {
    "tied": DecoderConfig(250, 32, 48, 3, 4, 2, 8, tie_word_embeddings=True, qk_norm="head", attention_bias=True),
    "experts": DecoderConfig(250, 32, 48, 3, 4, 2, 8, moe=MoEConfig(4, 2, 16)),
}


@cache
def parameters(config: DecoderConfig) -> Params:
    """Large enough for attention and routers to be sharp."""
    made = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    return jax.tree.map(lambda p: 3 * p, made)


def packed_rows() -> Batch:
    """Eight rows of 32 tokens, of two samples each, some tokens untrained; the last two are empty."""
    rng = np.random.default_rng(0)
    lengths = np.array([[20, 12], [5, 25], [17, 15], [30, 2], [9, 9], [16, 16], [0, 0], [0, 0]])
    at = np.arange(32)[None]
    ends = lengths.cumsum(axis=1)
    ids = np.where(at < ends[:, :1], 1, np.where(at < ends[:, 1:], 2, 0)).astype(np.int32)
    positions = np.where(ids == 2, at - ends[:, :1], at * (ids > 0)).astype(np.int32)
    weights = ((positions > 0) & (rng.random((8, 32)) < 0.6)).astype(np.float32)
    return Batch(rng.integers(0, 250, (8, 32)).astype(np.int32), ids, positions, weights)


def split(batch: Batch, accumulation: int) -> Batch:
    return jax.tree.map(lambda x: x.reshape(accumulation, -1, x.shape[-1]), batch)


WHOLE, PARTS = split(packed_rows(), 1), split(packed_rows(), 4)


def everything(params: Params) -> tuple[Params, Params]:
    return params, {}


def gradients(
    config: DecoderConfig,
    batch: Batch,
    totals: Batch,
    *,
    params: Params | None = None,
    remat: Remat = "full",
    objective: Objective | None = None,
    dtype: Any = jnp.float32,
    trained: Callable[[Params], tuple[Params, Params]] = everything,
) -> dict[str, np.ndarray]:
    """By path, of `batch` `[A, B, T]`; divided by the totals of another."""
    decoder = abstract_decoder(config, options=ComputeOptions("reference", remat, "blocks"))
    loss = LossSums(decoder, objective or sft(), dtype)

    @jax.jit
    def compute(params: Params, batch: Batch, totals: Batch) -> Params:
        return loss.gradients(*trained(params), batch, loss.totals(totals))[0]

    found = compute(parameters(config) if params is None else params, batch, totals)
    return {path: np.asarray(leaf) for path, leaf in flatten(found).items()}


@cache
def at_once(config: DecoderConfig) -> dict[str, np.ndarray]:
    """Of all rows in one step, which is JAX's own gradient."""
    return gradients(config, WHOLE, WHOLE)


def assert_alike(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert set(found) == set(expected)
    for path, leaf in expected.items():
        assert found[path].dtype == leaf.dtype == np.float32
        assert np.any(leaf != 0.0), path
        np.testing.assert_allclose(found[path], leaf, rtol=0, atol=2e-5 * np.abs(leaf).max(), err_msg=path)


@pytest.mark.parametrize("remat", ["none", "full", "offload"])
def test_accumulation_changes_nothing_under_any_policy(remat: Remat) -> None:
    assert_alike(gradients(SMALL, PARTS, WHOLE, remat=remat), at_once(SMALL))


@pytest.mark.parametrize("model", MODELS)
def test_accumulation_changes_nothing_in_any_model(model: str) -> None:
    assert_alike(gradients(MODELS[model], PARTS, WHOLE), at_once(MODELS[model]))


def some(params: Params) -> tuple[Params, Params]:
    """(one stacked parameter and one that is not, the others)."""
    leaves, chosen = flatten(params), ("layers/attn/o/kernel", "embed/embedding")
    rest = {path: leaf for path, leaf in leaves.items() if path not in chosen}
    return unflatten({path: leaves[path] for path in chosen}), unflatten(rest)


def test_what_is_frozen_has_no_gradient() -> None:
    expected = at_once(SMALL)
    kept = {path: expected[path] for path in ("layers/attn/o/kernel", "embed/embedding")}
    assert_alike(gradients(SMALL, PARTS, WHOLE, trained=some), kept)


class Passes:
    """Fine-tuning with a pass through the layers for each of several windows of the trained tokens, and beside it a
    term that makes none."""

    coefficients = MappingProxyType({"nll": 1.0, "head": 0.5})
    rows: Literal["single", "pairs", "labelled"] = "single"
    head: Head = "lm"
    mismatched = needs_reference = whole_batch = needs_statistics = False

    def __init__(self, passes: int) -> None:
        self.passes = passes

    def weights(self, batch: Batch) -> Scalars:
        count = jnp.float32(batch.tokens.shape[0])
        return {"nll": jnp.sum(jnp.asarray(batch.loss_weights)), "head": count}

    def statistics(self, model: Model, batch: Batch) -> dict[str, Any]:
        return {}

    def terms(self, model: Model, batch: Batch, statistics: Statistics | None = None) -> tuple[Scalars, Metrics]:
        nll = jnp.float32(0)
        for i in range(self.passes):
            here = jnp.arange(batch.tokens.shape[1]) % self.passes == i
            part = jnp.where(here, jnp.asarray(batch.loss_weights), 0.0)
            own = Batch(batch.tokens, batch.segment_ids, batch.positions, part)
            nll += sft().terms(model, own)[0]["nll"]
        return {"nll": nll, "head": batch.tokens.shape[0] * jnp.sum(model.head() ** 2)}, {}


@pytest.mark.parametrize("passes", [0, 2])
def test_a_loss_may_run_the_layers_any_number_of_times(passes: int) -> None:
    """The windows' sum is the loss of all tokens; the other term is `1/2 sum of squares`, whose gradient is the head.
    Without a pass only that is left."""
    found, head = gradients(SMALL, PARTS, WHOLE, objective=Passes(passes)), "lm_head/kernel"
    expected = dict(at_once(SMALL)) if passes else {path: np.zeros_like(leaf) for path, leaf in found.items()}
    expected[head] = expected[head] + np.asarray(flatten(parameters(SMALL))[head])
    for path, leaf in expected.items():
        np.testing.assert_allclose(found[path], leaf, rtol=0, atol=2e-5 * np.abs(leaf).max(), err_msg=path)


def test_a_mesh_changes_nothing() -> None:
    """Rows, the model's width, tokens and heads are split; the sum is as one device finds it."""
    mesh, axes = make_mesh(MeshConfig(fsdp=2, context=2, tensor=2)), abstract_decoder(SMALL).axes
    leaves = flatten(parameters(SMALL))
    placed = {path: jax.device_put(v, place(axes[path], v.shape, mesh).sharding) for path, v in leaves.items()}
    with jax.set_mesh(mesh):
        several = jax.device_put(PARTS, batch_sharding(mesh))
        assert_alike(gradients(SMALL, several, several, params=unflatten(placed)), at_once(SMALL))


def test_parts_in_bfloat16_add_up_in_float32() -> None:
    """Bit for bit to the sum of what each micro-batch gives by itself, which is bfloat16."""
    found = gradients(SMALL, PARTS, WHOLE, dtype=jnp.bfloat16)
    decoder = abstract_decoder(SMALL, options=ComputeOptions("reference", "full"))
    loss = LossSums(decoder, sft(), jnp.bfloat16)
    alone = jax.jit(lambda params, part: loss.gradients(params, {}, part, loss.totals(WHOLE))[0])
    parts = [
        flatten(alone(parameters(SMALL), jax.tree.map(lambda x, i=i: x[i : i + 1], PARTS)))
        for i in range(PARTS.tokens.shape[0])
    ]
    for path, leaf in found.items():
        expected = np.zeros_like(leaf)
        for part in parts:
            assert part[path].dtype == jnp.bfloat16
            expected += np.asarray(part[path]).astype(np.float32)
        np.testing.assert_array_equal(leaf, expected, err_msg=path)
