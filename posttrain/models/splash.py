"""Splash attention, JAX's block-sparse attention kernel for TPUs, on packed rows: the choice of `attention.py` on TPU.

The kernel visits blocks that the causal mask and the window leave; segments are masked within them. It knows nothing of
meshes, so it runs inside `shard_map`: rows and heads are split as the activations are. Where a mesh splits query heads
more finely than key/value heads, every device takes the key/value heads that its query heads read.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from posttrain.parallel.sharding import split_axes

BLOCK = 128
"""The kernel's blocks are multiples of it; rows are padded to one."""
BLOCK_Q, BLOCK_KV = 1024, 1024
"""The blocks that rows are cut into, or the largest that divide them."""


def splash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    windows: tuple[int | None, ...],
    which: Int[Array, ""],
    *,
    scale: float,
    softcap: float | None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """What `attention.attention` says, of the window `windows[which]`. `interpret` runs the kernel's program on CPU."""
    T = q.shape[1]
    if padding := -T % BLOCK:
        q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q, k, v))
        segment_ids = jnp.pad(segment_ids, ((0, 0), (0, padding)))
    run = functools.partial(_attend, windows, scale, softcap, interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        rows = split_axes("rows", q.shape[0], mesh)
        heads, kv_heads = split_axes("heads", q.shape[2], mesh), split_axes("kv_heads", k.shape[2], mesh)
        queries, keys = PartitionSpec(rows, None, heads), PartitionSpec(rows, None, kv_heads)
        group = q.shape[2] // k.shape[2]
        run = functools.partial(_on_device, run, heads if heads != kv_heads else (), group)
        # Not checked for replication: kernels do not say over which axes their results vary.
        run = jax.shard_map(
            run,
            in_specs=(queries, keys, keys, PartitionSpec(rows), PartitionSpec()),
            out_specs=queries,
            check_vma=False,
        )
    return run(q, k, v, segment_ids, which)[:, :T]


def _on_device(run, heads: tuple[str, ...], group: int, q: Array, k: Array, v: Array, segment_ids: Array, which: Array):
    """`run` on a device's query heads; `heads` are mesh axes that split these and not the keys, of which `group` query
    heads read one."""
    if heads:
        own = q.shape[2]
        if own % group and group % own:
            # Its heads begin in the middle of one group and end in another: each head gets a key of its own.
            k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
            group = 1
        first = lax.axis_index(heads) * own // group
        k, v = (lax.dynamic_slice_in_dim(x, first, max(1, own // group), 2) for x in (k, v))
    return run(q, k, v, segment_ids, which)


def _attend(
    windows: tuple[int | None, ...],
    scale: float,
    softcap: float | None,
    interpret: bool,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    which: Int[Array, ""],
) -> Float[Array, "B T N H"]:
    real = (segment_ids != 0)[..., None, None]
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)

    def with_window(window: int | None):
        attend = _kernel(q.shape[1], q.shape[2], window, softcap, interpret)

        def run(q: Array, k: Array, v: Array, segment_ids: Array) -> Array:
            heads_first = (x.swapaxes(1, 2) for x in (q, k, v))
            out: Any = jax.vmap(attend)(*heads_first, kernel.SegmentIds(segment_ids, segment_ids))
            return out.swapaxes(1, 2)

        return run

    out = lax.switch(which, [with_window(window) for window in windows], q, k, v, segment_ids)
    return jnp.where(real, out, 0)


def _kernel(T: int, heads: int, window: int | None, softcap: float | None, interpret: bool):
    """The kernel of one row, `[N T H] [K T H] [K T H] -> [N T H]`."""
    shape = (T, T)
    mask = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
    block_q, block_kv = math.gcd(T, BLOCK_Q), math.gcd(T, BLOCK_KV)
    blocks = kernel.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=math.gcd(block_kv, 512),
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=math.gcd(block_kv, 512),
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )
    return kernel.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name="attn_out",
        interpret=interpret,
    )
