"""What the model says about each token, in one pass over the vocabulary: log-probability, entropy, hit, mean logit.

Every objective that needs a token's probability calls `token_stats` on the decoder's final hidden states. Full logits
never exist: the output embedding is taken in chunks of its rows, all tokens at a time, with an online log-sum-exp; the
backward pass computes each chunk of logits again from the saved log-sum-exp. Chunks of the vocabulary, rather than of
tokens, let every row of the head's gradient be summed over devices once. The head is gathered once, for both passes.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int

from posttrain.models.contract import gather, weight_gradient
from posttrain.models.layers import softcapped
from posttrain.parallel.sharding import MESH_AXES, constrain
from posttrain.records import Batch, Model

# Logit of the head's padding rows. Finite, so that 0 * MASKED is 0 in the entropy and its gradient.
MASKED = -1e30
# Rows shorter than this are computed whole: the branches of `_over_needed` cost compile time.
MIN_CUT = 256
HEAD = ("vocab", "embed")
"""Names of its dims."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenStats:
    """Per token, in float32. Entry t speaks of predicting `tokens[:, t]` from the tokens before it in its segment."""

    logps: Float[Array, "B T"]
    """Log-probability of the token, in nats."""
    entropy: Float[Array, "B T"]
    """Entropy of the predicted distribution, in nats."""
    correct: Float[Array, "B T"]
    """1 where the token has the highest logit (of equal ones, the lowest id), else 0. Has no gradient."""
    mean_logit: Float[Array, "B T"]
    """Mean logit over the vocabulary."""


@dataclass(frozen=True)
class _Chunks:
    """How the head is read: chunk i holds its rows i, i + count, i + 2 count, ...

    Strided, so that a head whose rows are split over devices gives each of them an equal part of every chunk.
    """

    vocab_size: int
    count: int
    inverse_temperature: float
    softcap: float | None

    def split(self, head: Float[Array, "V D"]) -> Float[Array, "C count D"]:
        return head.reshape(-1, self.count, head.shape[1])

    def read(
        self, table: Float[Array, "C count D"], i: Int[Array, ""], hidden: Float[Array, "B W D"]
    ) -> tuple[Int[Array, "1 1 C"], Float[Array, "C D"], Float32[Array, "B W C"]]:
        """Token ids, rows and logits of chunk i."""
        ids = jnp.arange(table.shape[0], dtype=jnp.int32)[None, None] * self.count + i
        rows = lax.dynamic_index_in_dim(table, i, 1, keepdims=False)
        logits = softcapped(_dot("btd,cd->btc", hidden, rows), self.softcap) * self.inverse_temperature
        if table.shape[0] * self.count > self.vocab_size:
            logits = jnp.where(ids < self.vocab_size, logits, MASKED)
        return ids, rows, logits

    def slope(self, logits: Float32[Array, "B W C"]) -> Float32[Array, "B W C"] | float:
        """Derivative of the logits by the products they are made of, where they are not masked."""
        if self.softcap is None:
            return self.inverse_temperature
        bound = self.softcap * self.inverse_temperature
        return jnp.where(logits > MASKED, self.inverse_temperature * (1.0 - jnp.square(logits / bound)), 0.0)


def token_stats(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    *,
    vocab_size: int,
    needed: Bool[Array, "B T"] | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk_vocab: int = 4096,
) -> TokenStats:
    """Statistics of `softmax(softcap(hidden head^T) / temperature)` at the position before each token.

    Entries are 0 at a segment's first token, at padding (segment 0) and where `needed` is false, and no gradient comes
    from there. Head rows from `vocab_size` on are padding of the table: probability 0, no part in the mean. `hidden`
    and `head` share a dtype; logits and everything after them are float32. Differentiable in `hidden` and `head`,
    once, in reverse mode. The head's gradient sums over the tokens in float32.

    Peak memory is that of a few `[B, T, chunk_vocab]` arrays, `chunk_vocab` being the head's rows per chunk and device,
    rounded to V / 2^i. On CPU each row is cut to the quarters that its needed tokens fill, so the time follows them.
    """
    if needed is None:
        needed = jnp.ones(tokens.shape, bool)
    predicts = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] != 0) & needed[:, 1:]
    predicts = jnp.pad(predicts, ((0, 0), (0, 1)))
    chunks = _Chunks(vocab_size, _chunk_count(head.shape[0], chunk_vocab), 1.0 / temperature, softcap)
    sources = _stats(hidden, head, jnp.roll(tokens, -1, axis=1), predicts, chunks)

    def at_target(values: Float32[Array, "B T"]) -> Float32[Array, "B T"]:
        return jnp.pad(jnp.where(predicts, values, 0.0)[:, :-1], ((0, 0), (1, 0)))

    return jax.tree.map(at_target, sources)


