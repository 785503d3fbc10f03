"""The laws of generation, on a tiny random decoder: cache equals full forward, company does not matter, exact ends."""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.config import MeshConfig
from posttrain.errors import UserError
from posttrain.models import hf
from posttrain.models.decoder import ComputeOptions, DecoderConfig, abstract_decoder, init_params
from posttrain.models.rope import RopeConfig
from posttrain.objectives.logps import token_stats
from posttrain.parallel.mesh import make_mesh, single_device_mesh
from posttrain.parallel.sharding import flatten, place, unflatten
from posttrain.records import Batch, Params
from posttrain.rollout.engine import BUCKETS, Completion, Engine, Request, cut, groups
from posttrain.rollout.sampling import RowSampling, SamplingParams, sample
from posttrain.rollout.slots import Chunks, SlotPrograms

LLAMA3 = RopeConfig(1000.0, "llama3", 4.0, 64, 1.0, 4.0)
SMALL = DecoderConfig(90, 32, 48, 3, 4, 2, 8, ropes=(LLAMA3,), max_position_embeddings=256)
DECODER = abstract_decoder(SMALL, options=ComputeOptions("reference"))


def parameters(config: DecoderConfig = SMALL, seed: int = 0) -> Params:
    """Large enough weights that the layers, not the embedding, decide."""
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(seed))
    return jax.tree.map(lambda p: p * 8 if p.ndim > 2 else p, params)


PARAMS = parameters()


def requests(count: int, *, longest: int = 33, seed: int = 0) -> list[Request]:
    """Prompts of many lengths; every second request is sampled, each in its own way."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        prompt = rng.integers(0, SMALL.vocab_size, int(rng.integers(1, longest))).tolist()
        how = {"temperature": 0.5 + i / 10, "top_k": (0, 20)[i % 3 == 0], "top_p": (1.0, 0.9)[i % 4 == 1], "seed": 3}
        new = int(rng.integers(1, 24))
        made.append(Request(i, prompt, SamplingParams(new, **(how if i % 2 else {}))))
    return made


@functools.cache
def engine(slots: int, **options: object) -> Engine:
    """One engine for all tests that ask for the same: its programs are compiled once."""
    return Engine(DECODER, PARAMS, **{"slots": slots, "max_length": 96, "stop_ids": (7, 8), **options})


def by_id(completions: Iterator[Completion]) -> dict[int, Completion]:
    found = list(completions)
    assert len({c.id for c in found}) == len(found)
    return {c.id: c for c in found}


def assert_same(a: dict[int, Completion], b: dict[int, Completion], atol: float = 2e-6) -> None:
    assert a.keys() == b.keys()
    for i in a:
        assert a[i].token_ids.tolist() == b[i].token_ids.tolist()
        assert a[i].finish_reason == b[i].finish_reason
        np.testing.assert_allclose(a[i].logprobs, b[i].logprobs, atol=atol)
        np.testing.assert_allclose(a[i].sampled_logprobs, b[i].sampled_logprobs, atol=2 * atol)


@jax.jit
def full_hidden(params: Params, tokens: jax.Array, length: jax.Array) -> jax.Array:
    index = jnp.arange(tokens.shape[1])[None]
    segments = (index < length).astype(jnp.int32)
    batch = Batch(tokens, segments, index, jnp.zeros(tokens.shape, jnp.float32))
    return DECODER.merge(params).hidden(batch)[0]


def full_forward(tokens: Sequence[int]) -> np.ndarray:
    """Log-probs f64 `[T, V]` of what follows each token, by the forward pass that training uses, without a cache."""
    padded = np.zeros((1, 96), np.int32)
    padded[0, : len(tokens)] = tokens
    hidden = np.asarray(full_hidden(PARAMS, padded, len(tokens)), np.float64)[: len(tokens)]
    logits = hidden @ np.asarray(DECODER.merge(PARAMS).head(), np.float64)[: SMALL.vocab_size].T
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_cached_generation_equals_the_full_forward() -> None:
    asked = requests(10)
    found = by_id(engine(4, stop_ids=()).generate(asked))
    for request in asked:
        answer = found[request.id]
        tokens = [*request.prompt, *answer.token_ids.tolist()]
        expected = full_forward(tokens)[len(request.prompt) - 1 : -1]
        np.testing.assert_allclose(
            answer.logprobs, np.take_along_axis(expected, answer.token_ids[:, None], 1)[:, 0], atol=1e-5
        )
        assert len(answer.token_ids) == request.sampling.max_new_tokens
        if request.sampling.temperature == 0:
            assert answer.token_ids.tolist() == expected.argmax(-1).tolist()
            assert not answer.sampled_logprobs.any()
        elif request.sampling.top_k == 0 and request.sampling.top_p == 1:
            tempered = expected / request.sampling.temperature
            tempered -= np.log(np.exp(tempered).sum(-1, keepdims=True))
            chosen = np.take_along_axis(tempered, answer.token_ids[:, None], 1)[:, 0]
            np.testing.assert_allclose(answer.sampled_logprobs, chosen, atol=2e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampler_and_trainer_agree_on_log_probs(temperature: float) -> None:
    """What a policy loss recomputes for sampled tokens is what the sampler said of them."""
    rng = np.random.default_rng(8)
    how = SamplingParams(20, temperature)
    asked = [Request(i, rng.integers(0, 90, n).tolist(), how) for i, n in enumerate((3, 17, 30))]
    found = by_id(engine(3, stop_ids=()).generate(asked))
    for request in asked:
        answer = found[request.id]
        tokens, length = np.zeros((1, 96), np.int32), len(request.prompt) + 20
        tokens[0, :length] = [*request.prompt, *answer.token_ids]
        segments = (np.arange(96)[None] < length).astype(np.int32)
        stats = token_stats(
            full_hidden(PARAMS, tokens, length)[None],
            DECODER.merge(PARAMS).head(),
            jnp.asarray(tokens),
            jnp.asarray(segments),
            vocab_size=90,
            temperature=temperature,
        )
        recomputed = np.asarray(stats.logps)[0, len(request.prompt) : length]
        np.testing.assert_allclose(answer.sampled_logprobs, recomputed, atol=1e-5)


def test_prompts_in_several_pieces_equal_the_full_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces and windows as long prompts have them, at small sizes."""
    monkeypatch.setattr("posttrain.rollout.engine.BUCKETS", (4, 8))
    monkeypatch.setattr("posttrain.rollout.engine.SMALLEST_WINDOW", 8)
    rng = np.random.default_rng(5)
    asked = [Request(i, rng.integers(0, 90, n).tolist(), SamplingParams(9)) for i, n in enumerate((1, 8, 9, 21, 32))]
    found = by_id(engine(3, stop_ids=(), max_length=45).generate(asked))
    for request in asked:
        tokens = [*request.prompt, *found[request.id].token_ids.tolist()]
        expected = full_forward(tokens)[len(request.prompt) - 1 : -1]
        assert found[request.id].token_ids.tolist() == expected.argmax(-1).tolist()
        np.testing.assert_allclose(found[request.id].logprobs, expected.max(-1), atol=1e-5)


