"""Products with weights that the mesh splits: gathered for the layer, their gradients reduced into their shards.

Every linear layer and the vocabulary pass come here. What moves over the wires is written out rather than left to the
compiler, which gathers a weight anew for every layout it reads it in, and sums a whole gradient on every device only to
keep a slice of it. In the terms of Rajbhandari et al. 2020 (ZeRO, stage 3): two gathers and one reduce-scatter.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Float

from posttrain.parallel.sharding import split_axes

Names = tuple[str, ...]
"""Logical names of dims (`parallel/sharding.py`)."""

_ACTIVATIONS = {"embed": "width"}
"""Dims of parameters that activations name otherwise, being split otherwise."""


def contract(x: Float[Array, "..."], weight: Float[Array, "..."], names: Names, count: int) -> Float[Array, "..."]:
    """`[..., *inputs] [*inputs, *outputs] -> [..., *outputs]` over `count` input dims; `names` are the weight's.

    With rows and tokens before the inputs (`[B, T, *inputs]`) the weight is gathered over the axes that do not split
    activations alike; remat keeps nothing of it. A single token each row, while text is generated, leaves the compiler
    to move the activations instead.
    """
    if x.ndim - count != 2 or x.shape[1] == 1:
        return _product(x, weight, count)
    return _contract(x, weight, names, count)


def _contract_primal(x: Array, weight: Array, names: Names, count: int) -> Array:
    return _contract_forward(x, weight, names, count)[0]


def _contract_forward(x: Array, weight: Array, names: Names, count: int) -> tuple[Array, tuple[Array, Array]]:
    whole = gather(weight, names)
    return _product(x, whole, count), (x, whole)


def _contract_backward(names: Names, count: int, residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, weight = residuals
    outputs = weight.ndim - count
    last = tuple(range(-outputs, 0))
    dx = _product(dy, weight, (last, last))
    return dx, weight_gradient(x, dy, names)


_contract = jax.custom_vjp(_contract_primal, nondiff_argnums=(2, 3))
_contract.defvjp(_contract_forward, _contract_backward)


def gather(weight: Float[Array, "..."], names: Names) -> Float[Array, "..."]:
    """The weight on every device that computes with it: split only as activations are. Named `gathered` for remat."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return weight
    axes = _axes(names, weight.shape, mesh)
    moved = [tuple(a for a in stored if a not in used) for stored, used in axes]

    def on_device(part: Array) -> Array:
        for dim, gathered in enumerate(moved):
            part = gather_shards(part, gathered, dim)
        return part

    # Not checked for replication: gathering over groups does not show it.
    whole = jax.shard_map(
        on_device,
        in_specs=PartitionSpec(*(stored or None for stored, _ in axes)),
        out_specs=PartitionSpec(*(tuple(a for a in stored if a in used) or None for stored, used in axes)),
        check_vma=False,
    )(weight)
    return checkpoint_name(whole, "gathered")


