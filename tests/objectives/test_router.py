"""Router losses: equal to transformers' values and to their definition, summed exactly over micro-batches, added to any
objective without its knowing."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.config import MeshConfig, ModelConfig, ObjectiveConfig
from posttrain.errors import UserErrors
from posttrain.models import hf
from posttrain.models.architecture import DecoderConfig, MoEConfig
from posttrain.models.decoder import ComputeOptions, abstract_decoder, init_params
from posttrain.objectives.find import build_objective
from posttrain.objectives.router import RouterLosses, add_router_losses
from posttrain.objectives.supervised import sft
from posttrain.parallel.mesh import make_mesh
from posttrain.parallel.sharding import batch_sharding, flatten, place, unflatten
from posttrain.records import Batch, Objective, Params
from posttrain.train.step import LossSums, make_gradient_step, report

FIXTURES = Path(__file__).parent.parent / "fixtures" / "families"
CONFIG = DecoderConfig(100, 16, 24, 2, 2, 2, 8, moe=MoEConfig(4, 2, 8))
OPTIONS = ComputeOptions("reference", "none", "blocks")


@pytest.fixture(scope="module")
def params() -> Params:
    made = jax.jit(init_params, static_argnums=0)(CONFIG, jax.random.key(0))
    return jax.tree.map(lambda p: p * 6, made)


def rows(lengths: list[int], length: int = 20, empty: int = 0) -> Batch:
    """A sample a row, and rows of padding."""
    rng = np.random.default_rng(0)
    shape = (len(lengths) + empty, length)
    tokens, ids = np.full(shape, 9, np.int32), np.zeros(shape, np.int32)
    for row, n in enumerate(lengths):
        tokens[row, :n], ids[row, :n] = rng.integers(0, 100, n), 1
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), shape).copy()
    weights = (ids > 0) & (positions > 0) & (rng.random(shape) < 0.7)
    return Batch(tokens, ids, positions, weights.astype(np.float32))


LENGTHS = [20, 4, 13, 7, 18, 2, 9, 16]


def split(batch: Batch, accumulation: int) -> Batch:
    return jax.tree.map(lambda x: x.reshape(accumulation, -1, x.shape[-1]), batch)


def run(
    objective: Objective, params: Params, batch: Batch, config: DecoderConfig = CONFIG
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """What a step logs, and its gradients."""
    loss = LossSums(abstract_decoder(config, options=OPTIONS), objective, jnp.float32)

    @jax.jit
    def compute(params: Params, batch: Batch) -> Any:
        totals = loss.totals(batch)
        gradients, sums, metrics = make_gradient_step(loss)(params, batch, totals, None)
        return gradients, report(objective, sums, totals, metrics)

    gradients, logged = compute(params, batch)
    values = {name: float(value) for name, value in logged.items()}
    return values, {path: np.asarray(leaf) for path, leaf in flatten(gradients).items()}


def assert_same_run(found: tuple, expected: tuple, tolerance: float = 1e-5) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5, abs=1e-7)
    for path, leaf in expected[1].items():
        np.testing.assert_allclose(found[1][path], leaf, rtol=0, atol=tolerance * np.abs(leaf).max(), err_msg=path)


def both(objective: Objective) -> RouterLosses:
    return RouterLosses(objective, layers=2, balance=0.5, z=0.1)


@pytest.mark.parametrize("name", ["mixtral", "mixtral_window", "qwen3_moe", "qwen3_moe_window"])
def test_the_balance_loss_equals_that_of_transformers(name: str) -> None:
    config, _ = hf.load_config(FIXTURES / name)
    decoder = abstract_decoder(config, options=OPTIONS)
    params = hf.load_params(FIXTURES / name, config, decoder.shapes)
    expected = np.load(FIXTURES / name / "expected.npz")
    objective = RouterLosses(sft(), layers=config.num_hidden_layers, balance=1.0, z=0.0)
    terms = jax.jit(lambda params, batch: objective.terms(decoder.merge(params), batch))
    for i in range(3):
        ids = expected[f"ids_{i}"]
        batch = rows([len(ids)], length=48, empty=1)
        batch.tokens[0, : len(ids)] = ids
        metric = terms(params, batch)[1]["aux_loss"]
        np.testing.assert_allclose(metric.value(), expected[f"aux_loss_{i}"], rtol=1e-5)


def test_gradients_are_those_of_the_definition(params: Params) -> None:
    """Written down a second time, over all tokens at once: a product of means whose first is held fixed."""
    batch = rows(LENGTHS)
    decoder = abstract_decoder(CONFIG, options=OPTIONS)

    def loss(params: Params) -> jax.Array:
        model = decoder.merge(params)
        nll, _ = sft().terms(model, batch)
        _, stats = model.hidden_and_router(batch)
        assert stats is not None
        tokens = 2 * sum(LENGTHS)
        balance = 4 * jnp.sum(jax.lax.stop_gradient(stats.load) / tokens * stats.probability / tokens)
        return nll["nll"] / batch.loss_weights.sum() + 0.5 * balance + 0.1 * stats.squared_lse / tokens

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    logged, found = run(both(sft()), params, split(batch, 1))
    assert logged["loss"] == pytest.approx(float(value), rel=1e-5)
    assert logged["loss/router_balance"] == logged["aux_loss"] > 2.0  # 2 experts a token, when all are used alike
    for path, leaf in flatten(gradients).items():
        np.testing.assert_allclose(found[path], leaf, rtol=0, atol=1e-5 * np.abs(leaf).max(), err_msg=path)


@pytest.mark.parametrize("accumulation", [2, 4])
def test_micro_batches_and_empty_rows_change_nothing(params: Params, accumulation: int) -> None:
    whole = run(both(sft()), params, split(rows(LENGTHS), 1))
    batch = rows(LENGTHS, empty=0 if accumulation == 2 else 8)
    batch.loss_weights[:8] = rows(LENGTHS).loss_weights
    assert_same_run(run(both(sft()), params, split(batch, accumulation)), whole)


def test_a_mesh_that_splits_experts_changes_nothing(params: Params) -> None:
    batch = split(rows(LENGTHS), 2)
    expected = run(both(sft()), params, batch)
    mesh, axes = make_mesh(MeshConfig(expert=2, fsdp=2, tensor=2)), abstract_decoder(CONFIG).axes
    placed = {p: jax.device_put(v, place(axes[p], v.shape, mesh).sharding) for p, v in flatten(params).items()}
    with jax.set_mesh(mesh):
        found = run(both(sft()), unflatten(placed), jax.device_put(batch, batch_sharding(mesh)))
    assert_same_run(found, expected, tolerance=2e-5)


def test_an_objective_of_pairs_gets_them_unasked(params: Params) -> None:
    objective = build_objective(ObjectiveConfig(name="simpo"))
    tokens = np.random.default_rng(1).integers(0, 100, (2, 20)).astype(np.int32)
    ids = np.repeat([[1, 2]], [12, 8], axis=1).repeat(2, axis=0).astype(np.int32)
    positions = np.concatenate([np.arange(12), np.arange(8)])[None].repeat(2, axis=0).astype(np.int32)
    sides, margins = np.array([[1, -1]] * 2, np.int32), np.zeros((2, 2), np.float32)
    batch = Batch(tokens, ids, positions, (positions > 2).astype(np.float32), sides, margins)
    plain, _ = run(objective, params, split(batch, 1))
    logged, _ = run(both(objective), params, split(batch, 2))
    assert logged["loss/simpo"] == pytest.approx(plain["loss"], rel=1e-5)
    added = 0.5 * logged["loss/router_balance"] + 0.1 * logged["loss/router_z"]
    assert logged["loss"] == pytest.approx(plain["loss"] + added, rel=1e-5)
    assert logged["rewards/accuracies"] == plain["rewards/accuracies"]


def test_the_config_decides_or_else_the_model() -> None:
    def coefficients(own: float, **config: Any) -> dict[str, float]:
        moe = MoEConfig(4, 2, 8, router_aux_loss_coef=own)
        decoder = DecoderConfig(100, 16, 24, 2, 2, 2, 8, moe=moe)
        return dict(add_router_losses(sft(), ModelConfig(**config), decoder).coefficients)

    assert coefficients(0.0) == {"nll": 1.0}
    assert coefficients(0.02) == {"nll": 1.0, "router_balance": 0.02}
    assert coefficients(0.02, router_aux_loss_coef=0.0) == {"nll": 1.0}
    assert coefficients(0.0, router_aux_loss_coef=0.1, router_z_loss_coef=0.01) == {
        "nll": 1.0,
        "router_balance": 0.1,
        "router_z": 0.01,
    }


def test_a_model_without_experts_has_no_router_losses() -> None:
    dense = DecoderConfig(100, 16, 24, 2, 2, 2, 8)
    with pytest.raises(UserErrors) as caught:
        add_router_losses(sft(), ModelConfig(router_aux_loss_coef=0.1, router_z_loss_coef=0.2), dense)
    assert [line.split(":")[0] for line in caught.value.problems] == [
        "model.router_aux_loss_coef = 0.1",
        "model.router_z_loss_coef = 0.2",
    ]
    assert add_router_losses(sft(), ModelConfig(router_aux_loss_coef=0.0), dense).coefficients == {"nll": 1.0}
