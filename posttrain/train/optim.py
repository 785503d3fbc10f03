"""The optimizer: schedule, clipping, AdamW, and which parameters it touches."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from posttrain.config import OptimizerConfig
from posttrain.errors import UserError
from posttrain.parallel.sharding import Selection, flatten, select, unflatten
from posttrain.records import Params

Schedule = Callable[[Int[Array, ""]], Float[Array, ""]]


def make_schedule(config: OptimizerConfig, total_steps: int) -> Schedule:
    """Learning rate by number of steps already done, with the formulas of transformers' `get_*_schedule`: 0 at the
    first step of a warm-up, which lasts `ceil(warmup_ratio * total_steps)` steps."""
    peak, low = config.learning_rate, config.min_learning_rate_ratio
    warmup = math.ceil(config.warmup_ratio * total_steps)
    decay_start = max(warmup, total_steps - math.ceil(total_steps / 5)) if config.schedule == "wsd" else warmup

    def schedule(step: Int[Array, ""]) -> Float[Array, ""]:
        done = jnp.asarray(step).astype(jnp.float32)
        progress = jnp.clip((done - decay_start) / max(1, total_steps - decay_start), 0.0, 1.0)
        if config.schedule == "constant":
            decayed = jnp.ones_like(done)
        elif config.schedule == "cosine":
            decayed = low + (1 - low) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        else:
            decayed = low + (1 - low) * (1 - progress)
        return peak * jnp.where(done < warmup, done / max(1, warmup), decayed)

    return schedule


@dataclass(frozen=True)
class Optimizer:
    """An optax chain over the trained parameters only: what is frozen has no gradient and no state."""

    schedule: Schedule
    trained: dict[str, Selection]
    """By path: True, or a boolean per layer or row; frozen parameters are absent."""
    transform: optax.GradientTransformation

    def split(self, params: Params) -> tuple[Params, Params]:
        """(trained, frozen), both nested."""
        leaves = flatten(params)
        trained = {path: leaf for path, leaf in leaves.items() if path in self.trained}
        frozen = {path: leaf for path, leaf in leaves.items() if path not in self.trained}
        return unflatten(trained), unflatten(frozen)

    def init(self, trained: Params) -> Any:
        """Optimizer state; moments are f32 whatever the parameters' dtype."""
        with jax.numpy_dtype_promotion("standard"):  # optax mixes Python and array scalars
            return self.transform.init(jax.tree.map(lambda p: p.astype(jnp.float32), trained))

    def mask_frozen(self, tree: Params) -> Params:
        """Zeros where only some layers of a stacked parameter, or some rows of an embedding, are trained."""
        leaves = flatten(tree)
        for path, chosen in self.trained.items():
            if isinstance(chosen, np.ndarray):
                mask = jnp.asarray(chosen, leaves[path].dtype)
                leaves[path] = leaves[path] * mask.reshape((-1,) + (1,) * (leaves[path].ndim - 1))
        return unflatten(leaves)

    def update(
        self, gradients: Params, state: Any, trained: Params, learning_rate: Float[Array, ""]
    ) -> tuple[Params, Any]:
        """New parameters and state; gradients are f32 and already masked."""
        wide = jax.tree.map(lambda p: p.astype(jnp.float32), trained)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = self.transform.update(gradients, state, wide)
        masked = self.mask_frozen(cast(Params, updates))
        return jax.tree.map(lambda old, p, u: (p - learning_rate * u).astype(old.dtype), trained, wide, masked), state

    def state_shardings(self, trained: Params, shardings: Params, whole: Any) -> Any:
        """Shardings of the state: moments lie where their parameters do, counters everywhere (`whole`)."""
        state = jax.eval_shape(self.init, trained)
        return optax.tree.map_params(
            self.transform, lambda _, sharding: sharding, state, shardings, transform_non_params=lambda _: whole
        )


def make_optimizer(
    config: OptimizerConfig,
    shapes: Mapping[str, tuple[int, ...]],
    total_steps: int,
    new_rows: Mapping[str, Bool[np.ndarray, "V"]] | None = None,
    only: Mapping[str, Selection] | None = None,
) -> Optimizer:
    """`shapes` holds every parameter's shape by path, `new_rows` which rows of the embeddings are of new tokens. With
    `only`, the parameters of an adapter, nothing else is trained. Raises `UserErrors` for patterns that name nothing.
    """
    frozen = select(config.freeze, shapes, "optimizer.freeze")
    present = [p for p in config.no_decay if p not in OptimizerConfig().no_decay or _names_something(p, shapes)]
    undecayed = select(present, shapes, "optimizer.no_decay")
    trained: dict[str, Selection] = {
        path: ~chosen if isinstance(chosen, np.ndarray) else True
        for path, chosen in frozen.items()
        if chosen is not True
    }
    if only is not None:
        trained = {path: both for path in trained if (both := _both(trained[path], only.get(path, False))) is not False}
    if config.only_new_tokens:
        chosen = {path: rows for path, rows in (new_rows or {}).items() if rows.any()}
        if not chosen:
            raise UserError(
                "optimizer.only_new_tokens: there are none, so nothing would be trained; fix: name tokens in "
                "tokenizer.add_special_tokens that the vocabulary does not have yet, or train more"
            )
        trained = {path: rows for path, rows in chosen.items() if path in trained}
    if not trained:
        raise UserError("optimizer.freeze: every parameter is frozen, nothing would be trained; freeze less")
    schedule = make_schedule(config, total_steps)
    decay = unflatten({path: _decay_mask(undecayed[path], shapes[path]) for path in trained})
    parts = [] if config.max_grad_norm is None else [optax.clip_by_global_norm(config.max_grad_norm)]
    parts.append(optax.scale_by_adam(config.beta1, config.beta2, config.epsilon))
    if config.weight_decay:
        parts.append(_add_decay(config.weight_decay, decay))
    return Optimizer(schedule, trained, optax.chain(*parts))


def _both(first: Selection, second: Selection) -> Selection:
    if isinstance(first, bool):
        return second if first else False
    both = first & second
    return both if both.any() else False


def _names_something(pattern: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """The default patterns may name nothing (a model without biases); the user's own may not."""
    return any(re.fullmatch(pattern, path) for path in shapes)


def _decay_mask(undecayed: Selection, shape: tuple[int, ...]) -> np.ndarray:
    """1 where weight decay applies, shaped to broadcast against the parameter."""
    if isinstance(undecayed, np.ndarray):
        return (~undecayed).astype(np.float32).reshape((-1,) + (1,) * (len(shape) - 1))
    return np.full((1,) * len(shape), 0.0 if undecayed else 1.0, np.float32)


def _add_decay(weight_decay: float, mask: Params) -> optax.GradientTransformation:
    """Decoupled weight decay (Loshchilov & Hutter 2019) by a mask that may differ from layer to layer."""

    def decay(updates: Any, params: Any) -> Any:
        return jax.tree.map(lambda u, p, m: u + weight_decay * jnp.asarray(m) * p, updates, params, mask)

    return optax.stateless(decay)
