"""Causal attention that never crosses segments, and attention against a key/value cache.

The decoder calls `attention` on packed rows, for training and scoring, and `cached_attention` while it generates.
Implementations of the former differ in cost only:

- `reference`: the formula. Time and memory grow with T^2.
- `chunked`: blocks of queries against blocks of keys with an online softmax (FlashAttention-2, arXiv:2307.08691) in
  plain JAX, for every backend. Memory grows with T. Blocks of the future, of other segments and beyond the window are
  skipped at run time, so a row of many short segments costs what its segments cost.
- `splash`: the same as a kernel for TPUs (`splash.py`). Blocks of the future and beyond the window are skipped.
- `triton`: the same as a kernel for GPUs (`gpu_attention.py`), without windows, soft-caps and split rows. Blocks of the
  future are skipped.

On a mesh each runs on every device's own rows, heads and queries, with the keys of the whole row (`context.py`).

Within a row a segment is one contiguous run of equal ids. Id 0 is padding: it attends to nothing, nothing attends to
it, and its output is zero. Scores, softmax and all accumulation are float32, whatever the inputs are.

With a `window` a token sees itself and the `window - 1` tokens before it (`sliding_window` of Hugging Face configs);
layers may differ in it (`Windows`). A `softcap` bounds scores smoothly before the softmax: `cap * tanh(score / cap)`
(Gemma 2).

For remat policies such as `jax.checkpoint_policies.save_only_these_names`, the values that the backward pass needs are
named: `attn_q`, `attn_k`, `attn_v` (the inputs), `attn_out` and, in `chunked`, `attn_lse` (log-sum-exp of each query's
scores). A policy that saves `attn_out` and `attn_lse` spares `chunked` its second forward pass; one that saves dot
products does not, because they are inside of a loop.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from posttrain.errors import UserError
from posttrain.models.context import Share, on_devices
from posttrain.models.layers import softcapped

# A score that no real one reaches; finite, so that a row in which every score is masked stays free of NaN.
MASKED = -1e30
# A window that no row is longer than.
NO_LIMIT = np.iinfo(np.int32).max

SPLASH_BLOCK = 128
"""Splash's blocks are multiples of it. Rows are padded to one, but for those that a mesh splits."""

Window = Int32[Array, ""]


@dataclass(frozen=True)
class Windows:
    """The windows that the layers of a model have, None being none, and which of them this layer has."""

    distinct: tuple[int | None, ...]
    which: Int32[Array, ""]

    def size(self) -> Window:
        """This layer's, as an array."""
        return jnp.asarray([NO_LIMIT if w is None else w for w in self.distinct], jnp.int32)[self.which]


@dataclass(frozen=True)
class Score:
    """How a product of a query and a key becomes a score."""

    scale: float
    softcap: float | None

    def __call__(self, products: Float32[Array, "..."]) -> Float32[Array, "..."]:
        return softcapped(products * self.scale, self.softcap)

    def slope(self, scores: Float32[Array, "..."]) -> Float32[Array, "..."] | float:
        """Derivative by `scale * product`, from the scores themselves: 1 - tanh^2."""
        return 1.0 if self.softcap is None else 1.0 - jnp.square(scores / self.softcap)


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    *,
    implementation: str,
    scale: float | None = None,
    softcap: float | None = None,
    window: Windows | int | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(scale * q k^T) v over the keys of the same segment, at or before the query and within its window.

    `q`, `k`, `v` and the result are as `context.balanced` orders tokens, `segment_ids` in the row's own order: the same
    unless a mesh splits the tokens. Query head n reads key/value head n // (N / K). `scale` is H^-0.5 unless given.
    The result has the dtype of `q`; at padding it is zero and passes zero gradient. Gradients across segments are
    exactly zero.

    Raises:
        UserError: `implementation` is not a key of `IMPLEMENTATIONS`.
    """
    if implementation not in IMPLEMENTATIONS:
        known = ", ".join(sorted(IMPLEMENTATIONS))
        raise UserError(f"model.attention: unknown implementation {implementation!r}; known are: {known}")
    q, k, v = checkpoint_name(q, "attn_q"), checkpoint_name(k, "attn_k"), checkpoint_name(v, "attn_v")
    score = Score(q.shape[-1] ** -0.5 if scale is None else scale, softcap)
    windows = window if isinstance(window, Windows) else Windows((window,), jnp.int32(0))

    def run(q: Array, k: Array, v: Array, segment_ids: Array, which: Array, share: Share) -> Array:
        return IMPLEMENTATIONS[implementation](q, k, v, segment_ids, share, Windows(windows.distinct, which), score)

    return on_devices(run, q, k, v, segment_ids, windows.which)


def cached_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(scale * q k^T) v over the cache slots that `mask` allows; zeros where it allows none."""
    T, K, group = q.shape[1], k.shape[2], q.shape[2] // k.shape[2]
    score = Score(q.shape[-1] ** -0.5 if scale is None else scale, softcap)
    scores = score(_dot("bkmh,bskh->bkms", _fold(q, K), k))
    seen = jnp.tile(mask, (1, group, 1))[:, None]
    scores = jnp.where(seen, scores, MASKED)
    p = jnp.where(seen, jnp.exp(scores - lax.stop_gradient(scores.max(-1, keepdims=True))), 0.0)
    total = p.sum(-1, keepdims=True)
    out = _dot("bkms,bskh->bkmh", p.astype(v.dtype), v) / jnp.where(total > 0, total, 1.0)
    return _unfold(out, T).astype(q.dtype)