def weight_gradient(x: Float[Array, "B T ..."], dy: Float[Array, "B T ..."], names: Names) -> Float[Array, "..."]:
    """`[B, T, *inputs] [B, T, *outputs] -> [*inputs, *outputs]`, summed over all tokens of all devices.

    `names` are those of the result, which is placed as a parameter of these names is.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _outer(x, dy)
    count, shape = x.ndim - 2, (*x.shape[2:], *dy.shape[2:])
    axes = _axes(names, shape, mesh)
    summed = split_axes("rows", x.shape[0], mesh), split_axes("tokens", x.shape[1], mesh)
    used = [axes or None for _, axes in axes]

    def on_device(x: Array, dy: Array) -> Array:
        gradient, left = _outer(x, dy), [*summed[0], *summed[1]]
        for dim, (stored, used) in enumerate(axes):
            for axis in (a for a in stored if a not in used):
                if axis in left:
                    gradient = _reduce_scatter(gradient, axis, dim)
                    left.remove(axis)
                else:
                    size = gradient.shape[dim] // mesh.shape[axis]
                    gradient = lax.dynamic_slice_in_dim(gradient, lax.axis_index(axis) * size, size, dim)
        return lax.psum(gradient, tuple(left)) if left else gradient

    # Not checked for replication, which sums over part of an axis do not show.
    run = jax.shard_map(
        on_device,
        in_specs=(PartitionSpec(*summed, *used[:count]), PartitionSpec(*summed, *used[count:])),
        out_specs=PartitionSpec(*(stored or None for stored, _ in axes)),
        check_vma=False,
    )
    return run(x, dy)


def gather_shards(x: Float[Array, "..."], axes: Names, dim: int) -> Float[Array, "..."]:
    """Inside `shard_map`: the parts of `dim` that devices of the axes hold, the first axis outermost. Its transpose
    sums the gradient over them and splits it again."""
    for axis in reversed(axes):
        for groups in reversed(_stages(lax.axis_size(axis))):
            if len(groups[0]) > 1:
                x = lax.all_gather(x, axis, axis=dim, axis_index_groups=groups, tiled=True)
    return x


def _axes(names: Names, shape: Sequence[int], mesh: AbstractMesh) -> list[tuple[Names, Names]]:
    """Of each dim: the mesh axes that split it in a stored weight, and in activations."""

    def axes(name: str, size: int) -> Names:
        return split_axes(name, size, mesh)

    dims = zip(names, shape, strict=True)
    return [(axes(name, size), axes(_ACTIVATIONS.get(name, name), size)) for name, size in dims]


def _product(a: Array, b: Array, axes: int | tuple[tuple[int, ...], tuple[int, ...]]) -> Array:
    """`jnp.tensordot` in the dtype of both, added up in f32.

    Of bf16 on a mesh of CPUs the f32 result is asked for and rounded afterwards: for that alone XLA:CPU has kernels,
    which use a core's matrix units. For a bf16 result it widens the operands and multiplies in f32.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    wide = a.dtype == jnp.bfloat16 and device is not None and device.platform == "cpu"
    return jnp.tensordot(a, b, axes, preferred_element_type=jnp.float32 if wide else None).astype(a.dtype)


def _outer(x: Array, dy: Array) -> Array:
    """The sum over rows and tokens of the outer products.

    XLA:CPU writes the first factor out transposed, element by element, which can take longer than the product itself.
    So the smaller of the two comes first here, where JAX's own rule always takes `dy`.
    """
    if x.size <= dy.size:
        return _product(x, dy, ((0, 1), (0, 1)))
    gradient, outputs = _product(dy, x, ((0, 1), (0, 1))), dy.ndim - 2
    return gradient.transpose(*range(outputs, gradient.ndim), *range(outputs))


def _stages(size: int) -> tuple[list[list[int]], list[list[int]]]:
    """Groups of an axis's devices in two stages, each of about the square root of the axis: equally far apart, then
    side by side.

    Over an axis that winds through a torus of several dims at once TPU compilers write all-reduces, twice the bytes:
    for a reduce-scatter one of which each device keeps a slice, for an all-gather (from 64 devices on) one of the parts
    among zeros.
    """
    inner = next(n for n in range(math.isqrt(size), 0, -1) if size % n == 0)
    outer = size // inner
    apart = [[i * inner + j for i in range(outer)] for j in range(inner)]
    return apart, [[i * inner + j for j in range(inner)] for i in range(outer)]


def _reduce_scatter(x: Array, axis: str, dim: int) -> Array:
    """Sums `x` over the devices of an axis, each keeping its part of `dim`.

    The dim is moved to the front: slices of the last one that are narrower than 128 lanes come from an all-reduce too.
    """
    x = jnp.moveaxis(x, dim, 0)
    for groups in _stages(lax.axis_size(axis)):
        if len(groups[0]) > 1:
            x = lax.psum_scatter(x, axis, scatter_dimension=0, axis_index_groups=groups, tiled=True)
    return jnp.moveaxis(x, 0, dim)
