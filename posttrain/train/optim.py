"""The optimizer: schedule, clipping, AdamW, which parameters it touches, and where and how wide its state is kept."""

import math
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Float32, Int, UInt32

from posttrain.config import OptimizerConfig
from posttrain.errors import UserError
from posttrain.models.decoder import STACK
from posttrain.parallel.sharding import Selection, flatten, select, unflatten
from posttrain.records import Leaf, Params

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


class _Leaf(NamedTuple):
    """A parameter, or one layer of a stacked one, and its moments."""

    param: Float[Array, "..."]
    first: Float[Array, "..."]
    second: Float[Array, "..."]


class AdamState(NamedTuple):
    """What the optimizer keeps. `mu` and `nu`, the first and second moments, look as the trained parameters do."""

    count: Leaf
    """Updates so far."""
    mu: Params
    nu: Params


class _Step(NamedTuple):
    """What an update needs beside leaves."""

    done: Int[Array, ""]
    """Updates before this one."""
    learning_rate: Float[Array, ""]
    norm: Float[Array, ""]
    """Of the gradient."""
    accept: Bool[Array, ""]


@dataclass(frozen=True)
class Optimizer:
    """AdamW (Loshchilov & Hutter 2019) over the trained parameters only: what is frozen has no gradient and no state.

    All arithmetic is f32. What is kept in bf16 takes part in it as it is; of the results, parameters and second moments
    are rounded stochastically (Zamirai et al. 2020, arXiv:2010.06192). To the nearest, an update below half a unit in
    the last place, a 512th to a 256th of the value, would be lost: with a beta2 of 0.999 a second moment shrinks by at
    most a 1000th a step, so it never would, and parameters are far larger than their updates. First moments move by a
    tenth of what they are off, and are rounded to the nearest.
    """

    config: OptimizerConfig
    schedule: Schedule
    trained: dict[str, Selection]
    """By path: True, or a boolean per layer or row; frozen parameters are absent."""
    decay: dict[str, np.ndarray]
    """By path: 1 where weight decay applies, shaped to broadcast against the parameter."""

    def split(self, params: Params) -> tuple[Params, Params]:
        """(trained, frozen), both nested."""
        leaves = flatten(params)
        trained = {path: leaf for path, leaf in leaves.items() if path in self.trained}
        frozen = {path: leaf for path, leaf in leaves.items() if path not in self.trained}
        return unflatten(trained), unflatten(frozen)

    def abstract_state(self, trained: Params, whole: jax.sharding.Sharding) -> AdamState:
        """Shapes, dtypes and places of the state, given those of the parameters (arrays will do): moments are split as
        these are, in the memory that the config says, and the counter is everywhere (`whole`)."""
        on_host = self.config.memory == "host"

        def moment(leaf: jax.ShapeDtypeStruct | Array) -> jax.ShapeDtypeStruct:
            assert leaf.sharding is not None
            placed = leaf.sharding.with_memory_kind("pinned_host") if on_host else leaf.sharding
            return jax.ShapeDtypeStruct(leaf.shape, self.config.moments_dtype, sharding=placed)

        moments = jax.tree.map(moment, trained)
        return AdamState(jax.ShapeDtypeStruct((), jnp.int32, sharding=whole), moments, moments)

    def init(self, trained: Params, whole: jax.sharding.Sharding) -> AdamState:
        """The state before the first update: zeros, as `abstract_state` describes them."""

        def zeros(leaf: jax.ShapeDtypeStruct) -> Array:
            # One by one: what belongs into the host's memory may not fit the device's together.
            return jax.jit(partial(jnp.zeros, leaf.shape, leaf.dtype), out_shardings=leaf.sharding)()

        return jax.tree.map(zeros, self.abstract_state(trained, whole))

    def mask_frozen(self, tree: Params) -> Params:
        """Zeros where only some layers of a stacked parameter, or some rows of an embedding, are trained."""
        leaves = flatten(tree)
        for path, chosen in self.trained.items():
            if isinstance(chosen, np.ndarray):
                mask = jnp.asarray(chosen, leaves[path].dtype)
                leaves[path] = leaves[path] * mask.reshape((-1,) + (1,) * (leaves[path].ndim - 1))
        return unflatten(leaves)

    def update(
        self,
        gradients: Params,
        state: AdamState,
        trained: Params,
        learning_rate: Float[Array, ""],
        accept: Bool[Array, ""],
    ) -> tuple[Params, AdamState]:
        """New parameters and state, or the old ones unless `accept`. Gradients are already masked, of any dtype."""
        slopes, first, second = flatten(gradients), flatten(state.mu), flatten(state.nu)
        old = {path: _Leaf(leaf, first[path], second[path]) for path, leaf in flatten(trained).items()}
        step = _Step(state.count, learning_rate, gradient_norm(gradients), accept)
        if self.config.memory == "host":
            new = self._through_device(old, slopes, step)
        else:
            new = {path: self._moved(path, leaf, slopes[path], step) for path, leaf in old.items()}
        count = state.count + accept.astype(jnp.int32)
        params, first, second = (unflatten({path: leaf[i] for path, leaf in new.items()}) for i in range(3))
        return params, AdamState(count, first, second)

    def _through_device(self, old: dict[str, _Leaf], slopes: dict[str, Array], step: _Step) -> dict[str, _Leaf]:
        """Moments in host memory visit the device, of stacked parameters one layer at a time."""
        stacked = {path: leaf for path, leaf in old.items() if path.startswith(STACK)}
        single = {path: leaf for path, leaf in old.items() if path not in stacked}

        def visit(path: str, leaf: _Leaf, slope: Array, layer: Array | None = None) -> _Leaf:
            first, second = jax.device_put((leaf.first, leaf.second), jax.memory.Space.Device)
            param, *moments = self._moved(path, _Leaf(leaf.param, first, second), slope, step, layer)
            return _Leaf(param, *jax.device_put(moments, jax.memory.Space.Host))

        def one_layer(layer: Array, leaves: dict[str, _Leaf]) -> dict[str, _Leaf]:
            def at(stack: Array) -> Array:
                return jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)

            moved = {path: visit(path, _Leaf(*map(at, leaf)), at(slopes[path]), layer) for path, leaf in leaves.items()}
            return jax.tree.map(lambda whole, x: jax.lax.dynamic_update_index_in_dim(whole, x, layer, 0), leaves, moved)

        moved = {path: visit(path, leaf, slopes[path]) for path, leaf in single.items()}
        if not stacked:
            return moved
        layers = next(iter(stacked.values())).param.shape[0]
        return moved | jax.lax.fori_loop(0, layers, one_layer, stacked)

    def _moved(self, path: str, old: _Leaf, slope: Array, step: _Step, layer: Array | None = None) -> _Leaf:
        """One parameter's update; with `layer`, that of one layer of a stacked one."""
        c, param = self.config, old.param.astype(jnp.float32)
        gradient, chosen = slope.astype(jnp.float32), self.trained[path]
        if c.max_grad_norm is not None:
            gradient = gradient * jnp.where(step.norm < c.max_grad_norm, 1.0, c.max_grad_norm / step.norm)
        before, square_before = old.first.astype(jnp.float32), old.second.astype(jnp.float32)
        first = jnp.where(step.accept, (1 - c.beta1) * gradient + c.beta1 * before, before)
        second = jnp.where(step.accept, (1 - c.beta2) * gradient * gradient + c.beta2 * square_before, square_before)
        first, second = _written_once(first, second)
        steps = (step.done + 1).astype(jnp.float32)
        mean, square = first / (1 - c.beta1**steps), second / (1 - c.beta2**steps)
        move = mean / (jnp.sqrt(square) + c.epsilon)
        if c.weight_decay:
            move = move + c.weight_decay * _at(self.decay[path], layer) * param
        if isinstance(chosen, np.ndarray):
            move = move * _at(
                chosen.astype(np.float32).reshape((-1,) + (1,) * (len(self.decay[path].shape) - 1)), layer
            )
        param = jnp.where(step.accept, param - step.learning_rate * move, param)
        if jnp.bfloat16 in (old.param.dtype, old.second.dtype):
            # What is not accepted has no bits to round.
            noise = _noise(path, old.param.shape, step.done, layer)
            param, second = _narrow(param, old.param.dtype, noise >> 16), _narrow(second, old.second.dtype, noise)
        return _Leaf(*(value.astype(kept.dtype) for value, kept in zip((param, first, second), old, strict=True)))


