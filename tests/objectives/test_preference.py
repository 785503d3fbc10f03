"""Preference losses against TRL's own values, closed forms in numpy float64, finite differences and their laws."""

import dataclasses
import functools
import inspect
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
import pytest

from posttrain.objectives import preference
from posttrain.records import LabelledLogps, PairLogps, PolicyPairs

FIXTURE = np.load(Path(__file__).parents[1] / "fixtures" / "preference.npz")
CASES = [(case["loss"], case["parameters"]) for case in map(json.loads, FIXTURE["cases"])]
DRAWN = {key: FIXTURE[key] for key in FIXTURE.files if FIXTURE[key].dtype == np.float32}
P = len(DRAWN["chosen"])

SCORED = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")
TWO_SIDED = ("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down")
SORTED = ("aot", "aot_unpaired")
REFERENCE_FREE = ("cpo", "simpo", "alphapo", "orpo")
LOSSES = SCORED + TWO_SIDED + SORTED + REFERENCE_FREE
NEEDED = {"exo_pair": {"label_smoothing": 1e-3}}
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


def make_pairs(arrays: dict, present=None) -> PairLogps:
    count = len(arrays["chosen"])
    present = np.ones(count) if present is None else present
    return PairLogps(
        **{key: jnp.asarray(value, jnp.float32) for key, value in arrays.items()},
        margins=jnp.zeros(count, jnp.float32),
        present=jnp.asarray(present, jnp.float32),
    )


def bound(loss: str, parameters: dict | None = None):
    """The loss with its parameters, and those it cannot do without."""
    return functools.partial(getattr(preference, loss), **{**NEEDED.get(loss, {}), **(parameters or {})})


@functools.cache
def compiled(loss: str, parameters: tuple[tuple[str, Any], ...]):
    @jax.jit
    def losses_and_gradients(pairs):
        losses, pull = jax.vjp(bound(loss, dict(parameters)), pairs)
        (gradients,) = pull(jnp.ones_like(losses))
        return losses, gradients.chosen, gradients.rejected

    return losses_and_gradients


def run(loss: str, parameters: dict | None = None, pairs: PairLogps | None = None):
    """Losses [P], and the gradient of their sum in the chosen and in the rejected log-probabilities."""
    pairs = make_pairs(DRAWN) if pairs is None else pairs
    return tuple(map(np.asarray, compiled(loss, tuple((parameters or {}).items()))(pairs)))


def flipped(arrays: dict) -> dict:
    """Chosen and rejected interchanged."""
    names = {"chosen": "rejected", "rejected": "chosen"}
    swap = {key: "_".join(names.get(part, part) for part in key.split("_")) for key in arrays}
    return {key: arrays[swap[key]] for key in arrays}


# Closed forms, as the papers write them.


def log_s(x):
    return -np.logaddexp(0.0, -x)


def s(x):
    return np.exp(log_s(x))


def derivative(x, f_divergence_type="reverse_kl", f_alpha_divergence_coef=0.5):
    """f'(u) of f-DPO's table 1; its alpha is 1 - f_alpha_divergence_coef."""
    u = np.exp(x)
    if f_divergence_type == "forward_kl":
        return -1 / u
    if f_divergence_type == "js_divergence":
        return np.log(2 * u / (1 + u))
    if f_divergence_type == "alpha_divergence" and f_alpha_divergence_coef != 1:
        alpha = 1 - f_alpha_divergence_coef
        return (1 - u**-alpha) / alpha
    return np.log(u) + 1


def cross_entropy(d, e):
    return -(1 - e) * log_s(d) - e * log_s(-d)


def by_rank(x, y):
    """x_(k) - y_(k), at the place of x_(k)."""
    out = np.empty_like(x)
    for place, smallest in zip(np.argsort(x), np.sort(y), strict=True):
        out[place] = x[place] - smallest
    return out


