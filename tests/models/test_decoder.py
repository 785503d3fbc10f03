"""The decoder against torch, and its laws: packed = unpacked, no gradient across segments, remat and mesh change
nothing, a scanned pattern equals its layers one by one, and depth costs no compile time."""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from posttrain.config import MeshConfig
from posttrain.models import hf
from posttrain.models.architecture import DecoderConfig, LayerKind
from posttrain.models.attention import attention
from posttrain.models.decoder import ComputeOptions, Decoder, KVCache, Remat, abstract_decoder, init_cache, init_params
from posttrain.models.rope import RopeConfig, rope_angles
from posttrain.parallel.mesh import make_mesh
from posttrain.parallel.sharding import flatten, place, unflatten
from posttrain.records import Batch, Params

FIXTURES = sorted(p.parent for p in (Path(__file__).parent.parent / "fixtures" / "llama").glob("*/expected.npz"))
SMALL = DecoderConfig(250, 32, 48, 3, 4, 2, 8, ropes=(RopeConfig(theta=1000.0),))

# Every switch that acts between tokens or on the residual stream, and layers of three kinds in no whole group.
LOCAL, GLOBAL, UNTURNED = LayerKind(window=6, rope=1), LayerKind(), LayerKind(window=3, rope=None)
PATTERN = replace(
    SMALL,
    num_hidden_layers=5,
    ropes=(RopeConfig(1000.0, "linear", 2.0, rotary_dim=4), RopeConfig(50.0, rotary_dim=4)),
    layer_kinds=(LOCAL, GLOBAL, UNTURNED),
    qk_norm="head",
    post_norm=True,
    norm_offset=1.0,
    attn_softcap=2.0,
    attention_scale=0.5,
    embed_scale=32**0.5,
)
POST_ONLY = replace(SMALL, layer_kinds=(LayerKind(window=5),), qk_norm="full", pre_norm=False, post_norm=True)
CONFIGS = {
    "plain": SMALL,
    "dynamic": replace(SMALL, ropes=(RopeConfig(1000.0, "dynamic", 4.0),), max_position_embeddings=16),
    "yarn": replace(SMALL, ropes=(RopeConfig(1000.0, "yarn", 4.0, original_max_position_embeddings=16),)),
    "longrope": replace(
        SMALL,
        ropes=(
            RopeConfig(
                1000.0,
                "longrope",
                4.0,
                original_max_position_embeddings=12,
                short_factor=(1.0, 1.1, 1.3, 2.0),
                long_factor=(1.0, 2.0, 3.0, 4.0),
            ),
        ),
    ),
    "pattern": PATTERN,
    "post_only": POST_ONLY,
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def rows(*segments_by_row: list[list[int]], length: int) -> Batch:
    """Packed rows of the given token lists."""
    shape = (len(segments_by_row), length)
    tokens, segment_ids, positions = (np.zeros(shape, np.int32) for _ in range(3))
    for row, segments in enumerate(segments_by_row):
        at = 0
        for number, segment in enumerate(segments, 1):
            span = slice(at, at + len(segment))
            tokens[row, span], segment_ids[row, span] = segment, number
            positions[row, span] = np.arange(len(segment))
            at += len(segment)
    return Batch(tokens, segment_ids, positions, np.ones(shape, np.float32))


def random_tokens(seed: int, *lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, SMALL.vocab_size, n).tolist() for n in lengths]


def hidden(config: DecoderConfig, params: Params, batch: Batch, **options: Any) -> np.ndarray:
    decoder = abstract_decoder(config, options=ComputeOptions(**options))
    return np.asarray(jax.jit(lambda params, batch: decoder.merge(params).hidden(batch))(params, batch))


def random_params(config: DecoderConfig = SMALL) -> Params:
    """With kernels large enough for attention to be sharp; hidden states stay of order 1."""
    leaves = flatten(jax.jit(init_params, static_argnums=0)(config, jax.random.key(0)))
    return unflatten(
        {path: leaf * (8 if path.startswith("layers/") and "norm" not in path else 1) for path, leaf in leaves.items()}
    )


