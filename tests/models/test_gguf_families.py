"""GGUF files of Qwen 2, Qwen 3 and Gemma 3, written here from checkpoints that torch has run, and what their import
gives; and the real Gemma 3 tokenizer inside a GGUF file."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from gguf import TokenType

from posttrain.data.tokenizer import Tokenizer
from posttrain.errors import UserErrors
from posttrain.models.architecture import LayerKind
from posttrain.models.gguf import import_gguf
from posttrain.models.hf import load_config
from tests.models.test_gguf import write_gguf

FIXTURES = Path(__file__).parent.parent / "fixtures" / "families"

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
}
GEMMA_NAMES = NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
"""As llama.cpp's converter names tensors (`gguf-py/gguf/tensor_mapping.py`)."""

KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}


def gguf_file(tmp_path: Path, fixture: str, architecture: str, **metadata: Any) -> tuple[Path, dict[str, np.ndarray]]:
    """A GGUF file of a fixture, as llama.cpp's converter makes one, and the fixture's tensors in float32."""
    raw = json.loads((FIXTURES / fixture / "config.json").read_text())
    gemma = architecture == "gemma3"
    stored = safetensors.numpy.load_file(FIXTURES / fixture / "model.safetensors")
    tensors = {name: value.astype(np.float32) for name, value in stored.items()}
    renamed = {}
    for name, value in tensors.items():
        module, _, kind = name.rpartition(".")
        if module.startswith("model.layers."):
            _, _, layer, rest = module.split(".", 3)
            new = f"blk.{layer}.{(GEMMA_NAMES if gemma else NAMES)[rest]}.{kind}"
        else:
            new = f"{NAMES[module]}.{kind}"
        renamed[new] = value + np.float32(1) if gemma and "norm" in name else value
    values: dict[str, Any] = {f"{architecture}.{key}": raw[name] for key, name in KEYS.items()}
    values |= {f"{architecture}.{key}": value for key, value in metadata.items()}
    values |= tokenizer_metadata(raw["vocab_size"])
    values = {key: value for key, value in values.items() if value is not None}
    return write_gguf(tmp_path / "m.gguf", {"general.architecture": architecture, **values}, renamed), tensors


def tokenizer_metadata(size: int) -> dict[str, Any]:
    kinds = [TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (size - 3)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(size - 3))],
        "tokenizer.ggml.scores": [0.0] * size,
        "tokenizer.ggml.token_type": [int(kind) for kind in kinds],
        "tokenizer.ggml.add_space_prefix": False,
    }


def imported(path: Path, out: Path) -> tuple[Any, dict[str, np.ndarray]]:
    import_gguf(path, out)
    return load_config(out)[0], safetensors.numpy.load_file(out / "model.safetensors")


@pytest.mark.parametrize("fixture", ["qwen2", "qwen3"])
def test_qwen_comes_back_as_it_was(tmp_path: Path, fixture: str) -> None:
    sizes = {"attention.key_length": 12, "attention.value_length": 12} if fixture == "qwen3" else {}
    path, tensors = gguf_file(tmp_path, fixture, fixture, **sizes)
    config, found = imported(path, tmp_path / "out")
    assert config == load_config(FIXTURES / fixture)[0]
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_gemma_3_comes_back_as_it_was(tmp_path: Path) -> None:
    sizes = {"attention.key_length": 8, "attention.value_length": 8, "attention.sliding_window": 7}
    path, tensors = gguf_file(tmp_path, "gemma3_text", "gemma3", **sizes, **{"rope.freq_base_swa": 100.0})
    config, found = imported(path, tmp_path / "out")
    # GGUF cannot say what queries are scaled by; llama.cpp takes the head size.
    want = dataclasses.replace(load_config(FIXTURES / "gemma3_text")[0], attention_scale=8**-0.5)
    assert config == want
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        # (w + 1) - 1 in float32 may lose the last bits of w.
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1.2e-7 if "norm" in name else 0, err_msg=name)


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ({}, "layer_kinds", (*[LayerKind(7, 1)] * 5, LayerKind(None, 0))),
        ({"attention.sliding_window_pattern": 2}, "layer_kinds", (LayerKind(7, 1), LayerKind(None, 0))),
        (
            {"attention.sliding_window_pattern": [1, 1, 0, 1, 1, 0, 1, 1]},
            "layer_kinds",
            (LayerKind(7, 1), LayerKind(7, 1), LayerKind(None, 0)),
        ),
        ({"attention.sliding_window": None}, "layer_kinds", (LayerKind(None, 0),)),
        ({"final_logit_softcapping": 30.0}, "logit_softcap", 30.0),
    ],
    ids=["default", "pattern", "list", "no window", "softcap"],
)
def test_what_gemma_3_leaves_unsaid(tmp_path: Path, change: dict[str, Any], field: str, value: Any) -> None:
    sizes = {"attention.key_length": 8, "attention.value_length": 8, "attention.sliding_window": 7}
    path, _ = gguf_file(tmp_path, "gemma3_text", "gemma3", **(sizes | change))
    config, _ = imported(path, tmp_path / "out")
    assert getattr(config, field) == value
    assert [rope.theta for rope in config.ropes] == [10000.0, 10000.0]


def test_only_the_global_layers_of_gemma_3_are_scaled(tmp_path: Path) -> None:
    sizes = {"attention.key_length": 8, "attention.value_length": 8, "attention.sliding_window": 7}
    scaling = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    path, _ = gguf_file(tmp_path, "gemma3_text", "gemma3", **sizes, **scaling)
    config, _ = imported(path, tmp_path / "out")
    assert [(rope.scaling, rope.factor) for rope in config.ropes] == [("linear", 8.0), ("none", 1.0)]


def test_a_missing_norm_is_named_as_the_file_has_it(tmp_path: Path) -> None:
    sizes = {"attention.key_length": 8, "attention.value_length": 8, "attention.sliding_window": 7}
    path, _ = gguf_file(tmp_path, "gemma3_text", "gemma3", **sizes, block_count=9)
    with pytest.raises(UserErrors, match=r"model.layers.8.self_attn.q_norm.weight: missing; shape \[8\] is needed"):
        import_gguf(path, tmp_path / "out")


@pytest.mark.acceptance
def test_the_tokenizer_of_gemma_3_is_the_one_of_its_authors(gemma3: Path, shared: Path) -> None:
    """From sentencepiece pieces and scores, against the tokenizer.json that is distributed with the model."""
    vocabularies = os.environ.get("POSTTRAIN_VOCABULARIES", "")
    if not Path(vocabularies, "gemma3", "tokenizer.json").is_file():
        pytest.skip("POSTTRAIN_VOCABULARIES does not name a directory with gemma3/tokenizer.json (see README, Tests)")
    ours, theirs = Tokenizer.load(str(gemma3)), Tokenizer.load(str(Path(vocabularies, "gemma3")))
    texts = ["<start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n", "  a   b\n\n\n\tc", "你好 🙂🙂 ǅ ß"]
    for line in (shared / "data" / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:300]:
        texts += json.loads(line).values()
    for file in sorted((shared / "data" / "tok-llamacpp-vocab").glob("*.inp"))[:1]:
        texts += file.read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    for text in texts:
        ids = ours.encode(text, add_special_tokens=True)
        assert ids == theirs.encode(text, add_special_tokens=True), text
        assert ours.decode(ids) == theirs.decode(ids)