def odds(mean_logp):
    return np.exp(mean_logp) / (1 - np.exp(mean_logp))


def closed_form(loss: str, parameters: dict, a: dict) -> np.ndarray:
    p = {**NEEDED.get(loss, {}), **parameters}
    b, e = p.get("beta", 0.1), p.get("label_smoothing", 0.0)
    f = {key: p[key] for key in ("f_divergence_type", "f_alpha_divergence_coef") if key in p}
    ratios = a["chosen"] - a["ref_chosen"], a["rejected"] - a["ref_rejected"]
    c, r = (derivative(x, **f) for x in ratios) if loss in SCORED else ratios
    n_c, n_r = a["chosen_tokens"], a["rejected_tokens"]
    mean_c, mean_r = a["chosen"] / n_c, a["rejected"] / n_r
    # The additive constant of f' cancels in c - r, but not in averages over different lengths: there f'(1) = 0.
    zero = derivative(0.0, **f)
    per_token = (c - zero) / n_c - (r - zero) / n_r
    q, d, tau, gamma = s(b * (c - r)), b * (c - r), p.get("discopop_tau", 0.05), p.get("simpo_gamma", 0.5)
    alpha = p.get("alpha", 0.0)
    shaped = [(1 - np.exp(x) ** -alpha) / alpha if alpha else x for x in (mean_c, mean_r)]
    forms = {
        "sigmoid": lambda: cross_entropy(d, e),
        "sigmoid_norm": lambda: -log_s(b * per_token),
        "hinge": lambda: np.maximum(0, 1 - d),
        "ipo": lambda: (per_token - 1 / (2 * b)) ** 2,
        "exo_pair": lambda: q * (log_s(d) - np.log(1 - e)) + (1 - q) * (log_s(-d) - np.log(e)),
        "robust": lambda: (-(1 - e) * log_s(d) + e * log_s(-d)) / (1 - 2 * e),
        "discopop": lambda: (1 - s(d / tau)) * -log_s(d) + s(d / tau) * np.exp(-d),
        "nca_pair": lambda: -log_s(b * c) - log_s(-b * c) / 2 - log_s(-b * r) / 2,
        "bco_pair": lambda: -log_s(b * c) - log_s(-b * r),
        "sppo_hard": lambda: (c - 1 / (2 * b)) ** 2 + (r + 1 / (2 * b)) ** 2,
        "apo_zero": lambda: 1 - s(b * c) + s(b * r),
        "apo_down": lambda: s(b * c) + 1 - s(b * (c - r)),
        "aot": lambda: cross_entropy(b * by_rank(a["chosen"] - a["rejected"], a["ref_chosen"] - a["ref_rejected"]), e),
        "aot_unpaired": lambda: cross_entropy(b * by_rank(c, r), e),
        "cpo": lambda: cross_entropy(b * (a["chosen"] - a["rejected"]), e),
        "simpo": lambda: cross_entropy(b * (mean_c - mean_r) - gamma, e),
        "alphapo": lambda: cross_entropy(b * (shaped[0] - shaped[1]) - gamma, e),
        "orpo": lambda: -b * log_s(np.log(odds(mean_c) / odds(mean_r))),
    }
    return forms[loss]()


def slope(loss: str, parameters: dict, key: str, arrays: dict) -> np.ndarray:
    """Derivative of the summed closed form, place by place, by central differences."""
    out = np.empty(P)
    for i in range(P):
        step = 1e-5 * (np.arange(P) == i)
        up, down = ({**arrays, key: arrays[key] + sign * step} for sign in (1, -1))
        out[i] = (closed_form(loss, parameters, up) - closed_form(loss, parameters, down)).sum() / 2e-5
    return out


