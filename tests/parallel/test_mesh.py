"""Mesh sizes: filled in, or refused with what would work."""

import re
from dataclasses import dataclass

import pytest

from posttrain.config import MeshConfig
from posttrain.errors import UserError
from posttrain.parallel.mesh import axis_sizes, check_mesh, check_row_length, make_mesh, resolve_sizes, row_shards


def test_the_free_axis_takes_what_remains() -> None:
    sizes = resolve_sizes(MeshConfig(data=2, tensor=2), 8)
    assert (sizes["data"], sizes["fsdp"], sizes["tensor"]) == (2, 2, 2)
    assert row_shards(sizes) == 4
    assert row_shards(resolve_sizes(MeshConfig(expert=4, fsdp=2), 8)) == 8


def test_an_axis_that_does_not_divide_is_explained() -> None:
    with pytest.raises(UserError, match="need a multiple of 3 devices, there are 8"):
        resolve_sizes(MeshConfig(tensor=3), 8)
    with pytest.raises(UserError, match="data 2 x fsdp 2 needs 4 devices, there are 8"):
        resolve_sizes(MeshConfig(data=2, fsdp=2), 8)


@pytest.mark.parametrize(
    ("sizes", "devices", "fix"),
    [
        ({"tensor": 3}, 8, "mesh.tensor = 4"),
        ({"tensor": 7, "data": 2}, 16, "mesh.tensor = 8"),
        ({"context": 6, "fsdp": 2}, 8, "mesh.context = 4"),
        ({"data": 2, "fsdp": 2}, 8, "mesh.data = 4"),
        ({"fsdp": 1}, 8, "mesh.fsdp = 8"),
        ({"data": 3, "tensor": 5, "fsdp": 1}, 8, "choose sizes whose product divides 8"),
    ],
)
def test_the_nearest_that_works_is_named(sizes: dict[str, int], devices: int, fix: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve_sizes(MeshConfig(**sizes), devices)
    assert fix in str(caught.value)
    if fix.startswith("mesh."):
        axis, size = fix.removeprefix("mesh.").split(" = ")
        resolve_sizes(MeshConfig(**(sizes | {axis: int(size)})), devices)


def test_all_impossible_axes_are_named() -> None:
    text = "\n".join(check_mesh(MeshConfig(context=-2, data=0, fsdp=-1, tensor=-1)))
    assert "mesh.context = -2" in text and "mesh.data = 0" in text and "fsdp and tensor are both -1" in text


def chosen(devices: int, **facts: int) -> dict[str, int]:
    """What a config that says nothing gets; axes of size 1 left out."""
    return {name: size for name, size in resolve_sizes(MeshConfig(), devices, **facts).items() if size > 1}


def test_a_config_that_says_nothing_gets_a_mesh() -> None:
    assert chosen(8) == chosen(8, rows=16, row_length=4096) == {"fsdp": 8}
    assert chosen(16, slices=2, rows=16, row_length=4096) == {"replica": 2, "fsdp": 8}


def test_too_few_rows_are_split_themselves_if_they_can_be() -> None:
    assert chosen(8, rows=2, row_length=131072) == {"fsdp": 2, "context": 4}
    assert chosen(64, slices=2, rows=4, row_length=131072) == {"replica": 2, "fsdp": 2, "context": 16}
    assert chosen(8, rows=2, row_length=1001) == {"fsdp": 8}  # refused with the batch
    assert chosen(16, slices=2, rows=3, row_length=4096) == {"replica": 2, "fsdp": 8}


@pytest.mark.parametrize(("row_length", "context"), [(1000, 3), (36, 8), (33, 2), (4096, 3)])
def test_rows_that_cannot_be_split_are_explained(row_length: int, context: int) -> None:
    sizes = axis_sizes(MeshConfig(context=context))
    (problem,) = check_row_length(sizes, row_length)
    assert f"data.row_length = {row_length}: mesh.context = {context}" in problem
    length, devices = (int(n) for n in re.findall(r"= (\d+)", problem)[-2:])
    assert not check_row_length(sizes, length) and abs(length - row_length) <= 2 * context
    assert not check_row_length(axis_sizes(MeshConfig(context=devices)), row_length)


def test_rows_that_can_be_split_are_not() -> None:
    for context in (1, 2, 4, -1):
        assert not check_row_length(axis_sizes(MeshConfig(context=context, fsdp=1)), 4096)


def test_the_mesh_has_all_axes() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert dict(mesh.shape) == {"replica": 1, "data": 2, "fsdp": 2, "context": 1, "tensor": 2, "expert": 1}


@dataclass(frozen=True)
class Device:
    """As JAX describes those of several slices."""

    id: int
    slice_index: int
    platform: str
    device_kind: str
    coords: tuple[int, ...] = ()
    core_on_chip: int = 0
    process_index: int = 0


SLICES = [
    Device(8 * part + i, part, "tpu", "TPU v5", (i % 2, i // 2 % 2, i // 4)) for part in range(2) for i in range(8)
]
"""Two of v5p:2x2x2."""


@pytest.mark.parametrize(
    "sizes", [{}, {"replica": 2}, {"replica": 4, "fsdp": 2, "tensor": 2}, {"replica": -1, "fsdp": 4}]
)
def test_only_replica_runs_between_slices(sizes: dict[str, int]) -> None:
    mesh = make_mesh(MeshConfig(**sizes), SLICES)
    half = mesh.shape["replica"] // 2
    for part, devices in enumerate((mesh.devices[:half], mesh.devices[half:])):
        assert {device.slice_index for device in devices.flat} == {part}
    assert sorted(device.id for device in mesh.devices.flat) == list(range(16))


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 16}, {"fsdp": 2, "tensor": 8}, {"replica": 4, "tensor": 4, "fsdp": 1}])
def test_any_axis_runs_between_hosts_of_gpus_the_last_ones_within(sizes: dict[str, int]) -> None:
    """JAX calls every host of GPUs a slice. Two of them, whose processes came in turns."""
    devices = [Device(i, i % 2, "gpu", "NVIDIA H100 80GB HBM3") for i in range(16)]
    mesh = make_mesh(MeshConfig(**sizes), devices)
    assert {name: size for name, size in mesh.shape.items() if size > 1} == {
        name: size for name, size in (sizes or {"fsdp": 16}).items() if size > 1
    }
    hosts = [device.slice_index for device in mesh.devices.flat]
    assert hosts == [0] * 8 + [1] * 8 and len(set(mesh.devices.flat)) == 16


@pytest.mark.parametrize("sizes", [{"fsdp": 16}, {"data": 2}, {"replica": 1, "tensor": 2}])
def test_slices_that_no_replica_joins_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"replica = 1: the devices are in 2 slices.*set it to 2, or to a multiple"):
        make_mesh(MeshConfig(**sizes), SLICES)
