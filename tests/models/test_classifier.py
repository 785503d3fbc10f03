"""Reward models as Hugging Face directories: what transformers wrote is read, scored as by torch, and written."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import transformers

from posttrain.config import MeshConfig, ModelConfig
from posttrain.data.packed import assemble
from posttrain.data.tokenizer import Tokenizer
from posttrain.errors import UserError, UserErrors
from posttrain.experiment import setup_model
from posttrain.models import classifier, hf
from posttrain.models.decoder import abstract_decoder
from posttrain.objectives.reward import segment_scores
from posttrain.parallel.sharding import flatten
from tests.tiny import write_model

FIXTURES = Path(__file__).parent.parent / "fixtures"
REWARD = FIXTURES / "reward"
ONE_DEVICE = MeshConfig(fsdp=1, data=8)


def edit(tmp_path: Path, source: Path, tensors: Any = None, **config: Any) -> Path:
    """A copy of a directory with some config keys and tensors changed; None takes a key away."""
    directory = tmp_path / "model"
    shutil.copytree(source, directory)
    raw = json.loads((directory / "config.json").read_text()) | config
    kept = {key: value for key, value in raw.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(kept))
    if tensors is not None:
        file = directory / "model.safetensors"
        safetensors.numpy.save_file(tensors(safetensors.numpy.load_file(file)), file)
    return directory


def setup(directory: Path, head: Any = "score", mesh: MeshConfig = ONE_DEVICE) -> Any:
    return setup_model(ModelConfig(path=str(directory)), mesh, head=head)


@pytest.mark.parametrize("name", ["untied", "tied"])
@pytest.mark.parametrize("packed", [True, False])
def test_scores_equal_torchs_with_padding_on_either_side(name: str, packed: bool) -> None:
    expected = np.load(REWARD / name / "expected.npz")
    rows = [(ids[:n], np.zeros(n, np.float32)) for ids, n in zip(expected["ids"], expected["lengths"], strict=True)]
    groups = [rows[:4], rows[4:]] if packed else [[row] for row in rows]
    config, _ = hf.load_config(REWARD / name)
    decoder = abstract_decoder(config)
    params = hf.load_params(REWARD / name, config, decoder.shapes)
    batch = assemble(groups, 160)

    @jax.jit
    def scores(params: Any) -> Any:
        return segment_scores(decoder.merge(params), batch, 6)

    found = np.asarray(scores(params))
    flat = np.concatenate([found[row, : len(group)] for row, group in enumerate(groups)])
    np.testing.assert_allclose(flat, expected["right"], atol=2e-5, rtol=0)
    np.testing.assert_allclose(flat, expected["left"], atol=2e-5, rtol=0)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("mesh", [ONE_DEVICE, MeshConfig(fsdp=4, tensor=2)])
@pytest.mark.parametrize("name", ["untied", "tied"])
def test_a_directory_of_transformers_goes_round_byte_equal(tmp_path: Path, name: str, mesh: MeshConfig) -> None:
    made = setup(REWARD / name, mesh=mesh)
    hf.export_hf(made.load(), made.config, tmp_path / "out", raw_config=made.raw_config)
    source, out = (safetensors.numpy.load_file(d / "model.safetensors") for d in (REWARD / name, tmp_path / "out"))
    assert out.keys() == source.keys()
    for key, array in source.items():
        assert out[key].dtype == array.dtype and out[key].tobytes() == array.tobytes(), key
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: written[key] for key in made.raw_config} == made.raw_config
    assert written.keys() - made.raw_config.keys() <= {"rope_theta", "rope_scaling"}


@pytest.mark.parametrize("name", ["biases", "tied"])
def test_a_language_model_becomes_a_reward_model(tmp_path: Path, name: str) -> None:
    source = FIXTURES / "llama" / name
    made = setup(source, mesh=MeshConfig(fsdp=4, tensor=2))
    assert made.new_score and "lm_head/kernel" not in flatten(made.decoder.shapes)
    params = made.load()
    assert not np.asarray(params["score"]["kernel"]).any() and params["score"]["kernel"].shape == (
        1,
        made.config.hidden_size,
    )
    params["score"]["kernel"] = jnp.ones_like(params["score"]["kernel"])
    hf.export_hf(params, made.config, tmp_path / "out", raw_config=made.raw_config)

    before = safetensors.numpy.load_file(source / "model.safetensors")
    after = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert after.keys() == before.keys() - {"lm_head.weight"} | {"score.weight"}
    assert all(after[key].tobytes() == before[key].tobytes() for key in before.keys() & after.keys())
    np.testing.assert_array_equal(after["score.weight"], np.ones((1, made.config.hidden_size)))

    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["architectures"] == ["LlamaForSequenceClassification"]
    read = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert read.num_labels == 1 and read.id2label == {0: "LABEL_0"} and read.label2id == {"LABEL_0": 0}
    again = setup(tmp_path / "out")
    assert not again.new_score and again.config == made.config
    np.testing.assert_array_equal(np.asarray(again.load()["score"]["kernel"]), 1.0)


def test_a_headless_language_model_starts_a_reward_model(tmp_path: Path) -> None:
    def headless(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {key.removeprefix("model."): value for key, value in tensors.items() if key != "lm_head.weight"}

    directory = edit(tmp_path, FIXTURES / "llama" / "biases", headless, architectures=["LlamaModel"])
    made = setup(directory)
    hf.export_hf(made.load(), made.config, tmp_path / "out", raw_config=made.raw_config)
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["architectures"] == ["LlamaForSequenceClassification"]
    assert "score.weight" in safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")


def test_a_vocabulary_projection_beside_the_score_is_not_read(tmp_path: Path) -> None:
    directory = edit(tmp_path, REWARD / "untied", lambda t: t | {"lm_head.weight": np.zeros((140, 32), np.float32)})
    assert setup(directory).load().keys() == {"embed", "layers", "final_norm", "score"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"id2label": {"0": "A", "1": "B"}}, "id2label: LlamaForSequenceClassification with 2 labels is not served"),
        ({"id2label": None, "label2id": None}, "num_labels: LlamaForSequenceClassification with 2 labels"),
        ({"num_labels": 3}, "num_labels: LlamaForSequenceClassification with 3 labels .* a reward model has 1"),
        ({"architectures": ["LlamaForTokenClassification"]}, "LlamaForTokenClassification.* is not served"),
    ],
)
def test_other_classifiers_are_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises((UserError, UserErrors), match=rf"config\.json: .*{message}"):
        hf.load_config(edit(tmp_path, REWARD / "untied", **config))


def test_one_label_may_be_said_by_number_alone(tmp_path: Path) -> None:
    directory = edit(tmp_path, REWARD / "untied", id2label=None, label2id=None, num_labels=1)
    assert hf.load_config(directory)[0].num_labels == 1


def test_a_missing_score_is_told(tmp_path: Path) -> None:
    directory = edit(tmp_path, REWARD / "untied", lambda t: {k: v for k, v in t.items() if k != "score.weight"})
    with pytest.raises(UserErrors, match=r"score\.weight: missing; shape \[1, 32\] is needed"):
        hf.check_weights(directory, hf.load_config(directory)[0])


def test_a_reward_model_is_no_language_model() -> None:
    with pytest.raises(UserError, match=r"a reward model \(LlamaForSequenceClassification\).*use posttrain score"):
        setup(REWARD / "untied", head="lm")
    config, _ = hf.load_config(REWARD / "tied")
    model = abstract_decoder(config).merge(abstract_params(config))
    with pytest.raises(ValueError, match="no vocabulary projection"):
        model.head()
    language, _ = hf.load_config(FIXTURES / "llama" / "tied")
    with pytest.raises(ValueError, match="no score head"):
        abstract_decoder(language).merge(abstract_params(language)).score_head()


def abstract_params(config: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract_decoder(config).shapes)


# ---- padding ---------------------------------------------------------------------------------------------------------


def test_the_end_token_does_not_pad(tmp_path: Path) -> None:
    """transformers scores the last token that is not `pad_token_id`: no text may end with that."""
    directory = write_model(tmp_path / "model")
    tokenizer = Tokenizer.load(str(directory))
    text = tokenizer.render([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
    found = classifier.pad_id(tokenizer)
    assert found not in (None, tokenizer.eos_id, tokenizer.bos_id, *tokenizer.encode(text))

    made = setup(directory)
    hf.export_hf(made.load(), made.config, tmp_path / "out", raw_config=made.raw_config, tokenizer=tokenizer)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pad_token_id"] == found
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.pad_token_id == found and again.eos_token_id == tokenizer.eos_id
    assert Tokenizer.load(str(tmp_path / "out")).encode(text) == tokenizer.encode(text)


def test_a_padding_token_of_its_own_stays(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "model")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        fields = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps(fields | {"pad_token": "<|eot|>"}))
    tokenizer = Tokenizer.load(str(directory))
    assert classifier.pad_id(tokenizer) == tokenizer.added_tokens["<|eot|>"]


def test_without_a_free_special_token_it_says_so(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    backend = {"version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": None}
    added = {"id": 1, "content": "</s>", "special": True}
    added |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    model = {"type": "BPE", "vocab": {"a": 0, "</s>": 1}, "merges": []}
    backend |= {"post_processor": None, "decoder": None, "added_tokens": [added], "model": model}
    (tmp_path / "tokenizer.json").write_text(json.dumps(backend))
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(fields))
    assert classifier.pad_id(Tokenizer.load(str(tmp_path))) == 1
    assert "no special token is free to pad with" in caplog.text
    assert classifier.pad_id(None) is None
