"""What the families' files share: reading a config.json with all its problems at once, writing one that differs only
where it must, and the lines of the weight table that most checkpoints have.

A family (`llama.py` ...) says in its own file which of these apply. A config that asks for what the decoder does not
compute is refused, never approximated. Both spellings are read: transformers 4 writes `rope_theta`, `rope_scaling`,
`torch_dtype`; 5 writes `rope_parameters` (where layers differ: one for each layer type), `layer_types`, `dtype`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from posttrain.errors import UserErrors
from posttrain.models.architecture import DecoderConfig, LayerKind, MoEConfig
from posttrain.models.layers import ACTIVATIONS
from posttrain.models.rope import RopeConfig
from posttrain.models.rope_fields import RopeFields, listed, rope_scaling, typed
from posttrain.models.weights import Weight

# ---- Weights ---------------------------------------------------------------------------------------------------------

Line = tuple[str, str, str, Callable[[DecoderConfig], bool]]
"""Parameter below `layers/`, tensor below `model.layers.{layer}.`, layout, and which configs have it."""


def _always(config: DecoderConfig) -> bool:
    return True


def _qkv_bias(config: DecoderConfig) -> bool:
    return config.attention_bias


def _mlp_bias(config: DecoderConfig) -> bool:
    return config.mlp_bias


ATTENTION: tuple[Line, ...] = (
    ("attn/q/kernel", "self_attn.q_proj.weight", "D N H -> (N H) D", _always),
    ("attn/q/bias", "self_attn.q_proj.bias", "N H -> (N H)", _qkv_bias),
    ("attn/k/kernel", "self_attn.k_proj.weight", "D K H -> (K H) D", _always),
    ("attn/k/bias", "self_attn.k_proj.bias", "K H -> (K H)", _qkv_bias),
    ("attn/v/kernel", "self_attn.v_proj.weight", "D K H -> (K H) D", _always),
    ("attn/v/bias", "self_attn.v_proj.bias", "K H -> (K H)", _qkv_bias),
    ("attn/o/kernel", "self_attn.o_proj.weight", "N H D -> D (N H)", _always),
    ("attn/o/bias", "self_attn.o_proj.bias", "D -> D", lambda c: c.attention_out_bias),
)
HEAD_NORMS: tuple[Line, ...] = (
    ("attn/q_norm/scale", "self_attn.q_norm.weight", "H -> H", lambda c: c.qk_norm == "head"),
    ("attn/k_norm/scale", "self_attn.k_norm.weight", "H -> H", lambda c: c.qk_norm == "head"),
)
"""`qk_norm: head`."""
MLP: tuple[Line, ...] = (
    ("mlp/gate/kernel", "mlp.gate_proj.weight", "D F -> F D", _always),
    ("mlp/gate/bias", "mlp.gate_proj.bias", "F -> F", _mlp_bias),
    ("mlp/up/kernel", "mlp.up_proj.weight", "D F -> F D", _always),
    ("mlp/up/bias", "mlp.up_proj.bias", "F -> F", _mlp_bias),
    ("mlp/down/kernel", "mlp.down_proj.weight", "F D -> D F", _always),
    ("mlp/down/bias", "mlp.down_proj.bias", "D -> D", _mlp_bias),
)


def norm(ours: str, theirs: str) -> Line:
    """A norm of the residual stream: `norm("attn_norm", "input_layernorm")`."""
    return (f"{ours}/scale", f"{theirs}.weight", "D -> D", _always)


def experts(block: str, gate: str, up: str, down: str) -> tuple[Weight, ...]:
    """Router and experts below `model.layers.{layer}.<block>`, by the names that all transformers read. Told to keep
    its own form, transformers 5 saves each layer's experts joined."""
    layer = "model.layers.{layer}"
    inner, outer = f"{layer}.mlp.experts.gate_up_proj", f"{layer}.mlp.experts.down_proj"
    names = {name: f"{layer}.{block}.experts.{{expert}}.{name}.weight" for name in (gate, up, down)}
    router = (f"{layer}.mlp.gate.weight", 0, 1)
    return (
        Weight("layers/moe/router/kernel", f"{layer}.{block}.gate.weight", "D E -> E D", joined=router),
        Weight("layers/moe/gate/kernel", names[gate], "D F -> F D", joined=(inner, 0, 2)),
        Weight("layers/moe/up/kernel", names[up], "D F -> F D", joined=(inner, 1, 2)),
        Weight("layers/moe/down/kernel", names[down], "F D -> D F", joined=(outer, 0, 1)),
    )


