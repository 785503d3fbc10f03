"""Cost of programs against figures worked out by hand, from the shapes in `tests/fixtures/make_hlo.py`."""

import importlib.util
import itertools
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.plan.collectives import Collective
from posttrain.plan.hlo import parse
from posttrain.plan.program import ProgramCost, product_flops, program_cost

HLO = Path(__file__).parent.parent / "fixtures" / "hlo"
SCALARS = 1024
"""Bytes that counters and other single numbers may add to the traffic of a program."""


def cost_of(name: str, **mesh: int) -> ProgramCost:
    return program_cost((HLO / f"{name}.txt").read_text(), mesh)


def summary(collective: Collective) -> tuple[str, tuple[str, ...], int, str, int, float, float]:
    c = collective
    return c.kind, c.axes, c.group_size, c.dtype, c.static, c.executed, c.payload_bytes


def kinds(cost: ProgramCost) -> list[tuple[str, tuple[str, ...], int, str, int, float, float]]:
    return sorted(summary(collective) for collective in cost.collectives)


def test_scan_of_products() -> None:
    cost = cost_of("scan", data=4)
    assert cost.mxu_flops == 7 * 2 * 256 * 512 * 512
    assert [(loop.trips, loop.executed) for loop in cost.loops] == [(7, 1)]
    # each layer's weights once, the activations in and out: between layers they stay in VMEM
    assert cost.hbm_bytes == pytest.approx(2 * (7 * 512 * 512 + 2 * 256 * 512), abs=SCALARS)
    assert (cost.collectives, cost.kernels, cost.host_bytes, cost.recomputed_flops) == ((), (), 0, 0)
    # 7,012 for the fused product and 2,946 for a copy, as the compiler notes
    assert cost.estimated_cycles == 7 * (7012 + 2946)


def test_nested_loops_and_one_of_unknown_length() -> None:
    cost = cost_of("nested", data=4)
    assert cost.mxu_flops == (3 * 5 + 1) * 2 * 256 * 256 * 256
    assert [(loop.trips, loop.executed) for loop in cost.loops] == [(3, 1), (5, 3), (None, 1)]
    assert [loop.op_name for loop in cost.unknown_loops] == ["jit(run)/while"]


def test_costliest_branch() -> None:
    cost = cost_of("branches", data=4)
    assert cost.mxu_flops == 2 * 2 * 256**3
    assert cost.conditionals == 1


def test_fsdp_layers() -> None:
    """Two gathers of a layer's weights and one scatter of its gradients, forward, repeated and backward products."""
    cost = cost_of("fsdp", fsdp=4)
    product, weights = 2 * 512 * 1024 * 1024, 1024 * 1024 * 2
    assert cost.mxu_flops == 6 * 4 * product
    assert cost.recomputed_flops == 6 * product
    assert kinds(cost) == [
        ("all-gather", ("fsdp",), 4, "bf16", 1, 6, 6 * weights),
        ("all-gather", ("fsdp",), 4, "bf16", 1, 6, 6 * weights),
        ("all-reduce", ("fsdp",), 4, "f32", 1, 1, 4),
        ("reduce-scatter", ("fsdp",), 4, "bf16", 1, 6, 6 * weights),
    ]
    assert cost.wire_bytes == 3 * 6 * weights * 3 / 4 + 2 * 4 * 3 / 4
    again = [c.op_name for c in cost.collectives if "rematted_computation" in c.op_name]
    assert again == ["jit(loss)/transpose(jvp())/while/body/closed_call/checkpoint/rematted_computation/dot_general"]


def test_tensor_parallel() -> None:
    cost = cost_of("tensor", data=2, tensor=2)
    assert cost.mxu_flops == 2 * (2 * 256 * 256 * 512)
    assert kinds(cost) == [("all-reduce", ("tensor",), 2, "bf16", 1, 1, 256 * 256 * 2)]
    assert cost.wire_bytes == 256 * 256 * 2