def test_there_are_fixtures() -> None:
    assert {"tied", "biases", "linear", "dynamic", "yarn", "llama3"} <= {p.name for p in FIXTURES}


@pytest.mark.parametrize("fixture", FIXTURES, ids=lambda p: p.name)
@pytest.mark.parametrize("attention", ["reference", "chunked"])
def test_logits_equal_torch(fixture: Path, attention: str) -> None:
    config, _ = hf.load_config(fixture)
    params = hf.load_params(fixture, config, abstract_decoder(config).shapes)
    expected = np.load(fixture / "expected.npz")
    ids = expected["ids"]
    batch = rows(*[[row.tolist()] for row in ids], length=ids.shape[1])
    head = np.asarray(abstract_decoder(config).merge(params).head())[: config.vocab_size]
    found = hidden(config, params, batch, attention=attention) @ head.T
    np.testing.assert_allclose(found, expected["logits"], rtol=0, atol=2e-5)  # torch in float64


@every_config
@pytest.mark.parametrize("attention", ["reference", "chunked"])
def test_packed_equals_unpacked(attention: str, config: DecoderConfig) -> None:
    params = random_params(config)
    segments = random_tokens(0, 30, 5, 13, 1)
    packed = hidden(config, params, rows(segments, length=64), attention=attention)[0]
    at = 0
    for segment in segments:
        alone = hidden(config, params, rows([segment], length=32), attention="reference")[0]
        np.testing.assert_allclose(packed[at : at + len(segment)], alone[: len(segment)], atol=1e-5)
        at += len(segment)


@pytest.mark.parametrize("config", [SMALL, PATTERN], ids=["plain", "pattern"])
@pytest.mark.parametrize("attention", ["reference", "chunked"])
def test_no_gradient_crosses_segments(attention: str, config: DecoderConfig) -> None:
    params = random_params(config)
    decoder = abstract_decoder(config, options=ComputeOptions(attention, "dots"))
    first, second = random_tokens(1, 10, 12)
    # Tokens of the first segment occur nowhere else, so their embedding rows show what reaches them.
    second = [token + 125 if token < 125 else token for token in second]
    first = [token % 125 for token in first]

    def second_only(params: Params) -> jax.Array:
        return jnp.sum(decoder.merge(params).hidden(rows([first, second], length=24))[0, 10:22] ** 2)

    gradient = jax.jit(jax.grad(second_only))(params)["embed"]["embedding"]
    assert not np.asarray(gradient)[sorted(set(first))].any()
    assert np.asarray(gradient)[sorted(set(second))].any()


def assert_gradients_close(found: Params, expected: Params) -> None:
    wanted = flatten(expected)
    for path, leaf in flatten(found).items():
        scale = np.abs(wanted[path]).max()
        np.testing.assert_allclose(leaf, wanted[path], rtol=0, atol=1e-5 * scale, err_msg=path)


@functools.cache
def unremembered_gradients(config: DecoderConfig) -> Params:
    return gradients(config, ComputeOptions("chunked", "none"))


def gradients(config: DecoderConfig, options: ComputeOptions) -> Params:
    decoder, params = abstract_decoder(config, options=options), random_params(config)
    batch = rows(random_tokens(2, 20, 9), random_tokens(3, 31), length=32)
    # Not the sum of squares: behind a norm it is constant, and its gradient rounding.
    weights = np.random.default_rng(8).standard_normal((2, 32, 32)).astype(np.float32)
    return jax.jit(jax.grad(lambda p: jnp.sum(decoder.merge(p).hidden(batch) * weights)))(params)


@pytest.mark.parametrize("config", [SMALL, PATTERN], ids=["plain", "pattern"])
@pytest.mark.parametrize("remat", ["minimal", "dots", "full", "offload"])
def test_remat_changes_no_gradient(remat: Remat, config: DecoderConfig) -> None:
    assert_gradients_close(gradients(config, ComputeOptions("chunked", remat)), unremembered_gradients(config))


