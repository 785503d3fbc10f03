"""What must hold of the train step as the TPU compiler writes it: the text of small programs for v5e."""

import json
import math
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from posttrain.config import Config
from posttrain.plan import traffic
from posttrain.plan.hlo import HBM, Instruction, Module, parse
from posttrain.plan.topology import ENVIRONMENT
from tests.plan.test_command import TINY, config

pytestmark = pytest.mark.acceptance

COMPILE = """
import json, sys
from posttrain.config import parse_config
from posttrain.experiment import build_step
from posttrain.parallel.mesh import make_mesh
from posttrain.plan.topology import described_devices
from posttrain.train.loop import compile_step
config = parse_config(json.load(sys.stdin), "test")
setup, _ = build_step(config, None, make_mesh(config.mesh, described_devices("v5e:2x2", 1)))
compiled = compile_step(setup).compiled
memory = compiled.memory_analysis()
peak = memory.peak_memory_in_bytes - memory.argument_size_in_bytes
print(json.dumps([compiled.as_text(), memory.temp_size_in_bytes, peak]))
"""
LAYERS, WIDTH, MLP = TINY["num_hidden_layers"], TINY["hidden_size"], TINY["intermediate_size"]
HEADS, KV, HEAD = TINY["num_attention_heads"], TINY["num_key_value_heads"], TINY["head_dim"]
TABLE = TINY["vocab_size"] * WIDTH
ROW = 768
WEIGHTS = (WIDTH * MLP, WIDTH * HEADS * HEAD, WIDTH * KV * HEAD)
"""Of a layer, in elements."""


@cache
def compiled(written: str) -> tuple[Module, int, int]:
    """The program, its temporaries and the most that it needs at once beside its arguments, in bytes."""
    run = subprocess.run(
        [sys.executable, "-c", COMPILE], input=written, capture_output=True, text=True, env=os.environ | ENVIRONMENT
    )
    assert run.returncode == 0, run.stderr
    text, temporaries, peak = json.loads(run.stdout)
    return parse(text), temporaries, peak


