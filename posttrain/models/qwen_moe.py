"""Qwen 3 with experts (Qwen3-30B-A3B, Qwen3-235B-A22B): dense Qwen 3 with experts in the place of every MLP."""

from collections.abc import Mapping
from typing import Any

from posttrain.models import family
from posttrain.models.architecture import DecoderConfig, LayerKind

MODEL_TYPES = ("qwen3_moe",)
WEIGHTS = family.weight_table(
    family.norm("attn_norm", "input_layernorm"),
    *family.ATTENTION,
    *family.HEAD_NORMS,
    family.norm("mlp_norm", "post_attention_layernorm"),
    *family.experts("mlp", gate="gate_proj", up="up_proj", down="down_proj"),
)
BASE_PREFIX, TIED, IGNORED = family.BASE_PREFIX, family.TIED, family.IGNORED

ONLY_SERVED: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0, None),
    "quantization_config": (None,),
    "layer_types": (None,),
}

DEFAULTS = {"num_key_value_heads": 4, "max_position_embeddings": 32768, "moe_intermediate_size": 768}
"""What absent keys mean in transformers."""


def config_from_hf(raw: Mapping[str, Any]) -> DecoderConfig:
    """Reads a config.json as transformers 4 or 5 writes it; raises `UserErrors` with all that is wrong in it."""
    reader = family.ConfigReader(raw, DEFAULTS)
    reader.only(ONLY_SERVED)
    _check_all_layers(reader)
    reader.architectures("Qwen3MoeForCausalLM", "Qwen3MoeModel")
    sizes, bias = reader.sizes(), reader.flag("attention_bias")
    # Unlike dense Qwens', all layers slide: `max_window_layers` is not looked at.
    window = reader.positive("sliding_window", None if "sliding_window" in raw else 4096, int)
    norm = reader.flag("norm_topk_prob")
    config = DecoderConfig(
        **sizes,
        tie_word_embeddings=reader.flag("tie_word_embeddings"),
        attention_bias=bias,
        attention_out_bias=bias,
        qk_norm="head",
        rms_norm_eps=reader.positive("rms_norm_eps", 1e-6),
        hidden_act=reader.activation(),
        ropes=(reader.rope(sizes),),
        layer_kinds=(LayerKind(window=window if reader.flag("use_sliding_window") else None),),
        moe=reader.moe("moe_intermediate_size", count=128, chosen=8, norm_topk_prob=norm),
    )
    reader.check()
    return config


def _check_all_layers(reader: family.ConfigReader) -> None:
    dense, step = reader.raw.get("mlp_only_layers"), reader.raw.get("decoder_sparse_step")
    why = "layers with an MLP among layers with experts are not served"
    if dense not in (None, []):
        reader.problems.append(f"mlp_only_layers: {dense!r}: {why}; served: an empty list")
    if step not in (None, 1):
        reader.problems.append(f"decoder_sparse_step: {step!r}: {why}; served: 1")


def config_to_hf(config: DecoderConfig, original: Mapping[str, Any] | None) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 both load as `config`; see `family.written_config`."""
    fresh = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
    written = family.written_config(config, original, fresh=fresh, read=config_from_hf, keys=_keys)
    # Transformers 5 writes `num_local_experts` only, and 4 would silently take its default of `num_experts`.
    written["num_experts"] = _keys(config)["num_experts"]
    if "num_local_experts" in written:
        written["num_local_experts"] = written["num_experts"]
    return written


def _keys(config: DecoderConfig) -> dict[str, Any]:
    assert config.moe is not None
    own = {
        "attention_bias": config.attention_bias,
        "num_experts": config.moe.num_experts,
        "moe_intermediate_size": config.moe.moe_intermediate_size,
        "norm_topk_prob": config.moe.norm_topk_prob,
        "use_sliding_window": config.layer_kinds[0].window is not None,
        "sliding_window": config.layer_kinds[0].window,
    }
    return {**family.plain_keys(config), **family.moe_keys(config.moe), **own, **family.rope_keys(config.rope)}
