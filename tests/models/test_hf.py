"""Hugging Face directories in and out: values, slices, names, configs, and what is refused."""

import json
import os
import shutil
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
import transformers
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from posttrain import models
from posttrain.data.tokenizer import Tokenizer
from posttrain.errors import UserError, UserErrors
from posttrain.models import hf, llama
from posttrain.models.architecture import DecoderConfig
from posttrain.models.directory import resolve_model
from posttrain.models.hf import (
    CheckpointReader,
    find_family,
    load_config,
    load_generation_config,
    load_params,
)
from posttrain.models.rope import RopeConfig
from posttrain.parallel.sharding import flatten, unflatten

FIXTURES = Path(__file__).parent.parent / "fixtures" / "llama"


def abstract_params(config: DecoderConfig, sharding, dtype=jnp.float32) -> dict:
    """By hand, from the documented shapes; `sharding` may be a function of path and shape."""
    c = config
    layers, width, vocab = c.num_hidden_layers, c.hidden_size, c.padded_vocab_size
    n, k, h, f = c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.intermediate_size
    per_layer = {
        "attn_norm/scale": (width,),
        "mlp_norm/scale": (width,),
        "attn/q/kernel": (width, n, h),
        "attn/k/kernel": (width, k, h),
        "attn/v/kernel": (width, k, h),
        "attn/o/kernel": (n, h, width),
        "mlp/gate/kernel": (width, f),
        "mlp/up/kernel": (width, f),
        "mlp/down/kernel": (f, width),
    }
    if c.attention_bias:
        biases = {"attn/q/bias": (n, h), "attn/k/bias": (k, h), "attn/v/bias": (k, h), "attn/o/bias": (width,)}
        per_layer.update(biases)
    if c.mlp_bias:
        per_layer.update({"mlp/gate/bias": (f,), "mlp/up/bias": (f,), "mlp/down/bias": (width,)})
    shapes = {"embed/embedding": (vocab, width), "final_norm/scale": (width,)}
    shapes.update({f"layers/{path}": (layers, *shape) for path, shape in per_layer.items()})
    if not c.tie_word_embeddings:
        shapes["lm_head/kernel"] = (vocab, width)
    place = sharding if callable(sharding) else lambda path, shape: sharding
    return unflatten({p: jax.ShapeDtypeStruct(s, dtype, sharding=place(p, s)) for p, s in shapes.items()})


def one_device() -> SingleDeviceSharding:
    return SingleDeviceSharding(jax.devices()[3])


def mesh_4x2() -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tensor"))


def split_everywhere(path: str, shape: tuple[int, ...]) -> NamedSharding:
    """The last two dims over both axes, where they divide: cuts heads, head dims and padded rows apart."""
    spec = [None] * len(shape)
    for dim, axis in ((-1, "tensor"), (-2, "fsdp")):
        if len(shape) >= -dim and shape[dim] % {"tensor": 2, "fsdp": 4}[axis] == 0:
            spec[dim] = axis
    return NamedSharding(mesh_4x2(), PartitionSpec(*spec))