def batch_stats(model: Model, batch: Batch, *, needed: Bool[Array, "B T"] | None = None) -> TokenStats:
    """`token_stats` of what the model says about packed rows."""
    tokens, segment_ids = jnp.asarray(batch.tokens), jnp.asarray(batch.segment_ids)
    hidden, head = model.hidden(batch), model.head()
    return token_stats(
        hidden,
        head,
        tokens,
        segment_ids,
        vocab_size=model.vocab_size,
        needed=needed,
        softcap=model.logit_softcap,
    )


def _chunk_count(V: int, chunk_vocab: int) -> int:
    """A power of two. The rows of a chunk stay a multiple of 8, for a mesh axis to split.

    Chunks are larger on a mesh that splits the vocabulary: the gradient of `hidden` is summed over its devices once a
    chunk.
    """
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else math.prod(mesh.shape.get(axis, 1) for axis in MESH_AXES["vocab"])
    count = 1
    while V // count > chunk_vocab * shards and V % (16 * count) == 0:
        count *= 2
    return count


_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _stats(hidden, head, targets, needed, chunks: _Chunks) -> TokenStats:
    """Statistics at every needed source position, of its target; what stands elsewhere is finite, and means nothing."""
    return _stats_forward(hidden, head, targets, needed, chunks)[0]


def _stats_forward(hidden, head, targets, needed, chunks: _Chunks):
    head = gather(head, HEAD)
    run = functools.partial(_forward, chunks)
    (logps, entropy, correct, mean_logit, lse), _ = _over_needed(run, needed, (hidden, targets), head)
    if chunks.softcap is None:
        # The mean logit is the logit of the mean row, so it takes no pass over the logits.
        real = (jnp.arange(head.shape[0]) < chunks.vocab_size).astype(head.dtype)
        mean_row = _dot("v,vd->d", real, head) * (chunks.inverse_temperature / chunks.vocab_size)
        mean_logit = _dot("btd,d->bt", hidden.astype(jnp.float32), mean_row)
    return TokenStats(logps, entropy, correct, mean_logit), (hidden, head, targets, needed, entropy, lse)


def _stats_backward(chunks: _Chunks, residuals, cotangents: TokenStats):
    hidden, head, targets, needed, entropy, lse = residuals
    per_token = (hidden, targets, entropy, lse, cotangents.logps, cotangents.entropy, cotangents.mean_logit)
    (dhidden,), dhead = _over_needed(functools.partial(_backward, chunks), needed, per_token, head)
    return dhidden, dhead, None, None


_stats.defvjp(_stats_forward, _stats_backward)


