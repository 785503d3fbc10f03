"""Reads the text of an optimized XLA program (HLO) into typed records; the first step of what `plan` computes.

`parse` takes what `compiled.as_text()` returns, on TPU as on CPU, and knows nothing of cost: `loops`, `traffic`,
`collectives` and `program` read the records. Only the standard library is used, so that a plan can be read anywhere.

The grammar used is small. A computation is a header line that ends in `{`, instructions, and a line that starts with
`}`. An instruction is `[ROOT] %name = type opcode(operands), key=value, ...`, and ends where its brackets do: values
such as `frontend_attributes={kernel_metadata="..."}` run over several lines.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

HBM, VMEM, HOST = 0, 1, 5
"""Memory spaces S(n) of a TPU program; a shape that names none is in space 0. Others hold semaphores and scalars."""

COLLECTIVES = frozenset(
    (
        *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
        *("collective-permute", "collective-broadcast"),
    )
)
"""Opcodes that move data between devices; the asynchronous ones are `<opcode>-start` and `<opcode>-done`."""

BITS = {
    **{"pred": 8, "c64": 64, "c128": 128, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "token": 0, "opaque": 0},
    **{f"{sign}{bits}": bits for sign in "su" for bits in (1, 2, 4, 8, 16, 32, 64)},
}
"""Bits of an element by the name of its type; the small floats carry theirs in the name (`f8e4m3fn`)."""

_HEADER = re.compile(r"(ENTRY\s+)?%?([\w.\-]+)\s*(?:\(.*)?\{\s*$")
_STATEMENT = re.compile(r"\s+(ROOT\s+)?%?([\w.\-]+)\s+=\s+")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_LEAF = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^{}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_SMALL_FLOAT = re.compile(r"f(\d+)e\d+m\d+")
_COMMENT = re.compile(r"/\*index=\d+\*/")
_MARK = re.compile(r'"(?:[^"\\]|\\.)*"|["(){}\[\],]', re.DOTALL)
"""A whole string, or a quote that is never closed, or one character that opens, closes or separates."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One array: type of its elements, dims, and the memory space it lies in."""

    dtype: str
    dims: tuple[int, ...]
    space: int = HBM

    @property
    def bits(self) -> int:
        """Bits of one element. `ValueError` for a type that has no known width."""
        known = BITS.get(self.dtype)
        if known is None:
            small = _SMALL_FLOAT.match(self.dtype)
            if small is None:
                raise ValueError(f"element type {self.dtype!r} of {self}: its width is not known")
            known = int(small[1])
        return known

    @property
    def bytes(self) -> float:
        """Bytes of the elements, without the padding of tiles."""
        return math.prod(self.dims) * self.bits / 8


@dataclass(frozen=True)
class Instruction:
    """One instruction. `parts` are the arrays of its result by tuple element; a result that is no tuple has one part.

    `arguments` is the text between the parentheses: of a constant its value, of a parameter its number. `operands` are
    names of instructions of the same computation.
    """

    name: str
    opcode: str
    parts: tuple[tuple[Shape, ...], ...]
    operands: tuple[str, ...]
    arguments: str
    rest: str
    root: bool

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """All arrays of the result, nested tuples flattened."""
        return tuple(shape for part in self.parts for shape in part)

    @cached_property
    def attributes(self) -> Mapping[str, str]:
        """`key=value` pairs behind the operands, values as written, brackets included."""
        pairs = (item.partition("=") for item in split(self.rest))
        return {key.strip(): value.strip() for key, mark, value in pairs if mark}

    def called(self, key: str) -> tuple[str, ...]:
        """Names of the computations that attribute `key` names: `calls=%f`, `branch_computations={%a, %b}`."""
        value = self.attributes.get(key, "")
        return tuple(name.strip().removeprefix("%") for name in value.strip("{}").split(",") if name.strip())

    @property
    def op_name(self) -> str:
        """Where the instruction comes from in the traced program, `jit(step)/while/body/dot_general`, or nothing."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes.get("metadata", ""))
        return found[1] if found else ""

    def config(self, key: str) -> str | None:
        """A scalar of the compiler's `backend_config`, at whatever depth, as text; None if it is not there."""
        found = re.search(rf'\\?"{key}\\?":\s*\\?"?([^"\\,{{}}]*)', self.attributes.get("backend_config", ""))
        return found[1] if found else None


