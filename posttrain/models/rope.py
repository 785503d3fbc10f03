"""Rotary position embedding (Su et al. 2021) and its scalings, as transformers' `modeling_rope_utils` computes them."""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Scaling = Literal["none", "linear", "dynamic", "yarn", "llama3", "longrope"]


@dataclass(frozen=True)
class RopeConfig:
    """With the field names of `rope_scaling` in Hugging Face configs."""

    theta: float = 10000.0
    scaling: Scaling = "none"
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
    short_factor: tuple[float, ...] = ()
    """longrope: what each frequency is divided by, `rotary_dim / 2` of them."""
    long_factor: tuple[float, ...] = ()
    """The same in segments longer than `original_max_position_embeddings`."""
    rotary_dim: int | None = None
    """How many dims of a head turn, from the first on; None: all."""

    @property
    def by_length(self) -> bool:
        """Whether the angles depend on the length of the whole segment, not on the position alone."""
        return self.scaling in ("dynamic", "longrope")


def rope_frequencies(
    rope: RopeConfig, head_size: int, max_positions: int, *, long: bool = False
) -> tuple[np.ndarray, float]:
    """Inverse frequencies f32 `[half]`, half of the dims that turn, and the factor on cos and sin.

    linear: Chen et al. 2023; yarn: Peng et al. 2023; llama3: the Llama 3.1 release; longrope: arXiv:2402.13753, of
    `long` segments or of others. `dynamic` depends on the segment's very length and is applied in `rope_angles`; its
    base is returned here.
    """
    size = rope.rotary_dim or head_size
    # In f32, as the models were trained: at position 1,000 a frequency exact to f64 is 1e-4 rad away from theirs.
    exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    powers = np.float32(rope.theta) ** exponents
    inverse = np.float32(1.0) / powers
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
        inverse, factor = _yarn(rope, inverse, size, original)
    elif rope.scaling == "longrope":
        stretch = np.asarray(rope.long_factor if long else rope.short_factor, np.float32)
        inverse, factor = np.float32(1.0) / (stretch * powers), _longrope_factor(rope, original)
    return np.asarray(inverse, np.float32), factor


def _yarn(rope: RopeConfig, inverse: np.ndarray, size: int, original: int) -> tuple[np.ndarray, float]:
    def correction_dim(rotations: float) -> float:
        return size * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = correction_dim(rope.beta_fast), correction_dim(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = np.clip((np.arange(size // 2) - low) / (high - low if high != low else 0.001), 0, 1)
    kept = 1 - ramp.astype(np.float32)
    scaled = 1 / (rope.factor / inverse) * (1 - kept) + inverse * kept

    def mscale(scale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * scale * math.log(rope.factor) + 1.0

    factor = rope.attention_factor
    if factor is None and rope.mscale and rope.mscale_all_dim:
        factor = mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return scaled, mscale(1.0) if factor is None else factor


def _longrope_factor(rope: RopeConfig, original: int) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    return 1.0 if rope.factor <= 1 else math.sqrt(1 + math.log(rope.factor) / math.log(original))


def rope_angles(
    rope: RopeConfig,
    head_size: int,
    max_positions: int,
    positions: Int[Array, "B T"],
    lengths: Int[Array, "B T"],
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """cos and sin, f32. `lengths` is the length of each token's segment; only scalings `by_length` look at it.

    dynamic: theta grows with the segment once it is longer than `max_positions`. longrope: the whole segment takes
    other frequencies once it is longer than the original length. Taking the length per segment, where transformers
    takes the longest of the batch, keeps a packed row equal to its unpacked segments.
    """
    inverse, factor = rope_frequencies(rope, head_size, max_positions)
    inverse_BTH = jnp.asarray(inverse)[None, None]
    if rope.scaling == "dynamic":
        size = rope.rotary_dim or head_size
        longest = jnp.maximum(lengths, max_positions).astype(jnp.float32)
        growth = rope.factor * longest / max_positions - (rope.factor - 1)
        exponents = np.arange(0, size, 2, dtype=np.float32) / (size - 2)
        inverse_BTH = inverse_BTH * growth[..., None] ** jnp.asarray(-exponents)[None, None]
    elif rope.scaling == "longrope":
        long, _ = rope_frequencies(rope, head_size, max_positions, long=True)
        is_long = lengths > (rope.original_max_position_embeddings or max_positions)
        inverse_BTH = jnp.where(is_long[..., None], jnp.asarray(long)[None, None], inverse_BTH)
    angles = positions.astype(jnp.float32)[..., None] * inverse_BTH
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


@jax.custom_vjp
def apply_rope(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T half"], sin: Float[Array, "B T half"]
) -> Float[Array, "B T N H"]:
    """Rotates the pairs (i, i + half) of the first `2 half` dims of each head, in f32. Differentiable in `x`.

    On TPU the partners come from a product with a matrix of 0 and 1: heads cut in the middle of their 128 lanes are
    written out and read again, which takes twice the time.
    """
    return jax.lax.platform_dependent(x, cos, sin, tpu=_turned_by_product, default=_turned_by_halves)


def _apply_rope_forward(x: Array, cos: Array, sin: Array) -> tuple[Array, tuple[Array, Array]]:
    return apply_rope(x, cos, sin), (cos, sin)


def _apply_rope_backward(angles: tuple[Array, Array], dy: Array) -> tuple[Array, None, None]:
    """Turns back."""
    cos, sin = angles
    return apply_rope(dy, cos, -sin), None, None


apply_rope.defvjp(_apply_rope_forward, _apply_rope_backward)


def _turned_by_halves(x: Array, cos: Array, sin: Array) -> Array:
    half = cos.shape[-1]
    first, second = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32)
    cos, sin = cos[:, :, None], sin[:, :, None]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return turned if 2 * half == x.shape[-1] else jnp.concatenate([turned, x[..., 2 * half :]], axis=-1)


def _turned_by_product(x: Array, cos: Array, sin: Array) -> Array:
    size, half = x.shape[-1], cos.shape[-1]
    partner = np.zeros((size, size), np.float32)
    partner[np.arange(half) + half, np.arange(half)] = -1.0
    partner[np.arange(half), np.arange(half) + half] = 1.0
    # Exact: every sum has one term. Narrow numbers need no more than the default precision for it.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    partners = jnp.einsum(
        "btnh,hk->btnk", x, jnp.asarray(partner, x.dtype), precision=precision, preferred_element_type=jnp.float32
    )
    rest = ((0, 0), (0, 0), (0, 0), (0, size - 2 * half))
    cos = jnp.pad(jnp.concatenate([cos, cos], axis=-1)[:, :, None], rest, constant_values=1.0)
    sin = jnp.pad(jnp.concatenate([sin, sin], axis=-1)[:, :, None], rest)
    return (x.astype(jnp.float32) * cos + partners * sin).astype(x.dtype)
