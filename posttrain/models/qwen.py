"""Qwen 2 and 2.5 (biases on queries, keys and values) and dense Qwen 3 (norms of queries and keys instead)."""

from collections.abc import Mapping
from typing import Any

from posttrain.models import family
from posttrain.models.architecture import DecoderConfig, LayerKind

MODEL_TYPES = ("qwen2", "qwen3")
WEIGHTS = family.LLAMA_LIKE
BASE_PREFIX, TIED, IGNORED = family.BASE_PREFIX, family.TIED, family.IGNORED

DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768},
    "qwen3": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "head_dim": 128},
}
"""What absent keys mean in transformers."""


def config_from_hf(raw: Mapping[str, Any]) -> DecoderConfig:
    """Reads a config.json as transformers 4 or 5 writes it; raises `UserErrors` with all that is wrong in it."""
    model_type = str(raw["model_type"])
    reader = family.ConfigReader(raw, DEFAULTS[model_type])
    reader.only(family.ONLY_SERVED)
    name = model_type.capitalize()
    reader.architectures(f"{name}ForCausalLM", f"{name}Model")
    sizes = reader.sizes()
    # Qwen 2 has no key for its biases: they are part of its code.
    bias = reader.flag("attention_bias") if model_type == "qwen3" else False
    config = DecoderConfig(
        **sizes,
        tie_word_embeddings=reader.flag("tie_word_embeddings"),
        attention_bias=bias or model_type == "qwen2",
        attention_out_bias=bias,
        qk_norm="head" if model_type == "qwen3" else "none",
        rms_norm_eps=reader.positive("rms_norm_eps", 1e-6),
        hidden_act=reader.activation(),
        ropes=(reader.rope(sizes),),
        layer_kinds=window_kinds(reader, sizes["num_hidden_layers"]),
    )
    reader.check()
    return config


def window_kinds(reader: family.ConfigReader, layers: int) -> tuple[LayerKind, ...]:
    """Sliding windows as all Qwens state them: `layer_types`, or else all layers from `max_window_layers` on."""
    window = reader.positive("sliding_window", None if "sliding_window" in reader.raw else 4096, int)
    if not reader.flag("use_sliding_window"):
        window = None
    first = reader.value("max_window_layers", 28, int)
    default = [family.LAYER_TYPES[window is not None and i >= first] for i in range(layers)]
    types = reader.layer_list("layer_types", layers, family.LAYER_TYPES, default)
    return family.repeating_group([LayerKind(window=w) for w in reader.windows(types, window)])


def window_keys(config: DecoderConfig) -> dict[str, Any]:
    """The keys that `window_kinds` reads."""
    types = family.layer_types(config)
    first = types.index("sliding_attention") if "sliding_attention" in types else config.num_hidden_layers
    window = family.widest_window(config)
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": first,
        "layer_types": types,
    }


def config_to_hf(config: DecoderConfig, original: Mapping[str, Any] | None) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 both load as `config`; see `family.written_config`."""
    model_type = "qwen3" if config.qk_norm == "head" else "qwen2"
    fresh = {"architectures": [f"{model_type.capitalize()}ForCausalLM"], "model_type": model_type}
    return family.written_config(config, original, fresh=fresh, read=config_from_hf, keys=_keys)


def _keys(config: DecoderConfig) -> dict[str, Any]:
    bias = {"attention_bias": config.attention_bias} if config.qk_norm == "head" else {}
    return {**family.plain_keys(config), **bias, **window_keys(config), **family.rope_keys(config.rope)}
