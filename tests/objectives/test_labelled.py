"""Losses of labelled answers against TRL's own values and numpy float64; their objective's laws; sums of losses."""

import functools
import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.config import ObjectiveConfig
from posttrain.data.packed import assemble, with_sides
from posttrain.errors import UserErrors
from posttrain.objectives import preference
from posttrain.objectives.find import build_objective
from posttrain.records import Batch, LabelledLogps, Params
from tests.objectives.test_pairs import (
    assert_equal_runs,
    make_rows,
    numpy_logps,
    on_mesh,
    params,  # noqa: F401 (a fixture)
    run,
    split,
)

FIXTURE = np.load(Path(__file__).parents[1] / "fixtures" / "labelled.npz")
CASES = [(case["loss"], case["parameters"]) for case in map(json.loads, FIXTURE["cases"])]
T, SLOTS, COUNT = 64, 8, 8


def answers(kl: float, logps: Any = None) -> LabelledLogps:
    """The drawn ones."""
    drawn = {name: jnp.asarray(FIXTURE[name], jnp.float32) for name in ("logps", "ref_logps")}
    labels = jnp.asarray(np.where(FIXTURE["labels"], 1.0, -1.0), jnp.float32)
    made = LabelledLogps(**drawn, tokens=jnp.ones_like(labels), labels=labels, kl=jnp.float32(kl))
    return made if logps is None else replace(made, logps=logps)


def test_cases_cover_every_loss_of_labelled_answers() -> None:
    functions = inspect.getmembers(preference, inspect.isfunction)
    firsts = {name: next(iter(inspect.signature(function).parameters.values())) for name, function in functions}
    found = {name for name, first in firsts.items() if first.annotation is LabelledLogps}
    assert found == {loss for loss, _ in CASES}


@pytest.mark.parametrize(("number", "loss", "parameters"), [(i, *case) for i, case in enumerate(CASES)])
def test_values_and_gradients_are_those_of_trl(number: int, loss: str, parameters: dict) -> None:
    drift = np.mean(FIXTURE["kl_logps"].astype(np.float64) - FIXTURE["ref_kl_logps"])
    expected_kl = max(drift, 0.0) if loss == "kto" else 0.0
    assert FIXTURE["kls"][number] == pytest.approx(expected_kl, rel=1e-6)
    function = functools.partial(getattr(preference, loss), **parameters)

    @jax.jit
    def mean(logps: Any) -> Any:
        return jnp.mean(function(answers(expected_kl, logps)))

    value, gradient = jax.value_and_grad(mean)(answers(0.0).logps)
    assert float(value) == pytest.approx(FIXTURE["losses"][number], rel=1e-5)
    scale = np.abs(FIXTURE["d_logps"][number]).max()
    np.testing.assert_allclose(gradient, FIXTURE["d_logps"][number], rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_gradients_are_those_of_finite_differences(loss: str) -> None:
    """In float64, against the paper's formula in numpy."""
    beta, weights, kl, h = 0.3, (1.5, 0.5), 0.7, 1e-5
    labels = np.where(FIXTURE["labels"], 1.0, -1.0)
    ratios = FIXTURE["logps"].astype(np.float64) - FIXTURE["ref_logps"]

    def losses(x: np.ndarray) -> np.ndarray:
        z = kl if loss == "kto" else 0.0
        value = 1 / (1 + np.exp(-beta * np.where(labels > 0, x - z, z - x)))
        return np.where(labels > 0, weights[0] * (1 - value), weights[1] * (1 - value))

    expected = (losses(ratios + h) - losses(ratios - h)) / (2 * h)
    parameters = {"beta": beta, "desirable_weight": weights[0], "undesirable_weight": weights[1]}
    function = functools.partial(getattr(preference, loss), **parameters)
    gradient = jax.jit(jax.grad(lambda logps: jnp.sum(function(answers(kl, logps)))))(answers(0.0).logps)
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(function(answers(kl)), losses(ratios), rtol=1e-5)


# ---- batches --------------------------------------------------------------------------------------------------------


def make_answers(packed: bool, mismatched: bool) -> Batch:
    """Eight labelled answers, each with a mismatched one behind it if asked for: two to a row or one."""
    rng = np.random.default_rng(0)
    segments, sides, refs = [], [], []
    for i in range(COUNT):
        own, other = [], []
        for kind in ((1 if i % 3 else -1), 2):
            length = int(rng.integers(5, 15))
            weights = (rng.random(length) < 0.6).astype(np.float32)
            weights[0], weights[-1] = 0.0, 1.0
            part = (rng.integers(0, 250, length).astype(np.int32), weights)
            ref = rng.normal(-7, 0.5, length).astype(np.float32) * (weights > 0)
            own.append(part)
            other.append((kind, 0.0))
            refs.append(ref)
        wanted = 2 if mismatched else 1
        segments.append(own[:wanted])
        sides.append(other[:wanted])
    refs = [refs[2 * i : 2 * i + len(sides[i])] for i in range(COUNT)]
    size = 2 if packed else 1
    groups = [range(i, i + size) for i in range(0, COUNT, size)] + [range(0)] * (4 if packed else 0)
    batch = assemble([[part for i in group for part in segments[i]] for group in groups], T)
    batch = with_sides(batch, [[side for i in group for side in sides[i]] for group in groups], SLOTS)
    logps = np.zeros((len(groups), T), np.float32)
    for row, group in enumerate(groups):
        values = np.concatenate([np.zeros(0, np.float32), *(ref for i in group for ref in refs[i])])
        logps[row, : len(values)] = values
    return replace(batch, ref_logps=logps)


def objective(name: Any, **parameters: Any) -> Any:
    return build_objective(ObjectiveConfig(name=name, **parameters))


def test_kto_is_the_papers_formula(params: Params) -> None:  # noqa: F811
    batch = make_answers(packed=True, mismatched=True)
    logps = numpy_logps(params, batch)
    ratios: dict[int, list[float]] = {1: [], -1: [], 2: []}
    for row in range(len(batch.tokens)):
        for segment in range(1, int(batch.segment_ids[row].max()) + 1):
            places = np.flatnonzero((batch.segment_ids[row] == segment) & (batch.loss_weights[row] > 0))
            own = sum(logps[row, t - 1, batch.tokens[row, t]] - float(batch.ref_logps[row, t]) for t in places)
            ratios[int(batch.sides[row, segment - 1])].append(own)
    good, bad = np.array(ratios[1]), np.array(ratios[-1])
    kl = max(np.mean(ratios[2]), 0.0)
    assert kl > 0.1 and len(good) + len(bad) == COUNT

    def s(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x))

    losses = np.concatenate([1.5 * (1 - s(0.2 * (good - kl))), 0.5 * (1 - s(0.2 * (kl - bad)))])
    made = objective("kto", beta=0.2, desirable_weight=1.5, undesirable_weight=0.5)
    values, _ = run(made, params, split(batch, 1))
    expected = {
        "loss": losses.mean(),
        "kl": kl,
        "rewards/chosen": 0.2 * good.mean(),
        "rewards/rejected": 0.2 * bad.mean(),
        "rewards/margins": 0.2 * (good.mean() - bad.mean()),
    }
    for name, value in expected.items():
        assert values[name] == pytest.approx(value, rel=2e-5, abs=1e-6), name


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_micro_batches_and_packing_change_nothing(params: Params, name: str) -> None:  # noqa: F811
    made = objective(name, beta=0.3)
    expected = run(made, params, split(make_answers(packed=False, mismatched=made.mismatched), 1))
    packed = make_answers(packed=True, mismatched=made.mismatched)
    for accumulation in (1, 2, 8):
        assert_equal_runs(run(made, params, split(packed, accumulation)), expected)


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_the_mesh_changes_nothing(params: Params, sizes: dict[str, int]) -> None:  # noqa: F811
    made = objective("kto", beta=0.3)
    batch = split(make_answers(packed=False, mismatched=True), 1)
    assert_equal_runs(on_mesh(made, params, batch, sizes), run(made, params, batch), tolerance=2e-5)


