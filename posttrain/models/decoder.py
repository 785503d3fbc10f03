"""The only transformer: a decoder described by a `DecoderConfig`, its layers stacked and scanned.

Families (`llama.py` ...) translate Hugging Face configs into a `DecoderConfig`; nothing here knows their names.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int32

from posttrain.models.architecture import DecoderConfig, LayerKind
from posttrain.models.attention import Windows, attention, cached_attention
from posttrain.models.block import Block, width_norm
from posttrain.models.context import balanced, natural
from posttrain.models.gradient_sum import GradientSum, tap
from posttrain.models.layers import Embedding, Head, ScoreHead
from posttrain.models.rope import rope_angles
from posttrain.parallel.sharding import constrain, flatten, unflatten
from posttrain.records import Batch, Leaf, Params, RouterStats

STACK = "layers/"
"""How the paths of stacked parameters begin."""

Remat = Literal["none", "minimal", "dots", "full", "offload"]


@dataclass(frozen=True)
class ComputeOptions:
    """How a decoder is run: nothing here changes what it computes but for rounding."""

    attention: str = "chunked"
    remat: Remat = "none"
    grouped: str = "ragged"
    """One of `grouped.IMPLEMENTATIONS`, for experts."""


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
        self.final_norm = width_norm(c, rngs=rngs, dtype=dtype)
        untied = not (c.tie_word_embeddings or c.num_labels)
        self.lm_head = Head(c.padded_vocab_size, c.hidden_size, rngs=rngs, dtype=dtype) if untied else None
        self.score = ScoreHead(c.num_labels, c.hidden_size, rngs=rngs, dtype=dtype) if c.num_labels else None
        self.gradient_sum: GradientSum = nnx.data({})
        """What the gradients of layers are added to (`gradient_sum.py`), behind all layers that have been run."""

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def logit_softcap(self) -> float | None:
        return self.config.logit_softcap

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

    def _embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        x = self.embed(tokens)
        return x if self.config.embed_scale is None else x * jnp.asarray(self.config.embed_scale, x.dtype)

    def _kinds(self, positions: Int[Array, "B T"], lengths: Int[Array, "B T"]) -> "_Kinds":
        """What the layers do differently to these tokens."""
        c = self.config
        distinct = tuple(dict.fromkeys(c.kinds))
        angles = {rope: self._angles(rope, positions, lengths) for rope in dict.fromkeys(k.rope for k in distinct)}
        cos, sin = (jnp.stack([angles[k.rope][part] for k in distinct]) for part in (0, 1))
        return _Kinds(distinct, cos, sin, jnp.asarray([distinct.index(kind) for kind in c.kinds], jnp.int32))

    def _angles(
        self, rope: int | None, positions: Int[Array, "B T"], lengths: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
        c = self.config
        if rope is not None:
            return rope_angles(c.ropes[rope], c.head_dim, c.max_position_embeddings, positions, lengths)
        # A turn by no angle, which changes no bit: layers with and without rotary positions stay one program.
        shape = (*positions.shape, (c.rope.rotary_dim or c.head_dim) // 2)
        return jnp.ones(shape, jnp.float32), jnp.zeros(shape, jnp.float32)

    def hidden(self, batch: Batch) -> Float[Array, "B T D"]:
        """Final hidden states of packed rows `[B, T]`; attention is causal and never crosses segments."""
        return self.hidden_and_router(batch)[0]

    def hidden_and_router(self, batch: Batch) -> tuple[Float[Array, "B T D"], RouterStats | None]:
        """The same, and what the routers did, if there are any."""
        c, segment_ids, positions = self.config, jnp.asarray(batch.segment_ids), jnp.asarray(batch.positions)
        by_length = any(rope.by_length for rope in c.ropes)
        lengths = _segment_lengths(segment_ids, positions) if by_length else positions
        kinds = self._kinds(balanced(positions), balanced(lengths))
        x = constrain(self._embed(balanced(jnp.asarray(batch.tokens))), "rows", "tokens", "width")
        real = balanced(segment_ids) > 0
        graph, state = nnx.split(self.layers)
        leaves = flatten({"layers": nnx.to_pure_dict(state)})

        def layer(x: Array, leaves: dict[str, Any], index: Array) -> tuple[Array, RouterStats | None]:
            block = nnx.merge(graph, unflatten(leaves)["layers"])
            x = checkpoint_name(x, "layer_in")
            q, k, v = block.project(x, *kinds.angles(index))
            q, k, v = (checkpoint_name(a, "qkv") for a in (q, k, v))
            mixed = attention(
                q,
                k,
                v,
                segment_ids,
                implementation=self.options.attention,
                scale=c.attention_scale,
                softcap=c.attn_softcap,
                window=kinds.windows(index),
            )
            return block.finish(x, mixed, real, grouped=self.options.grouped)

        run = _remat(layer, self.options.remat)

        def tapped(carry: tuple[Array, GradientSum], inputs: tuple[dict[str, Any], Array, Array]) -> tuple[Any, Any]:
            (x, total), (leaves, index, number) = carry, inputs
            leaves, total = tap(leaves, total, number)
            x, stats = run(x, leaves, index)
            return (x, total), stats

        inputs = (leaves, kinds.of_layer, jnp.arange(c.num_hidden_layers))
        (x, total), stats = jax.lax.scan(tapped, (x, self.gradient_sum), inputs)
        if total:
            self.gradient_sum = total
        return natural(self.final_norm(x)), jax.tree.map(lambda s: s.sum(0), stats)

    def extend(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        slots: Int[Array, "B"] | None,
        cache: KVCache,
        *,
        lengths: Int[Array, "B"] | None = None,
        window: int | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Appends tokens to cache slots and returns their final hidden states `[B, T, D]`.

        Token t of row b is written at `positions[b, t]` of slot `slots[b]` (None: row b is slot b, for all slots) and
        sees the slot up to that position, as far back as its layer's window. Only the first `window` positions of the
        cache are read (default: all); they must cover every token's own. Positions past the end of a prompt may hold
        padding: it is overwritten before anything sees it. What lies outside the cache, slots or positions, is not
        written. `lengths` are those of the whole sequences, which rotary scalings `by_length` look at (default: each
        token is the last).
        """
        c = self.config
        reach = positions + 1 if lengths is None else jnp.broadcast_to(lengths[:, None], positions.shape)
        kinds = self._kinds(positions, reach)
        x = self._embed(tokens)
        window = cache.k.shape[2] if window is None else window
        distance = positions[..., None] - jnp.arange(window)[None, None]
        rows = jnp.arange(cache.k.shape[1]) if slots is None else slots
        graph, state = nnx.split(self.layers)

        def read(stack: Array, index: Array) -> Array:
            if slots is None:
                start = (index, 0, 0, 0, 0)
                return jax.lax.dynamic_slice(stack, start, (1, stack.shape[1], window, *stack.shape[3:]))[0]
            return stack.at[index, slots, :window].get(mode="clip")

        def layer(carry: tuple[Array, Array, Array], inputs: tuple[Any, Array, Array]) -> tuple[Any, None]:
            x, k_cache, v_cache = carry
            state, kind, index = inputs
            block = nnx.merge(graph, state)
            q, k, v = block.project(x, *kinds.angles(kind))
            where = (index, rows[:, None], positions)
            k_cache = k_cache.at[where].set(k.astype(k_cache.dtype), mode="drop")
            v_cache = v_cache.at[where].set(v.astype(v_cache.dtype), mode="drop")
            mask = (distance >= 0) & (distance < kinds.windows(kind).size())
            old_and_new = read(k_cache, index), read(v_cache, index)
            mixed = cached_attention(q, *old_and_new, mask, scale=c.attention_scale, softcap=c.attn_softcap)
            x, _ = block.finish(x, mixed, jnp.ones(tokens.shape, bool), grouped=self.options.grouped)
            return (x, k_cache, v_cache), None

        layers = jnp.arange(c.num_hidden_layers)
        (x, k, v), _ = jax.lax.scan(layer, (x, cache.k, cache.v), (state, kinds.of_layer, layers))
        return self.final_norm(x), KVCache(k, v)