def test_every_collective_by_hand() -> None:
    cost = cost_of("manual", data=2, tensor=2)
    row = 1024 * 4
    assert kinds(cost) == [
        ("all-gather", ("data",), 2, "f32", 1, 1, 64 * row),
        ("all-reduce", ("data",), 2, "f32", 1, 1, 64 * row),
        ("all-reduce", ("data", "tensor"), 4, "f32", 1, 1, 32 * row),
        ("all-reduce", ("tensor",), 2, "f32", 1, 1, 128 * row),
        ("all-to-all", ("tensor",), 2, "f32", 1, 1, 32 * row),
        ("collective-permute", ("data",), 4, "f32", 1, 9, 9 * 32 * row),
        ("reduce-scatter", ("tensor",), 2, "f32", 1, 1, 64 * row),
    ]
    assert cost.wire_bytes == row * (32 + 64 + 2 * 32 * 3 / 4 + 128 + 16 + 9 * 32 + 32)
    assert not any(c.sliced for c in cost.collectives)  # a fixed slice is the same on all devices: no shard


def test_kernels_by_name() -> None:
    cost = cost_of("kernel", data=4)
    (kernel,) = cost.kernels
    assert (kernel.name, kernel.static, kernel.executed, kernel.recomputed) == ("double", 1, 11, 0)
    assert kernel.flops == 11 * 256 * 256  # as its author declared
    assert cost.mxu_flops == 11 * 2 * 256**3
    again = (HLO / "kernel.txt").read_text().replace("closed_call/double", "rematted_computation/double")
    assert program_cost(again, {}).kernels[0].recomputed == 11


def test_gather_mixed_with_its_product() -> None:
    """Eight shards go round as permutes in a loop within the layer loop; the products are those of the whole."""
    cost = cost_of("ring", fsdp=8)
    assert cost.mxu_flops == 5 * 2 * 2048**3
    assert [(loop.trips, loop.executed) for loop in cost.loops] == [(5, 1), (2, 5)]
    shard = 256 * 2048 * 2
    # in a layer one permute ahead of the loop and four in each of its two runs
    assert kinds(cost) == [("collective-permute", ("fsdp",), 8, "bf16", 5, 5 * (1 + 4 * 2), 5 * 9 * shard)]
    assert cost.wire_bytes >= 5 * 7 * shard


def test_gather_in_pieces_counts_once() -> None:
    """The text names one of the two gathers three times: where it starts, runs beside a product, and ends."""
    assert (HLO / "overlap.txt").read_text().count(" all-gather(") == 4
    cost = cost_of("overlap", fsdp=4)
    assert cost.mxu_flops == 6 * 2 * 2 * 4096 * 4096 * 12288
    gathers = [c for c in cost.collectives if c.kind == "all-gather"]
    assert sum(c.static for c in gathers) == 2
    assert sum(c.executed for c in gathers) == 6 * 2
    assert sum(c.payload_bytes for c in gathers) == 6 * 2 * 4096 * 12288 * 2
    mib = 2**20
    rows, weight, shard = 32 * mib, 96 * mib, 24 * mib
    # slices of the stacked weights, one kept in VMEM; a gather to HBM from it and one to VMEM from HBM; the products
    sliced, gathered = shard + 2 * shard, weight + shard
    products = (rows + weight + weight) + (weight + rows)
    # before and after the layers: both stacks from f32 to bf16, a copy of the rows, and their sum
    outside = 2 * 6 * shard * 3 + 2 * rows + rows
    assert cost.hbm_bytes == pytest.approx(6 * (sliced + gathered + products) + outside, abs=SCALARS)


def test_rows_padded_for_a_scatter_are_no_payload() -> None:
    """Shards of 512 rows are reduced as 528; what they are off their places then goes to the neighbour."""
    cost = cost_of("padded", fsdp=4)
    weights = 2048 * 2048 * 2
    assert cost.mxu_flops == 5 * 4 * 2 * 2048**3
    assert kinds(cost) == [
        ("all-gather", ("fsdp",), 4, "bf16", 1, 5, 5 * weights),
        ("all-gather", ("fsdp",), 4, "bf16", 1, 5, 5 * weights),
        ("collective-permute", ("fsdp",), 4, "bf16", 1, 5, 5 * 48 * 2048 * 2),
        ("reduce-scatter", ("fsdp",), 4, "bf16", 1, 5, 5 * weights),
    ]


def test_all_reduce_of_which_a_shard_is_kept() -> None:
    cost = cost_of("sliced", fsdp=8)
    (reduce,) = cost.collectives
    assert (reduce.kind, reduce.sliced, reduce.axes) == ("all-reduce", True, ("fsdp",))
    assert reduce.payload_bytes == 1024 * 2048 * 2
    assert reduce.wire_bytes == 2 * reduce.payload_bytes * 7 / 8
    assert reduce.emitter == "RotatedPincerEmitter"
    assert cost_of("fsdp", fsdp=4).collectives[2].emitter == "SingleInputAllReduceScatterFusion"


