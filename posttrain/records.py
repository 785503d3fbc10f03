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
    sides: Leaf = None
    """int32 `[*A, B, S]`, of preference rows: segment `s + 1` is a chosen answer (1), a rejected one (-1), or there is
    none (0). The rejected answer of a pair is the segment behind the chosen one."""
    margins: Leaf = None
    """f32 `[*A, B, S]`, of preference rows: by how much the chosen answer is better, at the chosen one."""
    ref_logps: Leaf = None
    """f32 `[*A, B, T]`: the reference model's log-probability of each token that is trained; 0 elsewhere."""


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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PolicyPairs:
    """What the model says of pairs of answers: a preference loss that takes no reference is a function of this.

    Every field is f32 `[P]`; log-probabilities are sums over the trained tokens of an answer. A place without a pair
    has `present` 0 and finite values.
    """

    chosen: Leaf
    rejected: Leaf
    chosen_tokens: Leaf
    """Trained tokens of the answer; at least 1."""
    rejected_tokens: Leaf
    margins: Leaf
    present: Leaf


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PairLogps(PolicyPairs):
    """The same, with the reference model's log-probabilities of the same answers."""

    ref_chosen: Leaf
    ref_rejected: Leaf


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
    def rows(self) -> Literal["single", "pairs"]:
        """What it is trained on: single samples, or pairs of answers to one prompt."""
        ...

    @property
    def needs_reference(self) -> bool:
        """Whether batches must hold a reference model's log-probabilities."""
        ...

    @property
    def whole_batch(self) -> bool:
        """Whether its terms are no sums over rows, so that a batch cannot be accumulated in parts."""
        ...

    @property
    def coefficients(self) -> Mapping[str, float]: ...

    def weights(self, batch: Batch) -> dict[str, Float[Array, ""]]:
        """Each term's denominator. Looks at data only."""
        ...

    def terms(self, model: Model, batch: Batch) -> tuple[dict[str, Float[Array, ""]], dict[str, Metric]]:
        """Each term's numerator, and what to log."""
        ...
