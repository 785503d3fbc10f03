"""The one train step: totals, accumulate, update; and its gradient-free twin for held-out loss.

The loss is `sum_k coefficient_k * sum_k / total_k`, with every total taken over the whole global batch first, so that
micro-batches, packing and the mesh cannot change it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from posttrain.models.decoder import AbstractDecoder
from posttrain.parallel.sharding import flatten, unflatten
from posttrain.records import Batch, Metric, Metrics, Objective, Params, Scalars, TrainState
from posttrain.train.optim import Optimizer


@dataclass(frozen=True)
class LossSums:
    """How a batch `[A, B, T]` becomes loss terms; shared by training, held-out loss and `evaluate`."""

    decoder: AbstractDecoder
    objective: Objective
    compute_dtype: Any

    def totals(self, batch: Batch) -> Scalars:
        """Every term's denominator over all accumulation steps."""
        return jax.tree.map(jnp.sum, jax.vmap(self.objective.weights)(batch))

    def statistics(self, params: Params, batch: Batch) -> dict[str, Metric]:
        """What the terms must know of the whole batch: a forward pass of its own, without gradient."""
        compute = self.cast(params)

        def of_micro(_: None, micro: Batch) -> tuple[None, dict[str, Metric]]:
            return None, self.objective.statistics(self.decoder.merge(compute), micro)

        _, stacked = jax.lax.scan(of_micro, None, batch)
        return {name: metric.over_micro_batches() for name, metric in stacked.items()}

    def loss(
        self, params: Params, micro: Batch, totals: Scalars, statistics: Scalars | None
    ) -> tuple[Float[Array, ""], tuple[Any, Any]]:
        """This micro-batch's share of the loss, with the terms' sums and metrics."""
        model = self.decoder.merge(params)
        sums, metrics = self.objective.terms(model, micro, statistics)
        shares = [self.objective.coefficients[name] * _divide(value, totals[name]) for name, value in sums.items()]
        return jnp.sum(jnp.stack(shares)), (sums, metrics)

    def cast(self, params: Params) -> Params:
        """Parameters in the compute dtype."""
        return jax.tree.map(lambda p: p.astype(self.compute_dtype), params)

    def sums(self, params: Params, batch: Batch, statistics: Scalars) -> tuple[Scalars, Metrics]:
        """Terms' sums and metrics of a batch, without gradients."""
        compute = self.cast(params)

        def micro_sums(_: None, micro: Batch) -> tuple[None, tuple[Any, Any]]:
            return None, self.objective.terms(self.decoder.merge(compute), micro, statistics)

        _, stacked = jax.lax.scan(micro_sums, None, batch)
        return _over_micro_batches(stacked)

    def gradients(
        self, trained: Params, frozen: Params, batch: Batch, totals: Scalars, statistics: Scalars | None
    ) -> tuple[Params, Scalars, Metrics]:
        """Gradient of the loss in f32, added up over the accumulation steps in one buffer, with sums and metrics.
        Without `statistics` the batch is all that they are taken over."""
        compute, rest = self.cast(trained), self.cast(frozen)
        if statistics is None and self.objective.needs_statistics and batch.tokens.shape[0] > 1:
            found = self.statistics(merge(trained, frozen), batch)
            statistics = {name: metric.value() for name, metric in found.items()}

        def loss(trained: Params, micro: Batch) -> tuple[Float[Array, ""], tuple[Any, Any]]:
            return self.loss(merge(trained, rest), micro, totals, statistics)

        gradient = jax.grad(loss, has_aux=True)
        if batch.tokens.shape[0] == 1:
            total, aux = gradient(compute, jax.tree.map(lambda x: x[0], batch))
            aux = jax.tree.map(lambda x: x[None], aux)
            return _widen(total), *_over_micro_batches(aux)

        def accumulate(total: Params, micro: Batch) -> tuple[Params, Any]:
            part, aux = gradient(compute, micro)
            return jax.tree.map(lambda t, p: t + p.astype(jnp.float32), total, part), aux

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), trained)
        total, stacked = jax.lax.scan(accumulate, zeros, batch)
        return total, *_over_micro_batches(stacked)


