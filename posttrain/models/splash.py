"""Splash attention, JAX's block-sparse attention kernel for TPUs, on packed rows: the choice of `attention.py` on TPU.

The kernel visits the blocks that the causal mask and the window leave; segments are masked within them. Which blocks
these are it reads from tables, made here: where tokens are split over devices (`context.py`) each device has its own.
The kernel's own tables are made by evaluating the mask everywhere, which takes minutes for a row of 128k tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as mask_info
from jaxtyping import Array, Bool, Float, Int

from posttrain.models.attention import SPLASH_BLOCK
from posttrain.models.context import Share

BLOCK_Q, BLOCK_KV = 1024, 1024
"""The blocks that rows are cut into, or the largest that divide them."""


def splash_attention(
    q: Float[Array, "B U N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    share: Share,
    windows: tuple[int | None, ...],
    which: Int[Array, ""],
    *,
    scale: float,
    softcap: float | None,
    interpret: bool = False,
) -> Float[Array, "B U N H"]:
    """What `attention.attention` says, of the window `windows[which]`, on one device. `interpret` runs the kernel's
    program on CPU. The chunks of a row that is split must be multiples of `SPLASH_BLOCK`."""
    U = q.shape[1]
    if share.devices == 1 and (padding := -U % SPLASH_BLOCK):
        q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q, k, v))
        segment_ids = jnp.pad(segment_ids, ((0, 0), (0, padding)))
    T = k.shape[1]
    own_ids = segment_ids[:, share.places(T, 1)] if share.devices > 1 else segment_ids
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)

    def with_window(window: int | None):
        attend = _kernel(share, T, window, softcap, interpret)

        def run(q: Array, k: Array, v: Array, own_ids: Array, segment_ids: Array) -> Array:
            heads_first = (x.swapaxes(1, 2) for x in (q, k, v))
            out: Any = jax.vmap(attend)(*heads_first, kernel.SegmentIds(own_ids, segment_ids))
            return out.swapaxes(1, 2)

        return run

    out = lax.switch(which, [with_window(window) for window in windows], q, k, v, own_ids, segment_ids)
    return jnp.where((own_ids != 0)[..., None, None], out, 0)[:, :U]


@dataclass(frozen=True)
class _Seen:
    """Whether a query sees a key of its segment, by their places in the row."""

    window: int | None

    def __call__(self, queries: Any, keys: Any) -> Any:
        seen = queries >= keys
        return seen if self.window is None else seen & (keys > queries - self.window)


def _kernel(share: Share, T: int, window: int | None, softcap: float | None, interpret: bool):
    """The kernel of one row and device, `[N U H] [K T H] [K T H] -> [N U H]`."""
    block_q, block_kv = math.gcd(share.chunk(T), BLOCK_Q), math.gcd(T, BLOCK_KV)
    compute = math.gcd(block_kv, 512)
    forward, backward = (t[share.index] for t in _tables(share.devices, T, window, block_q, block_kv))
    places: Any = share.places(T, 1)
    of_queries = mask_info.MaskInfo(forward[0], None, forward[1], None, places)
    of_keys = mask_info.MaskInfo(backward[0], None, backward[1], None, places)
    return kernel.SplashAttentionKernel(
        of_queries,
        of_queries,
        of_keys,
        block_sizes=kernel.BlockSizes(
            block_q=block_q,
            block_kv=block_kv,
            block_kv_compute=compute,
            block_q_dkv=block_q,
            block_kv_dkv=block_kv,
            block_kv_dkv_compute=compute,
            block_q_dq=block_q,
            block_kv_dq=block_kv,
        ),
        is_mqa=False,
        save_residuals=False,
        mask_value=kernel.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name="attn_out",
        mask_function=_Seen(window),
        interpret=interpret,
    )


def _tables(devices: int, T: int, window: int | None, block_q: int, block_kv: int) -> tuple[Array, Array]:
    """For every device, what the kernel visits: of each query block the key blocks, `[devices, 2, 1, Q, steps]`, and of
    each key block the query blocks, `[devices, 2, 1, steps, KV]`. Of the two the first is a block's number, the second
    1, or 0 for a step that does nothing."""
    keys = np.arange(T // block_kv) * block_kv
    forward, backward = [], []
    for index in range(devices):
        queries = _block_starts(devices, index, T, block_q)[:, None]
        seen = keys <= queries + block_q - 1
        if window is not None:
            seen &= keys + block_kv - 1 > queries - window
        forward.append(seen)
        backward.append(seen.T)
    rows, columns = _steps(forward), _steps(backward)
    return jnp.asarray(rows[:, :, None]), jnp.asarray(columns.swapaxes(2, 3)[:, :, None])


def _block_starts(devices: int, index: int, T: int, size: int) -> Int[np.ndarray, " Q"]:
    """Where a device's query blocks begin in the row."""
    chunk = Share(devices, index).chunk(T)
    held = (0,) if devices == 1 else (index, 2 * devices - 1 - index)
    return np.concatenate([np.arange(number * chunk, (number + 1) * chunk, size) for number in held])


def _steps(seen: Sequence[Bool[np.ndarray, "n m"]]) -> Int[np.ndarray, "devices 2 n steps"]:
    """Each row's true places, and a 1 for each; then, up to the most that a row of any device has, the last place again
    (nothing is fetched for it) and 0. In the smallest integers that hold them: they lie in scalar memory."""
    most = max(int(table.sum(1).max()) for table in seen)
    steps = np.zeros((len(seen), 2, len(seen[0]), most), np.int32)
    for device, table in enumerate(seen):
        for row, places in enumerate(map(np.flatnonzero, table)):
            if len(places):
                steps[device, 0, row] = np.pad(places, (0, most - len(places)), mode="edge")
                steps[device, 1, row, : len(places)] = 1
    small = next(dtype for dtype in (np.int8, np.int16, np.int32) if steps.max() <= np.iinfo(dtype).max)
    return steps.astype(small)
