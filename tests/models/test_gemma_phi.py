"""What only the Gemma and Phi-3 families have: a text model inside a larger one, fused weights, and what they refuse.
That they compute what torch computes is in `test_families.py`."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from posttrain.errors import UserError, UserErrors
from posttrain.models import gemma, hf, phi
from posttrain.models.decoder import abstract_decoder
from posttrain.parallel.sharding import flatten

FIXTURES = Path(__file__).parent.parent / "fixtures" / "families"


def raw(name: str, **changes: Any) -> dict[str, Any]:
    return json.loads((FIXTURES / name / "config.json").read_text()) | changes


def renamed(tmp_path: Path, prefixes: dict[str, str]) -> Path:
    """The fixture `gemma3` with other names in its checkpoint."""
    directory = tmp_path / "model"
    shutil.copytree(FIXTURES / "gemma3", directory)
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    out = {}
    for name, value in tensors.items():
        theirs = next(prefix for prefix in prefixes if name.startswith(prefix))
        out[prefixes[theirs] + name.removeprefix(theirs)] = value
    safetensors.numpy.save_file(out, directory / "model.safetensors")
    return directory


def load(directory: Path) -> dict[str, np.ndarray]:
    config, _ = hf.load_config(directory)
    return flatten(hf.load_params(directory, config, abstract_decoder(config).shapes))


def test_the_text_model_is_found_under_both_of_its_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="posttrain"):
        before = load(FIXTURES / "gemma3")
    assert caplog.messages == [
        f"{FIXTURES / 'gemma3'}: 23 tensors of multi_modal_projector, vision_tower are left out: "
        "only the text model is read"
    ]
    prefixes = {"language_model.model.": "model.language_model.", "vision": "model.vision", "multi": "model.multi"}
    after = load(renamed(tmp_path, prefixes))
    assert after.keys() == before.keys()
    for path, value in before.items():
        np.testing.assert_array_equal(after[path], value, err_msg=path)


def test_other_tensors_of_a_larger_model_are_refused(tmp_path: Path) -> None:
    directory = renamed(
        tmp_path, {"language_model.model.": "language_model.model.", "vision": "audio", "multi": "multi"}
    )
    with pytest.raises(UserErrors, match=r"audio_tower\.embeddings.*: extra; this model has no such tensor"):
        load(directory)


def test_the_exported_config_is_that_of_a_text_model() -> None:
    config, original = hf.load_config(FIXTURES / "gemma3")
    written = gemma.config_to_hf(config, original)
    assert written["architectures"] == ["Gemma3ForCausalLM"] and written["model_type"] == "gemma3_text"
    assert written["eos_token_id"] == [1, 99] and written["torch_dtype"] == "bfloat16"
    assert not written.keys() & {"text_config", "vision_config", "image_token_index"}


def test_one_tensor_of_the_checkpoint_holds_queries_keys_and_values() -> None:
    """Each part in its place, read by slices that cut it."""
    config, _ = hf.load_config(FIXTURES / "phi4_mini")
    tensors = safetensors.numpy.load_file(FIXTURES / "phi4_mini" / "model.safetensors")
    fused = tensors["model.layers.1.self_attn.qkv_proj.weight"].astype(np.float32)
    found = load(FIXTURES / "phi4_mini")
    n, k, h = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    for part, heads, row in (("q", n, 0), ("k", k, n * h), ("v", k, (n + k) * h)):
        want = fused[row : row + heads * h].reshape(heads, h, -1).transpose(2, 0, 1)
        np.testing.assert_array_equal(found[f"layers/attn/{part}/kernel"][1], want)
    both = tensors["model.layers.0.mlp.gate_up_proj.weight"].astype(np.float32)
    gate, up = np.split(both, 2)
    np.testing.assert_array_equal(found["layers/mlp/gate/kernel"][0], gate.T)
    np.testing.assert_array_equal(found["layers/mlp/up/kernel"][0], up.T)


def test_a_misshapen_fused_tensor_is_named(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(FIXTURES / "phi3", directory)
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    name = "model.layers.0.self_attn.qkv_proj.weight"
    tensors[name] = tensors[name][:-8]
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    with pytest.raises(UserErrors, match=rf"{name}: shape \[56, 32\]; \[64, 32\] is needed"):
        load(directory)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention: True is not served"),
        ("gemma2", {"architectures": ["Gemma2ForSequenceClassification"]}, "served: Gemma2ForCausalLM, Gemma2Model"),
        ("gemma2", {"layer_types": ["full_attention"]}, "must be a list of num_hidden_layers: 3"),
        ("gemma2", {"sliding_window": None}, "sliding_attention needs a sliding_window"),
        ("gemma2", {"final_logit_softcapping": 0.0}, "final_logit_softcapping: 0.0 must be above 0"),
        ("gemma3_text", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar: 0 must be above 0"),
        ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern: 0 must be at least 1"),
        ("gemma3", {"text_config": None}, "text_config: None must be an object"),
        ("gemma3", {"architectures": ["Gemma3ForSequenceClassification"]}, "Gemma3ForSequenceClassification"),
        ("phi3", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "'linear' is not served; served: longrope"),
        ("phi3", {"attention_bias": True}, "attention_bias: True is not served"),
        ("phi3", {"resid_pdrop": 0.1}, "resid_pdrop: 0.1 is not served"),
        ("phi4_mini", {"partial_rotary_factor": 0.5}, "must be a list of 2 numbers above 0"),
        ("phi3_longrope", {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4}}, "needs long_factor"),
    ],
)
def test_what_is_not_served_is_refused(name: str, changes: dict[str, Any], message: str) -> None:
    config = raw(name, **changes)
    with pytest.raises(UserError, match=message):
        hf.find_family(config["model_type"]).config_from_hf(config)


def test_absent_keys_mean_what_they_mean_in_transformers() -> None:
    """The text config of Gemma 3 4B on the hub says no more than this."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34}
    text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    config = gemma.config_from_hf({"model_type": "gemma3", "text_config": text})
    assert (config.vocab_size, config.num_attention_heads, config.num_key_value_heads) == (262208, 8, 4)
    assert (config.head_dim, config.attention_scale, config.max_position_embeddings) == (256, 1 / 16, 131072)
    assert [kind.window for kind in config.kinds][:7] == [1024, 1024, 1024, 1024, 1024, None, 1024]
    assert [(rope.theta, rope.factor) for rope in config.ropes] == [(1e6, 8.0), (1e4, 1.0)]
    assert config.tie_word_embeddings and config.hidden_act == "gelu_pytorch_tanh"


def test_transformers_4_reads_the_longrope_that_is_written() -> None:
    """It insists on these three fields and no other."""
    config, original = hf.load_config(FIXTURES / "phi4_mini")
    written = phi.config_to_hf(config, None)
    assert written["rope_scaling"] == original["rope_scaling"]
    assert written["original_max_position_embeddings"] == 20 and written["partial_rotary_factor"] == 0.75