def reference_params(directory: Path, config: DecoderConfig) -> dict[str, np.ndarray]:
    """Straight from the definition of a linear layer, `y = W x`, heads being consecutive rows of W."""
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    c = config

    def stack(name: str, shape: tuple[int, ...]) -> np.ndarray:
        each = [tensors[f"model.layers.{i}.{name}"] for i in range(c.num_hidden_layers)]
        return np.stack([(w.T if w.ndim == 2 else w).reshape(shape) for w in each])

    def pad(table: np.ndarray) -> np.ndarray:
        return np.concatenate([table, np.zeros((-len(table) % 128, table.shape[1]), table.dtype)])

    d, n, k, h, f = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.intermediate_size
    out = {
        "embed/embedding": pad(tensors["model.embed_tokens.weight"]),
        "final_norm/scale": tensors["model.norm.weight"],
        "layers/attn_norm/scale": stack("input_layernorm.weight", (d,)),
        "layers/mlp_norm/scale": stack("post_attention_layernorm.weight", (d,)),
        "layers/attn/o/kernel": stack("self_attn.o_proj.weight", (n, h, d)),
        "layers/mlp/down/kernel": stack("mlp.down_proj.weight", (f, d)),
    }
    for ours, heads in (("q", n), ("k", k), ("v", k)):
        out[f"layers/attn/{ours}/kernel"] = stack(f"self_attn.{ours}_proj.weight", (d, heads, h))
        if c.attention_bias:
            out[f"layers/attn/{ours}/bias"] = stack(f"self_attn.{ours}_proj.bias", (heads, h))
    for ours in ("gate", "up"):
        out[f"layers/mlp/{ours}/kernel"] = stack(f"mlp.{ours}_proj.weight", (d, f))
        if c.mlp_bias:
            out[f"layers/mlp/{ours}/bias"] = stack(f"mlp.{ours}_proj.bias", (f,))
    if c.attention_bias:
        out["layers/attn/o/bias"] = stack("self_attn.o_proj.bias", (d,))
    if c.mlp_bias:
        out["layers/mlp/down/bias"] = stack("mlp.down_proj.bias", (d,))
    if not c.tie_word_embeddings:
        out["lm_head/kernel"] = pad(tensors["lm_head.weight"])
    return out


def edit(tmp_path: Path, fixture: str, change_tensors=None, **config) -> Path:
    """A copy of a fixture with some tensors or config keys changed."""
    directory = tmp_path / "model"
    shutil.copytree(FIXTURES / fixture, directory)
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**raw, **config}))
    if change_tensors is not None:
        tensors = safetensors.numpy.load_file(directory / "model.safetensors")
        safetensors.numpy.save_file(change_tensors(tensors), directory / "model.safetensors")
    return directory


def load(directory: Path, sharding=None, dtype=jnp.float32) -> tuple[dict, DecoderConfig, dict]:
    config, raw = load_config(directory)
    return load_params(directory, config, abstract_params(config, sharding or one_device(), dtype)), config, raw


def export_hf(params: dict, config: DecoderConfig, directory: Path, **options) -> Path:
    hf.export_hf(params, config, directory, **options)
    return directory


def assert_same_tensors(ours: Path, theirs: Path) -> None:
    def everything(directory: Path) -> dict[str, np.ndarray]:
        files = sorted(directory.glob("*.safetensors"))
        return {name: array for file in files for name, array in safetensors.numpy.load_file(file).items()}

    got, want = everything(ours), everything(theirs)
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert got[name].dtype == array.dtype, name
        assert got[name].tobytes() == array.tobytes(), name


# ---- Loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fixture", ["tied", "biases", "yarn"])
@pytest.mark.parametrize("where", ["one device", "split", "whole"])
def test_load_gives_every_device_its_part(fixture, where):
    whole = NamedSharding(mesh_4x2(), PartitionSpec())
    sharding = {"one device": one_device(), "split": split_everywhere, "whole": whole}[where]
    params, config, _ = load(FIXTURES / fixture, sharding)
    want = reference_params(FIXTURES / fixture, config)
    got = flatten(params)
    assert got.keys() == want.keys()
    for path, array in got.items():
        assert array.dtype == jnp.float32
        assert array.sharding.is_equivalent_to(
            sharding(path, array.shape) if where == "split" else sharding, array.ndim
        )
        np.testing.assert_array_equal(np.asarray(array), want[path].astype(np.float32), err_msg=path)


def test_split_fixture_does_split_heads_and_padding():
    params, _, _ = load(FIXTURES / "biases", split_everywhere)
    q = params["layers"]["attn"]["q"]["kernel"]
    assert q.addressable_shards[0].data.shape == (2, 32, 1, 8)
    embedding = params["embed"]["embedding"]
    assert embedding.shape == (256, 32) and embedding.addressable_shards[0].data.shape == (64, 16)


