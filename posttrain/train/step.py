"""The one train step: totals, accumulate, update; and its gradient-free twin for held-out loss.

The loss is `sum_k coefficient_k * sum_k / total_k`, with every total taken over the whole global batch first, so that
micro-batches, packing and the mesh cannot change it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from posttrain.models.decoder import STACK, AbstractDecoder, Decoder
from posttrain.models.gradient_sum import GradientSum
from posttrain.models.lora import Dropout
from posttrain.parallel.sharding import flatten, unflatten
from posttrain.records import Batch, Metric, Metrics, Objective, Params, Scalars, Statistics, TrainState
from posttrain.train.optim import Optimizer, gradient_norm


@dataclass(frozen=True)
class LossSums:
    """How a batch `[A, B, T]` becomes loss terms; shared by training, held-out loss and `evaluate`."""

    decoder: AbstractDecoder
    objective: Objective
    compute_dtype: Any
    dropout: Dropout | None = None
    """Of an adapter, while training; nothing else looks at it."""

    def totals(self, batch: Batch) -> Scalars:
        """Every term's denominator over all accumulation steps."""
        return jax.tree.map(jnp.sum, jax.vmap(self.objective.weights)(batch))

    def statistics(self, params: Params, batch: Batch, key: Array | None = None) -> dict[str, Metric]:
        """What the terms must know of the whole batch: a forward pass of its own, without gradient."""
        compute = cast(params, self.compute_dtype)

        def of_micro(_: None, numbered: tuple[Batch, Array]) -> tuple[None, dict[str, Metric]]:
            micro, rows = numbered
            return None, self.objective.statistics(self._model(compute, key, rows), micro)

        _, stacked = jax.lax.scan(of_micro, None, (batch, _row_numbers(batch)))
        return {name: metric.over_micro_batches() for name, metric in stacked.items()}

    def _model(
        self, params: Params, key: Array | None, rows: Int[Array, " B"], gradient_sum: GradientSum | None = None
    ) -> Decoder:
        """The model of these rows of the global batch; with a key, what dropout makes of it."""
        if key is None or self.dropout is None:
            return self.decoder.merge(params, gradient_sum)
        return self.dropout.decoder.merge(merge(params, self.dropout.keys(key, rows)), gradient_sum)

    def loss(
        self, model: Decoder, micro: Batch, totals: Scalars, statistics: Statistics | None
    ) -> tuple[Float[Array, ""], tuple[Any, Any]]:
        """This micro-batch's share of the loss, with the terms' sums and metrics."""
        sums, metrics = self.objective.terms(model, micro, statistics)
        shares = [self.objective.coefficients[name] * _divide(value, totals[name]) for name, value in sums.items()]
        return jnp.sum(jnp.stack(shares)), (sums, metrics)

    def sums(self, params: Params, batch: Batch, statistics: Statistics) -> tuple[Scalars, Metrics]:
        """Terms' sums and metrics of a batch, without gradients."""
        compute = cast(params, self.compute_dtype)

        def micro_sums(_: None, micro: Batch) -> tuple[None, tuple[Any, Any]]:
            return None, self.objective.terms(self.decoder.merge(compute), micro, statistics)

        _, stacked = jax.lax.scan(micro_sums, None, batch)
        return _over_micro_batches(stacked)

    def gradients(
        self,
        trained: Params,
        frozen: Params,
        batch: Batch,
        totals: Scalars,
        statistics: Statistics | None = None,
        key: Array | None = None,
    ) -> tuple[Params, Scalars, Metrics]:
        """Gradient of the loss, of several accumulation steps in f32, of a single one in the compute dtype; with sums
        and metrics. Without `statistics` the batch is all that they are taken over; without a key nothing is dropped.

        Over several steps the layers' gradients are added up as they are made (`models/gradient_sum.py`): beside the
        sum only those of one layer and of what is no layer exist.
        """
        compute, rest = cast(trained, self.compute_dtype), cast(frozen, self.compute_dtype)
        if statistics is None and self.objective.needs_statistics and batch.tokens.shape[0] > 1:
            found = self.statistics(merge(trained, frozen), batch, key)
            statistics = {name: metric.value() for name, metric in found.items()}

        def gradient(
            free: Params, fixed: Params, before: GradientSum, numbered: tuple[Batch, Array]
        ) -> tuple[Params, GradientSum, Any]:
            """Of the `free` parameters; and `before` with that of the layers it has added."""
            micro, rows = numbered

            def loss(free: Params, before: GradientSum) -> tuple[tuple[Array, GradientSum], Any]:
                model = self._model(merge(free, fixed), key, rows, before)
                value, aux = self.loss(model, micro, totals, statistics)
                return (value, model.gradient_sum), aux

            (value, _), pull_back, aux = jax.vjp(loss, free, before, has_aux=True)
            return *pull_back((jnp.ones_like(value), before)), aux

        numbered = (batch, _row_numbers(batch))
        if batch.tokens.shape[0] == 1:
            whole, _, aux = gradient(compute, rest, {}, jax.tree.map(lambda x: x[0], numbered))
            return whole, *_over_micro_batches(jax.tree.map(lambda x: x[None], aux))
        layers, others = _split_stack(compute)
        fixed = merge(unflatten(layers), rest)

        def accumulate(total: tuple[Params, GradientSum], numbered: tuple[Batch, Array]) -> tuple[Any, Any]:
            part, of_layers, aux = gradient(others, fixed, total[1], numbered)
            return (jax.tree.map(lambda t, p: t + p.astype(jnp.float32), total[0], part), of_layers), aux

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), (others, layers))
        (of_others, of_layers), stacked = jax.lax.scan(accumulate, zeros, numbered)
        return merge(of_others, unflatten(of_layers)), *_over_micro_batches(stacked)