@dataclass(frozen=True)
class Computation:
    """Instructions by name, in the order of the text, which is the order of execution in a scheduled program."""

    name: str
    instructions: Mapping[str, Instruction]

    def __getitem__(self, name: str) -> Instruction:
        return self.instructions[name]

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    @cached_property
    def root(self) -> Instruction:
        """The instruction whose value the computation returns."""
        return next(instruction for instruction in self if instruction.root)

    @cached_property
    def parameters(self) -> Mapping[int, str]:
        """Names of the parameters by number."""
        return {int(i.arguments): i.name for i in self if i.opcode == "parameter"}

    @cached_property
    def users(self) -> Mapping[str, tuple[Instruction, ...]]:
        """By name of an instruction those that take its value."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self:
            for operand in dict.fromkeys(instruction.operands):
                users[operand].append(instruction)
        return {name: tuple(found) for name, found in users.items()}

    def operand_shapes(self, instruction: Instruction) -> tuple[Shape, ...]:
        """Arrays that an instruction reads, operand by operand, tuples flattened."""
        return tuple(shape for name in instruction.operands for shape in self[name].shapes)


@dataclass(frozen=True)
class Module:
    """A whole program; it runs on `devices` devices at once, which collectives number from 0 in mesh order."""

    name: str
    devices: int
    computations: Mapping[str, Computation]
    entry: Computation


def parse(text: str) -> Module:
    """Reads a program; `ValueError` names the line that cannot be read, or says that no `ENTRY` was found."""
    computations: dict[str, Computation] = {}
    entry: str | None = None
    name: str | None = None
    header, body = "", dict[str, Instruction]()
    lines = enumerate(text.splitlines(), start=1)
    for number, line in lines:
        if name is None:
            if line.startswith("HloModule"):
                header = line
            elif line[:1] not in ("", " ", "}") and (found := _HEADER.match(line)):
                name, body = found[2], {}
                entry = name if found[1] else entry
        elif line.startswith("}"):
            computations[name] = Computation(name, body)
            name = None
        elif _STATEMENT.match(line):
            statement = line
            while not _complete(statement):
                more = next(lines, None)
                if more is None:
                    raise ValueError(f"line {number}: an instruction does not end: {line[:200]!r}")
                statement += "\n" + more[1]
            instruction = _instruction(statement, number)
            body[instruction.name] = instruction
    if entry is None or entry not in computations:
        raise ValueError("no ENTRY computation: this is no text of an optimized HLO program, or it was cut off")
    counts = dict(re.findall(r"\b(num_partitions|replica_count)=(\d+)", header))
    devices = math.prod(int(count) for count in counts.values())
    title = header.split(",")[0].removeprefix("HloModule").strip()
    return Module(title, devices, computations, computations[entry])


def split(text: str) -> list[str]:
    """Parts between the commas that stand in no bracket and in no string."""
    parts, start, depth = [], 0, 0
    for mark in _MARK.finditer(text):
        match mark[0]:
            case "(" | "{" | "[":
                depth += 1
            case ")" | "}" | "]":
                depth -= 1
            case "," if depth == 0:
                parts.append(text[start : mark.start()])
                start = mark.end()
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]


def shapes_of(text: str) -> tuple[Shape, ...]:
    """All arrays that a type names, in order: `(f32[2]{0:S(1)}, s32[])` are two."""
    found = []
    for dtype, dims, layout in _LEAF.findall(text):
        space = _SPACE.search(layout)
        sizes = tuple(int(dim.strip().removeprefix("<=")) for dim in dims.split(",") if dim.strip())
        found.append(Shape(dtype, sizes, int(space[1]) if space else HBM))
    return tuple(found)


def _complete(statement: str) -> bool:
    depth = 0
    for mark in _MARK.finditer(statement):
        if mark[0] == '"':
            return False
        depth += (mark[0] in "({[") - (mark[0] in ")}]")
    return depth <= 0 and not statement.endswith(",")


def _closing(text: str, opening: int) -> int:
    """Position of the bracket that closes the one at `opening`; the length of the text if there is none."""
    depth = 0
    for mark in _MARK.finditer(text, opening):
        depth += (mark[0] in "({[") - (mark[0] in ")}]")
        if depth == 0:
            return mark.start()
    return len(text)


def _instruction(statement: str, number: int) -> Instruction:
    head = _STATEMENT.match(statement)
    assert head is not None
    text = _COMMENT.sub("", statement[head.end() :])
    end = _closing(text, 0) + 1 if text.startswith("(") else len(text.split(maxsplit=1)[0])
    opcode = _OPCODE.match(text, end)
    if opcode is None:
        raise ValueError(f"line {number}: no opcode behind the type: {statement.strip()[:200]!r}")
    close = _closing(text, opcode.end() - 1)
    arguments = text[opcode.end() : close]
    elements = split(text[1 : end - 1]) if text.startswith("(") else [text[:end]]
    named = opcode[1] not in ("constant", "parameter")
    operands = (operand.split()[-1].removeprefix("%") for operand in split(arguments)) if named else ()
    return Instruction(
        name=head[2],
        opcode=opcode[1],
        parts=tuple(shapes_of(element) for element in elements),
        operands=tuple(operands),
        arguments=arguments.strip(),
        rest=text[close + 1 :].lstrip(", "),
        root=head[1] is not None,
    )
