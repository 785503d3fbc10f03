"""What a search may change of a run and how: mesh, remat, micro-batch, collective matmul.

None of it changes what is learned, as long as the global batch stays. This file only spells out the combinations;
whether one is possible is asked of the code that runs it (`static.py`).
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import yaml

from posttrain.config import Config, ModelConfig, parse_config
from posttrain.parallel.mesh import AXES, row_shards

COLLECTIVE_MATMUL = "xla_jf_spmd_threshold_for_windowed_einsum_mib"
"""From which size of operands, in MiB, XLA splits a matrix product with a gather into a ring of both."""
NEVER = 1_000_000
"""A size that no operand has."""

KEPT = ("full", "dots", "minimal", "none")
"""Remat policies of which each keeps all that the one before it keeps."""


def mesh_text(sizes: Mapping[str, int]) -> str:
    """The axes that split anything."""
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "1 device"


@dataclass(frozen=True)
class Candidate:
    """One way to run the step."""

    mesh: tuple[int, ...]
    """Sizes of `AXES`."""
    remat: str
    rows: int
    """Of the global batch."""
    micro: int
    """Rows of one accumulation step, over all devices."""
    collective_matmul: bool

    @property
    def sizes(self) -> dict[str, int]:
        return dict(zip(AXES, self.mesh, strict=True))

    @property
    def shards(self) -> int:
        """Over how many devices rows are split."""
        return row_shards(self.sizes)

    @property
    def rows_per_device(self) -> float:
        """Of one accumulation step."""
        return self.micro / self.shards

    @property
    def text(self) -> str:
        rings = "" if self.collective_matmul else ", no collective matmul"
        return f"{mesh_text(self.sizes)}, remat {self.remat}, {self.rows // self.micro} x {self.micro} rows{rings}"

    def settings(self, base: Config) -> dict[str, Any]:
        """What this candidate sets, as the sections of a config."""
        options = {name: value for name, value in base.train.xla_options.items() if name != COLLECTIVE_MATMUL}
        chosen = base.train.xla_options.get(COLLECTIVE_MATMUL)
        if not self.collective_matmul:
            options[COLLECTIVE_MATMUL] = chosen if _is_off(chosen) and chosen is not None else NEVER
        elif chosen is not None and not _is_off(chosen):
            options[COLLECTIVE_MATMUL] = chosen
        return {
            "model": {"remat": self.remat},
            "train": {"global_batch_size": self.rows, "micro_batch_size": self.micro, "xla_options": options},
            "mesh": self.sizes,
        }

    def config(self, base: Config) -> Config:
        """The run's config with these settings."""
        raw = base.model_dump(mode="json")
        for section, values in self.settings(base).items():
            raw[section] = raw[section] | values
        return parse_config(raw, "search")

    def keeps_no_less_than(self, other: "Candidate") -> bool:
        """Whether this one is the other but for keeping more of the forward pass, or of more rows, at a time."""
        same = (self.mesh, self.rows, self.collective_matmul) == (other.mesh, other.rows, other.collective_matmul)
        if not same or self.micro < other.micro:
            return False
        if self.remat == other.remat:
            return True
        return {self.remat, other.remat} <= set(KEPT) and KEPT.index(self.remat) >= KEPT.index(other.remat)


@dataclass(frozen=True)
class Facts:
    """Of the model and the devices: what estimates are made of."""

    device_kind: str
    devices: int
    slices: int
    layers: int
    width: int
    heads_width: int
    """Of all query heads together."""
    kv_width: int
    """Of all keys, or all values."""
    mlp_width: int
    """Of all experts that a token goes through."""
    row_length: int
    compute_bytes: int
    """Of a number in the compute dtype."""
    flops_per_token: float
    parameters: int
    trained: int
    fingerprint: str
    """Of the model's config.json and of all parameters' names, shapes and dtypes."""


