"""SmolLM3: Llama, in which some layers have no rotary positions, and those may have sliding windows."""

from collections.abc import Mapping
from typing import Any

from posttrain.models import family
from posttrain.models.architecture import DecoderConfig, LayerKind

MODEL_TYPES = ("smollm3",)
WEIGHTS = family.LLAMA_LIKE
BASE_PREFIX, TIED, IGNORED = family.BASE_PREFIX, family.TIED, family.IGNORED

DEFAULTS = {"num_key_value_heads": 4, "max_position_embeddings": 32768, "tie_word_embeddings": True}
"""What absent keys mean in transformers."""


def config_from_hf(raw: Mapping[str, Any]) -> DecoderConfig:
    """Reads a config.json as transformers 4 or 5 writes it; raises `UserErrors` with all that is wrong in it."""
    reader = family.ConfigReader(raw, DEFAULTS)
    reader.only(family.ONLY_SERVED)
    reader.architectures("SmolLM3ForCausalLM", "SmolLM3Model")
    sizes = reader.sizes()
    bias = reader.flag("attention_bias")
    config = DecoderConfig(
        **sizes,
        tie_word_embeddings=reader.flag("tie_word_embeddings", True),
        attention_bias=bias,
        attention_out_bias=bias,
        mlp_bias=reader.flag("mlp_bias"),
        rms_norm_eps=reader.positive("rms_norm_eps", 1e-6),
        hidden_act=reader.activation(),
        ropes=(reader.rope(sizes, theta=2000000.0),),
        layer_kinds=_kinds(reader, sizes["num_hidden_layers"]),
    )
    reader.check()
    return config


def _kinds(reader: family.ConfigReader, layers: int) -> tuple[LayerKind, ...]:
    interval = reader.size("no_rope_layer_interval", 4)
    default = [int((i + 1) % interval != 0) for i in range(layers)]
    given = reader.raw.get("no_rope_layers")
    if isinstance(given, list) and len(given) > layers:  # transformers, too, reads as many as there are layers
        reader.raw["no_rope_layers"] = given[:layers]
    turned = reader.layer_list("no_rope_layers", layers, (0, 1), default)
    window = reader.positive("sliding_window", None, int) if reader.flag("use_sliding_window") else None
    default = [family.LAYER_TYPES[window is not None and not rope] for rope in turned]
    types = reader.layer_list("layer_types", layers, family.LAYER_TYPES, default)
    windows = reader.windows(types, window)
    return family.repeating_group([LayerKind(w, 0 if rope else None) for w, rope in zip(windows, turned, strict=True)])


def config_to_hf(config: DecoderConfig, original: Mapping[str, Any] | None) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 both load as `config`; see `family.written_config`."""
    fresh = {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3"}
    return family.written_config(config, original, fresh=fresh, read=config_from_hf, keys=_keys)


def _keys(config: DecoderConfig) -> dict[str, Any]:
    window = family.widest_window(config)
    return {
        **family.plain_keys(config),
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "layer_types": family.layer_types(config),
        "no_rope_layers": [int(kind.rope is not None) for kind in config.kinds],
        **family.rope_keys(config.rope),
    }
