"""The only transformer: a decoder described by a `DecoderConfig`, its layers stacked and scanned.

Families (`llama.py` ...) translate Hugging Face configs into a `DecoderConfig`; nothing here knows their names.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from posttrain.models.attention import attention, cached_attention
from posttrain.models.layers import (
    Embedding,
    GatedMLP,
    Head,
    Linear,
    RMSNorm,
    RopeConfig,
    ScoreHead,
    apply_rope,
    rope_angles,
)
from posttrain.parallel.sharding import constrain, flatten, unflatten
from posttrain.records import Batch, Leaf, Params

VOCAB_MULTIPLE = 128
"""The vocabulary is padded to it in memory, so that every usual tensor axis divides it."""

Remat = Literal["none", "minimal", "dots", "full"]


@dataclass(frozen=True)
class DecoderConfig:
    """Architecture, with the names that Hugging Face configs use."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = field(default_factory=RopeConfig)
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    hidden_act: str = "silu"
    num_labels: int = 0
    """0: a language model. 1: a reward model, which has a score (`score_head`) and no vocabulary projection."""

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


@dataclass(frozen=True)
class ComputeOptions:
    """How a decoder is run: nothing here changes what it computes but for rounding."""

    attention: str = "chunked"
    remat: Remat = "none"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers for `B` slots of `S` positions each."""

    k: Leaf
    """`[L, B, S, K, H]`"""
    v: Leaf


def init_cache(config: DecoderConfig, slots: int, length: int, dtype: DTypeLike) -> KVCache:
    """An empty cache."""
    shape = (config.num_hidden_layers, slots, length, config.num_key_value_heads, config.head_dim)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al. 2023)."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        c, bias = config, config.attention_bias
        embed = {"embed": c.hidden_size}
        queries = {"heads": c.num_attention_heads, "head_size": c.head_dim}
        keys = {"kv_heads": c.num_key_value_heads, "head_size": c.head_dim}
        self.q = Linear(embed, queries, bias=bias, rngs=rngs, dtype=dtype)
        self.k = Linear(embed, keys, bias=bias, rngs=rngs, dtype=dtype)
        self.v = Linear(embed, keys, bias=bias, rngs=rngs, dtype=dtype)
        self.o = Linear(queries, embed, bias=bias, rngs=rngs, dtype=dtype)

    def project(
        self, x: Float[Array, "B T D"], cos: Float[Array, "B T half"], sin: Float[Array, "B T half"]
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Queries and keys with rotary positions, values."""
        return apply_rope(self.q(x), cos, sin), apply_rope(self.k(x), cos, sin), self.v(x)


