"""Bytes of what a step is compiled from, by hand from the model's shapes; nothing is compiled here."""

import json
from pathlib import Path

import jax
import pytest

from posttrain.experiment import build_step
from posttrain.parallel.mesh import make_mesh
from posttrain.plan.worker import _reference_bytes, bytes_of, parameter_counts
from posttrain.train.setup import StepSetup
from tests.plan.test_command import LAYER, TINY, config

TABLES = 2 * 4096 * 256


def weights(layers: int) -> int:
    """Parameters of the tiny model with so many layers: matrices, norms, embedding and head."""
    return layers * (LAYER // 2 + 2 * 256) + 256 + TABLES


def built(directory: Path, **sections: dict) -> StepSetup:
    found = config(directory, mesh={"fsdp": 1}, **sections)
    return build_step(found, None, make_mesh(found.mesh, jax.devices()[:1]))[0]


def test_moments_on_the_host_are_none_of_the_device(tmp_path: Path) -> None:
    here, there = built(tmp_path), built(tmp_path, optimizer={"memory": "host"})
    assert parameter_counts(here) == (weights(6), weights(6))
    moments, counter = 2 * 4 * weights(6), 4
    kept, sent = (setup.abstract_state().opt_state for setup in (here, there))
    assert (bytes_of(kept), bytes_of(kept, host=True)) == (moments + counter, 0)
    assert (bytes_of(sent), bytes_of(sent, host=True)) == (counter, moments)


@pytest.mark.parametrize(
    ("lora", "path", "layers"), [(False, False, 6), (True, False, 0), (False, True, 3), (True, True, 3)]
)
def test_a_reference_that_stays_in_memory(tmp_path: Path, lora: bool, path: bool, layers: int) -> None:
    """The trained model as it was; under an adapter the frozen weights serve as well; or one of its own."""
    own = tmp_path / "own"
    own.mkdir()
    (own / "config.json").write_text(json.dumps(TINY | {"num_hidden_layers": 3}))
    sections = {"model": {"path": str(tmp_path), "lora": {"r": 8}}} if lora else {}
    reference = {"logps": "online"} | ({"path": str(own)} if path else {})
    setup = built(tmp_path, objective={"name": "sigmoid"}, reference=reference, **sections)
    assert _reference_bytes(setup.config, setup, None) == (4 * weights(layers) if layers else 0)