def test_load_casts_to_the_asked_dtype():
    params, config, _ = load(FIXTURES / "tied", dtype=jnp.bfloat16)
    want = reference_params(FIXTURES / "tied", config)["layers/mlp/up/kernel"]
    got = params["layers"]["mlp"]["up"]["kernel"]
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(got), want.astype(ml_dtypes.bfloat16))


def test_each_part_is_read_once_and_nothing_else(monkeypatch):
    read = CheckpointReader.read
    elements: dict[str, int] = {}

    def counting(self, name, ranges):
        values = read(self, name, ranges)
        elements[name] = elements.get(name, 0) + values.size
        return values

    monkeypatch.setattr(CheckpointReader, "read", counting)
    tensors = safetensors.numpy.load_file(FIXTURES / "tied" / "model.safetensors")
    sizes = {name: array.size for name, array in tensors.items()}

    def rows(path, shape):  # two of eight devices hold each quarter
        return NamedSharding(mesh_4x2(), PartitionSpec(*([None] * (len(shape) - 1)), "fsdp"))

    load(FIXTURES / "tied", rows)
    # Quarters of a head's dims: all rows of those heads are read, one head at a time is the smallest unit.
    heads = {name for name in sizes if any(f"{p}_proj" in name for p in "qkv")}
    assert {n: c for n, c in elements.items() if n not in heads} == {n: c for n, c in sizes.items() if n not in heads}
    elements.clear()
    load(FIXTURES / "tied", NamedSharding(mesh_4x2(), PartitionSpec()))
    assert elements == sizes


def test_loaded_copies_are_separate_buffers():
    """Donating one device's copy must not reach another's, though all were made from one host array."""
    params, _, _ = load(FIXTURES / "tied", NamedSharding(mesh_4x2(), PartitionSpec()))
    embedding = params["embed"]["embedding"]
    before = np.array(embedding)
    after = jax.jit(lambda x: x + jnp.float32(1), donate_argnums=0)(embedding)
    for shard in after.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), before + np.float32(1))


