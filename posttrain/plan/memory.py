"""What the temporaries of a compiled step are for: activations kept, gradients, and the rest, when they are the most.

XLA says how large the temporaries of a program are together, not what they are. The text of a scheduled program says
more: in which order it runs, and from where in the traced step every instruction comes. `temporaries` runs through it
with the set of live buffers, loops and branches included, and looks at those that are alive when they are the most:

- An activation is kept if it depends on the batch (on an argument that is not donated), and the forward pass writes it
  (`jvp` in its `op_name`) and the backward pass reads it (`transpose`). Under rematerialization that is the input of
  every layer; without, all that the backward pass needs.
- A gradient is as large as a trained parameter is on a device and depends on what the backward pass computed: sums
  over accumulation steps, and copies of it that the update makes, are among them.
- Everything else is neither: weights cast or gathered, what lives within one layer, logits, buffers of collectives.

What the text does not say: which values XLA lets share memory beyond those that must, the gaps between them, and the
padding of tiles. So the first two are sums of whole arrays, and the rest is what remains of XLA's own total.
"""

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from posttrain.plan import traffic
from posttrain.plan.hlo import HBM, Computation, Instruction, Module, Shape, parse

_FORWARD, _BACKWARD, _NEITHER = "forward", "backward", "neither"
_ALIAS = re.compile(r"\{(\d+)\}: \((\d+), \{\}")
_SAME = frozenset(("bitcast", "optimization-barrier", "copy-done", "async-done", "async-update"))
"""Opcodes whose result lies where their operand does, or where what was started put it."""
_OPERANDS_FIRST = frozenset(("slice-start", "all-gather-start", "collective-permute-start"))
"""Opcodes whose tuple names what they read before what they write."""
_ELEMENTWISE = frozenset(("copy", "add", "subtract", "multiply", "divide", "select", "convert", "negate", "maximum"))
"""Opcodes, beside loop fusions, that may write over an operand."""


@dataclass(frozen=True)
class Temporaries:
    """Bytes of one device, when the live arrays of the program are the most."""

    activations: int
    """Written by the forward pass and read by the backward pass."""
    gradients: int
    live: int
    """All temporary arrays that are alive then, these included."""


@dataclass(eq=False)
class Buffer:
    """Memory in which one value of the program lies, or several one after another."""

    bytes: float = 0.0
    elements: int = 0
    written: set[str] = field(default_factory=set)
    """By which passes."""
    read: set[str] = field(default_factory=set)
    differentiated: bool = False
    """Whether a value depends on what the backward pass computed."""
    fed: bool = False
    """Whether a value depends on an argument that is not donated: the batch."""
    donated: bool = False
    """Whether it is an argument that a result takes the place of."""

    @property
    def kept(self) -> bool:
        """Whether the forward pass leaves it for the backward pass."""
        return self.fed and _FORWARD in self.written and _BACKWARD in self.read and _BACKWARD not in self.written


Leaves = tuple[Buffer, ...]
"""The buffers of a value, one for each array of a tuple, nested ones flattened."""


def temporaries(text: str, trained: Collection[int]) -> Temporaries:
    """Of a scheduled program. `trained` are the sizes in elements that trained parameters have on a device."""
    module = parse(text)
    header = text[: text.index("\n")]
    if "is_scheduled=true" not in header:
        raise ValueError(f"{module.name}: the program is not scheduled, so that what lives at once is not known")
    live = _Liveness(module).entry({int(result): int(argument) for result, argument in _ALIAS.findall(header)})
    kept = [one for one in live if one.kept]
    gradients = [one for one in live if one.differentiated and one.elements in trained and not one.kept]
    return Temporaries(*(int(sum(one.bytes for one in found)) for found in (kept, gradients, live)))


class _Liveness:
    """Runs through a program and finds the live temporaries when they are the most."""

    def __init__(self, module: Module) -> None:
        self.module = module

    def entry(self, aliased: dict[int, int]) -> frozenset[Buffer]:
        """`aliased`: arguments by the results that take their place. Arguments and results are no temporaries."""
        entry, donated = self.module.entry, set(aliased.values())
        arguments = {number: (_argument(entry[name], number in donated),) for number, name in entry.parameters.items()}
        results = tuple(
            arguments[aliased[number]][0] if number in aliased else Buffer() for number in range(len(entry.root.shapes))
        )
        return self.run(entry, [arguments[number] for number in sorted(arguments)], results)[1]

    def run(
        self, computation: Computation, arguments: Sequence[Leaves], results: Leaves | None
    ) -> tuple[Leaves, frozenset[Buffer]]:
        """(buffers of what is returned, temporaries of its own when they are the most).

        `results` are the buffers that what is returned must lie in, as those of a loop's state, if that is known.
        """
        return _Run(self, computation, arguments, results).finish()


