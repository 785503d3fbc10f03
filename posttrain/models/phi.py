"""The Phi-3 family (`phi3`): Phi-3, Phi-3.5, Phi-4 and their mini and medium models.

Its checkpoints hold queries, keys and values in one tensor, and the MLP's gate and up projections in another.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from posttrain.models import family
from posttrain.models.architecture import DecoderConfig, LayerKind
from posttrain.models.rope import RopeConfig

MODEL_TYPES = ("phi3",)

FUSED: dict[str, tuple[str, ...]] = {
    "layers/attn/k/kernel": ("N H",),
    "layers/attn/v/kernel": ("N H", "K H"),
    "layers/mlp/up/kernel": ("F",),
}
"""The parameters that are not the first of their tensor, and what stands before them."""

WEIGHTS = tuple(
    replace(weight, behind=FUSED.get(weight.path, ()))
    for weight in family.weight_table(
        family.norm("attn_norm", "input_layernorm"),
        ("attn/q/kernel", "self_attn.qkv_proj.weight", "D N H -> (N H) D", lambda c: True),
        ("attn/k/kernel", "self_attn.qkv_proj.weight", "D K H -> (K H) D", lambda c: True),
        ("attn/v/kernel", "self_attn.qkv_proj.weight", "D K H -> (K H) D", lambda c: True),
        ("attn/o/kernel", "self_attn.o_proj.weight", "N H D -> D (N H)", lambda c: True),
        family.norm("mlp_norm", "post_attention_layernorm"),
        ("mlp/gate/kernel", "mlp.gate_up_proj.weight", "D F -> F D", lambda c: True),
        ("mlp/up/kernel", "mlp.gate_up_proj.weight", "D F -> F D", lambda c: True),
        ("mlp/down/kernel", "mlp.down_proj.weight", "F D -> D F", lambda c: True),
    )
)
BASE_PREFIX, TIED, IGNORED = family.BASE_PREFIX, family.TIED, family.IGNORED

ONLY_SERVED: dict[str, tuple[Any, ...]] = {
    **family.ONLY_SERVED,
    **dict.fromkeys(("attention_bias", "mlp_bias", "lm_head_bias"), (False, None)),
    **dict.fromkeys(("resid_pdrop", "embd_pdrop"), (0, None)),
}

DEFAULTS = {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096}
"""What keys mean that are absent."""

OLD_NAMES = ("su", "yarn")
"""What early configs call longrope."""


def config_from_hf(raw: Mapping[str, Any]) -> DecoderConfig:
    """Reads a config.json as transformers 4 or 5 writes it. Absent keys mean what they mean in transformers.

    Raises `UserErrors` with every key that is missing, malformed, contradictory or asks for what is not served.
    """
    reader = family.ConfigReader({**raw, **_renamed(raw)}, DEFAULTS)
    reader.only(ONLY_SERVED)
    reader.architectures("Phi3ForCausalLM", "Phi3Model")
    sizes = reader.sizes()
    rope = reader.rope(sizes, partial=True)
    if rope.scaling not in ("none", "longrope"):
        reader.problems.append(f"rope_scaling: {rope.scaling!r} is not served; served: longrope")
    config = DecoderConfig(
        **sizes,
        tie_word_embeddings=reader.flag("tie_word_embeddings"),
        rms_norm_eps=reader.positive("rms_norm_eps", 1e-5),
        hidden_act=reader.activation(),
        ropes=(rope,),
        layer_kinds=(LayerKind(reader.positive("sliding_window", None, int)),),
    )
    reader.check()
    return config


def _renamed(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary positions, longrope under its own name."""
    renamed = {}
    for section in ("rope_scaling", "rope_parameters"):
        entries = raw.get(section)
        if isinstance(entries, Mapping):
            renamed[section] = {
                key: "longrope" if key in ("type", "rope_type") and value in OLD_NAMES else value
                for key, value in entries.items()
            }
    return renamed


def config_to_hf(config: DecoderConfig, original: Mapping[str, Any] | None) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 both load as `config`; see `family.written_config`."""
    return family.written_config(
        config,
        original,
        fresh={"architectures": ["Phi3ForCausalLM"], "model_type": "phi3"},
        read=config_from_hf,
        keys=_keys,
        rope_names=("rope_theta", "rope_scaling", "partial_rotary_factor", "original_max_position_embeddings"),
    )


def _keys(config: DecoderConfig) -> dict[str, Any]:
    rope = config.rope
    longest = config.max_position_embeddings
    return {
        **family.plain_keys(config),
        "sliding_window": family.widest_window(config),
        "rope_theta": rope.theta,
        "rope_scaling": _rope_scaling(rope, longest),
        "partial_rotary_factor": (rope.rotary_dim or config.head_dim) / config.head_dim,
        "original_max_position_embeddings": rope.original_max_position_embeddings or longest,
    }


def _rope_scaling(rope: RopeConfig, longest: int) -> dict[str, Any] | None:
    """With the fields that transformers 4 insists on, and no other that goes without saying."""
    if rope.scaling == "none":
        return None
    scaling = {"type": "longrope", "short_factor": list(rope.short_factor), "long_factor": list(rope.long_factor)}
    if rope.factor != longest / (rope.original_max_position_embeddings or longest):
        scaling["factor"] = rope.factor
    if rope.attention_factor is not None:
        scaling["attention_factor"] = rope.attention_factor
    return scaling
