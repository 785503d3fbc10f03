"""The Llama family: Hugging Face configs <-> `DecoderConfig`, and the weight-name table, used in both directions.

Every model whose config says `model_type: llama` (Llama 2 and 3, SmolLM2, TinyLlama, ...). A config that asks for what
the decoder does not compute is refused, never approximated.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

from posttrain.errors import UserErrors
from posttrain.models.decoder import DecoderConfig
from posttrain.models.layers import ACTIVATIONS, RopeConfig
from posttrain.models.weights import Weight

MODEL_TYPES = ("llama",)

WEIGHTS = (
    Weight("embed/embedding", "model.embed_tokens.weight", "V D -> V D"),
    *(
        Weight(f"layers/{ours}", f"model.layers.{{layer}}.{theirs}", layout, when)
        for ours, theirs, layout, when in (
            ("attn_norm/scale", "input_layernorm.weight", "D -> D", lambda c: True),
            ("attn/q/kernel", "self_attn.q_proj.weight", "D N H -> (N H) D", lambda c: True),
            ("attn/q/bias", "self_attn.q_proj.bias", "N H -> (N H)", lambda c: c.attention_bias),
            ("attn/k/kernel", "self_attn.k_proj.weight", "D K H -> (K H) D", lambda c: True),
            ("attn/k/bias", "self_attn.k_proj.bias", "K H -> (K H)", lambda c: c.attention_bias),
            ("attn/v/kernel", "self_attn.v_proj.weight", "D K H -> (K H) D", lambda c: True),
            ("attn/v/bias", "self_attn.v_proj.bias", "K H -> (K H)", lambda c: c.attention_bias),
            ("attn/o/kernel", "self_attn.o_proj.weight", "N H D -> D (N H)", lambda c: True),
            ("attn/o/bias", "self_attn.o_proj.bias", "D -> D", lambda c: c.attention_bias),
            ("mlp_norm/scale", "post_attention_layernorm.weight", "D -> D", lambda c: True),
            ("mlp/gate/kernel", "mlp.gate_proj.weight", "D F -> F D", lambda c: True),
            ("mlp/gate/bias", "mlp.gate_proj.bias", "F -> F", lambda c: c.mlp_bias),
            ("mlp/up/kernel", "mlp.up_proj.weight", "D F -> F D", lambda c: True),
            ("mlp/up/bias", "mlp.up_proj.bias", "F -> F", lambda c: c.mlp_bias),
            ("mlp/down/kernel", "mlp.down_proj.weight", "F D -> D F", lambda c: True),
            ("mlp/down/bias", "mlp.down_proj.bias", "D -> D", lambda c: c.mlp_bias),
        )
    ),
    Weight("final_norm/scale", "model.norm.weight", "D -> D"),
    Weight("lm_head/kernel", "lm_head.weight", "V D -> V D", lambda c: not c.tie_word_embeddings),
)

BASE_PREFIX = "model."
"""What the names lack in a checkpoint saved from the headless model class."""

TIED = ("lm_head.weight", "model.embed_tokens.weight")
"""In a tied model the first may be stored too, if it equals the second."""

IGNORED = ("model.rotary_emb.inv_freq", "model.layers.{layer}.self_attn.rotary_emb.inv_freq")
"""Buffers that old checkpoints carry and that the config determines."""

ARCHITECTURES = ("LlamaForCausalLM", "LlamaModel")

ONLY_SERVED: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0, None),
    "partial_rotary_factor": (1, None),
    "rope_interleaved": (False, None),
    "sliding_window": (None,),
    "quantization_config": (None,),
    "num_experts": (None,),
    "num_local_experts": (None,),
}
"""Keys that would change what is computed, and the values under which they do not."""

REQUIRED_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES = (*REQUIRED_SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings")
FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias")

Scaling = Literal["none", "linear", "dynamic", "yarn", "llama3"]

ROPE_FIELDS: dict[Scaling, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "none": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ()),
    "yarn": ((), ("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")),
}
"""Fields that each scaling must and may have, beside theta and the original length."""

INERT_ROPE_FIELDS = ("partial_rotary_factor", "finetuned")
"""Fields that change nothing: the first because it must be 1, the second as it is a remark."""

DEFAULT_THETA = 10000.0


def config_from_hf(raw: Mapping[str, Any]) -> DecoderConfig:
    """Reads a config.json as transformers 4 or 5 writes it. Absent keys mean what they mean in transformers.

    Raises `UserErrors` with every key that is missing, malformed, contradictory or asks for what is not served.
    """
    problems: list[str] = []
    for key, served in ONLY_SERVED.items():
        if raw.get(key) not in served:
            problems.append(f"{key}: {raw[key]!r} is not served; served: {_or(served)}")
    architectures = raw.get("architectures") or ARCHITECTURES[:1]
    if not isinstance(architectures, list | tuple) or any(a not in ARCHITECTURES for a in architectures):
        problems.append(f"architectures: {architectures!r} is not served; served: {_or(ARCHITECTURES)}")
    sizes = _sizes(raw, problems)
    flags = {key: _value(raw, key, False, bool, problems) for key in FLAGS}
    epsilon = _value(raw, "rms_norm_eps", 1e-6, float, problems)
    if epsilon <= 0:
        problems.append(f"rms_norm_eps: {epsilon!r} must be above 0")
    activation = _value(raw, "hidden_act", "silu", str, problems)
    activation = "silu" if activation == "swish" else activation
    if activation not in ACTIVATIONS:
        problems.append(f"hidden_act: {activation!r} is not served; served: {_or(ACTIVATIONS)}")
    rope = _rope_from_hf(raw, sizes["max_position_embeddings"], problems)
    if problems:
        raise UserErrors(problems)
    return DecoderConfig(**sizes, **flags, rms_norm_eps=epsilon, hidden_act=activation, rope=rope)


def config_to_hf(config: DecoderConfig, original: Mapping[str, Any] | None) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 both load as `config`: the original one with only what differs
    replaced, or a fresh one. Where the original states rotary positions in the form of transformers 5 alone, that of
    transformers 4, which 5 reads too, is added: 4 would silently take its defaults."""
    if original is None:
        written: dict[str, Any] = {"architectures": list(ARCHITECTURES[:1]), "model_type": MODEL_TYPES[0]}
        changed = {*SIZES, *FLAGS, "rms_norm_eps", "hidden_act", "rope"}
    else:
        written = dict(original)
        before = config_from_hf(original)
        names = (*SIZES, *FLAGS, "rms_norm_eps", "hidden_act", "rope")
        changed = {name for name in names if getattr(before, name) != getattr(config, name)}
    written.update({name: getattr(config, name) for name in sorted(changed - {"rope"})})
    if "rope" in changed:
        for key in ("rope_parameters", "original_max_position_embeddings"):
            written.pop(key, None)
    if "rope" in changed or "rope_parameters" in written:
        written["rope_theta"] = config.rope.theta
        written["rope_scaling"] = _rope_scaling(config.rope)
    return written


