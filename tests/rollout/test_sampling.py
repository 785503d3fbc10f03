"""Sampling against numpy in float64: what is kept, what its log-probability is, and how often it is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.errors import UserErrors
from posttrain.rollout.sampling import RowSampling, Sampled, SamplingParams, kept, sample

SETTINGS = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=2.5),
    SamplingParams(temperature=1.0, top_k=1),
    SamplingParams(temperature=0.8, top_k=40),
    SamplingParams(temperature=1.0, top_p=0.9),
    SamplingParams(temperature=1.3, top_p=0.35),
    SamplingParams(temperature=1.0, top_p=1e-6),
    SamplingParams(temperature=1.0, min_p=0.1),
    SamplingParams(temperature=1.0, min_p=1.0),
    SamplingParams(temperature=1.5, top_k=60, top_p=0.8),
    SamplingParams(temperature=1.5, top_k=25, top_p=0.95, min_p=0.02),
    SamplingParams(temperature=0.5, top_k=100_000, top_p=0.99),
]

draw = jax.jit(sample, static_argnames="vocab_size")


def logits_for(rows: int, vocab: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (rows, vocab)).astype(np.float32)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def reference_distribution(logits: np.ndarray, how: SamplingParams) -> np.ndarray:
    """Probabilities f64 `[V]` by sorting, in the order of transformers' logits processors."""
    x = logits.astype(np.float64) / how.temperature
    order = np.argsort(-x, kind="stable")
    if how.top_k:
        x[order[how.top_k :]] = -np.inf
    p = np.exp(log_softmax(x))
    before = np.cumsum(p[order]) - p[order]
    x[order[before >= how.top_p]] = -np.inf
    p = np.exp(log_softmax(x))
    x[p < how.min_p * p.max()] = -np.inf
    return np.exp(log_softmax(x))


def positions(rows: int) -> np.ndarray:
    return np.arange(rows, dtype=np.int32)


@pytest.mark.parametrize("vocab", [50, 1000])
def test_truncation_keeps_what_sorting_keeps(vocab: int) -> None:
    logits = logits_for(len(SETTINGS), vocab, seed=vocab)
    how = RowSampling.stack(SETTINGS, range(len(SETTINGS)))
    scaled = logits / how.temperature[:, None]
    mask = np.asarray(jax.jit(kept)(scaled - scaled.max(-1, keepdims=True), how))
    expected = np.stack([reference_distribution(row, s) > 0 for row, s in zip(logits, SETTINGS, strict=True)])
    np.testing.assert_array_equal(mask, expected)
    assert mask.sum(-1).tolist()[3] == 1 and mask[0].all()


def test_ties_with_the_last_kept_token_are_kept() -> None:
    logits = np.log(np.array([[0.4, 0.2, 0.2, 0.2]] * 2, np.float32))
    how = RowSampling.stack(
        [SamplingParams(temperature=1.0, top_k=2), SamplingParams(temperature=1.0, top_p=0.5)], [0, 1]
    )
    assert np.asarray(jax.jit(kept)(logits - logits.max(-1, keepdims=True), how)).all()


@pytest.mark.parametrize("how", SETTINGS, ids=str)
def test_draws_have_the_exact_frequencies(how: SamplingParams) -> None:
    """40,000 draws of one distribution. Bound: every frequency within 4.9 standard errors of its probability (+ 1e-4,
    for those so rare that they are seen once or never); over all 13 x 300 frequencies compared, chance exceeds it in
    under 1 of 250 seeds."""
    vocab, padded, count, batch = 300, 384, 40_000, 1000
    logits = logits_for(1, padded, seed=3)
    logits[:, vocab:] = 50.0  # padding that would win were it looked at
    rows = RowSampling.stack([how] * batch, [5] * batch)
    drawn = []
    for start in range(0, count, batch):
        at = np.arange(start, start + batch, dtype=np.int32)
        drawn.append(draw(jnp.broadcast_to(logits, (batch, padded)), rows, at, vocab_size=vocab).tokens)
    found = np.bincount(np.concatenate(drawn), minlength=padded) / count
    p = reference_distribution(logits[0, :vocab], how)
    assert not found[vocab:].any()
    assert not found[:vocab][p == 0].any()
    assert (np.abs(found[:vocab] - p) <= 4.9 * np.sqrt(p * (1 - p) / count) + 1e-4).all()


