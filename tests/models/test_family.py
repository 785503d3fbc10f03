"""What families read from a config.json and write into one, against transformers' own config classes."""

import json
from typing import Any

import pytest
import transformers

from posttrain.errors import UserErrors
from posttrain.models import family, hf
from posttrain.models.architecture import DecoderConfig, LayerKind
from posttrain.models.rope import RopeConfig

SIZES = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LOCAL, GLOBAL, UNTURNED = LayerKind(window=5), LayerKind(), LayerKind(rope=None)


def read(model_type: str, **keys: Any) -> DecoderConfig:
    raw = {**SIZES, "model_type": model_type, **keys}
    return hf.find_family(model_type).config_from_hf(raw)


def in_transformers(raw: dict[str, Any]) -> Any:
    """As `from_pretrained` would have it."""
    keys = json.loads(json.dumps(raw))
    return transformers.AutoConfig.for_model(keys.pop("model_type"), **keys)


@pytest.mark.parametrize(
    ("model_type", "keys", "kinds"),
    [
        ("qwen2", {"sliding_window": 5}, (GLOBAL,)),
        ("qwen2", {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 6}, (GLOBAL,)),
        ("qwen2", {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 0}, (LOCAL,)),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}, (LayerKind(window=4096),)),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": None}, (GLOBAL,)),
        (
            "qwen3",
            {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 4},
            (*(GLOBAL,) * 4, LOCAL, LOCAL),
        ),
        (
            "qwen3",
            {
                "sliding_window": 5,
                "use_sliding_window": True,
                "max_window_layers": 4,  # layer_types win
                "layer_types": ["sliding_attention", "full_attention"] * 3,
            },
            (LOCAL, GLOBAL),
        ),
        ("mistral", {}, (LayerKind(window=4096),)),
        ("mistral", {"sliding_window": 5}, (LOCAL,)),
        ("mistral", {"sliding_window": None}, (GLOBAL,)),
        ("smollm3", {}, (GLOBAL, GLOBAL, GLOBAL, UNTURNED)),
        ("smollm3", {"no_rope_layer_interval": 3}, (GLOBAL, GLOBAL, UNTURNED)),
        ("smollm3", {"no_rope_layers": [0, 1] * 4, "no_rope_layer_interval": 3}, (UNTURNED, GLOBAL)),
        (
            "smollm3",
            {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 5},
            (GLOBAL, LayerKind(5, None)),
        ),
    ],
)
def test_layer_kinds(model_type: str, keys: dict[str, Any], kinds: tuple[LayerKind, ...]) -> None:
    config = read(model_type, **keys)
    assert config.layer_kinds == kinds
    theirs = in_transformers({**SIZES, "model_type": model_type, **keys})
    types = (
        getattr(theirs, "layer_types", None) or ["sliding_attention" if theirs.sliding_window else "full_attention"] * 6
    )
    assert [theirs.sliding_window if t == "sliding_attention" else None for t in types] == [
        k.window for k in config.kinds
    ]
    if model_type == "smollm3":
        assert [bool(turned) for turned in theirs.no_rope_layers[:6]] == [k.rope == 0 for k in config.kinds]


@pytest.mark.parametrize("model_type", ["llama", "mistral", "olmo2", "qwen2", "qwen3", "smollm3"])
def test_absent_keys_mean_what_transformers_makes_of_them(model_type: str) -> None:
    needed = {name: SIZES[name] for name in family.REQUIRED_SIZES} | {"num_attention_heads": 32, "hidden_size": 64}
    config = hf.find_family(model_type).config_from_hf({**needed, "model_type": model_type})
    theirs = in_transformers({**needed, "model_type": model_type})
    for name in ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "hidden_act", "tie_word_embeddings"):
        assert getattr(config, name) == getattr(theirs, name), name
    assert config.head_dim == getattr(theirs, "head_dim", 64 // 32)
    assert config.rope == RopeConfig(theta=theirs.rope_parameters["rope_theta"])
    assert config.attention_bias == (model_type == "qwen2" or getattr(theirs, "attention_bias", False))


@pytest.mark.parametrize(
    ("model_type", "keys"),
    [
        ("llama", {"attention_bias": True}),
        ("mistral", {"sliding_window": 5, "head_dim": 12}),
        ("olmo2", {"attention_bias": True, "rms_norm_eps": 1e-4}),
        ("qwen2", {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 2}),
        ("qwen3", {"head_dim": 6, "rope_theta": 7.0}),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 5, "tie_word_embeddings": False}),
    ],
)
@pytest.mark.parametrize(
    "rope",
    [
        {},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 16},
    ],
    ids=["plain", "yarn", "longrope"],
)
def test_fresh_configs_mean_the_same_in_transformers(
    model_type: str, keys: dict[str, Any], rope: dict[str, Any]
) -> None:
    if rope.get("rope_type") == "longrope":
        half = keys.get("head_dim", 8) // 2
        rope = {**rope, "short_factor": [1.0] * half, "long_factor": [2.0] * half}
    config = read(model_type, **keys, rope_scaling=rope or None)
    written = hf.find_family(model_type).config_to_hf(config, None)
    assert hf.find_family(model_type).config_from_hf(written) == config
    theirs = in_transformers(written)
    assert theirs.architectures == written["architectures"]
    for name in (*family.SIZES, "rms_norm_eps", "hidden_act", "tie_word_embeddings"):
        # Where a class has no head_dim of its own, it keeps the key all the same.
        assert getattr(theirs, name) == getattr(config, name), name
    assert theirs.rope_parameters.items() >= {**rope, "rope_theta": config.rope.theta}.items()


