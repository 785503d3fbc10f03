"""From tokens to pairs: sums, terms and metrics in numpy float64; and the step's laws for objectives of pairs."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.config import MeshConfig, ObjectiveConfig
from posttrain.data.packed import assemble, with_sides
from posttrain.errors import UserErrors
from posttrain.models.decoder import ComputeOptions, DecoderConfig, abstract_decoder, init_params
from posttrain.objectives.find import build_objective
from posttrain.objectives.logps import batch_stats
from posttrain.parallel.mesh import make_mesh
from posttrain.parallel.sharding import batch_sharding, flatten, place, unflatten
from posttrain.records import Batch, Params
from posttrain.train.step import LossSums, make_gradient_step, report

CONFIG = DecoderConfig(250, 32, 48, 2, 4, 2, 8)
T, SLOTS = 64, 4
LENGTHS = ((20, 12), (7, 25), (17, 15), (3, 29), (9, 9), (16, 13))
MARGINS = (0.0, 1.0, 0.5, 2.0, 0.0, 0.25)


@pytest.fixture(scope="module")
def params() -> Params:
    made = jax.jit(init_params, static_argnums=0)(CONFIG, jax.random.key(0))
    return jax.tree.map(lambda p: p * 4, made)


def objective(name: str = "sigmoid", **parameters: Any) -> Any:
    return build_objective(ObjectiveConfig(name=name, **parameters))


def loss_sums(made: Any) -> LossSums:
    return LossSums(abstract_decoder(CONFIG, options=ComputeOptions("chunked", "dots")), made, jnp.float32)


def make_rows(packed: bool, reference: bool = True) -> Batch:
    """Six pairs, the last token of each answer among the trained ones: two to a row or one, the last rows empty."""
    rng = np.random.default_rng(0)
    pairs, ref = [], []
    for lengths in LENGTHS:
        sides = []
        for length in lengths:
            weights = (rng.random(length) < 0.6).astype(np.float32)
            weights[0], weights[-1] = 0.0, 1.0
            sides.append((rng.integers(0, 250, length).astype(np.int32), weights))
        pairs.append(sides)
        ref.append([rng.normal(-5, 1, len(ids)).astype(np.float32) * (w > 0) for ids, w in sides])
    size = 2 if packed else 1
    groups = [range(i, i + size) for i in range(0, 6, size)] + [range(0)] * (5 if packed else 2)
    batch = assemble([[side for i in group for side in pairs[i]] for group in groups], T)
    sides = [[side for i in group for side in ((1, MARGINS[i]), (-1, 0.0))] for group in groups]
    batch = with_sides(batch, sides, SLOTS)
    if not reference:
        return batch
    logps = np.zeros((len(groups), T), np.float32)
    for row, group in enumerate(groups):
        values = np.concatenate([np.zeros(0, np.float32), *(part for i in group for part in ref[i])])
        logps[row, : len(values)] = values
    return replace(batch, ref_logps=logps)


def split(batch: Batch, accumulation: int) -> Batch:
    return jax.tree.map(lambda x: x.reshape(accumulation, -1, x.shape[-1]), batch)


def run(made: Any, params: Params, batch: Batch) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    loss = loss_sums(made)

    @jax.jit
    def compute(params: Params, batch: Batch) -> Any:
        totals = loss.totals(batch)
        gradients, sums, metrics = make_gradient_step(loss)(params, batch, totals, None)
        return gradients, report(made, sums, totals, metrics)

    gradients, values = compute(params, batch)
    return (
        {name: float(value) for name, value in values.items()},
        {path: np.asarray(leaf) for path, leaf in flatten(gradients).items()},
    )


def numpy_logps(params: Params, batch: Batch) -> np.ndarray:
    """Log-probabilities `[B, T, V]` of every token that may follow, from full logits, in numpy float64."""
    model = abstract_decoder(CONFIG, options=ComputeOptions("reference", "none")).merge(params)
    hidden = np.asarray(jax.jit(lambda b: model.hidden(b))(batch), np.float64)
    logits = hidden @ np.asarray(model.head(), np.float64)[:250].T
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def numpy_pairs(params: Params, batch: Batch) -> dict[str, np.ndarray]:
    """Sums of log-probabilities of each side in numpy float64, in the order of the rows."""
    logps = numpy_logps(params, batch)
    found: dict[str, list[float]] = {name: [] for name in ("chosen", "rejected", "ref_chosen", "ref_rejected")}
    for row in range(batch.tokens.shape[0]):
        for segment in range(1, int(batch.segment_ids[row].max()) + 1):
            name = "chosen" if segment % 2 else "rejected"
            places = np.flatnonzero((batch.segment_ids[row] == segment) & (batch.loss_weights[row] > 0))
            found[name].append(sum(logps[row, t - 1, batch.tokens[row, t]] for t in places))
            found[f"ref_{name}"].append(float(np.sum(batch.ref_logps[row, places], dtype=np.float64)))
    return {name: np.array(values) for name, values in found.items()}


def test_dpo_is_the_papers_formula(params: Params) -> None:
    batch = make_rows(packed=True)
    values, _ = run(objective(beta=0.3), params, split(batch, 1))
    pairs = numpy_pairs(params, batch)
    rewards = [0.3 * (pairs[side] - pairs[f"ref_{side}"]) for side in ("chosen", "rejected")]
    margins = rewards[0] - rewards[1]
    expected = {
        "loss": np.mean(np.log1p(np.exp(-margins))),
        "logps/chosen": np.mean(pairs["chosen"]),
        "logps/rejected": np.mean(pairs["rejected"]),
        "rewards/chosen": np.mean(rewards[0]),
        "rewards/rejected": np.mean(rewards[1]),
        "rewards/margins": np.mean(margins),
        "rewards/accuracies": np.mean(margins > 0),
    }
    for name, value in expected.items():
        assert values[name] == pytest.approx(value, rel=2e-5, abs=1e-6), name


def test_sft_is_a_term_of_the_chosen_answers(params: Params) -> None:
    batch = make_rows(packed=True)
    values, _ = run(objective(beta=0.3, sft_weight=0.7), params, split(batch, 1))
    plain, _ = run(objective(beta=0.3), params, split(batch, 1))
    tokens = sum(
        float((batch.loss_weights[row, batch.segment_ids[row] % 2 == 1] > 0).sum()) for row in range(len(batch.tokens))
    )
    nll = -numpy_pairs(params, batch)["chosen"].sum() / tokens
    assert values["loss/sft"] == pytest.approx(nll, rel=1e-5)
    assert values["loss"] == pytest.approx(plain["loss"] + 0.7 * nll, rel=1e-5)


LOSSES = ("sigmoid", "ipo", "hinge", "bco_pair", "apo_zero", "sigmoid_norm", "simpo", "cpo", "orpo")


def assert_equal_runs(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    for name, value in expected[0].items():
        assert found[0][name] == pytest.approx(value, rel=2e-5, abs=1e-5), name
    for path, leaf in expected[1].items():
        np.testing.assert_allclose(found[1][path], leaf, rtol=0, atol=tolerance * np.abs(leaf).max(), err_msg=path)


@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_and_packing_change_nothing(params: Params, name: str) -> None:
    made = objective(name)
    expected = run(made, params, split(make_rows(packed=False, reference=made.needs_reference), 1))
    packed = make_rows(packed=True, reference=made.needs_reference)
    for accumulation in (1, 2, 8):
        assert_equal_runs(run(made, params, split(packed, accumulation)), expected)


@pytest.mark.parametrize("name", ["sigmoid", "orpo", "aot"])
@pytest.mark.parametrize("sizes", [{"fsdp": 2, "context": 4}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_the_mesh_changes_nothing(params: Params, name: str, sizes: dict[str, int]) -> None:
    made = objective(name)
    batch = split(make_rows(packed=False, reference=made.needs_reference), 1)
    assert_equal_runs(on_mesh(made, params, batch, sizes), run(made, params, batch), tolerance=2e-5)


def on_mesh(made: Any, params: Params, batch: Batch, sizes: dict[str, int]) -> Any:
    """`run` on a mesh of these axes."""
    mesh = make_mesh(MeshConfig(**({"fsdp": 1} | sizes)))
    axes = abstract_decoder(CONFIG, options=ComputeOptions("chunked", "dots")).axes
    placed = unflatten(
        {
            path: jax.device_put(leaf, place(axes[path], leaf.shape, mesh).sharding)
            for path, leaf in flatten(params).items()
        }
    )
    with jax.set_mesh(mesh):
        return run(made, placed, jax.device_put(batch, batch_sharding(mesh)))


def test_where_model_and_reference_agree_the_margins_are_zero(params: Params) -> None:
    """The first step: log 2, whatever beta."""
    batch = make_rows(packed=True)
    model = abstract_decoder(CONFIG, options=ComputeOptions("chunked", "none")).merge(params)

    def own(batch: Batch) -> Any:
        return batch_stats(model, batch, needed=jnp.asarray(batch.loss_weights) > 0).logps

    batch = replace(batch, ref_logps=np.asarray(jax.jit(own)(batch)))
    for beta in (0.1, 2.0):
        values, _ = run(objective(beta=beta), params, split(batch, 1))
        assert values["loss"] == pytest.approx(np.log(2), abs=1e-5)
        assert values["rewards/margins"] == pytest.approx(0, abs=1e-5)


# ---- by name --------------------------------------------------------------------------------------------------------


def test_names_and_parameters_are_checked() -> None:
    with pytest.raises(UserErrors, match=r"known are .*sigmoid.*simpo"):
        objective("dpo")
    with pytest.raises(UserErrors, match=r"objective\.bta: unknown key; did you mean 'beta'"):
        objective(bta=0.1)
    with pytest.raises(UserErrors, match=r"objective\.beta = 0"):
        objective(beta=0)
    with pytest.raises(UserErrors, match=r"objective\.label_smoothing"):
        objective("exo_pair")


def test_what_an_objective_says_of_itself() -> None:
    assert (objective().rows, objective().needs_reference, objective().whole_batch) == ("pairs", True, False)
    assert (objective("simpo").needs_reference, objective("aot").whole_batch) == (False, True)
    assert dict(objective("cpo").coefficients) == {"cpo": 1.0, "sft": 1.0}
    assert dict(objective("cpo", sft_weight=0).coefficients) == {"cpo": 1.0}
    assert (objective("sft").rows, objective("sft").needs_reference) == ("single", False)
