"""Context parallelism: where tokens are, that every device has the same work, and attention on rows that are split."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from posttrain.config import MeshConfig
from posttrain.models import attention as module
from posttrain.models import decoder
from posttrain.models.attention import attention
from posttrain.models.context import Share, balanced, natural
from posttrain.parallel.mesh import make_mesh
from tests.models.test_attention import H, K, N, assert_close, causal_mask, draw, formula, segments

T, B = 128, 4
ROWS = [[T], [50, 30, 48], [1, 63, 20], [16, 48, 64]]
"""Segments of the whole row, across chunks, with padding behind, and ending where chunks do."""


def mesh_of(**sizes: int) -> Mesh:
    return make_mesh(MeshConfig(**({"fsdp": 1} | sizes)))


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_a_device_holds_a_chunk_from_either_end(devices: int) -> None:
    numbers = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    mesh = mesh_of(context=devices, fsdp=8 // devices if devices > 2 else 1, data=4 if devices == 2 else 1)
    with jax.set_mesh(mesh):
        moved = jax.jit(balanced)(jnp.asarray(numbers))
        back = jax.jit(natural)(moved)
    np.testing.assert_array_equal(back, numbers)
    chunks = np.arange(T).reshape(2 * devices, -1)
    for shard in moved.addressable_shards:
        start = shard.index[1].start or 0
        index = start // (T // devices)
        held = np.concatenate([chunks[index], chunks[-1 - index]])
        np.testing.assert_array_equal(shard.data[0], held)
        np.testing.assert_array_equal(Share(devices, index).places(T, 1), held)


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_causal_work_is_the_same_for_every_device(devices: int) -> None:
    """Pairs of a query and a key that it sees, of a row that is one segment."""
    pairs = [int(np.sum(np.asarray(Share(devices, i).places(T, 1)) + 1)) for i in range(devices)]
    assert len(set(pairs)) == 1 and sum(pairs) == T * (T + 1) // 2


def test_without_such_a_mesh_nothing_moves() -> None:
    x = jnp.arange(B * 6).reshape(B, 6)
    assert balanced(x) is x and natural(x) is x
    with jax.set_mesh(mesh_of(data=8)):
        assert balanced(x) is x
    with jax.set_mesh(mesh_of(context=8)):  # 6 tokens do not fall into 16 chunks
        assert balanced(x) is x


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize(
    ("sizes", "window", "softcap"),
    [
        ({"context": 8}, None, None),
        ({"context": 4, "fsdp": 2}, 20, 0.8),
        ({"context": 2, "data": 2, "tensor": 2}, 40, None),
    ],
    ids=str,
)
def test_attention_and_its_gradients_equal_the_formula(
    sizes: dict[str, int],
    window: int | None,
    softcap: float | None,
    implementation: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "BLOCK", 8)
    q, k, v, dout = draw(0, (B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H))
    ids = segments(ROWS, T)

    @jax.jit
    def run(q, k, v, dout):
        how = {"implementation": implementation, "window": window, "softcap": softcap}

        def attend(q, k, v):
            return natural(attention(*map(balanced, (q, k, v)), jnp.asarray(ids), **how))

        out, vjp = jax.vjp(attend, q, k, v)
        return out, *vjp(dout)

    with jax.set_mesh(mesh_of(**sizes)):
        found = run(q, k, v, dout)
    out, vjp = formula(q, k, v, causal_mask(ids, window), softcap=softcap)
    assert_close(found, (out, *vjp(dout)))


def test_no_remat_policy_saves_the_keys_of_a_whole_row() -> None:
    """`none` saves all activations: queries, keys, values, results and their log-sum-exp, each device its own part."""
    q, k, v, _ = map(jnp.asarray, draw(0, (B, T, N, H), (B, T, K, H), (B, T, K, H), (1,)))
    ids = jnp.asarray(segments(ROWS, T))

    def layer(x: jax.Array, kv: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return attention(x, *kv, ids, implementation="chunked"), None

    with jax.set_mesh(mesh_of(context=8)):
        _, vjp = jax.vjp(lambda *x: decoder._remat(layer, "none")(x[0], x[1:])[0], q, k, v)
    saved = sum(leaf.size for leaf in jax.tree.leaves(vjp) if leaf.dtype == jnp.float32)
    assert 0 < saved <= 2 * q.size + k.size + v.size + B * T * N
