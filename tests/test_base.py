"""From a base model to an assistant: tokens and a template are added, it is trained, exported, and ends its turns."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from etils import epath
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from posttrain.config import Config, MeshConfig, load_config, parse_config
from posttrain.convert import ExportOptions, export_run
from posttrain.data.builtin_templates import config_line
from posttrain.data.tokenizer import Tokenizer
from posttrain.errors import UserError, UserErrors
from posttrain.evaluate import EvaluateOptions, evaluate
from posttrain.experiment import build, check_config
from posttrain.generate import GenerateOptions, generate_file
from posttrain.train.loop import export_once, run
from posttrain.train.overview import describe
from tests.tiny import write_base_model

ROOT = Path(__file__).parent.parent
TOKENS = ["<START>", "<USER>", "<ASSISTANT>", "<END>"]
CHATS = {
    "What is the capital of France?": "Paris.",
    "Who are you?": "A small model.",
    "How to answer?": "In short sentences, says the system.",
    "add(1, 2)": "3",
    "And the river?": "It is the Seine.",
    "你好": "Größe, 日本語.",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base models with tied and untied embeddings, and chats."""
    root = tmp_path_factory.mktemp("base")
    write_base_model(root / "untied")
    write_base_model(root / "tied", tied=True)
    rows = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
        for asked, said in CHATS.items()
    ]
    (root / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def settings(root: Path, run_dir: Path, steps: int, **changes: dict[str, Any]) -> dict[str, Any]:
    raw: dict[str, dict[str, Any]] = {
        "run": {"dir": str(run_dir)},
        "model": {"path": str(root / "untied")},
        "tokenizer": {"chat_template": "minimal", "add_special_tokens": TOKENS, "eos_token": "<END>"},
        "data": {
            "train": [{"path": str(root / "chats.jsonl")}],
            "heldout": {"fraction": 0},
            "max_length": 64,
            "row_length": 64,
            "cache_dir": str(root / "tokens"),
        },
        "train": {"global_batch_size": 4, "max_steps": steps},
        "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.1},
        "mesh": {"fsdp": 4, "tensor": 2},
        "checkpoint": {"every": max(1, steps // 2), "keep_best": 0},
        "log": {"tensorboard": False},
    }
    return {name: raw.get(name, {}) | changes.get(name, {}) for name in raw.keys() | changes.keys()}


def config(root: Path, run_dir: Path, steps: int, **changes: dict[str, Any]) -> Config:
    return parse_config(settings(root, run_dir, steps, **changes), "test")


def weights(directory: Path) -> dict[str, np.ndarray]:
    return load_file(directory / "model.safetensors")


@pytest.fixture(scope="module")
def assistant(root: Path) -> Path:
    """The run directory of the base model trained on the chats, on 4 x 2 devices."""
    run_dir = root / "assistant"
    assert run(build(config(root, run_dir, 120))).export_dir is not None
    return run_dir


def answers(model: Path, tmp_path: Path) -> list[dict[str, Any]]:
    prompts = [{"prompt": [{"role": "user", "content": asked}]} for asked in CHATS]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    out = tmp_path / "answers.jsonl"
    generate_file(
        GenerateOptions(model=str(model), rows=str(tmp_path / "prompts.jsonl"), out=str(out), max_new_tokens=40)
    )
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_the_exported_model_answers_and_stops_when_its_turn_is_over(assistant: Path, tmp_path: Path) -> None:
    rows = answers(assistant / "export", tmp_path)
    assert [(row["completion"], row["finish_reason"]) for row in rows] == [(said, "stop") for said in CHATS.values()]
    end = AutoTokenizer.from_pretrained(assistant / "export").convert_tokens_to_ids("<END>")
    assert all(row["completion_ids"][-1] == end and row["completion_ids"].count(end) == 1 for row in rows)


def test_before_training_it_does_not(root: Path, tmp_path: Path) -> None:
    built = build(config(root, tmp_path / "run", 3))
    export_once(built, built.model.load(), epath.Path(tmp_path / "base"))
    rows = answers(tmp_path / "base", tmp_path)
    assert [row["finish_reason"] for row in rows] == ["length"] * len(CHATS)


def test_the_exported_files_agree_on_vocabulary_and_stop_token(root: Path, assistant: Path) -> None:
    export = assistant / "export"
    size = Tokenizer.load(str(root / "untied")).vocab_size
    ids = dict(zip(TOKENS, range(size, size + 4), strict=True))
    written = json.loads((export / "config.json").read_text())
    assert written["vocab_size"] == size + 4 and written["eos_token_id"] == ids["<END>"]
    assert json.loads((export / "generation_config.json").read_text()) == {"eos_token_id": ids["<END>"]}
    tensors = weights(export)
    assert tensors["model.embed_tokens.weight"].shape == tensors["lm_head.weight"].shape == (size + 4, 32)
    hf = AutoTokenizer.from_pretrained(export)
    assert hf.convert_tokens_to_ids(TOKENS) == list(ids.values()) and hf.eos_token == "<END>" and len(hf) == size + 4
    chat = [{"role": "user", "content": "Who are you?"}]
    assert (
        hf.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        == "<START><USER>Who are you?<ASSISTANT>"
    )


def test_export_of_the_checkpoint_is_the_run_s_own(assistant: Path, tmp_path: Path) -> None:
    export_run(ExportOptions(run=str(assistant), out=str(tmp_path / "out"), mesh=MeshConfig(data=8, fsdp=1)))
    names = {path.name for path in (assistant / "export").iterdir()}
    assert names == {path.name for path in (tmp_path / "out").iterdir()} and "chat_template.jinja" in names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (assistant / "export" / name).read_bytes(), name


def test_a_resumed_run_finds_the_same_tokens_and_goes_on_bit_for_bit(
    assistant: Path, root: Path, tmp_path: Path
) -> None:
    shutil.copytree(assistant, tmp_path / "run")
    for name in ("export", "checkpoints/120"):
        shutil.rmtree(tmp_path / "run" / name)
    run(build(config(root, tmp_path / "run", 120)))
    for name, value in weights(assistant / "export").items():
        np.testing.assert_array_equal(weights(tmp_path / "run" / "export")[name], value, err_msg=name)


def test_a_checkpoint_with_another_vocabulary_is_refused(assistant: Path, root: Path) -> None:
    other = {"tokenizer": {"chat_template": "minimal", "add_special_tokens": [*TOKENS, "<X>"], "eos_token": "<END>"}}
    changed = config(root, assistant, 120, **other)
    with pytest.raises(
        UserErrors, match=r"tokenizer\.add_special_tokens: the run in .* has .*'<END>'\], this config has .*'<X>'\]"
    ):
        run(build(changed))
    with pytest.raises(UserError, match=r"embedding has 444 rows, new tokens 440 <START>.*444 <X>; restore tokenizer"):
        evaluate(changed, EvaluateOptions(checkpoint="latest", split="train"))


def test_one_device_is_the_same_run(root: Path, tmp_path: Path) -> None:
    run(build(config(root, tmp_path / "many", 4)))
    (tmp_path / "one.yaml").write_text(
        yaml.safe_dump(settings(root, tmp_path / "one", 4, mesh={"fsdp": 1, "tensor": 1}))
    )
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "xla-tests")}
    words = [sys.executable, "-m", "posttrain.cli", "train", str(tmp_path / "one.yaml")]
    done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "new tokens: <START> 440, <USER> 441" in done.stdout + done.stderr
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("many", "one")
    ]
    assert len(losses[0]) == 4
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    other = weights(tmp_path / "one" / "export")
    for name, value in weights(tmp_path / "many" / "export").items():
        np.testing.assert_allclose(value, other[name], rtol=0, atol=2e-4 * np.abs(value).max(), err_msg=name)


