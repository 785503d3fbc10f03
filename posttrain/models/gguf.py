"""`posttrain import`: a GGUF file -> a Hugging Face directory, which everything else then reads.

Weights are dequantized, tensor by tensor; the config and the tokenizer are rebuilt from the file's metadata.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from gguf import GGUFReader, ReaderTensor, dequantize
from jaxtyping import Float32

from posttrain.errors import UserError, UserErrors
from posttrain.models import llama
from posttrain.models.decoder import DecoderConfig
from posttrain.models.gguf_tokenizer import stop_ids, token_id, write_tokenizer
from posttrain.models.layers import RopeConfig, rope_frequencies
from posttrain.models.weights import (
    MAX_SHARD_BYTES,
    WRITABLE_DTYPES,
    check_free,
    dim_sizes,
    new_directory,
    stored_tensors,
    tensor_problems,
    write_checkpoint,
    write_json,
)

ARCHITECTURE = "llama"

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
"""GGUF tensor names -> Hugging Face's, of a layer and of the rest."""

ROPE_FACTORS = "rope_freqs.weight"
"""Llama 3's rotary scaling, as the factor that divides each frequency."""

SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
}

EPSILON = "attention.layer_norm_rms_epsilon"

SERVED_KEYS = {
    *SIZES.values(),
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    EPSILON,
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "vocab_size",
}
"""Keys of the architecture that are read or change nothing. Any other may change what the model computes."""


def import_gguf(path: str | os.PathLike[str], out_dir: str | os.PathLike[str], dtype: str = "float32") -> None:
    """Converts a GGUF file of the Llama architecture into a Hugging Face directory, which must be new or empty.

    float32 holds the dequantized weights exactly. Raises `UserError` for what is not served, for a broken or truncated
    file (naming the tensors that are missing, extra or misshapen), and for an `out_dir` that holds anything.
    """
    path, target = Path(path), epath.Path(out_dir)
    if dtype not in WRITABLE_DTYPES:
        raise UserError(f"dtype: {dtype!r} is not served; served: {', '.join(WRITABLE_DTYPES)}")
    check_free(target)
    reader, metadata = _open(path)
    try:
        _convert(reader, metadata, target, dtype)
    except UserErrors as error:
        raise UserErrors([f"{path}: {problem}" for problem in error.problems]) from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _convert(reader: GGUFReader, metadata: Mapping[str, Any], target: epath.Path, dtype: str) -> None:
    tensors = {_stored_name(tensor.name): tensor for tensor in reader.tensors}
    factors = tensors.pop(ROPE_FACTORS, None)
    config = _config(metadata, tensors, None if factors is None else _dequantize(factors))
    sizes = dim_sizes(config)
    shapes = {name: w.stored_shape(sizes) for name, (w, _) in stored_tensors(llama.WEIGHTS, config).items()}
    found = {name: tuple(reversed(tensor.shape.tolist())) for name, tensor in tensors.items()}
    problems = tensor_problems(shapes, found, {name: tensor.name for name, tensor in tensors.items()})
    if problems:
        raise UserErrors(problems)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}

    def values(name: str) -> Float32[np.ndarray, "..."]:
        module = name.split(".")[-2]
        array = _dequantize(tensors[name])
        return _unpermute(array, heads[module]) if module in heads else array

    with new_directory(target) as directory:
        write_tokenizer(metadata, directory)
        write_checkpoint(directory, shapes, np.dtype(dtype), values, MAX_SHARD_BYTES)
        _write_configs(metadata, config, dtype, directory)


def _open(path: Path) -> tuple[GGUFReader, dict[str, Any]]:
    """The file's tensors, unread, and its metadata."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; name a .gguf file")
    try:
        reader = GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        # The reader checks little itself: a cut file surfaces as numpy's errors.
        raise UserError(f"{path}: not a whole GGUF file ({error}); copy or download it again") from error
    if metadata.get("split.count", 1) > 1:
        raise UserError(f"{path}: one of {metadata['split.count']} parts; join them first: llama-gguf-split --merge")
    return reader, metadata


def _stored_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor; names that have none stay as they are."""
    parts = name.split(".")
    if parts[0] == "blk" and len(parts) == 4 and parts[2] in LAYER_NAMES:
        return f"model.layers.{parts[1]}.{LAYER_NAMES[parts[2]]}.{parts[3]}"
    return NAMES.get(name, name)


def _dequantize(tensor: ReaderTensor) -> Float32[np.ndarray, "..."]:
    try:
        return dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise UserError(
            f"{tensor.name}: quantization {tensor.tensor_type.name} is not served by the gguf package; "
            "take another quantization of the model"
        ) from error


def _unpermute(values: Float32[np.ndarray, "..."], heads: int) -> Float32[np.ndarray, "..."]:
    """q or k rows from the order of interleaved rotary pairs (0, H/2, 1, H/2+1, ...) to that of half-split ones."""
    split = values.reshape(heads, -1, 2, *values.shape[1:])
    return split.swapaxes(1, 2).reshape(values.shape)


