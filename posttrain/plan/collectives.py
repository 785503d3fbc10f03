"""Which devices a collective joins, along which axes of the mesh, and what each of them sends.

Devices are numbered as the program numbers them: row-major over the mesh, as `jax.sharding.Mesh` lists them. A
program for several slices is compiled for one of them: its collectives number the devices of their own slice, which
are taken to be consecutive in the mesh (its leading axes run across slices), and what crosses slices is a pair of
`send` and `recv` to the multislice runtime that names slices and devices.
"""

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from posttrain.plan.hlo import Computation, Instruction, Module, Shape
from posttrain.plan.traffic import slices_of, total_bytes

_CROSSING = {
    "ALL_REDUCE": "all-reduce",
    "ALL_GATHER": "all-gather",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}
"""Kinds by the names that the multislice runtime has for them."""

_EXPLICIT = re.compile(r"\{([\d,\s]*)\}")
_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"@?mesh[\[<]([^\]>]*)[\]>](?:,?\s*device_ids=\(([^{]*)\))?[,\s]*\{([^}]*)\}")
_MESH_AXIS = re.compile(r"'?([\w.\-]+)'?=(\d+)")
_MESH_PART = re.compile(r"'?([A-Za-z_][\w.\-]*)'?(?::\((\d+)\)(\d+))?")
_TARGET = re.compile(r"\{([\d,:]+)\}x\{([\d,:]+)\}")

Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Collective:
    """All executions, in one step and on one device, of collectives that agree in everything but their counts.

    `static` counts instructions, `executed` how often they run. `payload_bytes` is what is gathered, reduced, exchanged
    or passed on; `wire_bytes` what each device must send for it. Both sum over the executions. `axes` is the smallest
    set of mesh axes within which the groups lie; the groups are whole axes if `group_size` is the product of their
    sizes. Of a permute `group_size` counts the devices that take part. `emitter` is the algorithm that the compiler
    notes, if it does. `sliced`: an all-reduce of whose result each device keeps a slice only, as where a reduce-scatter
    would have done.
    """

    kind: str
    axes: tuple[str, ...]
    group_size: int
    op_name: str
    dtype: str
    network: Literal["ici", "dcn"] = "ici"
    emitter: str = ""
    sliced: bool = False
    static: int = 1
    executed: float = 1.0
    payload_bytes: float = 0.0
    wire_bytes: float = 0.0

    @property
    def key(self) -> tuple:
        """All that is not a count."""
        return self.kind, self.axes, self.group_size, self.op_name, self.dtype, self.network, self.emitter, self.sliced


def wire_bytes(kind: str, payload: float, group: int) -> float:
    """Bytes that each of `group` devices sends, where no link is used twice for the same data: rings.

    An all-gather passes on every shard but the own one, (n - 1)/n of the gathered array; a reduce-scatter the same of
    the array to be reduced; an all-reduce is both. A permute sends its operand once, an all-to-all all parts but one.
    (Chan et al. 2007, "Collective communication: theory, practice, and experience".)
    """
    if kind in ("collective-permute", "collective-broadcast"):
        return payload if group > 1 else 0.0
    return payload * (group - 1) / group * (2 if kind == "all-reduce" else 1)


def read_collective(
    module: Module, computation: Computation, instruction: Instruction, mesh: Mapping[str, int]
) -> Collective:
    """One execution of a collective instruction (`<kind>` or `<kind>-start`), attributed to the axes of `mesh`."""
    kind = instruction.opcode.removesuffix("-start")
    operands = computation.operand_shapes(instruction)
    if kind == "ragged-all-to-all":  # then the array that it writes into, offsets and sizes
        operands = computation[instruction.operands[0]].shapes
    groups = device_groups(instruction, module.devices)
    size = max((len(group) for group in groups), default=1)
    payload = total_bytes(operands) * (size if kind == "all-gather" else 1)
    if kind == "collective-permute":
        payload = _permuted(instruction, operands)
        size = len(set(itertools.chain(*groups)))
    sliced = kind == "all-reduce" and _sliced(module, computation, instruction, payload / size)
    return _collective(kind, instruction, operands, payload, size, axes_of(groups, mesh), sliced=sliced)


