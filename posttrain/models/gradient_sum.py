"""Adding the layers' gradients to a sum as the backward pass makes them: `decoder.py` sends every layer's parameters
through `tap`, `train/step.py` starts the sum and takes it out.

The gradient of stacked layers is as large as their weights. Accumulated over micro-batches it would be there twice,
what is added beside the sum. So the sum itself runs through the backward pass, as the cotangent of a value that the
forward pass hands from layer to layer and never looks at. Behind the last layer it is what was summed before; each
layer, from the last to the first, adds its own gradient in its place; in front of the first it is the new sum. That
holds however often a loss runs the layers: they add to one sum one after another.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int

GradientSum = dict[str, Float32[Array, "L ..."]]
"""By path, of the stacked parameters that are trained."""


def tap(leaves: dict[str, Any], total: GradientSum, layer: Int[Array, ""]) -> tuple[dict[str, Any], GradientSum]:
    """Both as they are. On the way back the cotangents of this layer's `leaves` (by path) are added to those of
    `total`, and end there: by a leaf that `total` has, no loss can be differentiated otherwise."""
    tapped, total = _tap({path: leaves[path] for path in total}, total, layer)
    return leaves | tapped, total


@jax.custom_vjp
def _tap(leaves: dict[str, Array], total: GradientSum, layer: Array) -> tuple[dict[str, Array], GradientSum]:
    return leaves, total


def _tap_forward(leaves: dict[str, Array], total: GradientSum, layer: Array) -> tuple[tuple[Any, Any], Array]:
    return (leaves, total), layer


def _tap_backward(layer: Array, cotangents: tuple[dict[str, Array], GradientSum]) -> tuple[None, GradientSum, None]:
    gradients, total = cotangents

    def add(total: Array, gradient: Array) -> Array:
        # A slice of one layer, not a layer: else the TPU compiler copies it out of the sum before it adds to it.
        own = jax.lax.dynamic_slice_in_dim(total, layer, 1) + gradient.astype(jnp.float32)[None]
        return jax.lax.dynamic_update_slice_in_dim(total, own, layer, 0)

    return None, jax.tree.map(add, total, gradients), None


_tap.defvjp(_tap_forward, _tap_backward)