def one_by_one(model: Decoder, batch: Batch) -> jax.Array:
    """The hidden states of `model`, each layer with its own kind, outside of any scan."""
    c = model.config
    graph, state = nnx.split(model.layers)
    positions, segment_ids = jnp.asarray(batch.positions), jnp.asarray(batch.segment_ids)
    x = model.embed(jnp.asarray(batch.tokens)) * jnp.float32(c.embed_scale or 1)
    for i, kind in enumerate(c.kinds):
        block = nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], state))
        y = block.attn_norm(x) if block.attn_norm else x
        q, k, v = block.attn.q(y), block.attn.k(y), block.attn.v(y)
        if block.attn.q_norm is not None and block.attn.k_norm is not None:
            q, k = block.attn.q_norm(q), block.attn.k_norm(k)
        if kind.rope is not None:
            cos, sin = rope_angles(c.ropes[kind.rope], c.head_dim, c.max_position_embeddings, positions, positions)
            q, k = turned(q, cos, sin), turned(k, cos, sin)
        how = {"scale": c.attention_scale, "softcap": c.attn_softcap, "window": kind.window}
        x, _ = block.finish(
            x, attention(q, k, v, segment_ids, implementation="reference", **how), segment_ids > 0, grouped="ragged"
        )
    return model.final_norm(x)


def turned(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """As complex numbers: dims i and i + half turn by the angle."""
    half = cos.shape[-1]
    pairs = jax.lax.complex(x[..., :half], x[..., half : 2 * half])
    pairs = pairs * jax.lax.complex(cos, sin)[:, :, None]
    return jnp.concatenate([pairs.real, pairs.imag, x[..., 2 * half :]], axis=-1)


@pytest.mark.parametrize("name", ["pattern", "post_only"])
def test_a_scanned_pattern_equals_its_layers_one_by_one(name: str) -> None:
    config = CONFIGS[name]
    params = random_params(config)
    decoder = abstract_decoder(config)
    batch = rows(random_tokens(2, 20, 9), random_tokens(3, 31), length=32)
    weights = np.random.default_rng(8).standard_normal((2, 32, 32)).astype(np.float32)
    weights[batch.segment_ids == 0] = 0

    def value(params: Params, hidden: Callable[[Decoder, Batch], jax.Array]) -> tuple[jax.Array, jax.Array]:
        found = hidden(decoder.merge(params), batch)
        return jnp.sum(found * weights), found

    results = []
    for hidden_states in (Decoder.hidden, one_by_one):
        run = jax.jit(jax.value_and_grad(functools.partial(value, hidden=hidden_states), has_aux=True))
        (_, found), gradient = run(params)
        results.append((np.asarray(found)[batch.segment_ids > 0], gradient))
    (found, gradient), (expected, expected_gradient) = results
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert_gradients_close(gradient, expected_gradient)
    # The pattern acts: with all layers of one kind the result is another.
    for kind in set(config.kinds) if len(config.layer_kinds) > 1 else {GLOBAL}:
        uniform = hidden(replace(config, layer_kinds=(kind,)), params, batch)[batch.segment_ids > 0]
        assert np.abs(uniform - expected).max() > 1e-3


IRREGULAR = tuple(LOCAL if i % 7 in (1, 2, 4) or i > 40 else GLOBAL for i in range(64))


@pytest.mark.parametrize("kinds", [(GLOBAL,), (LOCAL,) * 5 + (GLOBAL,), IRREGULAR], ids=["plain", "5:1", "irregular"])
@pytest.mark.parametrize("remat", ["none", "dots"])
def test_what_is_compiled_does_not_grow_with_depth(kinds: tuple[LayerKind, ...], remat: Remat) -> None:
    def lowered_lines(layers: int) -> int:
        config = replace(PATTERN, num_hidden_layers=layers, layer_kinds=kinds)
        decoder = abstract_decoder(config, options=ComputeOptions("chunked", remat))
        batch = rows(random_tokens(2, 20, 9), length=32)

        def loss(params: Params) -> jax.Array:
            return jnp.sum(decoder.merge(params).hidden(batch) ** 2)

        return len(jax.jit(jax.grad(loss)).lower(decoder.shapes).as_text().splitlines())

    assert 500 < lowered_lines(64) <= 1.05 * lowered_lines(4)


def test_embeddings_are_scaled_by_the_rounded_number() -> None:
    """transformers rounds the scale to the embedding's dtype: sqrt(32) is 5.65625 in bfloat16."""
    config = replace(SMALL, num_hidden_layers=1, embed_scale=32**0.5)
    decoder = abstract_decoder(config, dtype=jnp.bfloat16)
    params = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), decoder.shapes)
    table = jnp.asarray(np.random.default_rng(9).standard_normal((256, 32)), jnp.bfloat16)
    params["embed"]["embedding"], params["final_norm"]["scale"] = table, jnp.ones(32, jnp.bfloat16)
    batch = rows([[1, 2, 3]], length=3)
    x = (np.asarray(table[1:4], np.float32) * np.float32(5.65625)).astype(jnp.bfloat16).astype(np.float32)
    normed = (x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)).astype(jnp.bfloat16)
    found = np.asarray(decoder.merge(params).hidden(batch))[0]
    np.testing.assert_array_equal(found.astype(np.float32), normed.astype(np.float32))