@pytest.mark.parametrize(("rows", "sliced"), [(4, True), (2, True), (5, False)])
def test_a_share_is_no_more_than_one_of_the_group(rows: int, sliced: bool) -> None:
    text = f"""HloModule m, num_partitions=2

ENTRY %m (x: f32[8,16], i: s32[]) -> f32[{rows},16] {{
  %x = f32[8,16] parameter(0)
  %i = s32[] parameter(1)
  %r = f32[8,16] all-reduce(%x), replica_groups={{{{0,1}}}}
  %c = f32[8,16] copy(%r)
  ROOT %s = f32[{rows},16] dynamic-slice(%c, %i, %i), dynamic_slice_sizes={{{rows},16}}
}}
"""
    (reduce,) = program_cost(text, {"data": 2}).collectives
    assert reduce.sliced is sliced


def test_across_slices() -> None:
    """An all-reduce over both axes is a scatter and a gather within slices, and an all-reduce of shards across."""
    cost = cost_of("slices", replica=2, fsdp=4)
    shard = 128 * 512 * 4
    assert kinds(cost) == [
        ("all-gather", ("fsdp",), 4, "f32", 2, 2, 2 * 4 * shard),
        ("all-reduce", ("replica",), 2, "f32", 2, 2, 2 * shard),
        ("reduce-scatter", ("fsdp",), 4, "f32", 1, 1, 4 * shard),
    ]
    assert {(c.axes, c.network) for c in cost.collectives} == {(("replica",), "dcn"), (("fsdp",), "ici")}
    # what crosses goes through the host, out and in, twice
    assert cost.host_bytes == 2 * 2 * shard


def test_gathers_on_other_cores() -> None:
    """They stand in computations that are called asynchronously; their cycles are not those of the TensorCore."""
    cost = cost_of("sparsecore", fsdp=8)
    assert kinds(cost) == [("all-gather", ("fsdp",), 8, "bf16", 1, 4, 4 * 1024 * 1024 * 2)]
    assert cost.mxu_flops == 4 * 2 * 512 * 1024 * 1024
    assert cost.kernels == ()
    text = (HLO / "sparsecore.txt").read_text()
    mark = '"compute_type":"COMPUTE_TYPE_SCALAR"'
    assert mark in text
    estimated = program_cost(text.replace(mark, f'"estimated_cycles":"1000000",{mark}'), {"fsdp": 8})
    assert estimated.estimated_cycles == cost.estimated_cycles > 0


def test_to_and_from_the_host() -> None:
    cost = cost_of("offload", data=4)
    array = 1024 * 1024 * 4
    assert cost.host_bytes == 2 * array
    # written when it comes, read with the other operand, written, and read when it goes
    assert cost.hbm_bytes == 5 * array


def test_mesh_of_another_size() -> None:
    with pytest.raises(ValueError, match=r"'data': 2, 'fsdp': 3\} has 6 devices, .* compiled for 4"):
        cost_of("scan", data=2, fsdp=3)
    assert [c.axes for c in cost_of("tensor").collectives] == [()]


def test_program_of_this_machine() -> None:
    """Products within, after and beside loops; a branch counts as its costlier side."""

    def run(x: jax.Array, w: jax.Array, n: int) -> jax.Array:
        x = jax.lax.scan(lambda h, w_l: (jnp.tanh(h @ w_l), None), x, w)[0]
        x = jax.lax.cond(n > 3, lambda h: h @ w[1] @ w[2], jnp.sin, x)
        return jnp.einsum("tm,tn->mn", x, x)

    lowered = jax.jit(run).lower(jnp.ones((32, 64), jnp.float32), jnp.ones((5, 64, 64), jnp.float32), 3)
    cost = program_cost(lowered.compile().as_text() or "", {})
    assert cost.mxu_flops == (5 + 2) * 2 * 32 * 64 * 64 + 2 * 32 * 64 * 64
    assert cost.unknown_loops == ()
    assert cost.estimated_cycles == 0


def test_batched_product_of_this_machine() -> None:
    text = jax.jit(lambda a, b: jnp.einsum("bnts,bsnh->btnh", a, b)).lower(
        jnp.ones((3, 4, 10, 12), jnp.float32), jnp.ones((3, 12, 4, 8), jnp.float32)
    )
    assert program_cost(text.compile().as_text() or "", {}).mxu_flops == 2 * 3 * 4 * 10 * 12 * 8


