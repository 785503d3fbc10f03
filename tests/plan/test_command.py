"""`posttrain plan`: what is refused before anything is compiled; and real compilations for v5e."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.config import Config, parse_config
from posttrain.errors import UserError, UserErrors
from posttrain.plan.command import PlanOptions, compile_in_worker, plan
from posttrain.plan.topology import ENVIRONMENT

CACHE = str(Path(__file__).parent.parent.parent / ".cache" / "xla-tests")
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 4096,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
LAYER = 2 * (256 * (2 * 4 + 2 * 2) * 128 + 3 * 256 * 512)
"""Bytes of a layer's matrices in bf16."""


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"topology": "v5p-16"}, "how many there are, not how they are connected"),
        ({"topology": "v5e:2x2x1"}, "a v5e slice has 2 dims"),
        ({"topology": "v9:2x2"}, "no chip 'v9'; known: v4, v5e"),
        ({"topology": "v5e:2x2", "slices": 0}, "--slices 0: at least 1"),
        ({"topology": "v5e:2x2", "tokens": -1.0}, "--tokens -1.0: must be above 0"),
        ({"tokens": 1e6}, "--tokens: time is predicted for chips only; name them with --topology"),
        ({"price": 2.0}, "--price: time is predicted for chips only"),
        ({"slices": 2}, "--slices 2: of what --topology names"),
        ({"html": "plan.html"}, "--html: the page is of a plan for chips"),
    ],
)
def test_wrong_options_are_refused(options: dict, reason: str):
    with pytest.raises(UserErrors) as caught:
        plan(Config(), PlanOptions(**options))
    assert reason in str(caught.value)


def test_a_price_needs_the_length_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The tokens, or data: here there are none."""
    monkeypatch.setattr("posttrain.plan.command.check_libtpu", lambda: None)
    with pytest.raises(UserError, match="give --tokens too, or data: "):
        plan(config(tmp_path), PlanOptions(topology="v5e:2x2", price=2.0))


def config(directory: Path, **sections: dict) -> Config:
    (directory / "config.json").write_text(json.dumps(TINY))
    raw = {
        "model": {"path": str(directory), "remat": "full"},
        "data": {"train": [{"path": "none.jsonl"}], "row_length": 1024, "max_length": 512},
        "train": {"global_batch_size": 4},
        "mesh": {"fsdp": -1},
    }
    return parse_config({name: {**raw.get(name, {}), **sections.get(name, {})} for name in {*raw, *sections}}, "test")


MESHES = """
from posttrain.config import MeshConfig
from posttrain.parallel.mesh import make_mesh
from posttrain.train.chips import chip_of
from posttrain.plan.topology import described_devices
for wanted in ("v4:2x2x4 1", "v5e:4x4 1", "v5e:4x4 2", "v5p:2x2x2 1", "v6e:4x4 1", "tpu7x:2x2x1 1"):
    name, slices = wanted.split()[0], int(wanted.split()[1])
    devices = described_devices(name, slices)
    mesh = make_mesh(MeshConfig(fsdp=-1, replica=slices), devices)
    print(name, slices, chip_of(devices[0].device_kind).name, mesh.shape["replica"], mesh.shape["fsdp"])