def test_shards_of_an_index_are_read(tmp_path):
    source = FIXTURES / "biases"
    tensors = safetensors.numpy.load_file(source / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    shutil.copy(source / "config.json", tmp_path)
    for file, members in parts.items():
        safetensors.numpy.save_file({n: tensors[n] for n in members}, tmp_path / file)
    weight_map = {n: file for file, members in parts.items() for n in members}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    got, config, _ = load(tmp_path)
    want = reference_params(source, config)
    for path, array in flatten(got).items():
        np.testing.assert_array_equal(np.asarray(array), want[path])
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(UserErrors, match=r"b\.safetensors: named in model\.safetensors\.index\.json"):
        load(tmp_path)


def test_headless_names_buffers_and_a_stored_tied_head_are_accepted(tmp_path):
    def change(tensors):
        plain = {name.removeprefix("model."): array for name, array in tensors.items()}
        buffers = {f"layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(6, np.float32) for i in range(3)}
        return {**plain, **buffers, "lm_head.weight": plain["embed_tokens.weight"].copy()}

    params, config, _ = load(edit(tmp_path, "tied", change))
    want = reference_params(FIXTURES / "tied", config)
    for path, array in flatten(params).items():
        np.testing.assert_array_equal(np.asarray(array), want[path])


def test_tied_model_with_another_head_is_refused(tmp_path):
    def change(tensors):
        head = tensors["model.embed_tokens.weight"].copy()
        head[-1, -1] += 1
        return {**tensors, "lm_head.weight": head}

    with pytest.raises(UserErrors, match=r"lm_head\.weight: differs from .*tie_word_embeddings: true"):
        load(edit(tmp_path, "tied", change))


def test_tensor_problems_are_listed_together_by_name(tmp_path):
    def change(tensors):
        del tensors["model.layers.1.self_attn.k_proj.weight"], tensors["lm_head.weight"]
        tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((48, 31), np.float32)
        tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((48, 32), np.float32)
        tensors["model.norm.weight"] = np.zeros(32, np.int8)
        return tensors

    with pytest.raises(UserErrors) as caught:
        load(edit(tmp_path, "biases", change))
    problems = [p.removeprefix(f"{tmp_path / 'model'}: ") for p in caught.value.problems]
    assert sorted(problems) == [
        "lm_head.weight: missing; shape [140, 32] is needed",
        "model.layers.0.mlp.up_proj.weight: shape [48, 31]; [48, 32] is needed",
        "model.layers.1.self_attn.k_proj.weight: missing; shape [32, 32] is needed",
        "model.layers.2.mlp.up_proj.weight: extra; this model has no such tensor",
        "model.norm.weight: dtype I8 is not served; served: F32, BF16, F16, F64",
    ]


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_files_are_named(tmp_path, keep):
    directory = edit(tmp_path, "tied")
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors: not a whole safetensors file"):
        load(directory)


def test_abstract_of_another_config_is_a_programming_error():
    config, _ = load_config(FIXTURES / "tied")
    other, _ = load_config(FIXTURES / "biases")
    with pytest.raises(ValueError, match="abstract"):
        load_params(FIXTURES / "tied", config, abstract_params(other, one_device()))


# ---- Finding models --------------------------------------------------------------------------------------------------


def test_directories_are_resolved_as_they_are():
    assert resolve_model(FIXTURES / "tied") == FIXTURES / "tied"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["pytorch_model.bin", "config.json"], r"only pytorch_model\.bin: pickled weights"),
        (["q.gguf"], r"posttrain import .*q\.gguf OUT_DIR"),
        (["adapter_config.json", "adapter_model.safetensors"], "an adapter without its model"),
        (["config.json"], r"no model\.safetensors or model\.safetensors\.index\.json; it holds: config\.json"),
        ([], "it holds: nothing"),
    ],
)
def test_directories_without_safetensors_are_refused(tmp_path, files, message):
    for file in files:
        (tmp_path / file).write_text("{}")
    with pytest.raises(UserError, match=message):
        resolve_model(tmp_path)


def test_files_and_names_of_nothing_are_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="is a file; name the directory"):
        resolve_model(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"posttrain import some/model\.gguf model"):
        resolve_model("some/model.gguf")
    with pytest.raises(UserError, match=r"gs://bucket/model: .* copy the directory there first"):
        resolve_model("gs://bucket/model")
    with pytest.raises(UserError, match="no such directory, and not a hub id"):
        resolve_model(tmp_path / "absent")


def test_hub_ids_fetch_only_what_is_read(monkeypatch):
    asked = {}

    def snapshot_download(repo_id, *, revision, allow_patterns):
        asked.update(repo_id=repo_id, revision=revision, allow_patterns=allow_patterns)
        return str(FIXTURES / "tied")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve_model("someone/model", "v1") == FIXTURES / "tied"
    assert asked["repo_id"] == "someone/model" and asked["revision"] == "v1"
    fetched = {"*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"}
    assert set(asked["allow_patterns"]) == fetched


def test_unreachable_hub_ids_say_what_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="runs/absent: no such directory here, and it could not be had as a hub model"):
        resolve_model("runs/absent")


def test_a_family_is_registered_by_dropping_its_file_in(tmp_path, monkeypatch):
    family = '"""A family."""\nfrom posttrain.models.llama import *\n\nMODEL_TYPES = ("toy", "toy2")\n'
    (tmp_path / "toy_family.py").write_text(family)
    (tmp_path / "no_family.py").write_text("raise AssertionError('imported, though no family')\n")
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])
    assert find_family("toy2").MODEL_TYPES == ("toy", "toy2")
    assert find_family("llama") is llama
    with pytest.raises(UserError, match=r"model_type: 'gpt5' is not served; served: .*llama.*, toy, toy2"):
        find_family("gpt5")
    sys.modules.pop("posttrain.models.toy_family", None)


