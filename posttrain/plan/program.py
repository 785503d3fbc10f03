"""What a compiled program costs one device, loops multiplied out: the figures that a plan is made of.

XLA's own `cost_analysis` counts the body of a loop once, so that a model whose layers are scanned looks one layer
deep. `program_cost` walks the program as it is executed instead: from the entry through calls, fusions, asynchronous
computations, branches and loops, every instruction times the runs of the loops around it.

What it cannot see: FLOPs inside custom calls, Pallas kernels above all (they are listed, with what they declare);
stalls and overlap; and runs of loops that depend on data, whose bodies are counted once and listed as unknown.
"""

import functools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from posttrain.plan import traffic
from posttrain.plan.collectives import Collective, read_collective, read_crossing, read_scatter
from posttrain.plan.hlo import COLLECTIVES, Computation, Instruction, Module, parse
from posttrain.plan.loops import Place, trip_count

_FLAG = 2
"""Memory space of the flags by which the pieces of an asynchronous collective know of each other."""
_RECOMPUTED = "rematted_computation"
"""Part of the `op_name` of what `jax.checkpoint` computes a second time."""


@dataclass(frozen=True)
class Kernel:
    """Calls of one custom kernel: its name, or the target of a call that has no kernel of its own.

    `recomputed` counts the executions that rematerialization repeats. `flops` is what the kernel's author declared,
    over all calls; None if nothing was declared.
    """

    name: str
    static: int
    executed: float
    recomputed: float = 0.0
    flops: float | None = None


@dataclass(frozen=True)
class Loop:
    """A `while` instruction: runs of its body each time it is reached, None if unknown, and how often it is reached."""

    name: str
    op_name: str
    trips: int | None
    executed: float


@dataclass(frozen=True)
class ProgramCost:
    """Work of one device in one run of a program.

    `mxu_flops`: of dot products and convolutions, two for a multiplication with its addition; `recomputed_flops`, the
    part of them that rematerialization repeats. `hbm_bytes`: read from and written to the device's memory.
    `estimated_cycles`: XLA's estimates summed, of a TPU's TensorCore; on other devices 0. `host_bytes`: moved to and
    from the host. `conditionals`: of each only the costliest branch is counted.
    """

    mxu_flops: float = 0.0
    recomputed_flops: float = 0.0
    hbm_bytes: float = 0.0
    estimated_cycles: float = 0.0
    host_bytes: float = 0.0
    collectives: tuple[Collective, ...] = ()
    kernels: tuple[Kernel, ...] = ()
    loops: tuple[Loop, ...] = ()
    conditionals: int = 0

    @property
    def wire_bytes(self) -> float:
        """Bytes that the device sends to others, in its slice and across slices."""
        return sum((collective.wire_bytes for collective in self.collectives), 0.0)

    @property
    def unknown_loops(self) -> tuple[Loop, ...]:
        """Loops whose bodies were counted once for want of a number: every figure is then a lower bound."""
        return tuple(loop for loop in self.loops if loop.trips is None)


@dataclass
class _Tally:
    """Sums in the making."""

    mxu_flops: float = 0.0
    recomputed_flops: float = 0.0
    hbm_bytes: float = 0.0
    estimated_cycles: float = 0.0
    host_bytes: float = 0.0
    conditionals: int = 0
    collectives: list[Collective] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)
    loops: list[Loop] = field(default_factory=list)

    def add(self, other: "_Tally") -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def weight(self) -> tuple[float, float, float]:
        """By which branches of a conditional are compared."""
        return self.estimated_cycles, self.mxu_flops, self.hbm_bytes


def program_cost(program: str | Module, mesh: Mapping[str, int]) -> ProgramCost:
    """Cost of a program, given as text or parsed, on a mesh: sizes by axis name, row-major over its devices.

    With an empty mesh collectives carry the sizes of their groups but no axes. `ValueError` if the program's devices
    do not make up the mesh; those of one slice of several may be a fraction of it.
    """
    module = parse(program) if isinstance(program, str) else program
    size = math.prod(mesh.values())
    if mesh and (size < module.devices or size % module.devices):
        raise ValueError(
            f"mesh {dict(mesh)} has {size} devices, the program {module.name} was compiled for {module.devices}: "
            f"give the mesh that it was compiled for"
        )
    walk = _Walk(module, mesh)
    walk.visit(Place(module.entry), 1.0)
    tally = walk.tally
    return ProgramCost(
        mxu_flops=tally.mxu_flops,
        recomputed_flops=tally.recomputed_flops,
        hbm_bytes=tally.hbm_bytes,
        estimated_cycles=tally.estimated_cycles,
        host_bytes=tally.host_bytes,
        collectives=_merge_collectives(tally.collectives),
        kernels=_merge_kernels(tally.kernels),
        loops=tuple(tally.loops),
        conditionals=tally.conditionals,
    )


