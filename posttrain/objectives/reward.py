"""Reward models: a score for each answer, trained on which of two answers to one prompt is the better one.

A loss is a pure function of `PairScores`, one loss a pair; as in `preference.py` its name and its keyword-only
parameters are what a config says, and a file of one's own may hold others. `RewardObjective` makes a batch into scores:
that of an answer is read at the last token of its segment, which is the end of the whole rendered conversation.

Process rewards (a score at the end of every step of an answer) would be another record beside `PairScores`, of scores
at given tokens with their labels, and a class beside `RewardObjective` that gathers those tokens; rankings of more than
two answers (Plackett-Luce) a record of scores `[groups, answers]`, from the same `segment_scores`.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32
from pydantic import Field

from posttrain.records import Batch, Head, Metric, Metrics, Model, PairScores, Scalars, Statistics

Centering = Annotated[
    float, Field(ge=0, description="How much the two scores of a pair are drawn to a sum of 0 (arXiv:2312.09244).")
]

ScoreLoss = Callable[[PairScores], Float32[Array, " P"]]


def reward(pairs: PairScores, *, center_rewards_coefficient: Centering = 0.0) -> Float32[Array, " P"]:
    """Bradley-Terry (arXiv:2204.05862; with margins m arXiv:2307.09288, eq. 2): with c and r the scores of the chosen
    and the rejected answer and s the logistic function, -log s(c - r - m) + center_rewards_coefficient (c + r)^2.

    Definition and names are those of TRL's RewardTrainer.
    """
    chosen, rejected, margins = jnp.asarray(pairs.chosen), jnp.asarray(pairs.rejected), jnp.asarray(pairs.margins)
    centering = center_rewards_coefficient * (chosen + rejected) ** 2
    return centering - jax.nn.log_sigmoid(chosen - rejected - margins)


class RewardObjective:
    """The mean of a loss over all pairs of the global batch."""

    rows: Literal["single", "pairs", "labelled"] = "pairs"
    mismatched: bool = False
    head: Head = "score"
    needs_reference: bool = False
    whole_batch: bool = False
    needs_statistics: bool = False
    coefficients: Mapping[str, float] = MappingProxyType({"reward": 1.0})

    def __init__(self, loss: ScoreLoss):
        self._loss = loss

    def weights(self, batch: Batch) -> Scalars:
        return {"reward": jnp.sum((batch.sides == 1).astype(jnp.float32))}

    def statistics(self, model: Model, batch: Batch) -> dict[str, Metric]:
        return {}

    def terms(self, model: Model, batch: Batch, statistics: Statistics | None = None) -> tuple[Scalars, Metrics]:
        pairs = pair_scores(model, batch)
        losses = jnp.where(pairs.present > 0, self._loss(pairs), 0.0)
        return {"reward": jnp.sum(losses)}, _metrics(jax.lax.stop_gradient(pairs))


def pair_scores(model: Model, batch: Batch) -> PairScores:
    """The scores of a batch's pairs. `P` is `B * S / 2`: every two places of a row's segments; where there is no pair
    scores are 0, without gradient."""
    scores = segment_scores(model, batch, batch.sides.shape[-1])
    present = jnp.asarray(batch.sides)[:, 0::2] == 1

    def side(first: int) -> Float32[Array, " P"]:
        return jnp.where(present, scores[:, first::2], 0.0).reshape(-1)

    margins = jnp.asarray(batch.margins)[:, 0::2].reshape(-1)
    return PairScores(side(0), side(1), margins, present.astype(jnp.float32).reshape(-1))


def segment_scores(model: Model, batch: Batch, slots: int) -> Float32[Array, "B S"]:
    """The score at the last token of each segment 1 to `slots`; a finite one where a row has no such segment."""
    ids = jnp.asarray(batch.segment_ids)
    tokens = jnp.arange(ids.shape[1], dtype=jnp.int32)
    inside = ids[:, None, :] == jnp.arange(1, slots + 1, dtype=ids.dtype)[None, :, None]
    last = jnp.max(jnp.where(inside, tokens[None, None, :], 0), axis=-1)
    hidden = jnp.take_along_axis(model.hidden(batch), last[:, :, None], axis=1)
    return jnp.einsum("bsd,cd->bsc", hidden, model.score_head(), preferred_element_type=jnp.float32)[..., 0]


def _metrics(pairs: PairScores) -> Metrics:
    """With TRL's names; a pair of equal scores is not counted as right."""
    there, count = pairs.present > 0, jnp.sum(pairs.present)
    low, high = jnp.minimum(pairs.chosen, pairs.rejected), jnp.maximum(pairs.chosen, pairs.rejected)
    right = (pairs.chosen > pairs.rejected).astype(jnp.float32)
    return {
        "accuracy": Metric(jnp.sum(right * pairs.present), count),
        "margin": Metric(jnp.sum((pairs.chosen - pairs.rejected) * pairs.present), count),
        "min_reward": Metric(jnp.min(jnp.where(there, low, jnp.inf)), count, "min"),
        "mean_reward": Metric(jnp.sum((pairs.chosen + pairs.rejected) * pairs.present), 2 * count),
        "max_reward": Metric(jnp.max(jnp.where(there, high, -jnp.inf)), count, "max"),
    }