# ---- Configs ---------------------------------------------------------------------------------------------------------

ROPES = {
    "tied": RopeConfig(theta=10000.0),
    "biases": RopeConfig(theta=10000.0),
    "linear": RopeConfig(theta=500.0, scaling="linear", factor=4.0),
    "dynamic": RopeConfig(theta=500.0, scaling="dynamic", factor=4.0),
    "llama3": RopeConfig(
        theta=500.0,
        scaling="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=32,
    ),
    "yarn": RopeConfig(theta=500.0, scaling="yarn", factor=4.0, original_max_position_embeddings=32),
    "yarn_mscale": RopeConfig(
        theta=500.0,
        scaling="yarn",
        factor=4.0,
        beta_fast=4.0,
        beta_slow=0.5,
        mscale=1.5,
        mscale_all_dim=0.5,
        original_max_position_embeddings=32,
    ),
    "yarn_attention_factor": RopeConfig(
        theta=500.0,
        scaling="yarn",
        factor=4.0,
        attention_factor=0.8,
        beta_fast=2.0,
        truncate=False,
        original_max_position_embeddings=32,
    ),
}


@pytest.mark.parametrize("fixture", sorted(ROPES))
def test_rotary_fields_of_both_transformers_versions(fixture):
    assert load_config(FIXTURES / fixture)[0].rope == ROPES[fixture]


def test_plain_fields_and_defaults():
    config, raw = load_config(FIXTURES / "biases")
    assert raw == json.loads((FIXTURES / "biases" / "config.json").read_text())
    assert config == DecoderConfig(
        vocab_size=140,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-6,
        ropes=(RopeConfig(theta=10000.0),),
        max_position_embeddings=128,
        attention_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
    )
    # What an absent key means is what transformers' LlamaConfig makes of it.
    needed = {k: raw[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    sparse = llama.config_from_hf({**needed, "num_attention_heads": 4})
    default = transformers.LlamaConfig(**needed, num_attention_heads=4)
    for name in ("num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "hidden_act"):
        assert getattr(sparse, name) == getattr(default, name)
    for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        assert getattr(sparse, name) == getattr(default, name)
    assert sparse.rope == RopeConfig(theta=default.rope_parameters["rope_theta"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size: missing"),
        ({"hidden_size": "32"}, "hidden_size: '32' must be of type int"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: 0 must be at least 1"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3 must divide num_attention_heads: 4"),
        ({"head_dim": 15}, "head_dim: 15 must be even"),
        ({"head_dim": None, "hidden_size": 34}, "num_attention_heads: 4 must divide hidden_size: 34, or give head_dim"),
        ({"hidden_act": "mish"}, "hidden_act: 'mish' is not served; served: silu"),
        ({"attention_bias": 1}, "attention_bias: 1 must be of type bool"),
        ({"attention_dropout": 0.1}, "attention_dropout: 0.1 is not served; served: 0"),
        ({"rms_norm_eps": -1}, "rms_norm_eps: -1.0 must be above 0"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: .*is not served; served: null"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: nan must be finite"),
        (
            {"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 512}},
            "max_position_embeddings: 128 is below original_max_position_embeddings: 512",
        ),
        ({"sliding_window": 512}, "sliding_window: 512 is not served"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5 is not served"),
        (
            {"architectures": ["LlamaForTokenClassification"]},
            "architectures: .*served: LlamaForCausalLM, LlamaModel",
        ),
        ({"rope_theta": 5.0}, "rope_theta: 5.0 contradicts rope_parameters.rope_theta: 10000.0"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.type: 'linear' contradicts"),
        ({"rope_parameters": [1]}, "rope_parameters: .* must be an object or null"),
        ({"rope_parameters": {"rope_type": "mrope"}}, "rope_type: 'mrope' is not served; served: default, linear"),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1] * 8}},
            "rope_parameters.rope_type: 'longrope' needs long_factor",
        ),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1] * 8, "long_factor": [1] * 4}},
            "rope_parameters.long_factor: must be a list of 8 numbers above 0",
        ),
        ({"rope_parameters": {"rope_type": "linear"}}, "'linear' needs factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, "factor: 0.5 must be at least 1"),
        ({"rope_parameters": {"rope_type": "linear", "factor": True}}, "factor: True must be of type float"),
        ({"rope_parameters": {"rope_type": "default", "factor": 2}}, "2: factor is no field of 'default' scaling"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta: 0.0 must be above 0"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
            "high_freq_factor: 4.0 must be above low_freq_factor: 4.0",
        ),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters.full_attention"),
    ],
)
def test_config_problems_name_key_value_and_what_is_served(tmp_path, change, message):
    directory = edit(tmp_path, "biases", **change)
    with pytest.raises(UserErrors, match=message) as caught:
        load_config(directory)
    assert all(p.startswith(f"{directory / 'config.json'}: ") for p in caught.value.problems)
    assert len(caught.value.problems) == 1


