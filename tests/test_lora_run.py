"""LoRA as a user runs it: one config line more, killed and resumed, exported, merged, and as DPO's reference."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from etils import epath
from safetensors.numpy import load_file, save_file

from posttrain import cli
from posttrain.config import Config, parse_config
from posttrain.errors import UserError, UserErrors
from posttrain.experiment import build, setup_model
from posttrain.parallel.sharding import flatten
from posttrain.records import Params
from posttrain.train import loop
from posttrain.train.checkpoint import Checkpoints
from posttrain.train.setup import ModelSetup
from tests.tiny import write_chats, write_model

TIMES = ("time", "step_time", "tokens_per_second", "mfu", "seconds_left")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("lora")
    write_model(directory / "model")
    write_chats(directory / "chats.jsonl", 80)
    with open(directory / "pairs.jsonl", "w") as file:
        for i in range(24):
            prompt = [{"role": "user", "content": f"What is {i}?"}]
            sides = {side: [{"role": "assistant", "content": f"{word} {i}."}] for side, word in WORDS.items()}
            file.write(json.dumps({"prompt": prompt, **sides}) + "\n")
    return directory


WORDS = {"chosen": "It is surely the number", "rejected": "Who knows? Not me, and not"}


def config(root: Path, run_dir: Path, **sections: Any) -> Config:
    raw: dict[str, Any] = {
        "run": {"dir": str(run_dir)},
        "model": {"path": str(root / "model"), "lora": {"r": 4, "dropout": 0.2}},
        "data": {
            "train": [{"path": str(root / "chats.jsonl")}],
            "heldout": {"fraction": 0.1},
            "max_length": 128,
            "row_length": 128,
            "cache_dir": str(root / "cache"),
        },
        "train": {"global_batch_size": 8, "micro_batch_size": 4, "max_steps": 6},
        "optimizer": {"learning_rate": 1e-2, "warmup_ratio": 0.0, "weight_decay": 0.1},
        "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
        "checkpoint": {"every": 3},
        "evaluate": {"every": 3},
        "log": {"tensorboard": False},
    }
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section}
    return parse_config(raw, "test")


def logged(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def adapter(run_dir: Path) -> dict[str, np.ndarray]:
    return load_file(run_dir / "export" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def finished(root: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """A run directory, and the parameters that the run ended with."""
    ended: dict[str, np.ndarray] = {}
    export = loop.export_once

    def keep(experiment: Any, params: Params, directory: Any) -> Any:
        ended.update({path: np.asarray(leaf) for path, leaf in flatten(params).items()})
        return export(experiment, params, directory)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "export_once", keep)
        loop.run(build(config(root, root / "run")))
    return root / "run", ended


def test_it_learns_and_the_base_stays_as_it_was_bit_for_bit(root: Path, finished: Any) -> None:
    run_dir, ended = finished
    losses = [line["eval_loss"] for line in logged(run_dir) if "eval_loss" in line]
    assert losses[-1] < losses[0] - 0.2
    stored = flatten(setup_model(config(root, run_dir).model.model_copy(update={"lora": no_lora()}), mesh()).load())
    for path, leaf in stored.items():
        np.testing.assert_array_equal(ended[path], np.asarray(leaf), err_msg=path)
    assert len(ended) == len(stored) + 14
    assert all(np.abs(ended[path]).max() > 1e-4 for path in ended if path.endswith("lora_b"))


def no_lora() -> Any:
    return parse_config({}, "test").model.lora


def mesh() -> Any:
    return parse_config({"mesh": {"data": 8, "fsdp": 1}}, "test").mesh


def test_a_checkpoint_holds_the_adapter_and_its_moments_only(root: Path, finished: Any) -> None:
    run_dir, ended = finished
    checkpoints = Checkpoints(epath.Path(run_dir), config(root, run_dir).checkpoint, read_only=True)
    own = sum(leaf.nbytes for path, leaf in ended.items() if "/lora_" in path)
    base = sum(leaf.nbytes for path, leaf in ended.items() if "/lora_" not in path)
    for step in checkpoints.steps():
        arrays = run_dir / "checkpoints" / str(step) / "state" / "d"
        assert 2 * own < sum(path.stat().st_size for path in arrays.iterdir()) < 3 * own + 20_000 < base


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit_with_dropout(
    root: Path, finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(profile: Any, done: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop._Profile, "after", die)
        with pytest.raises(KeyboardInterrupt):
            loop.run(build(config(root, tmp_path / "run")))
    assert logged(tmp_path / "run")[-1]["step"] == 4
    loop.run(build(config(root, tmp_path / "run", run={"resume": "must"})))
    assert logged(tmp_path / "run") == logged(finished[0])
    expected = adapter(finished[0])
    for name, values in adapter(tmp_path / "run").items():
        np.testing.assert_array_equal(values, expected[name], err_msg=name)


def test_on_another_mesh_it_is_the_same_run(root: Path, finished: Any, tmp_path: Path) -> None:
    loop.run(build(config(root, tmp_path / "run", mesh={"data": 1, "fsdp": 4, "tensor": 2})))
    for mine, theirs in zip(logged(tmp_path / "run"), logged(finished[0]), strict=True):
        for name, value in theirs.items():
            assert mine[name] == pytest.approx(value, rel=1e-4), (name, mine["step"])


def test_a_changed_base_is_refused(root: Path, finished: Any, tmp_path: Path) -> None:
    shutil.copytree(finished[0], tmp_path / "run")
    shutil.copytree(root / "model", tmp_path / "model")
    changed = config(root, tmp_path / "run", model={"path": str(tmp_path / "model")})
    file = tmp_path / "run" / "config.yaml"
    file.write_text(file.read_text().replace(str(root / "model"), str(tmp_path / "model")))
    loop.run(build(changed))  # the same model elsewhere
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="the model that it was trained on is not the one that is now in"):
        loop.run(build(changed))


def run_cli(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(words))
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_one_config_line_and_the_commands_on_what_comes_out(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = config(root, tmp_path / "run", model={"lora": {}}, train={"max_steps": 3}).model_dump(mode="json")
    del full["model"]["lora"], full["objective"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(full))
    assert run_cli("train", str(tmp_path / "config.yaml"), "--model.lora.r", "4") == 0
    assert "merged into its model: posttrain export" in capsys.readouterr().err
    run, on = str(tmp_path / "run"), ("--mesh.fsdp", "8")
    assert run_cli("export", run, str(tmp_path / "adapter"), *on) == 0
    assert run_cli("export", run, str(tmp_path / "merged"), "--merge", *on) == 0
    assert run_cli("export", str(tmp_path / "adapter"), str(tmp_path / "again"), "--merge", *on) == 0
    written = [load_file(tmp_path / name / "model.safetensors") for name in ("merged", "again")]
    for name, values in written[0].items():
        np.testing.assert_array_equal(values, written[1][name], err_msg=name)
    for name, values in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items():
        np.testing.assert_array_equal(values, adapter(tmp_path / "run")[name])
    models = {"adapter": "adapter", "merged": "merged", "base": str(root / "model")}
    for name, model in models.items():
        out = str(tmp_path / f"{name}.jsonl")
        assert run_cli("logprobs", str(tmp_path / model), str(root / "chats.jsonl"), "--out", out, *on) == 0
    lines = {name: (tmp_path / f"{name}.jsonl").read_text().splitlines() for name in models}
    logps = {name: np.concatenate([json.loads(row)["logprobs"][1:] for row in rows]) for name, rows in lines.items()}
    np.testing.assert_allclose(logps["adapter"], logps["merged"], rtol=0, atol=5e-5)
    assert np.abs(logps["adapter"] - logps["base"]).max() > 0.01
    (tmp_path / "rows.jsonl").write_text('{"messages": [{"role": "user", "content": "What is 3?"}]}\n')
    answers = []
    for name in ("adapter", "merged"):
        out = tmp_path / f"{name}-answers.jsonl"
        words = ("--out", str(out), "--max_new_tokens", "8", *on)
        assert run_cli("generate", str(tmp_path / name), str(tmp_path / "rows.jsonl"), *words) == 0
        answers.append(json.loads(out.read_text())["completion_ids"])
    assert answers[0] == answers[1]
    assert run_cli("export", str(tmp_path / "adapter"), str(tmp_path / "x")) == 2
    assert "--merge adds it to its model" in capsys.readouterr().err


def test_an_adapter_goes_on_from_where_another_ended(root: Path, finished: Any, tmp_path: Path) -> None:
    loop.run(build(config(root, tmp_path / "run", model={"lora": {"path": str(finished[0] / "export")}})))
    before, after = logged(finished[0]), logged(tmp_path / "run")
    assert after[0]["eval_loss"] == pytest.approx(before[-1]["eval_loss"], rel=1e-6)
    assert after[-1]["eval_loss"] < after[0]["eval_loss"]


def dpo(root: Path, run_dir: Path, **reference: Any) -> Config:
    return config(
        root,
        run_dir,
        data={"train": [{"path": str(root / "pairs.jsonl")}], "max_length": 64, "row_length": 256},
        objective={"name": "sigmoid", "beta": 0.5},
        train={"global_batch_size": 4, "micro_batch_size": None, "max_steps": 3},
        checkpoint={"export_at_end": False},
        reference=reference,
    )


def test_dpo_against_the_base_without_the_adapter(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []
    load = ModelSetup.load
    monkeypatch.setattr(ModelSetup, "load", lambda self, seed=0: loads.append(self.lora is None) or load(self, seed))
    runs, count = {}, {}
    for logps in ("adapter_off", "online", "cached"):
        loads.clear()
        loop.run(build(dpo(root, tmp_path / logps, logps=logps)))
        runs[logps], count[logps] = logged(tmp_path / logps), loads.count(True)
    first = runs["adapter_off"]
    assert first[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first[0]["eval_rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert first[-1]["eval_loss"] < first[0]["eval_loss"] and first[-1]["eval_rewards/margins"] > 0
    assert runs["online"] == first
    for mine, theirs in zip(runs["cached"], first, strict=True):
        for name, value in theirs.items():
            assert mine[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    # Once for the model itself; the cache is computed by a model that is gone when training begins.
    assert count == {"adapter_off": 1, "online": 1, "cached": 2}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"lora": {"alpha": 8}}}, r"model\.lora\.alpha is set, but there is no adapter"),
        ({"model": {"lora": {"path": "x", "r": 4}}}, r"model\.lora\.r: the adapter of model\.lora\.path tells it"),
        ({"optimizer": {"only_new_tokens": True}}, r"only_new_tokens: model\.lora trains the adapter alone"),
        ({"optimizer": {"freeze": [".*/lora_.*"]}}, "every parameter is frozen"),
        ({"tokenizer": {"add_special_tokens": ["<tool>"]}}, "<tool> would be new rows of the embedding"),
        ({"model": {"lora": {}}, "reference": {"logps": "adapter_off"}}, "adapter_off: there is no adapter"),
        ({"model": {"lora": {"r": 4, "target_modules": []}}}, "nothing would be trained"),
    ],
)
def test_bad_configs(root: Path, tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises((UserError, UserErrors), match=message):
        build(
            config(
                root, tmp_path / "run", **{k: full_model(root, v) if k == "model" else v for k, v in sections.items()}
            )
        )


def full_model(root: Path, section: dict[str, Any]) -> dict[str, Any]:
    return {"path": str(root / "model"), **section}


def test_freeze_patterns_of_full_training_stay_valid_and_apply_to_adapters(root: Path, tmp_path: Path) -> None:
    freeze = ["embed/.*", "layers[0:1]/.*", ".*/mlp/up/.*"]
    experiment = build(config(root, tmp_path / "run", optimizer={"freeze": freeze}))
    trained = experiment.optimizer.trained
    assert set(trained) == {
        f"layers/{module}/lora_{side}"
        for module in ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/down")
        for side in "ab"
    }
    for chosen in trained.values():
        np.testing.assert_array_equal(chosen, [False, True])
    moments = [leaf for leaf in jax.tree.leaves(experiment.abstract_state().opt_state) if leaf.ndim]
    assert len(moments) == 2 * len(trained)


def test_evaluate_gives_the_adapters_gradient_norms(root: Path, finished: Any, capsys: pytest.CaptureFixture) -> None:
    words = ("--json", "--gradient_norms", "--checkpoint", "latest")
    capsys.readouterr()
    assert run_cli("evaluate", str(finished[0] / "config.yaml"), *words) == 0
    said = capsys.readouterr().out
    values = json.loads(said[said.index("{") :])
    assert values["loss"] == pytest.approx(logged(finished[0])[-1]["eval_loss"], rel=1e-5)
    assert set(values["gradient_norms"]) == {
        f"layers[{i}]/{module}/lora_{side}"
        for i in range(2)
        for module in ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down")
        for side in "ab"
    }


def test_a_quantised_run_resumes_bit_for_bit_and_merges_into_the_whole_weights(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(profile: Any, done: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    sections = {"model": {"lora": {"r": 4, "quantize": "int8", "dropout": 0.1}}}
    sections = {"model": full_model(root, sections["model"]), "optimizer": {"freeze": ["layers/attn/q/kernel"]}}
    loop.run(build(config(root, tmp_path / "whole", **sections)))
    with monkeypatch.context() as patch:
        patch.setattr(loop._Profile, "after", die)
        with pytest.raises(KeyboardInterrupt):
            loop.run(build(config(root, tmp_path / "run", **sections)))
    loop.run(build(config(root, tmp_path / "run", **sections)))
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")
    out = tmp_path / "merged"
    assert run_cli("export", str(tmp_path / "run"), str(out), "--merge", "--mesh.fsdp", "8") == 0
    merged, base = load_file(out / "model.safetensors"), load_file(root / "model" / "model.safetensors")
    own = adapter(tmp_path / "run")
    name = "model.layers.1.mlp.up_proj"
    a, b = (own[f"base_model.model.{name}.lora_{side}.weight"].astype(np.float64) for side in "AB")
    np.testing.assert_allclose(merged[f"{name}.weight"], base[f"{name}.weight"] + 8 * b @ a, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(merged["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
