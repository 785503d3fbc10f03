"""A reward model as a user makes one: trained on a tiny model from the command line, resumed, exported, and scored."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from etils import epath

from posttrain import cli
from posttrain.config import Config, parse_config
from posttrain.data.tokenizer import Tokenizer
from posttrain.errors import UserError
from posttrain.evaluate import EvaluateOptions, evaluate
from posttrain.experiment import build, setup_model
from posttrain.models import hf
from posttrain.parallel.sharding import flatten
from posttrain.records import Batch
from posttrain.train import loop
from posttrain.train.checkpoint import Checkpoints
from posttrain.train.loop import run
from posttrain.train.overview import describe
from tests.tiny import write_model

WORDS = {"chosen": "It is surely the number", "rejected": "Who knows? Not me, and not"}
TIMES = {"time", "step_time", "tokens_per_second", "mfu", "seconds_left"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("reward")
    write_model(directory / "model")
    with open(directory / "pairs.jsonl", "w") as file:
        for i in range(40):
            prompt = [{"role": "user", "content": f"What is {i}?"}]
            sides = {side: [{"role": "assistant", "content": f"{word} {i}."}] for side, word in WORDS.items()}
            file.write(json.dumps({"prompt": prompt, **sides}) + "\n")
    return directory


def raw_config(root: Path, run_dir: Path, **sections: Any) -> dict[str, Any]:
    raw = {
        "run": {"dir": str(run_dir)},
        "model": {"path": str(root / "model")},
        "data": {
            "train": [{"path": str(root / "pairs.jsonl")}],
            "heldout": {"fraction": 0.2},
            "max_length": 64,
            "row_length": 256,
            "cache_dir": str(root / "cache"),
        },
        "objective": {"name": "reward"},
        "train": {"global_batch_size": 4, "max_steps": 4},
        "optimizer": {"learning_rate": 3e-3, "warmup_ratio": 0.0},
        "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
        "checkpoint": {"every": 2, "keep_last": 4},
        "log": {"tensorboard": False},
    }
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section}
    return raw


def config(root: Path, run_dir: Path, **sections: Any) -> Config:
    return parse_config(raw_config(root, run_dir, **sections), "test")


def logged(run_dir: Path) -> list[dict[str, float]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in TIMES} for line in lines]


def command(*words: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(word) for word in words])
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def finished(root: Path) -> Path:
    """A run to its end."""
    run(build(config(root, root / "run")))
    return root / "run"


def test_it_learns_from_equal_scores_on(finished: Path) -> None:
    values = logged(finished)
    assert values[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert values[0]["eval_max_reward"] == values[0]["eval_min_reward"] == 0
    assert values[1]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    last = values[-1]
    assert last["eval_loss"] < 0.65 and last["eval_accuracy"] == 1 and last["eval_margin"] > 0.05
    assert last["eval_min_reward"] < last["eval_mean_reward"] < last["eval_max_reward"]


def test_killed_and_resumed_it_is_bitwise_the_same(root: Path, finished: Path, tmp_path: Path) -> None:
    half = config(root, tmp_path / "run")
    experiment = build(half)
    whole = loop.global_batches

    def cut(data: Any, mesh: Any, rows: int, start: int = 0, stop: int | None = None) -> Any:
        for step, batch in whole(data, mesh, rows, start, stop):
            if stop is None and step == 3:
                raise KeyboardInterrupt
            yield step, batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "global_batches", cut)
        with pytest.raises(KeyboardInterrupt):
            run(experiment)
    assert run(build(half)).step == 4
    assert logged(tmp_path / "run") == logged(finished)
    states = []
    for directory in (tmp_path / "run", finished):
        checkpoints = Checkpoints(epath.Path(directory), half.checkpoint, read_only=True)
        states.append(checkpoints.restore(4, build(half).abstract_state())[0])
    for mine, theirs in zip(jax.tree.leaves(states[0]), jax.tree.leaves(states[1]), strict=True):
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs))


def test_export_scores_as_the_run_did(root: Path, finished: Path, tmp_path: Path, capsys: Any) -> None:
    """In memory, by `posttrain score` on the run's own export, and on that of `posttrain export`."""
    assert command("export", str(finished), str(tmp_path / "model"), "--step", "4") == 0
    tensors = [(d / "model.safetensors").read_bytes() for d in (tmp_path / "model", finished / "export")]
    assert tensors[0] == tensors[1]
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert written["architectures"] == ["LlamaForSequenceClassification"] and len(written["id2label"]) == 1

    expected = in_memory(root, finished)
    for flags in ([], ["--packed", "--mesh.fsdp", "4", "--mesh.tensor", "2"]):
        out = tmp_path / f"scores{len(flags)}.jsonl"
        assert (
            command("score", tmp_path / "model", root / "pairs.jsonl", "--out", out, "--row_length", "256", *flags) == 0
        )
        assert "accuracy 1.0000, standard error 0.0000, of 40 pairs" in capsys.readouterr().err
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        found = np.array([[row["score_chosen"], row["score_rejected"]] for row in rows])
        np.testing.assert_allclose(found, expected, atol=2e-6, rtol=0)


