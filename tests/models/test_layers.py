"""Linear layers and norms, their gradients too, against their formulas in numpy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from posttrain.models.layers import Linear, RMSNorm

B, T = 2, 24


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        pytest.param({"embed": 6}, {"mlp": 11}, id="to more"),
        pytest.param({"mlp": 11}, {"embed": 6}, id="to fewer"),
        pytest.param({"embed": 6}, {"heads": 3, "head_size": 4}, id="to heads"),
        pytest.param({"heads": 3, "head_size": 4}, {"embed": 6}, id="from heads"),
        pytest.param({"heads": 3, "head_size": 4}, {"heads": 2, "head_size": 5}, id="heads to heads"),
    ],
)
def test_linear_and_its_gradients(inputs: dict[str, int], outputs: dict[str, int]):
    layer = Linear(inputs, outputs, bias=True, rngs=nnx.Rngs(0), dtype=jnp.float32)
    x, dy = draw(1, B, T, *inputs.values()), draw(2, B, T, *outputs.values())
    graph, state = nnx.split(layer)
    y, vjp = jax.vjp(lambda state, x: nnx.merge(graph, state)(x), state, jnp.asarray(x))
    found, dx = vjp(jnp.asarray(dy))

    rows, out = np.float64(x).reshape(B * T, -1), np.float64(dy).reshape(B * T, -1)
    kernel = np.float64(layer.kernel[...])
    matrix = kernel.reshape(rows.shape[1], out.shape[1])
    bias = np.float64(layer.bias[...]).reshape(-1)
    np.testing.assert_allclose(y, (rows @ matrix + bias).reshape(dy.shape), atol=1e-6)
    np.testing.assert_allclose(dx, (out @ matrix.T).reshape(x.shape), atol=1e-6)
    np.testing.assert_allclose(found["kernel"][...], (rows.T @ out).reshape(kernel.shape), atol=2e-5)
    np.testing.assert_allclose(found["bias"][...].reshape(-1), out.sum(0), atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 7, 24, 64])
@pytest.mark.parametrize(
    ("dims", "lead"),
    [
        pytest.param({"width": 10}, (), id="width"),
        pytest.param({"head_size": 4}, (3,), id="each head"),
        pytest.param({"heads": 3, "head_size": 4}, (), id="all heads together"),
    ],
)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norm_and_its_gradients(dims: dict[str, int], lead: tuple[int, ...], tokens: int, offset: float):
    layer = RMSNorm(dims, 1e-5, offset=offset, rngs=nnx.Rngs(0), dtype=jnp.float32)
    scale = draw(3, *dims.values())
    x, dy = draw(4, B, tokens, *lead, *dims.values()), draw(5, B, tokens, *lead, *dims.values())
    graph, state = nnx.split(layer)
    state["scale"] = state["scale"].replace(jnp.asarray(scale))
    y, vjp = jax.vjp(lambda state, x: nnx.merge(graph, state)(x), state, jnp.asarray(x))
    found, dx = vjp(jnp.asarray(dy))

    rows, out, weight = (np.float64(a).reshape(-1, scale.size) for a in (x, dy, scale))
    inverse = 1 / np.sqrt((rows**2).mean(-1, keepdims=True) + 1e-5)
    normed, upstream = rows * inverse, out * (weight + offset)
    expected = inverse * (upstream - normed * (upstream * normed).mean(-1, keepdims=True))
    np.testing.assert_allclose(y, (normed * (weight + offset)).reshape(x.shape), atol=2e-6)
    np.testing.assert_allclose(dx, expected.reshape(x.shape), atol=5e-6)
    np.testing.assert_allclose(found["scale"][...].reshape(-1), (out * normed).sum(0), atol=3e-5)