def reference(
    q: Float[Array, "B U N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    share: Share,
    windows: Windows,
    score: Score,
) -> Float[Array, "B U N H"]:
    """The formula over the whole [U, T] mask."""
    T = k.shape[1]
    places = share.places(T, 1)
    distance = places[:, None] - jnp.arange(T, dtype=jnp.int32)[None, :]
    own_ids = segment_ids[:, places]
    same = (own_ids[:, :, None] == segment_ids[:, None, :]) & (own_ids != 0)[:, :, None]
    mask = same & ((distance >= 0) & (distance < windows.size()))[None]
    mixed = cached_attention(q, k, v, mask, scale=score.scale, softcap=score.softcap)
    return checkpoint_name(mixed, "attn_out")


_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _fold(x: Float[Array, "B T N H"], K: int) -> Float[Array, "B K M H"]:
    """Query heads that share a key/value head as the rows of one matrix, M = N / K * T: no key is ever repeated."""
    B, T, N, H = x.shape
    return x.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, N // K * T, H)


def _unfold(x: Float[Array, "B K M H"], T: int) -> Float[Array, "B T N H"]:
    B, K, M, H = x.shape
    return x.reshape(B, K, M // T, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, K * M // T, H)


# --- chunked ---------------------------------------------------------------------------------------------------------
# A row of T tokens is cut into blocks of `block`, of which Q have queries here, U = Q * block in all; a block's folded
# queries have M = N / K * block rows.

# Tokens a block, and how many key blocks a tile may span. Smaller blocks waste less on the diagonal and at segment
# boundaries, larger tiles bring the matrix products nearer to peak.
BLOCK = 128
TILE_WIDTHS = (4, 3, 2, 1)


def chunked(
    q: Float[Array, "B U N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    share: Share,
    windows: Windows,
    score: Score,
) -> Float[Array, "B U N H"]:
    """Blockwise attention in memory linear in T; see the top of this file."""
    U, T = q.shape[1], k.shape[1]
    chunk = share.chunk(T)
    block = min(BLOCK, chunk)
    if share.devices > 1:
        block = next(size for size in range(block, 0, -1) if chunk % size == 0)
    elif padding := -T % block:
        q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q, k, v))
        segment_ids = jnp.pad(segment_ids, ((0, 0), (0, padding)))
    blocks = share.places(k.shape[1], block)
    return _blockwise(q, k, v, segment_ids, blocks, windows.size(), score, block)[:, :U]


class _Plan(NamedTuple):
    """What each query block attends to. The leading dim Q is scanned over."""

    number: Int[Array, " Q"]
    """Which block of `q` it is."""
    index: Int[Array, " Q"]
    """Which block of the row."""
    count: Int[Array, " Q"]
    """Key blocks that some row needs, the diagonal one last."""
    first: Int[Array, "Q B M"]
    """First key that the query sees; T, thus none, at padding."""
    last: Int[Array, "Q M"]
    """Last key that the query sees: itself."""


def _plan(segment_ids: Int[Array, "B T"], blocks: Int[Array, " Q"], window: Window, block: int, group: int) -> _Plan:
    B, T = segment_ids.shape
    token = jnp.arange(T, dtype=jnp.int32)
    starts = jnp.concatenate([jnp.ones((B, 1), bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)
    first = lax.cummax(jnp.where(starts, token[None], 0), axis=1)
    first = jnp.maximum(first, token[None] - window + 1)
    first = jnp.where(segment_ids == 0, T, first).reshape(B, T // block, block).swapaxes(0, 1)[blocks]
    count = jnp.maximum(blocks + 1 - first.min((1, 2)) // block, 0)
    last = token.reshape(T // block, block)[blocks]
    numbers = jnp.arange(len(blocks), dtype=jnp.int32)
    return _Plan(numbers, blocks, count, jnp.tile(first, (1, 1, group)), jnp.tile(last, (1, group)))


def _over_tiles(plan: _Plan, tiles_in_row: int, body: Callable, carry):
    """Folds `body(start block, width in blocks, carry)` over the key blocks of one query block.

    Downwards from the diagonal, so that every real query meets itself, an unmasked score, in the first tile.
    """
    # A tile as wide as the row would not depend on the loop's index: XLA would move its products out of the loop, where
    # nothing skips them.
    widths = [w for w in TILE_WIDTHS if w < tiles_in_row] or [1]
    end, left = plan.index + 1, plan.count
    for width in widths:
        tiles = left // width

        def step(i, carry, end=end, width=width):
            return body(end - (i + 1) * width, width, carry)

        carry = lax.fori_loop(0, tiles, step, carry)
        end, left = end - tiles * width, left - tiles * width
    return carry


def _slice(x: Array, start: Int[Array, ""], size: int, axis: int) -> Array:
    return lax.dynamic_slice_in_dim(x, start * size, size, axis)


def _blockwise_output(q, k, v, segment_ids, blocks, window, score: Score, block: int) -> Array:
    return _blockwise_forward(q, k, v, segment_ids, blocks, window, score, block)[0]


def _blockwise_forward(q, k, v, segment_ids, blocks, window, score: Score, block: int):
    B, U, N, H = q.shape
    T, K, M = *k.shape[1:3], N // k.shape[2] * block
    keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)

    def query_block(carry, plan: _Plan):
        out, lse = carry
        qi = _fold(_slice(q, plan.number, block, 1), K)

        def tile(start, width: int, carry):
            acc, top, total = carry
            size = width * block
            kj = lax.dynamic_slice_in_dim(keys, start * block, size, 2)
            vj = lax.dynamic_slice_in_dim(values, start * block, size, 2)
            key = start * block + jnp.arange(size, dtype=jnp.int32)
            seen = (key[None, None] >= plan.first[:, :, None]) & (key[None] <= plan.last[:, None])[None]
            scores = jnp.where(seen[:, None], score(_dot("bkmh,bknh->bkmn", qi, kj)), MASKED)
            new_top = jnp.maximum(top, scores.max(-1))
            p = jnp.exp(scores - new_top[..., None])
            keep = jnp.exp(top - new_top)
            acc = acc * keep[..., None] + _dot("bkmn,bknh->bkmh", p.astype(v.dtype), vj)
            return acc, new_top, total * keep + p.sum(-1)

        zero = jnp.zeros((B, K, M), jnp.float32)
        start = (jnp.zeros((B, K, M, H), jnp.float32), zero + MASKED, zero)
        acc, top, total = _over_tiles(plan, T // block, tile, start)
        real = (plan.first < T)[:, None]
        total = jnp.where(real, total, 1.0)
        oi = _unfold(jnp.where(real[..., None], acc / total[..., None], 0.0).astype(q.dtype), block)
        li = jnp.where(real, top + jnp.log(total), 0.0).reshape(B, N, block)
        update = lax.dynamic_update_slice_in_dim
        return (update(out, oi, plan.number * block, 1), update(lse, li, plan.number * block, 2)), None

    start = (jnp.zeros_like(q), jnp.zeros((B, N, U), jnp.float32))
    (out, lse), _ = lax.scan(query_block, start, _plan(segment_ids, blocks, window, block, N // K))
    out, lse = checkpoint_name(out, "attn_out"), checkpoint_name(lse, "attn_lse")
    return out, (q, k, v, segment_ids, blocks, window, out, lse)


def _blockwise_backward(score: Score, block: int, residuals, dout):
    """FlashAttention-2's backward pass.

    Scores are formed with keys as rows: then the products for dk, dv and (with the keys transposed) dq all read them as
    they lie in memory, without which matrix products on CPU take twice the time.
    """
    q, k, v, segment_ids, blocks, window, out, lse = residuals
    B, N, H = q.shape[0], *q.shape[2:]
    T, K, M = *k.shape[1:3], N // k.shape[2] * block
    keys, values, keys_transposed = k.swapaxes(1, 2), v.swapaxes(1, 2), k.transpose(0, 2, 3, 1)

    def query_block(carry, plan: _Plan):
        dq, dk, dv = carry
        qi, oi, doi = (_fold(_slice(x, plan.number, block, 1), K) for x in (q, out, dout))
        li = _slice(lse, plan.number, block, 2).reshape(B, K, M)
        delta = _dot("bkmh,bkmh->bkm", doi, oi)

        def tile(start, width: int, carry):
            dqi, dk, dv = carry
            at, size = start * block, width * block
            kj, vj = (lax.dynamic_slice_in_dim(x, at, size, 2) for x in (keys, values))
            key = at + jnp.arange(size, dtype=jnp.int32)
            seen = (key[None, :, None] >= plan.first[:, None]) & (key[:, None] <= plan.last[None])[None]
            scores = score(_dot("bknh,bkmh->bknm", kj, qi))
            p = jnp.exp(jnp.where(seen[:, None], scores - li[:, :, None], MASKED))
            dp = _dot("bknh,bkmh->bknm", vj, doi)
            ds = (p * (dp - delta[:, :, None]) * score.slope(scores)).astype(q.dtype)
            dvj = _dot("bknm,bkmh->bknh", p.astype(q.dtype), doi)
            dkj = _dot("bknm,bkmh->bknh", ds, qi)
            kj_transposed = lax.dynamic_slice_in_dim(keys_transposed, at, size, 3)
            dqi = dqi + _dot("bkhn,bknm->bkhm", kj_transposed, ds)
            return dqi, _add_slice(dk, dkj, at), _add_slice(dv, dvj, at)

        dqi, dk, dv = _over_tiles(plan, T // block, tile, (jnp.zeros((B, K, H, M), jnp.float32), dk, dv))
        dqi = _unfold(dqi.swapaxes(2, 3) * score.scale, block).astype(q.dtype)
        return (lax.dynamic_update_slice_in_dim(dq, dqi, plan.number * block, 1), dk, dv), None

    zero = jnp.zeros((B, K, T, H), jnp.float32)
    plan = _plan(segment_ids, blocks, window, block, N // K)
    (dq, dk, dv), _ = lax.scan(query_block, (jnp.zeros_like(q), zero, zero), plan)
    return dq, (dk * score.scale).swapaxes(1, 2).astype(k.dtype), dv.swapaxes(1, 2).astype(v.dtype), None, None, None


def _add_slice(x: Float32[Array, "B K T H"], part: Float32[Array, "B K n H"], at) -> Float32[Array, "B K T H"]:
    old = lax.dynamic_slice_in_dim(x, at, part.shape[2], 2)
    return lax.dynamic_update_slice_in_dim(x, old + part, at, 2)


_blockwise = jax.custom_vjp(_blockwise_output, nondiff_argnums=(6, 7))
_blockwise.defvjp(_blockwise_forward, _blockwise_backward)


def splash(
    q: Float[Array, "B U N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    share: Share,
    windows: Windows,
    score: Score,
) -> Float[Array, "B U N H"]:
    """JAX's kernel for TPUs."""
    from posttrain.models.splash import splash_attention  # Pallas is slow to import

    scoring = {"scale": score.scale, "softcap": score.softcap}
    return splash_attention(q, k, v, segment_ids, share, windows.distinct, windows.which, **scoring)


def triton(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    share: Share,
    windows: Windows,
    score: Score,
) -> Float[Array, "B T N H"]:
    """JAX's kernel for GPUs."""
    from posttrain.models.gpu_attention import triton_attention  # Pallas is slow to import

    assert share.devices == 1 and windows.distinct == (None,) and score.softcap is None, "see attention_choice.py"
    return triton_attention(q, k, v, segment_ids, scale=score.scale)


IMPLEMENTATIONS: dict[str, Callable[..., Float[Array, "B U N H"]]] = {
    "reference": reference,
    "chunked": chunked,
    "splash": splash,
    "triton": triton,
}
