"""The parts a decoder is made of. Every parameter names its dims logically (see `parallel/sharding.py`).

Linear kernels are stored input dims first (`[D, N, H]`), so that a product never transposes them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}
"""By the names that Hugging Face configs use."""

INIT_STDDEV = 0.02


def parameter(rngs: nnx.Rngs, shape: Sequence[int], axes: Sequence[str], init: str, dtype: DTypeLike) -> nnx.Param:
    """A parameter with logically named dims; `init` is normal, ones or zeros."""
    makers = {
        "normal": lambda: INIT_STDDEV * jax.random.normal(rngs.params(), tuple(shape), dtype),
        "ones": lambda: jnp.ones(shape, dtype),
        "zeros": lambda: jnp.zeros(shape, dtype),
    }
    return nnx.Param(makers[init](), axes=tuple(axes))


class Linear(nnx.Module):
    """`y = x W + b` over one or several input and output dims."""

    def __init__(
        self,
        inputs: dict[str, int],
        outputs: dict[str, int],
        *,
        bias: bool,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
    ):
        dims = (*inputs.items(), *outputs.items())
        self.input_count = len(inputs)
        self.kernel = parameter(rngs, [size for _, size in dims], [name for name, _ in dims], "normal", dtype)
        self.bias = parameter(rngs, list(outputs.values()), list(outputs), "zeros", dtype) if bias else None

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """`[..., *inputs]` -> `[..., *outputs]`."""
        y = jnp.tensordot(x, self.kernel[...], axes=self.input_count)
        if self.bias is None:
            return y
        bias = self.bias[...]
        return y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)


class RMSNorm(nnx.Module):
    """Root mean square norm (Zhang & Sennrich 2019), statistics in f32."""

    def __init__(self, size: int, epsilon: float, *, rngs: nnx.Rngs, dtype: DTypeLike):
        self.scale = parameter(rngs, [size], ["width"], "ones", dtype)
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*lead D"]) -> Float[Array, "*lead D"]:
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
        normed = (x32 * jax.lax.rsqrt(mean_square + self.epsilon)).astype(x.dtype)
        scale = self.scale[...]
        return normed * scale.reshape((1,) * (x.ndim - 1) + scale.shape)


class Embedding(nnx.Module):
    """Token embedding `[V, D]`; also the form of an untied output head."""

    def __init__(self, vocab: int, size: int, *, rngs: nnx.Rngs, dtype: DTypeLike):
        self.embedding = parameter(rngs, [vocab, size], ["vocab", "embed"], "normal", dtype)

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return jnp.take(self.embedding[...], tokens, axis=0)


class Head(nnx.Module):
    """An output embedding of its own, `[V, D]`."""

    def __init__(self, vocab: int, size: int, *, rngs: nnx.Rngs, dtype: DTypeLike):
        self.kernel = parameter(rngs, [vocab, size], ["vocab", "embed"], "normal", dtype)


class ScoreHead(nnx.Module):
    """Scores in place of logits, `[C, D]`. Zeros at first: a reward model starts from equal scores, so from a loss of
    log 2, and has no random projection to unlearn; its first gradient is what tells the hidden states apart."""

    def __init__(self, labels: int, size: int, *, rngs: nnx.Rngs, dtype: DTypeLike):
        self.kernel = parameter(rngs, [labels, size], ["labels", "embed"], "zeros", dtype)


class GatedMLP(nnx.Module):
    """`down(act(gate(x)) * up(x))` (Shazeer 2020)."""

    def __init__(self, size: int, width: int, activation: str, *, bias: bool, rngs: nnx.Rngs, dtype: DTypeLike):
        self.activation = activation
        self.gate = Linear({"embed": size}, {"mlp": width}, bias=bias, rngs=rngs, dtype=dtype)
        self.up = Linear({"embed": size}, {"mlp": width}, bias=bias, rngs=rngs, dtype=dtype)
        self.down = Linear({"mlp": width}, {"embed": size}, bias=bias, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down(ACTIVATIONS[self.activation](self.gate(x)) * self.up(x))


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021) and its scalings, with the field names of `rope_scaling` in Hugging
    Face configs."""

    theta: float = 10000.0
    scaling: Literal["none", "linear", "dynamic", "yarn", "llama3"] = "none"
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