# ---- sums of losses -------------------------------------------------------------------------------------------------


def test_a_weighted_sum_is_the_sum_of_its_losses(params: Params) -> None:  # noqa: F811
    """MPO (arXiv:2411.10442): preference, quality and generation losses in one."""
    batch = split(make_rows(packed=True), 2)
    names, weights = ("sigmoid", "bco_pair", "sft"), (0.8, 0.2, 1.5)
    values, gradients = run(objective(names, loss_weights=weights, beta=0.3), params, batch)
    parts = [run(objective(name, beta=0.3), params, batch) for name in names[:2]]
    nll = run(objective("sigmoid", beta=0.3, sft_weight=1.0), params, batch)
    expected = {"sigmoid": parts[0][0]["loss"], "bco_pair": parts[1][0]["loss"], "sft": nll[0]["loss/sft"]}
    assert values["loss"] == pytest.approx(sum(w * expected[n] for n, w in zip(names, weights, strict=True)), rel=1e-5)
    for name, value in expected.items():
        assert values[f"loss/{name}"] == pytest.approx(value, rel=1e-5)
    for path, leaf in gradients.items():
        summed = 0.8 * parts[0][1][path] + 0.2 * parts[1][1][path] + 1.5 * (nll[1][path] - parts[0][1][path])
        np.testing.assert_allclose(leaf, summed, rtol=0, atol=1e-5 * np.abs(summed).max(), err_msg=path)


def test_sums_and_parameters_are_checked() -> None:
    made = objective(["sigmoid", "simpo"], simpo_gamma=0.7)
    assert made.needs_reference and not made.whole_batch and dict(made.coefficients) == {"sigmoid": 1.0, "simpo": 1.0}
    assert objective(["aot", "ipo"]).whole_batch and not objective(["simpo", "orpo"]).needs_reference
    for wrong, message in (
        ({"name": ["sigmoid", "kto"]}, "only losses of pairs and sft add up, not kto"),
        ({"name": ["sigmoid", "sigmoid"]}, "stands there twice"),
        ({"name": ["sigmoid", "ipoo"]}, "'ipoo': known are"),
        ({"name": ["sigmoid", "ipo"], "bta": 1}, "objective.bta: unknown key; did you mean 'beta'"),
        ({"name": ["sigmoid", "ipo"], "loss_weights": [1.0]}, "give one for each of sigmoid, ipo"),
        ({"name": ["sigmoid", "ipo"], "loss_weights": [1.0, -1.0]}, r"objective\.loss_weights\.1 = -1\.0"),
        ({"name": ["sigmoid", "exo_pair"]}, r"objective\.label_smoothing"),
        ({"name": "kto", "desirable_weight": 0}, r"objective\.desirable_weight = 0"),
    ):
        with pytest.raises(UserErrors, match=message):
            objective(**wrong)
