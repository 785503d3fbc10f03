"""Mixtral: Mistral with experts in the place of every MLP, weighted by a softmax over the chosen ones."""

from collections.abc import Mapping
from typing import Any

from posttrain.models import family
from posttrain.models.architecture import DecoderConfig, LayerKind

MODEL_TYPES = ("mixtral",)
WEIGHTS = family.weight_table(
    family.norm("attn_norm", "input_layernorm"),
    *family.ATTENTION,
    family.norm("mlp_norm", "post_attention_layernorm"),
    *family.experts("block_sparse_moe", gate="w1", up="w3", down="w2"),
)
BASE_PREFIX, TIED, IGNORED = family.BASE_PREFIX, family.TIED, family.IGNORED

ONLY_SERVED: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0, None),
    "quantization_config": (None,),
    "router_jitter_noise": (0, None),
    "layer_types": (None,),
}

DEFAULTS = {"num_key_value_heads": 8, "max_position_embeddings": 4096 * 32}
"""What absent keys mean in transformers."""


def config_from_hf(raw: Mapping[str, Any]) -> DecoderConfig:
    """Reads a config.json as transformers 4 or 5 writes it; raises `UserErrors` with all that is wrong in it."""
    reader = family.ConfigReader(raw, DEFAULTS)
    reader.only(ONLY_SERVED)
    reader.architectures("MixtralForCausalLM", "MixtralModel")
    sizes = reader.sizes()
    config = DecoderConfig(
        **sizes,
        tie_word_embeddings=reader.flag("tie_word_embeddings"),
        rms_norm_eps=reader.positive("rms_norm_eps", 1e-5),
        hidden_act=reader.activation(),
        ropes=(reader.rope(sizes, theta=1e6),),
        layer_kinds=(LayerKind(window=reader.positive("sliding_window", None, int)),),
        moe=reader.moe("intermediate_size", count=8, chosen=2, norm_topk_prob=True),
    )
    reader.check()
    return config


def config_to_hf(config: DecoderConfig, original: Mapping[str, Any] | None) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 both load as `config`; see `family.written_config`."""
    fresh = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
    return family.written_config(config, original, fresh=fresh, read=config_from_hf, keys=_keys)


def _keys(config: DecoderConfig) -> dict[str, Any]:
    assert config.moe is not None
    experts = {**family.moe_keys(config.moe), "num_local_experts": config.moe.num_experts}
    window = {"sliding_window": config.layer_kinds[0].window}
    return {**family.plain_keys(config), **window, **experts, **family.rope_keys(config.rope)}