class _Run:
    """One computation, once."""

    def __init__(
        self, liveness: _Liveness, computation: Computation, arguments: Sequence[Leaves], results: Leaves | None
    ) -> None:
        self.liveness, self.module, self.computation = liveness, liveness.module, computation
        self.values: dict[str, Leaves] = {}
        self.inner: dict[int, frozenset[Buffer]] = {}
        self.given = {buffer for leaves in arguments for buffer in leaves} | set(results or ())
        self.placed: dict[tuple[str, int], Buffer] = {}
        for leaf, buffer in enumerate(results or ()):
            self._place(computation.root.name, leaf, buffer)
        for number, name in computation.parameters.items():
            self.values[name] = arguments[number]

    def finish(self) -> tuple[Leaves, frozenset[Buffer]]:
        order = list(self.computation)
        for position, instruction in enumerate(order):
            if instruction.opcode != "parameter":
                self.values[instruction.name] = self._value(instruction, position)
        returned = self.values[self.computation.root.name]
        first: dict[Buffer, int] = {}
        last: dict[Buffer, int] = {}
        for position, instruction in enumerate(order):
            for buffer in self.values[instruction.name]:
                first.setdefault(buffer, position)
                last[buffer] = position
            for name in instruction.operands:
                for buffer in self.values.get(name, ()):
                    last[buffer] = position
        for buffer in returned:
            last[buffer] = len(order)
        return returned, self._most(order, first, last)

    def _most(self, order: list[Instruction], first: dict[Buffer, int], last: dict[Buffer, int]) -> frozenset[Buffer]:
        """What lives at the worst moment, without what was given."""
        begins: dict[int, list[Buffer]] = {}
        ends: dict[int, list[Buffer]] = {}
        for buffer, position in first.items():
            if buffer.bytes and buffer not in self.given:
                begins.setdefault(position, []).append(buffer)
                ends.setdefault(last[buffer], []).append(buffer)
        live: set[Buffer] = set()
        most, found = 0.0, frozenset[Buffer]()
        for position, instruction in enumerate(order):
            for buffer in begins.get(position, ()):
                taken = self._taken(instruction, buffer, last, position)
                if taken is not None and taken.donated:
                    buffer.donated = True
                    continue
                live.discard(taken)
                live.add(buffer)
            inner = self.inner.get(position, frozenset())
            now = sum(buffer.bytes for buffer in live) + sum(buffer.bytes for buffer in inner)
            if now > most:
                most, found = now, frozenset(live) | inner
            live.difference_update(ends.get(position, ()))
        return found

    def _taken(self, instruction: Instruction, result: Buffer, last: dict[Buffer, int], position: int) -> Buffer | None:
        """The operand's buffer that a result computed element by element takes over, since nothing else needs it."""
        if instruction.opcode == "fusion":
            if instruction.attributes.get("kind") != "kLoop":
                return None
        elif instruction.opcode not in _ELEMENTWISE:
            return None
        for name in instruction.operands:
            for buffer in self.values[name]:
                # Of a donated argument, not its memory must be free for good, only its value.
                over = self._used_last(name) is instruction if buffer.donated else last[buffer] == position
                if buffer.elements == result.elements and over and (buffer.donated or buffer.bytes):
                    return buffer
        return None

    def _used_last(self, name: str) -> Instruction:
        return self.computation.users[name][-1]

    # ---- where values lie --------------------------------------------------------------------------------------------

    def _place(self, name: str, leaf: int, buffer: Buffer) -> None:
        """Fixes where an array lies, and with it all that it is another name of."""
        while True:
            instruction = self.computation[name]
            if instruction.opcode == "parameter" or (name, leaf) in self.placed:
                return
            self.placed[name, leaf] = buffer
            source = self._same(instruction, leaf)
            if source is None:
                return
            name, leaf = source

    def _same(self, instruction: Instruction, leaf: int) -> tuple[str, int] | None:
        """The operand's array in whose memory one of an instruction's lies; None where it has its own."""
        opcode, operands = instruction.opcode, instruction.operands
        if opcode == "tuple":
            for name in operands:
                size = len(self.computation[name].shapes)
                if leaf < size:
                    return name, leaf
                leaf -= size
        if opcode == "get-tuple-element":
            index, parts = int(instruction.attributes["index"]), self.computation[operands[0]].parts
            return operands[0], sum(len(part) for part in parts[:index]) + leaf
        if opcode in ("while", *_SAME):
            return operands[0], leaf
        if opcode.endswith("-done"):
            return operands[0], leaf + self._begun(operands[0])
        if opcode == "copy-start":
            return (operands[0], 0) if leaf == 1 else None
        if opcode in _OPERANDS_FIRST:
            return (operands[leaf], 0) if leaf < self._begun(instruction.name) else None
        if opcode == "dynamic-update-slice":
            return operands[0], 0
        if opcode in ("fusion", "custom-call", "call"):
            return self._updated(instruction, leaf)
        return None

    def _begun(self, start: str) -> int:
        """At which array of a start's tuple its result begins: behind its operands."""
        instruction = self.computation[start]
        if instruction.opcode in ("all-reduce-start", "copy-start") or len(instruction.parts) < 2:
            return 0
        return len(instruction.parts[0])

    def _updated(self, instruction: Instruction, leaf: int) -> tuple[str, int] | None:
        """Of a fusion or a custom call, the operand that is changed in place."""
        aliasing = instruction.attributes.get("output_to_operand_aliasing", "")
        for result, operand in re.findall(r"\{(\d*)\}: \((\d+), \{\}", aliasing):
            if int(result or 0) == leaf:
                return instruction.operands[int(operand)], 0
        if instruction.opcode != "fusion":
            return None
        fused = self.module.computations[instruction.called("calls")[0]]
        names = traffic.returned(fused)
        updated = traffic.updated(fused, names[leaf]) if leaf < len(names) else None
        if updated is None:
            return None
        number = next(number for number, name in fused.parameters.items() if name == updated[0])
        return instruction.operands[number], 0

    def _value(self, instruction: Instruction, position: int) -> Leaves:
        """The buffers of what an instruction computes; notes who writes and who reads them."""
        leaves = []
        for leaf, shape in enumerate(instruction.shapes):
            source = self._same(instruction, leaf)
            placed = self.placed.get((instruction.name, leaf))
            if source is not None:
                leaves.append(self.values[source[0]][source[1]])
            elif placed is not None:
                leaves.append(placed)
            else:
                leaves.append(_buffer(instruction, shape))
        value = tuple(leaves)
        if instruction.opcode == "while":
            (body,) = instruction.called("body")
            _, self.inner[position] = self.liveness.run(self.module.computations[body], [value], value)
        elif instruction.opcode in ("conditional", "call", "async-start", "call-start"):
            value = self._called(instruction, value, position)
        elif instruction.opcode not in ("tuple", "get-tuple-element", "constant", *_SAME):
            self._note(instruction, value)
        return value

    def _called(self, instruction: Instruction, value: Leaves, position: int) -> Leaves:
        """Of branches the one that needs the most."""
        names = [
            name
            for key in ("branch_computations", "true_computation", "false_computation", "to_apply", "calls")
            for name in instruction.called(key)
        ]
        operands = [self.values[name] for name in instruction.operands]
        for name in names:
            computation = self.module.computations[name]
            arguments = [operands[1 + names.index(name)]] if instruction.opcode == "conditional" else operands
            _, live = self.liveness.run(computation, arguments, value)
            known = self.inner.get(position, frozenset())
            if sum(one.bytes for one in live) >= sum(one.bytes for one in known):
                self.inner[position] = live
        return value

    def _note(self, instruction: Instruction, value: Leaves) -> None:
        read = [buffer for name in instruction.operands for buffer in self.values[name]]
        name = instruction.op_name
        if name:
            passes = {_BACKWARD if "transpose(" in name else _FORWARD if "jvp(" in name else _NEITHER}
            for buffer in read:
                buffer.read |= passes
        else:  # a copy that the compiler has made
            passes = {one for buffer in read for one in buffer.written}
        fed = any(buffer.fed for buffer in read)
        depends = _BACKWARD in passes or any(buffer.differentiated for buffer in read)
        for buffer in value:
            buffer.written |= passes
            buffer.differentiated |= depends
            buffer.fed |= fed


def _buffer(instruction: Instruction, shape: Shape) -> Buffer:
    return Buffer(
        shape.bytes if shape.space == HBM and instruction.opcode != "constant" else 0.0, math.prod(shape.dims)
    )


def _argument(parameter: Instruction, donated: bool) -> Buffer:
    """Memory that is not temporary, but may be written over if it is donated."""
    return Buffer(elements=math.prod(parameter.shapes[0].dims), donated=donated, fed=not donated)