def assert_gradient(actual, expected):
    assert np.abs(actual - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("index", range(len(CASES)), ids=[f"{loss} {values}" for loss, values in CASES])
def test_values_and_gradients(index):
    loss, parameters = CASES[index]
    losses, d_chosen, d_rejected = run(loss, parameters)
    assert losses.shape == (P,) and losses.dtype == np.float32

    expected = FIXTURE["losses"][index]
    if loss in SORTED:  # TRL gives their mean only
        np.testing.assert_allclose(losses.mean(), expected[0], rtol=1e-5)
    else:
        np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert_gradient(d_chosen, FIXTURE["d_chosen"][index])
    assert_gradient(d_rejected, FIXTURE["d_rejected"][index])

    arrays = {key: value.astype(np.float64) for key, value in DRAWN.items()}
    np.testing.assert_allclose(losses, closed_form(loss, parameters, arrays), rtol=1e-5)
    assert_gradient(d_chosen, slope(loss, parameters, "chosen", arrays))
    assert_gradient(d_rejected, slope(loss, parameters, "rejected", arrays))


def test_cases_cover_every_loss():
    public = {
        name: function
        for name, function in inspect.getmembers(preference, inspect.isfunction)
        if function.__module__ == preference.__name__
        and not name.startswith("_")
        and name not in ("whole_batch", "with_sft", "with_kl")
    }
    labelled = {"kto", "apo_zero_unpaired"}  # test_labelled.py has their cases
    assert set(public) - labelled == set(LOSSES) == {loss for loss, _ in CASES}
    for name, function in public.items():
        first, *others = inspect.signature(function).parameters.values()
        record = LabelledLogps if name in labelled else PolicyPairs if name in REFERENCE_FREE else PairLogps
        assert first.annotation is record
        assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in others)
        assert "arXiv:" in inspect.getdoc(function)
        described = [field.description for field in schema(name).model_fields.values()]
        assert len(described) == len(others) and all(described)


# Laws.

B = 0.3
AT_REFERENCE = {
    "sigmoid": np.log(2),
    "sigmoid_norm": np.log(2),
    "hinge": 1,
    "ipo": 1 / (4 * B**2),
    "exo_pair": -np.log(2) - np.log(0.999 * 0.001) / 2,
    "robust": np.log(2),
    "discopop": np.log(2) / 2 + 1 / 2,
    "nca_pair": 2 * np.log(2),
    "bco_pair": 2 * np.log(2),
    "sppo_hard": 1 / (2 * B**2),
    "apo_zero": 1,
    "apo_down": 1,
    "aot": np.log(2),
    "aot_unpaired": np.log(2),
}


@pytest.mark.parametrize("loss", AT_REFERENCE)
def test_policy_equal_to_reference(loss):
    arrays = {**DRAWN, "ref_chosen": DRAWN["chosen"], "ref_rejected": DRAWN["rejected"]}
    for divergence in DIVERGENCES if loss in SCORED else (None,):
        chosen = {"f_divergence_type": divergence} if divergence else {}
        losses, d_chosen, d_rejected = run(loss, {"beta": B, **chosen}, make_pairs(arrays))
        np.testing.assert_allclose(losses, np.full(P, AT_REFERENCE[loss]), rtol=1e-6)
        if loss == "sigmoid":  # f''(1) is 1, but for the Jensen-Shannon divergence, where it is 1/2
            expected = np.full(P, B / (4 if divergence == "js_divergence" else 2))
            np.testing.assert_allclose((-d_chosen, d_rejected), (expected, expected), rtol=1e-6)


@pytest.mark.parametrize("loss", ["sigmoid", "cpo"])
def test_smoothing_is_the_expected_loss_of_noisy_labels(loss):
    clean, interchanged = run(loss)[0], run(loss, pairs=make_pairs(flipped(DRAWN)))[0]
    smoothed = run(loss, {"label_smoothing": 0.3})[0]
    np.testing.assert_allclose(smoothed, 0.7 * clean + 0.3 * interchanged, rtol=1e-6)
    other_way = run(loss, {"label_smoothing": 0.7}, make_pairs(flipped(DRAWN)))[0]
    np.testing.assert_allclose(smoothed, other_way, rtol=1e-6)


