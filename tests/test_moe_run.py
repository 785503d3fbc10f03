"""A mixture of experts as a user trains it: from the config to metrics, held-out loss and an export."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from posttrain.config import Config, parse_config
from posttrain.errors import UserErrors
from posttrain.experiment import build
from posttrain.models import hf
from posttrain.parallel.sharding import flatten
from posttrain.train.loop import run
from posttrain.train.overview import describe
from tests import tiny

EXPERTS = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
    "router_aux_loss_coef": 0.05,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("experts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "CONFIG", tiny.CONFIG | EXPERTS)
        tiny.write_model(directory / "model")
    tiny.write_chats(directory / "chats.jsonl", 60)
    return directory


def config(root: Path, run_dir: Path, **sections: Any) -> Config:
    raw = {
        "run": {"dir": str(run_dir)},
        "model": {"path": str(root / "model")},
        "data": {
            "train": [{"path": str(root / "chats.jsonl")}],
            "heldout": {"fraction": 0.2},
            "max_length": 128,
            "row_length": 128,
            "cache_dir": str(root / "cache"),
        },
        "train": {"global_batch_size": 8, "max_steps": 3},
        "optimizer": {"learning_rate": 1e-2, "warmup_ratio": 0.0},
        "log": {"tensorboard": False},
    }
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section}
    return parse_config(raw, "test")


def logged(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_the_balance_loss_is_the_same_however_the_batch_is_split(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.01}
    whole = build(config(root, tmp_path / "whole", model=model, mesh={"data": 8, "fsdp": 1}))
    split = build(config(root, tmp_path / "split", model=model, mesh={"expert": 2, "fsdp": 1, "tensor": 4}))
    assert (whole.accumulation, split.accumulation) == (1, 4)
    describe(split)
    assert "2 of 4 a token, blocks; router_balance 0.5, router_z 0.01" in capsys.readouterr().out
    run(whole)
    run(split)
    first, second = logged(tmp_path / "whole"), logged(tmp_path / "split")
    names = {"loss", "loss/nll", "loss/router_balance", "loss/router_z", "aux_loss", "grad_norm"}
    assert names <= set(first[1]) and {f"eval_{name}" for name in ("loss", "aux_loss")} <= set(first[0])
    for mine, theirs in zip(first, second, strict=True):
        for name in (*names, "eval_loss", "eval_aux_loss", "eval_loss/nll"):
            if name in mine:
                assert mine[name] == pytest.approx(theirs[name], rel=1e-4), name
    assert first[-1]["eval_loss"] < first[0]["eval_loss"]

    exported, _ = hf.load_config(tmp_path / "split" / "export")
    assert exported == split.model.config
    shapes = split.model.decoder.shapes
    start, end = (flatten(hf.load_params(d, exported, shapes)) for d in (root / "model", tmp_path / "split" / "export"))
    moved = {path: np.abs(np.asarray(end[path] - start[path])).max() for path in start}
    assert all(moved[f"layers/moe/{name}/kernel"] > 1e-4 for name in ("router", "gate", "up", "down"))


def test_without_a_coefficient_there_is_no_router_loss(root: Path, tmp_path: Path) -> None:
    experiment = build(config(root, tmp_path / "plain", mesh={"fsdp": jax.device_count()}))
    assert dict(experiment.loss.objective.coefficients) == {"nll": 1.0}


def test_router_losses_of_a_dense_model_are_refused(root: Path, tmp_path: Path) -> None:
    dense = tiny.write_model(tmp_path / "dense")
    with pytest.raises(UserErrors, match=r"model\.router_z_loss_coef = 0\.1: this model has no experts"):
        build(config(root, tmp_path / "run", model={"path": str(dense), "router_z_loss_coef": 0.1}))
