"""Config: every problem at once, with key, value, constraint and the nearest valid name."""

from pathlib import Path

import pytest

from posttrain.cli import TrainOptions, _config_command
from posttrain.config import Config, ObjectiveConfig, dump_config, load_config, parse_config
from posttrain.errors import UserError, UserErrors
from posttrain.experiment import build_objective, check_config


def problems(raw: dict) -> str:
    with pytest.raises(UserErrors) as caught:
        parse_config(raw, "x.yaml")
    return str(caught.value)


def test_reports_every_problem_at_once_with_the_nearest_name() -> None:
    text = problems(
        {
            "train": {"global_batchsize": 3, "max_steps": "many"},
            "mdel": {},
            "data": {"train": [{"paht": "x"}]},
            "optimizer": {"learning_rate": -1, "beta1": float("nan")},
        }
    )
    assert text.startswith("6 problems:")
    assert "train.global_batchsize: unknown key; did you mean 'global_batch_size'?" in text
    assert "mdel: unknown key; did you mean 'model'?" in text
    assert "data.train.0.paht: unknown key; did you mean 'path'?" in text
    assert "train.max_steps = 'many'" in text
    assert "optimizer.learning_rate = -1: input should be greater than or equal to 0" in text
    assert "optimizer.beta1 = nan" in text


def test_a_number_without_a_point_is_a_number(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("optimizer: {learning_rate: 2e-5}\n")  # PyYAML reads this as a string
    assert load_config(str(file)).optimizer.learning_rate == 2e-5


def test_a_key_given_twice_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("run:\n  seed: 1\n  seed: 2\n")
    with pytest.raises(UserError, match="'seed' stands twice"):
        load_config(str(file))


@pytest.mark.parametrize(("text", "says"), [("- a\n", "mapping of sections"), ("a: [\n", "not valid YAML")])
def test_files_that_are_no_config(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=says):
        load_config(str(file))


def test_a_missing_file_and_a_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such config file"):
        load_config(str(tmp_path / "none.yaml"))
    with pytest.raises(UserError, match="it is a directory"):
        load_config(str(tmp_path))


def test_the_resolved_config_reads_back_equal(tmp_path: Path) -> None:
    config = parse_config({"data": {"train": [{"path": "a"}, {"path": "b"}]}, "optimizer": {"freeze": ["x"]}}, "x")
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config))
    assert load_config(str(file)) == config


def test_combinations_and_unserved_keys_are_reported_together() -> None:
    config = parse_config(
        {
            "model": {"lora": {"alpha": 16}},
            "reference": {"path": "x"},
            "data": {"train": [{"path": "", "weight": 2.0}, {"path": "a"}], "max_length": 100, "row_length": 50},
            "mesh": {"context": 2, "fsdp": -1, "data": -1},
            "objective": {"name": "sft", "beta": 0.1},
            "log": {"wandb": "project"},
        },
        "x",
    )
    text = "\n".join(check_config(config))
    for said in (
        "model.lora.alpha is set, but there is no adapter",
        "model.path is empty",
        "data.train.0.path is empty",
        "data.train: 1 of the sources 0 to 1 have no weight, the others have one: give every source a weight, or none",
        "data.max_length = 100 is over data.row_length = 50",
        "mesh.context = 2",
        "data and fsdp are both -1",
        "objective.beta",
        "log.wandb",
    ):
        assert said in text


def test_the_defaults_miss_only_the_paths() -> None:
    assert [line.split()[0] for line in check_config(Config())] == ["model.path", "data.train.0.path"]


def test_a_reference_that_nothing_compares_with() -> None:
    config = parse_config({"model": {"path": "m"}, "reference": {"path": "x"}, "data": {"train": [{"path": "a"}]}}, "x")
    assert any("reference.path = 'x': the objective sft takes no reference" in text for text in check_config(config))
    config = config.model_copy(update={"objective": ObjectiveConfig(name="sigmoid")})
    assert not any("reference" in text for text in check_config(config))


def test_an_unknown_objective_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UserErrors, match=r"known are .*sft, sigmoid"):
        build_objective(ObjectiveConfig(name="sfft"))


def test_parameters_of_the_objective_from_file_and_command_line(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("objective: {name: sigmoid, beta: 0.5, label_smoothing: 0.1}")
    given = ["--objective.beta=0.2", "--data.epochs", "3", "--objective.sft-weight", "1e-2"]
    config, _ = _config_command("train", [str(tmp_path / "c.yaml"), *given], TrainOptions)
    assert config.objective.model_extra == {"beta": 0.2, "label_smoothing": 0.1, "sft_weight": "1e-2"}
    assert config.data.epochs == 3 and config.objective.name == "sigmoid"
    assert dict(build_objective(config.objective).coefficients) == {"sigmoid": 1.0, "sft": 0.01}
