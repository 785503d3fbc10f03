"""The step's laws: no split into micro-batches and no packing changes loss or gradient (nor does a mesh:
`test_meshes.py`); nothing that is not finite gets in."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.config import OptimizerConfig
from posttrain.models.decoder import ComputeOptions, DecoderConfig, abstract_decoder, init_params
from posttrain.objectives.supervised import sft
from posttrain.parallel.sharding import flatten, unflatten
from posttrain.records import Batch, Metric, Params, TrainState
from posttrain.train.optim import make_optimizer
from posttrain.train.step import LossSums, make_gradient_step, make_train_step

ON_ONE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
CONFIG = DecoderConfig(250, 32, 48, 2, 4, 2, 8)
T = 32


@pytest.fixture(scope="module")
def params() -> Params:
    made = jax.jit(init_params, static_argnums=0)(CONFIG, jax.random.key(0))
    return jax.tree.map(lambda p: p * 4, made)


def loss_sums(**options: str) -> LossSums:
    decoder = abstract_decoder(CONFIG, options=ComputeOptions(**({"attention": "chunked", "remat": "dots"} | options)))
    return LossSums(decoder, sft(), jnp.float32)


def make_rows(packed: bool) -> Batch:
    """The same 12 samples of unequal lengths, some tokens untrained: two to a row or one to a row, 12 rows at most."""
    rng = np.random.default_rng(0)
    samples = []
    for length in (20, 12, 25, 7, 17, 15, 3, 29, 30, 2, 16, 16):
        weights = (rng.random(length) < 0.6).astype(np.float32)
        weights[0] = 0.0
        samples.append((rng.integers(0, 250, length), weights))
    groups = [samples[i : i + 2] for i in range(0, 12, 2)] if packed else [[sample] for sample in samples]
    rows = 8 if packed else 16  # the last rows are empty
    arrays = {name: np.zeros((rows, T), np.int32) for name in ("tokens", "segment_ids", "positions")}
    loss_weights = np.zeros((rows, T), np.float32)
    for row, group in enumerate(groups):
        at = 0
        for number, (tokens, weights) in enumerate(group, 1):
            span = slice(at, at + len(tokens))
            arrays["tokens"][row, span], arrays["segment_ids"][row, span] = tokens, number
            arrays["positions"][row, span], loss_weights[row, span] = np.arange(len(tokens)), weights
            at += len(tokens)
    return Batch(**arrays, loss_weights=loss_weights)


def split(batch: Batch, accumulation: int) -> Batch:
    return jax.tree.map(lambda x: x.reshape(accumulation, -1, x.shape[-1]), batch)


def loss_and_gradients(loss: LossSums, params: Params, batch: Batch) -> tuple[float, dict[str, np.ndarray]]:
    @jax.jit
    def compute(params: Params, batch: Batch) -> Any:
        totals = loss.totals(batch)
        gradients, sums, _ = make_gradient_step(loss)(params, batch, totals, None)
        return gradients, sums["nll"] / totals["nll"]

    gradients, value = compute(params, batch)
    return float(value), {path: np.asarray(leaf) for path, leaf in flatten(gradients).items()}


def assert_equal_runs(found: tuple, expected: tuple) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    for path, leaf in expected[1].items():
        scale = np.abs(leaf).max()
        np.testing.assert_allclose(found[1][path], leaf, rtol=0, atol=1e-5 * scale, err_msg=path)


def reference_loss(params: Params, batch: Batch) -> float:
    """Mean negative log-likelihood over trained tokens, from full logits of each row, in numpy float64."""
    decoder = abstract_decoder(CONFIG, options=ComputeOptions("reference", "none"))
    model = decoder.merge(params)
    hidden = np.asarray(jax.jit(lambda b: model.hidden(b))(batch), np.float64)
    logits = hidden @ np.asarray(model.head(), np.float64)[:250].T
    logps = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    logps -= logits.max(-1, keepdims=True)
    rows, at = np.nonzero(batch.loss_weights)
    return -float(np.mean(logps[rows, at - 1, np.asarray(batch.tokens)[rows, at]]))


def test_the_loss_is_the_mean_over_all_trained_tokens(params: Params) -> None:
    batch = make_rows(packed=False)
    value, _ = loss_and_gradients(loss_sums(), params, split(batch, 1))
    assert value == pytest.approx(reference_loss(params, batch), rel=1e-5)


def test_the_gradient_is_that_of_finite_differences(params: Params) -> None:
    batch = split(make_rows(packed=True), 2)
    loss = loss_sums()
    _, gradients = loss_and_gradients(loss, params, batch)
    rng = np.random.default_rng(1)
    # Along the gradient, unevenly: a random direction would be nearly orthogonal to it, all slope lost in rounding.
    direction = {path: leaf * np.abs(rng.normal(size=leaf.shape)) for path, leaf in gradients.items()}
    norm = np.sqrt(sum(float((d**2).sum()) for d in direction.values()))
    direction = {path: (leaf / norm).astype(np.float32) for path, leaf in direction.items()}
    step = 1e-3
    sides = []
    for sign in (1, -1):
        moved = {path: leaf + sign * step * direction[path] for path, leaf in flatten(params).items()}
        sides.append(reference_loss(unflatten(moved), make_rows(packed=True)))
    slope = sum(float((gradients[path] * direction[path]).sum()) for path in gradients)
    assert slope == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=2e-3)


@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_micro_batches_change_nothing(params: Params, accumulation: int) -> None:
    batch, loss = make_rows(packed=True), loss_sums()
    assert_equal_runs(
        loss_and_gradients(loss, params, split(batch, accumulation)), loss_and_gradients(loss, params, split(batch, 1))
    )


@pytest.mark.parametrize("attention", ["reference", "chunked"])
def test_packing_changes_nothing(params: Params, attention: str) -> None:
    loss = loss_sums(attention=attention)
    assert_equal_runs(
        loss_and_gradients(loss, params, split(make_rows(packed=True), 2)),
        loss_and_gradients(loss_sums(attention="reference"), params, split(make_rows(packed=False), 1)),
    )


def train(params: Params, batch: Batch, **config: Any) -> tuple[TrainState, TrainState, dict[str, float]]:
    """State before and after one step, and what it logged."""
    settings = {"learning_rate": 1e-2, "warmup_ratio": 0, "schedule": "constant"} | config
    shapes = {path: leaf.shape for path, leaf in flatten(params).items()}
    optimizer = make_optimizer(OptimizerConfig(**settings), shapes, 10)
    key = jax.random.key_data(jax.random.key(0))
    state = TrainState(params, optimizer.init(optimizer.split(params)[0], ON_ONE), jnp.int32(3), key)
    after, logged = jax.jit(make_train_step(loss_sums(), optimizer))(state, batch)
    return state, after, {name: float(value) for name, value in logged.items()}


def test_a_step_logs_what_it_did_and_moves_the_parameters(params: Params) -> None:
    batch = split(make_rows(packed=True), 2)
    _, after, logged = train(params, batch)
    value, gradients = loss_and_gradients(loss_sums(), params, batch)
    norm = np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in gradients.values()))
    assert logged["loss"] == pytest.approx(value, rel=1e-5)
    assert logged["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert logged["num_tokens"] == 192 and logged["finite"] == 1.0
    assert logged["trained_tokens"] == (np.asarray(batch.loss_weights) > 0).sum()
    assert int(after.step) == 4
    moved = np.abs(np.asarray(after.params["layers"]["attn"]["q"]["kernel"] - params["layers"]["attn"]["q"]["kernel"]))
    assert moved.max() == pytest.approx(1e-2, rel=1e-2)  # Adam's first step is the learning rate times a sign


def test_frozen_layers_do_not_move_and_do_not_count(params: Params) -> None:
    batch = split(make_rows(packed=True), 2)
    _, after, logged = train(params, batch, freeze=("layers[0:1]/.*", "embed/.*", "lm_head/.*"), weight_decay=0.1)
    old, new = flatten(params), flatten(after.params)
    for path in old:
        first_layer = old[path][0] if path.startswith("layers/") else old[path]
        if path != "final_norm/scale":
            np.testing.assert_array_equal(new[path][0] if path.startswith("layers/") else new[path], first_layer)
    assert np.any(np.asarray(new["layers/mlp/up/kernel"][1] != old["layers/mlp/up/kernel"][1]))
    _, gradients = loss_and_gradients(loss_sums(), params, batch)
    counted = [g[1] if path.startswith("layers/") else g for path, g in gradients.items()]
    kept = [g for path, g in zip(gradients, counted, strict=True) if not path.startswith(("embed", "lm_head"))]
    norm = np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in kept))
    assert logged["grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_a_step_that_is_not_finite_changes_nothing(params: Params) -> None:
    broken = dict(flatten(params))
    broken["final_norm/scale"] = broken["final_norm/scale"].at[0].set(jnp.inf)
    before, after, logged = train(unflatten(broken), split(make_rows(packed=True), 1))
    assert logged["finite"] == 0.0
    assert int(after.step) == int(before.step) + 1
    for old, new in zip(jax.tree.leaves(before.opt_state), jax.tree.leaves(after.opt_state), strict=True):
        np.testing.assert_array_equal(old, new)
    for old, new in zip(jax.tree.leaves(before.params), jax.tree.leaves(after.params), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_batch_without_trained_tokens_has_loss_and_gradient_zero(params: Params) -> None:
    batch = make_rows(packed=True)
    empty = dataclasses.replace(batch, loss_weights=np.zeros_like(batch.loss_weights))
    _, _, logged = train(params, split(empty, 2))
    assert logged["loss"] == 0.0 and logged["grad_norm"] == 0.0 and logged["finite"] == 1.0


def test_metrics_combine_by_their_reduction() -> None:
    values, weights = jnp.asarray([6.0, 1.0]), jnp.asarray([3.0, 1.0])
    combined = {
        name: float(Metric(values, weights, name).over_micro_batches().value())
        for name in ("mean", "sum", "min", "max")
    }
    assert combined == {"mean": 7 / 4, "sum": 7.0, "min": 1.0, "max": 6.0}
    assert float(Metric(jnp.float32(0), jnp.float32(0)).value()) == 0.0