def merge(trained: Params, frozen: Params) -> Params:
    """One nested dict of both."""
    return unflatten(flatten(trained) | flatten(frozen))


def _widen(tree: Params) -> Params:
    return jax.tree.map(lambda g: g.astype(jnp.float32), tree)


def _divide(value: Float[Array, ""], total: Float[Array, ""]) -> Float[Array, ""]:
    """A batch without weight has loss 0 and gradient 0, not NaN."""
    return jnp.where(total > 0, value / jnp.where(total > 0, total, 1.0), 0.0)


def _over_micro_batches(stacked: tuple[dict[str, Float[Array, "A"]], Metrics]) -> tuple[Scalars, Metrics]:
    sums, metrics = stacked
    return jax.tree.map(jnp.sum, sums), {name: metric.over_micro_batches() for name, metric in metrics.items()}


def report(objective: Objective, sums: Scalars, totals: Scalars, metrics: Metrics) -> Scalars:
    """What to log of one batch: `loss`, each term if there are several, and the metrics' values."""
    terms = {name: _divide(value, totals[name]) for name, value in sums.items()}
    loss = jnp.sum(jnp.stack([objective.coefficients[name] * value for name, value in terms.items()]))
    named = {f"loss/{name}": value for name, value in terms.items()} if len(terms) > 1 else {}
    return {"loss": loss} | named | {name: metric.value() for name, metric in metrics.items()}


def make_train_step(loss: LossSums, optimizer: Optimizer) -> Callable[[TrainState, Batch], tuple[TrainState, Scalars]]:
    """`(state, batch [A, B, T]) -> (state, logged values)`, to be jitted with the state donated.

    A step whose loss or gradient norm is not finite leaves the parameters and the optimizer as they were; the logged
    `finite` tells. `num_tokens` counts the real tokens of this batch.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Scalars]:
        totals = loss.totals(batch)
        trained, frozen = optimizer.split(state.params)
        gradients, sums, metrics = loss.gradients(trained, frozen, batch, totals, None)
        gradients = optimizer.mask_frozen(gradients)
        logged = report(loss.objective, sums, totals, metrics)
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(norm) & jnp.isfinite(logged["loss"])
        learning_rate = optimizer.schedule(state.step)
        updated, opt_state = optimizer.update(gradients, state.opt_state, trained, learning_rate)
        updated, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (updated, opt_state), (trained, state.opt_state)
        )
        logged |= {
            "grad_norm": norm,
            "learning_rate": learning_rate,
            "num_tokens": jnp.sum((batch.segment_ids > 0).astype(jnp.float32)),
            "trained_tokens": jnp.sum((batch.loss_weights > 0).astype(jnp.float32)),
            "finite": finite.astype(jnp.float32),
        }
        new_state = TrainState(merge(updated, frozen), opt_state, state.step + 1, state.key)
        return new_state, logged

    return train_step


def make_eval_step(loss: LossSums) -> Callable[[Params, Batch, Scalars], tuple[Scalars, Scalars, Metrics]]:
    """`(params, batch [A, B, T], statistics) -> (sums, totals, metrics)`, to be added up over batches by the caller."""

    def eval_step(params: Params, batch: Batch, statistics: Scalars) -> tuple[Scalars, Scalars, Metrics]:
        sums, metrics = loss.sums(params, batch, statistics)
        return sums, loss.totals(batch), metrics

    return eval_step


def make_gradient_step(
    loss: LossSums,
) -> Callable[[Params, Batch, Scalars, Scalars | None], tuple[Params, Scalars, Metrics]]:
    """`(params, batch, totals, statistics) -> (gradients, sums, metrics)`, the second and third of which may span
    several batches."""

    def gradient_step(
        params: Params, batch: Batch, totals: Scalars, statistics: Scalars | None
    ) -> tuple[Params, Scalars, Metrics]:
        return loss.gradients(params, {}, batch, totals, statistics)

    return gradient_step
