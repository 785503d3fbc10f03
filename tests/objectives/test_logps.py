"""Token statistics against closed forms in numpy float64."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from posttrain.config import MeshConfig
from posttrain.objectives import logps as module
from posttrain.objectives.logps import TokenStats, token_stats
from posttrain.parallel.mesh import make_mesh

B, T, D, V, VOCAB = 2, 24, 8, 64, 50
NAMES = ("logps", "entropy", "correct", "mean_logit")


def closed_form(hidden, head, tokens, ids, *, vocab_size=VOCAB, needed=None, temperature=1.0, softcap=None):
    """The four statistics, and the function from their cotangents to the gradients of `hidden` and `head`."""
    hidden, head = np.asarray(hidden, np.float64), np.asarray(head, np.float64)
    rows, length = tokens.shape
    stats = {name: np.zeros((rows, length)) for name in NAMES}
    z, slope = np.einsum("btd,vd->btv", hidden, head[:vocab_size]), 1.0
    if softcap is not None:
        z, slope = softcap * np.tanh(z / softcap), np.cosh(z / softcap) ** -2.0
    z = z / temperature
    z_top = z.max(-1, keepdims=True)
    lse = np.log(np.exp(z - z_top).sum(-1, keepdims=True)) + z_top
    logp = z - lse
    p = np.exp(logp)
    entropy = -(p * logp).sum(-1)
    counted = np.zeros((rows, length), bool)
    for b in range(rows):
        for t in range(1, length):
            counted[b, t] = ids[b, t] == ids[b, t - 1] != 0 and (needed is None or needed[b, t])
            if counted[b, t]:
                stats["logps"][b, t] = logp[b, t - 1, tokens[b, t]]
                stats["entropy"][b, t] = entropy[b, t - 1]
                stats["correct"][b, t] = np.argmax(z[b, t - 1]) == tokens[b, t]
                stats["mean_logit"][b, t] = z[b, t - 1].mean()

    def vjp(d_logp, d_entropy, d_mean):
        dz = np.zeros_like(z)
        for b, t in np.argwhere(counted):
            s = t - 1
            onehot = np.arange(vocab_size) == tokens[b, t]
            dz[b, s] = d_logp[b, t] * (onehot - p[b, s]) + d_mean[b, t] / vocab_size
            dz[b, s] -= d_entropy[b, t] * p[b, s] * (logp[b, s] + entropy[b, s])
        dz *= slope / temperature
        dhead = np.zeros_like(head)
        dhead[:vocab_size] = np.einsum("btv,btd->vd", dz, hidden)
        return dz @ head[:vocab_size], dhead

    return stats, vjp


def draw(seed=0, rows=B, length=T, scale=1.0):
    rng = np.random.default_rng(seed)
    hidden = (scale * rng.standard_normal((rows, length, D))).astype(np.float32)
    head = rng.standard_normal((V, D)).astype(np.float32)
    tokens = rng.integers(0, VOCAB, (rows, length), dtype=np.int32)
    ids = np.zeros((rows, length), np.int32)
    ids[:, : length // 2], ids[:, length // 2 : -3] = 1, 2
    cotangents = rng.standard_normal((3, rows, length)).astype(np.float32)
    return hidden, head, tokens, ids, cotangents


@partial(jax.jit, static_argnames=("vocab_size", "temperature", "softcap", "chunk_vocab", "min_cut"))
def stats_and_gradients(hidden, head, tokens, ids, cotangents, needed, min_cut=None, vocab_size=VOCAB, **options):
    """`min_cut` is only there to compile anew for each value that a test sets."""
    run = partial(token_stats, tokens=tokens, segment_ids=ids, needed=needed, vocab_size=vocab_size, **options)
    stats, vjp = jax.vjp(run, hidden, head)
    return stats, *vjp(TokenStats(cotangents[0], cotangents[1], jnp.zeros_like(cotangents[0]), cotangents[2]))


def assert_close(actual, expected, tolerance=2e-6):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * max(1.0, np.abs(expected).max()))


def check(hidden, head, tokens, ids, cotangents, needed=None, *, tolerance=4e-6, vocab_size=VOCAB, **options):
    """Compares all statistics and gradients with the closed form; returns them."""
    how = {"temperature": options.get("temperature", 1.0), "softcap": options.get("softcap")}
    stats, vjp = closed_form(hidden, head, tokens, ids, vocab_size=vocab_size, needed=needed, **how)
    if needed is None:
        needed = np.ones(tokens.shape, bool)
    actual, *gradients = stats_and_gradients(
        hidden, head, tokens, ids, cotangents, needed, vocab_size=vocab_size, **options
    )
    for name in NAMES:
        assert getattr(actual, name).dtype == jnp.float32
        assert_close(getattr(actual, name), stats[name], tolerance)
    for gradient, expected in zip(gradients, vjp(*cotangents.astype(np.float64)), strict=True):
        assert_close(gradient, expected, tolerance)
    return actual, *gradients


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_closed_forms_gradient_agrees_with_finite_differences(softcap):
    hidden, head, tokens, ids, cotangents = draw(1, rows=1, length=9)
    hidden, head = hidden.astype(np.float64), head.astype(np.float64)
    _, vjp = closed_form(hidden, head, tokens, ids, temperature=0.7, softcap=softcap)

    def value(hidden, head):
        stats, _ = closed_form(hidden, head, tokens, ids, temperature=0.7, softcap=softcap)
        return sum((c * stats[n]).sum() for c, n in zip(cotangents, ("logps", "entropy", "mean_logit"), strict=True))

    for argument, gradient in enumerate(vjp(*cotangents)):
        for index in list(np.ndindex(gradient.shape))[::7]:
            step = np.zeros_like(gradient)
            step[index] = 1e-6
            moved = [[x + s * step if i == argument else x for i, x in enumerate((hidden, head))] for s in (1, -1)]
            assert abs((value(*moved[0]) - value(*moved[1])) / 2e-6 - gradient[index]) < 1e-7


@pytest.mark.parametrize("chunk_vocab", [16, 4096])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_statistics_and_gradients_equal_the_closed_form(chunk_vocab, temperature, softcap):
    arrays = draw()
    needed = np.random.default_rng(5).random((B, T)) < 0.6
    check(*arrays, needed, chunk_vocab=chunk_vocab, temperature=temperature, softcap=softcap)


@pytest.mark.parametrize("vocab_size", [VOCAB, V])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_padding_rows_of_the_head_have_no_probability_and_no_gradient(vocab_size, softcap):
    hidden, head, tokens, ids, cotangents = draw()
    head[VOCAB:] *= 10  # would win every softmax
    options = {"vocab_size": vocab_size, "softcap": softcap}
    _, _, dhead = check(hidden, head, tokens, ids, cotangents, tolerance=1e-5, chunk_vocab=16, **options)
    assert np.all(np.asarray(dhead)[vocab_size:] == 0)


def test_nothing_comes_from_segment_starts_padding_and_tokens_not_needed():
    hidden, head, tokens, ids, cotangents = draw()
    needed = np.random.default_rng(6).random((B, T)) < 0.5
    stats, dhidden, _ = check(hidden, head, tokens, ids, cotangents, needed)
    counted = np.zeros((B, T), bool)
    counted[:, 1:] = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] > 0) & needed[:, 1:]
    for name in NAMES:
        assert np.all(np.asarray(getattr(stats, name))[~counted] == 0)
    sources = np.roll(counted, -1, axis=1)
    assert np.all(np.asarray(dhidden)[~sources] == 0)
    assert np.all(np.abs(np.asarray(dhidden)[sources]).max(-1) > 0)


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.45, 0.7, 1.0])
@pytest.mark.parametrize("min_cut", [256, 1000])
def test_any_share_of_needed_tokens(fraction, min_cut, monkeypatch):
    """Long rows take one of four branches on CPU; other backends, like short rows, take none."""
    monkeypatch.setattr(module, "MIN_CUT", min_cut)
    arrays = draw(length=256)
    needed = np.random.default_rng(7).random((B, 256)) < fraction * np.array([[1.0], [0.5]])
    check(*arrays, needed, chunk_vocab=16, min_cut=min_cut)


def test_tokens_beyond_the_needed_quarters_are_not_computed():
    """0 * NaN is NaN: had such a token been multiplied, even with weight 0, it would show in the head's gradient."""
    hidden, head, tokens, ids, cotangents = draw(length=256)
    ids[:] = 1
    needed = np.zeros((B, 256), bool)
    needed[0, 2:256:4] = True
    needed[1, 130:194] = True
    expected, vjp = closed_form(hidden, head, tokens, ids, needed=needed)
    gradients = vjp(*cotangents)
    hidden[~np.roll(needed, -1, axis=1)] = np.nan
    stats, dhidden, dhead = stats_and_gradients(hidden, head, tokens, ids, cotangents, needed)
    assert_close(stats.logps, expected["logps"])
    assert_close(dhidden, gradients[0])
    assert_close(dhead, gradients[1])


