"""Attention on a mesh: what each device holds, and context parallelism, where it holds a part of every row's tokens.

`attention.py` runs its implementations through `on_devices`; `decoder.py` puts a row's tokens in order with `balanced`
before its layers and back with `natural` behind them. In between, where the mesh axis `context` has c devices, a row is
cut into 2c chunks and device i holds chunks i and 2c - 1 - i: causal attention costs each of them the same, (2c + 1)
chunks of keys for the two (the placement of Llama 3, arXiv:2407.21783, and of zigzag ring attention). Everywhere else
rows are in their own order, so that nothing else need know.

Keys and values are gathered over `context`, in the row's own order, for the one layer that reads them; their gradient
is reduce-scattered. A ring would keep a c-th of them at a time: with grouped queries, 128k tokens of 8 heads of 128
bfloat16 are 256 MB each, no more than one layer's activations.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Int32, Shaped

from posttrain.models.contract import gather_shards
from posttrain.parallel.sharding import split_axes

AXIS = "context"


class Share(NamedTuple):
    """The part of a row's tokens whose queries a device holds."""

    devices: int
    """How many split the row; 1: its own order, all of it."""
    index: Int32[Array, ""] | int
    """Which of them this is."""

    def chunk(self, T: int) -> int:
        """Length of the contiguous runs of tokens that the part consists of, in a row of T."""
        return T if self.devices == 1 else T // (2 * self.devices)

    def places(self, T: int, size: int) -> Int32[Array, " n"]:
        """Numbers, within the row cut into pieces of `size` tokens, of the pieces that the part consists of.

        `size` divides a chunk. With size 1 these are the places of the tokens.
        """
        if self.devices == 1:
            return jnp.arange(T // size, dtype=jnp.int32)
        within = jnp.arange(self.chunk(T) // size, dtype=jnp.int32)
        first, second = self.index, 2 * self.devices - 1 - self.index
        return jnp.concatenate([within + chunk * len(within) for chunk in (first, second)])


WHOLE = Share(1, 0)


def balanced(x: Shaped[Array, "B T ..."]) -> Shaped[Array, "B T ..."]:
    """Rows with their tokens where the layers want them; the same where the mesh does not split them."""
    return _moved(x, _to_balanced)


def natural(x: Shaped[Array, "B T ..."]) -> Shaped[Array, "B T ..."]:
    """The inverse of `balanced`: rows in their own order, in contiguous parts."""
    return _moved(x, _to_natural)


def on_devices(
    run: Callable[..., Float[Array, "B T N H"]],
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    which: Int[Array, ""],
) -> Float[Array, "B T N H"]:
    """`run(q, k, v, segment_ids, which, share)` on every device of the mesh of `jax.set_mesh`, or at once without one.

    Each gets its rows, its query heads, the key/value heads that they read, the queries of its share of the tokens, and
    keys, values and segments of all tokens in the row's own order. `q`, `k` and `v` are as `balanced` orders them,
    `segment_ids` in the row's own order.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return run(q, k, v, segment_ids, which, WHOLE)
    rows, tokens = split_axes("rows", q.shape[0], mesh), split_axes("tokens", q.shape[1], mesh)
    heads, kv_heads = split_axes("heads", q.shape[2], mesh), split_axes("kv_heads", k.shape[2], mesh)
    queries, keys = PartitionSpec(rows, tokens, heads), PartitionSpec(rows, tokens, kv_heads)
    local = functools.partial(
        _on_device, run, mesh.shape[AXIS] if tokens else 1, heads if heads != kv_heads else (), q.shape[2] // k.shape[2]
    )
    # Not checked for replication: kernels do not say over which axes their results vary.
    return jax.shard_map(
        local,
        in_specs=(queries, keys, keys, PartitionSpec(rows), PartitionSpec()),
        out_specs=queries,
        check_vma=False,
    )(q, k, v, segment_ids, which)


def _on_device(
    run: Callable[..., Array],
    devices: int,
    heads: tuple[str, ...],
    group: int,
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array,
    which: Array,
) -> Array:
    """`run` on a device's part. `heads` are mesh axes that split the query heads and not the keys, of which `group`
    query heads read one."""
    if heads:
        own = q.shape[2]
        if own % group and group % own:
            # Its heads begin in the middle of one group and end in another: each head gets a key of its own.
            k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
            group = 1
        first = lax.axis_index(heads) * own // group
        k, v = (lax.dynamic_slice_in_dim(x, first, max(1, own // group), 2) for x in (k, v))
    if devices == 1:
        return run(q, k, v, segment_ids, which, WHOLE)
    # Put in order before they are gathered: no copy of a whole row's keys is made, and none is left to be saved for the
    # backward pass by a remat policy that saves no `all_gather`.
    k, v = (gather_shards(_to_natural(x, devices), (AXIS,), 1) for x in (k, v))
    return run(q, k, v, segment_ids, which, Share(devices, lax.axis_index(AXIS)))


# ---- moving chunks: device i holds chunks i and 2c - 1 - i of the balanced order, 2i and 2i + 1 of the row's own -----


def _moved(x: Shaped[Array, "B T ..."], move: Callable[..., Array]) -> Shaped[Array, "B T ..."]:
    mesh = jax.sharding.get_abstract_mesh()
    tokens = () if mesh.empty else split_axes("tokens", x.shape[1], mesh)
    if not tokens:
        return x
    spec = PartitionSpec(split_axes("rows", x.shape[0], mesh), tokens)
    return jax.shard_map(functools.partial(move, devices=mesh.shape[AXIS]), in_specs=spec, out_specs=spec)(x)


def _to_natural(x: Shaped[Array, "B t ..."], devices: int) -> Shaped[Array, "B t ..."]:
    """A device's balanced part for its contiguous one. Of the two chunks that it holds one is even, one odd."""
    first, second = jnp.split(x, 2, axis=1)
    own_is_even = lax.axis_index(AXIS) % 2 == 0
    even, odd = jnp.where(own_is_even, first, second), jnp.where(own_is_even, second, first)
    moves = [[(device, chunk // 2) for device, chunk in _held(devices, parity)] for parity in (0, 1)]
    return jnp.concatenate([lax.ppermute(part, AXIS, move) for part, move in zip((even, odd), moves, strict=True)], 1)


def _to_balanced(x: Shaped[Array, "B t ..."], devices: int) -> Shaped[Array, "B t ..."]:
    """The inverse of `_to_natural`."""
    moves = [[(chunk // 2, device) for device, chunk in _held(devices, parity)] for parity in (0, 1)]
    even, odd = (lax.ppermute(part, AXIS, move) for part, move in zip(jnp.split(x, 2, axis=1), moves, strict=True))
    own_is_even = lax.axis_index(AXIS) % 2 == 0
    first, second = jnp.where(own_is_even, even, odd), jnp.where(own_is_even, odd, even)
    return jnp.concatenate([first, second], axis=1)


def _held(devices: int, parity: int) -> list[tuple[int, int]]:
    """(device, which chunk of this parity it holds in the balanced order)."""
    both = [(i, (i, 2 * devices - 1 - i)) for i in range(devices)]
    return [(i, next(chunk for chunk in chunks if chunk % 2 == parity)) for i, chunks in both]
