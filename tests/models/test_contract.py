"""Products with weights that a mesh splits, and their gradients, against numpy float64; what they gather and reduce."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from posttrain.config import MeshConfig
from posttrain.models.architecture import DecoderConfig
from posttrain.models.contract import contract, gather_shards
from posttrain.models.decoder import ComputeOptions, Remat, abstract_decoder
from posttrain.parallel.mesh import make_mesh
from posttrain.parallel.sharding import flatten, place, unflatten
from posttrain.records import Batch

B, T = 8, 16
WEIGHTS = [
    pytest.param(("embed", "mlp"), (16, 24), 1, id="to more"),
    pytest.param(("mlp", "embed"), (24, 16), 1, id="to fewer"),
    pytest.param(("embed", "heads", "head_size"), (16, 4, 3), 1, id="to heads"),
    pytest.param(("heads", "head_size", "embed"), (4, 3, 16), 2, id="from heads"),
    pytest.param(("embed", "lora_rank"), (16, 3), 1, id="to an adapter"),
    pytest.param(("embed", "mlp"), (6, 5), 1, id="dims that no axis divides"),
]
MESHES = [
    pytest.param({"fsdp": 8}, id="fsdp 8"),
    pytest.param({"fsdp": 4, "tensor": 2}, id="fsdp 4 tensor 2"),
    pytest.param({"data": 2, "fsdp": 2, "context": 2}, id="data 2 fsdp 2 context 2"),
    pytest.param({"replica": 2, "expert": 4}, id="replica 2 expert 4"),
    pytest.param({"tensor": 8}, id="tensor 8"),
]


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def run(mesh: Mesh, rows: int, names: tuple[str, ...], shape: tuple[int, ...], count: int, dtype=jnp.float32):
    """The product, both gradients, the inputs, and the compiled program."""
    drawn = draw(1, rows, T, *shape[:count]), draw(2, *shape), draw(3, rows, T, *shape[count:])
    x, weight, dy = (a.astype(dtype) for a in drawn)

    def products(x: jax.Array, weight: jax.Array, dy: jax.Array):
        y, vjp = jax.vjp(lambda x, weight: contract(x, weight, names, count), x, weight)
        return y, *vjp(dy)

    stored = place(names, shape, mesh).sharding
    activations = NamedSharding(mesh, PartitionSpec(("replica", "data", "fsdp", "expert")))
    spread = activations if rows % 8 == 0 else NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
        inputs = jax.device_put(x, spread), jax.device_put(weight, stored), jax.device_put(dy, spread)
        jitted = jax.jit(products, out_shardings=(spread, spread, stored))
        return jitted(*inputs), (x, weight, dy), jitted.lower(*inputs).compile().as_text()


@pytest.mark.parametrize(("names", "shape", "count"), WEIGHTS)
@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("rows", [B, 3])
def test_product_and_its_gradients(sizes: dict, names: tuple, shape: tuple, count: int, rows: int):
    (y, dx, dw), (x, weight, dy), _ = run(make_mesh(MeshConfig(**sizes)), rows, names, shape, count)
    inputs, outputs = math.prod(shape[:count]), math.prod(shape[count:])
    flat_x, flat_w, flat_dy = (
        np.float64(a).reshape(s) for a, s in ((x, (-1, inputs)), (weight, (inputs, outputs)), (dy, (-1, outputs)))
    )
    np.testing.assert_allclose(y, (flat_x @ flat_w).reshape(y.shape), atol=2e-5)
    np.testing.assert_allclose(dx, (flat_dy @ flat_w.T).reshape(dx.shape), atol=2e-5)
    np.testing.assert_allclose(dw, (flat_x.T @ flat_dy).reshape(dw.shape), atol=5e-5)


def test_bf16_products_are_rounded_once():
    """On a CPU, whose kernels for bf16 are those with an f32 result: nothing is widened for others."""
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    results, inputs, text = run(mesh, B, ("embed", "mlp"), (16, 24), 1, jnp.bfloat16)
    x, weight, dy = (np.asarray(a, np.float64) for a in inputs)
    half_a_unit = 2.0**-8 * (1 + 1e-4)  # in the last place of bf16; and what an f32 sum is off
    exact = x @ weight, dy @ weight.T, np.einsum("bti,bto->io", x, dy)
    for result, expected in zip(results, exact, strict=True):
        assert result.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float64(result), expected, rtol=half_a_unit, atol=1e-5)
    assert re.findall(r"= (\w+)\[[\d,]+\]\S* dot\(", text) == ["f32"] * 3
    assert not re.search(r"= f32\[[\d,]+\]\S* convert\(", text)


def test_a_weight_is_gathered_once_and_its_gradient_reduced_into_its_shards():
    """Over an axis of 8, in stages of 2 and 4, and never as a whole sum on every device."""
    _, _, text = run(make_mesh(MeshConfig(fsdp=8)), B, ("embed", "mlp"), (16, 24), 1)
    kinds = re.findall(r"= f32\[([\d,]+)\]\S* (all-gather|reduce-scatter|all-reduce)\(", text)
    gathered = [("4,24", "all-gather"), ("16,24", "all-gather")]
    assert kinds == [*gathered, ("4,24", "reduce-scatter"), ("2,24", "reduce-scatter")]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 8])
def test_shards_are_gathered_and_their_gradients_summed(size: int):
    mesh = Mesh(np.array(jax.devices()[:size]).reshape(size), ("fsdp",))
    x, weights = draw(1, 2, 24), draw(2, size, 2, 24)

    def weighted(x: jax.Array, weights: jax.Array) -> jax.Array:
        return jnp.sum(gather_shards(x, ("fsdp",), 1) * weights[0])[None]

    spec = PartitionSpec(None, "fsdp")
    run = jax.shard_map(
        weighted, mesh=mesh, in_specs=(spec, PartitionSpec("fsdp")), out_specs=PartitionSpec("fsdp"), check_vma=False
    )
    value, vjp = jax.vjp(lambda x: run(x, weights).sum(), x)
    np.testing.assert_allclose(value, (np.float64(x) * weights).sum(), rtol=1e-5)
    np.testing.assert_allclose(vjp(jnp.ones(()))[0], np.float64(weights).sum(0), atol=1e-5)


@pytest.mark.parametrize("remat", ["none", "minimal", "dots", "full"])
def test_no_remat_policy_keeps_what_is_gathered(remat: Remat):
    """Twelve layers over eight devices: a device never holds the whole model, nor three quarters of it."""
    config = DecoderConfig(64, 64, 1024, 12, 2, 1, 32)
    decoder = abstract_decoder(config, options=ComputeOptions("reference", remat))
    mesh = make_mesh(MeshConfig(fsdp=8))
    shapes = flatten(decoder.shapes)
    stored = {path: place(axes, shapes[path].shape, mesh).sharding for path, axes in decoder.axes.items()}
    params = {p: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=stored[p]) for p, leaf in shapes.items()}
    ids = np.ones((8, 8), np.int32)
    batch = Batch(ids, ids, np.tile(np.arange(8, dtype=np.int32), (8, 1)), np.ones((8, 8), np.float32))

    def loss(params: dict) -> jax.Array:
        return jnp.sum(decoder.merge(unflatten(params)).hidden(batch) ** 2)

    with jax.set_mesh(mesh):
        found = jax.jit(jax.grad(loss)).lower(params).compile().memory_analysis()
    whole = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in params.values())
    assert found.temp_size_in_bytes + found.argument_size_in_bytes < 0.75 * whole
