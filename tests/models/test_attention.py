"""Attention against its formula in numpy float64, and the laws of packed rows."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from posttrain.errors import UserError
from posttrain.models import attention as module
from posttrain.models.attention import attention, cached_attention

B, T, N, K, H = 2, 100, 6, 2, 8

LAYOUTS = {
    "one segment": [[100], [100]],
    "many segments": [[30, 1, 2, 40, 27], [17, 16, 15, 52]],
    "padding at the end": [[16, 16, 20], [3]],
    "a row of padding only": [[60, 40], []],
}


def segments(rows: list[list[int]], length: int) -> np.ndarray:
    ids = np.zeros((len(rows), length), np.int32)
    for row, lengths in zip(ids, rows, strict=True):
        ends = np.cumsum(lengths, dtype=int)
        for number, (end, size) in enumerate(zip(ends, lengths, strict=True), 1):
            row[end - size : end] = number
    return ids


def causal_mask(ids: np.ndarray, window: int | None = None) -> np.ndarray:
    index = np.arange(ids.shape[1])
    near = index[:, None] - index < (window or ids.shape[1])
    return (ids[:, :, None] == ids[:, None, :]) & (ids != 0)[:, :, None] & (index[:, None] >= index) & near


def formula(q, k, v, mask, scale=None, softcap=None):
    """softmax(scale q k^T) v with `mask` [B, T, S], in float64. Returns the output and its vjp."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    wide_k, wide_v = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    scores, slope = np.einsum("btnh,bsnh->bnts", q, wide_k) * scale, 1.0
    if softcap is not None:
        scores, slope = softcap * np.tanh(scores / softcap), np.cosh(scores / softcap) ** -2.0
    scores = np.where(mask[:, None], scores, -np.inf)
    top = np.max(scores, axis=-1, keepdims=True, initial=-1e300)
    p = np.where(mask[:, None], np.exp(scores - top), 0.0)
    p = p / np.maximum(p.sum(-1, keepdims=True), 1e-300)
    out = np.einsum("bnts,bsnh->btnh", p, wide_v)

    def vjp(dout):
        dout = np.asarray(dout, np.float64)
        dp = np.einsum("btnh,bsnh->bnts", dout, wide_v)
        ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * slope * scale
        dk = np.einsum("bnts,btnh->bsnh", ds, q)
        dv = np.einsum("bnts,btnh->bsnh", p, dout)
        dk, dv = (x.reshape(*k.shape[:3], group, k.shape[3]).sum(3) for x in (dk, dv))
        return np.einsum("bnts,bsnh->btnh", ds, wide_k), dk, dv

    return out, vjp