def _written_once(first: Float32[Array, "..."], second: Float32[Array, "..."]) -> tuple[Array, Array]:
    """The moments, on CPU written before the parameters are computed from them. XLA:CPU would compute them a second
    time there, for which it would copy the old ones: they are overwritten by then."""

    def apart(first: Array, second: Array) -> tuple[Array, Array]:
        return jax.lax.optimization_barrier((first, second))

    return jax.lax.platform_dependent(first, second, cpu=apart, default=lambda first, second: (first, second))


def gradient_norm(gradients: Params) -> Float[Array, ""]:
    """Global norm, in f32 whatever the gradients' dtype."""
    return optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), gradients))


def _at(mask: np.ndarray, layer: Array | None) -> Float[Array, "..."]:
    """Of a mask that broadcasts against a stacked parameter, what broadcasts against a layer of it."""
    if layer is None:
        return jnp.asarray(mask)
    return jnp.asarray(mask[0]) if len(mask) == 1 else jax.lax.dynamic_index_in_dim(mask, layer, keepdims=False)


def _noise(path: str, shape: tuple[int, ...], done: Int[Array, ""], layer: Array | None) -> UInt32[Array, "..."]:
    """Random bits for every element, the same on every mesh and by layer as for all layers at once."""
    key = jax.random.fold_in(jax.random.key(zlib.crc32(path.encode()), impl="threefry2x32"), done)
    if layer is not None:
        return jax.random.bits(jax.random.fold_in(key, layer), shape, jnp.uint32)
    if not path.startswith(STACK):
        return jax.random.bits(key, shape, jnp.uint32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(shape[0]))
    return jax.vmap(lambda key: jax.random.bits(key, shape[1:], jnp.uint32))(keys)


def _narrow(x: Float32[Array, "..."], dtype: Any, noise: UInt32[Array, "..."]) -> Float32[Array, "..."]:
    """`x` as it is, or for bf16 one of its two neighbours in it, the nearer one the likelier: the mean is `x`. Takes
    the 16 lower bits of the noise."""
    if dtype != jnp.bfloat16:
        return x
    low = jnp.uint32(0xFFFF)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + (noise & low)
    return jax.lax.bitcast_convert_type(bits & ~low, jnp.float32)


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
    decay = {path: _decay_mask(undecayed[path], shapes[path]) for path in trained}
    return Optimizer(config, make_schedule(config, total_steps), trained, decay)


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
