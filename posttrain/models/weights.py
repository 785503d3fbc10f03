"""Weights on disk: how one tensor of a checkpoint maps to one of our parameters, and safetensors files read by slices
and written as a stream. `llama.py` and its siblings hold the tables, `hf.py` and `gguf.py` move the data.
"""

import itertools
import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open

from posttrain.errors import UserError, UserErrors
from posttrain.models.architecture import DecoderConfig

SAFETENSORS_DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(jnp.bfloat16),
    "F16": np.dtype(np.float16),
    "F64": np.dtype(np.float64),
}
"""What weights may be stored as, by the names of the safetensors format."""

WRITABLE_DTYPES = {dtype.name: code for code, dtype in SAFETENSORS_DTYPES.items() if code != "F64"}

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

MAX_SHARD_BYTES = 5 * 10**9
"""Above it a checkpoint is written as several files, as transformers does."""

Span = tuple[int, int]
"""Start and stop along one dim."""


def _always(config: DecoderConfig) -> bool:
    return True


@dataclass(frozen=True)
class Weight:
    """One line of a family's table: a parameter of ours and the checkpoint tensors it is made of."""

    path: str
    """Ours, e.g. `layers/attn/q/kernel`; stacked over layers where `name` has `{layer}`."""
    name: str
    """The checkpoint's, e.g. `model.layers.{layer}.self_attn.q_proj.weight`; one for each expert where it has
    `{expert}`, which are our first dim behind the layers."""
    layout: str
    """Dims of one layer (and expert), ours -> the checkpoint's, in letters of the shape legend; those in parentheses
    are one dim there: `D N H -> (N H) D`."""
    when: Callable[[DecoderConfig], bool] = _always
    """Whether a model of this config has it."""
    behind: tuple[str, ...] = ()
    """Of a checkpoint tensor that holds several of ours one after another along its first dim: the rows before this
    one, as groups of letters; `("N H", "K H")` for the values in Phi-3's `qkv_proj`."""
    joined: tuple[str, int, int] | None = None
    """A tensor that a checkpoint may have instead: its name, and which of how many parts of its rows this is. Where
    `name` has `{expert}`, it is `[E, rows, columns]`."""

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.name

    @property
    def by_expert(self) -> bool:
        return "{expert}" in self.name

    @property
    def dims(self) -> tuple[str, ...]:
        """Letters of our dims, without layers and experts."""
        return tuple(self.layout.split("->")[0].split())

    @property
    def stored_dims(self) -> tuple[tuple[str, ...], ...]:
        """Letters of the checkpoint's dims, each one or several of ours."""
        return tuple(tuple(group.strip("()").split()) for group in re.findall(r"\([^)]*\)|\w", self._stored))

    @property
    def _stored(self) -> str:
        return self.layout.split("->")[1]

    def stored_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of its part of the checkpoint tensor: of all of it, unless that holds several of ours."""
        return tuple(math.prod(sizes[d] for d in group) for group in self.stored_dims)

    def stored_row(self, sizes: Mapping[str, int]) -> int:
        """Where its part of the checkpoint tensor begins."""
        return sum(math.prod(sizes[d] for d in group.split()) for group in self.behind)

    def shape(self, config: DecoderConfig) -> tuple[int, ...]:
        """Our parameter's shape: with layers, and with the padded vocabulary."""
        sizes = {**dim_sizes(config), "V": config.padded_vocab_size}
        layers = (config.num_hidden_layers,) if self.stacked else ()
        experts = (sizes["E"],) if self.by_expert else ()
        return (*layers, *experts, *(sizes[d] for d in self.dims))

    def to_stored(self, values: Shaped[np.ndarray, "..."], sizes: Mapping[str, int]) -> Shaped[np.ndarray, "..."]:
        """Its part of the checkpoint tensor from the values of one layer (and expert), vocabulary padding cut off."""
        values = values[tuple(slice(sizes[d]) for d in self.dims)]
        order = [self.dims.index(d) for group in self.stored_dims for d in group]
        return values.transpose(order).reshape(self.stored_shape(sizes))

    def read(
        self,
        tensor: Callable[[tuple[slice, ...]], Shaped[np.ndarray, "..."]],
        spans: Sequence[Span],
        sizes: Mapping[str, int],
    ) -> Shaped[np.ndarray, "..."]:
        """The values of one layer (and expert) within `spans` of `dims`, from a checkpoint tensor that is asked for
        just the slices that hold them. `spans` stay within `sizes`: padding is the caller's."""
        span = dict(zip(self.dims, spans, strict=True))
        ranges, split, inner = [], [], []
        for first, *rest in self.stored_dims:
            width = math.prod(sizes[d] for d in rest)
            low, high = span[first]
            ranges.append(slice(low * width, high * width))
            split += [high - low, *(sizes[d] for d in rest)]
            inner += [slice(None), *(slice(*span[d]) for d in rest)]
        row = self.stored_row(sizes)
        ranges[0] = slice(ranges[0].start + row, ranges[0].stop + row)
        order = [d for group in self.stored_dims for d in group]
        values = tensor(tuple(ranges)).reshape(split)[tuple(inner)]
        return values.transpose([order.index(d) for d in self.dims])