@pytest.fixture
def step(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> tuple[Module, int]:
    """Fine-tuning on four chips: the program, and its temporaries in bytes."""
    pytest.importorskip("libtpu")
    directory = Path(tmp_path_factory.getbasetemp()) / "regressions"
    directory.mkdir(exist_ok=True)
    found: Config = config(directory, mesh=request.param, data={"row_length": ROW, "max_length": ROW})
    return compiled(json.dumps(found.model_dump(mode="json"), sort_keys=True))[:2]


FSDP = pytest.mark.parametrize("step", [{"fsdp": 4}], indirect=True, ids=["fsdp 4"])
MESHES = pytest.mark.parametrize("step", [{"fsdp": 4}, {"fsdp": 2, "tensor": 2}], indirect=True, ids=str)


def shapes(module: Module) -> set[tuple[int, ...]]:
    """Of everything that any instruction makes."""
    found = (shape.dims for c in module.computations.values() for i in c for shape in i.shapes)
    return {tuple(dims) for dims in found}


def collectives(module: Module, *kinds: str) -> list[tuple[str, Instruction]]:
    """With the computations they stand in."""
    return [(name, i) for name, c in module.computations.items() for i in c if i.opcode.removesuffix("-start") in kinds]


def elements(instruction: Instruction) -> int:
    return max(math.prod(shape.dims) for shape in instruction.shapes)


@MESHES
def test_no_layer_is_whole_outside_the_loop(step: tuple[Module, int]):
    """Of all layers together a device holds its shard; a weight is gathered in the loop, the head once outside."""
    module, _ = step
    stacked = {LAYERS * weight for weight in WEIGHTS}
    assert not [dims for dims in shapes(module) if math.prod(dims) in stacked and dims[:1] == (LAYERS,)]
    outside = [i for name, i in collectives(module, "all-gather") if name == module.entry.name]
    assert all(elements(i) not in WEIGHTS for i in outside)


@FSDP
def test_no_gradient_outlives_its_layer_whole(step: tuple[Module, int]):
    """It is reduced into its shard: what is summed on every device alike is small."""
    module, _ = step
    assert all(elements(i) < min(WEIGHTS) / 4 for _, i in collectives(module, "all-reduce"))


@MESHES
def test_no_activation_is_on_every_device(step: tuple[Module, int]):
    """Four rows over four or two devices: never all four of the model's width."""
    module, _ = step
    assert (4, ROW, WIDTH) not in shapes(module) and (4 * ROW, WIDTH) not in shapes(module)


@MESHES
def test_attention_is_a_kernel(step: tuple[Module, int]):
    """And nowhere are there scores of a row against itself."""
    module, _ = step
    calls = {i.name for c in module.computations.values() for i in c if i.opcode == "custom-call"}
    assert {kind for kind in ("fwd", "dq", "dkv") for name in calls if f"splash_mha_{kind}" in name} == {
        "fwd",
        "dq",
        "dkv",
    }
    assert not [dims for dims in shapes(module) if dims[-2:] == (ROW, ROW)]


@FSDP
def test_memory_of_the_step(step: tuple[Module, int]):
    """Gradients as they are stored, each layer's input, the head and its gradient, chunks of logits, a few layers."""
    _, temporaries = step
    layer = 3 * WEIGHTS[0] + 2 * WEIGHTS[1] + 2 * WEIGHTS[2]
    stored = 2 * (LAYERS * layer + 2 * TABLE) // 4
    logits = 3 * 4 * ROW * TINY["vocab_size"]
    inputs, own = LAYERS * 2 * ROW * WIDTH, 2 * ROW * (10 * WIDTH + 4 * MLP)
    assert temporaries < 2 * stored + inputs + own + 2 * TABLE + logits + 4 * 2 * layer


WIDE = TINY | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
"""So large that the compiler keeps nothing of all layers in vector memory."""


def test_gradients_add_up_in_place(tmp_path: Path):
    """Over four accumulation steps their f32 sum takes the place of the bf16 gradient of one. Beside it is the gradient
    of one layer, and that of the tables; within the loops nothing but the weights is as large as the sum."""
    pytest.importorskip("libtpu")
    programs = []
    for rows in (4, 16):
        train, data = {"global_batch_size": rows, "micro_batch_size": 4}, {"row_length": ROW, "max_length": ROW}
        found = config(tmp_path, mesh={"fsdp": 4}, train=train, data=data)
        (tmp_path / "config.json").write_text(json.dumps(WIDE))
        programs.append(compiled(json.dumps(found.model_dump(mode="json"), sort_keys=True)))
    (_, _, single), (module, _, several) = programs
    D, L = WIDE["hidden_size"], WIDE["num_hidden_layers"]
    matrices = [D * WIDE["intermediate_size"] // 4] * 3 + [D * D // 4] * 2 + [D * D // 8] * 2
    layer, tables = sum(matrices), 2 * WIDE["vocab_size"] * D // 4
    assert several - single < 2 * (L * layer + tables) + 2 * tables + 4 * layer

    handed_on = ("parameter", "get-tuple-element", "tuple", "while", "bitcast")
    fused = {
        name for c in module.computations.values() for i in c if i.opcode == "fusion" for name in i.called("calls")
    }
    loops = [c for name, c in module.computations.items() if name != module.entry.name and name not in fused]
    made = [
        (instruction, shape)
        for computation in loops
        for instruction in computation
        for shape in instruction.shapes
        if instruction.opcode not in handed_on
        and shape.dims[:1] == (L,)
        and math.prod(shape.dims) // L in matrices
        and shape.space == HBM
    ]
    sums = [instruction for instruction, shape in made if shape.dtype == "f32"]
    assert len(sums) == len(matrices)
    for instruction in sums:
        body = module.computations[instruction.called("calls")[0]]
        assert traffic.updated(body, body.root.name) is not None, f"{instruction.name} is not changed in place"
    # Weights are moved; a gradient in the compute dtype would be computed, or begin as zeros.
    others = {instruction.opcode for instruction, shape in made if shape.dtype != "f32"}
    assert not others & {"fusion", "dynamic-update-slice", "broadcast"}, others
