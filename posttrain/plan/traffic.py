"""What one instruction reads and writes, by memory space: the HBM traffic and the host transfers of a plan.

A fusion reads its operands once and writes its results once, whatever happens inside, with two exceptions that decide
the traffic of layer loops: an operand of which only slices are used is read in these slices, and a result that is an
operand with a slice updated in place costs that slice. TPU programs put a collective into a fusion to run it beside
other work, in pieces that start, advance and end it: buffers that a piece only hands on cost nothing, and `started`
gives the traffic of the collective itself, once. Bytes are those of the elements, without the padding of tiles.
"""

from collections.abc import Iterable

from posttrain.plan.hlo import COLLECTIVES, HBM, HOST, Computation, Instruction, Module, Shape

_FREE = frozenset(
    (
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "partition-id", "replica-id"),
        *("while", "conditional", "call", "call-start", "async-start", "async-update"),
        *("after-all", "add-dependency", "domain", "optimization-barrier", "opt-barrier"),
    )
)
_FREE_TARGETS = frozenset(
    (
        *("AllocateBuffer", "ConcatBitcast", "AsyncCollectiveStart", "AsyncCollectiveDone"),
        *("PrepareAsyncCallStart", "PrepareAsyncCallDone"),
        *("Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape", "AssumeGatherIndicesInBound"),
    )
)
"""Custom calls that move nothing: they name buffers or make one of several."""
_SLICES = frozenset(("dynamic-slice", "slice", "gather"))
_SAME = frozenset(("bitcast", "copy", "convert", "reshape", "get-tuple-element"))

Access = tuple[int, float]
"""A memory space and bytes read from or written to it."""


def hbm_bytes(accesses: Iterable[Access]) -> float:
    """Bytes to and from the device's own memory."""
    return sum((count for space, count in accesses if space == HBM), 0.0)


def host_bytes(accesses: Iterable[Access]) -> float:
    """Bytes to and from the memory of the host."""
    return sum((count for space, count in accesses if space == HOST), 0.0)


def total_bytes(shapes: Iterable[Shape]) -> float:
    """Bytes of several arrays, wherever they lie."""
    return sum((shape.bytes for shape in shapes), 0.0)


def is_free(instruction: Instruction) -> bool:
    """Whether an instruction moves no data itself: it names, waits, or runs a computation that is walked by itself."""
    if instruction.opcode == "custom-call":
        return instruction.attributes.get("custom_call_target", "").strip('"') in _FREE_TARGETS
    return instruction.opcode in _FREE or instruction.opcode.endswith("-done")


