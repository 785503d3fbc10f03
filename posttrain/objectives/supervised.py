"""Objectives that imitate given tokens."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import jax.numpy as jnp

from posttrain.objectives.logps import batch_stats
from posttrain.records import Batch, Head, Metric, Metrics, Model, Objective, Scalars, Statistics


class _SupervisedFineTuning:
    """Negative log-likelihood of the trained tokens, averaged over the weights of the global batch."""

    coefficients: Mapping[str, float] = MappingProxyType({"nll": 1.0})
    rows: Literal["single", "pairs", "labelled"] = "single"
    mismatched: bool = False
    head: Head = "lm"
    needs_reference: bool = False
    whole_batch: bool = False
    needs_statistics: bool = False

    def weights(self, batch: Batch) -> Scalars:
        return {"nll": jnp.sum(batch.loss_weights)}

    def statistics(self, model: Model, batch: Batch) -> dict[str, Metric]:
        return {}

    def terms(self, model: Model, batch: Batch, statistics: Statistics | None = None) -> tuple[Scalars, Metrics]:
        weights = jnp.asarray(batch.loss_weights)
        trained = weights > 0
        stats = batch_stats(model, batch, needed=trained)
        count = jnp.sum(trained.astype(jnp.float32))
        metrics: Metrics = {
            "entropy": Metric(jnp.sum(stats.entropy), count),
            "mean_token_accuracy": Metric(jnp.sum(stats.correct), count),
        }
        return {"nll": -jnp.sum(weights * stats.logps)}, metrics


def sft() -> Objective:
    """Supervised fine-tuning: cross-entropy of the trained tokens."""
    return _SupervisedFineTuning()
