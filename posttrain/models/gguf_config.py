"""What a GGUF file says of its model -> config.json. Called by `gguf.py`.

An architecture of GGUF is a line of `ARCHITECTURES`: which Hugging Face family it is, and in what its files differ.
What a file leaves unsaid is as in llama.cpp.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float32

from posttrain.errors import UserError, UserErrors
from posttrain.models.rope import RopeConfig, rope_frequencies

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
"""Keys of every architecture that are read or change nothing. Any other may change what the model computes."""

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
"""Names of a layer's tensors in most architectures, and Hugging Face's."""

ROPE_SCALINGS = ("none", "linear", "yarn")

QK_NORM_NAMES = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}

Values = Mapping[str, Any]
"""A file's metadata of its architecture, without the prefix."""


@dataclass(frozen=True)
class Architecture:
    """What GGUF calls an architecture."""

    model_type: str
    """Of the Hugging Face family."""
    layer_names: Mapping[str, str] = field(default_factory=lambda: LAYER_NAMES)
    permuted: bool = False
    """Whether rows of q and k are stored in the order of interleaved rotary pairs."""
    norm_offset: float = 0.0
    """What is added to norm weights in the file."""
    keys: frozenset[str] = frozenset()
    """Metadata that it has beside `SERVED_KEYS`."""
    config: Callable[[Values, Mapping[str, Any]], Mapping[str, Any]] = lambda values, raw: {}
    """From the metadata and the config.json so far: what the family has beside the keys of Llama."""


def _shortest(value: float) -> float:
    """The decimal that was meant: GGUF stores float32, where 1e-05 is 9.999999747378752e-06."""
    return float(str(np.float32(value)))


GEMMA3_27B_LAYERS = 62
"""The one size whose queries are not scaled by the head size; GGUF has no key for it, llama.cpp tells by the layers."""


def _gemma3(values: Values, raw: Mapping[str, Any]) -> dict[str, Any]:
    layers, heads = raw["num_hidden_layers"], raw["num_attention_heads"]
    scalar = raw["hidden_size"] // heads if layers == GEMMA3_27B_LAYERS else raw["head_dim"]
    window = values.get("attention.sliding_window")
    pattern = values.get("attention.sliding_window_pattern", 6)
    if window is None:
        types = ["full_attention"] * layers
    elif isinstance(pattern, list):
        types = ["sliding_attention" if local else "full_attention" for local in pattern]
    else:
        types = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)]
    cap = values.get("final_logit_softcapping")
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "sliding_window": window,
        "layer_types": types,
        "rope_local_base_freq": _shortest(values.get("rope.freq_base_swa", 10000.0)),
        "final_logit_softcapping": None if cap is None else _shortest(cap),
    }


ARCHITECTURES = {
    "llama": Architecture("llama", permuted=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3", LAYER_NAMES | QK_NORM_NAMES),
    "gemma3": Architecture(
        "gemma3_text",
        LAYER_NAMES
        | QK_NORM_NAMES
        | {
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
        norm_offset=1.0,
        keys=frozenset(
            {
                "attention.sliding_window",
                "attention.sliding_window_pattern",
                "rope.freq_base_swa",
                "final_logit_softcapping",
            }
        ),
        config=_gemma3,
    ),
}


def find_architecture(metadata: Mapping[str, Any]) -> Architecture:
    """Of the file; raises `UserError` listing the served ones."""
    name = metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        served = ", ".join(map(repr, ARCHITECTURES))
        raise UserError(f"general.architecture: {name!r} is not served; served: {served}")
    return ARCHITECTURES[name]


def read_config(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    rope_factors: Float32[np.ndarray, "half"] | None,
) -> dict[str, Any]:
    """The config.json that the metadata and the presence of biases and of an output head describe. `shapes` are those
    of the tensors by their Hugging Face names. Raises `UserErrors` for what is missing, malformed or not served."""
    architecture = find_architecture(metadata)
    prefix = f"{metadata['general.architecture']}."
    values = {key.removeprefix(prefix): v for key, v in metadata.items() if key.startswith(prefix)}
    unknown = sorted(values.keys() - SERVED_KEYS - architecture.keys)
    problems = [f"{prefix}{key}: {values[key]!r} is not served" for key in unknown]
    sizes: dict[str, Any] = {name: values.get(key) for name, key in SIZES.items()}
    for name, key in SIZES.items():
        if not isinstance(sizes[name], int) or sizes[name] < 1:
            problems.append(f"{prefix}{key}: {sizes[name]!r} must be a positive whole number, the same for all layers")
    if EPSILON not in values:
        problems.append(f"{prefix}{EPSILON}: missing")
    embedding = shapes.get("model.embed_tokens.weight")
    if embedding is None:
        problems.append("token_embd.weight: missing")
    if embedding is None or problems:
        raise UserErrors(problems)
    rows, tokens = embedding[0], len(metadata.get("tokenizer.ggml.tokens", ()))
    if tokens > rows:
        problems.append(f"tokenizer.ggml.tokens: {tokens} tokens, but token_embd.weight has {rows} rows")
    heads = sizes["num_attention_heads"]
    head_dim = values.get("attention.key_length", sizes["hidden_size"] // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if values.get(key, head_dim) != head_dim:
            problems.append(f"{prefix}{key}: {values[key]} must be the head size, {head_dim}")
    raw = {
        "model_type": architecture.model_type,
        **sizes,
        "num_key_value_heads": values.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": rows,
        "rms_norm_eps": _shortest(values[EPSILON]),
        "rope_theta": _shortest(values.get("rope.freq_base", 10000.0)),
        "tie_word_embeddings": "lm_head.weight" not in shapes,
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in shapes,
        "mlp_bias": "model.layers.0.mlp.gate_proj.bias" in shapes,
    }
    scaling = values.get("rope.scaling.type", "none")
    if scaling not in ROPE_SCALINGS:
        problems.append(f"{prefix}rope.scaling.type: {scaling!r} is not served; served: {', '.join(ROPE_SCALINGS)}")
    if rope_factors is None:
        raw["rope_scaling"] = _rope_scaling(values)
    elif "rope.scaling.type" in values:
        problems.append(f"{ROPE_FACTORS} and {prefix}rope.scaling.type: only one of them can say how positions scale")
    else:
        raw["rope_scaling"] = _llama3_scaling(rope_factors, raw["rope_theta"])
    if problems:
        raise UserErrors(problems)
    return {**raw, **architecture.config(values, raw)}


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

    The formula (see `rope.rope_frequencies`) interpolates between 1 and `factor` in a variable that is linear in the
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
