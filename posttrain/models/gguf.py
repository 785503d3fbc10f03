"""`posttrain import`: a GGUF file -> a Hugging Face directory, which everything else then reads.

Weights are dequantized, tensor by tensor; the config and the tokenizer are rebuilt from the file's metadata.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from gguf import GGUFReader, ReaderTensor, dequantize
from jaxtyping import Float32

from posttrain.errors import UserError, UserErrors
from posttrain.models.architecture import DecoderConfig
from posttrain.models.gguf_config import ROPE_FACTORS, Architecture, find_architecture, read_config
from posttrain.models.gguf_tokenizer import stop_ids, token_id, write_tokenizer
from posttrain.models.hf import Family, find_family
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

NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
"""GGUF tensor names -> Hugging Face's, of what is no layer's."""


def import_gguf(path: str | os.PathLike[str], out_dir: str | os.PathLike[str], dtype: str = "float32") -> None:
    """Converts a GGUF file into a Hugging Face directory, which must be new or empty.

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
    architecture = find_architecture(metadata)
    family = find_family(architecture.model_type)
    tensors = {_stored_name(tensor.name, architecture): tensor for tensor in reader.tensors}
    factors = tensors.pop(ROPE_FACTORS, None)
    found = {name: tuple(reversed(tensor.shape.tolist())) for name, tensor in tensors.items()}
    config = family.config_from_hf(read_config(metadata, found, None if factors is None else _dequantize(factors)))
    sizes = dim_sizes(config)
    shapes = {name: tensor.shape(sizes) for name, tensor in stored_tensors(family.WEIGHTS, config).items()}
    problems = tensor_problems(shapes, found, {name: tensor.name for name, tensor in tensors.items()})
    if problems:
        raise UserErrors(problems)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}

    def values(name: str) -> Float32[np.ndarray, "..."]:
        module = name.split(".")[-2]
        array = _dequantize(tensors[name])
        if architecture.permuted and module in heads:
            return _unpermute(array, heads[module])
        return array - np.float32(architecture.norm_offset) if module.endswith("norm") else array

    with new_directory(target) as directory:
        write_tokenizer(metadata, directory)
        write_checkpoint(directory, shapes, np.dtype(dtype), values, MAX_SHARD_BYTES)
        _write_configs(metadata, family, config, dtype, directory)


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


def _stored_name(name: str, architecture: Architecture) -> str:
    """The Hugging Face name of a GGUF tensor; names that have none stay as they are."""
    parts = name.split(".")
    if parts[0] == "blk" and len(parts) == 4 and parts[2] in architecture.layer_names:
        return f"model.layers.{parts[1]}.{architecture.layer_names[parts[2]]}.{parts[3]}"
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


def _write_configs(
    metadata: Mapping[str, Any], family: Family, config: DecoderConfig, dtype: str, directory: epath.Path
) -> None:
    stops = stop_ids(metadata)
    ids = {"bos_token_id": token_id(metadata, "bos"), "eos_token_id": stops[0] if len(stops) == 1 else stops or None}
    ids["pad_token_id"] = token_id(metadata, "padding")
    given = {key: value for key, value in ids.items() if value is not None}
    write_json(directory / "config.json", {**family.config_to_hf(config, None), **given, "torch_dtype": dtype})
    write_json(directory / "generation_config.json", given)