def accesses(module: Module, computation: Computation, instruction: Instruction) -> list[Access]:
    """Reads and writes of one instruction that stands in no fusion."""
    if is_free(instruction):
        return []
    opcode = instruction.opcode.removesuffix("-start")
    read = computation.operand_shapes(instruction)
    written = _results(instruction)
    if opcode == "fusion":
        return _fusion(module, computation, instruction)
    if opcode in _SLICES:
        indices = read[1:] if opcode == "gather" else ()
        return [(read[0].space, total_bytes(written)), *_whole(written), *_whole(indices)]
    if opcode == "dynamic-update-slice":
        return [(read[1].space, read[1].bytes), (read[0].space, read[1].bytes)]
    if opcode == "scatter":
        changed = read[len(read) // 2 + 1 :]
        return [*_whole(read[len(read) // 2 :]), *((s.space, 2 * s.bytes) for s in changed)]
    if opcode in ("send", "recv") and "is_host_transfer=true" in instruction.rest:
        moved = instruction.parts[0]
        return [*_whole(moved), (HOST, total_bytes(moved))]
    return [*_whole(read), *_whole(written)]


def slices_of(
    module: Module, computation: Computation, name: str, opcodes: frozenset[str] = _SLICES
) -> list[Shape] | None:
    """The slices through which alone a value is used, directly or in fusions; None if anything uses all of it."""
    found: list[Shape] = []
    if computation.root.name == name:
        return None
    for user in computation.users[name]:
        if user.opcode in opcodes and user.operands[0] == name and name not in user.operands[1:]:
            found += user.shapes
            continue
        inner = None
        if user.opcode in _SAME:
            inner = slices_of(module, computation, user.name, opcodes)
        elif user.opcode == "fusion":
            inner = _slices_inside(module, user, name, opcodes)
        if inner is None:
            return None
        found += inner
    return found


def _slices_inside(module: Module, fusion: Instruction, name: str, opcodes: frozenset[str]) -> list[Shape] | None:
    fused = module.computations[fusion.called("calls")[0]]
    found: list[Shape] = []
    for number, operand in enumerate(fusion.operands):
        if operand == name:
            inner = slices_of(module, fused, fused.parameters[number], opcodes)
            if inner is None:
                return None
            found += inner
    return found


def _results(instruction: Instruction) -> tuple[Shape, ...]:
    """Arrays that an instruction writes. The tuple of an asynchronous start also names what it reads, and its flags."""
    if instruction.opcode == "copy-start":
        return instruction.parts[0]
    if (
        instruction.opcode.endswith("-start")
        and len(instruction.parts) > 1
        and instruction.opcode != "all-reduce-start"
    ):
        return instruction.parts[1]
    return instruction.shapes


def _whole(shapes: Iterable[Shape]) -> list[Access]:
    return [(shape.space, shape.bytes) for shape in shapes]


def started(fusion: Instruction, fused: Computation, collective: Instruction) -> list[Access]:
    """Reads and writes of a collective that a fusion runs, or of which it is the first piece."""
    _, *later = fusion.parts
    written = later[0] if later and _is_mark(fused.root) else collective.shapes
    return [*_whole(fused.operand_shapes(collective)), *_whole(written)]


def is_reduce_scatter(fused: Computation) -> bool:
    """Whether a fused computation is an all-reduce of which only a slice is returned."""
    reduces = [i for i in fused if i.opcode == "all-reduce"]
    return len(reduces) == 1 and all(user.opcode == "dynamic-slice" for user in fused.users[reduces[0].name])


def _fusion(module: Module, computation: Computation, fusion: Instruction) -> list[Access]:
    fused = module.computations[fusion.called("calls")[0]]
    if is_reduce_scatter(fused):
        return [*_whole(computation.operand_shapes(fusion)), *_whole(fusion.shapes)]
    found: list[Access] = []
    in_place = set[str]()
    parts = fusion.parts if fusion.opcode == "fusion" else tuple((shape,) for shape in _results(fusion))
    for part, name in zip(parts, returned(fused), strict=False):
        update = updated(fused, name)
        if update is not None:
            parameter, change = update
            in_place.add(parameter)
            found += [(shape.space, change) for shape in part]
        elif not _handed_on(fused, name):
            found += _whole(part)
    for number, operand in enumerate(fusion.operands):
        name = fused.parameters[number]
        if name not in in_place:
            found += _read(module, fused, name, computation[operand].shapes)
    return found


def _handed_on(fused: Computation, name: str) -> bool:
    """Whether a returned value is a buffer that came in, or belongs to a collective."""
    value = fused[name]
    return value.opcode in COLLECTIVES or _is_mark(value) or (value.opcode == "parameter" and not value.root)


def _is_mark(instruction: Instruction) -> bool:
    """Whether this is a custom call that moves nothing, such as the begin of an asynchronous collective."""
    return instruction.opcode == "custom-call" and is_free(instruction)


def returned(fused: Computation) -> tuple[str, ...]:
    """Names of what a fused computation returns, one by tuple element."""
    return fused.root.operands if fused.root.opcode == "tuple" else (fused.root.name,)


def _read(module: Module, fused: Computation, name: str, shapes: tuple[Shape, ...]) -> list[Access]:
    """Reads of one parameter: nothing if it is only handed on, its slices if only they are used, else all of it."""
    if all(user.opcode in COLLECTIVES or user.opcode == "tuple" or _is_mark(user) for user in fused.users[name]):
        return []
    slices = slices_of(module, fused, name)
    if slices is None or total_bytes(slices) > total_bytes(shapes):
        return _whole(shapes)
    # a slice taken inside has the width of its own type: what is read has the parameter's
    elements = sum(shape.bytes * 8 / shape.bits for shape in slices if shape.bits)
    return [(shape.space, elements * shape.bits / 8) for shape in shapes[:1]]


def updated(fused: Computation, name: str) -> tuple[str, float] | None:
    """The parameter that a returned value is, with a slice changed, and the bytes read and written for that.

    None if the value is anything else, or if the parameter is used in other ways than by this slice and others.
    """
    update = _source(fused, name)
    if update.opcode != "dynamic-update-slice":
        return None
    target = _source(fused, update.operands[0])
    if target.opcode != "parameter":
        return None
    moved = fused[update.operands[1]].shapes[0].bytes
    others = [user for user in fused.users[target.name] if user.opcode in _SLICES]
    if len(fused.users[target.name]) > len(others) + 1:
        return None
    return target.name, moved + total_bytes(shape for other in others for shape in other.shapes)


def _source(fused: Computation, name: str) -> Instruction:
    """Where a value comes from, seen through changes of type and layout."""
    while fused[name].opcode in ("bitcast", "convert", "copy", "reshape"):
        name = fused[name].operands[0]
    return fused[name]
