"""Mistral: Llama with one sliding window for all layers (in version 0.1 of the 7B model)."""

from collections.abc import Mapping
from typing import Any

from posttrain.models import family
from posttrain.models.architecture import DecoderConfig, LayerKind

MODEL_TYPES = ("mistral",)
WEIGHTS = family.LLAMA_LIKE
BASE_PREFIX, TIED, IGNORED = family.BASE_PREFIX, family.TIED, family.IGNORED

DEFAULTS = {"num_key_value_heads": 8, "max_position_embeddings": 4096 * 32, "sliding_window": 4096}
"""What absent keys mean in transformers."""


def config_from_hf(raw: Mapping[str, Any]) -> DecoderConfig:
    """Reads a config.json as transformers 4 or 5 writes it; raises `UserErrors` with all that is wrong in it."""
    reader = family.ConfigReader(raw, DEFAULTS)
    reader.only({**family.ONLY_SERVED, "layer_types": (None,)})
    reader.architectures("MistralForCausalLM", "MistralModel")
    sizes = reader.sizes()
    config = DecoderConfig(
        **sizes,
        tie_word_embeddings=reader.flag("tie_word_embeddings"),
        rms_norm_eps=reader.positive("rms_norm_eps", 1e-6),
        hidden_act=reader.activation(),
        ropes=(reader.rope(sizes),),
        layer_kinds=(LayerKind(window=reader.positive("sliding_window", None, int)),),
    )
    reader.check()
    return config


def config_to_hf(config: DecoderConfig, original: Mapping[str, Any] | None) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 both load as `config`; see `family.written_config`."""
    fresh = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    return family.written_config(config, original, fresh=fresh, read=config_from_hf, keys=_keys)


def _keys(config: DecoderConfig) -> dict[str, Any]:
    window = {"sliding_window": config.layer_kinds[0].window}
    return {**family.plain_keys(config), **window, **family.rope_keys(config.rope)}
