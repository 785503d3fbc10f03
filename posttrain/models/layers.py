"""The parts a decoder is made of. Every parameter names its dims logically (see `parallel/sharding.py`).

Linear kernels are stored input dims first (`[D, N, H]`), so that a product never transposes them.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int

from posttrain.models.context import balanced
from posttrain.models.contract import contract

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}
"""By the names that Hugging Face configs use."""

INIT_STDDEV = 0.02


def softcapped(x: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """`cap * tanh(x / cap)`, where there is a cap (Gemma 2)."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def parameter(rngs: nnx.Rngs, shape: Sequence[int], axes: Sequence[str], init: str, dtype: DTypeLike) -> nnx.Param:
    """A parameter with logically named dims; `init` is normal, ones or zeros."""
    makers = {
        "normal": lambda: INIT_STDDEV * jax.random.normal(rngs.params(), tuple(shape), dtype),
        "ones": lambda: jnp.ones(shape, dtype),
        "zeros": lambda: jnp.zeros(shape, dtype),
    }
    return nnx.Param(makers[init](), axes=tuple(axes))


class Linear(nnx.Module):
    """`y = x W + b` over one or several input and output dims.

    `lora.py` may freeze W and put a low-rank adapter beside it: `y = x W + scale (dropout(x) A) B + b` (Hu et al.
    2021), where W may be quantised.
    """

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
        self.names = tuple(name for name, _ in dims)
        self.kernel = parameter(rngs, [size for _, size in dims], self.names, "normal", dtype)
        self.bias = parameter(rngs, list(outputs.values()), list(outputs), "zeros", dtype) if bias else None
        self.quantized: Callable[[Array, Array], Array] | None = None
        """With it, `kernel` is made of `kernel_q` and `kernel_scale`."""
        self.kernel_q = self.kernel_scale = None
        self.lora_a = self.lora_b = None
        """`[*inputs, r]` and `[r, *outputs]`."""
        self.lora_scale = 1.0
        self.dropout = 0.0
        self.dropout_keys: nnx.Param | None = None
        """uint32 `[B, 2]`: a key for each row; without them nothing is dropped."""

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """`[..., *inputs]` -> `[..., *outputs]`."""
        y = contract(x, self.weight(), self.names, self.input_count)
        if self.lora_a is not None and self.lora_b is not None:
            inputs, outputs = self.names[: self.input_count], self.names[self.input_count :]
            low = contract(self._dropped(x), self.lora_a[...], (*inputs, "lora_rank"), self.input_count)
            low = checkpoint_name(low * jnp.asarray(self.lora_scale, low.dtype), "lora")
            y = y + contract(low, self.lora_b[...], ("lora_rank", *outputs), 1)
        if self.bias is not None:
            bias = self.bias[...]
            y = y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
        return checkpoint_name(y, "linear")

    def weight(self) -> Float[Array, "..."]:
        """W `[*inputs, *outputs]`."""
        if self.quantized is None or self.kernel_q is None or self.kernel_scale is None:
            return self.kernel[...]
        return self.quantized(self.kernel_q[...], self.kernel_scale[...])

    def _dropped(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Each row `x[b]` by a key of its own, in its own order: no split of the batch changes what is dropped."""
        if self.dropout_keys is None:
            return x
        keep = 1.0 - self.dropout

        def mask(key: Array) -> Array:
            return jax.random.bernoulli(jax.random.wrap_key_data(key, impl="threefry2x32"), keep, x.shape[1:])

        kept = balanced(jax.vmap(mask)(self.dropout_keys[...]))
        return jnp.where(kept, x / jnp.asarray(keep, x.dtype), jnp.zeros((), x.dtype))


def _rms_normed_primal(
    x: Float32[Array, "B T ..."], scale: Float32[Array, "..."], epsilon: float
) -> Float32[Array, "B T ..."]:
    """`x / rms(x) * scale`, the dims of `scale` being the last ones of `x`.

    Its gradients are written out for the sake of CPU: with n the normed input and g = dy * scale they are
    `(g - n mean(g n)) / rms(x)` and the sum of `dy n` over tokens.
    """
    return _rms_normed_forward(x, scale, epsilon)[0]


def _rms_normed_forward(x: Array, scale: Array, epsilon: float) -> tuple[Array, tuple[Array, Array]]:
    return x * _inverse_rms(x, scale.ndim, epsilon) * _beside(scale, x), (x, scale)


def _rms_normed_backward(epsilon: float, residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, scale = residuals
    inverse = _inverse_rms(x, scale.ndim, epsilon)
    normed, slope = x * inverse, dy * _beside(scale, x)
    mean = _sum_of_products(slope, normed, tuple(range(x.ndim - scale.ndim))) / scale.size
    dx = (slope - normed * _beside(mean, x, first=True)) * inverse
    return dx, _sum_of_products(dy, normed, tuple(range(x.ndim - scale.ndim, x.ndim)))


_rms_normed = jax.custom_vjp(_rms_normed_primal, nondiff_argnums=(2,))
_rms_normed.defvjp(_rms_normed_forward, _rms_normed_backward)


def _inverse_rms(x: Array, normed_dims: int, epsilon: float) -> Array:
    """1 / rms(x) over the last dims, which stay as ones."""
    kept = tuple(range(x.ndim - normed_dims))
    size = math.prod(x.shape[len(kept) :])
    return _beside(jax.lax.rsqrt(_sum_of_products(x, x, kept) / size + epsilon), x, first=True)


def _beside(part: Array, x: Array, *, first: bool = False) -> Array:
    """`part`, which has the last (or first) dims of `x`, with ones for the others."""
    ones = (1,) * (x.ndim - part.ndim)
    return part.reshape(part.shape + ones if first else ones + part.shape)


def _sum_of_products(a: Array, b: Array, kept: tuple[int, ...]) -> Array:
    """The sum of `a * b` over all dims but the kept ones. On CPU as a matrix product, in f32 there: XLA takes five to
    ten times as long to multiply and sum."""
    summed = tuple(dim for dim in range(a.ndim) if dim not in kept)

    def product(a: Array, b: Array) -> Array:
        return jax.lax.dot_general(a, b, ((summed, summed), (kept, kept)))

    return jax.lax.platform_dependent(a, b, cpu=product, default=lambda a, b: (a * b).sum(summed))


class RMSNorm(nnx.Module):
    """Root mean square norm (Zhang & Sennrich 2019) over the last dims together, in f32: `x / rms(x) * (offset + w)`.

    A new norm leaves its normed input as it is.
    """

    def __init__(self, dims: dict[str, int], epsilon: float, *, offset: float = 0.0, rngs: nnx.Rngs, dtype: DTypeLike):
        init = "zeros" if offset == 1.0 else "ones"
        self.scale = parameter(rngs, list(dims.values()), list(dims), init, dtype)
        self.epsilon, self.offset = epsilon, offset

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """`[..., *dims]` -> the same."""
        scale = self.scale[...].astype(jnp.float32) + self.offset
        return _rms_normed(x.astype(jnp.float32), scale, self.epsilon).astype(x.dtype)


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