def _split_stack(params: Params) -> tuple[dict[str, Array], Params]:
    """(the layers' parameters by path, the others)."""
    leaves = flatten(params)
    stacked = {path: leaf for path, leaf in leaves.items() if path.startswith(STACK)}
    return stacked, unflatten({path: leaf for path, leaf in leaves.items() if path not in stacked})


def cast(params: Params, dtype: Any) -> Params:
    """Floating-point parameters in the compute dtype."""
    return jax.tree.map(lambda p: p.astype(dtype) if jnp.issubdtype(p.dtype, jnp.floating) else p, params)


def merge(trained: Params, frozen: Params) -> Params:
    """One nested dict of both."""
    return unflatten(flatten(trained) | flatten(frozen))


def _row_numbers(batch: Batch) -> Int[Array, "A B"]:
    A, B = batch.tokens.shape[:2]
    return jnp.arange(A * B, dtype=jnp.int32).reshape(A, B)


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
        key = None if loss.dropout is None else jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        gradients, sums, metrics = loss.gradients(trained, frozen, batch, totals, key=key)
        gradients = optimizer.mask_frozen(gradients)
        logged = report(loss.objective, sums, totals, metrics)
        norm = gradient_norm(gradients)
        finite = jnp.isfinite(norm) & jnp.isfinite(logged["loss"])
        learning_rate = optimizer.schedule(state.step)
        updated, opt_state = optimizer.update(gradients, state.opt_state, trained, learning_rate, finite)
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


def make_eval_step(loss: LossSums) -> Callable[[Params, Batch, Statistics], tuple[Scalars, Scalars, Metrics]]:
    """`(params, batch [A, B, T], statistics) -> (sums, totals, metrics)`, to be added up over batches by the caller."""

    def eval_step(params: Params, batch: Batch, statistics: Statistics) -> tuple[Scalars, Scalars, Metrics]:
        sums, metrics = loss.sums(params, batch, statistics)
        return sums, loss.totals(batch), metrics

    return eval_step


def make_gradient_step(
    loss: LossSums, split: Callable[[Params], tuple[Params, Params]] = lambda params: (params, {})
) -> Callable[[Params, Batch, Scalars, Statistics | None], tuple[Params, Scalars, Metrics]]:
    """`(params, batch, totals, statistics) -> (f32 gradients, sums, metrics)`, where totals and statistics may span
    several batches. `split` says which parameters have a gradient."""

    def gradient_step(
        params: Params, batch: Batch, totals: Scalars, statistics: Statistics | None
    ) -> tuple[Params, Scalars, Metrics]:
        gradients, sums, metrics = loss.gradients(*split(params), batch, totals, statistics)
        return _widen(gradients), sums, metrics

    return gradient_step
