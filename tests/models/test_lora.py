"""Adapters against PEFT and against the full gradient; merged, sharded, split, dropped; in and out of PEFT's format."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from posttrain.config import LoraConfig, MeshConfig, ModelConfig
from posttrain.errors import UserError, UserErrors
from posttrain.experiment import setup_model
from posttrain.models.layers import Linear
from posttrain.models.lora import linear_modules, merge_adapter
from posttrain.models.peft import read_adapter, write_adapter
from posttrain.models.quantize import DEQUANTIZE
from posttrain.objectives.supervised import sft
from posttrain.parallel.mesh import single_device_mesh
from posttrain.parallel.sharding import batch_sharding, flatten, place, unflatten
from posttrain.records import Batch, Params
from posttrain.train.adapters import named_model
from posttrain.train.setup import ModelSetup
from posttrain.train.step import LossSums

FIXTURES = Path(__file__).parent.parent / "fixtures"
ADAPTERS = sorted(path.parent.name for path in (FIXTURES / "lora").glob("*/expected.npz"))
T = 24


def mesh(**sizes: int) -> MeshConfig:
    return MeshConfig(**{"fsdp": 1, **sizes})


def base_of(name: str) -> str:
    raw = json.loads((FIXTURES / "lora" / name / "adapter_config.json").read_text())
    return str(FIXTURES / raw["base_model_name_or_path"])


def set_up(path: str, sizes: dict[str, int] | None = None, /, **lora: Any) -> ModelSetup:
    """On a mesh of 8 devices with these sizes, or on one device."""
    config = ModelConfig(path=path, dtype="float32", lora=LoraConfig(**lora))
    setup = setup_model(config, mesh(**({"data": 8} if sizes is None else sizes)))
    if sizes is not None:
        return setup
    one, placements = single_device_mesh(), {}
    for decoder in (setup.decoder, *([setup.quantized.plain] if setup.quantized else [])):
        shapes = flatten(decoder.shapes)
        placements |= {path: place(axes, shapes[path].shape, one) for path, axes in decoder.axes.items()}
    return replace(setup, mesh=one, placements=placements)


def adapted(name: str) -> tuple[ModelSetup, Params]:
    setup = set_up(base_of(name), path=str(FIXTURES / "lora" / name))
    return setup, setup.load()


def randomized(params: Params, seed: int = 0) -> Params:
    """With an adapter that does something, placed as before."""
    rng = np.random.default_rng(seed)
    leaves = flatten(params)
    for path, leaf in leaves.items():
        if path.endswith("lora_b"):
            values = rng.normal(size=leaf.shape).astype(leaf.dtype) * 0.04
            leaves[path] = jax.device_put(values, leaf.sharding)
    return unflatten(leaves)


def full_rows(ids: np.ndarray) -> Batch:
    ones = np.ones(ids.shape, np.int32)
    return Batch(
        ids, ones, np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape), ones.astype(np.float32)
    )


def logps(setup: ModelSetup, params: Params, ids: np.ndarray) -> np.ndarray:
    """log softmax of every position, f32 `[B, T, V]`."""

    def compute(params: Params, batch: Batch) -> jax.Array:
        model = setup.model(params)
        hidden, head = model.hidden(batch), model.head()[: setup.config.vocab_size]
        return jax.nn.log_softmax(jnp.einsum("btd,vd->btv", hidden, head), axis=-1)

    return np.asarray(jax.jit(compute)(params, full_rows(ids)))


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_peft_adapter_gives_torch_s_log_probs(name: str) -> None:
    setup, params = adapted(name)
    expected = np.load(FIXTURES / "lora" / name / "expected.npz")
    torch_logps = np.asarray(jax.nn.log_softmax(expected["logits"].astype(np.float64), axis=-1))
    found = logps(setup, params, expected["ids"])
    np.testing.assert_allclose(found, torch_logps, rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", ADAPTERS)
def test_merged_equals_unmerged(name: str) -> None:
    setup, params = adapted(name)
    ids = np.load(FIXTURES / "lora" / name / "expected.npz")["ids"]
    found = logps(setup, params, ids)
    assert setup.lora is not None
    whole = merge_adapter(params, setup.lora.adapter, setup.lora.base)
    np.testing.assert_allclose(logps(setup.base, whole, ids), found, rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", ADAPTERS)
def test_out_and_in_again_is_the_same_adapter(name: str, tmp_path: Path) -> None:
    setup, params = adapted(name)
    lora = setup.lora
    assert lora is not None
    write_adapter(tmp_path / "out", lora.adapter, params, lora.modules, base="base")
    again, values = read_adapter(tmp_path / "out", lora.modules, lora.base)
    ours = flatten(setup.split(params)[0])
    assert again.ranks == lora.adapter.ranks and again.use_rslora == lora.adapter.use_rslora
    for module, scale in lora.adapter.scales.items():
        assert again.scales[module] == pytest.approx(scale, rel=1e-12)
    assert set(values) == set(ours)
    for path, leaf in ours.items():
        np.testing.assert_array_equal(values[path], np.asarray(leaf), err_msg=path)
    original = load_file(FIXTURES / "lora" / name / "adapter_model.safetensors")
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert set(original) == set(written)
    assert all(written[key].shape == original[key].shape for key in original)


def test_parts_of_a_fused_weight_become_one_adapter_of_the_same_function(tmp_path: Path) -> None:
    """q and v of a fused qkv have each an A of their own: written, the rank doubles."""
    setup = set_up(base_of("fused"), r=3, alpha=6, target_modules=["layers/attn/(q|v)", "layers[1:2]/mlp/gate"])
    params, lora = randomized(setup.load()), setup.lora
    assert lora is not None
    write_adapter(tmp_path / "out", lora.adapter, params, lora.modules, base="base")
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    first = "base_model.model.model.layers.0.self_attn.qkv_proj"
    assert written[f"{first}.lora_A.weight"].shape == (6, 32)
    b = written[f"{first}.lora_B.weight"]
    assert not b[:32, 3:].any() and not b[32:48].any() and not b[48:, :3].any() and b[:32, :3].all()
    raw = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (raw["r"], raw["lora_alpha"], raw["layers_to_transform"]) == (6, 12, None)
    assert raw["target_modules"] == [
        "model.layers.0.self_attn.qkv_proj",
        "model.layers.1.mlp.gate_up_proj",
        "model.layers.1.self_attn.qkv_proj",
    ]
    assert raw["rank_pattern"] == {"gate_up_proj": 3} and raw["alpha_pattern"] == {"gate_up_proj": 6}
    again = set_up(base_of("fused"), path=str(tmp_path / "out"))
    ids = np.load(FIXTURES / "lora" / "fused" / "expected.npz")["ids"]
    np.testing.assert_allclose(logps(again, again.load(), ids), logps(setup, params, ids), rtol=0, atol=5e-5)


# ---- targets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "modules", "layers"),
    [
        ("all-linear", {f"attn/{n}" for n in "qkvo"} | {"mlp/gate", "mlp/up", "mlp/down"}, (2, 2, 2)),
        (["q_proj", "down_proj"], {"attn/q", "mlp/down"}, (2, 2, 2)),
        (["layers[1:]/attn/(q|v)"], {"attn/q", "attn/v"}, (0, 2, 2)),
        (["layers[0:1]/attn/q", "layers[2:3]/attn/q"], {"attn/q"}, (2, 0, 2)),
    ],
)
def test_targets_by_name_and_by_pattern(targets: Any, modules: set[str], layers: tuple[int, ...]) -> None:
    setup = set_up(base_of("all_linear"), r=2, target_modules=targets)
    assert setup.lora is not None
    assert setup.lora.adapter.ranks == {f"layers/{module}": layers for module in sorted(modules)}
    assert set(setup.lora.adapter.scales.values()) == {16.0}


def test_targets_that_name_nothing_are_all_reported() -> None:
    with pytest.raises(UserErrors) as error:
        set_up(base_of("all_linear"), r=2, target_modules=["qproj", "layers/att/q", "layers[2:9]/attn/q", "q_proj"])
    assert len(error.value.problems) == 3
    assert "model.lora.target_modules: 'qproj' matches no parameter" in error.value.problems[0]
    assert "names of this model are all-linear, down_proj, gate_proj" in error.value.problems[0]


def test_the_scale_of_rslora() -> None:
    setup = set_up(base_of("all_linear"), r=16, alpha=32, use_rslora=True)
    assert setup.lora is not None and set(setup.lora.adapter.scales.values()) == {8.0}


# ---- how it starts ------------------------------------------------------------------------------------------


def test_a_new_adapter_is_drawn_as_peft_does_and_alike_on_every_mesh() -> None:
    expected = None
    for sizes in ({"data": 8}, {"fsdp": 4, "tensor": 2}):
        setup = set_up(base_of("all_linear"), sizes, r=5, target_modules=["layers[1:]/.*"])
        leaves = {path: np.asarray(leaf) for path, leaf in flatten(setup.load_adapter(seed=3)).items()}
        expected = expected or leaves
        for path, leaf in leaves.items():
            np.testing.assert_array_equal(leaf, expected[path])
    assert expected is not None
    for path, leaf in expected.items():
        if path.endswith("lora_b"):
            assert not leaf.any()
            continue
        bound = 1 / np.sqrt(48)  # all inputs of this model are as wide
        assert not leaf[0].any() and np.abs(leaf[1:]).max() <= bound
        # Uniform: the standard deviation of n draws is bound / sqrt(3), to within about 1 / sqrt(2 n).
        assert leaf[1:].std() == pytest.approx(bound / np.sqrt(3), rel=4 / np.sqrt(2 * leaf[1:].size))
    assert np.any(expected["layers/attn/q/lora_a"] != expected["layers/attn/k/lora_a"])
    other = set_up(base_of("all_linear"), {"data": 8}, r=5).load_adapter(seed=4)
    assert np.any(np.asarray(flatten(other)["layers/attn/q/lora_a"])[1] != expected["layers/attn/q/lora_a"][1])


def test_adapter_off_and_a_new_adapter_are_the_base_bit_for_bit() -> None:
    plain = set_up(base_of("all_linear"))
    setup = set_up(base_of("all_linear"), r=4)
    ids = np.load(FIXTURES / "lora" / "all_linear" / "expected.npz")["ids"]
    expected, params = logps(plain, plain.load(), ids), randomized(setup.load())
    np.testing.assert_array_equal(logps(setup.base, setup.split(params)[1], ids), expected)
    np.testing.assert_array_equal(logps(setup, setup.load(), ids), expected)
    assert np.abs(logps(setup, params, ids) - expected).max() > 0.1


def test_adapters_are_split_over_the_mesh_as_their_weights_are() -> None:
    setup = set_up(base_of("all_linear"), {"fsdp": 4, "tensor": 2}, r=4)
    leaves = flatten(setup.load())
    for path, parts in {
        "layers/attn/q/lora_a": 4,
        "layers/attn/q/lora_b": 2,
        "layers/attn/o/lora_a": 2,
        "layers/attn/o/lora_b": 4,
        "layers/mlp/up/lora_b": 2,
        "layers/mlp/down/lora_b": 4,
    }.items():
        assert leaves[path].size == parts * leaves[path].addressable_shards[0].data.size, path


def test_the_base_is_kept_in_the_compute_dtype() -> None:
    config = ModelConfig(path=base_of("all_linear"), dtype="bfloat16", lora=LoraConfig(r=2))
    setup = setup_model(config, mesh(data=8))
    dtypes = {path: leaf.dtype.name for path, leaf in flatten(setup.load()).items()}
    for path, dtype in dtypes.items():
        assert dtype == ("float32" if "lora" in path else "bfloat16"), path


# ---- gradients ----------------------------------------------------------------------------------------------


def make_rows(packed: bool) -> Batch:
    """The same 8 samples of unequal lengths, two to a row or one to a row, in 8 rows."""
    rng = np.random.default_rng(0)
    samples = []
    for length in (13, 11, 20, 4, 9, 15, 2, 22):
        weights = (rng.random(length) < 0.7).astype(np.float32)
        weights[0] = 0.0
        samples.append((rng.integers(0, 250, length), weights))
    groups = [samples[i : i + 2] for i in range(0, 8, 2)] if packed else [[sample] for sample in samples]
    arrays = {name: np.zeros((8, T), np.int32) for name in ("tokens", "segment_ids", "positions")}
    loss_weights = np.zeros((8, T), np.float32)
    for row, group in enumerate(groups):
        at = 0
        for number, (tokens, weights) in enumerate(group, 1):
            span = slice(at, at + len(tokens))
            arrays["tokens"][row, span], arrays["segment_ids"][row, span] = tokens, number
            arrays["positions"][row, span], loss_weights[row, span] = np.arange(len(tokens)), weights
            at += len(tokens)
    return Batch(**arrays, loss_weights=loss_weights)


def split(batch: Batch, accumulation: int) -> Batch:
    return jax.tree.map(lambda x: x.reshape(accumulation, -1, x.shape[-1]), batch)


def loss_and_gradients(
    setup: ModelSetup, params: Params, batch: Batch, key: jax.Array | None = None
) -> tuple[float, dict[str, np.ndarray]]:
    """As a train step computes them: of the adapter, or without one of everything."""
    dropout = None if setup.lora is None else setup.lora.dropout
    loss = LossSums(setup.decoder, sft(), jnp.float32, dropout)

    def compute(params: Params, batch: Batch) -> tuple[Params, jax.Array]:
        totals = loss.totals(batch)
        gradients, sums, _ = loss.gradients(*setup.split(params), batch, totals, key=key)
        return gradients, sums["nll"] / totals["nll"]

    with jax.set_mesh(setup.mesh):
        gradients, value = jax.jit(compute)(params, jax.device_put(batch, batch_sharding(setup.mesh)))
    return float(value), {path: np.asarray(leaf) for path, leaf in flatten(gradients).items()}


def assert_alike(found: tuple[float, dict], expected: tuple[float, dict], tolerance: float) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert set(found[1]) == set(expected[1])
    for path, leaf in expected[1].items():
        np.testing.assert_allclose(found[1][path], leaf, rtol=0, atol=tolerance * np.abs(leaf).max(), err_msg=path)


def test_the_gradient_follows_from_that_of_the_merged_weights() -> None:
    """W' = W + s A B, so dA = s dW' B^T and dB = s A^T dW'."""
    setup = set_up(base_of("all_linear"), r=4)
    params, lora = randomized(setup.load()), setup.lora
    assert lora is not None
    batch = split(make_rows(packed=False), 1)
    value, found = loss_and_gradients(setup, params, batch)
    own = {path: np.asarray(leaf, np.float64) for path, leaf in flatten(setup.split(params)[0]).items()}
    whole = merge_adapter(params, lora.adapter, lora.base)
    expected_value, full = loss_and_gradients(setup.base, whole, batch)
    assert value == pytest.approx(expected_value, rel=1e-5)
    assert set(found) == set(own)
    for module, linear in linear_modules(lora.base).items():
        assert isinstance(linear, Linear)
        a, b, scale = own[f"{module}/lora_a"], own[f"{module}/lora_b"], lora.adapter.scales[module]
        kernel = full[f"{module}/kernel"].astype(np.float64)
        inputs = int(np.prod(kernel.shape[1 : 1 + linear.input_count]))
        kernel, flat_a, flat_b = kernel.reshape(3, inputs, -1), a.reshape(3, inputs, -1), b.reshape(3, 4, -1)
        for name, expected in (
            ("lora_a", scale * np.einsum("lio,lro->lir", kernel, flat_b)),
            ("lora_b", scale * np.einsum("lir,lio->lro", flat_a, kernel)),
        ):
            leaf = found[f"{module}/{name}"].reshape(expected.shape)
            # Sums in another order, as on another mesh.
            np.testing.assert_allclose(leaf, expected, rtol=0, atol=2e-5 * np.abs(expected).max(), err_msg=module)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_micro_batches_change_nothing(dropout: float) -> None:
    setup = set_up(base_of("all_linear"), r=4, dropout=dropout)
    params, batch, key = randomized(setup.load()), make_rows(packed=True), jax.random.key(5)
    expected = loss_and_gradients(setup, params, split(batch, 1), key)
    for accumulation in (2, 8):
        # Products of other shapes round otherwise: 1.0e-5 between 4 and 1.
        assert_alike(loss_and_gradients(setup, params, split(batch, accumulation), key), expected, 2e-5)
    if dropout:
        assert abs(loss_and_gradients(setup, params, split(batch, 1), jax.random.key(6))[0] - expected[0]) > 1e-3


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("sizes", [{"fsdp": 4, "context": 2}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_the_mesh_changes_nothing(sizes: dict[str, int], dropout: float) -> None:
    results = []
    for mesh_sizes in ({"data": 8}, sizes):
        setup = set_up(base_of("all_linear"), mesh_sizes, r=4, dropout=dropout)
        params = randomized(setup.load())
        results.append(loss_and_gradients(setup, params, split(make_rows(packed=True), 1), jax.random.key(5)))
    assert_alike(results[1], results[0], 2e-5)


def test_packing_changes_nothing() -> None:
    setup = set_up(base_of("all_linear"), r=4)
    params = randomized(setup.load())
    packed, single = (split(make_rows(packed), 1) for packed in (True, False))
    assert_alike(loss_and_gradients(setup, params, packed), loss_and_gradients(setup, params, single), 1e-5)


def test_dropout_drops_its_share_of_the_adapters_input_and_scales_the_rest() -> None:
    """With W = 0, A = I and B = I a linear layer gives its dropped input."""
    setup = set_up(base_of("all_linear"), r=4, dropout=0.25, target_modules=["gate_proj"])
    assert setup.lora is not None and setup.lora.dropout is not None
    keys = setup.lora.dropout.keys(jax.random.key(0), jnp.arange(4))["layers"]["mlp"]["gate"]["dropout_keys"]
    assert keys.shape == (3, 4, 2) and len({tuple(key) for key in np.asarray(keys).reshape(-1, 2).tolist()}) == 12
    layer = Linear({"embed": 48}, {"mlp": 48}, bias=False, rngs=nnx.Rngs(0), dtype=jnp.float32)
    layer.kernel[...] = jnp.zeros((48, 48))
    for name in ("lora_a", "lora_b"):
        setattr(layer, name, nnx.data(nnx.Param(jnp.eye(48))))
    layer.dropout, layer.dropout_keys = 0.25, nnx.data(nnx.Param(keys[0]))
    x = np.random.default_rng(0).normal(size=(4, 200, 48)).astype(np.float32)
    found = np.asarray(layer(jnp.asarray(x)))
    dropped = found == 0.0
    assert dropped.mean() == pytest.approx(0.25, abs=4 * np.sqrt(0.25 * 0.75 / x.size))
    np.testing.assert_allclose(found[~dropped], (x / np.float32(0.75))[~dropped], rtol=1e-5)
    assert len({row.tobytes() for row in dropped}) == 4


def test_without_keys_nothing_is_dropped() -> None:
    results = []
    for dropout in (0.0, 0.5):
        setup = set_up(base_of("all_linear"), r=4, dropout=dropout)
        results.append(loss_and_gradients(setup, randomized(setup.load()), split(make_rows(packed=True), 1)))
    assert results[0][0] == results[1][0]


# ---- experts ------------------------------------------------------------------------------------------------


MIXTURE = str(FIXTURES / "families" / "mixtral")


def test_experts_have_adapters_that_merge() -> None:
    setup = set_up(MIXTURE, r=3)
    assert setup.lora is not None
    assert {"layers/moe/gate", "layers/moe/up", "layers/moe/down"} < set(setup.lora.adapter.ranks)
    assert not any("router" in module for module in setup.lora.adapter.ranks)
    params = randomized(setup.load())
    assert flatten(params)["layers/moe/gate/lora_a"].shape == (2, 5, 24, 3)
    ids = np.random.default_rng(0).integers(0, 101, (2, 20)).astype(np.int32)
    found = logps(setup, params, ids)
    assert np.abs(found - logps(setup.base, setup.split(params)[1], ids)).max() > 0.1
    whole = merge_adapter(params, setup.lora.adapter, setup.lora.base)
    np.testing.assert_allclose(found, logps(setup.base, whole, ids), rtol=0, atol=5e-5)


def test_experts_adapters_on_a_mesh_and_in_peft_s_format(tmp_path: Path) -> None:
    results = []
    for sizes in ({"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}):
        setup = set_up(MIXTURE, sizes, r=3)
        batch = make_rows(packed=True)
        batch = replace(batch, tokens=batch.tokens % 101)
        results.append(loss_and_gradients(setup, randomized(setup.load()), split(batch, 1)))
    assert_alike(results[1], results[0], 2e-5)
    lora, params = setup.lora, randomized(setup.load())
    assert lora is not None
    write_adapter(tmp_path / "out", lora.adapter, params, lora.modules, base="base")
    _, values = read_adapter(tmp_path / "out", lora.modules, lora.base)
    for path, leaf in flatten(setup.split(params)[0]).items():
        np.testing.assert_array_equal(values[path], np.asarray(leaf), err_msg=path)
    raw = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert raw["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj", "w1", "w2", "w3"]


def test_dropout_on_experts_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.lora\.dropout = 0\.1: layers/moe/down has experts"):
        set_up(MIXTURE, r=3, dropout=0.1)
    assert set_up(MIXTURE, r=3, dropout=0.1, target_modules=["q_proj"]).lora is not None


# ---- quantised ------------------------------------------------------------------------------------------------------


NORMAL_FLOATS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""Dettmers et al. 2023, appendix E."""


def requantised(kind: str, kernel: np.ndarray, inputs: tuple[int, ...]) -> np.ndarray:
    """What a kernel `[L, *inputs, *outputs]` of at most 64 last inputs becomes, in f64."""
    if kind == "int8":
        scale = np.abs(kernel).max(inputs, keepdims=True) / 127.5
        return np.clip(np.round(kernel / scale), -128, 127) * scale
    scale = np.abs(kernel).max(inputs[-1], keepdims=True)
    values = np.array(NORMAL_FLOATS)
    return values[np.abs((kernel / scale)[..., None] - values).argmin(-1)] * scale


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantised_weights_are_rounded_as_the_paper_says_and_stay_under_the_adapter(kind: Any) -> None:
    setup, plain = set_up(base_of("all_linear"), r=4, quantize=kind), set_up(base_of("all_linear"), r=4)
    params, leaves = randomized(setup.load()), flatten(randomized(plain.load()))
    held = flatten(params)
    for path, leaf in leaves.items():
        if not path.endswith("/kernel"):
            continue
        inputs = (1, 2) if "attn/o" in path else (1,)
        made = np.asarray(jax.vmap(DEQUANTIZE[kind])(held[f"{path}_q"], held[f"{path}_scale"]))
        kernel = np.asarray(leaf)
        expected = requantised(kind, kernel.astype(np.float64), inputs)
        # In int8 the largest value lies halfway between two steps, and f32 may round it to either.
        halfway = np.abs(kernel) == np.abs(kernel).max(inputs, keepdims=True)
        np.testing.assert_allclose(made[~halfway], expected[~halfway], rtol=1e-6, atol=1e-7, err_msg=path)
        np.testing.assert_allclose(made[halfway], kernel[halfway], rtol=1 / 250, err_msg=path)
        leaves[path] = jnp.asarray(made)
    ids = np.load(FIXTURES / "lora" / "all_linear" / "expected.npz")["ids"]
    np.testing.assert_allclose(logps(setup, params, ids), logps(plain, unflatten(leaves), ids), rtol=0, atol=5e-5)
    assert held["layers/mlp/up/kernel_q"].dtype == {"int8": jnp.int8, "nf4": jnp.uint4}[kind]
    assert "layers/mlp/up/kernel" not in held and held["embed/embedding"].dtype == jnp.float32


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantised_base_on_a_mesh_and_its_gradients(kind: Any) -> None:
    results = []
    for sizes in ({"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}):
        setup = set_up(base_of("all_linear"), sizes, r=4, quantize=kind, dropout=0.2)
        params = randomized(setup.load())
        results.append(loss_and_gradients(setup, params, split(make_rows(packed=True), 1), jax.random.key(5)))
    assert_alike(results[1], results[0], 2e-5)
    assert all(np.abs(leaf).max() > 0 for leaf in results[0][1].values())


def test_quantised_experts() -> None:
    setup = set_up(MIXTURE, r=3, quantize="int8")
    leaf = flatten(setup.load())["layers/moe/gate/kernel_scale"]
    assert leaf.shape == (2, 5, 1, 16)
    plain = set_up(MIXTURE, r=3)
    ids = np.random.default_rng(0).integers(0, 101, (2, 20)).astype(np.int32)
    difference = np.abs(logps(setup, setup.load(), ids) - logps(plain, plain.load(), ids)).max()
    assert 0 < difference < 0.1


# ---- what is refused -----------------------------------------------------------------------------------------


def edited(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of an adapter with a changed config."""
    target = tmp_path / "adapter"
    shutil.copytree(FIXTURES / "lora" / "all_linear", target)
    raw = json.loads((target / "adapter_config.json").read_text())
    change(raw)
    (target / "adapter_config.json").write_text(json.dumps(raw))
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora: True is not served; served: false"),
        ({"bias": "all"}, "bias: 'all' is not served"),
        ({"peft_type": "IA3"}, "peft_type: 'IA3' is not served; served: LORA"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the base weights too"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": None}, "r: None must be a number above 0"),
    ],
)
def test_adapters_that_are_not_served(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    target = edited(tmp_path, lambda raw: raw.update(change))
    with pytest.raises(UserErrors, match=r"adapter_config\.json: ") as error:
        set_up(base_of("all_linear"), path=str(target))
    assert message in str(error.value)


def test_an_adapter_of_another_model_is_refused_with_the_tensors() -> None:
    with pytest.raises(UserErrors) as error:
        set_up(base_of("all_linear"), path=str(FIXTURES / "lora" / "fused"))
    said = str(error.value)
    assert "8 tensors are no adapter of a linear layer of this model: base_model.model.model.layers.0" in said
    assert "model.layers.1.self_attn.o_proj: A [3, 32] and B [32, 3] do not fit a weight of 48 rows" in said
    with pytest.raises(UserErrors, match="do not fit a weight of 64 rows"):
        set_up(base_of("rslora_last_layer"), path=str(FIXTURES / "lora" / "all_linear"))


def test_a_damaged_or_missing_adapter_is_refused(tmp_path: Path) -> None:
    target = edited(tmp_path, lambda raw: None)
    weights = target / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(UserErrors, match="not a whole safetensors file"):
        set_up(base_of("all_linear"), path=str(target))
    weights.unlink()
    with pytest.raises(UserErrors, match=r"adapter_model\.safetensors: missing"):
        set_up(base_of("all_linear"), path=str(target))
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        set_up(base_of("all_linear"), path=str(tmp_path))


def test_a_command_finds_the_model_of_an_adapter(tmp_path: Path) -> None:
    base = base_of("all_linear")
    target = edited(tmp_path, lambda raw: raw.update(base_model_name_or_path=base, revision="v2"))
    config = named_model(str(target), None, None)
    assert (config.path, config.revision, config.lora.path) == (base, "v2", str(target))
    assert named_model(str(target), "other", "v3").path == "other"
    assert named_model(base, None, None).lora.path is None
    with pytest.raises(UserError, match="is a model, not an adapter"):
        named_model(base, "other", None)
    gone = edited(tmp_path / "two", lambda raw: raw.update(base_model_name_or_path="/not/there"))
    with pytest.raises(UserError, match="its base model /not/there is not there; name it with --base"):
        named_model(str(gone), None, None)
    with pytest.raises(
        UserError, match=r"to train, name the model in model\.path and the adapter in model\.lora\.path"
    ):
        set_up(str(target))
