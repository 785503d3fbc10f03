"""The device mesh: axis sizes from the config, impossible sizes explained, devices laid out over one or more slices."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from posttrain.config import MeshConfig
from posttrain.errors import UserError, UserErrors

AXES = ("replica", "data", "fsdp", "context", "tensor", "expert")
ROW_AXES = ("replica", "data", "fsdp", "expert")
"""Axes over which the rows of a batch are split."""


def axis_sizes(config: MeshConfig) -> dict[str, int]:
    """Sizes by axis name as configured, -1 included."""
    return {name: getattr(config, name) for name in AXES}


def check_mesh(config: MeshConfig) -> list[str]:
    """Problems that can be seen without a device."""
    sizes = axis_sizes(config)
    problems = [
        f"mesh.{name} = {size}: an axis has a size of at least 1, or -1 for whatever devices remain"
        for name, size in sizes.items()
        if size < 1 and size != -1
    ]
    rest = [name for name, size in sizes.items() if size == -1]
    if len(rest) > 1:
        problems.append(f"mesh: {' and '.join(rest)} are both -1; only one axis can take whatever devices remain")
    return problems


def check_row_length(sizes: Mapping[str, int], row_length: int) -> list[str]:
    """Problems with splitting rows of this length; `sizes` may hold -1, of which nothing is known yet."""
    context = sizes["context"]
    if context <= 1 or row_length % (2 * context) == 0:
        return []
    longer = max(1, round(row_length / (2 * context))) * 2 * context
    other = nearest_divisor(row_length // 2, context) if row_length % 2 == 0 else 1
    return [
        f"data.row_length = {row_length}: mesh.context = {context} splits a row into {2 * context} equal chunks, two "
        f"for each device; the nearest that work are data.row_length = {longer} or mesh.context = {other}"
    ]


def nearest_divisor(number: int, size: int) -> int:
    """The divisor of `number` that is nearest to `size`, of two the larger."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: (abs(d - size), -d))