def in_memory(root: Path, finished: Path) -> np.ndarray:
    """[pairs, 2]: each side rendered, and scored in a row of its own with the parameters of the last checkpoint."""
    made = build(config(root, finished))
    checkpoints = Checkpoints(epath.Path(finished), made.config.checkpoint, read_only=True)
    params = checkpoints.restore_params(4, made.model.abstract_params)
    tokenizer = Tokenizer.load(str(root / "model"))
    texts = [(f"What is {i}?", f"{word} {i}.") for i in range(40) for word in WORDS.values()]
    turns = [[{"role": "user", "content": ask}, {"role": "assistant", "content": say}] for ask, say in texts]
    ids = [tokenizer.encode(tokenizer.render(messages)) for messages in turns]
    tokens = np.array([row + [0] * (64 - len(row)) for row in ids], np.int32)
    places = np.broadcast_to(np.arange(64, dtype=np.int32), tokens.shape)
    inside = (places < np.array([len(row) for row in ids])[:, None]).astype(np.int32)
    batch = Batch(tokens, inside, places, np.zeros(tokens.shape, np.float32))
    hidden = np.asarray(jax.jit(lambda p: made.model.decoder.merge(p).hidden(batch))(params), np.float64)
    last = hidden[np.arange(80), [len(row) - 1 for row in ids]]
    return (last @ np.asarray(params["score"]["kernel"], np.float64)[0]).reshape(-1, 2)


def test_a_run_may_start_from_a_reward_model(root: Path, finished: Path, tmp_path: Path, capsys: Any) -> None:
    model = {"path": str(finished / "export")}
    again = config(root, tmp_path / "run", model=model)
    describe(build(again))
    assert "that of the model" in capsys.readouterr().out
    evaluate(again, EvaluateOptions(json=True, gradient_norms=True))
    values = json.loads(capsys.readouterr().out)
    last = logged(finished)[-1]
    assert values["loss"] == pytest.approx(last["eval_loss"], rel=1e-5)
    assert values["accuracy"] == 1 and values["gradient_norms"]["score/kernel"] > 0
    evaluate(config(root, finished), EvaluateOptions(json=True, checkpoint="latest"))
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(last["eval_loss"], rel=1e-5)


def test_a_dry_run_says_that_the_score_is_new(root: Path, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw_config(root, tmp_path / "run")))
    assert command("train", path, "--dry_run") == 0
    out = capsys.readouterr().out
    assert "score/kernel" in out and "new: zeros" in out and "lm_head" not in out
    assert not (tmp_path / "run").exists()


