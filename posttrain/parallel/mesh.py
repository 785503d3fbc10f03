"""The device mesh: start-up of one or many processes, axis sizes from the config, impossible sizes explained."""

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax._src import distributed, xla_bridge  # what they are used for has no public name
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from posttrain.config import MeshConfig
from posttrain.errors import UserError, UserErrors

AXES = ("replica", "data", "fsdp", "context", "tensor", "expert")
ROW_AXES = ("replica", "data", "fsdp", "expert")
"""Axes over which the rows of a batch are split."""
SERVED_AXES = ("replica", "data", "fsdp", "tensor", "expert")

_barriers = itertools.count()
"""Every barrier needs a name of its own; all processes come to the same ones in the same order."""


def axis_sizes(config: MeshConfig) -> dict[str, int]:
    """Sizes by axis name as configured, -1 included."""
    return {name: getattr(config, name) for name in AXES}


def check_mesh(config: MeshConfig) -> list[str]:
    """Problems that can be seen without a device."""
    sizes = axis_sizes(config)
    served = f"{', '.join(SERVED_AXES[:-1])} or {SERVED_AXES[-1]}"
    problems = [
        f"mesh.{name} = {size}: only 1 is served yet; split over {served} instead"
        for name, size in sizes.items()
        if name not in SERVED_AXES and size != 1
    ]
    problems += [
        f"mesh.{name} = {size}: an axis has a size of at least 1, or -1 for whatever devices remain"
        for name, size in sizes.items()
        if size < 1 and size != -1
    ]
    rest = [name for name, size in sizes.items() if size == -1]
    if len(rest) > 1:
        problems.append(f"mesh: {' and '.join(rest)} are both -1; only one axis can take whatever devices remain")
    return problems


def start_processes(mesh: MeshConfig) -> None:
    """Joins the processes of this run and, on CPU, emulates as many devices as the mesh asks for.

    Must run before the first use of a device. Plain hosts name their peers by `JAX_COORDINATOR_ADDRESS`,
    `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`; SLURM (several tasks), Cloud TPU and GKE pods are found by JAX itself.
    """
    env = os.environ
    count = 1
    if "JAX_COORDINATOR_ADDRESS" in env and "JAX_NUM_PROCESSES" in env:
        count = int(env["JAX_NUM_PROCESSES"])
    _emulate_devices(mesh, count)
    if jax.distributed.is_initialized():
        return
    if count > 1:
        missing = [name for name in ("JAX_PROCESS_ID",) if name not in env]
        if missing:
            raise UserError(f"JAX_NUM_PROCESSES={count} needs {missing[0]} too: 0 to {count - 1}, one per process")
        jax.distributed.initialize(
            coordinator_address=env["JAX_COORDINATOR_ADDRESS"],
            num_processes=count,
            process_id=int(env["JAX_PROCESS_ID"]),
        )
    elif int(env.get("SLURM_NTASKS", "1")) > 1 or "," in env.get("TPU_WORKER_HOSTNAMES", ""):
        jax.distributed.initialize()


def _emulate_devices(mesh: MeshConfig, processes: int) -> None:
    """Only the CPU backend reads this setting: accelerators are left as they are."""
    sizes = [size for size in axis_sizes(mesh).values() if size != -1]
    wanted = math.prod(sizes)
    chosen_by_user = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if wanted > processes and wanted % processes == 0 and not chosen_by_user and not _backend_started():
        jax.config.update("jax_num_cpu_devices", wanted // processes)


def _backend_started() -> bool:
    return xla_bridge.backends_are_initialized()


def resolve_sizes(config: MeshConfig, device_count: int) -> dict[str, int]:
    """Axis sizes with -1 filled in. Raises `UserError` when they do not multiply to the device count."""
    problems = check_mesh(config)
    if problems:
        raise UserErrors(problems)
    sizes = axis_sizes(config)
    fixed = math.prod(size for size in sizes.values() if size != -1)
    named = " x ".join(f"{name} {size}" for name, size in sizes.items() if size != 1) or "1"
    free = next((name for name, size in sizes.items() if size == -1), None)
    if free is not None:
        if device_count % fixed:
            raise UserError(
                f"mesh: {named}: the fixed axes need a multiple of {fixed} devices, there are {device_count}; "
                f"choose sizes whose product divides {device_count}"
            )
        return sizes | {free: device_count // fixed}
    if fixed != device_count:
        hint = "" if jax.default_backend() != "cpu" else " (XLA_FLAGS=--xla_force_host_platform_device_count sets it)"
        raise UserError(
            f"mesh: {named} needs {fixed} devices, there are {device_count}{hint}; "
            "change the sizes or set one axis to -1"
        )
    return sizes


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with all six axes (most of size 1) over all devices of all processes, or over these.

    Where the devices are in several slices, `replica` runs across them first: what it moves goes over the network
    between slices. Raises `UserError` where it cannot.
    """
    devices = jax.devices() if devices is None else devices
    sizes = resolve_sizes(config, len(devices))
    shape = tuple(sizes[name] for name in AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    types = (AxisType.Auto,) * len(AXES)
    if slices == 1 and devices[0].device_kind == "TPU v4" and any(device.core_on_chip for device in devices):
        # Described ahead of time a chip is two devices, for which JAX has no layout: in their own order.
        return Mesh(np.array(devices).reshape(shape), AXES, axis_types=types)
    if slices == 1:
        return jax.make_mesh(shape, AXES, devices=devices, axis_types=types)
    if sizes["replica"] % slices:
        raise UserError(
            f"mesh.replica = {sizes['replica']}: the devices are in {slices} slices, between which only replica runs; "
            f"set it to {slices}, or to a multiple"
        )
    across = tuple(slices if name == "replica" else 1 for name in AXES)
    within = tuple(size // outer for size, outer in zip(shape, across, strict=True))
    return Mesh(mesh_utils.create_hybrid_device_mesh(within, across, devices), AXES, axis_types=types)


def single_device_mesh() -> Mesh:
    """All axes of size 1, on this process's first device."""
    devices = np.array(jax.local_devices()[:1]).reshape((1,) * len(AXES))
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def row_shards(sizes: Mapping[str, int]) -> int:
    """Over how many devices the rows of a batch are split."""
    return math.prod(sizes[name] for name in ROW_AXES)


def barrier(name: str) -> None:
    """Waits, for a day if need be, until every process has come here; ends with an error when one of them dies.

    Asks the coordination service, not the devices: their collectives time out while one process tokenizes.
    """
    if jax.process_count() > 1:
        client = distributed.global_state.client
        assert client is not None
        client.wait_at_barrier(f"{name} {next(_barriers)}", 24 * 3600 * 1000)


def gather_texts(text: str) -> list[str]:
    """Every process's text, by process number. All must call it, in the same order; waits as `barrier` does."""
    if jax.process_count() == 1:
        return [text]
    client = distributed.global_state.client
    assert client is not None
    key = f"texts {next(_barriers)}"
    client.key_value_set(f"{key}/{jax.process_index()}", text)
    return [client.blocking_key_value_get(f"{key}/{i}", 24 * 3600 * 1000) for i in range(jax.process_count())]
