"""Where arrays live: the logical-to-mesh axis table, and the one matcher that addresses parameters by name.

Parameters name their dims logically (`embed`, `heads`, ...); one table says over which mesh axes each is split. Over
axes that do not divide it a dim is repeated instead, and `Placement.repeated` says so.
"""

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from posttrain.errors import UserErrors
from posttrain.parallel.mesh import ROW_AXES, nearest_divisor
from posttrain.records import Batch, Params

MESH_AXES: dict[str | None, tuple[str, ...]] = {
    "rows": ROW_AXES,
    "tokens": ("context",),
    "embed": ("fsdp", "expert", "context"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "experts": ("expert",),
    "expert_embed": ("fsdp", "context"),
    "router": (),
    "labels": (),
    "layers": (),
    "head_size": (),
    "lora_rank": (),
    "blocks": (),
    "width": (),
    None: (),
}
"""Logical dim name -> mesh axes. `embed` is the model width of parameters: every axis whose devices compute other
tokens with the same weights splits it, but for `replica` and `data`. `expert_embed` is that of experts, which the
`expert` axis splits already, `width` that of activations."""


PIECES: dict[str | None, int] = {"tokens": 2}
"""Into how many equal pieces each device's part of a dim must fall; 1 unless named. See `models/context.py`."""


@dataclass(frozen=True)
class Placement:
    """Where one array lives."""

    sharding: NamedSharding
    repeated: tuple[str, ...]
    """Dims that axes do not divide, and the nearest size that would, e.g. `heads 9 over tensor 2 (3 would do)`."""


def place(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> Placement:
    """Placement of an array whose dims have these logical names."""
    entries: list[tuple[str, ...] | None] = []
    repeated = []
    for name, size in zip(axes, shape, strict=True):
        split = split_axes(name, size, mesh)
        left = size // math.prod(mesh.shape[a] for a in split)
        for axis in _used_axes(name, mesh)[len(split) :]:
            shards = mesh.shape[axis]
            repeated.append(f"{name} {size} over {axis} {shards} ({nearest_divisor(left, shards)} would do)")
        entries.append(split or None)
    return Placement(NamedSharding(mesh, PartitionSpec(*entries)), tuple(repeated))


def split_axes(name: str | None, size: int, mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """The mesh axes over which a dim of this logical name and size is split: the first ones, as far as they divide."""
    split, pieces = [], PIECES.get(name, 1)
    for axis in _used_axes(name, mesh):
        pieces *= mesh.shape[axis]
        if size % pieces:
            break
        split.append(axis)
    return tuple(split)


def idle_axes(dims: Iterable[tuple[str | None, int]], mesh: Mesh) -> list[str]:
    """Problems with axes that exist to split certain dims of parameters and divide none of them: their devices would
    all do the same."""
    sizes: dict[str, dict[str, int]] = {}
    for name, size in dims:
        if name is not None and (axes := MESH_AXES[name]):
            sizes.setdefault(axes[0], {}).setdefault(name, size)
    problems = []
    for axis in ("tensor", "expert"):
        count, found = mesh.shape[axis], sizes.get(axis, {})
        if count > 1 and found and not any(size % count == 0 for size in found.values()):
            divisors = [nearest_divisor(math.gcd(size, mesh.size), count) for size in found.values()]
            nearest = min(divisors, key=lambda d: abs(d - count))
            named = ", ".join(f"{name} {size}" for name, size in found.items())
            problems.append(f"mesh.{axis} = {count}: divides none of {named}; the nearest that works is {nearest}")
    return problems


def _used_axes(name: str | None, mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    return tuple(a for a in MESH_AXES[name] if mesh.shape[a] > 1)


def constrain(x: Shaped[Array, "..."], *axes: str | None) -> Shaped[Array, "..."]:
    """Fixes an activation's placement inside jit, under the mesh of `jax.set_mesh`; nothing where no mesh is set."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    entries = [split_axes(name, size, mesh) or None for name, size in zip(axes, x.shape, strict=True)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*entries))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of batch arrays `[A, B, T]`: rows split, accumulation steps and tokens whole."""
    return NamedSharding(mesh, PartitionSpec(None, ROW_AXES, None))


def replicated(mesh: Mesh) -> NamedSharding:
    """One whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def local_rows(mesh: Mesh, accumulation: int, rows: int) -> np.ndarray:
    """Row numbers, within a global batch of `accumulation x rows`, that this process's devices hold; ascending."""
    index_map = batch_sharding(mesh).addressable_devices_indices_map((accumulation, rows, 1))
    numbers = np.arange(accumulation * rows).reshape(accumulation, rows)
    return np.unique(np.concatenate([numbers[index[:2]].ravel() for index in index_map.values() if index]))


def global_batch(local: Batch, row_numbers: np.ndarray, mesh: Mesh, accumulation: int, rows: int) -> Batch:
    """Device arrays `[A, B, T]` from the rows that this process read (`row_numbers`, see `local_rows`)."""
    sharding = batch_sharding(mesh)
    numbers = np.arange(accumulation * rows).reshape(accumulation, rows)

    def put(values: np.ndarray) -> Array:
        shape = (accumulation, rows, values.shape[-1])

        def read(index: Any) -> np.ndarray:
            wanted = numbers[index[:2]]
            return values[np.searchsorted(row_numbers, wanted), index[2]]

        return jax.make_array_from_callback(shape, sharding, read)

    return jax.tree.map(put, local)


def flatten(params: Params) -> dict[str, Any]:
    """Nested dict -> leaves by joined path, e.g. `layers/attn/q/kernel`."""
    return traverse_util.flatten_dict(params, sep="/")


def unflatten(leaves: Mapping[str, Any]) -> Params:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(dict(leaves), sep="/")


_LAYER_RANGE = re.compile(r"^(?P<stack>\w+)\[(?P<low>\d*):(?P<high>\d*)\](?P<rest>.*)$", re.DOTALL)

Selection = bool | np.ndarray
"""All of a parameter, nothing of it, or, for a stacked one, a boolean per layer."""


def select(patterns: Sequence[str], shapes: Mapping[str, Sequence[int]], key: str) -> dict[str, Selection]:
    """Which parameters the patterns name: regular expressions of whole paths, with an optional layer range
    (`layers[0:12]/attn/.*`, counted as Python does). Raises `UserErrors`, naming the config `key`, for a pattern that
    is no expression, matches nothing or leaves the layers."""
    chosen: dict[str, Selection] = dict.fromkeys(shapes, False)
    problems = []
    for pattern in patterns:
        ranged = _LAYER_RANGE.match(pattern)
        body = ranged["stack"] + ranged["rest"] if ranged else pattern
        try:
            expression = re.compile(body)
        except re.error as error:
            problems.append(f"{key}: {pattern!r} is not a regular expression: {error}")
            continue
        matches = [path for path in shapes if expression.fullmatch(path)]
        if not matches:
            near = difflib.get_close_matches(body, list(shapes), n=3, cutoff=0.0)
            problems.append(f"{key}: {pattern!r} matches no parameter; the nearest are {', '.join(near)}")
        for path in matches:
            if ranged is None:
                chosen[path] = True
                continue
            layers = shapes[path][0] if path.startswith(f"{ranged['stack']}/") else 0
            span = slice(int(ranged["low"] or 0), int(ranged["high"] or layers))
            if not 0 <= span.start < span.stop <= layers:
                problems.append(f"{key}: {pattern!r} names layers {span.start} to {span.stop} of {path}: has {layers}")
                break
            mask = np.zeros(layers, bool)
            mask[span] = True
            chosen[path] = mask | chosen[path]
    if problems:
        raise UserErrors(problems)
    return {path: _simplify(value) for path, value in chosen.items()}


def _simplify(value: Selection) -> Selection:
    if isinstance(value, np.ndarray) and value.all():
        return True
    return value
