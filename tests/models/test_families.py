"""Every model family against torch: logits alone, packed, sharded and decoded with a cache; checkpoints and configs out
as they came in.

A folder of `tests/fixtures/families/` (see `make_families.py`) is a family's whole test.
"""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from posttrain.config import MeshConfig
from posttrain.models import hf
from posttrain.models.architecture import DecoderConfig
from posttrain.models.decoder import ComputeOptions, abstract_decoder, init_cache
from posttrain.objectives.logps import batch_stats
from posttrain.parallel.mesh import make_mesh
from posttrain.parallel.sharding import flatten, place, unflatten
from posttrain.records import Batch, Params
from posttrain.rollout.engine import Engine, Request
from posttrain.rollout.sampling import SamplingParams

FIXTURES = Path(__file__).parent.parent / "fixtures" / "families"
NAMES = sorted(p.parent.name for p in FIXTURES.glob("*/expected.npz"))
ATOL = 2e-5
ROW = 72
"""Holds the three sequences of a fixture together, and padding."""
CHUNK = 5
"""Tokens that a cache is extended by at once."""

every_family = pytest.mark.parametrize("name", NAMES)


@functools.cache
def expected(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(FIXTURES / name / "expected.npz"))


def sequences(name: str) -> list[np.ndarray]:
    return [expected(name)[f"ids_{i}"] for i in range(3)]


@functools.cache
def model(name: str) -> tuple[DecoderConfig, Params]:
    config, _ = hf.load_config(FIXTURES / name)
    return config, hf.load_params(FIXTURES / name, config, abstract_decoder(config).shapes)


def batch_of(name: str) -> tuple[Batch, list[tuple[int, int, int]]]:
    """Three rows of one sequence each and one row of all, the shortest first; and where each lies: row, start, i."""
    lengths = [len(ids) for ids in sequences(name)]
    starts = {2: 0, 1: lengths[2], 0: lengths[2] + lengths[1]}
    places = [*((i, 0, i) for i in range(3)), *((3, start, i) for i, start in starts.items())]
    tokens, segment_ids, positions = (np.zeros((4, ROW), np.int32) for _ in range(3))
    for row, start, i in places:
        span = slice(start, start + lengths[i])
        tokens[row, span], segment_ids[row, span] = sequences(name)[i], 3 - i
        positions[row, span] = np.arange(lengths[i])
    return Batch(tokens, segment_ids, positions, np.ones((4, ROW), np.float32)), places


def to_logits(config: DecoderConfig, params: Params, hidden: np.ndarray) -> np.ndarray:
    """In float64, from the definition."""
    head = np.asarray(abstract_decoder(config).merge(params).head(), np.float64)[: config.vocab_size]
    logits = hidden.astype(np.float64) @ head.T
    return logits if config.logit_softcap is None else config.logit_softcap * np.tanh(logits / config.logit_softcap)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def compare(name: str, config: DecoderConfig, params: Params, hidden: np.ndarray) -> None:
    logits = to_logits(config, params, hidden)
    for row, start, i in batch_of(name)[1]:
        want = expected(name)[f"logits_{i}"]
        np.testing.assert_allclose(logits[row, start : start + len(want)], want, rtol=0, atol=ATOL)


def test_there_are_fixtures_of_every_family() -> None:
    served = {"llama", "smollm3", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "gemma3", "mistral"}
    served |= {"mixtral", "olmo2", "phi3"}
    assert {json.loads((FIXTURES / name / "config.json").read_text())["model_type"] for name in NAMES} == served


@every_family
def test_logits_equal_torch_packed_or_not(name: str) -> None:
    config, params = model(name)
    decoder = abstract_decoder(config)
    hidden = jax.jit(lambda params, batch: decoder.merge(params).hidden(batch))(params, batch_of(name)[0])
    compare(name, config, params, np.asarray(hidden))


