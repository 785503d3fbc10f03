"""Guesses of what was not compiled: what they count, and how those that were compiled correct them."""

import math

import numpy as np
import pytest

from posttrain.plan.candidates import Candidate, Static
from posttrain.plan.estimate import NOISE, Correction, _features, _prior, guess_seconds
from tests.plan import search_cases as cases


def test_a_guess_counts_what_moves_to_the_host():
    """Of optimizer state out and back; of offloaded activations each layer's input and attention, out and back."""
    told, tokens = cases.facts(8), 16 * cases.LENGTH
    candidate = Candidate((1, 1, 8, 1, 1, 1), "full", 16, 8, True)

    def seconds(host: float, remat: str = "full") -> float:
        one = Static(Candidate(**{**vars(candidate), "remat": remat}), host=int(host))
        return tokens * guess_seconds(one, told, cases.CHIP)

    # Large enough to be the longest even if half goes each way at once: the middle between half and added to the rest.
    assert seconds(900e9) - seconds(600e9) == pytest.approx(2 * 300e9 / cases.LINK * 3 / 4)
    kept = 32 * (tokens / 8) * 2 * (4096 + 4096)
    assert seconds(600e9, "offload") - seconds(600e9) == pytest.approx(2 * kept / cases.LINK * 3 / 4)


def test_correction_is_a_ridge_regression():
    """Its middle is the least-squares solution with the prior as further observations."""
    rng, correction = np.random.default_rng(0), Correction()
    candidates = cases.possible(cases.Compiler(cases.config(), 8))
    seen = [candidates[int(i)] for i in rng.choice(len(candidates), 9, replace=False)]
    errors = rng.normal(0.3, 0.2, len(seen))
    for one, error in zip(seen, errors, strict=True):
        correction.learn(one, 2.0, 2.0 * math.exp(error))
    known = np.stack([_features(one) for one in seen])
    prior = np.diag(1 / _prior(known.shape[1]))
    stacked = np.concatenate([known / NOISE, prior]), np.concatenate([errors / NOISE, np.zeros(len(prior))])
    weights, *_ = np.linalg.lstsq(*stacked, rcond=None)
    new = candidates[:20]
    middles, unsure = correction.apply(new, [3.0] * len(new))
    expected = math.log(3.0) + np.stack([_features(one) for one in new]) @ weights
    np.testing.assert_allclose(middles, expected, rtol=1e-9, atol=1e-9)
    prior_only = Correction().apply(new, [3.0] * len(new))[1]
    assert (unsure < prior_only).all() and (unsure >= NOISE).all()