class _Walk:
    """Visits computations as they are executed and sums what they cost."""

    def __init__(self, module: Module, mesh: Mapping[str, int]) -> None:
        self.module = module
        self.mesh = mesh
        self.tally = _Tally()

    def visit(self, place: Place, times: float) -> None:
        """Counts a computation that runs `times` times, and all that it calls."""
        for instruction in place.computation:
            match instruction.opcode:
                case "while":
                    self._loop(place, instruction, times)
                case "conditional":
                    self._branch(place, instruction, times)
                case "call" | "call-start" | "async-start":
                    self._call(place, instruction, times)
                case _:
                    self._count(place.computation, instruction, times)

    def _call(self, place: Place, call: Instruction, times: float) -> None:
        """Counts what a call runs; the cycles only if it runs on the same core, not beside it on a SparseCore."""
        cycles = self.tally.estimated_cycles
        (name,) = call.called("to_apply") or call.called("calls")
        self.visit(Place(self.module.computations[name], call, place), times)
        if call.attributes.get("async_execution_thread", '"main"') != '"main"':
            self.tally.estimated_cycles = cycles

    def _loop(self, place: Place, loop: Instruction, times: float) -> None:
        trips = trip_count(self.module, place, loop)
        self.tally.loops.append(Loop(loop.name, loop.op_name, trips, times))
        (body,) = loop.called("body")
        self.visit(Place(self.module.computations[body], loop, place), times * (1 if trips is None else trips))

    def _branch(self, place: Place, conditional: Instruction, times: float) -> None:
        names = conditional.called("branch_computations") or (
            *conditional.called("true_computation"),
            *conditional.called("false_computation"),
        )
        branches = []
        for name in names:
            branch = _Walk(self.module, self.mesh)
            branch.visit(Place(self.module.computations[name], conditional, place), times)
            branches.append(branch.tally)
        self.tally.conditionals += 1
        self.tally.add(max(branches, key=lambda tally: tally.weight))

    def _count(self, computation: Computation, instruction: Instruction, times: float) -> None:
        """Counts one instruction that stands in no fusion."""
        moved = traffic.accesses(self.module, computation, instruction)
        self._move(moved, times)
        self.tally.estimated_cycles += times * int(instruction.config("estimated_cycles") or 0)
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            self._collective(read_collective(self.module, computation, instruction, self.mesh), times)
        elif kind == "send":
            crossing = read_crossing(self.module, instruction, self.mesh)
            if crossing is not None:
                self._collective(crossing, times)
        elif kind == "fusion":
            self._fusion(computation, instruction, times)
        else:
            self._compute(computation, instruction, times)

    def _compute(self, computation: Computation, instruction: Instruction, times: float) -> None:
        if instruction.opcode in ("dot", "convolution"):
            flops = times * product_flops(computation, instruction)
            self.tally.mxu_flops += flops
            self.tally.recomputed_flops += flops if _RECOMPUTED in instruction.op_name else 0.0
        elif instruction.opcode == "custom-call" and not traffic.is_free(instruction):
            self.tally.kernels.append(_kernel(instruction, times))

    def _fusion(self, computation: Computation, fusion: Instruction, times: float) -> None:
        """Counts what a fusion computes and communicates; a collective in pieces where its first piece is."""
        fused = self.module.computations[fusion.called("calls")[0]]
        first = all(shape.space != _FLAG for shape in computation.operand_shapes(fusion))
        for instruction in fused:
            if instruction.opcode in COLLECTIVES:
                if not first:
                    continue
                if traffic.is_reduce_scatter(fused):
                    self._collective(read_scatter(self.module, fusion, fused, self.mesh), times)
                else:
                    self._move(traffic.started(fusion, fused, instruction), times)
                    self._collective(read_collective(self.module, fused, instruction, self.mesh), times)
            elif instruction.opcode == "fusion":
                self._fusion(fused, instruction, times)
            else:
                self._compute(fused, instruction, times)

    def _collective(self, one: Collective, times: float) -> None:
        self.tally.collectives.append(
            replace(
                one,
                executed=times,
                payload_bytes=times * one.payload_bytes,
                wire_bytes=times * one.wire_bytes,
            )
        )

    def _move(self, moved: list[traffic.Access], times: float) -> None:
        self.tally.hbm_bytes += times * traffic.hbm_bytes(moved)
        self.tally.host_bytes += times * traffic.host_bytes(moved)