def test_a_completion_does_not_depend_on_slots_order_or_company() -> None:
    asked = requests(14)
    reference = by_id(engine(8).generate(asked))
    assert {c.finish_reason for c in reference.values()} == {"stop", "length"}
    order = np.random.default_rng(2).permutation(len(asked))
    assert_same(by_id(engine(3).generate([asked[i] for i in order])), reference)
    one = engine(1, steps=5)
    assert_same(by_id(one.generate(asked[::-1])), reference)
    for request in asked[:4]:
        assert_same(by_id(one.generate([request])), {request.id: reference[request.id]})


def test_sampling_differs_by_seed_and_id() -> None:
    how = SamplingParams(12, temperature=1.5, seed=1)
    other = SamplingParams(12, temperature=1.5, seed=2)
    prompt = [3, 5, 9]
    small = engine(3, stop_ids=())
    found = by_id(small.generate([Request(0, prompt, how), Request(1, prompt, how), Request(2, prompt, other)]))
    again = by_id(small.generate([Request(0, prompt, how)]))
    assert again[0].token_ids.tolist() == found[0].token_ids.tolist()
    assert len({tuple(c.token_ids.tolist()) for c in found.values()}) == 3


def test_each_token_is_drawn_by_its_own_position() -> None:
    """With a head of zeros every token is equally likely, so the draws show their random numbers."""
    flat = PARAMS | {"lm_head": {"kernel": jnp.zeros_like(PARAMS["lm_head"]["kernel"])}}
    how = SamplingParams(20, temperature=1.0, seed=6)
    prompt = [1, 2, 3]
    found = next(Engine(DECODER, flat, slots=2, max_length=96, stop_ids=()).generate([Request(9, prompt, how)]))
    at = np.arange(len(prompt), len(prompt) + 20, dtype=np.int32)
    expected = sample(jnp.zeros((20, 90)), RowSampling.stack([how] * 20, [9] * 20), jnp.asarray(at), vocab_size=90)
    assert found.token_ids.tolist() == expected.tokens.tolist()
    np.testing.assert_allclose(found.sampled_logprobs, -np.log(90), atol=1e-6)


