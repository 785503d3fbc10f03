"""Groups of devices against meshes laid out by numpy, axes against what JAX was asked for, bytes against the ring."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from posttrain.plan.collectives import axes_of, device_groups, wire_bytes
from posttrain.plan.hlo import Instruction, parse
from posttrain.plan.program import program_cost

MESH = {"replica": 1, "data": 2, "fsdp": 3, "tensor": 4}
SUBSETS = [axes for n in range(1, 4) for axes in itertools.combinations(("data", "fsdp", "tensor"), n)]


def collective(attributes: str) -> Instruction:
    lines = ("%x = f32[4] parameter(0)", f"ROOT %c = f32[4] all-reduce(%x), {attributes}")
    text = "HloModule m\n\nENTRY %m (x: f32[4]) -> f32[4] {\n  " + "\n  ".join(lines) + "\n}\n"
    return parse(text).entry["c"]


def groups_of(mesh: dict[str, int], axes: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    """Devices that agree on all other axes, found device by device."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for device, place in enumerate(itertools.product(*(range(size) for size in mesh.values()))):
        key = tuple(p for p, axis in zip(place, mesh, strict=True) if axis not in axes)
        groups.setdefault(key, []).append(device)
    return tuple(map(tuple, groups.values()))


def as_set(groups: tuple[tuple[int, ...], ...]) -> set[frozenset[int]]:
    return {frozenset(group) for group in groups}


def explicit(groups: tuple[tuple[int, ...], ...]) -> str:
    return "{" + ",".join("{" + ",".join(map(str, group)) + "}" for group in groups) + "}"


@pytest.mark.parametrize("axes", SUBSETS)
def test_all_forms_say_the_same_groups(axes: tuple[str, ...]) -> None:
    expected = groups_of(MESH, axes)
    size = len(expected[0])
    order = [i for i, axis in enumerate(MESH) if axis not in axes] + [i for i, axis in enumerate(MESH) if axis in axes]
    dims = ",".join(map(str, MESH.values()))
    iota = f"[{24 // size},{size}]<=[{dims}]T({','.join(map(str, order))})"
    named = ",".join(f"'{axis}'={n}" for axis, n in MESH.items())
    mesh = f"mesh[{named}] {{{','.join(repr(axis) for axis in axes)}}}"
    for text in (explicit(expected), iota, mesh):
        groups = device_groups(collective(f"replica_groups={text}, use_global_device_ids=true"), 24)
        assert as_set(groups) == as_set(expected), text
        assert axes_of(groups, MESH) == axes


@pytest.mark.parametrize("text", ["{}", "{{}}", "[1,8]<=[8]", "{{0,1,2,3,4,5,6,7}}", "mesh['x'=8] {'x'}"])
def test_all_devices(text: str) -> None:
    assert as_set(device_groups(collective(f"replica_groups={text}"), 8)) == {frozenset(range(8))}


def test_parts_of_an_axis() -> None:
    """`'x':(2)2` of an axis of 8 is the middle of the axes 2 x 2 x 2 that it is made of."""
    cut = {"x0": 2, "x1": 2, "x2": 2, "y": 3}
    found = device_groups(collective("replica_groups=mesh['x'=8,'y'=3] {'x':(2)2}"), 24)
    assert as_set(found) == as_set(groups_of(cut, ("x1",)))
    found = device_groups(collective("replica_groups=mesh['x'=8,'y'=3] {'x':(1)2,'y','x':(4)2}"), 24)
    assert as_set(found) == as_set(groups_of(cut, ("x0", "x2", "y")))
    assert axes_of(found, {"x": 8, "y": 3}) == ("x", "y")


@pytest.mark.parametrize("ids", ["[2,4]T(1,0)", "0,4,1,5,2,6,3,7"])
def test_mesh_of_devices_in_another_order(ids: str) -> None:
    found = device_groups(collective(f"replica_groups=mesh['x'=4,'y'=2], device_ids=({ids}) {{'y'}}"), 8)
    assert as_set(found) == {frozenset((i, i + 4)) for i in range(4)}


def test_unknown_form_is_an_error() -> None:
    with pytest.raises(ValueError, match="none of the known forms"):
        device_groups(collective("replica_groups=table[3]"), 8)


@pytest.mark.parametrize("axis", ["data", "fsdp", "tensor"])
@pytest.mark.parametrize("step", [1, -1])
def test_pairs_along_an_axis(axis: str, step: int) -> None:
    pairs = tuple((g[i], g[(i + step) % len(g)]) for g in groups_of(MESH, (axis,)) for i in range(len(g)))
    instruction = collective(f"source_target_pairs={explicit((*pairs, (0, 0)))}")
    found = device_groups(instruction, 24)
    assert set(found) == set(pairs)
    assert axes_of(found, MESH) == (axis,)