def _rope_scaling(rope: RopeConfig) -> dict[str, Any] | None:
    """The `rope_scaling` of transformers 4."""
    if rope.scaling == "none":
        return None
    required, optional = ROPE_FIELDS[rope.scaling]
    fields = (*required, *optional, "original_max_position_embeddings")
    values = {name: getattr(rope, name) for name in fields}
    defaults = RopeConfig()
    given = {n: v for n, v in values.items() if n not in optional or n == "factor" or v != getattr(defaults, n)}
    return {"rope_type": rope.scaling, **{name: value for name, value in given.items() if value is not None}}


def _sizes(raw: Mapping[str, Any], problems: list[str]) -> dict[str, int]:
    before = len(problems)
    sizes = {}
    for key in REQUIRED_SIZES:
        if raw.get(key) is None:
            problems.append(f"{key}: missing; a positive whole number is needed")
        sizes[key] = _size(raw, key, 1, problems)
    heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
    sizes["num_key_value_heads"] = _size(raw, "num_key_value_heads", heads, problems)
    sizes["head_dim"] = _size(raw, "head_dim", hidden // heads, problems)
    sizes["max_position_embeddings"] = _size(raw, "max_position_embeddings", 2048, problems)
    if len(problems) > before:
        return sizes
    if heads % sizes["num_key_value_heads"]:
        problems.append(f"num_key_value_heads: {sizes['num_key_value_heads']} must divide num_attention_heads: {heads}")
    if raw.get("head_dim") is None and hidden % heads:
        problems.append(f"num_attention_heads: {heads} must divide hidden_size: {hidden}, or give head_dim")
    elif sizes["head_dim"] % 2:
        problems.append(f"head_dim: {sizes['head_dim']} must be even, for rotary positions")
    return sizes


def _size(raw: Mapping[str, Any], key: str, default: int, problems: list[str]) -> int:
    value = _value(raw, key, default, int, problems)
    if value < 1:
        problems.append(f"{key}: {value} must be at least 1")
        return default
    return value


def _value(raw: Mapping[str, Any], key: str, default: Any, kind: type, problems: list[str], where: str = "") -> Any:
    """`raw[key]` if it is of the kind; null means absent, a whole number is a float too, a bool is never a number.
    Floats must be finite: Python's JSON reads NaN."""
    value = raw.get(key)
    if value is None:
        return default
    kinds = (int, float) if kind is float else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
        problems.append(f"{where or key}: {value!r} must be of type {kind.__name__}")
        return default
    if kind is float and not math.isfinite(value):
        problems.append(f"{where or key}: {value!r} must be finite")
        return default
    return kind(value)


def _rope_from_hf(raw: Mapping[str, Any], max_positions: int, problems: list[str]) -> RopeConfig:
    """Joins `rope_parameters` (transformers 5), `rope_scaling` and the plain keys (4), which must not disagree."""
    before = len(problems)
    fields, places = _rope_fields(raw, problems)
    kind = fields.pop("rope_type", "default")
    served: dict[str, Scaling] = {"default": "none", **{name: name for name in ROPE_FIELDS if name != "none"}}
    if len(problems) > before:
        return RopeConfig()
    if not isinstance(kind, str) or kind not in served:
        problems.append(f"{places['rope_type']}: {kind!r} is not served; served: {_or(served)}")
        return RopeConfig()
    scaling = served[kind]
    required, optional = ROPE_FIELDS[scaling]
    problems += [
        f"{places.get('rope_type', 'rope_scaling')}: {kind!r} needs {name}" for name in required if name not in fields
    ]
    known = ("rope_theta", "original_max_position_embeddings", *required, *optional)
    problems += [
        f"{places[name]}: {value!r}: {name} is no field of {kind!r} scaling"
        for name, value in fields.items()
        if name not in known and name not in INERT_ROPE_FIELDS
    ]
    values = {name: _rope_value(fields, name, places[name], problems) for name in known if name in fields}
    if len(problems) > before:
        return RopeConfig()
    theta = values.pop("rope_theta", DEFAULT_THETA)
    original = values.pop("original_max_position_embeddings", max_positions)
    if scaling in ("yarn", "llama3"):
        values["original_max_position_embeddings"] = original
    if scaling == "yarn":
        values.setdefault("factor", max_positions / original)
        if values["factor"] < 1:
            problems.append(
                f"max_position_embeddings: {max_positions} is below original_max_position_embeddings: {original}, and "
                "'yarn' states no factor"
            )
    rope = RopeConfig(theta=theta, scaling=scaling, **values)
    if scaling == "llama3" and rope.high_freq_factor <= rope.low_freq_factor:
        problems.append(
            f"{places['high_freq_factor']}: {rope.high_freq_factor} must be above "
            f"low_freq_factor: {rope.low_freq_factor}"
        )
    return rope


def _rope_value(fields: Mapping[str, Any], name: str, place: str, problems: list[str]) -> Any:
    kinds = {"truncate": bool, "original_max_position_embeddings": int}
    value = _value(fields, name, 1, kinds.get(name, float), problems, place)
    if name in ("factor", "original_max_position_embeddings") and value < 1:
        problems.append(f"{place}: {value} must be at least 1")
    elif name != "truncate" and (value < 0 or (value == 0 and name not in ("mscale", "mscale_all_dim"))):
        problems.append(f"{place}: {value} must be above 0")
    return value


def _rope_fields(raw: Mapping[str, Any], problems: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Field -> value, field -> the key that says so. Null means absent."""
    found: list[tuple[str, str, Any]] = []
    for section in ("rope_parameters", "rope_scaling"):
        entries = raw.get(section) or {}
        if not isinstance(entries, Mapping):
            problems.append(f"{section}: {entries!r} must be an object or null")
            continue
        found += [("rope_type" if key == "type" else key, f"{section}.{key}", v) for key, v in entries.items()]
        if entries.get("partial_rotary_factor") not in (None, 1):
            problems.append(f"{section}.partial_rotary_factor: only 1, all of a head's dims, is served")
    found += [(key, key, raw.get(key)) for key in ("rope_theta", "original_max_position_embeddings")]
    fields: dict[str, Any] = {}
    places: dict[str, str] = {}
    for name, place, value in found:
        if value is None:
            continue
        if fields.setdefault(name, value) != value:
            problems.append(f"{place}: {value!r} contradicts {places[name]}: {fields[name]!r}; remove the wrong one")
        places.setdefault(name, place)
    return fields, places


def _or(values: Any) -> str:
    return ", ".join("null" if v is None else str(v) for v in values)
