"""A tiny model directory and chats for whole-program tests, written when they are needed."""

import json
import shutil
from pathlib import Path

import jax

from posttrain.data.tokenizer import Tokenizer
from posttrain.models import hf
from posttrain.models.decoder import init_params

TOKENIZER = Path(__file__).parent / "fixtures" / "chat"

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "bos_token_id": 1,
    "dtype": "float32",
    "eos_token_id": 3,
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
    "mlp_bias": False,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": False,
}


def write_model(directory: Path) -> Path:
    """A random Llama with the tests' tokenizer and a ChatML template, as a Hugging Face directory."""
    tokenizer = Tokenizer.load(str(TOKENIZER), chat_template="chatml")
    raw = CONFIG | {"vocab_size": tokenizer.vocab_size}
    scratch = directory.with_name(directory.name + "-config")
    scratch.mkdir(parents=True)
    (scratch / "config.json").write_text(json.dumps(raw))
    config, _ = hf.load_config(scratch)
    shutil.rmtree(scratch)
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    generation = {"eos_token_id": tokenizer.eos_id}
    hf.export_hf(params, config, directory, raw_config=raw, tokenizer=tokenizer, generation_config=generation)
    return directory


def write_base_model(directory: Path, *, tied: bool = False) -> Path:
    """As `write_model`, with a tokenizer that has no special token and no chat template: a model of plain text."""
    content = json.loads((TOKENIZER / "tokenizer.json").read_text())
    scratch = directory.with_name(directory.name + "-config")
    scratch.mkdir(parents=True)
    plain = content | {"added_tokens": [], "post_processor": None}
    (scratch / "tokenizer.json").write_text(json.dumps(plain))
    (scratch / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    tokenizer = Tokenizer.load(str(scratch))
    raw = {key: value for key, value in CONFIG.items() if key not in ("bos_token_id", "eos_token_id")}
    raw |= {"vocab_size": tokenizer.vocab_size, "tie_word_embeddings": tied}
    (scratch / "config.json").write_text(json.dumps(raw))
    config, _ = hf.load_config(scratch)
    shutil.rmtree(scratch)
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    hf.export_hf(params, config, directory, raw_config=raw, tokenizer=tokenizer)
    return directory


def write_chats(path: Path, count: int) -> None:
    """Short conversations of unequal lengths, all different."""
    rows = []
    for i in range(count):
        turns = []
        for turn in range(1 + i % 3):
            turns.append({"role": "user", "content": f"What is {i} and {turn}?"})
            turns.append(
                {"role": "assistant", "content": "It is " + " ".join(["small"] * (1 + i % 5)) + f" {i + turn}."}
            )
        rows.append(json.dumps({"messages": turns}))
    path.write_text("\n".join(rows) + "\n")
