"""The pytrees that flow through every method, and the shape legend of the whole code base.

Shape legend: `B` rows, `T` tokens a row, `S` segments a row (key length in attention), `D` model width, `N` query
heads, `K` key/value heads, `H` head size, `F` MLP width, `V` vocabulary, `L` layers, `E` experts, `P` prompts, `G`
completions per prompt, `A` accumulation steps. *axis* is said of the mesh, *dim* of an array.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Params = dict[str, Any]
"""Nested dict of arrays, addressed by the joined path, e.g. `layers/attn/q/kernel`."""


Leaf = Any
"""A field of a pytree record: an array, but a tracer or placeholder inside transformations. Shapes stand beside it."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Packed rows. The leading dims are `B` or, for a train step, `A B`: accumulation steps, then the rows of one."""

    tokens: Leaf
    """int32 `[*A, B, T]`."""
    segment_ids: Leaf
    """int32 `[*A, B, T]`: 1.. within the row, 0 = padding; attention never crosses segments."""
    positions: Leaf
    """int32 `[*A, B, T]`: restart at 0 in every segment."""
    loss_weights: Leaf
    """f32 `[*A, B, T]`: weight of predicting *this* token from the ones before it in its segment; 0 = context."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that training changes."""

    params: Params
    opt_state: Any
    step: Leaf
    """int32 scalar: optimizer steps done."""
    key: Leaf
    """uint32 `[2]`: raw threefry key data, a plain array, so that every checkpoint format holds it."""


Reduction = Literal["mean", "sum", "min", "max"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Metric:
    """A value that knows how it combines over micro-batches and steps. Only `mean` uses the weight."""

    total: Leaf
    """f32 scalar (`[A]` where stacked over micro-batches)."""
    weight: Leaf
    reduction: Reduction = field(metadata={"static": True}, default="mean")

    def over_micro_batches(self) -> "Metric":
        """The metric of the union of all micro-batches, from values stacked over them."""
        reduce = {"mean": jnp.sum, "sum": jnp.sum, "min": jnp.min, "max": jnp.max}[self.reduction]
        return Metric(reduce(self.total), jnp.sum(self.weight), self.reduction)

    def value(self) -> Float[Array, ""]:
        """The number to log; 0 for a mean over nothing."""
        if self.reduction != "mean":
            return self.total
        return jnp.where(self.weight > 0, self.total / jnp.maximum(self.weight, 1e-30), 0.0)


@runtime_checkable
class Model(Protocol):
    """What an objective sees of a model."""

    @property
    def vocab_size(self) -> int: ...

    def hidden(self, batch: Batch) -> Float[Array, "B T D"]:
        """Final hidden states of packed rows."""
        ...

    def head(self) -> Float[Array, "V D"]:
        """The output embedding, with padded rows beyond `vocab_size`."""
        ...


@runtime_checkable
class Objective(Protocol):
    """A loss: `sum_k coefficients[k] * terms[k] / weights[k]`, both summed over the global batch first."""

    @property
    def coefficients(self) -> Mapping[str, float]: ...

    def weights(self, batch: Batch) -> dict[str, Float[Array, ""]]:
        """Each term's denominator. Looks at data only."""
        ...

    def terms(self, model: Model, batch: Batch) -> tuple[dict[str, Float[Array, ""]], dict[str, Metric]]:
        """Each term's numerator, and what to log."""
        ...
