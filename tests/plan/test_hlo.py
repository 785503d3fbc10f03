"""Reading HLO text: what the grammar allows, and what compilers write."""

import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from posttrain.plan.hlo import HBM, HOST, VMEM, Shape, parse, shapes_of, split

HLO = Path(__file__).parent.parent / "fixtures" / "hlo"
PROGRAMS = sorted(path.stem for path in HLO.glob("*.txt"))

ODD = r"""HloModule odd, is_scheduled=true, replica_count=2, num_partitions=3, entry_computation_layout={}

FileNames
1 "a file {.py"

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum.1 = f32[] add(%a, %b), metadata={op_name="add"}
}, execution_thread="host"

ENTRY %main (p: f32[2], q: (s4[3], (bf16[2,4], pred[]))) -> f32[2] {
  %p = f32[2]{0:T(128)S(1)} parameter(0)
  %q = (s4[3]{0:T(128)E(4)}, (bf16[2,4]{1,0:T(8,128)(2,1)S(5)}, pred[]), /*index=2*/f8e4m3fn[8]) parameter(1)
  %kernel.7 = f32[2]{0} custom-call(%p, /*index=1*/%q), custom_call_target="a_target", frontend_attributes={kernel={
"xprof":"{\"block\": 128, \"text\": \"a, b)
} and more\"}"
}}, metadata={op_name="jit(run)/a, {b}/\"quoted\"" stack_frame_id=3},
  backend_config={"window_config":{"estimated_cycles":"7012"},"lists":[{"indices":["0","2"]}]}
  %limit = s32[] constant(-12)
  ROOT %end = f32[2]{0} fusion(f32[2]{0} %kernel.7, %limit), kind=kLoop, calls=%add
}
"""


def test_odd_text_is_read() -> None:
    module = parse(ODD)
    assert (module.name, module.devices, set(module.computations)) == ("odd", 6, {"add", "main"})
    assert [i.name for i in module.entry] == ["p", "q", "kernel.7", "limit", "end"]
    assert module.entry.root.name == "end"
    assert module.entry.root.called("calls") == ("add",)
    assert module.entry.root.operands == ("kernel.7", "limit")
    assert module.entry["limit"].arguments == "-12"
    assert module.entry.parameters == {0: "p", 1: "q"}
    assert [user.name for user in module.entry.users["kernel.7"]] == ["end"]


def test_attributes_over_several_lines() -> None:
    kernel = parse(ODD).entry["kernel.7"]
    assert kernel.operands == ("p", "q")
    assert kernel.attributes["custom_call_target"] == '"a_target"'
    assert kernel.attributes["frontend_attributes"].endswith("}}")
    assert kernel.op_name == r"jit(run)/a, {b}/\"quoted\""
    assert kernel.config("estimated_cycles") == "7012"
    assert kernel.config("emitter") is None


def test_tuples_keep_their_elements() -> None:
    first, second, third = parse(ODD).entry["q"].parts
    assert first == (Shape("s4", (3,)),)
    assert second == (Shape("bf16", (2, 4), HOST), Shape("pred", ()))
    assert third == (Shape("f8e4m3fn", (8,)),)
    assert [s.bytes for s in parse(ODD).entry["q"].shapes] == [1.5, 16.0, 1.0, 8.0]


@pytest.mark.parametrize(
    ("text", "shape", "count"),
    [
        ("f32[]", Shape("f32", ()), 4),
        ("bf16[7,512,512]{2,1,0:T(8,128)(2,1)S(1)}", Shape("bf16", (7, 512, 512), VMEM), 7 * 512 * 512 * 2),
        ("u2[8]{0}", Shape("u2", (8,)), 2),
        ("f32[<=16,4]", Shape("f32", (16, 4)), 256),
        ("c64[3]", Shape("c64", (3,)), 24),
        ("f32[0,8]", Shape("f32", (0, 8)), 0),
        ("token[]", Shape("token", (), HBM), 0),
    ],
)
def test_shapes(text: str, shape: Shape, count: float) -> None:
    assert shapes_of(text) == (shape,)
    assert shape.bytes == count


def test_unknown_width_is_an_error() -> None:
    with pytest.raises(ValueError, match="'weird7'"):
        _ = Shape("weird7", (2,)).bytes


def test_split_minds_brackets_and_strings() -> None:
    assert split('a={1,2}, b="x,y\\",z", c[3,4](5,6), d') == ["a={1,2}", 'b="x,y\\",z"', "c[3,4](5,6)", "d"]


@pytest.mark.parametrize("text", ["", "some text", ODD.split("ENTRY")[0], ODD.rstrip().removesuffix("}")])
def test_no_program(text: str) -> None:
    with pytest.raises(ValueError, match="no ENTRY"):
        parse(text)


def test_cut_off_inside_an_instruction() -> None:
    with pytest.raises(ValueError, match=r"does not end: '  %kernel\.7"):
        parse(ODD[: ODD.index("and more")])


def test_line_without_opcode() -> None:
    with pytest.raises(ValueError, match=r"line 13: no opcode"):
        parse(ODD.replace("parameter(0)\n  %q", "nothing\n  %q"))


@pytest.mark.parametrize("name", PROGRAMS)
def test_compiled_programs_are_read_whole(name: str) -> None:
    text = (HLO / f"{name}.txt").read_text()
    module = parse(text)
    instructions = [i for computation in module.computations.values() for i in computation]
    assert len(instructions) == len(re.findall(r"^  (?:ROOT )?%", text, re.MULTILINE))
    assert len(module.computations) == len(re.findall(r"^(?:ENTRY )?%.*\{$", text, re.MULTILINE))
    for computation in module.computations.values():
        assert computation.root.root
        for instruction in computation:
            assert set(instruction.operands) <= set(computation.instructions)
            assert instruction.parts or instruction.opcode in ("tuple", "parameter")
            for key in ("calls", "body", "condition", "to_apply", "branch_computations"):
                assert set(instruction.called(key)) <= set(module.computations)


def test_text_of_this_machine() -> None:
    def run(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.tanh(x @ y), y.astype(jnp.bfloat16)

    arrays = (jnp.ones((24, 40), jnp.float32), jnp.ones((40, 56), jnp.float32))
    module = parse(jax.jit(run).lower(*arrays).compile().as_text() or "")
    assert module.devices == 1
    parameters = [module.entry[module.entry.parameters[n]].shapes for n in range(2)]
    assert parameters == [(Shape("f32", (24, 40)),), (Shape("f32", (40, 56)),)]
    assert [math.prod(s.dims) for s in module.entry.root.shapes] == [24 * 56, 40 * 56]
    assert [s.dtype for s in module.entry.root.shapes] == ["f32", "bf16"]