def test_uniform_prediction():
    hidden, head, tokens, ids, cotangents = draw()
    tokens[:, ::3] = 0
    stats, *_ = check(hidden, np.zeros_like(head), tokens, ids, cotangents, chunk_vocab=16)
    counted = np.asarray(stats.entropy) > 0
    np.testing.assert_allclose(np.asarray(stats.entropy)[counted], np.log(VOCAB), rtol=1e-6)
    np.testing.assert_allclose(np.asarray(stats.logps)[counted], -np.log(VOCAB), rtol=1e-6)
    # Of equal logits the first wins, as arg max has it.
    assert np.array_equal(np.asarray(stats.correct)[counted], (tokens == 0)[counted])


def test_logits_beyond_the_range_of_exp():
    """float32 itself keeps logits of 300 to 3e-5 only."""
    stats, *_ = check(*draw(scale=30.0), chunk_vocab=16, tolerance=6e-5)
    assert np.all(np.asarray(stats.entropy) >= 0)


def test_bfloat16_inputs_are_accumulated_in_float32():
    hidden, head, tokens, ids, cotangents = draw(length=300)
    hidden, head = jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(head, jnp.bfloat16)
    stats, vjp = closed_form(hidden, head, tokens, ids)
    actual, dhidden, dhead = stats_and_gradients(
        hidden, head, tokens, ids, cotangents, np.ones(tokens.shape, bool), chunk_vocab=16
    )
    for name in NAMES:
        assert getattr(actual, name).dtype == jnp.float32
        assert_close(getattr(actual, name), stats[name], 2e-6)
    for gradient, expected in zip((dhidden, dhead), vjp(*cotangents), strict=True):
        assert gradient.dtype == jnp.bfloat16
        assert_close(gradient, expected, 1e-2)


