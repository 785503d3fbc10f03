"""From logits to tokens: the last stop of every generated token, called inside the engine's compiled step.

A row's draw depends on its logits and on (seed, request, position) alone, never on what else is in the batch: that is
what makes a completion the same in any slot, order and company.

Truncation is that of `transformers`: the logits are divided by the temperature, then `top_k`, `top_p` and `min_p` cut
in this order. Tokens that tie with the last one kept are kept too.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, UInt32

from posttrain.errors import UserErrors
from posttrain.records import Leaf

MAX_KEY = 2**32
"""Seeds and request ids are below it: each is one word of the random key."""

BLOCK = 128
"""The vocabulary is searched in two stages: a block of so many tokens, then a token in it."""


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled. Raises `UserErrors` for values out of range."""

    max_new_tokens: int = 256
    """The longest completion, its stop token included."""
    temperature: float = 0.0
    """0 is greedy: always the most probable token."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest most probable tokens that hold this share of the probability; 1 keeps all."""
    min_p: float = 0.0
    """Keep the tokens that are at least this share as probable as the most probable one; 0 keeps all."""
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if self.max_new_tokens < 1:
            problems.append(f"max_new_tokens = {self.max_new_tokens}: must be at least 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            problems.append(f"temperature = {self.temperature}: must be 0 (greedy) or above")
        if not 0 <= self.top_k < 2**31:
            problems.append(f"top_k = {self.top_k}: must be 0 (keep all) or above")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p = {self.top_p}: must be above 0 and at most 1 (keep all)")
        if not 0 <= self.min_p <= 1:
            problems.append(f"min_p = {self.min_p}: must be from 0 (keep all) to 1")
        if not 0 <= self.seed < MAX_KEY:
            problems.append(f"seed = {self.seed}: must be from 0 to {MAX_KEY - 1}")
        if problems:
            raise UserErrors(problems)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowSampling:
    """The sampling parameters of `B` rows."""

    temperature: Leaf
    """f32 `[B]`, 0 = greedy."""
    top_k: Leaf
    """int32 `[B]`, 0 = all."""
    top_p: Leaf
    """f32 `[B]`."""
    min_p: Leaf
    """f32 `[B]`."""
    seed: Leaf
    """uint32 `[B]`."""
    request: Leaf
    """uint32 `[B]`: the request's id."""

    @classmethod
    def stack(cls, params: Sequence[SamplingParams], requests: Sequence[int]) -> "RowSampling":
        """As numpy arrays."""
        return cls(
            temperature=np.array([p.temperature for p in params], np.float32),
            top_k=np.array([p.top_k for p in params], np.int32),
            top_p=np.array([p.top_p for p in params], np.float32),
            min_p=np.array([p.min_p for p in params], np.float32),
            seed=np.array([p.seed for p in params], np.uint32),
            request=np.array(requests, np.uint32),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampled:
    """One token a row."""

    tokens: Leaf
    """int32 `[B]`."""
    logprobs: Leaf
    """f32 `[B]`: under the model's own distribution, untruncated and at temperature 1."""
    sampled_logprobs: Leaf
    """f32 `[B]`: under the tempered and truncated distribution that the token was drawn from; 0 where greedy."""


def sample(logits: Float[Array, "B V"], how: RowSampling, positions: Int[Array, "B"], *, vocab_size: int) -> Sampled:
    """The next token of every row.

    Columns from `vocab_size` on are padding and have probability 0. `positions` are those of the new tokens in their
    sequences. Work that no row asks for (drawing, top_k, top_p) is skipped at run time.
    """
    logits = jnp.where(jnp.arange(logits.shape[-1])[None] < vocab_size, logits.astype(jnp.float32), -jnp.inf)
    greedy = _argmax(logits)
    drawn, sampled_logprobs = jax.lax.cond(
        jnp.any(how.temperature > 0),
        lambda: _draw(logits, how, positions, greedy),
        lambda: (greedy, jnp.zeros(greedy.shape, jnp.float32)),
    )
    own = jnp.take_along_axis(logits, drawn[:, None], axis=-1)[:, 0]
    return Sampled(drawn, own - jax.nn.logsumexp(logits, axis=-1), sampled_logprobs)


def _draw(
    logits: Float32[Array, "B V"], how: RowSampling, positions: Int[Array, "B"], greedy: Int32[Array, "B"]
) -> tuple[Int32[Array, "B"], Float32[Array, "B"]]:
    """Tokens and their log-probs under what they were drawn from."""
    is_greedy = how.temperature == 0
    scaled = logits / jnp.where(is_greedy, 1.0, how.temperature)[:, None]
    scaled = scaled - jnp.max(scaled, axis=-1, keepdims=True)
    weights = jnp.where(kept(scaled, how), jnp.exp(scaled), 0.0)
    uniforms = jax.vmap(_uniforms)(how.seed, how.request, positions.astype(jnp.uint32))
    tokens = jnp.where(is_greedy, greedy, _inverse_cdf(weights, uniforms))
    logprobs = jnp.take_along_axis(scaled, tokens[:, None], axis=-1)[:, 0] - jnp.log(jnp.sum(weights, axis=-1))
    return tokens, jnp.where(is_greedy, 0.0, logprobs)


def kept(scaled: Float32[Array, "B V"], how: RowSampling) -> Bool[Array, "B V"]:
    """Which tokens truncation leaves, for logits that are tempered and have a row maximum of 0."""
    minimum = jnp.log(how.min_p)  # p >= min_p * p_max, as logits; -inf keeps all
    keys = _ordered_bits(scaled)

    def by_rank() -> UInt32[Array, "B"]:
        wanted = jnp.where(how.top_k > 0, how.top_k, scaled.shape[-1])
        return _highest_threshold(keys, lambda above: jnp.sum(above, axis=-1, dtype=jnp.int32) >= wanted)

    def by_mass(threshold: UInt32[Array, "B"]) -> UInt32[Array, "B"]:
        mass = jnp.where(keys >= threshold[:, None], jnp.exp(scaled), 0.0)
        wanted = how.top_p * jnp.sum(mass, axis=-1)
        found = _highest_threshold(keys, lambda above: jnp.sum(jnp.where(above, mass, 0.0), axis=-1) >= wanted)
        return jnp.maximum(threshold, jnp.where(how.top_p < 1, found, jnp.uint32(0)))

    nothing = jnp.zeros(scaled.shape[:1], jnp.uint32)
    threshold = jax.lax.cond(jnp.any(how.top_k > 0), by_rank, lambda: nothing)
    threshold = jax.lax.cond(jnp.any(how.top_p < 1), by_mass, lambda t: t, threshold)
    return (keys >= threshold[:, None]) & (scaled >= minimum[:, None])


def _ordered_bits(x: Float32[Array, "B V"]) -> UInt32[Array, "B V"]:
    """Unsigned integers in the order of the floats."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _highest_threshold(
    keys: UInt32[Array, "B V"], enough: Callable[[Bool[Array, "B V"]], Bool[Array, "B"]]
) -> UInt32[Array, "B"]:
    """The highest threshold at or above which there is enough of each row, found bit by bit: 32 passes over the row,
    several times cheaper than sorting it. `enough` must be monotone."""

    def next_bit(i: Int32[Array, ""], found: UInt32[Array, "B"]) -> UInt32[Array, "B"]:
        tried = found | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(enough(keys >= tried[:, None]), tried, found)

    return jax.lax.fori_loop(0, 32, next_bit, jnp.zeros(keys.shape[:1], jnp.uint32))


def _uniforms(seed: UInt32[Array, ""], request: UInt32[Array, ""], position: UInt32[Array, ""]) -> Float32[Array, "2"]:
    """Two numbers in [0, 1) that belong to this token alone."""
    key = jax.random.wrap_key_data(jnp.stack([jnp.zeros_like(seed), seed]), impl="threefry2x32")
    key = jax.random.fold_in(jax.random.fold_in(key, request), position)
    return jax.random.uniform(key, (2,), jnp.float32)


def _inverse_cdf(weights: Float32[Array, "B V"], uniforms: Float32[Array, "B 2"]) -> Int32[Array, "B"]:
    """Draws with probabilities proportional to `weights`: first a block, then a token in it.

    Two stages with a number each resolve probabilities of 2^-23 in every block; they also need no cumulative sum over
    the vocabulary, which is slow and inexact.
    """
    blocks = _blocks(weights, 0.0)
    block = _pick(jnp.sum(blocks, axis=-1), uniforms[:, 0])
    return block * BLOCK + _pick(_block(blocks, block), uniforms[:, 1])


def _pick(weights: Float32[Array, "B n"], uniform: Float32[Array, "B"]) -> Int32[Array, "B"]:
    """The first entry at which the running sum passes `uniform` of the total; never one of weight 0."""
    running = jnp.cumsum(weights, axis=-1)
    possible = weights > 0
    passed = possible & (running > uniform[:, None] * running[:, -1:])
    last = weights.shape[-1] - 1 - jnp.argmax(possible[:, ::-1], axis=-1)
    return jnp.where(jnp.any(passed, axis=-1), jnp.argmax(passed, axis=-1), last).astype(jnp.int32)


def _argmax(x: Float32[Array, "B V"]) -> Int32[Array, "B"]:
    """The first of the largest entries. XLA's own argmax over a whole vocabulary takes five times as long on a CPU."""
    blocks = _blocks(x, -jnp.inf)
    block = jnp.argmax(jnp.max(blocks, axis=-1), axis=-1).astype(jnp.int32)
    return block * BLOCK + jnp.argmax(_block(blocks, block), axis=-1).astype(jnp.int32)


def _blocks(x: Float32[Array, "B V"], padding: float) -> Float32[Array, "B blocks tokens"]:
    padded = jnp.pad(x, ((0, 0), (0, -x.shape[-1] % BLOCK)), constant_values=padding)
    return padded.reshape(x.shape[0], -1, BLOCK)


def _block(blocks: Float32[Array, "B blocks tokens"], index: Int32[Array, "B"]) -> Float32[Array, "B tokens"]:
    return jnp.take_along_axis(blocks, index[:, None, None], axis=1)[:, 0]
