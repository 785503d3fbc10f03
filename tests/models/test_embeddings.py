"""Embedding rows of new tokens: means of the old rows in float64, on any mesh and dtype, and nothing else changed."""

import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
import transformers
from jax.sharding import Mesh

from posttrain.config import MeshConfig, ModelConfig
from posttrain.data.chat import encode_rows
from posttrain.data.rows import Row
from posttrain.data.tokenizer import Tokenizer
from posttrain.data.tokenizer_files import add_tokens
from posttrain.errors import UserError, UserErrors
from posttrain.experiment import setup_model
from posttrain.models import embeddings, hf
from posttrain.models.embeddings import NewRows, grow_vocabulary, mean_row
from posttrain.models.weights import CheckpointReader
from posttrain.parallel.sharding import flatten

FIXTURES = Path(__file__).parent.parent / "fixtures" / "llama"
TABLES = {"embed/embedding": "model.embed_tokens.weight", "lm_head/kernel": "lm_head.weight"}


def tokenizer(size: int, *new: str) -> Tokenizer:
    """`size` tokens, and the new ones behind them."""
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0")
    hf = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words))
    return Tokenizer(hf, source="words", new_tokens=add_tokens(hf, new, "words"))


def load(directory: Path, tok: Tokenizer | None, mesh: MeshConfig | None = None, dtype: str = "float32") -> Any:
    config = ModelConfig(path=str(directory), params_dtype=dtype)
    setup = setup_model(config, mesh or MeshConfig(data=8, fsdp=1), tok)
    return setup, flatten(setup.load())


def expected(name: str, directory: Path, setup: Any, known: int, new: slice) -> np.ndarray:
    """The stored table, padded with zeros, and the float64 mean in the new rows."""
    table = safetensors.numpy.load_file(directory / "model.safetensors")[name].astype(np.float64)
    padded = np.zeros((setup.config.padded_vocab_size, table.shape[1]))
    padded[: len(table)] = table
    padded[new] = table[:known].mean(axis=0)
    return padded


CASES = {
    "rows are added": ("biases", 140, 5, 145),
    "unused rows are taken": ("tied", 200, 3, 250),
    "some of each": ("tied", 248, 4, 252),
    "beyond the padding": ("tied", 250, 10, 260),
}
MESHES = {"whole": MeshConfig(data=8, fsdp=1), "fsdp 4 x tensor 2": MeshConfig(fsdp=4, tensor=2)}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("case", CASES)
def test_new_rows_are_means_of_the_old_ones(case: str, mesh: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "BLOCK_ROWS", 64)  # several blocks, the last one short
    fixture, known, count, vocab = CASES[case]
    directory = FIXTURES / fixture
    setup, params = load(directory, tokenizer(known, *map(str, range(count))), MESHES[mesh])
    assert setup.config.vocab_size == vocab
    tables = [path for path in TABLES if path in params]
    assert len(tables) == (2 if fixture == "biases" else 1)
    for path in tables:
        want = expected(TABLES[path], directory, setup, known, slice(known, known + count))
        np.testing.assert_array_equal(np.asarray(params[path]), want.astype(np.float32), err_msg=path)
        shard = params[path].addressable_shards[0].data
        assert shard.size * (1 if mesh == "whole" else 8) == want.size
    _, plain = load(directory, None)
    for path, value in plain.items():
        if path not in TABLES:
            np.testing.assert_array_equal(np.asarray(params[path]), np.asarray(value), err_msg=path)


def test_the_mean_is_rounded_once_to_another_dtype() -> None:
    setup, params = load(FIXTURES / "tied", tokenizer(250, "<A>"), dtype="bfloat16")
    want = expected(TABLES["embed/embedding"], FIXTURES / "tied", setup, 250, slice(250, 251))
    embedding = np.asarray(params["embed/embedding"])
    assert embedding.dtype == jnp.bfloat16
    np.testing.assert_array_equal(embedding, want.astype(np.float32).astype(ml_dtypes.bfloat16))


def test_the_mean_is_exact_where_float32_sums_are_not() -> None:
    rows = np.full((3000, 2), 0.1, np.float32)
    rows[0], rows[-1] = 1e6, -1e6
    mean = mean_row(lambda start, stop: rows[start:stop], len(rows))
    np.testing.assert_allclose(mean, rows.astype(np.float64).mean(axis=0), rtol=1e-12)
    assert abs(np.add.accumulate(rows)[-1, 0] / 3000 - mean[0]) > 1e-6