def weight_table(*lines: Line | Weight) -> tuple[Weight, ...]:
    """Embedding, layers of these lines, last norm and head."""
    layers = (
        line
        if isinstance(line, Weight)
        else Weight(f"layers/{line[0]}", f"model.layers.{{layer}}.{line[1]}", *line[2:])
        for line in lines
    )
    return (
        Weight("embed/embedding", "model.embed_tokens.weight", "V D -> V D"),
        *layers,
        Weight("final_norm/scale", "model.norm.weight", "D -> D"),
        Weight("lm_head/kernel", "lm_head.weight", "V D -> V D", lambda c: not c.tie_word_embeddings),
    )


LLAMA_LIKE = weight_table(
    norm("attn_norm", "input_layernorm"),
    *ATTENTION,
    *HEAD_NORMS,
    norm("mlp_norm", "post_attention_layernorm"),
    *MLP,
)
"""Llama's names, which most dense families keep."""

BASE_PREFIX = "model."
"""What the names lack in a checkpoint saved from the headless model class."""

TIED = ("lm_head.weight", "model.embed_tokens.weight")
"""In a tied model the first may be stored too, if it equals the second."""

IGNORED = ("model.rotary_emb.inv_freq", "model.layers.{layer}.self_attn.rotary_emb.inv_freq")
"""Buffers that old checkpoints carry and that the config determines."""

# ---- Reading a config.json -------------------------------------------------------------------------------------------

ONLY_SERVED: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0, None),
    "quantization_config": (None,),
    "num_experts": (None,),
    "num_local_experts": (None,),
}
"""Keys that would change what a dense family computes, and the values under which they do not."""

NOT_COMPUTED = {
    "alibi": "ALiBi positions",
    "audio_config": "sound",
    "first_k_dense_replace": "dense and expert layers in one model",
    "hidden_size_per_layer_input": "per-layer embeddings",
    "is_encoder_decoder": "an encoder",
    "kv_lora_rank": "multi-head latent attention",
    "linear_num_value_heads": "linear attention",
    "mamba_d_state": "state-space layers",
    "n_shared_experts": "shared experts",
    "parallel_attn": "attention and MLP side by side",
    "shared_expert_intermediate_size": "shared experts",
    "state_size": "state-space layers",
    "swiglu_limit": "attention sinks and a clamped SwiGLU",
    "topk_method": "experts chosen by biased sigmoids",
    "use_parallel_residual": "attention and MLP side by side",
    "vision_config": "images",
}
"""Keys by which a config.json names what the decoder does not compute."""