@dataclass(frozen=True)
class _Kinds:
    """The distinct kinds of layers, of which each layer of the scan picks its own by index.

    Windows and angles are all that differs, so that they are data to the scanned layer: any pattern compiles as one
    layer, and no weight is cut out of its stack. With a single kind nothing is picked at run time.
    """

    distinct: tuple[LayerKind, ...]
    cos: Float[Array, "kinds B T half"]
    sin: Float[Array, "kinds B T half"]
    of_layer: Int32[Array, " L"]
    """Which of the distinct kinds."""

    def angles(self, index: Int[Array, ""]) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
        if len(self.distinct) == 1:
            return self.cos[0], self.sin[0]
        cos, sin = (jax.lax.dynamic_index_in_dim(x, index, keepdims=False) for x in (self.cos, self.sin))
        return cos, sin

    def windows(self, index: Int[Array, ""]) -> Windows:
        found = tuple(dict.fromkeys(kind.window for kind in self.distinct))
        places = jnp.asarray([found.index(kind.window) for kind in self.distinct], jnp.int32)
        return Windows(found, places[index])


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
    kept = policies.save_only_these_names("attn_out", "attn_lse", "experts")
    policy = {
        "none": _but_gathered,
        "minimal": policies.save_from_both_policies(policies.dots_saveable, kept),
        # By name: an adapter's product is as large as its layer's, and only their sum is needed.
        "dots": policies.save_only_these_names("linear", "lora", "experts", "attn_out", "attn_lse"),
        "full": policies.nothing_saveable,
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=["attn_lse"],
            names_which_can_be_offloaded=["layer_in", "attn_out"],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }[remat]
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)


def _but_gathered(primitive: Any, *_: Any, **parameters: Any) -> bool:
    """Saves all but weights gathered from other devices: with every layer's the whole model would be on each."""
    return primitive.name != "all_gather" and parameters.get("name") != "gathered"


@dataclass(frozen=True)
class AbstractDecoder:
    """A decoder without its arrays: what to merge parameters into, and what they look like."""

    graph: Any
    shapes: Params
    """Nested dict of `ShapeDtypeStruct`."""
    axes: dict[str, tuple[str, ...]]
    """Logical dim names by path, the stacked `layers` dim included."""
    options: ComputeOptions

    def merge(self, params: Params, gradient_sum: GradientSum | None = None) -> Decoder:
        """The decoder with these parameters. With a sum that its layers' gradients are to be added to, it is merged
        within the function that is differentiated, and run at that level: not inside another transformation."""
        model = nnx.merge(self.graph, params)
        model.gradient_sum = nnx.data(gradient_sum or {})
        return model


def abstract_decoder(
    config: DecoderConfig, *, dtype: DTypeLike = jnp.float32, options: ComputeOptions | None = None
) -> AbstractDecoder:
    """The decoder's structure; no array is made."""
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=dtype, options=options))
    graph, state = nnx.split(model)
    variables = {"/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
    shapes = {path: v.get_value() for path, v in variables.items()}
    axes = {
        path: ("layers", *v.get_metadata("axes")) if path.startswith(STACK) else v.get_metadata("axes")
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
