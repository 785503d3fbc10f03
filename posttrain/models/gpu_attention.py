"""JAX's attention kernel for GPUs on packed rows: the choice of `attention.py` there, where the model allows it.

Written in Pallas for Triton, it masks by segment within causal blocks, forward and backward, and its program runs on
CPU too, so that tests hold it to the formula. cuDNN's kernel for packed rows is not used: it cannot be run without a
Hopper GPU, takes a fixed number of segments a row, and counts the offsets of keys in query heads, which with grouped
queries are more. This kernel has neither windows nor soft-caps: `attention_choice.py` says where it cannot serve.
"""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.gpu import attention as kernel
from jaxtyping import Array, Float, Int

BLOCK = 64
"""Queries and keys of a block, forward: with the longest heads its tiles take 80 KiB of shared memory. Rows are padded
to a multiple of it."""

_BLOCKS = kernel.BlockSizes(BLOCK, BLOCK, block_q_dkv=32, block_kv_dkv=32, block_q_dq=32, block_kv_dq=32)


def triton_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    *,
    scale: float,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """What `attention.attention` says, without window and soft-cap, on one device. Each query head gets a copy of the
    key/value head that it reads. `interpret` runs the kernel's program on CPU."""
    T, group = q.shape[1], q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    if padding := -T % BLOCK:
        q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q, k, v))
        segment_ids = jnp.pad(segment_ids, ((0, 0), (0, padding)))
    out = cast(Array, _attend(q, k, v, segment_ids, scale, interpret))
    # Padding attends to padding in the kernel.
    return jnp.where((segment_ids != 0)[..., None, None], out, 0)[:, :T]


def _settings(scale: float, interpret: bool) -> dict[str, Any]:
    return {
        "sm_scale": scale,
        "causal": True,
        "block_sizes": _BLOCKS,
        "backward_pass_impl": "triton",
        "num_warps": None,
        "num_stages": 2,
        "grid": None,
        "interpret": interpret,
        "debug": False,
    }


def _forward(
    q: Array, k: Array, v: Array, segment_ids: Array, scale: float, interpret: bool
) -> tuple[Array, tuple[Array, ...]]:
    """The kernel's own rule names nothing for remat policies to save."""
    forward: Any = kernel.mha
    found = forward(q, k, v, segment_ids, **_settings(scale, interpret), return_residuals=True)
    out, lse = checkpoint_name(found[0], "attn_out"), checkpoint_name(found[1], "attn_lse")
    return out, (q, k, v, segment_ids, out, lse)


def _backward(scale: float, interpret: bool, residuals: tuple[Array, ...], dout: Array) -> tuple[Array | None, ...]:
    backward: Any = kernel._mha_backward
    return backward(**_settings(scale, interpret), return_residuals=False, res=residuals, do=dout)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q: Array, k: Array, v: Array, segment_ids: Array, scale: float, interpret: bool) -> Array:
    return _forward(q, k, v, segment_ids, scale, interpret)[0]


_attend.defvjp(_forward, _backward)
