"""Objectives of single answers that are labelled good or bad: what KTO and its kin need of a batch.

As in `pairs.py` the loss itself is a pure function, here of `LabelledLogps`. KTO's point of reference, the mean
log-ratio of answers to other prompts, is a statistic of the whole batch without gradient: where a batch is accumulated
in parts it is taken over all of them first.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from posttrain.objectives.logps import TokenStats, batch_stats
from posttrain.objectives.pairs import masked_mean, segment_sums
from posttrain.records import Batch, Difference, Head, LabelledLogps, Metric, Metrics, Model, Scalars, Statistics

LabelledLoss = Callable[[LabelledLogps], Float32[Array, " P"]]
"""The loss of each answer."""


class LabelledObjective:
    """The mean of a loss over all labelled answers of the global batch."""

    rows: Literal["single", "pairs", "labelled"] = "labelled"
    head: Head = "lm"
    needs_reference: bool = True
    whole_batch: bool = False

    def __init__(self, name: str, loss: LabelledLoss, *, mismatched: bool, reward_scale: float):
        """`mismatched`: the loss asks for `LabelledLogps.kl`. `reward_scale` is what log-ratios are multiplied with to
        be logged as rewards: the loss's beta."""
        self.mismatched = self.needs_statistics = mismatched
        self._name, self._loss, self._scale = name, loss, reward_scale
        self.coefficients: Mapping[str, float] = MappingProxyType({name: 1.0})

    def weights(self, batch: Batch) -> Scalars:
        return {self._name: jnp.sum((jnp.abs(batch.sides) == 1).astype(jnp.float32))}

    def statistics(self, model: Model, batch: Batch) -> dict[str, Metric]:
        if not self.mismatched:
            return {}
        other = ~self._own(batch) & (jnp.asarray(batch.loss_weights) > 0)
        return self._kl(batch, batch_stats(model, batch, needed=other))

    def terms(self, model: Model, batch: Batch, statistics: Statistics | None = None) -> tuple[Scalars, Metrics]:
        trained = jnp.asarray(batch.loss_weights) > 0
        needed = trained if statistics is None else trained & self._own(batch)
        stats = batch_stats(model, batch, needed=needed)
        if statistics is None:
            statistics = {name: metric.value() for name, metric in self._kl(batch, stats).items()}
        drift = jnp.maximum(jax.lax.stop_gradient(statistics["kl"] if self.mismatched else jnp.float32(0.0)), 0.0)
        answers = self._answers(batch, stats, drift)
        losses = jnp.where(answers.labels != 0, self._loss(answers), 0.0)
        return {self._name: jnp.sum(losses)}, self._metrics(batch, answers, stats, trained & self._own(batch))

    def _kl(self, batch: Batch, stats: TokenStats) -> dict[str, Metric]:
        """The mean log-ratio of the answers to other prompts."""
        if not self.mismatched:
            return {}
        ratios = jnp.asarray(batch.loss_weights) * (stats.logps - jnp.asarray(batch.ref_logps))
        count = jnp.sum((jnp.asarray(batch.sides) == 2).astype(jnp.float32))
        return {"kl": Metric(jnp.sum(jnp.where(self._own(batch), 0.0, ratios)), count)}

    def _own(self, batch: Batch) -> Bool[Array, "B T"]:
        """Which tokens belong to an answer to its own prompt: with mismatched ones behind them, the odd segments."""
        ids = jnp.asarray(batch.segment_ids)
        return ids % 2 == 1 if self.mismatched else ids > 0

    def _answers(self, batch: Batch, stats: TokenStats, drift: Float[Array, ""]) -> LabelledLogps:
        """`P` is `B * S`, or half of it where every second segment is a mismatched one."""
        weights, slots = jnp.asarray(batch.loss_weights), batch.sides.shape[-1]
        ids, every = jnp.asarray(batch.segment_ids), 2 if self.mismatched else 1

        def sums(values: Float[Array, "B T"]) -> Float[Array, "P"]:
            return segment_sums(values, ids, slots)[:, ::every].reshape(-1)

        return LabelledLogps(
            logps=sums(weights * stats.logps),
            ref_logps=sums(weights * jnp.asarray(batch.ref_logps)),
            tokens=jnp.maximum(sums((weights > 0).astype(jnp.float32)), 1.0),
            labels=jnp.asarray(batch.sides)[:, ::every].astype(jnp.float32).reshape(-1),
            kl=drift,
        )

    def _metrics(self, batch: Batch, answers: LabelledLogps, stats: TokenStats, trained: Bool[Array, "B T"]) -> Metrics:
        """With TRL's names: chosen are the desirable answers."""
        answers = jax.lax.stop_gradient(answers)
        rewards = self._scale * (answers.logps - answers.ref_logps)
        chosen = jnp.repeat(answers.labels.reshape(batch.sides.shape[0], -1), 2 if self.mismatched else 1, axis=1) == 1
        segments = jnp.maximum(jnp.asarray(batch.segment_ids) - 1, 0)
        of_chosen = jnp.take_along_axis(chosen, segments, axis=1) & trained
        metrics: Metrics = {
            "logits/chosen": masked_mean(stats.mean_logit, of_chosen),
            "logits/rejected": masked_mean(stats.mean_logit, trained & ~of_chosen),
            "entropy": masked_mean(stats.entropy, trained),
        }
        means: dict[str, Metric] = {}
        for side, label in (("chosen", 1.0), ("rejected", -1.0)):
            there = (answers.labels == label).astype(jnp.float32)
            means[f"rewards/{side}"] = Metric(jnp.sum(there * rewards), jnp.sum(there))
            means[f"logps/{side}"] = Metric(jnp.sum(there * answers.logps), jnp.sum(there))
        metrics |= means
        metrics["rewards/margins"] = Difference(means["rewards/chosen"], means["rewards/rejected"])
        if self.mismatched:
            metrics["kl"] = Metric(answers.kl, jnp.float32(1.0))
        return metrics
