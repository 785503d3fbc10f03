"""Reward objectives: the loss against its formula, TRL's trainer and finite differences; and the step's laws."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.config import MeshConfig, ObjectiveConfig
from posttrain.data.packed import assemble, with_sides
from posttrain.errors import UserErrors
from posttrain.models import hf
from posttrain.models.decoder import ComputeOptions, DecoderConfig, abstract_decoder, init_params
from posttrain.objectives.find import build_objective
from posttrain.objectives.reward import reward
from posttrain.parallel.mesh import make_mesh
from posttrain.parallel.sharding import batch_sharding, flatten, place, unflatten
from posttrain.records import Batch, PairScores, Params
from posttrain.train.step import LossSums, make_gradient_step, report

FIXTURES = Path(__file__).parent.parent / "fixtures" / "reward"
CONFIG = DecoderConfig(250, 32, 48, 2, 4, 2, 8, num_labels=1)
T, SLOTS = 64, 6
LENGTHS = ((20, 12), (7, 25), (17, 15), (3, 29), (9, 9), (16, 13))
MARGINS = (0.0, 1.0, 0.5, 2.0, 0.0, 0.25)


@pytest.fixture(scope="module")
def params() -> Params:
    made = jax.jit(init_params, static_argnums=0)(CONFIG, jax.random.key(0))
    made = jax.tree.map(lambda p: p * 4, made)
    return made | {"score": {"kernel": jax.random.normal(jax.random.key(1), (1, 32), jnp.float32)}}


def objective(**parameters: Any) -> Any:
    return build_objective(ObjectiveConfig(name="reward", **parameters))


# ---- the pure function -----------------------------------------------------------------------------------------------


def drawn(count: int = 12) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    values = {name: rng.normal(0, 2, count) for name in ("chosen", "rejected")}
    return values | {"margins": rng.random(count), "present": np.ones(count)}


def formula(chosen: Any, rejected: Any, margins: Any, coefficient: float) -> Any:
    """In float64."""
    return np.log1p(np.exp(-(chosen - rejected - margins))) + coefficient * (chosen + rejected) ** 2


def pairs_of(values: dict[str, np.ndarray]) -> PairScores:
    return PairScores(**{name: jnp.asarray(value, jnp.float32) for name, value in values.items()})


@pytest.mark.parametrize("coefficient", [0.0, 0.01, 1.5])
def test_the_loss_is_the_formula_with_margins_and_centering(coefficient: float) -> None:
    values = drawn()
    losses = reward(pairs_of(values), center_rewards_coefficient=coefficient)
    expected = formula(values["chosen"], values["rejected"], values["margins"], coefficient)
    np.testing.assert_allclose(np.asarray(losses), expected, rtol=1e-5)


@pytest.mark.parametrize("coefficient", [0.0, 0.01, 1.5])
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_the_gradient_is_that_of_finite_differences(side: str, coefficient: float) -> None:
    values = drawn()

    def total(score: Any) -> Any:
        moved = PairScores(**{**vars(pairs_of(values)), side: score})
        return jnp.sum(reward(moved, center_rewards_coefficient=coefficient))

    found = np.asarray(jax.grad(total)(jnp.asarray(values[side], jnp.float32)))
    step = 1e-6
    ends = []
    for sign in (1, -1):
        moved = values | {side: values[side] + sign * step}
        ends.append(formula(moved["chosen"], moved["rejected"], moved["margins"], coefficient))
    expected = (ends[0] - ends[1]) / (2 * step)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_extreme_scores_stay_finite() -> None:
    scores = np.array([1e4, -1e4, 0.0])
    values = {"chosen": scores, "rejected": -scores, "margins": np.zeros(3), "present": np.ones(3)}
    gradient = jax.grad(lambda pairs: jnp.sum(reward(pairs)))(pairs_of(values))
    np.testing.assert_allclose(np.asarray(reward(pairs_of(values))), [0.0, 2e4, np.log(2)], rtol=1e-6)
    np.testing.assert_allclose(np.asarray(gradient.chosen), [0.0, -1.0, -0.5], rtol=1e-6)


# ---- a batch ---------------------------------------------------------------------------------------------------------


def make_rows(packed: bool, margins: tuple[float, ...] = MARGINS) -> Batch:
    """Six pairs, two to a row or one, the last rows empty; only the last token of an answer is trained on."""
    rng = np.random.default_rng(0)
    pairs = [[side(rng.integers(0, 250, length)) for length in lengths] for lengths in LENGTHS]
    size = 2 if packed else 1
    groups = [range(i, i + size) for i in range(0, 6, size)] + [range(0)] * (5 if packed else 2)
    batch = assemble([[side for i in group for side in pairs[i]] for group in groups], T)
    return with_sides(batch, [[s for i in group for s in ((1, margins[i]), (-1, 0.0))] for group in groups], SLOTS)


def side(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    weights = np.zeros(len(ids), np.float32)
    weights[-1] = 1.0
    return ids.astype(np.int32), weights


def split(batch: Batch, accumulation: int) -> Batch:
    return jax.tree.map(lambda x: x.reshape(accumulation, -1, x.shape[-1]), batch)


def run(
    made: Any, params: Params, batch: Batch, config: DecoderConfig = CONFIG
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    decoder = abstract_decoder(config, options=ComputeOptions("chunked", "dots"))
    loss = LossSums(decoder, made, jnp.float32)

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


def numpy_scores(params: Params, batch: Batch) -> np.ndarray:
    """[pairs, 2], from the hidden states at the ends of the segments, found by looking for them."""
    model = abstract_decoder(CONFIG, options=ComputeOptions("reference", "none")).merge(params)
    hidden = np.asarray(jax.jit(lambda b: model.hidden(b))(batch), np.float64)
    weight = np.asarray(params["score"]["kernel"], np.float64)[0]
    ids = np.asarray(batch.segment_ids)
    scores = [
        hidden[row, np.flatnonzero(ids[row] == segment)[-1]] @ weight
        for row in range(len(ids))
        for segment in range(1, ids[row].max() + 1)
    ]
    return np.reshape(scores, (-1, 2))


def test_loss_and_metrics_of_a_batch(params: Params) -> None:
    batch = make_rows(packed=True)
    values, _ = run(objective(center_rewards_coefficient=0.1), params, split(batch, 1))
    scores = numpy_scores(params, batch)
    chosen, rejected = scores.T
    expected = {
        "loss": np.mean(formula(chosen, rejected, np.array(MARGINS), 0.1)),
        "accuracy": np.mean(chosen > rejected),
        "margin": np.mean(chosen - rejected),
        "min_reward": scores.min(),
        "mean_reward": scores.mean(),
        "max_reward": scores.max(),
    }
    assert values.keys() == expected.keys() and 0 < expected["accuracy"] < 1
    for name, value in expected.items():
        assert values[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_loss_metrics_and_gradient_are_those_of_trls_trainer(name: str, tmp_path: Path) -> None:
    expected = np.load(FIXTURES / name / "expected.npz")
    config, _ = hf.load_config(FIXTURES / name)
    abstract = abstract_decoder(config).shapes
    params = hf.load_params(FIXTURES / name, config, abstract)
    sides = [side(ids[:n]) for ids, n in zip(expected["ids"], expected["lengths"], strict=True)]
    margins = expected["margins"].tolist()

    def batch(margins: list[float]) -> Batch:
        """Pairs 0 to 2 in one row, 3 and 4 in another."""
        of_pairs = [((1, margin), (-1, 0.0)) for margin in margins]
        rows = [[entry for pair in of_pairs[a:b] for entry in pair] for a, b in ((0, 3), (3, 5))]
        return split(with_sides(assemble([sides[:6], sides[6:]], 160), rows, 8), 1)

    values, _ = run(objective(), params, batch([0.0] * 5), config)
    assert values["loss"] == pytest.approx(expected["losses"][0], rel=1e-5)
    for key, value in json.loads(str(expected["metrics"])).items():
        assert values[key] == pytest.approx(value, rel=1e-5, abs=2e-6), key
    values, gradient = run(objective(center_rewards_coefficient=0.3), params, batch(margins), config)
    assert values["loss"] == pytest.approx(expected["losses"][1], rel=1e-5)
    if name == "tied":
        return
    shutil.copy(FIXTURES / name / "config.json", tmp_path)
    shutil.copy(FIXTURES / name / "gradient.safetensors", tmp_path / "model.safetensors")
    for path, leaf in flatten(hf.load_params(tmp_path, config, abstract)).items():
        tolerance = 1e-5 * np.abs(np.asarray(leaf)).max()
        np.testing.assert_allclose(gradient[path], np.asarray(leaf), rtol=0, atol=tolerance, err_msg=path)


def assert_equal_runs(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    assert found[0].keys() == expected[0].keys()
    for name, value in expected[0].items():
        assert found[0][name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    for path, leaf in expected[1].items():
        np.testing.assert_allclose(found[1][path], leaf, rtol=0, atol=tolerance * np.abs(leaf).max(), err_msg=path)


def test_micro_batches_and_packing_change_nothing(params: Params) -> None:
    made = objective(center_rewards_coefficient=0.1)
    expected = run(made, params, split(make_rows(packed=False), 1))
    for accumulation in (1, 2, 8):  # of eight, five hold no pair at all
        assert_equal_runs(run(made, params, split(make_rows(packed=True), accumulation)), expected)


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 8}, {"data": 8}, {"data": 4, "context": 2}, {"data": 2, "fsdp": 2, "tensor": 2}]
)
def test_the_mesh_changes_nothing(params: Params, sizes: dict[str, int]) -> None:
    made = objective(center_rewards_coefficient=0.1)
    batch = split(make_rows(packed=False), 1)
    expected = run(made, params, batch)
    mesh = make_mesh(MeshConfig(**({"fsdp": 1} | sizes)))
    axes = abstract_decoder(CONFIG).axes
    placed = {
        path: jax.device_put(leaf, place(axes[path], leaf.shape, mesh).sharding)
        for path, leaf in flatten(params).items()
    }
    with jax.set_mesh(mesh):
        found = run(made, unflatten(placed), jax.device_put(batch, batch_sharding(mesh)))
    assert_equal_runs(found, expected, tolerance=2e-5)


def test_margins_ask_for_more(params: Params) -> None:
    scores = numpy_scores(params, make_rows(packed=True))
    without, _ = run(objective(), params, split(make_rows(packed=True, margins=(0.0,) * 6), 1))
    with_them, _ = run(objective(), params, split(make_rows(packed=True), 1))
    assert without["loss"] == pytest.approx(np.mean(formula(scores[:, 0], scores[:, 1], 0.0, 0.0)), rel=1e-5)
    assert with_them["loss"] > without["loss"] + 0.05


def test_only_the_segments_that_are_there_are_learned_from(params: Params) -> None:
    """What stands in padding and behind the last pair has no influence, and no gradient comes from it."""
    made, batch = objective(center_rewards_coefficient=0.1), make_rows(packed=True)
    expected = run(made, params, split(batch, 1))
    unused = next(i for i in range(250) if i not in batch.tokens)
    tokens = np.where(batch.segment_ids == 0, unused, batch.tokens)
    margins = np.where(batch.sides == 1, batch.margins, 5.0).astype(np.float32)
    changed = Batch(tokens, batch.segment_ids, batch.positions, batch.loss_weights, batch.sides, margins)
    found = run(made, params, split(changed, 1))
    assert found[0] == expected[0]
    assert all(np.array_equal(found[1][path], leaf) for path, leaf in expected[1].items())
    assert not found[1]["embed/embedding"][unused].any() and found[1]["embed/embedding"].any()


def test_a_batch_without_pairs_teaches_nothing(params: Params) -> None:
    empty = with_sides(assemble([[], []], T), [[], []], SLOTS)
    values, gradient = run(objective(center_rewards_coefficient=0.1), params, split(empty, 1))
    assert values["loss"] == 0 and all(not leaf.any() for leaf in gradient.values())


def test_from_zeros_the_loss_is_log_2_and_only_the_score_learns(params: Params) -> None:
    start = params | {"score": {"kernel": jnp.zeros((1, 32), jnp.float32)}}
    values, gradient = run(objective(), start, split(make_rows(packed=True, margins=(0.0,) * 6), 1))
    assert values["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert values["max_reward"] == values["min_reward"] == 0
    assert gradient["score/kernel"].any()
    assert not any(leaf.any() for path, leaf in gradient.items() if path != "score/kernel")


def test_what_it_says_of_itself() -> None:
    made = objective()
    assert (made.rows, made.head, made.needs_reference, made.whole_batch) == ("pairs", "score", False, False)
    assert build_objective(ObjectiveConfig(name="sft")).head == "lm"
    assert build_objective(ObjectiveConfig(name="sigmoid")).head == "lm"
    with pytest.raises(UserErrors, match=r"objective\.center_rewards_coefficient = -1"):
        objective(center_rewards_coefficient=-1)
    with pytest.raises(UserErrors, match=r"objective\.sft_weight: unknown key"):
        objective(sft_weight=1.0)
    with pytest.raises(UserErrors, match=r"only losses of pairs and sft add up, not reward"):
        build_objective(ObjectiveConfig(name=("sigmoid", "reward")))
