"""Mixture of experts: the layer against its definition in float64, and its laws: padding, packing and meshes change
nothing, a device holds its share, a checkpoint is read expert by expert."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from posttrain.config import MeshConfig
from posttrain.errors import UserErrors
from posttrain.models import hf, weights
from posttrain.models.architecture import DecoderConfig, MoEConfig
from posttrain.models.decoder import ComputeOptions, KVCache, abstract_decoder, init_cache, init_params
from posttrain.models.moe import MoE
from posttrain.parallel.mesh import make_mesh
from posttrain.parallel.sharding import flatten, place, unflatten
from posttrain.records import Batch, Params, RouterStats

FIXTURES = Path(__file__).parent.parent / "fixtures" / "families"
CONFIG = DecoderConfig(250, 16, 48, 2, 4, 2, 8, moe=MoEConfig(6, 2, 8))


@functools.cache
def params() -> Params:
    """Large enough for routers to be sharp; hidden states stay of order 1."""
    leaves = flatten(jax.jit(init_params, static_argnums=0)(CONFIG, jax.random.key(0)))
    return unflatten(
        {p: leaf * (10 if p.startswith("layers/") and "norm" not in p else 1) for p, leaf in leaves.items()}
    )


def rows_of(*segments_by_row: list[np.ndarray], length: int, filler: int = 0) -> Batch:
    """Packed rows of these segments; `filler` is what stands in the padding."""
    shape = (len(segments_by_row), length)
    tokens = np.full(shape, filler, np.int32)
    segment_ids, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for row, segments in enumerate(segments_by_row):
        at = 0
        for number, segment in enumerate(segments, 1):
            span = slice(at, at + len(segment))
            tokens[row, span], segment_ids[row, span] = segment, number
            positions[row, span] = np.arange(len(segment))
            at += len(segment)
    return Batch(tokens, segment_ids, positions, np.ones(shape, np.float32))


def samples(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 250, n) for n in lengths]


@functools.cache
def forward(grouped: str = "blocks") -> Any:
    decoder = abstract_decoder(CONFIG, options=ComputeOptions("reference", "none", grouped))
    return jax.jit(lambda params, batch: decoder.merge(params).hidden_and_router(batch))


# ---- the definition -------------------------------------------------------------------------------------------------


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("grouped", ["ragged", "blocks"])
@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_the_layer_equals_its_definition(grouped: str, norm_topk_prob: bool) -> None:
    config = dataclasses.replace(CONFIG, moe=MoEConfig(6, 2, 8, norm_topk_prob))
    layer = MoE(config, rngs=nnx.Rngs(0), dtype=jnp.float32)
    rng = np.random.default_rng(1)
    x = rng.normal(size=(3, 11, 16)).astype(np.float32)
    real = rng.random((3, 11)) < 0.7
    graph, state = nnx.split(layer)
    state = jax.tree.map(lambda leaf: leaf * 20, state)
    run = jax.jit(lambda state, x, real: nnx.merge(graph, state)(x, real, grouped))
    found, stats = run(state, jnp.asarray(x), jnp.asarray(real))

    kernel = {
        name: np.asarray(state[name]["kernel"].get_value(), np.float64) for name in ("router", "gate", "up", "down")
    }
    expected, load, probability, squared = np.zeros(x.shape), np.zeros(6), np.zeros(6), 0.0
    for b, t in zip(*np.nonzero(real), strict=True):
        token = x[b, t].astype(np.float64)
        logits = token @ kernel["router"]
        p = softmax(logits)
        best = np.argsort(-p)[:2]
        share = p[best] / p[best].sum() if norm_topk_prob else p[best]
        for expert, weight in zip(best, share, strict=True):
            gate = token @ kernel["gate"][expert]
            inner = gate / (1 + np.exp(-gate)) * (token @ kernel["up"][expert])
            expected[b, t] += weight * (inner @ kernel["down"][expert])
        load[best] += 1
        probability += p
        squared += np.log(np.exp(logits).sum()) ** 2
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_array_equal(stats.load, load)
    np.testing.assert_allclose(stats.probability, probability, rtol=1e-5)
    assert float(stats.squared_lse) == pytest.approx(squared, rel=1e-5)


# ---- what changes nothing -------------------------------------------------------------------------------------------


def assert_same_stats(found: RouterStats, expected: RouterStats) -> None:
    np.testing.assert_array_equal(found.load, expected.load)
    np.testing.assert_allclose(found.probability, expected.probability, rtol=1e-5)
    np.testing.assert_allclose(found.squared_lse, expected.squared_lse, rtol=1e-5)


def test_packed_equals_unpacked_and_padding_is_not_seen() -> None:
    segments = samples(20, 5, 13, 9)
    packed, stats = forward()(params(), rows_of(segments[:2], segments[2:], length=32))
    alone, alone_stats = forward()(params(), rows_of(*([s] for s in segments), [], [], length=32, filler=77))
    assert_same_stats(alone_stats, stats)
    assert float(stats.load.sum()) == 2 * 2 * sum(map(len, segments))  # layers, experts a token
    for row, start, i in ((0, 0, 0), (0, 20, 1), (1, 0, 2), (1, 13, 3)):
        span = slice(start, start + len(segments[i]))
        np.testing.assert_allclose(packed[row, span], alone[i, : len(segments[i])], rtol=0, atol=1e-5)


def loss_and_gradients(
    params: Params, batch: Batch, **options: Any
) -> tuple[float, RouterStats, dict[str, np.ndarray]]:
    """Of something that depends on every real token and on all that routers tell."""
    chosen: dict[str, Any] = {"attention": "reference", "grouped": "blocks"} | options
    decoder = abstract_decoder(CONFIG, options=ComputeOptions(**chosen))
    slope = jnp.sin(jnp.arange(16, dtype=jnp.float32))

    def loss(params: Params, batch: Batch) -> tuple[jax.Array, RouterStats]:
        hidden, stats = decoder.merge(params).hidden_and_router(batch)
        assert stats is not None
        real = (jnp.asarray(batch.segment_ids) > 0).astype(jnp.float32)
        of_router = jnp.sum(stats.probability * jnp.arange(6, dtype=jnp.float32)) + stats.squared_lse
        return jnp.einsum("btd,d,bt->", hidden, slope, real) + of_router, stats

    (value, stats), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch)
    return float(value), stats, {path: np.asarray(leaf) for path, leaf in flatten(gradients).items()}


def assert_same_run(found: tuple, expected: tuple, tolerance: float) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert_same_stats(found[1], expected[1])
    for path, leaf in expected[2].items():
        np.testing.assert_allclose(found[2][path], leaf, rtol=0, atol=tolerance * np.abs(leaf).max(), err_msg=path)


@functools.cache
def batch_of_eight() -> Batch:
    segments = samples(17, 9, 24, 3, 20, 11, 30, 5, 8, 2)
    return rows_of(*(segments[i : i + 2] for i in range(0, 10, 2)), [], [], [], length=36)


@functools.cache
def on_one_device() -> tuple:
    return loss_and_gradients(params(), batch_of_eight(), grouped="ragged")


@pytest.mark.parametrize("options", [{}, {"remat": "dots", "attention": "chunked"}])
def test_how_it_is_computed_changes_nothing(options: dict[str, str]) -> None:
    assert_same_run(loss_and_gradients(params(), batch_of_eight(), **options), on_one_device(), 1e-5)


@pytest.mark.parametrize(
    "sizes",
    [
        {"expert": 2, "fsdp": 2, "tensor": 2},
        {"expert": 2, "data": 4},
        {"expert": 4, "fsdp": 2},  # 6 experts: whole on every device
    ],
    ids=str,
)
def test_meshes_agree_with_one_device(sizes: dict[str, int]) -> None:
    mesh = make_mesh(MeshConfig(**({"fsdp": 1} | sizes)))
    axes = abstract_decoder(CONFIG).axes
    placed = {p: jax.device_put(v, place(axes[p], v.shape, mesh).sharding) for p, v in flatten(params()).items()}
    with jax.set_mesh(mesh):
        found = loss_and_gradients(unflatten(placed), batch_of_eight(), remat="dots")
    assert_same_run(found, on_one_device(), 2e-5)


def test_decoding_on_a_mesh_that_splits_experts_equals_the_full_forward() -> None:
    """Three slots, which no axis divides: every device has all tokens and its own experts."""
    segments = samples(12, 12, 12)
    full, _ = forward()(params(), rows_of(*([s] for s in segments), length=12))
    decoder = abstract_decoder(CONFIG, options=ComputeOptions(grouped="blocks"))
    mesh = make_mesh(MeshConfig(expert=2, fsdp=2, tensor=2))
    placed = {
        p: jax.device_put(v, place(decoder.axes[p], v.shape, mesh).sharding) for p, v in flatten(params()).items()
    }

    @jax.jit
    def extend(params: Params, tokens: jax.Array, positions: jax.Array, cache: KVCache) -> tuple:
        return decoder.merge(params).extend(tokens, positions, None, cache)

    tokens, cache = np.stack(segments).astype(np.int32), init_cache(CONFIG, 3, 12, jnp.float32)
    with jax.set_mesh(mesh):
        for start in range(0, 12, 4):
            positions = np.broadcast_to(np.arange(start, start + 4, dtype=np.int32), (3, 4))
            found, cache = extend(unflatten(placed), tokens[:, start : start + 4], positions, cache)
            np.testing.assert_allclose(found, full[:, start : start + 4], rtol=0, atol=1e-5)


def test_bytes_per_device_shrink_with_the_axes() -> None:
    decoder = abstract_decoder(CONFIG)
    shapes = flatten(decoder.shapes)

    def bytes_per_device(**sizes: int) -> tuple[int, int]:
        """Of experts, and of all else that is split."""
        mesh = make_mesh(MeshConfig(**({"fsdp": 1} | sizes)))
        shards = {p: place(decoder.axes[p], s.shape, mesh).sharding.shard_shape(s.shape) for p, s in shapes.items()}
        experts = {p for p in shards if "/moe/" in p and "router" not in p}
        others = {p for p in shards if p not in experts and "norm" not in p}
        of_experts, of_others = (4 * sum(int(np.prod(shards[p])) for p in paths) for paths in (experts, others))
        return of_experts, of_others

    whole = bytes_per_device(data=8)
    assert whole[0] == 4 * 2 * 6 * 3 * 16 * 8
    assert bytes_per_device(expert=2, data=4) == (whole[0] // 2, whole[1] // 2)
    assert bytes_per_device(expert=2, fsdp=2, tensor=2)[0] == whole[0] // 8
    assert bytes_per_device(expert=2, fsdp=4) == (whole[0] // 8, whole[1] // 8)


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_are_read_once_each_by_the_slices_of_a_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, _ = hf.load_config(FIXTURES / name)
    decoder = abstract_decoder(config)
    mesh = make_mesh(MeshConfig(expert=2, fsdp=4, tensor=1))
    reads: dict[str, int] = {}
    read = weights.CheckpointReader.read

    def counted(self: weights.CheckpointReader, tensor: str, ranges: tuple[slice, ...]) -> np.ndarray:
        values = read(self, tensor, ranges)
        reads[tensor] = reads.get(tensor, 0) + values.size
        return values

    monkeypatch.setattr(weights.CheckpointReader, "read", counted)
    leaves = {
        p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place(decoder.axes[p], s.shape, mesh).sharding)
        for p, s in flatten(decoder.shapes).items()
    }
    sharded = flatten(hf.load_params(FIXTURES / name, config, unflatten(leaves)))
    shard = sharded["layers/moe/up/kernel"].addressable_shards[0].data.shape
    assert shard[:2] == (2, 3 if name == "qwen3_moe" else 5)  # 5 experts cannot be split over 2 devices
    stored = safetensors.numpy.load_file(FIXTURES / name / "model.safetensors")
    experts = {tensor: values.size for tensor, values in stored.items() if ".experts." in tensor}
    assert {tensor: size for tensor, size in reads.items() if ".experts." in tensor} == experts


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_that_transformers_5_saved_joined_are_read(name: str, tmp_path: Path) -> None:
    config, _ = hf.load_config(FIXTURES / name)
    shapes = abstract_decoder(config).shapes
    stored = safetensors.numpy.load_file(FIXTURES / name / "model.safetensors")
    gate, up, down = ("w1", "w3", "w2") if name == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    joined = {key: value for key, value in stored.items() if ".experts." not in key and ".gate.weight" not in key}
    count = 5 if name == "mixtral" else 6
    for layer in range(config.num_hidden_layers):
        theirs = f"model.layers.{layer}.mlp"
        block = theirs.replace("mlp", "block_sparse_moe") if name == "mixtral" else theirs

        def of(part: str, block: str = block) -> np.ndarray:
            return np.stack([stored[f"{block}.experts.{e}.{part}.weight"] for e in range(count)])

        joined[f"{theirs}.experts.gate_up_proj"] = np.concatenate([of(gate), of(up)], axis=1)
        joined[f"{theirs}.experts.down_proj"] = of(down)
        joined[f"{theirs}.gate.weight"] = stored[f"{block}.gate.weight"]
    safetensors.numpy.save_file(joined, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((FIXTURES / name / "config.json").read_text())
    found, expected = (flatten(hf.load_params(d, config, shapes)) for d in (tmp_path, FIXTURES / name))
    for path, leaf in expected.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)

    short = joined | {"model.layers.0.mlp.experts.down_proj": joined["model.layers.0.mlp.experts.down_proj"][1:]}
    safetensors.numpy.save_file(short, tmp_path / "model.safetensors")
    with pytest.raises(UserErrors, match=r"model.layers.0.mlp.experts.down_proj: extra"):
        hf.check_weights(tmp_path, config)


def raw_config(name: str, **changes: Any) -> dict[str, Any]:
    return json.loads((FIXTURES / name / "config.json").read_text()) | changes


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "qwen3_moe",
            {"mlp_only_layers": [0]},
            r"mlp_only_layers: \[0\]: layers with an MLP among layers with experts",
        ),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step: 2: layers with an MLP"),
        ("qwen3_moe", {"num_local_experts": 4}, "num_experts: 6 contradicts num_local_experts: 4"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok: 9 of num_local_experts: 5 cannot be chosen"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise: 0.1 is not served"),
        ("mixtral", {"router_aux_loss_coef": -1.0}, "router_aux_loss_coef: -1.0 must not be below 0"),
    ],
)
def test_what_is_not_served_is_refused_with_the_reason(name: str, changes: dict[str, Any], message: str) -> None:
    raw = raw_config(name, **changes)
    with pytest.raises(UserErrors, match=message):
        hf.find_family(raw["model_type"]).config_from_hf(raw)


def test_a_config_of_transformers_5_gets_the_key_that_4_reads() -> None:
    raw = raw_config("qwen3_moe")
    raw["num_local_experts"] = raw.pop("num_experts")
    family = hf.find_family("qwen3_moe")
    config = family.config_from_hf(raw)
    assert config == family.config_from_hf(raw_config("qwen3_moe"))
    assert family.config_to_hf(config, raw) == {**raw, "num_experts": 6}


def test_the_model_asks_for_its_balance_loss_by_its_router_logits() -> None:
    family = hf.find_family("mixtral")
    for asked, coefficient in ((False, 0.0), (True, 0.02)):
        moe = family.config_from_hf(raw_config("mixtral", output_router_logits=asked)).moe
        assert moe == MoEConfig(5, 2, 16, router_aux_loss_coef=coefficient)