def draw(seed: int, *shapes, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def inputs(length: int = T, rows: int = B, seed: int = 0):
    return draw(seed, (rows, length, N, H), (rows, length, K, H), (rows, length, K, H), (rows, length, N, H))


@partial(jax.jit, static_argnames=("implementation", "scale", "softcap", "window", "block"))
def output_and_gradients(
    q, k, v, segment_ids, dout, implementation, scale=None, softcap=None, window=None, *, block=16
):
    """`block` is only there to compile anew for each block size that a test sets."""
    how = {"implementation": implementation, "scale": scale, "softcap": softcap, "window": window}
    run = partial(attention, segment_ids=segment_ids, **how)
    out, vjp = jax.vjp(run, q, k, v)
    return out, *vjp(dout)


def assert_close(actual, expected, tolerance=2e-6):
    for a, e in zip(actual, expected, strict=True):
        assert np.asarray(a).shape == e.shape
        np.testing.assert_allclose(np.asarray(a, np.float64), e, rtol=0, atol=tolerance * max(1.0, np.abs(e).max()))


@pytest.fixture
def small_blocks(monkeypatch):
    """Many blocks and tiles even in short rows."""
    monkeypatch.setattr(module, "BLOCK", 16)


def test_the_formulas_gradient_agrees_with_finite_differences():
    q, k, v, dout = draw(1, (1, 6, 2, 3), (1, 6, 1, 3), (1, 6, 1, 3), (1, 6, 2, 3), dtype=np.float64)
    mask = causal_mask(segments([[2, 4]], 6), window=2)
    _, vjp = formula(q, k, v, mask, softcap=0.8)
    for argument, gradient in enumerate(vjp(dout)):
        for index in np.ndindex(gradient.shape):
            step = np.zeros_like((q, k, v)[argument])
            step[index] = 1e-6
            ends = []
            for sign in (1, -1):
                moved = [x + sign * step if i == argument else x for i, x in enumerate((q, k, v))]
                ends.append((formula(*moved, mask, softcap=0.8)[0] * dout).sum())
            assert abs((ends[0] - ends[1]) / 2e-6 - gradient[index]) < 1e-8


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_and_gradients_equal_the_formula(implementation, layout, small_blocks):
    q, k, v, dout = inputs()
    ids = segments(LAYOUTS[layout], T)
    out, vjp = formula(q, k, v, causal_mask(ids))
    assert_close(output_and_gradients(q, k, v, ids, dout, implementation), (out, *vjp(dout)))


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("window", [1, 5, 16, 40, 100])
def test_windows_and_softcaps_equal_the_formula(implementation, softcap, window, small_blocks):
    """Windows within a block, of one block, of several, and of the whole row."""
    q, k, v, dout = inputs()
    ids = segments(LAYOUTS["many segments"], T)
    out, vjp = formula(q, k, v, causal_mask(ids, window), softcap=softcap)
    found = output_and_gradients(q, k, v, ids, dout, implementation, softcap=softcap, window=window)
    assert_close(found, (out, *vjp(dout)))


@pytest.mark.parametrize("length", [7, 300])
def test_blocks_as_shipped_on_rows_shorter_and_longer_than_one(length):
    q, k, v, dout = inputs(length, rows=1)
    ids = segments([[length // 3, length // 2]], length)
    out, vjp = formula(q, k, v, causal_mask(ids), scale=0.3)
    actual = output_and_gradients(q, k, v, ids, dout, "chunked", scale=0.3, block=module.BLOCK)
    assert_close(actual, (out, *vjp(dout)))


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_padding_gives_and_takes_nothing(implementation, small_blocks):
    q, k, v, dout = inputs()
    ids = segments(LAYOUTS["padding at the end"], T)
    out, *gradients = output_and_gradients(q, k, v, ids, dout, implementation)
    for x in (out, *gradients):
        assert np.all(np.asarray(x)[ids == 0] == 0)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_gradients_across_segments_and_from_the_future_are_exactly_zero(implementation, small_blocks):
    q, k, v, dout = inputs()
    ids = segments([[30, 40, 30], [50, 20, 30]], T)
    query = 55  # in the second segment of both rows
    dout = np.where(np.arange(T)[:, None, None] == query, dout, 0).astype(np.float32)
    _, dq, dk, dv = output_and_gradients(q, k, v, ids, dout, implementation)
    seen = causal_mask(ids)[:, query]
    for gradient in (dk, dv):
        assert np.all(np.asarray(gradient)[~seen] == 0)
        assert np.all(np.abs(np.asarray(gradient)[seen]).max(-1) > 0)
    assert np.all(np.asarray(dq)[:, np.arange(T) != query] == 0)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_packed_equals_alone(implementation, small_blocks):
    q, k, v, dout = inputs(rows=1)
    lengths = [30, 1, 42, 27]
    packed = output_and_gradients(q, k, v, segments([lengths], T), dout, implementation)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        cut = [x[:, part] for x in (q, k, v)]
        out, vjp = formula(*cut, causal_mask(np.ones((1, length), np.int32)))
        assert_close([np.asarray(x)[:, part] for x in packed], (out, *vjp(dout[:, part])))
        start += length


def test_blocks_of_other_segments_and_of_the_future_are_not_computed(small_blocks):
    """0 * NaN is NaN: had such a block been multiplied, even with probability 0, it would show."""
    q, k, v, dout = inputs(96, rows=1)
    ids = segments([[32, 32, 32]], 96)
    out, vjp = formula(q, k, v, causal_mask(ids))
    middle = (ids == 2)[0]
    for x in (k, v):
        x[:, ~middle] = np.nan
    dout[:, ~middle] = 0
    actual = output_and_gradients(q, k, v, ids, dout, "chunked")
    assert_close([np.asarray(x)[:, middle] for x in actual], [x[:, middle] for x in (out, *vjp(dout))])


def test_blocks_beyond_the_window_are_not_computed(small_blocks):
    q, k, v, dout = inputs(160, rows=1)
    ids = segments([[160]], 160)
    # Queries of the last block see back to token 160 - 16 - 19 = 125, which lies in the block from 112 on.
    out, vjp = formula(q, k, v, causal_mask(ids, window=20))
    last = np.arange(160) >= 144
    dout[:, ~last] = 0
    expected = (out, *vjp(dout))
    for x in (k, v):
        x[:, :112] = np.nan
    found = output_and_gradients(q, k, v, ids, dout, "chunked", window=20)
    assert_close([np.asarray(x)[:, last] for x in found], [x[:, last] for x in expected])
    assert np.isnan(np.asarray(found[0])[:, 120]).all()  # it sees broken keys: they were there


def test_memory_is_linear_in_the_row_length():
    def temporary_bytes(length: int) -> int:
        shapes = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in inputs(length, rows=1)]
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
        compiled = output_and_gradients.lower(*shapes[:3], ids, shapes[3], "chunked").compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporary_bytes(2048), temporary_bytes(8192)
    assert long < 4.5 * short
    assert long < 4 * 8192**2  # one head's scores


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_bfloat16_inputs_are_accumulated_in_float32(implementation):
    q, k, v, dout = (jnp.asarray(x, jnp.bfloat16) for x in inputs(300, rows=1))
    ids = segments([[300]], 300)
    out, vjp = formula(q, k, v, causal_mask(ids))
    actual = output_and_gradients(q, k, v, ids, dout, implementation)
    assert all(x.dtype == jnp.bfloat16 for x in actual)
    assert_close(actual, (out, *vjp(dout)), tolerance=2e-2)
    # A running sum of equal weights in bfloat16 would stop growing at 256 of them.
    even = output_and_gradients(jnp.zeros_like(q), k, jnp.ones_like(v), ids, dout, implementation)[0]
    np.testing.assert_allclose(np.asarray(even, np.float64), 1.0, atol=2**-8)


def layers_of_attention(x, factors, segment_ids):
    """x + attention, layer by layer; keys and values are the first head of each group."""

    @jax.checkpoint
    def layer(x, factor):
        heads = x.reshape(*x.shape[:2], K, N // K, H)[:, :, :, 0] * factor
        return x + attention(x, heads, heads, segment_ids, implementation="chunked"), None

    return jax.lax.scan(layer, x, factors)[0]


def test_scan_checkpoint_and_a_sharded_mesh_change_nothing(small_blocks):
    x, dout = draw(2, (8, T, N, H), (8, T, N, H))
    factors = np.array([0.7, 1.3], np.float32)
    ids = segments([[T - 10 * i, 5 * i] for i in range(8)], T)

    mask, states, vjps = causal_mask(ids), [x.astype(np.float64)], []
    for factor in factors:
        heads = states[-1].reshape(8, T, K, N // K, H)[:, :, :, 0] * factor
        out, vjp = formula(states[-1], heads, heads, mask)
        states.append(states[-1] + out)
        vjps.append(vjp)
    dx = dout.astype(np.float64)
    for factor, vjp in zip(factors[::-1], vjps[::-1], strict=True):
        dq, dk, dv = vjp(dx)
        dx = dx + dq
        dx.reshape(8, T, K, N // K, H)[:, :, :, 0] += factor * (dk + dv)

    mesh = jax.make_mesh((4, 2), ("rows", "heads"), axis_types=(AxisType.Auto,) * 2)
    place = NamedSharding(mesh, PartitionSpec("rows", None, "heads"))
    rows = NamedSharding(mesh, PartitionSpec("rows"))

    @jax.jit
    def run(x, dout, ids):
        out, vjp = jax.vjp(lambda x: layers_of_attention(x, jnp.asarray(factors), ids), x)
        return out, *vjp(dout)

    sharded = jax.device_put(x, place), jax.device_put(dout, place), jax.device_put(ids, rows)
    assert_close(run(*sharded), (states[-1], dx), tolerance=4e-6)
    # The devices agree on the blocks to visit, 4 bytes each, and exchange nothing else.
    text = run.lower(*sharded).compile().as_text()
    moved = re.findall(
        r"= (.*) (?:all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter)(?:-start)?\(", text
    )
    assert moved
    assert all(re.fullmatch(r"\(?(s32\[\d*\](\{0\})?(, )?)+\)?", shape) for shape in moved), moved


def test_named_values_spare_the_backward_pass_a_second_forward_pass():
    q, k, v, _ = inputs(rows=1)
    ids = jnp.asarray(segments([[T]], T))

    def dots(policy) -> int:
        run = jax.checkpoint(lambda *x: attention(*x, ids, implementation="chunked").sum(), policy=policy)
        return str(jax.make_jaxpr(jax.grad(run, argnums=(0, 1, 2)))(q, k, v)).count("dot_general")

    saved = jax.checkpoint_policies.save_only_these_names("attn_q", "attn_k", "attn_v", "attn_out", "attn_lse")
    forward = str(jax.make_jaxpr(lambda *x: attention(*x, ids, implementation="chunked"))(q, k, v)).count("dot_general")
    assert forward > 0
    assert dots(jax.checkpoint_policies.nothing_saveable) - dots(saved) == forward


def test_unknown_implementation_is_refused_with_the_known_ones():
    q, k, v, _ = map(jnp.asarray, inputs(rows=1))
    ids = jnp.ones((1, T), jnp.int32)
    with pytest.raises(UserError, match=r"model\.attention.*'flash'.*chunked, reference"):
        attention(q, k, v, ids, implementation="flash")


def test_cached_attention_equals_the_formula_and_is_zero_where_nothing_is_seen():
    q, k, v = draw(3, (3, 2, N, H), (3, 11, K, H), (3, 11, K, H))
    mask = np.random.default_rng(4).random((3, 2, 11)) < 0.4
    mask[1, 0] = False
    mask[2] = False
    mask[0, :, 0] = True
    out, _ = formula(q, k, v, mask, scale=0.25, softcap=0.7)
    actual = np.asarray(jax.jit(partial(cached_attention, scale=0.25, softcap=0.7))(q, k, v, mask))
    assert_close([actual], [out])
    assert np.all(actual[~mask.any(-1)] == 0)
    half = cached_attention(
        *(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)), jnp.asarray(mask), scale=0.25, softcap=0.7
    )
    assert half.dtype == jnp.bfloat16
    assert_close([half], [out], tolerance=3e-2)
