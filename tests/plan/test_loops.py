"""Runs of loops, against loops that are run."""

import itertools

import jax
import jax.numpy as jnp
import pytest

from posttrain.plan.hlo import parse
from posttrain.plan.loops import Place, trip_count

COMPARE = {
    "LT": lambda i, n: i < n,
    "LE": lambda i, n: i <= n,
    "GT": lambda i, n: i > n,
    "GE": lambda i, n: i >= n,
    "NE": lambda i, n: i != n,
}

LOOP = """HloModule loop

%body (s: (f32[4], s32[], s32[])) -> (f32[4], s32[], s32[]) {{
  %s = (f32[4], s32[], s32[]) parameter(0)
  %x = f32[4] get-tuple-element(%s), index=0
  %i = s32[] get-tuple-element(%s), index=1
  %n = s32[] get-tuple-element(%s), index=2
  %one = s32[] constant({step})
  %i.1 = s32[] copy(%i)
  %next = s32[] {update}
  %y = f32[4] sine(%x)
  ROOT %out = (f32[4], s32[], s32[]) tuple(%y, %next, {kept})
}}

%test (s: (f32[4], s32[], s32[])) -> pred[] {{
  %s = (f32[4], s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=1
  %n = s32[] get-tuple-element(%s), index=2
  ROOT %go = pred[] compare({sides}), direction={direction}
}}

ENTRY %main (x: f32[4], m: s32[]) -> f32[4] {{
  %x = f32[4] parameter(0)
  %m = s32[] parameter(1)
  %zero = s32[] constant({start})
  %begin = s32[] copy(%zero)
  %limit = s32[] constant({limit})
  %state = (f32[4], s32[], s32[]) tuple(%x, %begin, {given})
  %while = (f32[4], s32[], s32[]) while(%state), condition=%test, body=%body
  ROOT %y = f32[4] get-tuple-element(%while), index=0
}}
"""
PLAIN = {"update": "add(%i.1, %one)", "kept": "%n", "sides": "%i, %n", "given": "%limit", "direction": "LT"}


def trips_of(text: str, name: str = "while") -> int | None:
    module = parse(text)
    return trip_count(module, Place(module.entry), module.entry[name])


def run(direction: str, start: int, limit: int, step: int) -> int | None:
    """The same loop in Python; None if it does not end."""
    trips, i = 0, start
    while COMPARE[direction](i, limit):
        i, trips = i + step, trips + 1
        if trips > 100:
            return None
    return trips


@pytest.mark.parametrize("direction", sorted(COMPARE))
def test_every_comparison_step_and_bound(direction: str) -> None:
    found = 0
    for start, limit, step in itertools.product((-3, 0, 2), (-4, 0, 1, 2, 7), (-3, -1, 0, 1, 2)):
        expected = run(direction, start, limit, step)
        text = LOOP.format(**PLAIN | {"direction": direction}, start=start, limit=limit, step=step)
        assert trips_of(text) == expected, (start, limit, step)
        found += expected is not None and expected > 1
    assert found >= 5


@pytest.mark.parametrize(
    ("change", "trips"),
    [
        ({}, 7),
        ({"update": "add(%one, %i.1)"}, 7),
        ({"sides": "%n, %i", "direction": "GT"}, 7),
        ({"sides": "%n, %i", "direction": "GE"}, 8),
        ({"update": "subtract(%i.1, %one)", "direction": "GT", "start": 9, "limit": 2}, 7),
        ({"update": "multiply(%i.1, %one)"}, None),
        ({"update": "add(%i.1, %i.1)"}, None),
        ({"given": "%m"}, None),
        ({"kept": "%next"}, None),
        ({"sides": "%i, %i"}, None),
    ],
)
def test_forms(change: dict[str, str | int], trips: int | None) -> None:
    assert trips_of(LOOP.format(**{"start": 0, "limit": 7, "step": 1} | PLAIN | change)) == trips


def test_note_of_the_compiler_comes_first() -> None:
    text = LOOP.format(**PLAIN | {"given": "%m"}, start=0, limit=7, step=1)
    noted = text.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"13"}}')
    assert trips_of(noted) == 13


@pytest.mark.parametrize("note", [True, False])
def test_scan_compiled_here(note: bool) -> None:
    def layers(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda h, w_l: (jnp.tanh(h @ w_l), None), x, w)[0]

    text = jax.jit(layers).lower(jnp.ones((8, 16)), jnp.ones((11, 16, 16))).compile().as_text() or ""
    assert "known_trip_count" in text
    if not note:
        text = text.replace("known_trip_count", "something_else")
    module = parse(text)
    (loop,) = (i for i in module.entry if i.opcode == "while")
    assert trip_count(module, Place(module.entry), loop) == 11


def test_bound_handed_down_by_an_outer_loop() -> None:
    """The inner loop's bound is an element of the outer loop's state that never changes."""
    text = LOOP.format(**PLAIN, start=0, limit=5, step=1)
    body = """%outer_body (t: (f32[4], s32[], s32[])) -> (f32[4], s32[], s32[]) {
  %t = (f32[4], s32[], s32[]) parameter(0)
  %x = f32[4] get-tuple-element(%t), index=0
  %j = s32[] get-tuple-element(%t), index=1
  %five = s32[] get-tuple-element(%t), index=2
  %zero = s32[] constant(0)
  %state = (f32[4], s32[], s32[]) tuple(%x, %zero, %five)
  %inner = (f32[4], s32[], s32[]) while(%state), condition=%test, body=%body
  %y = f32[4] get-tuple-element(%inner), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%j, %one)
  ROOT %out = (f32[4], s32[], s32[]) tuple(%y, %next, %five)
}

ENTRY"""
    text = text.replace("ENTRY", body)
    head, _, entry = text.rpartition("body=%body")
    module = parse(f"{head}body=%outer_body{entry}")
    loop = module.entry["while"]
    place = Place(module.computations["outer_body"], loop, Place(module.entry))
    assert trip_count(module, Place(module.entry), loop) == 5
    assert trip_count(module, place, place.computation["inner"]) == 5