def test_all_config_problems_are_reported_at_once(tmp_path):
    directory = edit(tmp_path, "biases", hidden_act="mish", mlp_bias="yes", sliding_window=4, vocab_size=None)
    with pytest.raises(UserErrors) as caught:
        load_config(directory)
    assert len(caught.value.problems) == 4


def test_config_files_that_are_none(tmp_path):
    with pytest.raises(UserError, match=r"config\.json: missing"):
        load_config(tmp_path)
    for text, message in (("{", "not JSON"), ("[]", "must be a JSON object, is a list")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match=r"config\.json: model_type: 'bert' is not served; served: .*llama.*\w$"):
        load_config(tmp_path)
    new = {"model_type": "deepseek_v9", "kv_lora_rank": 512, "n_shared_experts": 1, "alibi": False}
    (tmp_path / "config.json").write_text(json.dumps({**new, "layer_types": ["full_attention", "delta"]}))
    needs = r"multi-head latent attention \(kv_lora_rank\), shared experts \(n_shared_experts\), layers of type delta"
    with pytest.raises(UserError, match=rf"'deepseek_v9' is not served; .*would need beyond the decoder: {needs}"):
        load_config(tmp_path)


@pytest.mark.parametrize("fixture", sorted(ROPES))
def test_exported_config_means_the_same_in_every_version(fixture):
    config, raw = load_config(FIXTURES / fixture)
    written = llama.config_to_hf(config, raw)
    assert {key: written[key] for key in raw} == raw
    assert llama.config_from_hf(written) == config
    # transformers 5 reads the joint form as it reads the original ...
    loaded, original = (transformers.LlamaConfig(**json.loads(json.dumps(c))) for c in (written, raw))
    assert loaded.rope_parameters.items() >= {k: v for k, v in original.rope_parameters.items() if v}.items()
    # ... and 4 finds theta and scaling where it looks for them.
    assert written["rope_theta"] == config.rope.theta
    assert (written["rope_scaling"] is None) == (config.rope.scaling == "none")
    assert llama.config_from_hf(llama.config_to_hf(config, None)) == config


def test_changed_fields_replace_the_originals():
    config, raw = load_config(FIXTURES / "llama3")
    changed = DecoderConfig(**{**vars(config), "vocab_size": 150, "ropes": (RopeConfig(theta=7.0),)})
    written = llama.config_to_hf(changed, raw)
    assert llama.config_from_hf(written) == changed
    assert {k: v for k, v in raw.items() if written.get(k) != v}.keys() == {"vocab_size", "rope_parameters"}


# ---- Export ----------------------------------------------------------------------------------------------------------


def as_bfloat16(tensors):
    return {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors.items()}