def test_a_slot_is_free_on_the_device_when_its_sequence_ends() -> None:
    first = next(engine(1, stop_ids=()).generate([Request(0, [11, 12, 13], SamplingParams(1))])).token_ids[0]
    for stop_ids, allowed, remaining in (((), 5, 4), ((), 1, 0), ((int(first),), 5, 0)):
        programs = SlotPrograms(
            DECODER, count=2, length=96, steps=4, stop_ids=stop_ids, dtype=jnp.float32, mesh=single_device_mesh()
        )
        tokens = np.zeros((1, 32), np.int32)
        tokens[0, :3] = 11, 12, 13
        numbers = [np.asarray([n], np.int32) for n in (0, 3, 1, allowed)]
        starts, counts, slots, allowed_array = numbers
        sampling = RowSampling.stack([SamplingParams()], [0])
        chunks = Chunks(tokens, starts, counts, counts, slots, np.asarray([True]), allowed_array, sampling)
        state, drawn = programs.prefill(PARAMS, programs.fresh(), chunks, window=96)
        assert drawn.tokens.tolist() == [first]
        assert state.remaining.tolist() == [0, remaining]
        assert (state.tokens[1], state.positions[1]) == (first, 3)


def test_stop_tokens_end_a_completion_and_belong_to_it() -> None:
    prompt = [11, 12, 13, 14]
    free = next(engine(1, stop_ids=()).generate([Request(0, prompt, SamplingParams(20, 1.0))]))
    tokens = free.token_ids.tolist()
    at = next(i for i, token in enumerate(tokens) if i >= 3 and token not in tokens[:i])
    unseen = next(i for i in range(90) if i not in tokens)
    stopping = engine(2, stop_ids=(unseen, tokens[at]))

    def complete(limit: int) -> Completion:
        return next(stopping.generate([Request(0, prompt, SamplingParams(limit, 1.0))]))

    for limit in (at + 1, at + 2, 20):  # at the limit itself it still counts as stopped
        found = complete(limit)
        assert found.token_ids.tolist() == tokens[: at + 1]
        assert found.finish_reason == "stop"
        np.testing.assert_allclose(found.logprobs, free.logprobs[: at + 1], atol=2e-6)
    cut_short = complete(at)
    assert cut_short.token_ids.tolist() == tokens[:at]
    assert cut_short.finish_reason == "length"
    first = next(engine(2, stop_ids=(tokens[0],)).generate([Request(0, prompt, SamplingParams(20, 1.0))]))
    assert (first.token_ids.tolist(), first.finish_reason) == (tokens[:1], "stop")


def test_the_cache_bounds_a_completion() -> None:
    small = engine(2, stop_ids=(), max_length=20)
    found = by_id(small.generate([Request(0, [1] * 19, SamplingParams(50)), Request(1, [1] * 8, SamplingParams(50))]))
    assert [len(found[i].token_ids) for i in (0, 1)] == [1, 12]
    assert [found[i].finish_reason for i in (0, 1)] == ["length", "length"]
    expected = full_forward([1] * 8 + found[1].token_ids.tolist())[7:-1].argmax(-1)
    assert found[1].token_ids.tolist() == expected.tolist()


def test_a_free_slot_is_refilled_while_others_run() -> None:
    """One long request and nine short ones in two slots: the short ones pass through the second slot meanwhile, and
    requests are taken no earlier than a slot and a look ahead need them."""
    taken: list[int] = []

    def incoming() -> Iterator[Request]:
        for i in range(10):
            taken.append(i)
            yield Request(i, [i + 1, 2], SamplingParams(60 if i == 0 else 3))

    ended = []
    for completion in engine(2, stop_ids=()).generate(incoming()):
        ended.append(completion.id)
        assert len(taken) <= len(ended) + 3
    assert ended == [*range(1, 10), 0]


