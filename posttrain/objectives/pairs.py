"""Objectives that compare two answers to one prompt: what a preference loss of `preference.py` needs of a batch.

The loss itself is a pure function of `PairLogps` (or `PolicyPairs`); here the tokens' log-probabilities become those of
answers, the pairs' losses become terms, and what is logged gets the names of TRL's trainers.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from posttrain.objectives.logps import batch_stats
from posttrain.records import Batch, Head, Metric, Metrics, Model, PairLogps, PolicyPairs, Scalars, Statistics

PairLoss = Callable[[Any], Float[Array, "P"]]
"""The loss of each pair; takes `PairLogps` or `PolicyPairs`."""


class PreferenceObjective:
    """A weighted sum of losses, each a mean over all pairs of the global batch; with `sft_weight`, plus that many times
    the negative log-likelihood of the chosen answers, averaged over their tokens."""

    rows: Literal["single", "pairs", "labelled"] = "pairs"
    mismatched: bool = False
    head: Head = "lm"
    needs_statistics: bool = False

    def __init__(
        self,
        losses: Mapping[str, PairLoss],
        loss_weights: Mapping[str, float],
        *,
        needs_reference: bool,
        whole_batch: bool,
        reward_scale: float,
        sft_weight: float = 0.0,
    ):
        """`reward_scale` is what log-ratios are multiplied with to be logged as rewards: the losses' beta."""
        self.needs_reference, self.whole_batch = needs_reference, whole_batch
        self._losses, self._scale = losses, reward_scale
        terms = {name: loss_weights[name] for name in losses} | ({"sft": sft_weight} if sft_weight else {})
        self.coefficients: Mapping[str, float] = MappingProxyType(terms)

    def weights(self, batch: Batch) -> Scalars:
        weights = dict.fromkeys(self._losses, jnp.sum((batch.sides == 1).astype(jnp.float32)))
        if "sft" in self.coefficients:
            weights["sft"] = jnp.sum(jnp.where(_is_chosen(batch), jnp.asarray(batch.loss_weights), 0.0))
        return weights

    def statistics(self, model: Model, batch: Batch) -> dict[str, Metric]:
        return {}

    def terms(self, model: Model, batch: Batch, statistics: Statistics | None = None) -> tuple[Scalars, Metrics]:
        weights = jnp.asarray(batch.loss_weights)
        trained = weights > 0
        stats = batch_stats(model, batch, needed=trained)
        pairs = pairs_of(batch, stats.logps)
        terms = {name: jnp.sum(jnp.where(pairs.present > 0, loss(pairs), 0.0)) for name, loss in self._losses.items()}
        if "sft" in self.coefficients:
            terms["sft"] = -jnp.sum(jnp.where(_is_chosen(batch), weights * stats.logps, 0.0))
        chosen = _is_chosen(batch) & trained
        rejected = trained & ~chosen
        metrics: Metrics = {
            **self._pair_metrics(pairs),
            "logits/chosen": masked_mean(stats.mean_logit, chosen),
            "logits/rejected": masked_mean(stats.mean_logit, rejected),
            "entropy": masked_mean(stats.entropy, trained),
            "mean_token_accuracy": masked_mean(stats.correct, chosen),
        }
        return terms, metrics

    def _pair_metrics(self, pairs: PolicyPairs) -> dict[str, Metric]:
        """Means over pairs."""
        chosen, rejected = jax.lax.stop_gradient((pairs.chosen, pairs.rejected))
        rewards = (chosen, rejected)
        if isinstance(pairs, PairLogps):
            rewards = (chosen - pairs.ref_chosen, rejected - pairs.ref_rejected)
        better, worse = (self._scale * reward for reward in rewards)
        values = {
            "logps/chosen": chosen,
            "logps/rejected": rejected,
            "rewards/chosen": better,
            "rewards/rejected": worse,
            "rewards/margins": better - worse,
            "rewards/accuracies": (better > worse).astype(jnp.float32),
        }
        return {name: Metric(jnp.sum(value * pairs.present), jnp.sum(pairs.present)) for name, value in values.items()}


def pairs_of(batch: Batch, logps: Float[Array, "B T"]) -> PolicyPairs:
    """The answers' log-probabilities from those of the tokens; `PairLogps` where the batch has a reference's. `P` is
    `B * S / 2`: every two places of a row's segments."""
    weights, slots = jnp.asarray(batch.loss_weights), batch.sides.shape[-1]
    ids = jnp.asarray(batch.segment_ids)

    def sides(values: Float[Array, "B T"]) -> tuple[Float[Array, "P"], Float[Array, "P"]]:
        sums = segment_sums(values, ids, slots)
        return sums[:, 0::2].reshape(-1), sums[:, 1::2].reshape(-1)

    chosen, rejected = sides(weights * logps)
    chosen_tokens, rejected_tokens = sides((weights > 0).astype(jnp.float32))
    fields = {
        "chosen": chosen,
        "rejected": rejected,
        "chosen_tokens": jnp.maximum(chosen_tokens, 1.0),
        "rejected_tokens": jnp.maximum(rejected_tokens, 1.0),
        "margins": jnp.asarray(batch.margins)[:, 0::2].reshape(-1),
        "present": (batch.sides[:, 0::2] == 1).astype(jnp.float32).reshape(-1),
    }
    if batch.ref_logps is None:
        return PolicyPairs(**fields)
    ref_chosen, ref_rejected = sides(weights * jnp.asarray(batch.ref_logps))
    return PairLogps(**fields, ref_chosen=ref_chosen, ref_rejected=ref_rejected)


def segment_sums(values: Float[Array, "B T"], ids: Int[Array, "B T"], slots: int) -> Float[Array, "B S"]:
    """Sums over the tokens of each segment 1..S."""
    sums = jax.vmap(lambda row, of: jax.ops.segment_sum(row, of, num_segments=slots + 1))(values, ids)
    return sums[:, 1:]


def _is_chosen(batch: Batch) -> Any:
    """Bool `[B, T]`: which tokens belong to a chosen answer or its prompt. Those are the odd segments."""
    return jnp.asarray(batch.segment_ids) % 2 == 1


def masked_mean(values: Float[Array, "B T"], where: Bool[Array, "B T"]) -> Metric:
    """The mean of the values where it is true."""
    return Metric(jnp.sum(jnp.where(where, values, 0.0)), jnp.sum(where.astype(jnp.float32)))