def read_scatter(module: Module, caller: Instruction, fused: Computation, mesh: Mapping[str, int]) -> Collective:
    """One execution of a reduce-scatter that TPU programs write as a fusion of an all-reduce and a slice.

    Rows that the fusion pads, to make shards of whole tiles, are no part of the payload.
    """
    reduce = next(i for i in fused if i.opcode == "all-reduce")
    source = fused[reduce.operands[0]]
    while source.opcode in ("pad", "bitcast", "copy"):
        source = fused[source.operands[0]]
    operands = source.shapes
    groups = device_groups(reduce, module.devices)
    size = max(len(group) for group in groups)
    payload = total_bytes(operands)
    return _collective("reduce-scatter", caller, operands, payload, size, axes_of(groups, mesh))


def read_crossing(module: Module, send: Instruction, mesh: Mapping[str, int]) -> Collective | None:
    """One execution of what crosses slices, read off its `send`; None if the send is no part of a collective."""
    attributes = send.attributes.get("frontend_attributes", "")
    transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', attributes)
    target = _TARGET.search(attributes)
    if transfer is None or target is None:
        return None
    kind = _CROSSING.get(transfer[1])
    if kind is None:
        raise ValueError(f"{send.name}: transfer type {transfer[1]} between slices is not one of {sorted(_CROSSING)}")
    slices, local = _listed(target[1]), _listed(target[2])
    first = min(slices)
    groups = tuple(tuple((s - first) * module.devices + device for s in slices) for device in local)
    shapes = send.parts[0]
    payload = total_bytes(shapes) * (len(slices) if kind == "all-gather" else 1)
    return _collective(kind, send, shapes, payload, len(slices), axes_of(groups, mesh), network="dcn")


def device_groups(instruction: Instruction, devices: int) -> Groups:
    """Groups of device numbers that a collective joins; of a permute the pairs (source, target) that are two devices.

    Reads the explicit form `{{0,1},{2,3}}`, the iota form `[2,2]<=[2,2]T(1,0)` (numbers in order, reshaped, transposed,
    and reshaped into groups) and the mesh form `mesh['a'=2,'b'=2] {'b'}` (the named axes, or parts of one,
    `'b':(before)size`). No groups, or empty ones, mean all devices together.
    """
    pairs = instruction.attributes.get("source_target_pairs")
    if pairs is not None:
        found = (tuple(map(int, pair.split(","))) for pair in _EXPLICIT.findall(pairs))
        return tuple(pair for pair in found if pair[0] != pair[1])
    text = instruction.attributes.get("replica_groups", "{}")
    if "device_ids" in instruction.attributes:  # of a mesh in another order: written behind a comma of its own
        text = f"{text}, device_ids={instruction.attributes['device_ids']}"
    if iota := _IOTA.fullmatch(text):
        return _rows(_iota(iota).reshape([int(size) for size in iota[1].split(",")]))
    if mesh := _MESH.fullmatch(text):
        return _mesh_groups(mesh)
    if not re.fullmatch(r"[{}\d,\s]*", text):
        raise ValueError(f"{instruction.name}: replica_groups={text} is in none of the known forms")
    groups = tuple(tuple(map(int, group.split(","))) for group in _EXPLICIT.findall(text) if group.strip())
    return groups or (tuple(range(devices)),)


