"""The optimizer against AdamW written out in numpy float64, and schedules against transformers' formulas."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.config import MeshConfig, OptimizerConfig
from posttrain.errors import UserError, UserErrors
from posttrain.parallel.mesh import make_mesh
from posttrain.parallel.sharding import flatten, replicated, unflatten
from posttrain.train import optim as module
from posttrain.train.optim import make_optimizer, make_schedule

ON_ONE = replicated(make_mesh(MeshConfig(), jax.devices()[:1]))
SHAPES = {"embed/embedding": (6, 3), "layers/norm/scale": (4, 3), "layers/up/kernel": (4, 3, 2)}


def arrays(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {path: rng.normal(size=shape).astype(np.float32) for path, shape in SHAPES.items()}


def bfloat16(x: np.ndarray, noise: np.ndarray | None = None) -> np.ndarray:
    """The nearest number of 8 significant bits; with 16 random bits, the upper neighbour with a probability of the
    distance to the lower one, counted in their own."""
    unit = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(x), 1e-300))) - 7)
    whole = np.abs(x) / unit
    up = np.round(whole) if noise is None else np.floor(whole + noise / 65536)
    return np.sign(x) * up * unit


def drawn(path: str, shape: tuple[int, ...], step: int) -> tuple[np.ndarray, np.ndarray]:
    """The random bits of a step: (of the parameter, of its second moment)."""
    bits = np.asarray(module._noise(path, shape, jnp.int32(step), None))
    return bits >> 16, bits & 0xFFFF


def numpy_adamw(
    config: OptimizerConfig, steps: int, decayed: dict, trained: dict, params_dtype: str = "float32"
) -> dict[str, np.ndarray]:
    """Loshchilov & Hutter 2019, algorithm 2, with global-norm clipping, in float64; what is kept in bf16 is rounded
    when it is stored."""
    params = {path: value.astype(np.float64) for path, value in arrays(0).items()}
    if params_dtype == "bfloat16":
        params = {path: bfloat16(value) for path, value in params.items()}
    first = {path: np.zeros_like(value) for path, value in params.items()}
    second = {path: np.zeros_like(value) for path, value in params.items()}
    for step in range(steps):
        gradients = {path: value.astype(np.float64) * trained[path] for path, value in arrays(step + 1).items()}
        norm = math.sqrt(sum((g**2).sum() for g in gradients.values()))
        scale = min(1.0, config.max_grad_norm / norm)
        for path, g in gradients.items():
            g = g * scale
            first[path] = config.beta1 * first[path] + (1 - config.beta1) * g
            second[path] = config.beta2 * second[path] + (1 - config.beta2) * g**2
            mean = first[path] / (1 - config.beta1 ** (step + 1))
            square = second[path] / (1 - config.beta2 ** (step + 1))
            update = mean / (np.sqrt(square) + config.epsilon) + config.weight_decay * decayed[path] * params[path]
            params[path] = params[path] - config.learning_rate * update * trained[path]
            of_param, of_second = drawn(path, SHAPES[path], step)
            if config.moments_dtype == "bfloat16":
                first[path], second[path] = bfloat16(first[path]), bfloat16(second[path], of_second)
            if params_dtype == "bfloat16":
                params[path] = bfloat16(params[path], of_param)
    return params


@pytest.mark.parametrize("freeze", [(), ("layers[0:2]/up/.*",), ("embed/.*",)])
def test_adamw_with_clipping_decay_and_freezing(freeze: tuple[str, ...]) -> None:
    config = OptimizerConfig(
        learning_rate=0.1, schedule="constant", warmup_ratio=0, weight_decay=0.3, max_grad_norm=0.7, freeze=freeze
    )
    optimizer = make_optimizer(config, SHAPES, 5)
    trained, frozen = optimizer.split(unflatten({k: jnp.asarray(v) for k, v in arrays(0).items()}))
    state = optimizer.init(trained, ON_ONE)

    @jax.jit
    def update(trained: dict, state: object, gradients: dict) -> tuple:
        return optimizer.update(optimizer.mask_frozen(gradients), state, trained, jnp.float32(0.1), jnp.bool_(True))

    for step in range(5):
        gradients = unflatten({k: jnp.asarray(v) for k, v in arrays(step + 1).items() if k in optimizer.trained})
        trained, state = update(trained, state, gradients)
    decayed = {"embed/embedding": 1.0, "layers/norm/scale": 0.0, "layers/up/kernel": 1.0}
    masks = {path: np.float64(1.0) for path in SHAPES}
    if freeze == ("embed/.*",):
        masks["embed/embedding"] = np.float64(0.0)
        assert "embed/embedding" in flatten(frozen)
    elif freeze:
        masks["layers/up/kernel"] = np.array([0.0, 0.0, 1.0, 1.0])[:, None, None]
    expected = numpy_adamw(config, 5, decayed, masks)
    for path, value in (flatten(trained) | flatten(frozen)).items():
        # f32 cancels in 1 - 0.999**t: 6e-5 relative, half of it in the root, on updates of 0.1
        np.testing.assert_allclose(np.asarray(value), expected[path], rtol=2e-5, atol=1e-5, err_msg=path)


def updated(config: OptimizerConfig, params_dtype: str, steps: int, refused: int = -1) -> tuple[Any, Any]:
    """Parameters and state after so many updates, of which one may be refused."""
    optimizer = make_optimizer(config, SHAPES, 5)
    trained, _ = optimizer.split(
        unflatten({k: jax.device_put(jnp.asarray(v, params_dtype), ON_ONE) for k, v in arrays(0).items()})
    )
    state = optimizer.init(trained, ON_ONE)

    @jax.jit
    def update(trained: dict, state: Any, gradients: dict, accept: Any) -> tuple:
        return optimizer.update(optimizer.mask_frozen(gradients), state, trained, jnp.float32(0.1), accept)

    for step in range(steps):
        gradients = unflatten({k: jnp.asarray(v) for k, v in arrays(step + 1).items() if k in optimizer.trained})
        trained, state = update(trained, state, gradients, jnp.bool_(step != refused))
    return trained, state


@pytest.mark.parametrize("params_dtype", ["float32", "bfloat16"])
def test_adamw_with_moments_in_bfloat16(params_dtype: str) -> None:
    config = OptimizerConfig(
        learning_rate=0.1, schedule="constant", warmup_ratio=0, weight_decay=0.3, moments_dtype="bfloat16"
    )
    trained, state = updated(config, params_dtype, 5)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert len(moments) == 6 and {leaf.dtype for leaf in moments} == {jnp.dtype("bfloat16")}
    decayed = {"embed/embedding": 1.0, "layers/norm/scale": 0.0, "layers/up/kernel": 1.0}
    expected = numpy_adamw(config, 5, decayed, dict.fromkeys(SHAPES, 1.0), params_dtype)
    for path, value in flatten(trained).items():
        assert value.dtype == params_dtype
        np.testing.assert_allclose(np.asarray(value, np.float64), expected[path], rtol=2e-5, atol=1e-5, err_msg=path)


@pytest.mark.parametrize("moments_dtype", ["float32", "bfloat16"])
def test_moments_in_host_memory_change_nothing(moments_dtype: str) -> None:
    config = OptimizerConfig(weight_decay=0.3, freeze=("layers[0:2]/up/.*",), moments_dtype=moments_dtype)
    expected = updated(config, "float32", 4, refused=2)
    found = updated(config.model_copy(update={"memory": "host"}), "float32", 4, refused=2)
    assert int(found[1].count) == 3
    for leaf, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(leaf, np.float32), np.asarray(other, np.float32), rtol=1e-6, atol=1e-9)


def test_an_update_that_is_refused_changes_nothing() -> None:
    before, after = (updated(OptimizerConfig(moments_dtype="bfloat16"), "bfloat16", n, refused=1) for n in (1, 2))
    for leaf, other in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(np.asarray(leaf, np.float32), np.asarray(other, np.float32))


def test_moments_in_bfloat16_fade_as_they_should() -> None:
    """Without gradient the second moment is multiplied by beta2 each step, which to the nearest would do nothing."""
    config = OptimizerConfig(moments_dtype="bfloat16", weight_decay=0.0, beta2=0.999)
    optimizer = make_optimizer(config, {"w": (64, 64)}, 5)
    trained = {"w": jnp.ones((64, 64), jnp.bfloat16)}
    ones = {"w": jnp.ones((64, 64), jnp.bfloat16)}
    state = optimizer.init(trained, ON_ONE)._replace(nu=ones)

    @jax.jit
    def fade(state: Any) -> Any:
        def step(_: Any, state: Any) -> Any:
            zero = jax.tree.map(jnp.zeros_like, ones)
            return optimizer.update(zero, state, trained, jnp.float32(0), jnp.bool_(True))[1]

        return jax.lax.fori_loop(0, 300, step, state)

    left = np.asarray(fade(state).nu["w"], np.float64)
    # A value's walk spreads by about 0.002 a step, so by 0.04 in 300, and the mean of 4096 by 0.0006.
    assert left.mean() == pytest.approx(0.999**300, abs=0.003) and 0.01 < left.std() < 0.1


def test_small_updates_move_parameters_in_bfloat16_on_average() -> None:
    """Each update is a 50th of the distance between neighbours."""
    config = OptimizerConfig(beta1=0.0, beta2=0.0, max_grad_norm=None)
    optimizer = make_optimizer(config, {"w": (64, 64)}, 5)
    trained: Any = {"w": jnp.ones((64, 64), jnp.bfloat16)}
    state, gradient = optimizer.init(trained, ON_ONE), {"w": jnp.full((64, 64), -1.0)}
    update = jax.jit(lambda trained, state: optimizer.update(gradient, state, trained, rate, jnp.bool_(True)))
    rate = jnp.float32(2**-7 / 50)
    for _ in range(25):
        trained, state = update(trained, state)
    assert np.asarray(trained["w"], np.float64).mean() == pytest.approx(1 + 2**-7 / 2, abs=2**-7 / 20)


def test_only_new_tokens_trains_their_rows_and_leaves_all_else_bitwise() -> None:
    rows = np.array([False, False, True, False, True, False])
    config = OptimizerConfig(
        learning_rate=0.1,
        schedule="constant",
        warmup_ratio=0,
        weight_decay=0.3,
        max_grad_norm=0.7,
        only_new_tokens=True,
    )
    optimizer = make_optimizer(config, SHAPES, 5, {"embed/embedding": rows})
    trained, frozen = optimizer.split(unflatten({k: jnp.asarray(v) for k, v in arrays(0).items()}))
    assert set(flatten(trained)) == {"embed/embedding"} and len(flatten(frozen)) == 2
    state = optimizer.init(trained, ON_ONE)
    for step in range(5):
        gradients = optimizer.mask_frozen({"embed": {"embedding": jnp.asarray(arrays(step + 1)["embed/embedding"])}})
        trained, state = optimizer.update(gradients, state, trained, jnp.float32(0.1), jnp.bool_(True))
    found = np.asarray(trained["embed"]["embedding"])
    np.testing.assert_array_equal(found[~rows], arrays(0)["embed/embedding"][~rows])
    masks = dict.fromkeys(SHAPES, np.float64(0.0)) | {"embed/embedding": rows[:, None].astype(np.float64)}
    expected = numpy_adamw(config, 5, dict.fromkeys(SHAPES, 1.0), masks)["embed/embedding"]
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-5)


def test_only_new_tokens_without_any_and_beside_freeze() -> None:
    config = OptimizerConfig(only_new_tokens=True)
    for none in (None, {}, {"embed/embedding": np.zeros(6, bool)}):
        with pytest.raises(UserError, match=r"only_new_tokens: there are none.*tokenizer\.add_special_tokens"):
            make_optimizer(config, SHAPES, 5, none)
    rows = {"embed/embedding": np.arange(6) > 4}
    assert list(make_optimizer(config, SHAPES, 5, rows).trained) == ["embed/embedding"]
    with pytest.raises(UserError, match="every parameter is frozen"):
        make_optimizer(OptimizerConfig(only_new_tokens=True, freeze=("embed/.*",)), SHAPES, 5, rows)


def expected_rate(name: str, step: int, total: int, warmup: int) -> float:
    """transformers' get_*_schedule_with_warmup, written out."""
    if step < warmup:
        return step / warmup
    progress = (step - warmup) / (total - warmup)
    if name == "wsd":
        decay = math.ceil(total / 5)
        return 1.0 if step < total - decay else (total - step) / decay
    return {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}[name]


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "wsd"])
def test_schedules(name: str) -> None:
    config = OptimizerConfig(learning_rate=2.0, schedule=name, warmup_ratio=0.1)
    schedule = jax.jit(make_schedule(config, 45))
    for step in range(45):
        expected = 2.0 * expected_rate(name, step, 45, math.ceil(4.5))
        assert float(schedule(jnp.int32(step))) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_decay_ends_at_the_least_rate() -> None:
    config = OptimizerConfig(learning_rate=1.0, schedule="cosine", warmup_ratio=0, min_learning_rate_ratio=0.1)
    assert float(make_schedule(config, 10)(jnp.int32(10))) == pytest.approx(0.1, rel=1e-6)


def test_patterns_that_name_nothing_are_errors_unless_they_are_the_defaults() -> None:
    make_optimizer(OptimizerConfig(), SHAPES, 5)  # no bias here
    with pytest.raises(UserErrors, match=r"optimizer\.freeze: 'nothing' matches no parameter"):
        make_optimizer(OptimizerConfig(freeze=("nothing",)), SHAPES, 5)
    with pytest.raises(UserErrors, match=r"optimizer\.no_decay: 'nothing' matches no parameter"):
        make_optimizer(OptimizerConfig(no_decay=("nothing",)), SHAPES, 5)


def test_freezing_everything_is_an_error() -> None:
    with pytest.raises(UserError, match="every parameter is frozen"):
        make_optimizer(OptimizerConfig(freeze=(".*",)), SHAPES, 5)