REQUIRED_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES = (*REQUIRED_SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings")

LAYER_TYPES = ("full_attention", "sliding_attention")


DEFAULT_THETA = 10000.0


def missing_features(raw: Mapping[str, Any]) -> list[str]:
    """What a config.json names and the decoder does not compute, with the key that says so."""
    missing = [f"{what} ({key})" for key, what in NOT_COMPUTED.items() if raw.get(key)]
    types = raw.get("layer_types")
    others = sorted({str(kind) for kind in types} - {*LAYER_TYPES}) if isinstance(types, list) else []
    return missing + [f"layers of type {kind} (layer_types)" for kind in others]


class ConfigReader:
    """Reads values of a config.json and collects every problem; `check` raises them together.

    `defaults` are what keys mean that are absent; null means what it means in transformers' code, which is the
    `default` of each call.
    """

    def __init__(self, raw: Mapping[str, Any], defaults: Mapping[str, Any] | None = None):
        self.raw = {**(defaults or {}), **raw}
        self.problems: list[str] = []

    def check(self) -> None:
        """Raises `UserErrors` if there was any problem."""
        if self.problems:
            raise UserErrors(self.problems)

    def only(self, served: Mapping[str, tuple[Any, ...]]) -> None:
        """Refuses other values of these keys."""
        for key, values in served.items():
            if self.raw.get(key) not in values:
                self.problems.append(f"{key}: {self.raw[key]!r} is not served; served: {listed(values)}")

    def architectures(self, *served: str) -> None:
        """Refuses model classes other than these."""
        found = self.raw.get("architectures") or served[:1]
        if not isinstance(found, list | tuple) or any(name not in served for name in found):
            self.problems.append(f"architectures: {found!r} is not served; served: {listed(served)}")

    def value(self, key: str, default: Any, kind: type) -> Any:
        """The key's value if it is of the kind; a whole number is a float too, a bool is never a number. Floats must be
        finite: Python's JSON reads NaN."""
        return typed(self.raw, key, default, kind, key, self.problems)

    def flag(self, key: str, default: bool = False) -> bool:
        return self.value(key, default, bool)

    def positive(self, key: str, default: Any, kind: type = float) -> Any:
        """A number above 0, or None where that is the default and the key is absent or null."""
        value = self.value(key, default, kind)
        if value is not None and value <= 0:
            self.problems.append(f"{key}: {value!r} must be above 0")
            return default
        return value

    def activation(self, key: str = "hidden_act", default: str = "silu") -> str:
        """A name of `ACTIVATIONS`."""
        name = self.value(key, default, str)
        name = "silu" if name == "swish" else name
        if name not in ACTIVATIONS:
            self.problems.append(f"{key}: {name!r} is not served; served: {listed(ACTIVATIONS)}")
        return name

    def sizes(self) -> dict[str, Any]:
        """The fields of `SIZES`, consistent with each other."""
        before = len(self.problems)
        sizes = {}
        for key in REQUIRED_SIZES:
            if self.raw.get(key) is None:
                self.problems.append(f"{key}: missing; a positive whole number is needed")
            sizes[key] = self.size(key, 1)
        heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
        sizes["num_key_value_heads"] = self.size("num_key_value_heads", heads)
        sizes["head_dim"] = self.size("head_dim", hidden // heads)
        sizes["max_position_embeddings"] = self.size("max_position_embeddings", 2048)
        if len(self.problems) > before:
            return sizes
        if heads % sizes["num_key_value_heads"]:
            self.problems.append(
                f"num_key_value_heads: {sizes['num_key_value_heads']} must divide num_attention_heads: {heads}"
            )
        if self.raw.get("head_dim") is None and hidden % heads:
            self.problems.append(f"num_attention_heads: {heads} must divide hidden_size: {hidden}, or give head_dim")
        elif sizes["head_dim"] % 2:
            self.problems.append(f"head_dim: {sizes['head_dim']} must be even, for rotary positions")
        return sizes

    def size(self, key: str, default: int) -> int:
        """A whole number from 1 on."""
        value = self.value(key, default, int)
        if value < 1:
            self.problems.append(f"{key}: {value} must be at least 1")
            return default
        return value

    def layer_list(self, key: str, layers: int, allowed: Sequence[Any], default: Sequence[Any]) -> list[Any]:
        """One entry for each layer, all of them `allowed`."""
        found = self.raw.get(key)
        if found is None:
            return list(default)
        if not isinstance(found, list | tuple) or len(found) != layers or any(kind not in allowed for kind in found):
            self.problems.append(f"{key}: {found!r} must be a list of num_hidden_layers: {layers} of {listed(allowed)}")
            return list(default)
        return list(found)

    def windows(self, types: Sequence[str], window: int | None) -> list[int | None]:
        """Each layer's window, from its type."""
        if window is None and "sliding_attention" in types:
            self.problems.append("layer_types: sliding_attention needs a sliding_window")
        return [window if kind == "sliding_attention" else None for kind in types]

    def moe(self, width: str, *, count: int, chosen: int, norm_topk_prob: bool) -> MoEConfig:
        """The experts: `width` is the key that says how wide one is; `count` and `chosen` are what absent keys mean."""
        key, other = ("num_experts", "num_local_experts")[:: 1 if self.raw.get("num_local_experts") is None else -1]
        experts = self.size(key, count)
        if self.raw.get(other) not in (None, experts):
            self.problems.append(f"{other}: {self.raw[other]!r} contradicts {key}: {experts}; remove the wrong one")
        per_token = self.size("num_experts_per_tok", chosen)
        if per_token > experts:
            self.problems.append(f"num_experts_per_tok: {per_token} of {key}: {experts} cannot be chosen")
        coefficient = self.value("router_aux_loss_coef", 0.001, float)
        if coefficient < 0:
            self.problems.append(f"router_aux_loss_coef: {coefficient!r} must not be below 0")
        # As in transformers, where the loss exists only when the router's logits are put out.
        balanced = self.flag("output_router_logits")
        width_of_one = self.size(width, 1)
        return MoEConfig(experts, per_token, width_of_one, norm_topk_prob, coefficient if balanced else 0.0)

    def rope(
        self,
        sizes: Mapping[str, int],
        *,
        theta: float = DEFAULT_THETA,
        theta_key: str = "rope_theta",
        scaling_key: str | None = "rope_scaling",
        layer_type: str | None = None,
        partial: bool = False,
    ) -> RopeConfig:
        """Joins `rope_parameters` (transformers 5) and the keys of 4, which must not disagree.

        Where layers differ: `layer_type` picks one of nested `rope_parameters`, `theta_key` and `scaling_key` name what
        4 has for it. `partial`: whether the family serves a `partial_rotary_factor` other than 1. `theta` is what an
        absent one means.
        """
        before = len(self.problems)
        fields = RopeFields(
            self.raw, self.problems, theta_key=theta_key, scaling_key=scaling_key, layer_type=layer_type
        )
        if len(self.problems) > before:
            return RopeConfig()
        longest = sizes["max_position_embeddings"]
        return fields.read(head_dim=sizes["head_dim"], max_positions=longest, theta=theta, partial=partial)


def repeating_group(kinds: Sequence[LayerKind]) -> tuple[LayerKind, ...]:
    """The shortest group that, repeated, gives these layers: `DecoderConfig.layer_kinds`."""
    lengths = range(1, len(kinds) + 1)
    return next(tuple(kinds[:n]) for n in lengths if all(kinds[i] == kinds[i % n] for i in range(len(kinds))))


def layer_types(config: DecoderConfig) -> list[str]:
    """`layer_types` of the layers' windows."""
    return ["full_attention" if kind.window is None else "sliding_attention" for kind in config.kinds]


def widest_window(config: DecoderConfig) -> int | None:
    """`sliding_window`: that of the layers that have one."""
    return next((kind.window for kind in config.kinds if kind.window is not None), None)


# ---- Writing a config.json -------------------------------------------------------------------------------------------


def plain_keys(config: DecoderConfig) -> dict[str, Any]:
    """What nearly every config.json says, in its words."""
    names = (*SIZES, "tie_word_embeddings", "rms_norm_eps", "hidden_act")
    return {name: getattr(config, name) for name in names}


def moe_keys(moe: MoEConfig) -> dict[str, Any]:
    """What `ConfigReader.moe` reads, but for the width and `num_experts`, of which each family has a key."""
    return {
        "num_experts_per_tok": moe.num_experts_per_tok,
        "output_router_logits": moe.router_aux_loss_coef > 0,
        "router_aux_loss_coef": moe.router_aux_loss_coef,
    }


def rope_keys(rope: RopeConfig) -> dict[str, Any]:
    """Rotary positions as transformers 4 states them, and 5 reads them."""
    return {"rope_theta": rope.theta, "rope_scaling": rope_scaling(rope)}


def written_config(
    config: DecoderConfig,
    original: Mapping[str, Any] | None,
    *,
    fresh: Mapping[str, Any],
    read: Callable[[Mapping[str, Any]], DecoderConfig],
    keys: Callable[[DecoderConfig], dict[str, Any]],
    rope_names: Sequence[str] = ("rope_theta", "rope_scaling"),
) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 both load as `config`: the original one with only what differs replaced,
    or a fresh one (`architectures`, `model_type`).

    `keys` is the family's wording of a config. Where the original states rotary positions in the form of transformers 5
    alone, that of 4 (`rope_names`), which 5 reads too, is added: 4 would silently take its defaults.
    """
    after = keys(config)
    if original is None:
        return {**fresh, **after}
    before = keys(read(original))
    changed = {name: value for name, value in after.items() if name not in before or before[name] != value}
    written = {**original, **changed}
    if any(name in changed for name in rope_names):
        for name in ("rope_parameters", "original_max_position_embeddings"):
            written.pop(name, None)
    if any(name in changed for name in rope_names) or "rope_parameters" in written:
        written.update({name: after[name] for name in rope_names})
    return written