def test_no_array_of_all_tokens_by_the_whole_vocabulary_exists():
    tokens = np.zeros((1, 512), np.int32)
    hidden = jnp.zeros((1, 512, D), jnp.float32)
    head = jnp.zeros((2048, D), jnp.float32)

    def loss(hidden, head):
        stats = token_stats(hidden, head, jnp.asarray(tokens), jnp.asarray(tokens), vocab_size=2000, chunk_vocab=256)
        return jnp.sum(stats.logps + stats.entropy + stats.mean_logit), stats.correct

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    shapes = re.findall(r":[a-z]+\d*\[([\d,]+)\]", str(jax.make_jaxpr(gradient)(hidden, head)))
    largest = max(np.prod([int(n) for n in shape.split(",")]) for shape in shapes)
    assert 512 * 256 <= largest < 512 * 2048 / 4
    temporary = gradient.lower(hidden, head).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 4 * (4 * 512 * 256)


@pytest.mark.parametrize("sizes", [(8, 1), (4, 2)])
def test_sharded_over_rows_and_vocabulary(sizes):
    arrays = draw(rows=8)
    mesh = make_mesh(MeshConfig(fsdp=sizes[0], tensor=sizes[1]))
    by_row = NamedSharding(mesh, PartitionSpec("fsdp"))
    head = NamedSharding(mesh, PartitionSpec("tensor", "fsdp"))
    cotangents = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    placed = [jax.device_put(x, s) for x, s in zip(arrays, (by_row, head, by_row, by_row, cotangents), strict=True)]
    needed = jax.device_put(np.ones((8, T), bool), by_row)
    stats, vjp = closed_form(*arrays[:4])
    run = jax.jit(partial(stats_and_gradients, chunk_vocab=16), out_shardings=(by_row, by_row, head))
    with jax.set_mesh(mesh):
        actual, *gradients = run(*placed, needed)
        text = run.lower(*placed, needed).compile().as_text()
    for name in NAMES:
        assert_close(getattr(actual, name), stats[name])
    for gradient, expected in zip(gradients, vjp(*arrays[4]), strict=True):
        assert_close(gradient, expected)

    # The head, as much of it as `tensor` leaves a device, is gathered once, for both passes.
    gathered = re.findall(rf"= f32\[(\d+),{D}\]\S* all-gather\(", text)
    assert gathered == [str(arrays[1].shape[0] // sizes[1])]