def resolve_sizes(
    config: MeshConfig, device_count: int, *, slices: int = 1, rows: int | None = None, row_length: int | None = None
) -> dict[str, int]:
    """Axis sizes with -1 filled in. Raises `UserError` when they do not multiply to the device count.

    A config that says nothing gets `replica` across the slices and `fsdp` within one; where `rows` (those that an
    accumulation step may have) are too few for that, `context` takes what `fsdp` cannot, if rows of `row_length` tokens
    can be split so.
    """
    problems = check_mesh(config)
    if problems:
        raise UserErrors(problems)
    sizes = axis_sizes(config)
    if config == MeshConfig():
        return sizes | _automatic_sizes(device_count, slices, rows, row_length)
    fixed = math.prod(size for size in sizes.values() if size != -1)
    named = " x ".join(f"{name} {size}" for name, size in sizes.items() if size != 1) or "1"
    free = next((name for name, size in sizes.items() if size == -1), None)
    if free is not None:
        if device_count % fixed:
            raise UserError(
                f"mesh: {named}: the fixed axes need a multiple of {fixed} devices, there are {device_count}; "
                f"{_nearest_sizes(sizes, device_count)}"
            )
        return sizes | {free: device_count // fixed}
    if fixed != device_count:
        hint = "" if jax.default_backend() != "cpu" else " (XLA_FLAGS=--xla_force_host_platform_device_count sets it)"
        raise UserError(
            f"mesh: {named} needs {fixed} devices, there are {device_count}{hint}; "
            f"{_nearest_sizes(sizes, device_count)}, or set one axis to -1"
        )
    return sizes


def _automatic_sizes(device_count: int, slices: int, rows: int | None, row_length: int | None) -> dict[str, int]:
    within = device_count // slices
    fsdp = within if rows is None else math.gcd(within, rows // slices if rows % slices == 0 else within)
    sizes = {"replica": slices, "fsdp": fsdp, "context": within // fsdp}
    if row_length is None or check_row_length(sizes, row_length):
        return {"replica": slices, "fsdp": within}
    return sizes


def _nearest_sizes(sizes: Mapping[str, int], device_count: int) -> str:
    """What to do about sizes that do not fit the devices: of one axis, if that is enough."""
    fixed = {name: size for name, size in sizes.items() if size != -1}
    works = []
    for name in [name for name, size in fixed.items() if size > 1] or ["fsdp"]:
        others = math.prod(fixed.values()) // fixed[name]
        if device_count % others == 0:
            left = device_count // others
            works.append((name, nearest_divisor(left, fixed[name]) if -1 in sizes.values() else left))
    changed = [(name, size) for name, size in works if size != fixed[name]]
    if not changed:
        return f"choose sizes whose product divides {device_count}"
    name, size = min(changed, key=lambda found: abs(found[1] - fixed[found[0]]))
    return f"the nearest that works is mesh.{name} = {size}"


def slice_count(devices: Sequence[Any]) -> int:
    """In how many slices of TPUs these devices are. Others name a slice too: their host, or the hosts that one NVLink
    network joins; between those any axis may run, and they count as one."""
    return len({_slice_index(device) for device in devices}) if devices[0].platform == "tpu" else 1


def _slice_index(device: Any) -> int:
    return getattr(device, "slice_index", 0)


def make_mesh(
    config: MeshConfig,
    devices: Sequence[Any] | None = None,
    *,
    rows: int | None = None,
    row_length: int | None = None,
) -> Mesh:
    """A mesh with all six axes (most of size 1) over all devices of all processes, or over these.

    Where the devices are in several slices, `replica` runs across them first: what it moves goes over the network
    between slices. Other devices than TPUs are taken host by host, so that the last axes stay within one. `rows` and
    `row_length` are what a config that says nothing is decided by (`resolve_sizes`). Raises `UserError` where there is
    no such mesh.
    """
    devices = jax.devices() if devices is None else devices
    slices = slice_count(devices)
    sizes = resolve_sizes(config, len(devices), slices=slices, rows=rows, row_length=row_length)
    shape = tuple(sizes[name] for name in AXES)
    types = (AxisType.Auto,) * len(AXES)
    if slices == 1 and devices[0].device_kind == "TPU v4" and any(device.core_on_chip for device in devices):
        # Described ahead of time a chip is two devices, for which JAX has no layout: in their own order.
        return Mesh(np.array(devices).reshape(shape), AXES, axis_types=types)
    if devices[0].platform != "tpu":  # `jax.make_mesh` refuses those of several hosts
        placed = sorted(devices, key=lambda device: (_slice_index(device), device.id))
        return Mesh(np.array(placed).reshape(shape), AXES, axis_types=types)
    if slices == 1:
        try:
            return jax.make_mesh(shape, AXES, devices=devices, axis_types=types)
        except NotImplementedError:  # no axis takes whole physical ones: one of those is split between several
            placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
            return Mesh(placed, AXES, axis_types=types)
    if sizes["replica"] % slices:
        raise UserError(
            f"mesh.replica = {sizes['replica']}: the devices are in {slices} slices, between which only replica runs; "
            f"set it to {slices}, or to a multiple"
        )
    across = tuple(slices if name == "replica" else 1 for name in AXES)
    within = tuple(size // outer for size, outer in zip(shape, across, strict=True))
    try:
        placed = mesh_utils.create_hybrid_device_mesh(within, across, devices)
    except NotImplementedError:
        placed = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=types)


def single_device_mesh() -> Mesh:
    """All axes of size 1, on this process's first device."""
    devices = np.array(jax.local_devices()[:1]).reshape((1,) * len(AXES))
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def row_shards(sizes: Mapping[str, int]) -> int:
    """Over how many devices the rows of a batch are split."""
    return math.prod(sizes[name] for name in ROW_AXES)
