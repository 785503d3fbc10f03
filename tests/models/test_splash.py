"""The TPU attention kernel's program, interpreted on CPU, against the formula; and its split over a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from posttrain.errors import UserError
from posttrain.models.attention import choose_attention
from posttrain.models.splash import splash_attention
from posttrain.parallel.mesh import AXES
from tests.models.test_attention import causal_mask, formula, segments

T, H = 200, 16
LAYOUT = [[50, 130], [200]]
"""With padding at the end of the first row, and T not a multiple of the kernel's blocks."""


def draw(N: int, K: int, B: int = 2) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = ((B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H))
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def check(windows: tuple[int | None, ...], which: int, softcap: float | None, N: int, K: int, rows: list[list[int]]):
    ids = segments(rows, T)
    q, k, v, dout = draw(N, K, len(rows))

    def run(q, k, v):
        options = {"scale": 0.3, "softcap": softcap, "interpret": True}
        return splash_attention(q, k, v, jnp.asarray(ids), windows, jnp.int32(which), **options)

    out, vjp = jax.vjp(jax.jit(run), *map(jnp.asarray, (q, k, v)))
    expected, expected_vjp = formula(q, k, v, causal_mask(ids, windows[which]), 0.3, softcap)
    expected = np.where((ids != 0)[..., None, None], expected, 0.0)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    for found, wanted in zip(vjp(jnp.asarray(dout)), expected_vjp(dout), strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-5)
    padding = ids == 0
    assert not np.asarray(out)[padding].any()
    for gradient in vjp(jnp.asarray(dout)):
        assert not np.asarray(gradient)[padding].any()


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(("windows", "which"), [((None,), 0), ((40,), 0), ((None, 40), 0), ((None, 40), 1)])
def test_equals_the_formula(windows: tuple[int | None, ...], which: int, softcap: float | None):
    check(windows, which, softcap, 6, 2, LAYOUT)


@pytest.mark.parametrize(
    ("N", "K", "tensor"),
    [
        pytest.param(8, 4, 4, id="keys split like queries"),
        pytest.param(8, 2, 4, id="two devices read one key head"),
        pytest.param(12, 3, 2, id="keys not split, groups cut at devices"),
        pytest.param(12, 3, 4, id="keys not split, a device one group less a head"),
        pytest.param(3, 3, 2, id="nothing split"),
    ],
)
def test_on_a_mesh(N: int, K: int, tensor: int):
    sizes = {"fsdp": 2, "tensor": tensor}
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    devices = jax.devices()[: 2 * tensor]
    mesh = jax.make_mesh(shape, AXES, devices=devices, axis_types=(AxisType.Auto,) * len(AXES))
    with jax.set_mesh(mesh):
        check((None,), 0, None, N, K, LAYOUT)


def test_only_on_tpu():
    assert choose_attention("auto", "tpu") == "splash"
    assert choose_attention("auto", "gpu") == choose_attention("auto", "cpu") == "chunked"
    with pytest.raises(UserError, match=r"model\.attention = splash.*this is cpu; use auto, chunked or reference"):
        choose_attention("splash", "cpu")
