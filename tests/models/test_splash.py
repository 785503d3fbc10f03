"""The TPU attention kernel's program, interpreted on CPU, against the formula; and its split over a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from posttrain.config import MeshConfig
from posttrain.errors import UserError
from posttrain.models import splash
from posttrain.models.attention_choice import check_split, choose_attention
from posttrain.models.context import Share, balanced, natural, on_devices
from posttrain.models.splash import splash_attention
from posttrain.parallel.mesh import AXES, make_mesh
from tests.models.test_attention import causal_mask, formula, segments

T, H = 200, 16
LAYOUT = [[50, 130], [200]]
"""With padding at the end of the first row, and T not a multiple of the kernel's blocks."""


def draw(N: int, K: int, B: int, T: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = ((B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H))
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def check(
    windows: tuple[int | None, ...],
    which: int,
    softcap: float | None,
    N: int,
    K: int,
    rows: list[list[int]],
    T: int = T,
):
    ids = segments(rows, T)
    q, k, v, dout = draw(N, K, len(rows), T)

    def on_device(q, k, v, ids, which, share):
        return splash_attention(q, k, v, ids, share, windows, which, scale=0.3, softcap=softcap, interpret=True)

    def run(q, k, v):
        return natural(on_devices(on_device, *map(balanced, (q, k, v)), jnp.asarray(ids), jnp.int32(which)))

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


@pytest.mark.parametrize("window", [None, 150])
def test_tokens_split_over_devices(window: int | None, monkeypatch: pytest.MonkeyPatch):
    """Four chunks of one block each; segments end within chunks, and the window spans more than one."""
    monkeypatch.setattr(splash, "BLOCK_KV", 256)  # two chunks of different devices in one block of keys
    mesh = make_mesh(MeshConfig(fsdp=1, context=2, tensor=2), jax.devices()[:4])
    with jax.set_mesh(mesh):
        check((window,), 0, 5.0, 4, 2, [[300, 180], [70, 442]], T=512)


@pytest.mark.parametrize("window", [None, 1, 128, 129, 300])
@pytest.mark.parametrize("devices", [1, 2, 4])
def test_a_device_visits_the_blocks_that_its_queries_see_and_no_other(devices: int, window: int | None):
    """Against the mask of the whole row, block by block; queries in blocks of 128, keys in blocks of 256."""
    length, of_queries, of_keys = 2048, 128, 256
    mask = causal_mask(np.ones((1, length), np.int32), window)[0]
    forward, backward = splash._tables(devices, length, window, of_queries, of_keys)
    visited = []
    for index in range(devices):
        own = mask[np.asarray(Share(devices, index).places(length, 1))]
        seen = own.reshape(-1, of_queries, length // of_keys, of_keys).any((1, 3))
        for table, wanted in (
            (np.asarray(forward[index])[:, 0], seen),
            (np.asarray(backward[index])[:, 0].swapaxes(1, 2), seen.T),
        ):
            found = [set(row[active == 1].tolist()) for row, active in zip(*table, strict=True)]
            assert found == [set(np.flatnonzero(row).tolist()) for row in wanted]
            assert (table[1].sum(1) == wanted.sum(1)).all()  # none of them twice
        visited.append(int(seen.sum()))
    assert max(visited) <= min(visited) + (length // of_queries // devices)  # the same, but for half blocks of keys


def test_rows_that_the_kernel_cannot_split_are_refused():
    assert (
        not check_split("splash", 32768, 4) and not check_split("splash", 1000, 1) and not check_split("chunked", 8, 4)
    )
    (problem,) = check_split("splash", 3000, 4)
    assert "data.row_length = 3000" in problem and "mesh.context = 4" in problem and "works is 3072" in problem


def test_only_on_tpu():
    assert choose_attention("auto", "tpu") == "splash"
    assert choose_attention("auto", "gpu") == "triton"
    assert choose_attention("auto", "cpu") == "chunked"
    with pytest.raises(UserError, match=r"model\.attention = splash.*this is cpu; use auto, chunked or reference"):
        choose_attention("splash", "cpu")
