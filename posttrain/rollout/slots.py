"""What the engine runs on the device: cache slots, and the two compiled programs that fill and advance them.

`prefill` reads pieces of some prompts into their slots and draws the first token of those that end there; `decode`
advances all slots at once by several tokens. Slots are updated in place: their buffers are donated.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Int32

from posttrain.models.decoder import AbstractDecoder, Decoder, KVCache, init_cache
from posttrain.models.layers import softcapped
from posttrain.parallel.sharding import constrain, place, replicated
from posttrain.records import Leaf, Params
from posttrain.rollout.sampling import RowSampling, Sampled, SamplingParams, sample

CACHE_DIMS = ("layers", "rows", "tokens", "kv_heads", "head_size")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """What the device knows of the `B` slots."""

    cache: KVCache
    tokens: Leaf
    """int32 `[B]`: the latest token, not yet in the cache."""
    positions: Leaf
    """int32 `[B]`: where in its sequence that token stands."""
    remaining: Leaf
    """int32 `[B]`: how many tokens may still come; 0 = the slot is free."""
    sampling: RowSampling


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Chunks:
    """`R` pieces of prompts, padded to `T` tokens."""

    tokens: Leaf
    """int32 `[R, T]`."""
    starts: Leaf
    """int32 `[R]`: position of the first token."""
    counts: Leaf
    """int32 `[R]`: tokens that are no padding, at least 1."""
    lengths: Leaf
    """int32 `[R]`: tokens of the whole prompt."""
    slots: Leaf
    """int32 `[R]`: a number past the last slot for rows that are padding."""
    ends: Leaf
    """bool `[R]`: the prompt ends here, so its first new token is drawn."""
    allowed: Leaf
    """int32 `[R]`: how many new tokens may come."""
    sampling: RowSampling


class SlotPrograms:
    """The programs for `count` slots of `length` positions on a mesh, compiled at their first use for each shape."""

    def __init__(
        self,
        decoder: AbstractDecoder,
        *,
        count: int,
        length: int,
        steps: int,
        stop_ids: Iterable[int],
        dtype: Any,
        mesh: Mesh,
    ):
        self.config = decoder.merge(decoder.shapes).config
        self.count, self.length, self.steps = count, length, steps
        self._decoder, self._dtype, self._mesh = decoder, dtype, mesh
        self._stop_ids = np.array(sorted(set(stop_ids)), np.int32)
        whole = replicated(mesh)
        cache = KVCache(*(place(CACHE_DIMS, leaf.shape, mesh).sharding for leaf in self._cache_shapes()))
        shardings = Slots(cache, whole, whole, whole, RowSampling(*[whole] * 6))
        options: dict[str, Any] = {
            "static_argnames": ("window",),
            "donate_argnames": ("state",),
            "out_shardings": (shardings, Sampled(whole, whole, whole)),
        }
        self._fresh = jax.jit(self._make_slots, out_shardings=shardings)
        self._prefill = jax.jit(self._prefill_chunks, **options)
        self._decode = jax.jit(self._decode_steps, **options)

    def fresh(self) -> Slots:
        """Free slots."""
        with jax.set_mesh(self._mesh):
            return self._fresh()

    def prefill(self, params: Params, state: Slots, chunks: Chunks, *, window: int) -> tuple[Slots, Sampled]:
        """Writes the chunks into the cache. Slots whose prompts end become busy with their first new token, which is
        returned `[R]` (of other rows a token that means nothing). `window` covers all positions, padding included."""
        with jax.set_mesh(self._mesh):
            return self._prefill(params, state, chunks, window=window)

    def decode(
        self, params: Params, state: Slots, *, limit: int, free_wanted: int, window: int
    ) -> tuple[Slots, Sampled]:
        """Up to `limit` steps of all slots, fewer once `free_wanted` of them are free. `window` covers all positions.

        Returns `[steps, B]`, with token -1 where a slot produced none.
        """
        with jax.set_mesh(self._mesh):
            return self._decode(params, state, np.int32(limit), np.int32(free_wanted), window=window)

    # ---- inside jit -------------------------------------------------------------------------------------------------

    def _cache_shapes(self) -> list[jax.ShapeDtypeStruct]:
        return jax.tree.leaves(jax.eval_shape(lambda: init_cache(self.config, self.count, self.length, self._dtype)))

    def _make_slots(self) -> Slots:
        idle = jnp.zeros(self.count, jnp.int32)
        sampling = RowSampling.stack([SamplingParams()] * self.count, [0] * self.count)
        cache = init_cache(self.config, self.count, self.length, self._dtype)
        return Slots(cache, idle, idle, idle, jax.tree.map(jnp.asarray, sampling))

    def _next(
        self, model: Decoder, hidden: Float[Array, "B D"], how: RowSampling, positions: Int[Array, "B"]
    ) -> tuple[Sampled, Bool[Array, "B"]]:
        """The tokens at `positions`, from the hidden states before them, and whether they are stop tokens."""
        logits = jnp.einsum("bd,vd->bv", hidden, model.head(), preferred_element_type=jnp.float32)
        logits = softcapped(logits, model.logit_softcap)
        drawn = sample(constrain(logits, "rows", None), how, positions, vocab_size=model.vocab_size)
        return drawn, jnp.any(drawn.tokens[:, None] == self._stop_ids[None], axis=-1)

    def _prefill_chunks(self, params: Params, state: Slots, chunks: Chunks, *, window: int) -> tuple[Slots, Sampled]:
        model = self._decoder.merge(params)
        positions = chunks.starts[:, None] + jnp.arange(chunks.tokens.shape[1])[None]
        hidden, cache = model.extend(
            chunks.tokens, positions, chunks.slots, state.cache, lengths=chunks.lengths, window=window
        )
        last = jnp.take_along_axis(hidden, (chunks.counts - 1)[:, None, None], axis=1)[:, 0]
        ends = chunks.starts + chunks.counts
        drawn, stopped = self._next(model, last, chunks.sampling, ends)
        targets = jnp.where(chunks.ends, chunks.slots, self.count)
        old = (state.tokens, state.positions, state.remaining, state.sampling)
        new = (drawn.tokens, ends, jnp.where(stopped, 0, chunks.allowed - 1), chunks.sampling)
        return Slots(cache, *jax.tree.map(lambda a, b: a.at[targets].set(b, mode="drop"), old, new)), drawn

    def _decode_steps(
        self, params: Params, state: Slots, limit: Int32[Array, ""], free_wanted: Int32[Array, ""], *, window: int
    ) -> tuple[Slots, Sampled]:
        model = self._decoder.merge(params)
        nothing = jnp.zeros((self.steps, self.count), jnp.float32)
        drawn = Sampled(jnp.full((self.steps, self.count), -1, jnp.int32), nothing, nothing)

        def goes_on(carry: tuple[Array, Slots, Sampled]) -> Bool[Array, ""]:
            step, state, _ = carry
            free = jnp.sum(state.remaining == 0, dtype=jnp.int32)
            return (step < limit) & (free < free_wanted)

        def advance(carry: tuple[Array, Slots, Sampled]) -> tuple[Array, Slots, Sampled]:
            step, state, drawn = carry
            busy, positions = state.remaining > 0, state.positions
            hidden, cache = model.extend(state.tokens[:, None], positions[:, None], None, state.cache, window=window)
            new, stopped = self._next(model, hidden[:, 0], state.sampling, positions + 1)
            state = Slots(
                cache,
                tokens=jnp.where(busy, new.tokens, state.tokens),
                positions=jnp.where(busy, positions + 1, positions),
                remaining=jnp.where(busy & ~stopped, state.remaining - 1, 0),
                sampling=state.sampling,
            )
            new = replace(new, tokens=jnp.where(busy, new.tokens, -1))
            return step + 1, state, jax.tree.map(lambda all, one: all.at[step].set(one), drawn, new)

        _, state, drawn = jax.lax.while_loop(goes_on, advance, (jnp.int32(0), state, drawn))
        return state, drawn