@every_family
def test_a_mesh_computes_the_same_from_weights_read_by_slices(name: str) -> None:
    config, params = model(name)
    batch, places = batch_of(name)
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    decoder = abstract_decoder(config, options=ComputeOptions("reference"))  # elsewhere: chunked

    def placed(path: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = place(decoder.axes[path], leaf.shape, mesh).sharding
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    shapes = unflatten({path: placed(path, leaf) for path, leaf in flatten(decoder.shapes).items()})
    sharded = hf.load_params(FIXTURES / name, config, shapes)
    for path, leaf in flatten(params).items():
        np.testing.assert_array_equal(flatten(sharded)[path], leaf, err_msg=path)

    @jax.jit
    def run(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        model = decoder.merge(params)
        return model.hidden(batch), batch_stats(model, batch).logps

    with jax.set_mesh(mesh):
        hidden, logps = run(sharded, batch)
    compare(name, config, params, np.asarray(hidden))
    for row, start, i in places:
        ids = sequences(name)[i]
        want = log_softmax(expected(name)[f"logits_{i}"])[np.arange(len(ids) - 1), ids[1:]]
        np.testing.assert_allclose(logps[row, start + 1 : start + len(ids)], want, rtol=0, atol=ATOL)


@every_family
def test_decoding_with_a_cache_equals_torch(name: str) -> None:
    config, params = model(name)
    decoder = abstract_decoder(config)

    @jax.jit
    def extend(params: Params, tokens: jax.Array, positions: jax.Array, cache: object) -> tuple:
        return decoder.merge(params).extend(tokens, positions, None, cache, lengths=lengths)

    lengths = jnp.asarray([len(ids) for ids in sequences(name)])
    tokens = np.zeros((3, ROW), np.int32)
    for i, ids in enumerate(sequences(name)):
        tokens[i, : len(ids)] = ids
    cache, parts = init_cache(config, 3, ROW, jnp.float32), []
    for start in range(0, len(sequences(name)[0]), CHUNK):
        positions = np.broadcast_to(np.arange(start, start + CHUNK, dtype=np.int32), (3, CHUNK))
        hidden, cache = extend(params, tokens[:, start : start + CHUNK], positions, cache)
        parts.append(np.asarray(hidden))
    logits = to_logits(config, params, np.concatenate(parts, axis=1))
    for i in range(3):
        want = expected(name)[f"logits_{i}"]
        np.testing.assert_allclose(logits[i, : len(want)], want, rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "phi4_mini", "qwen3_moe_window", "smollm3_window"])
def test_greedy_continuation_equals_torch(name: str) -> None:
    config, params = model(name)
    prompt, new = expected(name)["greedy_prompt"].tolist(), expected(name)["greedy_new"].tolist()
    engine = Engine(abstract_decoder(config), params, slots=1, max_length=len(prompt) + len(new), stop_ids=())
    [completion] = engine.generate([Request(0, prompt, SamplingParams(len(new)))])
    assert completion.token_ids.tolist() == new


@every_family
def test_a_checkpoint_goes_out_as_it_came_in(name: str, tmp_path: Path) -> None:
    config, params = model(name)
    raw = json.loads((FIXTURES / name / "config.json").read_text())
    hf.export_hf(params, config, tmp_path / "out", raw_config=raw)
    before = safetensors.numpy.load_file(FIXTURES / name / "model.safetensors")
    after = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    if raw["model_type"] == "gemma3":  # its text part goes out, as a model of its own
        text = {key: value for key, value in before.items() if key.startswith("language_model.")}
        before = {key.removeprefix("language_model."): value for key, value in text.items()}
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert (after[key].dtype, after[key].shape) == (value.dtype, value.shape), key
        assert after[key].tobytes() == value.tobytes(), key
    assert hf.load_config(tmp_path / "out")[0] == config


@every_family
def test_an_exported_config_keeps_what_it_said(name: str) -> None:
    raw = json.loads((FIXTURES / name / "config.json").read_text())
    config, _ = hf.load_config(FIXTURES / name)
    family = hf.find_family(raw["model_type"])
    written = family.config_to_hf(config, raw)
    if raw["model_type"] != "gemma3":
        assert {key: written[key] for key in raw} == raw
    grown = dataclasses.replace(config, vocab_size=config.vocab_size + 27)
    assert family.config_to_hf(grown, raw) == {**written, "vocab_size": grown.vocab_size}
    assert family.config_from_hf(family.config_to_hf(grown, raw)) == grown


@every_family
def test_a_config_without_an_original_reads_back_equal(name: str) -> None:
    config, raw = hf.load_config(FIXTURES / name)
    family = hf.find_family(raw["model_type"])
    assert family.config_from_hf(family.config_to_hf(config, None)) == config