def test_groups_that_are_no_whole_axes() -> None:
    assert axes_of(((0, 2), (1, 3)), {"x": 3, "y": 4}) == ("y",)
    assert axes_of(((0,), (1,)), {"x": 4, "y": 3}) == ()
    assert axes_of(((0, 1, 2, 3),), {}) == ()
    with pytest.raises(ValueError, match=r"device 12 in a mesh .* of 12 devices"):
        axes_of(((0, 12),), {"x": 4, "y": 3})


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_bytes_of_rings(n: int) -> None:
    """Sends of a ring counted step by step: n chunks, one passed on in each of n - 1 steps."""
    payload, sent = 48.0 * n, 0.0
    for _ in range(n - 1):
        sent += payload / n
    assert wire_bytes("all-gather", payload, n) == sent
    assert wire_bytes("reduce-scatter", payload, n) == sent
    assert wire_bytes("all-reduce", payload, n) == 2 * sent
    assert wire_bytes("all-to-all", payload, n) == sent
    assert wire_bytes("collective-permute", payload, n) == (payload if n > 1 else 0)


@pytest.mark.parametrize("axes", [c for n in range(1, 4) for c in itertools.combinations("abc", n)])
def test_axes_that_jax_was_asked_for(axes: tuple[str, ...]) -> None:
    """Programs of eight emulated devices: each collective over the given axes of a 2 x 2 x 2 mesh."""
    mesh = jax.make_mesh((2, 2, 2), ("a", "b", "c"), axis_types=(AxisType.Auto,) * 3)
    n = 2 ** len(axes)

    def run(x: jax.Array) -> jax.Array:
        x = jax.lax.psum(x, axes)
        x = jax.lax.all_gather(jnp.sin(x), axes, tiled=True)
        return jax.lax.psum_scatter(jnp.cos(x), axes, tiled=True)

    body = jax.shard_map(run, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    text = jax.jit(body).lower(jnp.ones((64, 32), jnp.float32)).compile().as_text() or ""
    found = {c.kind: c for c in program_cost(text, dict(mesh.shape)).collectives}
    assert {(c.axes, c.group_size, c.network) for c in found.values()} == {(axes, n, "ici")}
    whole = 64 * 32 * 4
    assert {kind: c.payload_bytes for kind, c in found.items()} == {
        "all-reduce": whole,
        "all-gather": n * whole,
        "reduce-scatter": n * whole,
    }
    assert sum(c.wire_bytes for c in found.values()) == math.prod((2, whole, n + 1, n - 1)) / n


def test_what_a_ragged_exchange_writes_into_is_not_sent() -> None:
    """Nor are its offsets and sizes: of the rows all but a device's own quarter, at the most."""
    text = """HloModule m, num_partitions=4

ENTRY %m (x: bf16[64,256], o: bf16[128,256], n: s32[4]) -> bf16[128,256] {
  %x = bf16[64,256] parameter(0)
  %o = bf16[128,256] parameter(1)
  %n = s32[4] parameter(2)
  ROOT %r = bf16[128,256] ragged-all-to-all(%x, %o, %n, %n, %n, %n), replica_groups={{0,1,2,3}}
}
"""
    (exchange,) = program_cost(text, {"expert": 4}).collectives
    rows = 64 * 256 * 2
    assert (exchange.payload_bytes, exchange.wire_bytes, exchange.axes) == (rows, rows * 3 / 4, ("expert",))


def test_shards_that_a_sharded_product_gathers() -> None:
    """Left to the compiler: gradients of a product are reduced over `data`, nothing over `tensor`."""
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    spec = jax.NamedSharding(mesh, P(None, "tensor"))
    w = jax.device_put(np.ones((64, 128), np.float32), spec)
    x = jax.device_put(np.ones((32, 64), np.float32), jax.NamedSharding(mesh, P("data")))

    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum((x @ w) ** 2)

    text = jax.jit(jax.grad(loss), out_shardings=spec).lower(w, x).compile().as_text() or ""
    (reduce,) = program_cost(text, dict(mesh.shape)).collectives
    assert (reduce.kind, reduce.axes, reduce.group_size, reduce.dtype) == ("all-reduce", ("data",), 4, "f32")
    assert reduce.payload_bytes == 64 * 64 * 4