class Block(nnx.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        c = config
        self.attn_norm = RMSNorm(c.hidden_size, c.rms_norm_eps, rngs=rngs, dtype=dtype)
        self.attn = Attention(c, rngs=rngs, dtype=dtype)
        self.mlp_norm = RMSNorm(c.hidden_size, c.rms_norm_eps, rngs=rngs, dtype=dtype)
        self.mlp = GatedMLP(c.hidden_size, c.intermediate_size, c.hidden_act, bias=c.mlp_bias, rngs=rngs, dtype=dtype)

    def finish(self, x: Float[Array, "B T D"], mixed: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        """Everything after the attention itself."""
        x = x + self.attn.o(mixed)
        return constrain(x + self.mlp(self.mlp_norm(x)), "rows", "tokens", "width")


class Decoder(nnx.Module):
    """Tokens in, final hidden states out. The vocabulary projection belongs to whoever reads them (`head`)."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        options: ComputeOptions | None = None,
    ):
        c = config
        self.config = config
        self.options = options or ComputeOptions()
        self.embed = Embedding(c.padded_vocab_size, c.hidden_size, rngs=rngs, dtype=dtype)

        @nnx.split_rngs(splits=c.num_hidden_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(c, rngs=rngs, dtype=dtype)

        self.layers = stack(rngs)
        self.final_norm = RMSNorm(c.hidden_size, c.rms_norm_eps, rngs=rngs, dtype=dtype)
        untied = not (c.tie_word_embeddings or c.num_labels)
        self.lm_head = Head(c.padded_vocab_size, c.hidden_size, rngs=rngs, dtype=dtype) if untied else None
        self.score = ScoreHead(c.num_labels, c.hidden_size, rngs=rngs, dtype=dtype) if c.num_labels else None

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def head(self) -> Float[Array, "V D"]:
        """The output embedding; rows beyond `vocab_size` are padding. Raises `ValueError` for a reward model."""
        if self.score is not None:
            raise ValueError("a reward model has no vocabulary projection")
        return self.embed.embedding[...] if self.lm_head is None else self.lm_head.kernel[...]

    def score_head(self) -> Float[Array, "1 D"]:
        """What hidden states are scored with. Raises `ValueError` for a language model."""
        if self.score is None:
            raise ValueError("a language model has no score head")
        return self.score.kernel[...]

    def _angles(
        self, positions: Int[Array, "B T"], lengths: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
        c = self.config
        return rope_angles(c.rope, c.head_dim, c.max_position_embeddings, positions, lengths)

    def hidden(self, batch: Batch) -> Float[Array, "B T D"]:
        """Final hidden states of packed rows `[B, T]`; attention is causal and never crosses segments."""
        segment_ids, positions = jnp.asarray(batch.segment_ids), jnp.asarray(batch.positions)
        lengths = _segment_lengths(segment_ids, positions) if self.config.rope.scaling == "dynamic" else positions
        cos, sin = self._angles(positions, lengths)
        x = constrain(self.embed(jnp.asarray(batch.tokens)), "rows", "tokens", "width")
        graph, state = nnx.split(self.layers)

        def layer(x: Array, state: Any) -> tuple[Array, None]:
            block = nnx.merge(graph, state)
            q, k, v = block.attn.project(block.attn_norm(x), cos, sin)
            q, k, v = (checkpoint_name(a, "qkv") for a in (q, k, v))
            mixed = attention(q, k, v, segment_ids, implementation=self.options.attention)
            return block.finish(x, mixed), None

        x, _ = jax.lax.scan(_remat(layer, self.options.remat), x, state)
        return self.final_norm(x)

    def extend(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        slots: Int[Array, "B"] | None,
        cache: KVCache,
        *,
        window: int | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Appends tokens to cache slots and returns their final hidden states `[B, T, D]`.

        Token t of row b is written at `positions[b, t]` of slot `slots[b]` (None: row b is slot b, for all slots) and
        sees the slot up to that position. Only the first `window` positions are read (default: all); they must cover
        every token's own. Positions past the end of a prompt may hold padding: it is overwritten before anything sees
        it. What lies outside the cache, slots or positions, is not written.
        """
        cos, sin = self._angles(positions, positions + 1)
        x = self.embed(tokens)
        window = cache.k.shape[2] if window is None else window
        mask: Bool[Array, "B T S"] = jnp.arange(window)[None, None] <= positions[..., None]
        rows = jnp.arange(cache.k.shape[1]) if slots is None else slots
        graph, state = nnx.split(self.layers)

        def read(stack: Array, index: Array) -> Array:
            if slots is None:
                start = (index, 0, 0, 0, 0)
                return jax.lax.dynamic_slice(stack, start, (1, stack.shape[1], window, *stack.shape[3:]))[0]
            return stack.at[index, slots, :window].get(mode="clip")

        def layer(carry: tuple[Array, Array, Array], inputs: tuple[Any, Array]) -> tuple[Any, None]:
            x, k_cache, v_cache = carry
            state, index = inputs
            block = nnx.merge(graph, state)
            q, k, v = block.attn.project(block.attn_norm(x), cos, sin)
            where = (index, rows[:, None], positions)
            k_cache = k_cache.at[where].set(k.astype(k_cache.dtype), mode="drop")
            v_cache = v_cache.at[where].set(v.astype(v_cache.dtype), mode="drop")
            mixed = cached_attention(q, read(k_cache, index), read(v_cache, index), mask)
            return (block.finish(x, mixed), k_cache, v_cache), None

        layers = jnp.arange(self.config.num_hidden_layers)
        (x, k, v), _ = jax.lax.scan(layer, (x, cache.k, cache.v), (state, layers))
        return self.final_norm(x), KVCache(k, v)


def _segment_lengths(segment_ids: Int[Array, "B T"], positions: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Length of each token's segment: its last position, carried back from the segment's end, plus 1."""

    def last(carry: Array, step: tuple[Array, Array]) -> tuple[Array, Array]:
        segment, position = step
        previous_segment, previous_last = carry
        end = jnp.where(segment == previous_segment, previous_last, position)
        return jnp.stack([segment, end]), end

    start = jnp.stack([jnp.full_like(segment_ids[:, 0], -1), jnp.zeros_like(positions[:, 0])])
    _, ends = jax.lax.scan(last, start, (segment_ids.T, positions.T), reverse=True)
    return ends.T + 1


def _remat(layer: Any, remat: Remat) -> Any:
    """What the backward pass recomputes, by name."""
    policies = jax.checkpoint_policies
    kept = policies.save_only_these_names("attn_out", "attn_lse")
    if remat == "none":
        return layer
    policy = {
        "minimal": policies.save_from_both_policies(policies.dots_saveable, kept),
        "dots": policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, kept),
        "full": policies.nothing_saveable,
    }[remat]
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)


@dataclass(frozen=True)
class AbstractDecoder:
    """A decoder without its arrays: what to merge parameters into, and what they look like."""

    graph: Any
    shapes: Params
    """Nested dict of `ShapeDtypeStruct`."""
    axes: dict[str, tuple[str, ...]]
    """Logical dim names by path, the stacked `layers` dim included."""
    options: ComputeOptions

    def merge(self, params: Params) -> Decoder:
        """The decoder with these parameters."""
        return nnx.merge(self.graph, params)


def abstract_decoder(
    config: DecoderConfig, *, dtype: DTypeLike = jnp.float32, options: ComputeOptions | None = None
) -> AbstractDecoder:
    """The decoder's structure; no array is made."""
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=dtype, options=options))
    graph, state = nnx.split(model)
    variables = {"/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
    shapes = {path: v.get_value() for path, v in variables.items()}
    axes = {
        path: ("layers", *v.get_metadata("axes")) if path.startswith("layers/") else v.get_metadata("axes")
        for path, v in variables.items()
    }
    return AbstractDecoder(graph, unflatten(shapes), axes, options or ComputeOptions())


def init_params(config: DecoderConfig, key: Array, dtype: DTypeLike = jnp.float32) -> Params:
    """Random parameters (normal, 0.02), vocabulary padding zero. Call under jit, with `out_shardings` on a mesh."""
    state = nnx.state(Decoder(config, rngs=nnx.Rngs(key), dtype=dtype))
    leaves = flatten(nnx.to_pure_dict(state))
    for path in ("embed/embedding", "lm_head/kernel"):
        if path in leaves:
            leaves[path] = leaves[path].at[config.vocab_size :].set(0.0)
    return unflatten(leaves)