def test_robust_is_unbiased():
    noise = {"label_smoothing": 0.3}
    expectation = 0.7 * run("robust", noise)[0] + 0.3 * run("robust", noise, make_pairs(flipped(DRAWN)))[0]
    np.testing.assert_allclose(expectation, run("sigmoid")[0], rtol=1e-5)
    np.testing.assert_array_equal(run("robust")[0], run("sigmoid")[0])


@pytest.mark.parametrize("loss", SCORED)
def test_alpha_divergence_has_both_kl_as_limits(loss):
    for alpha, divergence in ((1.0, "reverse_kl"), (0.0, "forward_kl")):
        general = run(loss, {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": alpha})
        np.testing.assert_array_equal(general, run(loss, {"f_divergence_type": divergence}))
        near = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": alpha + 1e-4}
        np.testing.assert_allclose(run(loss, near)[0], general[0], rtol=2e-2)


def test_simpo_is_alphapo_of_alpha_zero():
    shared = {"beta": 2.0, "simpo_gamma": 1.0}
    np.testing.assert_array_equal(run("alphapo", shared), run("simpo", shared))
    np.testing.assert_allclose(run("alphapo", {**shared, "alpha": 1e-4})[0], run("simpo", shared)[0], rtol=1e-2)


def test_aot_compares_distributions():
    """Nothing but the two samples matters: which reference value belongs to which pair does not, nor does the order."""
    order, e = np.random.default_rng(0).permutation(P), {"label_smoothing": 0.1}
    for loss, keys in (("aot", ("ref_chosen", "ref_rejected")), ("aot_unpaired", ("rejected", "ref_rejected"))):
        losses = run(loss, e)[0]
        others = {**DRAWN, **{key: DRAWN[key][order] for key in keys}}
        np.testing.assert_array_equal(run(loss, e, make_pairs(others))[0], losses)
        everything = {key: value[order] for key, value in DRAWN.items()}
        for there, here in zip(run(loss, e, make_pairs(everything)), run(loss, e), strict=True):
            np.testing.assert_array_equal(there, here[order])


@pytest.mark.parametrize("loss", SORTED)
def test_aot_of_equal_orders_is_sigmoid(loss):
    """Where pairs already have equal ranks on both sides, a batch of one pair for example, sorting changes nothing."""
    base, up = np.full(P, -50.0), 0.2 * np.arange(P)
    zeros = np.zeros(P)
    arrays = {**DRAWN, "chosen": base + 3 * up, "rejected": base + up, "ref_chosen": base + up, "ref_rejected": base}
    if loss == "aot_unpaired":
        arrays = {**arrays, "ref_chosen": base, "ref_rejected": base + zeros}
    for count in (P, 1):
        pairs = make_pairs({key: value[:count] for key, value in arrays.items()})
        np.testing.assert_allclose(run(loss, pairs=pairs), run("sigmoid", pairs=pairs), rtol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_only_marked_losses_compare_pairs(loss):
    moved = {**DRAWN, "chosen": DRAWN["chosen"] - 30 * (np.arange(P) == 5)}
    changed = run(loss, pairs=make_pairs(moved))[0] != run(loss)[0]
    assert changed[5]
    assert getattr(getattr(preference, loss), "whole_batch", False) == (changed.sum() > 1)


@pytest.mark.parametrize("loss", LOSSES)
def test_fillers_do_not_matter(loss):
    rng = np.random.default_rng(1)
    places = np.sort(rng.choice(P + 9, P, replace=False))
    fillers = np.setdiff1d(np.arange(P + 9), places)
    alone = run(loss)
    for filler in (0.0, -1e30, 1e30):
        arrays = {key: np.full(P + 9, filler, np.float32) for key in DRAWN}
        for key, value in DRAWN.items():
            arrays[key][places] = value
        among = run(loss, pairs=make_pairs(arrays, np.isin(np.arange(P + 9), places)))
        for there, here in zip(among, alone, strict=True):
            np.testing.assert_allclose(there[places], here, rtol=1e-6)
        assert np.isfinite(among[0]).all()
        assert not np.any([gradient[fillers] for gradient in among[1:]])


@pytest.mark.parametrize("loss", LOSSES)
def test_far_from_the_reference(loss):
    """Log-ratios in the thousands, and sure answers, give finite losses and gradients."""
    sums = np.resize([-1e4, -1e-3, -1e4, 0.0, -3e3, 0.0], P)
    arrays = {**DRAWN, "chosen": sums, "rejected": sums[::-1]}
    variants = [{}, {"beta": 2.0}]
    if loss in SCORED and loss != "ipo":  # ... whose square of a power is beyond float32
        variants += [{"f_divergence_type": name} for name in DIVERGENCES]
    if loss == "alphapo":
        variants += [{"alpha": 0.5}, {"alpha": -0.5}]
    for variant in variants:
        assert np.isfinite(run(loss, variant, make_pairs(arrays))).all(), variant


@pytest.mark.parametrize("loss", REFERENCE_FREE)
def test_reference_free_losses_take_policy_pairs(loss):
    pairs = make_pairs(DRAWN)
    policy = PolicyPairs(**{field.name: getattr(pairs, field.name) for field in dataclasses.fields(PolicyPairs)})
    np.testing.assert_array_equal(jax.jit(bound(loss))(policy), run(loss)[0])


# Parameters.


def schema(loss: str) -> type[pydantic.BaseModel]:
    _, *parameters = inspect.signature(getattr(preference, loss)).parameters.values()
    fields = {p.name: (p.annotation, p.default) for p in parameters}
    return pydantic.create_model(loss, __config__=pydantic.ConfigDict(extra="forbid"), **fields)


def problem(loss: str, values: dict) -> str:
    """The one problem that the parameters of a loss have."""
    with pytest.raises(pydantic.ValidationError) as caught:
        schema(loss)(**values)
    (error,) = caught.value.errors()
    return f"{error['loc'][0]}: {error['msg']}"


@pytest.mark.parametrize("loss", LOSSES)
def test_parameters_are_checked(loss):
    values = dict(schema(loss)(**NEEDED.get(loss, {})))
    assert values["beta"] == 0.1
    for beta in (0.0, -1.0):
        assert problem(loss, {**NEEDED.get(loss, {}), "beta": beta}) == "beta: Input should be greater than 0"
    if "label_smoothing" in values:
        assert problem(loss, {"label_smoothing": 0.5}) == "label_smoothing: Input should be less than 0.5"
    if "label_smoothing" in values and loss != "exo_pair":
        assert values["label_smoothing"] == 0.0
        text = "label_smoothing: Input should be greater than or equal to 0"
        assert problem(loss, {"label_smoothing": -0.1}) == text
    if loss in SCORED:
        assert values["f_divergence_type"] == "reverse_kl" and values["f_alpha_divergence_coef"] == 0.5
        text = problem(loss, {**NEEDED.get(loss, {}), "f_divergence_type": "kl"})
        assert all(name in text for name in DIVERGENCES)


def test_exo_pair_needs_smoothing():
    assert problem("exo_pair", {}) == "label_smoothing: Input should be greater than 0"
    assert problem("exo_pair", {"label_smoothing": 0.0}) == "label_smoothing: Input should be greater than 0"
    with pytest.raises(ValueError):
        preference.exo_pair(make_pairs(DRAWN))


def test_temperature_and_target_margin_are_checked():
    assert problem("discopop", {"discopop_tau": 0.0}) == "discopop_tau: Input should be greater than 0"
    assert problem("simpo", {"simpo_gamma": -0.1}) == "simpo_gamma: Input should be greater than or equal to 0"
