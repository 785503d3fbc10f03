"""How often the body of a `while` runs: from the compiler's note, or from the counter that its condition compares.

XLA for CPU notes `known_trip_count`; XLA for TPU drops the note, so there a loop is understood from what it does: an
element of the state that starts at a constant, moves by a constant and is compared with a constant. Constants are
followed through copies, tuples, fusions and states of outer loops that pass them on unchanged.
"""

import operator
import re
from dataclasses import dataclass

from posttrain.plan.hlo import Computation, Instruction, Module

_SAME = frozenset(
    (
        *("copy", "copy-start", "copy-done", "bitcast", "bitcast-convert", "convert", "reshape"),
        *("optimization-barrier", "opt-barrier"),
    )
)
_MIRRORED = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE", "NE": "NE"}
_HOLDS = {"LT": operator.lt, "LE": operator.le, "GT": operator.gt, "GE": operator.ge, "NE": operator.ne}
_KNOWN = re.compile(r"known_trip_count\W+n\W+(\d+)")
_INTEGER = re.compile(r"-?\d+")
_DEPTH = 64
"""Longest chain of instructions followed to a constant."""


@dataclass(frozen=True)
class Place:
    """A computation and how execution came into it: the instruction that called it, and that one's own place."""

    computation: Computation
    caller: Instruction | None = None
    outer: "Place | None" = None


@dataclass(frozen=True)
class _Value:
    place: Place
    name: str


def trip_count(module: Module, place: Place, loop: Instruction) -> int | None:
    """Runs of the body of `loop`, an instruction of `place`; None if they depend on data, or are not understood."""
    known = _KNOWN.search(loop.attributes.get("backend_config", ""))
    if known:
        return int(known[1])
    (condition,) = loop.called("condition")
    (body,) = loop.called("body")
    inside = Place(module.computations[body], loop, place)
    compared = _comparison(module, Place(module.computations[condition], loop, place))
    if compared is None:
        return None
    direction, left, right = compared
    index, limit = _state_index(left), _constant(module, right)
    if index is None or limit is None:
        index, limit = _state_index(right), _constant(module, left)
        direction = _MIRRORED.get(direction, "")
    if index is None or limit is None:
        return None
    state = _follow(module, _Value(place, loop.operands[0]))
    start = _constant(module, _element(state, index))
    step = _step(module, inside, index)
    return None if start is None or step is None else _runs(direction, start, limit, step)


def _runs(direction: str, start: int, limit: int, step: int) -> int | None:
    """Runs of `while (i direction limit) i += step` from `start`; None if the counter never gets there."""
    holds = _HOLDS.get(direction)
    if holds is None:
        return None
    if not holds(start, limit):
        return 0
    distance, toward = abs(limit - start), (limit - start) * step
    if step == 0 or toward < 0 or (direction == "NE" and distance % abs(step)):
        return None
    if direction in ("LE", "GE"):
        # at the bound itself only the step says where the counter goes
        return None if (step > 0) != (direction == "LE") else distance // abs(step) + 1
    return -(-distance // abs(step))


def _comparison(module: Module, place: Place) -> tuple[str, _Value, _Value] | None:
    """Direction and both sides of the comparison that a condition returns, which may stand in a fusion."""
    value = _follow(module, _Value(place, place.computation.root.name))
    instruction = value.place.computation[value.name]
    if instruction.opcode != "compare":
        return None
    left, right = (_follow(module, _Value(value.place, name)) for name in instruction.operands)
    return instruction.attributes.get("direction", ""), left, right


def _step(module: Module, inside: Place, index: int) -> int | None:
    """What one run of the body adds to an element of the state."""
    value = _follow(module, _element(_Value(inside, inside.computation.root.name), index))
    instruction = value.place.computation[value.name]
    if instruction.opcode not in ("add", "subtract"):
        return None
    left, right = (_follow(module, _Value(value.place, name)) for name in instruction.operands)
    if instruction.opcode == "add" and _state_index(right) == index:
        left, right = right, left
    step = _constant(module, right)
    if _state_index(left) != index or left.place.computation is not inside.computation or step is None:
        return None
    return -step if instruction.opcode == "subtract" else step


def _element(value: _Value, index: int) -> _Value:
    """An element of a tuple: what it was made of where the `tuple` can be seen, else `value` itself."""
    instruction = value.place.computation[value.name]
    if instruction.opcode == "tuple":
        return _Value(value.place, instruction.operands[index])
    return value


def _state_index(value: _Value) -> int | None:
    """Index of a value that is an element of the computation's only parameter, the state of its loop."""
    instruction = value.place.computation[value.name]
    if instruction.opcode != "get-tuple-element":
        return None
    source = value.place.computation[instruction.operands[0]]
    return int(instruction.attributes["index"]) if source.opcode == "parameter" else None


def _follow(module: Module, value: _Value) -> _Value:
    """Goes from a value to the one it equals, through copies, tuples, and into and out of fusions and calls."""
    for _ in range(_DEPTH):
        computation = value.place.computation
        instruction = computation[value.name]
        if instruction.opcode in _SAME:
            value = _Value(value.place, instruction.operands[0])
        elif instruction.opcode in ("fusion", "call"):
            (called,) = instruction.called("calls") or instruction.called("to_apply")
            inner = Place(module.computations[called], instruction, value.place)
            value = _Value(inner, inner.computation.root.name)
        elif instruction.opcode == "parameter" and value.place.caller is not None and value.place.outer is not None:
            if value.place.caller.opcode not in ("fusion", "call"):
                return value
            value = _Value(value.place.outer, value.place.caller.operands[int(instruction.arguments)])
        elif instruction.opcode == "get-tuple-element":
            source = _follow(module, _Value(value.place, instruction.operands[0]))
            element = _element(source, int(instruction.attributes["index"]))
            if element is source:
                return value
            value = element
        else:
            return value
    return value


def _constant(module: Module, value: _Value) -> int | None:
    """The integer that a value always is; None if it cannot be told."""
    for _ in range(_DEPTH):
        value = _follow(module, value)
        instruction = value.place.computation[value.name]
        if instruction.opcode == "constant":
            return int(instruction.arguments) if _INTEGER.fullmatch(instruction.arguments) else None
        index, loop, outer = _state_index(value), value.place.caller, value.place.outer
        if index is None or loop is None or outer is None or loop.opcode != "while":
            return None
        if not _unchanged(module, loop, index):
            return None
        before = _follow(module, _Value(outer, loop.operands[0]))
        value = _element(before, index)
        if value is before:
            return None
    return None


def _unchanged(module: Module, loop: Instruction, index: int) -> bool:
    """Whether every run of a loop's body hands on an element of the state as it came."""
    (body,) = loop.called("body")
    place = Place(module.computations[body])
    root = _Value(place, place.computation.root.name)
    returned = _element(root, index)
    return returned is not root and _state_index(_follow(module, returned)) == index