@pytest.mark.parametrize("model", ["tied", "untied"])
def test_only_new_tokens_leaves_all_else_bitwise(root: Path, tmp_path: Path, model: str) -> None:
    trained = {"learning_rate": 1e-2, "weight_decay": 0.1, "only_new_tokens": True}
    built = build(config(root, tmp_path / "run", 3, model={"path": str(root / model)}, optimizer=trained))
    tables = ["embed/embedding", *(["lm_head/kernel"] if model == "untied" else [])]
    assert list(built.optimizer.trained) == tables
    run(built)
    before, after = weights(root / model), weights(tmp_path / "run" / "export")
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name][: len(value)], value, err_msg=name)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in after:
            new = after[name][len(before[name]) :]
            assert new.shape == (4, 32)
            moved = np.abs(new - before[name].astype(np.float64).mean(axis=0)).max(axis=1)
            # <START> is never predicted and <END> never fed: one of the two tables has no gradient for them.
            unmoved = {"model.embed_tokens.weight": [3], "lm_head.weight": [0]}[name] if model == "untied" else []
            assert (moved[[i for i in range(4) if i not in unmoved]] > 1e-3).all()


def test_what_was_added_is_shown(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    describe(build(config(root, tmp_path / "run", 3, optimizer={"only_new_tokens": True})))
    said = " ".join(capsys.readouterr().out.split())
    assert "new tokens" in said and "mean of the 440 before" in said and "4 of 512 rows" in said


def test_the_example_config_says_what_the_errors_ask_for() -> None:
    example = load_config(str(ROOT / "configs" / "base.yaml"))
    asked = yaml.safe_load(config_line("minimal", ()))
    assert check_config(example) == []
    assert example.tokenizer == parse_config(asked, "error").tokenizer


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_a_base_model_without_a_template_says_what_to_write(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no chat template") as caught:
        build(
            config(
                root,
                tmp_path / "run",
                3,
                tokenizer={"chat_template": None, "add_special_tokens": [], "eos_token": None},
            )
        )
    line = yaml.safe_load(str(caught.value).split("  ")[-1])
    assert line == {"tokenizer": {"chat_template": "minimal", "add_special_tokens": TOKENS, "eos_token": "<END>"}}


def test_token_settings_that_cannot_be_meant(root: Path, tmp_path: Path) -> None:
    wrong = {"tokenizer": {"add_special_tokens": ["<A>", " ", "<A>"]}}
    assert check_config(config(root, tmp_path, 3, **wrong)) == [
        "tokenizer.add_special_tokens: ' ': a token needs visible text",
        "tokenizer.add_special_tokens: '<A>' stands there twice; remove one",
    ]
    none = config(root, tmp_path, 3, tokenizer={"add_special_tokens": []}, optimizer={"only_new_tokens": True})
    assert any(problem.startswith("optimizer.only_new_tokens") for problem in check_config(none))


def test_only_new_tokens_where_all_are_known(assistant: Path, root: Path, tmp_path: Path) -> None:
    again = {"model": {"path": str(assistant / "export")}, "optimizer": {"only_new_tokens": True}}
    with pytest.raises(UserError, match=r"optimizer\.only_new_tokens: there are none"):
        build(config(root, tmp_path / "run", 3, **again))