@pytest.mark.parametrize(
    ("sizes", "name"),
    [
        ({"fsdp": 8}, "plain"),
        ({"fsdp": 4, "tensor": 2}, "plain"),
        ({"data": 2, "context": 2, "tensor": 2}, "pattern"),
        ({"data": 2, "fsdp": 2, "tensor": 2}, "post_only"),
    ],
)
def test_meshes_agree_with_one_device(sizes: dict[str, int], name: str) -> None:
    config = CONFIGS[name]
    params = random_params(config)
    batch = rows(*[random_tokens(row, 20, 9) for row in range(8)], length=32)
    expected = hidden(config, params, batch)
    mesh = make_mesh(MeshConfig(**({"fsdp": 1} | sizes)))
    axes = abstract_decoder(config).axes
    placed = {p: jax.device_put(v, place(axes[p], v.shape, mesh).sharding) for p, v in flatten(params).items()}
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(hidden(config, unflatten(placed), batch), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["plain", "pattern", "post_only"])
def test_decoding_with_a_cache_equals_the_full_forward(name: str) -> None:
    config = CONFIGS[name]
    params = random_params(config)
    decoder = abstract_decoder(config)
    tokens = np.asarray([random_tokens(4, 12)[0], random_tokens(5, 12)[0]], np.int32)
    full = hidden(config, params, rows(*[[row.tolist()] for row in tokens], length=12))
    cache = init_cache(config, 3, 16, jnp.float32)
    slots = jnp.asarray([2, 0])

    @jax.jit
    def extend(params: Params, tokens: jax.Array, positions: jax.Array, cache: KVCache) -> tuple:
        return decoder.merge(params).extend(tokens, positions, slots, cache)

    prompt = jnp.broadcast_to(jnp.arange(8)[None], (2, 8))
    found, cache = extend(params, tokens[:, :8], prompt, cache)
    np.testing.assert_allclose(found, full[:, :8], atol=1e-5)
    for at in range(8, 12):
        found, cache = extend(params, tokens[:, at : at + 1], jnp.full((2, 1), at), cache)
        np.testing.assert_allclose(found[:, 0], full[:, at], atol=1e-5)


def test_abstract_shapes_are_those_of_real_parameters() -> None:
    params = jax.jit(init_params, static_argnums=0)(SMALL, jax.random.key(0))
    decoder = abstract_decoder(SMALL)
    shapes = {path: leaf.shape for path, leaf in flatten(decoder.shapes).items()}
    assert shapes == {path: leaf.shape for path, leaf in flatten(params).items()}
    assert {path: len(axes) for path, axes in decoder.axes.items()} == {p: len(s) for p, s in shapes.items()}
    assert not np.asarray(params["embed"]["embedding"])[250:].any()
