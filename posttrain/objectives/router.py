"""Losses of a mixture of experts' routers, beside whatever the objective is: `experiment.py` wraps it in them.

With f_e the mean number of times that a token chooses expert e, P_e the mean probability that the router gives e (both
over all real tokens and all layers together, as in transformers' `load_balancing_loss_func`), E experts:

- balance, `E * sum_e f_e P_e` (Switch Transformer, arXiv:2101.03961): num_experts_per_tok where all experts are used
  alike, more where not;
- z, the mean of `logsumexp(logits)^2` (ST-MoE, arXiv:2202.08906), which keeps logits small.

A product of two means is no sum over rows. But f_e has no gradient: given that of the whole batch, which the step takes
in a pass of its own where the batch is accumulated in parts, the balance is a plain sum over tokens.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from posttrain.config import ModelConfig
from posttrain.errors import UserErrors
from posttrain.models.architecture import DecoderConfig
from posttrain.records import Batch, Head, Metric, Metrics, Model, Objective, RouterStats, Scalars, Statistics

BALANCE, Z = "router_balance", "router_z"
LOAD = "router_load"


def add_router_losses(objective: Objective, config: ModelConfig, decoder: DecoderConfig) -> Objective:
    """The objective with the router losses that the config, or else the model, asks for. Raises `UserErrors` where it
    asks for those of a model without experts."""
    if decoder.moe is None:
        asked = {"router_aux_loss_coef": config.router_aux_loss_coef, "router_z_loss_coef": config.router_z_loss_coef}
        given = [f"model.{key} = {value}" for key, value in asked.items() if value]
        if given:
            raise UserErrors([f"{key}: this model has no experts; leave it out" for key in given])
        return objective
    own, z = decoder.moe.router_aux_loss_coef, config.router_z_loss_coef
    balance = own if config.router_aux_loss_coef is None else config.router_aux_loss_coef
    if not balance and not z:
        return objective
    return RouterLosses(objective, layers=decoder.num_hidden_layers, balance=balance, z=z)


@runtime_checkable
class RoutedModel(Model, Protocol):
    """A model that tells what its routers did."""

    def hidden_and_router(self, batch: Batch) -> tuple[Float[Array, "B T D"], RouterStats | None]:
        """Final hidden states, and the routers' statistics."""
        ...


class _Watched:
    """A model to an objective that knows nothing of routers; keeps what they did when it asks for hidden states."""

    def __init__(self, model: Model):
        if not isinstance(model, RoutedModel):
            raise ValueError(f"router losses of a model without routers: {type(model).__name__}")
        self._model = model
        self.vocab_size, self.logit_softcap = model.vocab_size, model.logit_softcap
        self._stats: RouterStats | None = None

    def hidden(self, batch: Batch) -> Float[Array, "B T D"]:
        hidden, self._stats = self._model.hidden_and_router(batch)
        return hidden

    def head(self) -> Float[Array, "V D"]:
        return self._model.head()

    def score_head(self) -> Float[Array, "1 D"]:
        return self._model.score_head()

    def stats(self, batch: Batch) -> RouterStats:
        """Of the pass over `batch` that the objective made, or else of one of its own."""
        stats = self._stats if self._stats is not None else self._model.hidden_and_router(batch)[1]
        if stats is None:
            raise ValueError("router losses of a model whose layers have no routers")
        return stats


class RouterLosses:
    """An objective with the routers' losses added to its terms."""

    def __init__(self, objective: Objective, *, layers: int, balance: float, z: float):
        """`layers` is how many have a router; `balance` and `z` are the coefficients, of which 0 leaves a loss out."""
        self._inner, self._layers = objective, layers
        self.rows: Literal["single", "pairs", "labelled"] = objective.rows
        self.mismatched = objective.mismatched
        self.head: Head = objective.head
        self.needs_reference, self.whole_batch = objective.needs_reference, objective.whole_batch
        self._own = {name: value for name, value in ((BALANCE, balance), (Z, z)) if value}
        self.needs_statistics = objective.needs_statistics or BALANCE in self._own
        self.coefficients: Mapping[str, float] = MappingProxyType({**objective.coefficients, **self._own})

    def weights(self, batch: Batch) -> Scalars:
        return {**self._inner.weights(batch), **dict.fromkeys(self._own, self._count(batch))}

    def statistics(self, model: Model, batch: Batch) -> dict[str, Metric]:
        watched = _Watched(model)
        found = self._inner.statistics(watched, batch)
        if BALANCE in self._own:
            found |= self._load(watched.stats(batch), batch)
        return found

    def terms(self, model: Model, batch: Batch, statistics: Statistics | None = None) -> tuple[Scalars, Metrics]:
        watched = _Watched(model)
        terms, metrics = self._inner.terms(watched, batch, statistics)
        stats = watched.stats(batch)
        if BALANCE in self._own:
            load = statistics[LOAD] if statistics else self._load(stats, batch)[LOAD].value()
            balance = len(load) * jnp.sum(jax.lax.stop_gradient(load) * stats.probability)
            terms = {**terms, BALANCE: balance}
            metrics = {**metrics, "aux_loss": Metric(balance, self._count(batch))}
        if Z in self._own:
            terms = {**terms, Z: stats.squared_lse}
        return terms, metrics

    def _count(self, batch: Batch) -> Float[Array, ""]:
        """Real tokens, counted in every layer."""
        return self._layers * jnp.sum((jnp.asarray(batch.segment_ids) > 0).astype(jnp.float32))

    def _load(self, stats: RouterStats, batch: Batch) -> dict[str, Metric]:
        return {LOAD: Metric(stats.load, self._count(batch))}