def test_streamed_tokens_add_up() -> None:
    asked = requests(6)
    whole = by_id(engine(2).generate(asked))
    parts: dict[int, list[int]] = {}
    ended: dict[int, str | None] = {}
    for delta in engine(2, steps=2).stream(asked):
        assert ended.get(delta.id) is None
        assert 1 <= len(delta.token_ids) == len(delta.logprobs) == len(delta.sampled_logprobs) <= 2
        parts.setdefault(delta.id, []).extend(delta.token_ids.tolist())
        ended[delta.id] = delta.finish_reason
    assert parts == {i: c.token_ids.tolist() for i, c in whole.items()}
    assert ended == {i: c.finish_reason for i, c in whole.items()}


def test_an_abandoned_stream_leaves_nothing_behind() -> None:
    asked = requests(5)
    small = engine(2)
    expected = by_id(engine(2).generate(asked))
    stream = small.stream(asked)
    next(stream)
    stream.close()
    assert_same(by_id(small.generate(asked)), expected, atol=0)


@pytest.mark.parametrize(
    "sizes",
    [{"data": 8, "fsdp": 1}, {"data": 2, "fsdp": 2, "context": 2}, {"data": 2, "fsdp": 2, "tensor": 2}],
    ids=str,
)
def test_a_mesh_changes_nothing(sizes: dict[str, int]) -> None:
    mesh = make_mesh(MeshConfig(**sizes))
    shapes = flatten(DECODER.shapes)
    placed = {path: place(axes, shapes[path].shape, mesh).sharding for path, axes in DECODER.axes.items()}
    sharded = jax.device_put(PARAMS, unflatten(placed))
    asked = requests(12)
    split = Engine(DECODER, sharded, slots=8, max_length=96, stop_ids=(7, 8), mesh=mesh)
    found = by_id(split.generate(asked))
    assert_same(found, by_id(engine(8).generate(asked)), atol=1e-5)


def test_a_cache_is_split_over_the_mesh() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    programs = SlotPrograms(DECODER, count=8, length=96, steps=4, stop_ids=(), dtype=jnp.float32, mesh=mesh)
    cache = programs.fresh().cache
    assert cache.k.sharding.shard_shape(cache.k.shape) == (3, 2, 96, 1, 8)  # slots over data x fsdp, heads over tensor


def test_new_parameters_are_used() -> None:
    asked = requests(3)
    small = Engine(DECODER, parameters(seed=1), slots=2, max_length=96, stop_ids=(7, 8))
    before = by_id(small.generate(asked))
    small.set_params(PARAMS)
    after = by_id(small.generate(asked))
    assert_same(after, by_id(engine(2).generate(asked)), atol=0)
    assert any(before[i].token_ids.tolist() != after[i].token_ids.tolist() for i in before)


def test_bfloat16_stays_near_float32() -> None:
    """Log-probs of the tokens that bfloat16 chose, by the f32 model; bfloat16 keeps 8 bits."""
    asked = [Request(i, [i + 1] * 5, SamplingParams(8)) for i in range(3)]
    found = by_id(engine(3, dtype=jnp.bfloat16, stop_ids=()).generate(asked))
    for request in asked:
        answer = found[request.id]
        assert answer.logprobs.dtype == np.float32
        expected = full_forward([*request.prompt, *answer.token_ids.tolist()])[4:-1]
        np.testing.assert_allclose(
            answer.logprobs, np.take_along_axis(expected, answer.token_ids[:, None], 1)[:, 0], atol=0.2
        )