OWN = '''"""A loss of reward models of one's own."""
from typing import Annotated

import jax.numpy as jnp
from jaxtyping import Array, Float32
from pydantic import Field

from posttrain.records import PairScores


def squared_hinge(pairs: PairScores, *, gap: Annotated[float, Field(gt=0)] = 1.0) -> Float32[Array, " P"]:
    """max(0, gap + margin - (chosen - rejected))^2."""
    return jnp.maximum(0.0, gap + pairs.margins - (pairs.chosen - pairs.rejected)) ** 2
'''


def test_a_reward_loss_in_a_file_of_ones_own(root: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "own.py").write_text(OWN)
    objective = {"name": "squared_hinge", "file": str(tmp_path / "own.py")}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw_config(root, tmp_path / "run", objective=objective)))
    assert command("train", path, "--objective.gap", "-1") == 2
    assert "objective.gap = -1" in capsys.readouterr().err
    assert command("train", path, "--objective.gap", "3", "--train.max_steps", "2") == 0
    values = logged(tmp_path / "run")
    assert values[0]["eval_loss"] == pytest.approx(9.0, abs=1e-5)  # (3 - 0)^2
    assert values[-1]["eval_loss"] < 8.9 and values[-1]["eval_accuracy"] == 1
    assert "score.weight" in hf.CheckpointReader(tmp_path / "run" / "export").shapes


def test_pairs_of_cut_sides_are_trained_on(root: Path, tmp_path: Path) -> None:
    """`max_length` cuts the ends of both sides; each is then scored at the last token that is left of it."""
    data = {"max_length": 24, "row_length": 96, "heldout": {"fraction": 0.0}}
    made = build(config(root, tmp_path / "run", data=data))
    table = made.data.train.table
    assert table.truncated.all() and len(table) == 40
    batch = made.data.train.read(0, np.arange(4))
    lengths = [int((batch.segment_ids[row] == segment).sum()) for row in range(4) for segment in (1, 2)]
    assert set(lengths) <= {23, 24} and 24 in lengths
    result = run(made)
    values = logged(tmp_path / "run")
    assert result.step == 4 and values[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert values[-1]["accuracy"] == 1


# ---- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sft", "sigmoid"])
def test_a_causal_objective_does_not_start_from_a_reward_model(
    root: Path, finished: Path, tmp_path: Path, name: str
) -> None:
    sections: dict[str, Any] = {"objective": {"name": name}, "model": {"path": str(finished / "export")}}
    if name == "sft":
        sections["data"] = {"train": [{"path": str(root / "pairs.jsonl"), "preference": "chosen"}]}
    with pytest.raises(UserError, match=r"a reward model .* no vocabulary projection"):
        build(config(root, tmp_path / "run", **sections))


@pytest.mark.parametrize("words", [["generate"], ["logprobs"]])
def test_what_needs_token_probabilities_refuses_a_reward_model(
    root: Path, finished: Path, capsys: Any, words: list[str]
) -> None:
    assert command(*words, finished / "export", root / "pairs.jsonl") == 2
    assert "a reward model (LlamaForSequenceClassification)" in capsys.readouterr().err


def test_a_language_model_has_no_scores(root: Path, capsys: Any) -> None:
    assert command("score", root / "model", root / "pairs.jsonl") == 2
    error = capsys.readouterr().err
    assert "a language model, without a score" in error and "objective.name reward" in error


def test_a_reference_is_not_for_rewards(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"reference\.path = .*the objective reward takes no reference"):
        build(config(root, tmp_path / "run", reference={"path": "some/model"}))


def test_every_head_has_its_shapes(root: Path) -> None:
    made = config(root, root / "unused")
    shapes = {head: flatten(setup_model(made.model, made.mesh, head=head).abstract_params) for head in ("lm", "score")}
    assert shapes["lm"].keys() ^ shapes["score"].keys() == {"lm_head/kernel", "score/kernel"}
    sharding = shapes["score"]["score/kernel"].sharding
    assert sharding.shard_shape((1, 32)) == (1, 16)  # over fsdp 2