def rope_frequencies(rope: RopeConfig, head_size: int, max_positions: int) -> tuple[np.ndarray, float]:
    """Inverse frequencies f32 `[H/2]` and the factor on cos and sin, for the scalings that do not look at the length.

    linear: Chen et al. 2023; yarn: Peng et al. 2023, as in transformers' `modeling_rope_utils`; llama3: the Llama 3.1
    release. `dynamic` depends on the segment's length and is applied in `rope_angles`; its base is returned here.
    """
    # In f32, as the models were trained: at position 1,000 a frequency exact to f64 is 1e-4 rad away from theirs.
    exponents = np.arange(0, head_size, 2, dtype=np.float32) / np.float32(head_size)
    inverse = np.float32(1.0) / np.float32(rope.theta) ** exponents
    factor = 1.0
    original = rope.original_max_position_embeddings or max_positions
    if rope.scaling == "linear":
        inverse = inverse / rope.factor
    elif rope.scaling == "llama3":
        wavelength = 2 * math.pi / inverse
        smooth = (original / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        blend = (1 - smooth) * inverse / rope.factor + smooth * inverse
        low, high = original / rope.low_freq_factor, original / rope.high_freq_factor
        inverse = np.where(wavelength > low, inverse / rope.factor, np.where(wavelength < high, inverse, blend))
    elif rope.scaling == "yarn":
        inverse, factor = _yarn(rope, inverse, head_size, original)
    return np.asarray(inverse, np.float32), factor


def _yarn(rope: RopeConfig, inverse: np.ndarray, head_size: int, original: int) -> tuple[np.ndarray, float]:
    def correction_dim(rotations: float) -> float:
        return head_size * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = correction_dim(rope.beta_fast), correction_dim(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_size - 1)
    ramp = np.clip((np.arange(head_size // 2) - low) / (high - low if high != low else 0.001), 0, 1)
    kept = 1 - ramp.astype(np.float32)
    scaled = 1 / (rope.factor / inverse) * (1 - kept) + inverse * kept

    def mscale(scale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * scale * math.log(rope.factor) + 1.0

    factor = rope.attention_factor
    if factor is None and rope.mscale and rope.mscale_all_dim:
        factor = mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return scaled, mscale(1.0) if factor is None else factor


def rope_angles(
    rope: RopeConfig,
    head_size: int,
    max_positions: int,
    positions: Int[Array, "B T"],
    lengths: Int[Array, "B T"],
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """cos and sin, f32. `lengths` is the length of each token's segment; only `dynamic` scaling looks at it.

    Dynamic scaling (transformers' `dynamic`): theta grows with the segment once it is longer than `max_positions`.
    Taking the length per segment keeps a packed row equal to its unpacked segments.
    """
    inverse, factor = rope_frequencies(rope, head_size, max_positions)
    inverse_BTH = jnp.asarray(inverse)[None, None]
    if rope.scaling == "dynamic":
        longest = jnp.maximum(lengths, max_positions).astype(jnp.float32)
        growth = rope.factor * longest / max_positions - (rope.factor - 1)
        exponents = np.arange(0, head_size, 2, dtype=np.float32) / (head_size - 2)
        inverse_BTH = inverse_BTH * growth[..., None] ** jnp.asarray(-exponents)[None, None]
    angles = positions.astype(jnp.float32)[..., None] * inverse_BTH
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def apply_rope(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T half"], sin: Float[Array, "B T half"]
) -> Float[Array, "B T N H"]:
    """Rotates the pairs (i, i + H/2), in f32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