@dataclass(frozen=True)
class Static:
    """Of one candidate: why it is left out, or its bytes on a device."""

    candidate: Candidate
    problems: tuple[str, ...] = ()
    params: int = 0
    optimizer: int = 0
    batch: int = 0
    host: int = 0
    """Optimizer state that is kept in the host's memory."""

    @property
    def bytes(self) -> int:
        """What is there before the step begins, without what is on the host."""
        return self.params + self.optimizer + self.batch


def as_configured(config: Config, sizes: Mapping[str, int]) -> Candidate:
    """The config as it stands; `sizes` are those of its mesh, with no -1 left."""
    rows, micro = config.train.global_batch_size, config.train.micro_batch_size or row_shards(sizes)
    mesh = tuple(sizes[axis] for axis in AXES)
    return Candidate(mesh, config.model.remat, rows, micro, collective_matmul_of(config))


def combinations(
    config: Config, *, devices: int, slices: int, batches: Sequence[int], experts: bool
) -> list[Candidate]:
    """All whose sizes multiply out: meshes of so many devices, micro-batches that divide the batch.

    `replica` runs between slices and nowhere else (within one it is what `data` is); `expert` is 1 for dense models.
    """
    found = []
    options = (collective_matmul_of(config),) if fixed_by_environment() else (True, False)
    policies = get_args(ModelConfig.model_fields["remat"].annotation)
    for sizes in _meshes(devices // slices, slices, experts):
        mesh, shards = tuple(sizes[axis] for axis in AXES), row_shards(sizes)
        # Where every device has all weights no product waits for a gather.
        whole = all(size == 1 for axis, size in sizes.items() if axis not in ("replica", "data"))
        for rows in batches:
            for micro in (shards * k for k in _divisors(rows // shards) if rows % (shards * k) == 0):
                found += [
                    Candidate(mesh, remat, rows, micro, collective)
                    for remat in policies
                    for collective in (options[:1] if whole else options)
                ]
    return found


def collective_matmul_of(config: Config) -> bool:
    """Whether the config leaves it on."""
    return not _is_off(config.train.xla_options.get(COLLECTIVE_MATMUL))


def fixed_by_environment() -> bool:
    """Whether LIBTPU_INIT_ARGS already says when products are split into rings."""
    return COLLECTIVE_MATMUL in os.environ.get("LIBTPU_INIT_ARGS", "")


def _is_off(value: Any) -> bool:
    return value is not None and int(value) >= NEVER


def _meshes(devices: int, slices: int, experts: bool) -> Iterator[dict[str, int]]:
    """Sizes of all axes of one slice's devices, `replica` across the slices; `fsdp` takes the most first."""
    for context in _divisors(devices):
        for tensor in _divisors(devices // context):
            for expert in _divisors(devices // context // tensor) if experts else [1]:
                for data in _divisors(devices // context // tensor // expert):
                    fsdp = devices // context // tensor // expert // data
                    yield {
                        **{"replica": slices, "data": data, "fsdp": fsdp},
                        **{"context": context, "tensor": tensor, "expert": expert},
                    }


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def as_yaml(candidate: Candidate, base: Config) -> str:
    """The settings as a piece of a config file."""
    settings = candidate.settings(base)
    if not settings["train"]["xla_options"]:
        del settings["train"]["xla_options"]
    return yaml.safe_dump(settings, sort_keys=False, default_flow_style=None, width=120)


def as_flags(candidate: Candidate, base: Config) -> str | None:
    """The settings as flags of the command line; None where these cannot say it: a flag changes the compiler options
    that a config has, but adds none to them and removes none."""
    settings = candidate.settings(base)
    old, new = base.train.xla_options, settings["train"].pop("xla_options")
    if old and old.keys() != new.keys():
        return None
    words = [f"--{section}.{key} {value}" for section, values in settings.items() for key, value in values.items()]
    if old:
        words += [f"--train.xla_options.{name} {value}" for name, value in new.items() if value != old[name]]
    elif new:
        words.append("--train.xla_options " + " ".join(f"{name} {value}" for name, value in new.items()))
    return " ".join(words)