def _forward(chunks: _Chunks, per_token, head):
    """Log-probability, entropy, hit, mean logit (0 without a soft-cap) and log-sum-exp of tokens `[B, W]`."""
    hidden, targets = per_token
    table = chunks.split(head)

    def chunk(i, carry):
        top, total, weighted, best, target_logit, summed = carry
        ids, _, logits = chunks.read(table, i, hidden)
        chunk_top, place = _highest(logits)
        chunk_best = place * chunks.count + i
        tied = jnp.where(chunk_top == top, jnp.minimum(best, chunk_best), best)
        best = jnp.where(chunk_top > top, chunk_best, tied)
        new_top = jnp.maximum(top, chunk_top)
        p = jnp.exp(logits - new_top[..., None])
        keep = jnp.exp(top - new_top)
        total = total * keep + p.sum(-1)
        # As a dot product: a fused multiply-and-sum is seven times slower in XLA:CPU.
        weighted = weighted * keep + _dot("btc,btc->bt", p, logits)
        here = jnp.take_along_axis(logits, (targets // chunks.count)[..., None], axis=-1)[..., 0]
        target_logit = jnp.where(targets % chunks.count == i, here, target_logit)
        if chunks.softcap is not None:
            summed = summed + _dot("btc,c->bt", logits, (ids[0, 0] < chunks.vocab_size).astype(jnp.float32))
        return new_top, total, weighted, best, target_logit, summed

    zero = jnp.zeros(targets.shape, jnp.float32)
    start = (zero + MASKED, zero, zero, jnp.zeros(targets.shape, jnp.int32), zero, zero)
    top, total, weighted, best, target_logit, summed = lax.fori_loop(0, chunks.count, chunk, start)
    lse = top + jnp.log(total)
    entropy = jnp.maximum(lse - weighted / total, 0.0)  # rounding may leave a certain prediction slightly below
    correct = (best == targets).astype(jnp.float32)
    # Not target_logit - lse: large logits leave lse few digits behind the point.
    logps = (target_logit - top) - jnp.log(total)
    return (logps, entropy, correct, summed / chunks.vocab_size, lse), None


def _highest(logits: Float32[Array, "B W C"]) -> tuple[Float32[Array, "B W"], Int[Array, "B W"]]:
    """The highest logit and its first place."""

    def at_once(logits: Array) -> tuple[Array, Array]:
        return logits.max(-1), jnp.argmax(logits, -1).astype(jnp.int32)

    def in_best_eighth(logits: Array) -> tuple[Array, Array]:
        *tokens, C = logits.shape
        parts = math.gcd(C, 8)
        grouped = logits.reshape(*tokens, parts, C // parts)
        tops = grouped.max(-1)
        top, part = tops.max(-1), jnp.argmax(tops, -1).astype(jnp.int32)
        members = jnp.take_along_axis(grouped, part[..., None, None], axis=-2)[..., 0, :]
        index = jnp.arange(C // parts, dtype=jnp.int32)
        return top, part * (C // parts) + jnp.where(members == top[..., None], index[None, None], C).min(-1)

    # On CPU the search for the place takes ten times as long as the maximum.
    return lax.platform_dependent(logits, cpu=in_best_eighth, default=at_once)


def _backward(chunks: _Chunks, per_token, head):
    """Gradients of `hidden` (of tokens `[B, W]`) and `head`.

    With p the softmax and H the entropy: d logp = onehot - p, d entropy = -p (log p + H), d mean = 1 / vocab_size, all
    by the logits, whose own derivative is `_Chunks.slope`.
    """
    hidden, targets, entropy, lse, d_logp, d_entropy, d_mean = per_token
    table = chunks.split(head)

    def chunk(i, carry):
        dhidden, dtable = carry
        ids, vectors, logits = chunks.read(table, i, hidden)
        logp = logits - lse[..., None]
        dlogits = -jnp.exp(logp) * (d_logp[..., None] + d_entropy[..., None] * (logp + entropy[..., None]))
        dlogits += jnp.where(ids == targets[..., None], d_logp[..., None], 0.0)
        dlogits += jnp.where(ids < chunks.vocab_size, d_mean[..., None] / chunks.vocab_size, 0.0)
        dlogits = (dlogits * chunks.slope(logits)).astype(head.dtype)
        dtable = lax.dynamic_update_index_in_dim(dtable, weight_gradient(dlogits, hidden, HEAD), i, 1)
        return dhidden + _dot("btc,cd->btd", dlogits, vectors), dtable

    start = (jnp.zeros(hidden.shape, jnp.float32), constrain(jnp.zeros_like(table), "vocab", None, "embed"))
    dhidden, dtable = lax.fori_loop(0, chunks.count, chunk, start)
    return (dhidden.astype(hidden.dtype),), dtable.reshape(head.shape)


def _over_needed(run: Callable, needed: Bool[Array, "B T"], per_token: tuple, head: Float[Array, "V D"]) -> tuple:
    """`run(per_token [B, W, ...], head) -> (results per token [B, W, ...], of the head)`, over the needed tokens.

    On CPU each row's needed tokens are moved to its front, and only as many quarters of the rows are computed as the
    fullest row fills. Elsewhere all tokens are: among many rows one is nearly full, and branches hinder the compiler.
    """
    T = needed.shape[1]
    sizes = [T] if T < MIN_CUT else [-(-T * i // 4) for i in range(1, 5)]

    def whole(needed, per_token, head):
        return run(per_token, head)

    def front(needed, per_token, head):
        order = jnp.argsort(~needed, axis=1, stable=True)

        def branch(size: int):
            def cut(order, per_token, head):
                results, of_head = run(jax.tree.map(lambda x: _take(x, order[:, :size]), per_token), head)
                return jax.tree.map(lambda x: _pad(x, T), results), of_head

            return cut

        fullest = needed.sum(1, dtype=jnp.int32).max()
        quarter = jnp.searchsorted(jnp.array(sizes, jnp.int32), fullest)
        results, of_head = lax.switch(quarter, [branch(size) for size in sizes], order, per_token, head)
        back = jnp.argsort(order, axis=1)
        return jax.tree.map(lambda x: _take(x, back), results), of_head

    on_cpu = front if len(sizes) > 1 else whole
    return lax.platform_dependent(needed, per_token, head, cpu=on_cpu, default=whole)


def _take(x: Array, order: Int[Array, "B U"]) -> Array:
    return jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1)


def _pad(x: Array, T: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, T - x.shape[1]), *((0, 0),) * (x.ndim - 2)))