"""


@pytest.mark.acceptance
def test_every_chip_has_a_mesh():
    """v4 and tpu7x are two devices a chip."""
    pytest.importorskip("libtpu")
    run = subprocess.run([sys.executable, "-c", MESHES], capture_output=True, text=True, env=os.environ | ENVIRONMENT)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [
        "v4:2x2x4 1 v4 1 32",
        "v5e:4x4 1 v5e 1 16",
        "v5e:4x4 2 v5e 2 16",
        "v5p:2x2x2 1 v5p 1 8",
        "v6e:4x4 1 v6e 1 16",
        "tpu7x:2x2x1 1 tpu7x 1 8",
    ]


@pytest.mark.acceptance
def test_the_step_as_v5e_runs_it(tmp_path: Path):
    """What must hold of the compiled step, of fine-tuning on four chips: no parameter is whole but in its layer."""
    pytest.importorskip("libtpu")
    found = compile_in_worker(config(tmp_path), "v5e:2x2", 1)
    cost, memory = found["cost"], found["memory"]
    assert found["mesh"]["fsdp"] == 4 and found["attention"] == "splash"
    kernels = {kernel["name"]: kernel["executed"] for kernel in cost["kernels"] if "splash" in kernel["name"]}
    assert sorted(kernels.values()) == [6, 6, 12], "forward twice, dq, dkv in each of six layers"
    assert all(loop["trips"] is not None for loop in cost["loops"])

    stored = found["work"]["parameters"]
    assert memory["params"] == pytest.approx(stored * 4 / 4, rel=0.01) and memory["optimizer"] == pytest.approx(
        2 * memory["params"], rel=0.01
    )
    # Activations of six layer inputs and one layer's own, two gathered layers, chunks of logits; not six layers.
    row = 1024 * 256 * 2
    assert memory["temporaries"] < memory["params"] + 6 * row + 30 * row + 4 * LAYER + 3 * 1024 * 4096 * 4

    gathered = sum(c["wire_bytes"] for c in cost["collectives"] if c["kind"] in ("all-gather", "collective-permute"))
    reduced = [c for c in cost["collectives"] if c["kind"] in ("reduce-scatter", "all-reduce")]
    head = 2 * 256 * 4096
    # On the wire: in two stages what the first has gathered is gathered again, and nothing is sent twice.
    whole = 2 * 6 * LAYER + head
    assert gathered <= 1.05 * 3 / 4 * whole, "a layer's weights twice, forward and backward, the head once"
    assert all(c["axes"] == ["fsdp"] for c in cost["collectives"])
    wire = sum(c["wire_bytes"] for c in reduced)
    assert wire <= 1.05 * 3 / 4 * (6 * LAYER + head), "three quarters of every gradient once, in bf16; no whole sum"


@pytest.mark.acceptance
def test_as_a_user_calls_it(tmp_path: Path):
    """Preference pairs and an adapter, from the command line; JSON and tables."""
    pytest.importorskip("libtpu")
    written = config(tmp_path, objective={"name": "sigmoid"}, model={"lora": {"r": 8}, "path": str(tmp_path)})
    file = tmp_path / "plan.yaml"
    file.write_text(json.dumps(written.model_dump(mode="json")))
    command = [sys.executable, "-m", "posttrain.cli", "plan", str(file), "--topology", "v5e:2x2"]
    done = subprocess.run([*command, "--tokens", "1e9", "--price", "1.2", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["chip"] == "v5e" and found["prediction"]["chips"] == 4
    low, high = found["prediction"]["cost"]
    hours = 1e9 / 4096 * found["prediction"]["step_seconds"][0] / 3600
    assert low == pytest.approx(hours * 4 * 1.2) and low < high
    assert 0 < found["work"]["trained"] < found["work"]["parameters"] / 10
    assert found["memory"]["optimizer"] < found["memory"]["params"], "only the adapter has moments"


SPLIT = ("activations", "gradients", "other")


def test_the_devices_that_are_here(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Eight emulated ones: memory by its purpose, work and collectives; no time."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", CACHE)
    wanted = config(
        tmp_path, train={"global_batch_size": 8}, mesh={"fsdp": 8}, data={"row_length": 128, "max_length": 128}
    )
    plan(wanted, PlanOptions(json=True))
    found = json.loads(capsys.readouterr().out)
    memory, parameters = found["memory"], found["work"]["parameters"]
    assert (found["local"]["devices"], found["local"]["here"], found["local"]["platform"]) == (8, 8, "cpu")
    assert found["mesh"]["fsdp"] == 8 and "prediction" not in found
    assert memory["params"] == pytest.approx(4 * parameters / 8, rel=0.01)
    assert memory["optimizer"] == pytest.approx(8 * parameters / 8, rel=0.01)
    assert memory["batch"] == 4 * 128 * 4
    assert sum(memory[part] for part in SPLIT) == memory["temporaries"]
    layers, tables = 6 * 2 * LAYER / 8, 4 * 2 * 4096 * 256 / 8
    assert layers <= memory["gradients"] <= 1.01 * (layers + tables) and memory["other"] > 0
    assert memory["activations"] >= 6 * 4 * 128 * 256, "the input of every layer"
    state = memory["params"] + memory["optimizer"] + memory["batch"]
    assert memory["peak"] == pytest.approx(state + memory["temporaries"] + memory["results"], abs=64)
    assert {tuple(c["axes"]) for c in found["cost"]["collectives"] if c["wire_bytes"]} == {("fsdp",)}


def test_as_tables(tmp_path: Path):
    """From the command line, on one device; CPU devices share a measured rate."""
    written = config(
        tmp_path, train={"global_batch_size": 1}, mesh={"fsdp": 1}, data={"row_length": 128, "max_length": 128}
    )
    file = tmp_path / "plan.yaml"
    file.write_text(json.dumps(written.model_dump(mode="json")))
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["JAX_COMPILATION_CACHE_DIR"] = CACHE
    command = [sys.executable, "-m", "posttrain.cli", "plan", str(file), "--sharding"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "The devices that are here: 1 cpu (1 device)" in done.stdout
    assert "activations kept for the backward pass" in done.stdout and "layers/mlp/gate/kernel" in done.stdout
    assert "The time of a step is not predicted" in done.stdout and "matmul rate" in done.stdout


@pytest.mark.acceptance
def test_the_first_step_takes_what_is_predicted():
    """A model of 1 GB on eight devices: the rise of the process's peak during the step, to 15 %."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux tells the peak of a part of a process's life")
    script = Path(__file__).parent.parent.parent / "benchmarks" / "plan_memory.py"
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, str(script), "--devices", "8", "--remat", "full", "--row-length", "64"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    found = json.loads(line.removeprefix("RESULT "))
    assert found["params"] >= 1e9
    assert found["predicted"] == pytest.approx(found["rise"], rel=0.15)
