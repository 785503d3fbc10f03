"""The Llama family: every model whose config says `model_type: llama` (Llama 2 and 3, SmolLM2, TinyLlama, ...)."""

from collections.abc import Mapping
from typing import Any

from posttrain.models import family
from posttrain.models.architecture import DecoderConfig

MODEL_TYPES = ("llama",)
WEIGHTS = family.LLAMA_LIKE
BASE_PREFIX, TIED, IGNORED = family.BASE_PREFIX, family.TIED, family.IGNORED

ONLY_SERVED: dict[str, tuple[Any, ...]] = {
    **family.ONLY_SERVED,
    "rope_interleaved": (False, None),
    "sliding_window": (None,),
}


def config_from_hf(raw: Mapping[str, Any]) -> DecoderConfig:
    """Reads a config.json as transformers 4 or 5 writes it. Absent keys mean what they mean in transformers.

    Raises `UserErrors` with every key that is missing, malformed, contradictory or asks for what is not served.
    """
    reader = family.ConfigReader(raw)
    reader.only(ONLY_SERVED)
    reader.architectures("LlamaForCausalLM", "LlamaModel")
    sizes = reader.sizes()
    attention_bias = reader.flag("attention_bias")
    config = DecoderConfig(
        **sizes,
        tie_word_embeddings=reader.flag("tie_word_embeddings"),
        attention_bias=attention_bias,
        attention_out_bias=attention_bias,
        mlp_bias=reader.flag("mlp_bias"),
        rms_norm_eps=reader.positive("rms_norm_eps", 1e-6),
        hidden_act=reader.activation(),
        ropes=(reader.rope(sizes),),
    )
    reader.check()
    return config


def config_to_hf(config: DecoderConfig, original: Mapping[str, Any] | None) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 both load as `config`; see `family.written_config`."""
    fresh = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    return family.written_config(config, original, fresh=fresh, read=config_from_hf, keys=_keys)


def _keys(config: DecoderConfig) -> dict[str, Any]:
    biases = {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
    return {**family.plain_keys(config), **biases, **family.rope_keys(config.rope)}