@pytest.mark.parametrize("varied", ["seed", "request", "position"])
def test_each_part_of_the_key_gives_new_draws(varied: str) -> None:
    """Uniform over 8 tokens: the 64 pairs of two neighbours are equally frequent (chi-square, 63 degrees of freedom;
    above 120 in 1 of 60,000 seeds), so neighbouring keys are independent."""
    count = 4096
    numbers = np.arange(count)
    fixed = np.full(count, 7)
    parts = {name: numbers if name == varied else fixed for name in ("seed", "request", "position")}
    params = [SamplingParams(temperature=1.0, seed=int(s)) for s in parts["seed"]]
    how = RowSampling.stack(params, parts["request"].tolist())
    tokens = np.asarray(
        draw(np.zeros((count, 8), np.float32), how, parts["position"].astype(np.int32), vocab_size=8).tokens
    )
    pairs = np.bincount(tokens[:-1] * 8 + tokens[1:], minlength=64)
    expected = (count - 1) / 64
    assert ((pairs - expected) ** 2 / expected).sum() < 120


def test_log_probs_are_those_of_both_distributions() -> None:
    """Greedy and sampled rows side by side, against float64."""
    settings = [SamplingParams(), *SETTINGS, SamplingParams(top_k=3, top_p=0.5)]
    logits = logits_for(len(settings), 640, seed=9)
    drawn = draw(logits, RowSampling.stack(settings, range(len(settings))), positions(len(settings)), vocab_size=600)
    own = log_softmax(logits[:, :600])
    for row, how in enumerate(settings):
        token = int(drawn.tokens[row])
        assert drawn.logprobs[row] == pytest.approx(own[row, token], abs=2e-6)
        if how.temperature == 0:
            assert token == int(np.argmax(logits[row, :600]))
            assert drawn.sampled_logprobs[row] == 0
        else:
            p = reference_distribution(logits[row, :600], how)
            assert drawn.sampled_logprobs[row] == pytest.approx(np.log(p[token]), abs=1e-5)


def test_untruncated_at_temperature_1_both_log_probs_agree() -> None:
    how = RowSampling.stack([SamplingParams(temperature=1.0, seed=2)] * 64, range(64))
    drawn = draw(logits_for(64, 256), how, positions(64), vocab_size=256)
    np.testing.assert_allclose(drawn.logprobs, drawn.sampled_logprobs, atol=2e-6)
    assert len(set(np.asarray(drawn.tokens).tolist())) > 8


@pytest.mark.parametrize("vocab", [3, 128, 300])
def test_greedy_takes_the_first_of_the_largest(vocab: int) -> None:
    logits = np.round(logits_for(20, vocab, seed=vocab))  # many ties
    how = RowSampling.stack([SamplingParams()] * 20, range(20))
    tokens = draw(logits, how, positions(20), vocab_size=vocab).tokens
    np.testing.assert_array_equal(tokens, np.argmax(logits, -1))


def test_a_row_is_drawn_alike_in_any_company() -> None:
    settings = [*SETTINGS, SamplingParams()]
    count = len(settings)
    logits = logits_for(count, 512, seed=4)
    at = np.arange(10, 10 + count, dtype=np.int32)
    together = draw(logits, RowSampling.stack(settings, range(count)), at, vocab_size=500)
    order = np.random.default_rng(1).permutation(count)
    shuffled = draw(
        logits[order], RowSampling.stack([settings[i] for i in order], order.tolist()), at[order], vocab_size=500
    )
    np.testing.assert_array_equal(shuffled.tokens, np.asarray(together.tokens)[order])
    for i in range(count):
        alone: Sampled = draw(logits[i : i + 1], RowSampling.stack([settings[i]], [i]), at[i : i + 1], vocab_size=500)
        assert int(alone.tokens[0]) == int(together.tokens[i])
        assert alone.logprobs[0] == pytest.approx(float(together.logprobs[i]), abs=1e-6)


def test_tokens_of_probability_zero_are_never_drawn() -> None:
    """Masked logits, a distribution of one token at either end, and uniform numbers of all kinds."""
    count = 2000
    for only in ([0], [255], [127, 128]):
        logits = np.full((count, 256), -np.inf, np.float32)
        logits[:, only] = 0.0
        how = RowSampling.stack([SamplingParams(temperature=1.0)] * count, range(count))
        drawn = draw(logits, how, positions(count), vocab_size=256)
        assert set(np.asarray(drawn.tokens).tolist()) == set(only)
        np.testing.assert_allclose(drawn.sampled_logprobs, -np.log(len(only)), atol=1e-6)


def test_wrong_parameters_are_all_named() -> None:
    with pytest.raises(UserErrors) as error:
        SamplingParams(max_new_tokens=0, temperature=-1.0, top_k=-2, top_p=0.0, min_p=1.5, seed=-1)
    assert [p.split(" = ")[0] for p in error.value.problems] == [
        "max_new_tokens",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "seed",
    ]
    for wrong in ({"temperature": float("nan")}, {"top_p": 1.5}, {"seed": 2**32}):
        with pytest.raises(UserErrors, match=next(iter(wrong))):
            SamplingParams(**wrong)
