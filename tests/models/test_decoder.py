"""The decoder against torch, and its laws: packed = unpacked, no gradient across segments, remat and mesh change
nothing."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.config import MeshConfig
from posttrain.models import hf
from posttrain.models.decoder import (
    ComputeOptions,
    DecoderConfig,
    abstract_decoder,
    init_cache,
    init_params,
)
from posttrain.models.layers import RopeConfig
from posttrain.parallel.mesh import make_mesh
from posttrain.parallel.sharding import flatten, place, unflatten
from posttrain.records import Batch, Params

FIXTURES = sorted(p.parent for p in (Path(__file__).parent.parent / "fixtures" / "llama").glob("*/expected.npz"))
SMALL = DecoderConfig(250, 32, 48, 3, 4, 2, 8, rope=RopeConfig(theta=1000.0))


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


def hidden(config: DecoderConfig, params: Params, batch: Batch, **options: str) -> np.ndarray:
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


@pytest.mark.parametrize("scaling", ["none", "dynamic", "yarn"])
@pytest.mark.parametrize("attention", ["reference", "chunked"])
def test_packed_equals_unpacked(attention: str, scaling: str) -> None:
    rope = RopeConfig(1000.0, scaling, 4.0, original_max_position_embeddings=16)
    config = DecoderConfig(250, 32, 48, 3, 4, 2, 8, rope=rope, max_position_embeddings=16)
    params = random_params(config)
    segments = random_tokens(0, 30, 5, 13, 1)
    packed = hidden(config, params, rows(segments, length=64), attention=attention)[0]
    at = 0
    for segment in segments:
        alone = hidden(config, params, rows([segment], length=32), attention="reference")[0]
        np.testing.assert_allclose(packed[at : at + len(segment)], alone[: len(segment)], atol=1e-5)
        at += len(segment)


@pytest.mark.parametrize("attention", ["reference", "chunked"])
def test_no_gradient_crosses_segments(attention: str) -> None:
    params = random_params()
    decoder = abstract_decoder(SMALL, options=ComputeOptions(attention, "dots"))
    first, second = random_tokens(1, 10, 12)
    # Tokens of the first segment occur nowhere else, so their embedding rows show what reaches them.
    second = [token + 125 if token < 125 else token for token in second]
    first = [token % 125 for token in first]

    def second_only(params: Params) -> jax.Array:
        return jnp.sum(decoder.merge(params).hidden(rows([first, second], length=24))[0, 10:22] ** 2)

    gradient = jax.jit(jax.grad(second_only))(params)["embed"]["embedding"]
    assert not np.asarray(gradient)[sorted(set(first))].any()
    assert np.asarray(gradient)[sorted(set(second))].any()


@pytest.mark.parametrize("remat", ["minimal", "dots", "full"])
def test_remat_changes_no_gradient(remat: str) -> None:
    params = random_params()
    batch = rows(random_tokens(2, 20, 9), random_tokens(3, 31), length=32)

    def gradients(remat: str) -> Params:
        decoder = abstract_decoder(SMALL, options=ComputeOptions("chunked", remat))
        return jax.jit(jax.grad(lambda p: jnp.sum(decoder.merge(p).hidden(batch) ** 2)))(params)

    expected = flatten(gradients("none"))
    for path, found in flatten(gradients(remat)).items():
        scale = np.abs(expected[path]).max()
        np.testing.assert_allclose(found, expected[path], rtol=0, atol=1e-5 * scale, err_msg=path)


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "tensor": 2}])
def test_meshes_agree_with_one_device(sizes: dict[str, int]) -> None:
    params = random_params()
    batch = rows(*[random_tokens(row, 20, 9) for row in range(8)], length=32)
    expected = hidden(SMALL, params, batch)
    mesh = make_mesh(MeshConfig(**({"fsdp": 1} | sizes)))
    axes = abstract_decoder(SMALL).axes
    placed = {p: jax.device_put(v, place(axes[p], v.shape, mesh).sharding) for p, v in flatten(params).items()}
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(hidden(SMALL, unflatten(placed), batch), expected, atol=1e-5)


def test_decoding_with_a_cache_equals_the_full_forward() -> None:
    params = random_params()
    decoder = abstract_decoder(SMALL)
    tokens = np.asarray([random_tokens(4, 12)[0], random_tokens(5, 12)[0]], np.int32)
    full = hidden(SMALL, params, rows(*[[row.tolist()] for row in tokens], length=12))
    cache = init_cache(SMALL, 3, 16, jnp.float32)
    slots = jnp.asarray([2, 0])

    @jax.jit
    def extend(params: Params, tokens: jax.Array, positions: jax.Array, cache: object) -> tuple:
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