@pytest.mark.parametrize("where", ["one device", "split"])
@pytest.mark.parametrize(
    ("fixture", "change", "config"),
    [
        ("tied", None, {}),
        ("biases", None, {}),
        ("biases", as_bfloat16, {"dtype": "bfloat16"}),
        ("yarn", None, {}),
        ("tied", lambda t: {n: a.astype(np.float16) for n, a in t.items()}, {"torch_dtype": "float16"}),
    ],
)
def test_weights_go_round_byte_equal(tmp_path, fixture, change, config, where):
    source = edit(tmp_path, fixture, change, **config)
    params, decoder, raw = load(source, one_device() if where == "one device" else split_everywhere)
    out = export_hf(params, decoder, tmp_path / "out", raw_config=raw)
    assert_same_tensors(out, source)
    with safetensors.safe_open(out / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    written = json.loads((out / "config.json").read_text())
    assert {k: written[k] for k in raw} == raw
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


def test_export_in_shards_and_back(tmp_path):
    params, config, raw = load(FIXTURES / "biases", split_everywhere)
    out = export_hf(params, config, tmp_path / "out", raw_config=raw, max_shard_bytes=20_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in out.glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert set(index["weight_map"].values()) == set(files)
    tensors = safetensors.numpy.load_file(FIXTURES / "biases" / "model.safetensors")
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())
    for file in files:
        held = safetensors.numpy.load_file(out / file)
        assert sum(array.nbytes for array in held.values()) <= 20_000 or len(held) == 1
        assert all(index["weight_map"][name] == file for name in held)
    assert_same_tensors(out, FIXTURES / "biases")
    again, _, _ = load(out)
    for path, array in flatten(again).items():
        np.testing.assert_array_equal(np.asarray(array), np.asarray(flatten(params)[path]))


def test_export_dtype_is_written_and_recorded(tmp_path):
    params, config, raw = load(FIXTURES / "tied")
    out = export_hf(params, config, tmp_path / "out", raw_config=raw, dtype="bfloat16")
    tensors = safetensors.numpy.load_file(FIXTURES / "tied" / "model.safetensors")
    got = safetensors.numpy.load_file(out / "model.safetensors")
    for name, array in tensors.items():
        np.testing.assert_array_equal(got[name], array.astype(ml_dtypes.bfloat16))
    assert json.loads((out / "config.json").read_text()) == {**raw, "torch_dtype": "bfloat16"}
    with pytest.raises(UserError, match="export dtype: 'int8' is not served; served: original, float32"):
        export_hf(params, config, tmp_path / "other", raw_config=raw, dtype="int8")


def test_values_beyond_float16_are_refused_and_nothing_stays(tmp_path):
    params, config, raw = load(FIXTURES / "tied")
    params["final_norm"]["scale"] = params["final_norm"]["scale"].at[3].set(1e5)
    with pytest.raises(UserError, match=r"model\.norm\.weight: values beyond the range of float16"):
        export_hf(params, config, tmp_path / "out", raw_config=raw, dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_over(tmp_path):
    params, config, raw = load(FIXTURES / "tied")
    kept = tmp_path / "out" / "kept.txt"
    kept.parent.mkdir()
    export_hf(params, config, tmp_path / "out", raw_config=raw)  # empty: taken
    with pytest.raises(UserError, match="exists and is not empty"):
        export_hf(params, config, tmp_path / "out", raw_config=raw)
    kept.write_text("kept")
    with pytest.raises(UserError, match="exists and is a file"):
        export_hf(params, config, kept, raw_config=raw)
    assert kept.read_text() == "kept"


class Bucket(MemoryFileSystem):
    """An object store in memory, under the name of a real one."""

    protocol = ("s3",)
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.removeprefix("s3://"))


def test_export_to_an_object_store(tmp_path, monkeypatch):
    bucket = Bucket()
    monkeypatch.setattr(type(epath.backend.fsspec_backend), "fs", lambda self, path: bucket)
    params, config, raw = load(FIXTURES / "tied")
    hf.export_hf(params, config, "s3://bucket/runs/out", raw_config=raw, max_shard_bytes=50_000)
    bucket.get("s3://bucket/runs/out/", str(tmp_path / "copy"), recursive=True)
    assert_same_tensors(tmp_path / "copy", FIXTURES / "tied")
    assert load_config(tmp_path / "copy")[0] == config
    with pytest.raises(UserError, match=r"s3://bucket/runs/out: exists and is not empty"):
        hf.export_hf(params, config, "s3://bucket/runs/out", raw_config=raw)
    params["final_norm"]["scale"] = params["final_norm"]["scale"].at[3].set(1e5)
    with pytest.raises(UserError, match="beyond the range of float16"):
        hf.export_hf(params, config, "s3://bucket/runs/failed", raw_config=raw, dtype="float16")
    assert bucket.ls("s3://bucket/runs", detail=False) == ["/bucket/runs/out"]


def tiny_tokenizer(directory: Path) -> Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    backend.add_special_tokens(["<eos>", "<turn>"])
    directory.mkdir()
    backend.save(str(directory / "tokenizer.json"))
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(fields))
    (directory / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    return Tokenizer.load(str(directory))


def test_tokenizer_and_generation_config_travel_along(tmp_path):
    params, config, raw = load(FIXTURES / "tied")
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    out = export_hf(
        params, config, tmp_path / "out", raw_config=raw, tokenizer=tokenizer, generation_config={"top_p": 0.9}
    )
    assert Tokenizer.load(str(out)).encode("abba<turn>") == [2, 1, 0, 4]
    assert load_generation_config(out) == {"top_p": 0.9, "eos_token_id": [3, 4]}
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == [3, 4, 2]  # some stacks read it there
    plain = export_hf(params, config, tmp_path / "plain", raw_config=raw)
    assert json.loads((plain / "config.json").read_text())["eos_token_id"] == 2
    assert load_generation_config(plain) == {"bos_token_id": 1, "eos_token_id": 2}
    both = export_hf(params, config, tmp_path / "both", raw_config=raw, tokenizer=tokenizer)
    assert load_generation_config(both) == {"bos_token_id": 1, "eos_token_id": [3, 4, 2]}
    assert load_generation_config(FIXTURES / "tied") is None


PROCESS = """
    import sys
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    jax.config.update("jax_numpy_dtype_promotion", "strict")
    port, process, source, out, tests = sys.argv[1:]
    jax.distributed.initialize(f"localhost:{port}", 2, int(process), initialization_timeout=60)
    sys.path.insert(0, tests)
    import test_hf
    from posttrain.errors import UserError

    params, config, raw = test_hf.load(source, test_hf.split_everywhere)
    for path, array in test_hf.flatten(params).items():
        assert len(array.sharding.device_set) == 8 and len(array.addressable_shards) == 4, path
    test_hf.export_hf(params, config, out, raw_config=raw, max_shard_bytes=30_000)
    try:
        test_hf.export_hf(params, config, out, raw_config=raw)
    except UserError as error:
        print(f"REFUSED {error}")
    jax.distributed.shutdown()
"""


@pytest.mark.slow
def test_two_processes_load_and_export_together(tmp_path):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    root = Path(__file__).parent.parent.parent
    command = [sys.executable, "-c", textwrap.dedent(PROCESS), str(port)]
    arguments = [str(FIXTURES / "biases"), str(tmp_path / "out"), str(Path(__file__).parent)]
    processes = [
        subprocess.Popen(
            [*command, str(i), *arguments],
            env={**os.environ, **flags, "PYTHONPATH": str(root)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    try:
        outputs = [p.communicate(timeout=100)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [0, 0], "\n".join(outputs)
    assert all("REFUSED" in text for text in outputs), "\n".join(outputs)
    assert_same_tensors(tmp_path / "out", FIXTURES / "biases")