def _config(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, ReaderTensor],
    rope_factors: Float32[np.ndarray, "half"] | None,
) -> DecoderConfig:
    """The decoder that the metadata and the presence of biases and of an output head describe."""
    architecture = metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise UserError(f"general.architecture: {architecture!r} is not served; served: {ARCHITECTURE!r}")
    prefix = f"{ARCHITECTURE}."
    values = {key.removeprefix(prefix): v for key, v in metadata.items() if key.startswith(prefix)}
    problems = [f"{prefix}{key}: {values[key]!r} is not served" for key in sorted(values.keys() - SERVED_KEYS)]
    sizes: dict[str, Any] = {name: values.get(key) for name, key in SIZES.items()}
    for name, key in SIZES.items():
        if not isinstance(sizes[name], int) or sizes[name] < 1:
            problems.append(f"{prefix}{key}: {sizes[name]!r} must be a positive whole number, the same for all layers")
    if EPSILON not in values:
        problems.append(f"{prefix}{EPSILON}: missing")
    embedding = tensors.get("model.embed_tokens.weight")
    if embedding is None:
        problems.append("token_embd.weight: missing")
    if embedding is None or problems:
        raise UserErrors(problems)
    rows, tokens = int(embedding.shape[-1]), len(metadata.get("tokenizer.ggml.tokens", ()))
    if tokens > rows:
        problems.append(f"tokenizer.ggml.tokens: {tokens} tokens, but token_embd.weight has {rows} rows")
    heads = sizes["num_attention_heads"]
    head_dim = values.get("attention.key_length", sizes["hidden_size"] // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if values.get(key, head_dim) != head_dim:
            problems.append(f"{prefix}{key}: {values[key]} must be the head size, {head_dim}")
    raw = {
        "model_type": "llama",
        **sizes,
        "num_key_value_heads": values.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": rows,
        "rms_norm_eps": _shortest(values[EPSILON]),
        "rope_theta": _shortest(values.get("rope.freq_base", 10000.0)),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in tensors,
        "mlp_bias": "model.layers.0.mlp.gate_proj.bias" in tensors,
    }
    if rope_factors is None:
        raw["rope_scaling"] = _rope_scaling(values)
    elif "rope.scaling.type" in values:
        problems.append(f"{ROPE_FACTORS} and {prefix}rope.scaling.type: only one of them can say how positions scale")
    else:
        raw["rope_scaling"] = _llama3_scaling(rope_factors, raw["rope_theta"])
    if problems:
        raise UserErrors(problems)
    return llama.config_from_hf(raw)


def _shortest(value: float) -> float:
    """The decimal that was meant: GGUF stores float32, where 1e-05 is 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """The `rope_scaling` of a Hugging Face config; the fields are checked there."""
    factor = values.get("rope.scaling.factor")
    kind = values.get("rope.scaling.type", "none" if factor is None else "linear")
    if kind == "none":
        return None
    scaling = {"rope_type": kind, "factor": None if factor is None else _shortest(factor)}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = values.get("rope.scaling.original_context_length")
        for name in ("beta_fast", "beta_slow"):
            scaling[name] = values.get(f"rope.scaling.yarn_{name}")
    return scaling


def _llama3_scaling(factors: Float32[np.ndarray, "half"], theta: float) -> dict[str, Any]:
    """Llama 3's scaling from the factors that it gives.

    The formula (see `layers.rope_frequencies`) interpolates between 1 and `factor` in a variable that is linear in the
    frequency: two middle factors determine it, up to a common multiple of three parameters, so `low_freq_factor` is 1,
    as in all published models. Raises `UserError` where the factors do not follow the formula.
    """
    size = 2 * len(factors)
    plain, _ = rope_frequencies(RopeConfig(theta=theta), size, 1)
    largest = float(factors.max())
    middle = (factors > 1) & (factors < largest)
    if middle.sum() >= 2:
        smooth = (1 / factors[middle].astype(np.float64) - 1 / largest) / (1 - 1 / largest)
        slope, offset = np.polyfit(plain[middle].astype(np.float64) / (2 * math.pi), smooth, 1)
        high = _round(1 - 1 / offset)
        scaling = {
            "rope_type": "llama3",
            "factor": _shortest(largest),
            "low_freq_factor": 1.0,
            "high_freq_factor": high,
            "original_max_position_embeddings": round(slope * (high - 1)),
        }
        fields = {name: value for name, value in scaling.items() if name != "rope_type"}
        scaled, _ = rope_frequencies(RopeConfig(theta=theta, scaling="llama3", **fields), size, 1)
        if np.allclose(plain / scaled, factors, rtol=1e-4):
            return scaling
    raise UserError(f"{ROPE_FACTORS}: these rotary factors do not follow Llama 3's scaling; no other is served")


def _round(value: float) -> float:
    """To a whole number where it is one but for rounding."""
    return float(round(value)) if abs(value - round(value)) < 1e-3 * abs(value) else value


def _write_configs(metadata: Mapping[str, Any], config: DecoderConfig, dtype: str, directory: epath.Path) -> None:
    stops = stop_ids(metadata)
    ids = {"bos_token_id": token_id(metadata, "bos"), "eos_token_id": stops[0] if len(stops) == 1 else stops or None}
    ids["pad_token_id"] = token_id(metadata, "padding")
    given = {key: value for key, value in ids.items() if value is not None}
    write_json(directory / "config.json", {**llama.config_to_hf(config, None), **given, "torch_dtype": dtype})
    write_json(directory / "generation_config.json", given)
