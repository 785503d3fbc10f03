"""Devices that are not here: a TPU topology as libtpu describes it, for compiling ahead of time.

This module and what calls it run in a process of their own (`worker.py`): libtpu is configured by the environment, and
loaded once.
"""

import importlib.util
import re
from typing import Any

from jax.experimental import topologies

from posttrain.errors import UserError

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    # What libtpu would ask the machine for, if it were one with TPUs.
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # Several plans may run at once.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""Under which libtpu compiles without a TPU."""

DIMS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3}
"""How many dims the topologies of a chip have."""

FORM = "CHIP:AxB or CHIP:AxBxC, counted in chips, such as v5e:4x4, v6e:4x4, v5p:2x2x2, v4:2x2x4, tpu7x:2x2x1"


def topology_text(name: str, slices: int) -> str:
    """As titles have it."""
    return f"{name}, {slices} slices" if slices > 1 else name


def check_topology(name: str, slices: int) -> list[str]:
    """Problems that can be seen without libtpu."""
    problems = [] if slices >= 1 else [f"--slices {slices}: at least 1"]
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if found is None:
        counted = re.fullmatch(r"(v\w+?)-(\d+)", name)
        hint = f"; {name} says how many there are, not how they are connected" if counted else ""
        return [*problems, f"--topology {name}: not of the form {FORM}{hint}"]
    if found[1] not in DIMS:
        return [*problems, f"--topology {name}: no chip {found[1]!r}; known: {', '.join(DIMS)}"]
    if found[2].count("x") + 1 != DIMS[found[1]]:
        problems.append(f"--topology {name}: a {found[1]} slice has {DIMS[found[1]]} dims; the form is {FORM}")
    return problems


def check_libtpu() -> None:
    """Raises `UserError` where libtpu is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("--topology: needs the TPU compiler, which needs no TPU; install posttrain[plan]")


def described_devices(name: str, slices: int) -> list[Any]:
    """The devices of the topology, of all slices. Raises `UserError` for one that libtpu does not know."""
    options = {"num_slices": slices} if slices > 1 else {}
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--topology {name}: libtpu does not know it ({reason}); the form is {FORM}") from error
    return list(described.devices)
