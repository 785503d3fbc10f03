"""Frozen weights in 8 or 4 bits, for training an adapter beside them (QLoRA, Dettmers et al. 2023).

`qwix` does the arithmetic. A kernel becomes two parameters: `kernel_q`, int8 or indices of the 16 NormalFloats (nf4),
and `kernel_scale`: one scale for each output in int8, one for each block of up to 64 inputs of an output in nf4. The
layer multiplies with `kernel_q * kernel_scale`, made anew where it is needed; nothing trains what is quantised.
"""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Shaped

from posttrain.errors import UserError
from posttrain.models.decoder import AbstractDecoder
from posttrain.models.lora import Adaptable, input_start, input_stop, linear_modules, linears
from posttrain.parallel.sharding import flatten, unflatten

Kind = Literal["int8", "nf4"]

BLOCK = 64
"""Inputs that share a scale in nf4."""


@dataclass(frozen=True)
class Quantization:
    """How the kernels of a decoder are quantised."""

    kind: Kind
    plain: AbstractDecoder
    """The decoder as it is in the files."""

    def change(self, path: str, values: Shaped[Array, "..."], shardings: Mapping[str, Any]) -> dict[str, Array]:
        """What a parameter of `plain` becomes, by path; `shardings` by path. Gives up `values` that are quantised."""
        modules = linear_modules(self.plain)
        module = modules.get(path.removesuffix("/kernel"))
        if module is None or not path.endswith("/kernel"):
            return {path: values}
        names = (f"{path}_q", f"{path}_scale")
        placed = tuple(shardings[name] for name in names)
        made = jax.jit(partial(_quantize_layers, module, self.kind), out_shardings=placed)(values)
        values.delete()
        return dict(zip(names, made, strict=True))


def check_available(kind: Kind) -> None:
    """Raises `UserError` where qwix is not installed."""
    if importlib.util.find_spec("qwix") is None:
        raise UserError(f"model.lora.quantize = {kind}: needs the package qwix; install posttrain[quantize]")


def quantize_decoder(decoder: AbstractDecoder, kind: Kind) -> AbstractDecoder:
    """The decoder with `kernel_q` and `kernel_scale`, which has the kernel's dtype, in the place of its linear layers'
    kernels."""
    model = nnx.merge(decoder.graph, decoder.shapes)
    shapes, axes = flatten(decoder.shapes), dict(decoder.axes)
    for path, module in linears(model).items():
        kernel, names = f"{path}/kernel", axes.pop(f"{path}/kernel")
        q, scale = jax.eval_shape(partial(_quantize_layers, module, kind), shapes.pop(kernel))
        inputs = _inputs(module, len(names))
        of_scale = tuple("blocks" if inside else name for name, inside in zip(names, inputs, strict=True))
        for name, made, dims in (("kernel", None, ()), ("kernel_q", q, names), ("kernel_scale", scale, of_scale)):
            setattr(module, name, nnx.data(None if made is None else nnx.Param(made, axes=dims[1:])))
            if made is not None:
                shapes[f"{path}/{name}"], axes[f"{path}/{name}"] = made, dims
        module.quantized = DEQUANTIZE[kind]
    return replace(decoder, graph=nnx.split(model)[0], shapes=unflatten(shapes), axes=axes)


def _inputs(module: Adaptable, dims: int) -> list[bool]:
    """Which dims of the stacked kernel are inputs."""
    return [input_start(module) <= dim < input_stop(module) for dim in range(dims)]


def _quantize_layers(module: Adaptable, kind: Kind, kernels: Float[Array, "L ..."]) -> tuple[Array, Array]:
    """One layer after another: in between it takes several times the room."""
    return jax.lax.map(lambda kernel: _quantize(kernel, module, kind), kernels)


def _quantize(kernel: Float[Array, "..."], module: Adaptable, kind: Kind) -> tuple[Array, Array]:
    import qwix  # an extra, and slow to import

    inputs = [dim for dim, inside in enumerate(_inputs(module, kernel.ndim + 1)[1:]) if inside]
    own = [dim for dim in range(kernel.ndim) if dim not in inputs]
    tiles = {}
    if kind == "nf4":
        *outer, last = inputs
        own += outer
        tiles = {last: BLOCK if kernel.shape[last] % BLOCK == 0 else kernel.shape[last]}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        made = qwix.quantize(
            kernel.astype(jnp.float32),
            jnp.int8 if kind == "int8" else "nf4",
            channelwise_axes=own,
            tiled_axes=tiles,
            scale_dtype=kernel.dtype,
        )
    return made.qvalue, made.scale


def _dequantize(values: Shaped[Array, "..."], scale: Float[Array, "..."], qtype: Any) -> Float[Array, "..."]:
    import qwix

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return qwix.dequantize(qwix.QArray(values, scale, None, qtype))


def _from_int8(values: Shaped[Array, "..."], scale: Float[Array, "..."]) -> Float[Array, "..."]:
    return _dequantize(values, scale, jnp.int8)


def _from_nf4(values: Shaped[Array, "..."], scale: Float[Array, "..."]) -> Float[Array, "..."]:
    return _dequantize(values, scale, "nf4")


DEQUANTIZE: dict[Kind, Callable[[Array, Array], Array]] = {"int8": _from_int8, "nf4": _from_nf4}