@pytest.mark.parametrize("prompt_length", [5, 19, 20, 21, 40])
def test_longrope_beyond_its_original_length_equals_the_full_forward(prompt_length: int) -> None:
    """Tokens up to the 20th are drawn by a short model, those behind it by a long one, whatever the prompt was."""
    rope = RopeConfig(100.0, "longrope", 4.0, 20, short_factor=(1.0, 1.0, 1.5, 2.0), long_factor=(1.0, 3.0, 5.0, 8.0))
    config = DecoderConfig(90, 32, 48, 3, 4, 2, 8, ropes=(rope,), max_position_embeddings=80)
    decoder = abstract_decoder(config)
    prompt = np.random.default_rng(prompt_length).integers(0, 90, prompt_length).tolist()
    sampling = SamplingParams(temperature=1.0, max_new_tokens=25)
    requests = [Request(7, prompt, sampling), Request(8, [3, 1], SamplingParams(max_new_tokens=9))]
    found = {c.id: c for c in Engine(decoder, PARAMS, slots=2, max_length=70, stop_ids=(), steps=4).generate(requests)}
    assert [len(found[i].token_ids) for i in (7, 8)] == [25, 9]
    full = jax.jit(lambda params, batch: decoder.merge(params).hidden(batch) @ decoder.merge(params).head().T)
    sequence = [*prompt, *found[7].token_ids.tolist()]
    for at in range(prompt_length, len(sequence)):
        shape = (1, 70)
        tokens, ids = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        tokens[0, :at], ids[0, :at] = sequence[:at], 1
        positions = np.minimum(np.arange(70, dtype=np.int32), at - 1)[None]
        logits = np.asarray(full(PARAMS, Batch(tokens, ids, positions, np.ones(shape, np.float32))))[0, at - 1, :90]
        expected = jax.nn.log_softmax(logits)[sequence[at]]
        np.testing.assert_allclose(found[7].logprobs[at - prompt_length], expected, atol=2e-5)


def test_dynamic_rope_is_refused_beyond_its_length() -> None:
    config = DecoderConfig(
        90, 32, 48, 3, 4, 2, 8, ropes=(RopeConfig(1000.0, "dynamic", 2.0),), max_position_embeddings=32
    )
    decoder = abstract_decoder(config)
    with pytest.raises(UserError, match=r"max_length = 33: .*dynamic.* at most 32"):
        Engine(decoder, PARAMS, slots=1, max_length=33, stop_ids=())
    assert Engine(decoder, PARAMS, slots=1, max_length=32, stop_ids=()).max_length == 32


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Request(4, [1] * 96), r"request 4: .* 96 tokens, .* max_length = 96; .* at least 97"),
        (Request(4, []), "request 4: the prompt is empty"),
        (Request(4, [1, 90]), r"request 4: token id 90 is outside the vocabulary \(0 to 89\)"),
        (Request(4, [-1]), "request 4: token id -1 is outside"),
        (Request(0, [1]), "request 0: ids are"),
        (Request(2**32, [1]), "request 4294967296: ids are"),
    ],
)
def test_wrong_requests_are_refused(wrong: Request, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(engine(2).generate([Request(0, [1, 2]), wrong]))


def test_broken_weights_are_told() -> None:
    broken = Engine(DECODER, jax.tree.map(lambda p: p * jnp.nan, PARAMS), slots=1, max_length=96, stop_ids=())
    with pytest.raises(UserError, match="request 0: log-probabilities behind token 1 are not finite"):
        list(broken.generate([Request(0, [1, 2])]))


@pytest.mark.parametrize("length", [1, 31, 32, 33, 512, 513, 1024, 1500])
def test_pieces_cover_a_prompt_once(length: int) -> None:
    pieces = cut(length)
    assert [i for p in pieces for i in range(p.start, p.start + p.count)] == list(range(length))
    assert all(p.bucket in BUCKETS and 0 < p.count <= p.bucket for p in pieces)


def test_prefills_have_two_shapes_only() -> None:
    assert list(groups(range(9), 8)) == [([0, 1, 2, 3, 4, 5, 6, 7], 8), ([8], 1)]
    assert list(groups(range(5), 8)) == [([0, 1, 2, 3, 4], 8)]
    assert list(groups(range(4), 8)) == [([0], 1), ([1], 1), ([2], 1), ([3], 1)]
    assert list(groups(range(2), 1)) == [([0], 1), ([1], 1)]


@pytest.mark.acceptance
def test_smollm2_continues_greedily_as_torch_does(smollm2: Path, shared: Path) -> None:
    reference = np.load(shared / "reference" / "reference_smollm2.npz")
    config, _ = hf.load_config(smollm2)
    decoder = abstract_decoder(config)
    params = hf.load_params(smollm2, config, decoder.shapes)
    prompt, expected = reference["greedy_prompt"], reference["greedy_new"]
    for slots in (1, 4):
        real = Engine(decoder, params, slots=slots, max_length=256, stop_ids=(2,))
        others = [Request(i, prompt[: 5 * i], SamplingParams(30, temperature=1.0)) for i in range(1, 6)]
        found = by_id(real.generate([*others, Request(0, prompt, SamplingParams(len(expected)))]))
        assert found[0].token_ids.tolist() == expected.tolist()