def test_a_device_reads_its_columns_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the mean, no more than a block of a device's columns at a time."""
    monkeypatch.setattr(embeddings, "BLOCK_ROWS", 50)
    sizes = []
    read = CheckpointReader.read

    def recording(self: CheckpointReader, name: str, ranges: tuple[slice, ...]) -> np.ndarray:
        values = read(self, name, ranges)
        if name in TABLES.values():
            sizes.append(values.shape)
        return values

    monkeypatch.setattr(CheckpointReader, "read", recording)
    load(FIXTURES / "tied", tokenizer(250, "<A>"), MeshConfig(fsdp=4, tensor=2))
    # 256 rows over tensor 2, 48 columns over fsdp 4: two parts of the table, and the mean in blocks for the second.
    parts = [(128, 12), (122, 12)]
    assert sorted(sizes) == sorted([*parts * 4, *[(50, 12)] * 5 * 4])


def test_a_tokenizer_of_another_model_is_refused() -> None:
    config, _ = hf.load_config(FIXTURES / "biases")
    for tok in (tokenizer(141), tokenizer(141, "<A>")):
        with pytest.raises(UserError, match="it has 141 tokens, the model's embedding only 140"):
            grow_vocabulary(config, tok)
    assert grow_vocabulary(config, tokenizer(100)) == (config, NewRows({}, 100))


def picture_tokenizer(*new: str) -> Tokenizer:
    """140 words, as the model has rows, and a special token behind them."""
    plain = tokenizer(140)._hf
    plain.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    plain.add_special_tokens({"additional_special_tokens": ["<picture>"], "eos_token": "w1"})
    return Tokenizer(plain, source="words", new_tokens=add_tokens(plain, new, "words"))


def test_a_special_token_may_have_no_row_and_then_no_text_may_have_it() -> None:
    """As `<image_soft_token>` of Gemma 3's text models."""
    config, _ = hf.load_config(FIXTURES / "biases")
    tok = picture_tokenizer()
    before = tok.fingerprint
    assert grow_vocabulary(config, tok) == (config, NewRows({}, 140))
    assert tok.tokens_without_row == {"<picture>": 140} and tok.fingerprint != before
    texts = ["w3 w4", "w3 <picture> w4"]
    rows = [Row("rows.jsonl", line, "text", text=text) for line, text in enumerate(texts, 1)]
    (sample,), bad = encode_rows(rows, tok)
    assert sample.tokens.tolist() == [3, 4, 1]
    assert str(bad) == (
        "rows.jsonl:2: '<picture>' is a token that the model has no embedding for; fix: take it out of the text"
    )


def test_it_gets_a_row_where_one_is_added_behind_it() -> None:
    config, _ = hf.load_config(FIXTURES / "biases")
    tok = picture_tokenizer("<A>")
    grown, new = grow_vocabulary(config, tok)
    assert grown.vocab_size == 142 and new == NewRows({"<picture>": 140, "<A>": 141}, 140)
    assert tok.tokens_without_row == {}
    _, params = load(FIXTURES / "biases", picture_tokenizer("<A>"))
    table = np.asarray(params["embed/embedding"])
    np.testing.assert_array_equal(table[140], table[141])


def test_files_with_fewer_rows_than_they_say_are_refused(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(FIXTURES / "tied", directory)
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:249]
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    setup = setup_model(ModelConfig(path=str(directory)), MeshConfig(data=8, fsdp=1), tokenizer(250, "<A>"))
    for check in (setup.load, lambda: hf.check_weights(directory, setup.config)):
        with pytest.raises(UserErrors, match=r"embed_tokens\.weight: shape \[249, 48\]; \[250, 48\] is needed"):
            check()


def test_rows_that_nothing_fills_are_a_programming_error() -> None:
    setup = setup_model(
        ModelConfig(path=str(FIXTURES / "tied")), MeshConfig(data=8, fsdp=1), tokenizer(250, "<A>", "<B>")
    )
    assert isinstance(setup.mesh, Mesh)
    with pytest.raises(ValueError, match="250 of 252 rows, and not all others are new"):
        hf.load_params(setup.directory, setup.config, setup.abstract_params, NewRows({"<A>": 250}, 250))


def test_what_became_of_the_tokens_in_one_line() -> None:
    rows = NewRows({"<A>": 7000, "<B>": 7001}, 7000)
    assert rows.describe(["<A>", "<eos>", "<B>"]) == (
        "<A> 7000, <B> 7001 (rows start as the mean of the 7,000 before); in the vocabulary already, rows kept: <eos>"
    )
    assert NewRows({}, 7).describe(["<eos>"]) == "none; in the vocabulary already, rows kept: <eos>"
