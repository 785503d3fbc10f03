"""One layer of the decoder: attention and MLP with their norms. `decoder.py` stacks and scans it."""

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from posttrain.models.architecture import DecoderConfig
from posttrain.models.layers import GatedMLP, Linear, RMSNorm
from posttrain.models.moe import MoE
from posttrain.models.rope import apply_rope
from posttrain.parallel.sharding import constrain
from posttrain.records import RouterStats


def width_norm(config: DecoderConfig, *, rngs: nnx.Rngs, dtype: DTypeLike) -> RMSNorm:
    """A norm of the residual stream or of what is added to it."""
    c = config
    return RMSNorm({"width": c.hidden_size}, c.rms_norm_eps, offset=c.norm_offset, rngs=rngs, dtype=dtype)


class Attention(nnx.Module):
    """The projections of grouped-query attention (Ainslie et al. 2023)."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        c = config
        embed = {"embed": c.hidden_size}
        queries = {"heads": c.num_attention_heads, "head_size": c.head_dim}
        keys = {"kv_heads": c.num_key_value_heads, "head_size": c.head_dim}
        self.q = Linear(embed, queries, bias=c.attention_bias, rngs=rngs, dtype=dtype)
        self.k = Linear(embed, keys, bias=c.attention_bias, rngs=rngs, dtype=dtype)
        self.v = Linear(embed, keys, bias=c.attention_bias, rngs=rngs, dtype=dtype)
        self.o = Linear(queries, embed, bias=c.attention_out_bias, rngs=rngs, dtype=dtype)

        def norm(heads: dict[str, int]) -> RMSNorm | None:
            if c.qk_norm == "none":
                return None
            dims = heads if c.qk_norm == "full" else {"head_size": c.head_dim}
            return RMSNorm(dims, c.rms_norm_eps, offset=c.norm_offset, rngs=rngs, dtype=dtype)

        self.q_norm, self.k_norm = norm(queries), norm(keys)

    def project(
        self, x: Float[Array, "B T D"], cos: Float[Array, "B T half"], sin: Float[Array, "B T half"]
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Queries and keys, normed and with rotary positions, and values."""
        q, k = self.q(x), self.k(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return apply_rope(q, cos, sin), apply_rope(k, cos, sin), self.v(x)


class Block(nnx.Module):
    """Attention and MLP (or experts), each with the norms before and after it that the config asks for.

    What mixes the tokens stands between `project` and `finish`: attention over packed rows or against a cache.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        c = config

        def norm(wanted: bool) -> RMSNorm | None:
            return width_norm(c, rngs=rngs, dtype=dtype) if wanted else None

        self.attn_norm = norm(c.pre_norm)
        self.attn = Attention(c, rngs=rngs, dtype=dtype)
        self.attn_post_norm = norm(c.post_norm)
        self.mlp_norm = norm(c.pre_norm)
        sizes = c.hidden_size, c.intermediate_size, c.hidden_act
        self.mlp = None if c.moe else GatedMLP(*sizes, bias=c.mlp_bias, rngs=rngs, dtype=dtype)
        self.moe = MoE(c, rngs=rngs, dtype=dtype) if c.moe else None
        self.mlp_post_norm = norm(c.post_norm)

    def project(
        self, x: Float[Array, "B T D"], cos: Float[Array, "B T half"], sin: Float[Array, "B T half"]
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """What attention reads: queries, keys, values."""
        return self.attn.project(_normed(self.attn_norm, x), cos, sin)

    def finish(
        self, x: Float[Array, "B T D"], mixed: Float[Array, "B T N H"], real: Bool[Array, "B T"], *, grouped: str
    ) -> tuple[Float[Array, "B T D"], RouterStats | None]:
        """Everything after the attention itself, and of experts (computed as `grouped` says) the router's statistics
        over the `real` tokens."""
        x = x + _normed(self.attn_post_norm, self.attn.o(mixed))
        y, stats = _normed(self.mlp_norm, x), None
        if self.moe is not None:
            y, stats = self.moe(y, real, grouped)
        elif self.mlp is not None:
            y = self.mlp(y)
        return constrain(x + _normed(self.mlp_post_norm, y), "rows", "tokens", "width"), stats


def _normed(norm: RMSNorm | None, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    return x if norm is None else norm(x)