def dim_sizes(config: DecoderConfig) -> dict[str, int]:
    """Sizes of the dims that checkpoint tensors have, by letter of the shape legend."""
    return {
        "D": config.hidden_size,
        "N": config.num_attention_heads,
        "K": config.num_key_value_heads,
        "H": config.head_dim,
        "F": config.intermediate_size if config.moe is None else config.moe.moe_intermediate_size,
        "V": config.vocab_size,
        "E": 0 if config.moe is None else config.moe.num_experts,
        "C": config.num_labels,
    }


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint."""

    weights: tuple[Weight, ...]
    """The lines of the table that it holds, in the order of its rows."""
    layer: int | None
    expert: int | None = None

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        shapes = [weight.stored_shape(sizes) for weight in self.weights]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def join(
        self, values: Callable[[Weight], Shaped[np.ndarray, "..."]], sizes: Mapping[str, int]
    ) -> Shaped[np.ndarray, "..."]:
        """The tensor itself; `values` gives the values of a parameter in its layer (and expert)."""
        parts = [weight.to_stored(values(weight), sizes) for weight in self.weights]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def stored_tensors(weights: Sequence[Weight], config: DecoderConfig) -> dict[str, StoredTensor]:
    """Every tensor that a checkpoint of this config has, by name, in the order of a forward pass."""
    tensors: dict[str, StoredTensor] = {}
    present = [w for w in weights if w.when(config)]
    for stacked, group in itertools.groupby(present, key=lambda w: w.stacked):
        members = list(group)
        for layer in range(config.num_hidden_layers) if stacked else [None]:
            for by_expert, lines in itertools.groupby(members, key=lambda w: w.by_expert):
                parts = list(lines)
                experts = range(dim_sizes(config)["E"]) if by_expert else [None]
                for expert, weight in itertools.product(experts, parts):
                    name = weight.name.format(layer=layer, expert=expert)
                    held = (*tensors[name].weights, weight) if name in tensors else (weight,)
                    tensors[name] = StoredTensor(held, layer, expert)
    return tensors


def tensor_problems(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], stored_names: Mapping[str, str]
) -> list[str]:
    """Names what is missing, extra or misshapen. `stored_names` says what a found tensor is called in its file."""
    missing = [f"{name}: missing; shape {list(expected[name])} is needed" for name in expected if name not in found]
    extra = [f"{stored_names[name]}: extra; this model has no such tensor" for name in found if name not in expected]
    misshapen = [
        f"{stored_names[name]}: shape {list(shape)}; {list(expected[name])} is needed"
        for name, shape in found.items()
        if name in expected and shape != expected[name]
    ]
    return [*missing, *extra, *misshapen]


class CheckpointReader:
    """The safetensors files of a model directory, opened but not read: shapes first, slices when asked for.

    Raises `UserError` when there are none, or when one is missing, truncated or not safetensors.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.shapes: dict[str, tuple[int, ...]] = {}
        """All tensors of all files."""
        self.dtypes: dict[str, str] = {}
        """Their dtypes, by the names of the safetensors format."""
        self._files: dict[str, Any] = {}
        self._parts: dict[str, tuple[str, int | None, int]] = {}
        for file in self._list_files():
            self._open(directory / file)

    def _list_files(self) -> list[str]:
        if (self.directory / SINGLE_FILE).is_file():
            return [SINGLE_FILE]
        index = self.directory / INDEX_FILE
        if not index.is_file():
            raise UserError(f"{self.directory}: no weights: neither {SINGLE_FILE} nor {INDEX_FILE} is there")
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
            raise UserError(f"{index}: weight_map: must map tensor names to file names; download the index again")
        files = sorted(set(weight_map.values()))
        missing = [f for f in files if not (self.directory / f).is_file()]
        if missing:
            raise UserErrors([f"{self.directory / f}: named in {INDEX_FILE} but not there" for f in missing])
        return files

    def _open(self, path: Path) -> None:
        try:
            handle = safe_open(path, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a whole safetensors file ({error}); copy or download it again") from error
        for name in handle.keys():  # noqa: SIM118 (a safe_open handle is no mapping)
            if name in self._files:
                raise UserError(f"{path}: {name} is also in another file of {self.directory}")
            tensor = handle.get_slice(name)
            self._files[name] = handle
            self.shapes[name] = tuple(tensor.get_shape())
            self.dtypes[name] = tensor.get_dtype()

    def take_apart(self, expected: Mapping[str, StoredTensor], sizes: Mapping[str, int]) -> None:
        """Names the parts of tensors that the files hold joined (`Weight.joined`) as the table does."""
        whole = set()
        for name, tensor in expected.items():
            if name in self.shapes or (joined := tensor.weights[0].joined) is None:
                continue
            held, number, count = joined[0].format(layer=tensor.layer), *joined[1:]
            *experts, rows, columns = self.shapes.get(held, (1, 1))
            wanted = [] if tensor.expert is None else [sizes["E"]]
            if held not in self.shapes or experts != wanted or rows % count:
                continue  # to be reported as it is
            whole.add(held)
            self.shapes[name], self.dtypes[name] = (rows // count, columns), self.dtypes[held]
            self._parts[name] = (held, tensor.expert, number * rows // count)
        for name in whole:
            del self.shapes[name]

    def read(self, name: str, ranges: tuple[slice, ...]) -> Shaped[np.ndarray, "..."]:
        """A slice of one tensor, in its stored dtype."""
        if name not in self._parts:
            return self._files[name].get_slice(name)[ranges]
        held, expert, row = self._parts[name]
        rows, columns = ranges
        ranges = (slice(rows.start + row, rows.stop + row), columns)
        return self._files[held].get_slice(held)[ranges if expert is None else (expert, *ranges)]


def write_checkpoint(
    directory: epath.Path | None,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype,
    tensor: Callable[[str], Shaped[np.ndarray, "..."]],
    max_shard_bytes: int,
) -> None:
    """Writes safetensors: one file, or shards and their index above the limit. `tensor(name)` is called once for each
    name, in order, and one result is held at a time. Without a directory it is only called: on the processes that
    must take part in gathering a tensor but do not write."""
    shards: list[list[str]] = [[]]
    room = max_shard_bytes
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if size > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else SINGLE_FILE
        weight_map.update(dict.fromkeys(names, file))
        if directory is None:
            for name in names:
                tensor(name)
        else:
            write_file(directory / file, {name: shapes[name] for name in names}, dtype, tensor)
    if directory is not None and len(shards) > 1:
        total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
        write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_file(
    path: epath.Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype,
    tensor: Callable[[str], Shaped[np.ndarray, "..."]],
) -> None:
    """One safetensors file: 8 bytes of header length, the JSON header, the tensors. The `safetensors` package only
    writes tensors that are all in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": WRITABLE_DTYPES[dtype.name], "shape": list(shape), "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(head)))
        file.write(head)
        for name, shape in shapes.items():
            values = tensor(name)
            if values.shape != shape:
                raise ValueError(f"{name}: shape {values.shape}, announced as {shape}")
            file.write(np.ascontiguousarray(cast(name, values, dtype)).view(np.uint8).data)


def cast(name: str, values: Shaped[np.ndarray, "..."], dtype: np.dtype) -> Shaped[np.ndarray, "..."]:
    """Rounds to nearest; raises `UserError` where a finite value would become infinite."""
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore"):
        result = values.astype(dtype)
    if dtype == np.float16 and not np.array_equal(np.isfinite(result), np.isfinite(values)):
        raise UserError(f"{name}: values beyond the range of float16 (65504); write bfloat16 or float32 instead")
    return result


@contextmanager
def new_directory(target: epath.Path) -> Iterator[epath.Path]:
    """A temporary directory beside `target`, which takes that name when everything in it is written: another process
    sees all of it or nothing. Object stores cannot rename: there it is the target itself, removed on failure. Raises
    `UserError` where the target exists and holds anything."""
    check_free(target)
    remote = "://" in str(target)
    directory = target if remote else target.with_name(f".{target.name}.partial-{os.getpid()}")
    directory.mkdir(parents=True, exist_ok=True)
    done = False
    try:
        yield directory
        if not remote:
            if target.exists():
                target.rmdir()  # empty, as checked
            directory.rename(target)
        done = True
    finally:
        if not done:
            directory.rmtree(missing_ok=True)


def check_free(target: epath.Path) -> None:
    """Raises `UserError` where a new directory would write over something."""
    if target.exists() and not target.is_dir():
        raise UserError(f"{target}: exists and is a file; name a new directory")
    if target.exists() and any(target.iterdir()):
        raise UserError(f"{target}: exists and is not empty; nothing is written over: name a new directory")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises `UserError` where the file holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: must be a JSON object, is a {type(value).__name__}")
    return value


def write_json(path: epath.Path, value: Mapping[str, Any]) -> None:
    """As transformers writes its JSON files."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