def axes_of(groups: Groups, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The smallest set of axes, in mesh order, so that every group stays within it; `()` if no group has two members.

    A device is its number in row-major order; groups stay within a set of axes if all members of a group agree on
    every other axis. This is the set whose groups equal the given ones, wherever such a set exists. `ValueError` for a
    device that the mesh has not; without a mesh there are no axes to name.
    """
    sizes = tuple(mesh.values())
    members = [np.asarray(group) for group in groups if len(group) > 1]
    if not members or not mesh:
        return ()
    highest = max(int(group.max()) for group in members)
    if highest >= math.prod(sizes):
        raise ValueError(f"device {highest} in a mesh {dict(mesh)} of {math.prod(sizes)} devices")
    moved = np.zeros(len(sizes), bool)
    for group in members:
        places = np.stack(np.unravel_index(group, sizes))
        moved |= (places != places[:, :1]).any(axis=1)
    return tuple(axis for axis, moves in zip(mesh, moved, strict=True) if moves)


def _collective(
    kind: str,
    instruction: Instruction,
    shapes: tuple[Shape, ...],
    payload: float,
    size: int,
    axes: tuple[str, ...],
    network: Literal["ici", "dcn"] = "ici",
    sliced: bool = False,
) -> Collective:
    largest = max(shapes, key=lambda shape: shape.bytes)
    return Collective(
        kind=kind,
        axes=axes,
        group_size=size,
        op_name=instruction.op_name,
        dtype=largest.dtype,
        network=network,
        emitter=instruction.config("emitter") or "",
        sliced=sliced,
        payload_bytes=payload,
        wire_bytes=wire_bytes(kind, payload, size),
    )


def _sliced(module: Module, computation: Computation, reduce: Instruction, share: float) -> bool:
    """Whether a device's own share is all that is used of an all-reduce: slices at computed places, no more than it."""
    slices = slices_of(module, computation, reduce.name, frozenset(("dynamic-slice",)))
    return bool(slices) and total_bytes(slices) <= share


def _permuted(instruction: Instruction, operands: tuple[Shape, ...]) -> float:
    """Bytes that a permute moves: its operands, or of those that it writes into others, the slices it names."""
    if "slice_sizes" not in instruction.attributes:
        return total_bytes(operands)
    sizes = [math.prod(map(int, dims.split(","))) for dims in _EXPLICIT.findall(instruction.attributes["slice_sizes"])]
    return sum(sizes) * operands[0].bits / 8


def _rows(array: np.ndarray) -> Groups:
    return tuple(tuple(int(device) for device in row) for row in array)


def _iota(found: re.Match) -> np.ndarray:
    """Numbers in order, in the shape behind `<=`, transposed as `T(...)` says, flat."""
    array = np.arange(math.prod(map(int, found[2].split(",")))).reshape([int(size) for size in found[2].split(",")])
    return array.transpose([int(axis) for axis in found[3].split(",")] if found[3] else None).reshape(-1)


def _mesh_groups(found: re.Match) -> Groups:
    """Groups that agree on every axis but the named ones; an axis of which a part is named is cut into three."""
    sizes = {name: int(size) for name, size in _MESH_AXIS.findall(found[1])}
    total = math.prod(sizes.values())
    order = np.arange(total)
    if found[2]:
        iota = _IOTA.fullmatch(f"[{total}]<={found[2].strip()}") or _IOTA.fullmatch(found[2].strip())
        order = _iota(iota) if iota else np.asarray([int(device) for device in found[2].strip("() ").split(",")])
    named: dict[str, list[tuple[int, int]]] = {}
    for name, before, size in _MESH_PART.findall(found[3]):
        named.setdefault(name, []).append((int(before or 1), int(size or sizes[name])))
    cut: list[int] = []
    joined: list[int] = []
    for name, size in sizes.items():
        done = 1
        for before, part in sorted(named.get(name, [])):
            cut.append(before // done)
            joined.append(len(cut))
            cut.append(part)
            done = before * part
        cut.append(size // done)
    grid = order.reshape(cut)
    kept = [axis for axis in range(len(cut)) if axis not in joined]
    group = math.prod(cut[axis] for axis in joined)
    return _rows(grid.transpose(kept + joined).reshape(-1, group))


def _listed(text: str) -> list[int]:
    """Numbers and ranges with both ends: `0:3,8` is 0, 1, 2, 3, 8."""
    numbers = []
    for item in text.split(","):
        first, _, last = item.partition(":")
        numbers += range(int(first), int(last or first) + 1)
    return numbers
