"""The pytrees that flow through every method, and the shape legend of the whole code base.

Shape legend: `B` rows, `T` tokens a row, `S` segments a row (key length in attention), `D` model width, `N` query
heads, `K` key/value heads, `H` head size, `F` MLP width, `V` vocabulary, `L` layers, `E` experts, `P` prompts or
pairs, `G` completions per prompt, `A` accumulation steps, `C` scores of a classifier. *axis* is said of the mesh,
*dim* of an array.
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
    """int32 `[*A, B, S]`, of preference rows: segment `s + 1` is a chosen or desirable answer (1), a rejected or
    undesirable one (-1), an answer to another prompt (2), or there is none (0). The rejected answer of a pair is the
    segment behind the chosen one, the mismatched answer that behind the labelled one."""
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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PairScores:
    """What a reward model says of pairs of answers: a loss of reward models is a function of this.

    Every field is f32 `[P]`. A place without a pair has `present` 0 and finite values.
    """

    chosen: Leaf
    rejected: Leaf
    margins: Leaf
    """By how much the chosen answer is better, where the data says so; else 0."""
    present: Leaf


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LabelledLogps:
    """What the model and the reference say of single answers that are labelled good or bad: a loss of unpaired
    preferences is a function of this.

    Every field but `kl` is f32 `[P]`; log-probabilities are sums over the trained tokens of an answer. A place without
    an answer has label 0 and finite values.
    """

    logps: Leaf
    ref_logps: Leaf
    tokens: Leaf
    """Trained tokens of the answer; at least 1."""
    labels: Leaf
    """1 desirable, -1 undesirable, 0 no answer."""
    kl: Leaf
    """f32 scalar without gradient, not below 0: the mean log-ratio of answers to other prompts, over the whole batch;
    0 for a loss that does not ask for it."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RouterStats:
    """What the routers of a mixture of experts did, summed over real tokens and layers; f32."""

    load: Leaf
    """`[E]`: how many times each expert was chosen."""
    probability: Leaf
    """`[E]`: of each expert, the softmax over all of them."""
    squared_lse: Leaf
    """Scalar: the squared log-sum-exp of the logits."""


Reduction = Literal["mean", "sum", "min", "max"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Metric:
    """A value that knows how it combines over micro-batches and steps. Only `mean` uses the weight."""

    total: Leaf
    """f32 scalar, or an array where the value is one (with a leading `A` where stacked over micro-batches)."""
    weight: Leaf
    """f32 scalar."""
    reduction: Reduction = field(metadata={"static": True}, default="mean")

    def over_micro_batches(self) -> "Metric":
        """The metric of the union of all micro-batches, from values stacked over them."""
        reduce = {"mean": jnp.sum, "sum": jnp.sum, "min": jnp.min, "max": jnp.max}[self.reduction]
        return Metric(reduce(self.total, axis=0), jnp.sum(self.weight), self.reduction)

    def plus(self, other: "Metric") -> "Metric":
        """The metric of both."""
        stacked = Metric(jnp.stack([self.total, other.total]), jnp.stack([self.weight, other.weight]), self.reduction)
        return stacked.over_micro_batches()

    def value(self) -> Float[Array, "..."]:
        """The number to log; 0 for a mean over nothing."""
        if self.reduction != "mean":
            return self.total
        return jnp.where(self.weight > 0, self.total / jnp.maximum(self.weight, 1e-30), 0.0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Difference:
    """The value of one metric less that of another: a difference of means over other places."""

    first: Metric
    second: Metric

    def over_micro_batches(self) -> "Difference":
        """As `Metric` does."""
        return Difference(self.first.over_micro_batches(), self.second.over_micro_batches())

    def plus(self, other: "Difference") -> "Difference":
        """As `Metric` does."""
        return Difference(self.first.plus(other.first), self.second.plus(other.second))

    def value(self) -> Float[Array, ""]:
        """The number to log."""
        return self.first.value() - self.second.value()


Metrics = dict[str, Metric | Difference]
Scalars = dict[str, Float[Array, ""]]
Statistics = dict[str, Float[Array, "..."]]
"""What terms must know of a whole batch, by name."""


Head = Literal["lm", "score"]


@runtime_checkable
class Model(Protocol):
    """What an objective sees of a model."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def logit_softcap(self) -> float | None:
        """What bounds logits: `cap * tanh(logits / cap)`; None: nothing does."""
        ...

    def hidden(self, batch: Batch) -> Float[Array, "B T D"]:
        """Final hidden states of packed rows."""
        ...

    def head(self) -> Float[Array, "V D"]:
        """The output embedding, with padded rows beyond `vocab_size`; of a language model."""
        ...

    def score_head(self) -> Float[Array, "1 D"]:
        """What hidden states are scored with; of a reward model."""
        ...


@runtime_checkable
class Objective(Protocol):
    """A loss: `sum_k coefficients[k] * terms[k] / weights[k]`, both summed over the global batch first."""

    @property
    def rows(self) -> Literal["single", "pairs", "labelled"]:
        """What it is trained on: single samples, pairs of answers to one prompt, or answers labelled good or bad."""
        ...

    @property
    def mismatched(self) -> bool:
        """Whether each labelled answer must bring its prompt with the answer to another."""
        ...

    @property
    def head(self) -> Head:
        """What it reads of the model beside hidden states: its token probabilities, or its score."""
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
    def needs_statistics(self) -> bool:
        """Whether its terms depend on a statistic of the whole batch, which `statistics` takes."""
        ...

    @property
    def coefficients(self) -> Mapping[str, float]: ...

    def weights(self, batch: Batch) -> Scalars:
        """Each term's denominator. Looks at data only."""
        ...

    def statistics(self, model: Model, batch: Batch) -> dict[str, Metric]:
        """A part's share of what the terms must know of the whole batch; taken without gradient. Empty for most."""
        ...

    def terms(self, model: Model, batch: Batch, statistics: Statistics | None = None) -> tuple[Scalars, Metrics]:
        """Each term's numerator, and what to log. `statistics` are the values of those of the whole batch; None where
        `batch` is the whole."""
        ...