def test_both_spellings_of_transformers_are_one() -> None:
    scaling = {"rope_type": "linear", "factor": 2.0}
    old = {"rope_theta": 50.0, "rope_scaling": scaling, "torch_dtype": "bfloat16"}
    new = {"rope_parameters": {**scaling, "rope_theta": 50.0}, "dtype": "bfloat16"}
    types = {"layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 4}
    windows = {"use_sliding_window": True, "sliding_window": 5}
    assert read("qwen3", **old, **windows, max_window_layers=2) == read("qwen3", **new, **windows, **types)


def test_nested_rope_parameters_and_partial_rotation() -> None:
    raw = {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        }
    }
    reader = family.ConfigReader({**SIZES, **raw})
    sizes = reader.sizes()
    ropes = [reader.rope(sizes, layer_type=kind, partial=True) for kind in ("full_attention", "sliding_attention")]
    reader.check()
    assert ropes == [RopeConfig(1e6, "linear", 8.0), RopeConfig(1e4, rotary_dim=4)]


def test_olmo_states_scalings_as_transformers_4_checks_them() -> None:
    config = read("olmo2", rope_scaling={"rope_type": "linear", "factor": 2.0})
    written = hf.find_family("olmo2").config_to_hf(config, None)
    assert written["rope_scaling"] == {"type": "linear", "factor": 2.0}  # its check wants just these two keys
    assert in_transformers(written).rope_parameters == {
        "rope_type": "linear",
        "type": "linear",
        "factor": 2.0,
        "rope_theta": 1e4,
    }


def test_a_changed_window_replaces_only_what_says_it() -> None:
    raw = {
        **SIZES,
        "model_type": "qwen2",
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": ["full_attention"] * 6,
    }
    module = hf.find_family("qwen2")
    config = module.config_from_hf(raw)
    assert module.config_to_hf(config, raw) == raw
    wider = DecoderConfig(**{**vars(config), "layer_kinds": (GLOBAL, LOCAL)})
    written = module.config_to_hf(wider, raw)
    assert module.config_from_hf(written) == wider
    changed = {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}
    assert {key for key in written if written[key] != raw.get(key)} == changed


@pytest.mark.parametrize(
    ("model_type", "keys", "message"),
    [
        (
            "qwen2",
            {"layer_types": ["full_attention"] * 5},
            "layer_types: .* list of num_hidden_layers: 6 of full_attention",
        ),
        ("qwen3", {"layer_types": ["chunked_attention"] * 6}, "layer_types: .*'chunked_attention'"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 6}, "sliding_attention needs a sliding_window"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 0}, "sliding_window: 0 must be above 0"),
        ("qwen3", {"num_experts": 8}, "num_experts: 8 is not served"),
        ("mistral", {"layer_types": ["full_attention"] * 6}, "layer_types: .* is not served"),
        ("mistral", {"architectures": ["LlamaForCausalLM"]}, "served: MistralForCausalLM, MistralModel"),
        ("olmo2", {"clip_qkv": 8.0}, "clip_qkv: 8.0 is not served"),
        (
            "smollm3",
            {"no_rope_layers": [1, 0]},
            r"no_rope_layers: \[1, 0\] must be a list of num_hidden_layers: 6 of 0, 1",
        ),
        ("smollm3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5 is not served; served: 1"),
    ],
)
def test_problems_name_key_value_and_what_is_served(model_type: str, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserErrors, match=message) as caught:
        read(model_type, **keys)
    assert len(caught.value.problems) == 1