def product_flops(computation: Computation, instruction: Instruction) -> float:
    """FLOPs of a `dot` or a `convolution`: two for each multiplication whose operands are both elements, no padding."""
    left, right = (computation[name].shapes[0].dims for name in instruction.operands[:2])
    out = instruction.shapes[0].dims
    attributes = instruction.attributes
    if instruction.opcode == "dot":
        contracted = attributes.get("lhs_contracting_dims", "{}").strip("{}")
        return 2.0 * math.prod(out) * math.prod(left[int(dim)] for dim in contracted.split(",") if dim)
    operands, result = attributes["dim_labels"].split("->")
    left_labels, right_labels = operands.split("_")
    window = dict(item.split("=") for item in attributes.get("window", "{}").strip("{}").split())
    pairs = 1.0
    for label in filter(str.isdigit, result):
        number = int(label)
        low = window["pad"].split("x")[number].split("_")[0] if "pad" in window else "0"
        pairs *= _window_pairs(
            left[left_labels.index(label)],
            right[right_labels.index(label)],
            out[result.index(label)],
            _window_value(window, "stride", number),
            int(low),
            _window_value(window, "lhs_dilate", number),
            _window_value(window, "rhs_dilate", number),
        )
    batch = left[left_labels.index("b")] / int(attributes.get("batch_group_count", 1))
    return 2.0 * pairs * batch * right[right_labels.index("i")] * out[result.index("f")]


def _window_value(window: Mapping[str, str], key: str, number: int) -> int:
    return int(window[key].split("x")[number]) if key in window else 1


@functools.cache
def _window_pairs(size: int, kernel: int, out: int, stride: int, low: int, dilate: int, kernel_dilate: int) -> int:
    """Pairs (result, kernel element) along one dim that meet an element of the input, not padding and not a gap."""
    outer, inner = np.arange(out) * stride - low, np.arange(kernel) * kernel_dilate
    if len(outer) < len(inner):
        outer, inner = inner, outer
    met = 0
    for offset in inner:
        at = outer + offset
        met += int(((at >= 0) & (at <= (size - 1) * dilate) & (at % dilate == 0)).sum())
    return met


def _kernel(call: Instruction, times: float) -> Kernel:
    target = call.attributes.get("custom_call_target", "").strip('"')
    name = re.sub(r"[.\d]+$", "", call.name) if target == "tpu_custom_call" else target
    declared = call.config("flops")
    recomputed = times if _RECOMPUTED in call.op_name else 0.0
    return Kernel(name, 1, times, recomputed, times * float(declared) if declared else None)


def _merge_collectives(found: Iterable[Collective]) -> tuple[Collective, ...]:
    """One record for all that differ in their counts alone, the most bytes on the wire first."""
    merged: dict[tuple, Collective] = {}
    for one in found:
        known = merged.get(one.key)
        merged[one.key] = (
            one
            if known is None
            else replace(
                known,
                static=known.static + one.static,
                executed=known.executed + one.executed,
                payload_bytes=known.payload_bytes + one.payload_bytes,
                wire_bytes=known.wire_bytes + one.wire_bytes,
            )
        )
    return tuple(sorted(merged.values(), key=lambda one: (-one.wire_bytes, one.key)))


def _merge_kernels(found: Iterable[Kernel]) -> tuple[Kernel, ...]:
    merged: dict[str, Kernel] = {}
    for one in found:
        known = merged.get(one.name, Kernel(one.name, 0, 0.0))
        flops = None if known.flops is None and one.flops is None else (known.flops or 0.0) + (one.flops or 0.0)
        merged[one.name] = Kernel(
            one.name,
            known.static + one.static,
            known.executed + one.executed,
            known.recomputed + one.recomputed,
            flops,
        )
    return tuple(sorted(merged.values(), key=lambda one: (-one.executed, one.name)))
