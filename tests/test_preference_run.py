"""Preference optimization as a user runs it: on a tiny model, from the config to the metrics."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from posttrain import cli
from posttrain.config import Config, parse_config
from posttrain.errors import UserError, UserErrors
from posttrain.experiment import build
from posttrain.train import reference
from posttrain.train.loop import run
from tests.tiny import write_model


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("preference")
    write_model(directory / "model")
    with open(directory / "pairs.jsonl", "w") as file:
        for i in range(40):
            prompt = [{"role": "user", "content": f"What is {i}?"}]
            sides = {side: [{"role": "assistant", "content": f"{word} {i}."}] for side, word in WORDS.items()}
            file.write(json.dumps({"prompt": prompt, **sides}) + "\n")
    return directory


WORDS = {"chosen": "It is surely the number", "rejected": "Who knows? Not me, and not"}


def config(root: Path, run_dir: Path, **sections: Any) -> Config:
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
        "objective": {"name": "sigmoid", "beta": 0.5},
        "train": {"global_batch_size": 4, "max_steps": 3},
        "optimizer": {"learning_rate": 1e-3, "warmup_ratio": 0.0},
        "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
        "checkpoint": {"every": 2, "export_at_end": False},
        "log": {"tensorboard": False},
    }
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section}
    return parse_config(raw, "test")


def logged(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_dpo_with_a_cached_and_an_online_reference(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(build(config(root, tmp_path / "cached")))
    first = logged(tmp_path / "cached")
    assert first[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first[1]["loss"] == pytest.approx(math.log(2), abs=1e-5) and abs(first[1]["rewards/margins"]) < 1e-5
    assert first[-1]["eval_loss"] < first[0]["eval_loss"] and first[-1]["eval_rewards/margins"] > 0

    run(build(config(root, tmp_path / "online", reference={"logps": "online"})))
    for mine, theirs in zip(logged(tmp_path / "online"), first, strict=True):
        for name in set(mine) - {"time", "step_time", "tokens_per_second", "mfu", "seconds_left"}:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name

    def never(*_: Any) -> Any:
        raise AssertionError("the reference's log-probabilities are there already")

    monkeypatch.setattr(reference, "compute", never)
    run(build(config(root, tmp_path / "again")))
    assert [entry.get("loss") for entry in logged(tmp_path / "again")] == [entry.get("loss") for entry in first]
    with pytest.raises(AssertionError, match="there already"):  # other samples: other numbers
        run(build(config(root, tmp_path / "shorter", data={"max_length": 24, "row_length": 64})))


def test_kto_from_pairs_with_a_cached_and_an_online_reference(root: Path, tmp_path: Path) -> None:
    """A pair is a desirable and an undesirable answer; at first no log-ratio is other than 0, so every loss is 1/2."""
    kto = {"objective": {"name": "kto", "beta": 0.5}, "train": {"global_batch_size": 8, "micro_batch_size": 4}}
    run(build(config(root, tmp_path / "cached", **kto)))
    first = logged(tmp_path / "cached")
    assert first[0]["eval_loss"] == pytest.approx(0.5, abs=1e-5) and first[0]["eval_kl"] == pytest.approx(0, abs=1e-5)
    assert first[1]["loss"] == pytest.approx(0.5, abs=1e-5)
    assert first[-1]["eval_loss"] < first[0]["eval_loss"] and first[-1]["eval_rewards/margins"] > 0
    run(build(config(root, tmp_path / "online", reference={"logps": "online"}, **kto)))
    for mine, theirs in zip(logged(tmp_path / "online"), first, strict=True):
        for name in set(mine) - {"time", "step_time", "tokens_per_second", "mfu", "seconds_left"}:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name


def test_a_damaged_reference_cache_is_made_again(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = {"cache_dir": str(tmp_path / "cache")}
    run(build(config(root, tmp_path / "one", data=data)))
    for file in (tmp_path / "cache").glob("*.ref_logps"):
        content = bytearray(file.read_bytes())
        content[5] ^= 1
        file.write_bytes(bytes(content))
    run(build(config(root, tmp_path / "two", data=data)))
    assert "is damaged" in caplog.text
    assert [entry.get("loss") for entry in logged(tmp_path / "two")] == [
        entry.get("loss") for entry in logged(tmp_path / "one")
    ]


OWN = '''"""A loss of one's own."""
from typing import Annotated

import jax
from jaxtyping import Array, Float32
from pydantic import Field

from posttrain.records import PolicyPairs


def squared(pairs: PolicyPairs, *, target: Annotated[float, Field(gt=0)] = 1.0) -> Float32[Array, " P"]:
    """(chosen - rejected - target)^2."""
    return (pairs.chosen - pairs.rejected - target) ** 2
'''


def test_a_loss_in_a_file_of_ones_own(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.py").write_text(OWN)
    made = config(root, tmp_path / "run", objective={"name": "squared", "file": str(tmp_path / "own.py"), "beta": None})
    raw = made.model_dump(mode="json")
    del raw["objective"]["beta"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    arguments = ["train", str(tmp_path / "config.yaml"), "--objective.target", "30", "--train.max_steps", "1"]
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "--objective.target", "-1"])
    assert ended.value.code == 2 and "objective.target = -1" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 0
    values = logged(tmp_path / "run")[1]
    expected = (values["logps/chosen"] - values["logps/rejected"] - 30) ** 2
    assert values["loss"] == pytest.approx(expected, rel=0.5)  # the mean of squares, near the square of the mean


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"row_length": 100}}, "a row must hold a pair, two segments of data.max_length = 64"),
        ({"objective": {"name": "sigmoids"}}, "known are .*sigmoid"),
        ({"reference": {"path": "no/such"}}, "no/such"),
    ],
)
def test_bad_configs(root: Path, tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises((UserError, UserErrors), match=message):
        build(config(root, tmp_path / "run", **sections))


def test_a_loss_of_the_whole_batch_is_not_accumulated(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"aot: it looks at all pairs .*set train\.micro_batch_size to 8"):
        build(config(root, tmp_path / "run", objective={"name": "aot"}, train={"global_batch_size": 8}))
    run(build(config(root, tmp_path / "run", objective={"name": "aot"})))