CONVOLUTION = """HloModule m

ENTRY %m (x: f32[{left}], w: f32[{right}]) -> f32[{out}] {{
  %x = f32[{left}] parameter(0)
  %w = f32[{right}] parameter(1)
  ROOT %c = f32[{out}] convolution(%x, %w), {window}dim_labels={labels}
}}
"""


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "pad", "dilate", "kernel_dilate"),
    [
        (12, 3, 1, (0, 0), 1, 1),
        (12, 3, 2, (1, 1), 1, 1),
        (11, 4, 3, (2, 5), 1, 2),
        (7, 3, 1, (2, 2), 3, 1),
        (5, 5, 4, (0, 0), 5, 1),
        (8, 3, 1, (-1, -2), 1, 1),
    ],
)
def test_convolution_counts_what_meets(
    size: int, kernel: int, stride: int, pad: tuple[int, int], dilate: int, kernel_dilate: int
) -> None:
    """Every product of two elements that the definition of a convolution names, one by one."""
    spread = np.zeros((size - 1) * dilate + 1, bool)
    spread[::dilate] = True
    low, high = pad
    padded = np.concatenate([np.zeros(max(low, 0), bool), spread, np.zeros(max(high, 0), bool)])
    padded = padded[max(-low, 0) : len(padded) - max(-high, 0)]
    reach = (kernel - 1) * kernel_dilate + 1
    out = (len(padded) - reach) // stride + 1
    met = sum(bool(padded[o * stride + k * kernel_dilate]) for o, k in itertools.product(range(out), range(kernel)))
    window = (
        f"window={{size={kernel} stride={stride} pad={low}_{high} lhs_dilate={dilate} rhs_dilate={kernel_dilate}}}, "
    )
    text = CONVOLUTION.format(
        left=f"2,{size},6", right=f"{kernel},6,10", out=f"2,{out},10", window=window, labels="b0f_0io->b0f"
    )
    entry = parse(text).entry
    assert product_flops(entry, entry.root) == 2 * met * 2 * 6 * 10


@pytest.mark.parametrize(
    ("left", "right", "out", "labels", "flops"),
    [
        ("256,512", "512,128", "256,128", "bf_io->bf", 2 * 256 * 512 * 128),
        ("512,256", "512,128", "256,128", "fb_io->bf", 2 * 256 * 512 * 128),
        ("512,256", "128,512", "128,256", "fb_oi->fb", 2 * 256 * 512 * 128),
    ],
)
def test_product_written_as_convolution(left: str, right: str, out: str, labels: str, flops: float) -> None:
    entry = parse(CONVOLUTION.format(left=left, right=right, out=out, window="", labels=labels)).entry
    assert product_flops(entry, entry.root) == flops


def judge(shared: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("aot_report", shared / "tools" / "aot_report.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.acceptance
@pytest.mark.parametrize(
    "name", ["scan", "nested", "fsdp", "tensor", "manual", "kernel", "ring", "overlap", "padded", "sliced"]
)
def test_agrees_with_the_other_reader(name: str, shared: Path) -> None:
    """The reader of the anchors' figures; conditionals and slices, which it reads otherwise, are left out."""
    text = (HLO / f"{name}.txt").read_text()
    theirs, ours = judge(shared).walk(text), program_cost(text, {})
    assert ours.mxu_flops == theirs["mxu_flops"]
    assert ours.estimated_cycles == theirs["xla_estimated_cycles"]
    assert ours.wire_bytes == theirs["collective_wire_bytes"]
    assert sum(c.payload_bytes for c in ours.collectives) == theirs["collective_payload_bytes"]
    assert sum(c.executed for c in ours.collectives) == theirs["collective_count_executed"]
    assert sum(c.static for c in ours.collectives) == theirs["collective_count_static"]
    assert {k.name: k.executed for k in ours.kernels} == theirs["pallas_kernels"]
    assert len(ours.unknown_loops) == theirs["unknown_trip_loops"]


@pytest.mark.acceptance
def test_chips_agree_with_the_other_reader(shared: Path) -> None:
    from posttrain.train.chips import CHIPS

    for name, (flops, bandwidth, memory, ici, clock) in judge(shared).CHIPS.items():
        chip = CHIPS[name]
        found = (chip.bf16_flops, chip.hbm_bandwidth, chip.hbm_bytes, chip.ici_bandwidth, chip.clock)
        assert found == (flops, bandwidth, memory, ici, clock)
