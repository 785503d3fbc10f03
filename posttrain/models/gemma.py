"""The Gemma family: Gemma 2 (`gemma2`), Gemma 3 (`gemma3_text`), and the text part of the Gemma 3 that also sees
(`gemma3`).

Of a `gemma3` checkpoint the text model alone is read and trained: the vision tower and its projector are left out, and
hf.py says so. It goes out as `gemma3_text`, a model that every server of Gemma 3 loads; for pictures, put its tensors
back beside the tower's.
"""

from collections.abc import Mapping
from typing import Any

from posttrain.errors import UserError
from posttrain.models import family
from posttrain.models.architecture import DecoderConfig, LayerKind
from posttrain.models.rope import RopeConfig

MODEL_TYPES = ("gemma2", "gemma3_text", "gemma3")

WEIGHTS = family.weight_table(
    family.norm("attn_norm", "input_layernorm"),
    *family.ATTENTION,
    *family.HEAD_NORMS,
    family.norm("attn_post_norm", "post_attention_layernorm"),
    family.norm("mlp_norm", "pre_feedforward_layernorm"),
    *family.MLP,
    family.norm("mlp_post_norm", "post_feedforward_layernorm"),
)
BASE_PREFIX, TIED = family.BASE_PREFIX, family.TIED

ALIASES = {
    "language_model.model.": "model.",
    "model.language_model.": "model.",
    "language_model.lm_head.": "lm_head.",
}
"""Where a `gemma3` checkpoint has the text model, as transformers before 4.52 and since then write it."""

IGNORED = (
    *family.IGNORED,
    *(f"{base}{part}.*" for base in ("", "model.") for part in ("vision_tower", "multi_modal_projector")),
)

COMMON_DEFAULTS: dict[str, Any] = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma2": {
        **COMMON_DEFAULTS,
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
    "gemma3_text": {**COMMON_DEFAULTS, "vocab_size": 262208, "max_position_embeddings": 131072},
}
"""What keys mean that are absent: configs on the hub leave out what equals them."""

ONLY_SERVED: dict[str, tuple[Any, ...]] = {**family.ONLY_SERVED, "use_bidirectional_attention": (False, None)}

FULL, SLIDING = family.LAYER_TYPES
GLOBAL_THETA, LOCAL_THETA = 1e6, 1e4
PATTERN = 6
"""Every sixth layer of Gemma 3 sees all of its segment."""

OF_THE_WHOLE = (
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_version",
)
"""Keys that a `gemma3` config has outside its `text_config`, and a text model has too."""


def config_from_hf(raw: Mapping[str, Any]) -> DecoderConfig:
    """Reads a config.json as transformers 4 or 5 writes it. Absent keys mean what they mean in transformers.

    Raises `UserErrors` with every key that is missing, malformed, contradictory or asks for what is not served.
    """
    raw = _text_config(raw)
    is_2 = raw["model_type"] == "gemma2"
    reader = family.ConfigReader(raw, DEFAULTS[raw["model_type"]])
    reader.only(ONLY_SERVED)
    reader.architectures(*(("Gemma2ForCausalLM", "Gemma2Model") if is_2 else ("Gemma3ForCausalLM", "Gemma3TextModel")))
    sizes = reader.sizes()
    layers, window = sizes["num_hidden_layers"], reader.positive("sliding_window", None, int)
    period = 2 if is_2 else reader.size("sliding_window_pattern", PATTERN)
    pattern = [SLIDING if (layer + 1) % period else FULL for layer in range(layers)]
    types = reader.layer_list("layer_types", layers, family.LAYER_TYPES, pattern)
    if is_2:
        local, ropes = 0, (reader.rope(sizes),)
    else:
        whole = reader.rope(sizes, theta=GLOBAL_THETA, layer_type=FULL)
        near = reader.rope(
            sizes, theta=LOCAL_THETA, theta_key="rope_local_base_freq", scaling_key=None, layer_type=SLIDING
        )
        local, ropes = 1, (whole, near)
    windows = reader.windows(types, window)
    attention_bias = reader.flag("attention_bias")
    config = DecoderConfig(
        **sizes,
        tie_word_embeddings=reader.flag("tie_word_embeddings", True),
        attention_bias=attention_bias,
        attention_out_bias=attention_bias,
        rms_norm_eps=reader.positive("rms_norm_eps", 1e-6),
        hidden_act=reader.activation("hidden_activation", "gelu_pytorch_tanh"),
        ropes=ropes,
        layer_kinds=family.repeating_group([LayerKind(w, 0 if w is None else local) for w in windows]),
        qk_norm="none" if is_2 else "head",
        post_norm=True,
        norm_offset=1.0,
        # Gemma 3's configs have this key too, but none of its layers looks at it.
        attn_softcap=reader.positive("attn_logit_softcapping", None) if is_2 else None,
        logit_softcap=reader.positive("final_logit_softcapping", None),
        attention_scale=reader.positive("query_pre_attn_scalar", 256, int) ** -0.5,
        embed_scale=sizes["hidden_size"] ** 0.5,
    )
    reader.check()
    return config


def _text_config(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the text model alone."""
    if raw.get("model_type") != "gemma3":
        return raw
    text = raw.get("text_config")
    if not isinstance(text, Mapping):
        raise UserError(f"text_config: {text!r} must be an object, the config of the text model")
    classes = raw.get("architectures") or ["Gemma3ForConditionalGeneration"]
    is_text_and_vision = set(classes) <= {"Gemma3ForConditionalGeneration", "Gemma3Model"}
    return {
        **text,
        **{key: raw[key] for key in OF_THE_WHOLE if key in raw},
        "architectures": ["Gemma3ForCausalLM"] if is_text_and_vision else classes,
        "model_type": "gemma3_text",
    }


def config_to_hf(config: DecoderConfig, original: Mapping[str, Any] | None) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 both load as `config`; see `family.written_config`."""
    is_2 = config.qk_norm == "none"
    kind = "2" if is_2 else "3"
    fresh = {"architectures": [f"Gemma{kind}ForCausalLM"], "model_type": "gemma2" if is_2 else "gemma3_text"}
    return family.written_config(
        config,
        None if original is None else _text_config(original),
        fresh=fresh,
        read=config_from_hf,
        keys=_keys,
        rope_names=("rope_theta", "rope_scaling") if is_2 else ("rope_theta", "rope_scaling", "rope_local_base_freq"),
    )


def _keys(config: DecoderConfig) -> dict[str, Any]:
    scale = config.attention_scale or config.head_dim**-0.5
    keys = {
        **{name: value for name, value in family.plain_keys(config).items() if name != "hidden_act"},
        "hidden_activation": config.hidden_act,
        "attention_bias": config.attention_bias,
        "final_logit_softcapping": config.logit_softcap,
        "layer_types": family.layer_types(config),
        "query_pre_attn_scalar": round(scale**-2),
        "sliding_window": family.widest_window(config),
        **family.rope_keys(config.rope),
    }
    if config.qk_norm == "none":
        return {**keys, "attn_logit_softcapping": config.attn_softcap}
    keys["rope_local_base_freq"] = config.ropes[1].theta
    if config.ropes[1].scaling != "none":  # which transformers 4 has no words for
        keys["rope_parameters"] = {kind: _rope(rope) for kind, rope in zip((FULL, SLIDING), config.ropes, strict=True)}
    return keys


def _rope(rope: RopeConfig) -> dict[str, Any]:
    """As transformers 5 states it."""
    return {"rope_theta": rope.theta, **(family.rope_keys(rope)["rope_scaling"] or {"rope_type": "default"})}
