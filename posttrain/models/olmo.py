"""OLMo 2: norms behind attention and MLP instead of before them, and norms of all queries and all keys together."""

from collections.abc import Mapping
from typing import Any

from posttrain.models import family
from posttrain.models.architecture import DecoderConfig

MODEL_TYPES = ("olmo2",)

WEIGHTS = family.weight_table(
    *family.ATTENTION,
    ("attn/q_norm/scale", "self_attn.q_norm.weight", "N H -> (N H)", lambda c: True),
    ("attn/k_norm/scale", "self_attn.k_norm.weight", "K H -> (K H)", lambda c: True),
    family.norm("attn_post_norm", "post_attention_layernorm"),
    *family.MLP,
    family.norm("mlp_post_norm", "post_feedforward_layernorm"),
)
BASE_PREFIX, TIED, IGNORED = family.BASE_PREFIX, family.TIED, family.IGNORED


def config_from_hf(raw: Mapping[str, Any]) -> DecoderConfig:
    """Reads a config.json as transformers 4 or 5 writes it; raises `UserErrors` with all that is wrong in it."""
    reader = family.ConfigReader(raw)
    reader.only({**family.ONLY_SERVED, "sliding_window": (None,), "clip_qkv": (None,)})
    reader.architectures("Olmo2ForCausalLM", "Olmo2Model")
    sizes = reader.sizes()
    bias = reader.flag("attention_bias")
    config = DecoderConfig(
        **sizes,
        tie_word_embeddings=reader.flag("tie_word_embeddings"),
        attention_bias=bias,
        attention_out_bias=bias,
        qk_norm="full",
        pre_norm=False,
        post_norm=True,
        rms_norm_eps=reader.positive("rms_norm_eps", 1e-5),
        hidden_act=reader.activation(),
        ropes=(reader.rope(sizes),),
    )
    reader.check()
    return config


def config_to_hf(config: DecoderConfig, original: Mapping[str, Any] | None) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 both load as `config`; see `family.written_config`."""
    fresh = {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"}
    return family.written_config(config, original, fresh=fresh, read=config_from_hf, keys=_keys)


def _keys(config: DecoderConfig) -> dict[str, Any]:
    rope = family.rope_keys(config.rope)
    if rope["rope_scaling"] and config.rope.scaling in ("linear", "dynamic"):
        # transformers 4 serves these two here, and by their older key only.
        rope["rope_scaling"] = {"type": config.rope.scaling, "factor": config.rope.factor}
    return {**family.plain_keys(config), "attention_bias": config.attention_bias, **rope}
