"""From what a compiled step costs to how long it takes and what that costs.

Time of the step, as a range:

- TensorCore time: XLA's own estimate of every instruction in cycles, over the clock. Kernels of attention and of
  experts, which XLA does not see into, are added by their arithmetic: at peak for the low end, at `KERNEL_SHARE` of it
  for the high end. Experts are taken to be equally busy, and an adapter's products with them as large as theirs.
- Time on the wires: every collective's bytes over the chip's published bandwidth. The compiler writes some
  reduce-scatters as an all-reduce of which each device keeps a slice; the low end counts these as a reduce-scatter, the
  high end as what they are written as, twice the bytes.
- Time between device and host (optimizer state and activations that are kept there, and what crosses slices): bytes
  over `HOST_BANDWIDTH`. The low end moves half of them each way at once.
- Low: whichever is the longest, everything else hidden behind it. High: all, one after another.
"""

import dataclasses
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from posttrain.plan.length import RunLength
from posttrain.train.chips import Chip

KERNEL_SHARE = 0.4
"""Of the peak that kernels reach at the pessimistic end."""

PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}
"""Matrix products over all pairs in a call of the splash attention kernels, by what their names contain."""

SLICED = "all-reduce, sliced"

HOST_BANDWIDTH = {"v3": 15e9, "v4": 16e9, "v5e": 15e9, "v5p": 15e9, "v6e": 32e9, "tpu7x": 32e9}
"""Bytes/s between a chip and its host, one way (PCIe), by the name of the chip. "How to scale your model" (Google
DeepMind 2025, jax-ml.github.io/scaling-book/tpus): 16 GB/s for v4, about 15 for the others, 32 for v6e. Nothing is
published for tpu7x: assumed as for v6e."""

ASSUMPTIONS = (
    "low end: of computation, collectives within slices and across them, and transfers to and from the host all hide "
    "behind the longest; kernels at peak; an all-reduce of which a slice is kept is a reduce-scatter; the host's link "
    "moves half each way at once",
    f"high end: one after another, nothing hidden; kernels of attention and experts at {KERNEL_SHARE:.0%} of peak",
    "TensorCore time: XLA's own estimate of every instruction in cycles, over the clock",
    "kernels: by their arithmetic, experts equally busy",
    "collectives: what each device must send over the published bandwidth of all links of its chip, one way",
    "host: bytes over the bandwidth of the link (PCIe), which is published roughly, for tpu7x not at all",
    "peaks are those of bf16 products; useful FLOPs are of full rows with one segment each",
)

CALIBRATION = {
    "run": "MaxText's Llama-2-70B on v5p-128",
    "published_tokens_per_second": 692,
    "published_mfu": 0.654,
    "source": "MaxText's table of results, github.com/AI-Hypercomputer/maxtext",
    "predicted_tokens_per_second": 694,
    "note": "by the TensorCore time of MaxText's own program; no step of posttrain has been run on a TPU",
}
"""The one published figure that this way to read a program was compared with. Tokens/s are of one device."""

NOT_MODELLED = (
    "how full the rows are: tokens are places in rows, real tokens where packing fills them",
    "overlap of collectives with computation, but as the two ends of the range",
    "which links a collective runs over: an axis along one dim of the slice, or a slice too small to wrap around, has "
    "fewer than all",
    "input, checkpoints, evaluation, compilation, a cached reference's pass over the data before the first step, and "
    "steps lost to failures",
    "memory that the runtime keeps for itself, about 0.3 GiB a chip, and whether the host has room for what it keeps",
    "blocks that attention kernels skip because they lie in other segments, and what they spend on the diagonal",
)


@dataclass(frozen=True)
class Wire:
    """Collectives of one kind along the same axes, a device and step."""

    kind: str
    axes: tuple[str, ...]
    network: str
    executed: float
    payload_bytes: float
    wire_bytes: float
    seconds: float


@dataclass(frozen=True)
class Prediction:
    """Of one optimizer step unless it says otherwise."""

    fits: bool
    memory_share: float
    """Of a device's memory."""
    compute_seconds: float
    attention_seconds: float
    """At peak; part of `compute_seconds`."""
    expert_seconds: float
    """Of the experts' kernels, likewise."""
    matmul_seconds: float
    """What the executed matrix products would take at peak, those of kernels included."""
    executed_flops: float
    """Matrix products of a device, those of kernels included."""
    recomputed_flops: float
    """The part of them that rematerialization repeats."""
    useful_flops: float
    """What the model's definition asks of a device."""
    hbm_seconds: float
    host_seconds: float
    """Between device and host, one way after the other."""
    wires: tuple[Wire, ...]
    wire_seconds: float
    step_seconds: tuple[float, float]
    tokens_per_second: tuple[float, float]
    mfu: tuple[float, float]
    executed_over_useful: float
    chips: int
    hours: tuple[float, float] | None = None
    """For as many tokens as asked for."""
    chip_hours: tuple[float, float] | None = None
    cost: tuple[float, float] | None = None
    """At the given price of a chip hour."""
    epoch_hours: tuple[float, float] | None = None
    """Where the data tell how many steps an epoch has."""
    untimed: tuple[str, ...] = ()
    """Custom calls of which neither cycles nor arithmetic are known: no time is counted for them."""


def predict(
    plan: dict[str, Any], chip: Chip, *, tokens: float | None, price: float | None, epoch_steps: int | None = None
) -> Prediction:
    """`plan` is what `worker.compile_plan` gives; `tokens` is how many are trained on in all."""
    device, cost, work, memory = chip.device, plan["cost"], plan["work"], plan["memory"]
    devices = math.prod(plan["mesh"].values())
    calls = devices * plan["num_layers"] * plan["accumulation"]
    kernels = _kernels(cost["kernels"], work["attention_flops"] / calls / 6, work["expert_flops"] / calls)
    at_peak = (kernels.attention + kernels.experts) / device.bf16_flops
    executed = cost["mxu_flops"] + kernels.attention + kernels.experts
    cycles = cost["estimated_cycles"] / device.clock
    wires = tuple(_wires(cost["collectives"], device))
    wire_seconds = math.fsum(wire.seconds for wire in wires)
    host = cost["host_bytes"] / host_bandwidth(chip)
    low = max(cycles + at_peak, *(_least_seconds(wires, network) for network in ("ici", "dcn")), host / 2)
    high = cycles + at_peak / KERNEL_SHARE + wire_seconds + host
    chips = devices // chip.devices_per_chip
    useful = work["model_flops"] / devices

    def times(factor: float | None) -> tuple[float, float] | None:
        return None if factor is None else (factor * low, factor * high)

    hours = None if tokens is None else tokens / work["tokens"] / 3600
    chip_hours = None if hours is None else hours * chips
    return Prediction(
        fits=memory["peak"] <= device.hbm_bytes,
        memory_share=memory["peak"] / device.hbm_bytes,
        compute_seconds=cycles + at_peak,
        attention_seconds=kernels.attention / device.bf16_flops,
        expert_seconds=kernels.experts / device.bf16_flops,
        matmul_seconds=executed / device.bf16_flops,
        executed_flops=executed,
        recomputed_flops=cost["recomputed_flops"] + kernels.recomputed,
        useful_flops=useful,
        hbm_seconds=cost["hbm_bytes"] / device.hbm_bandwidth,
        host_seconds=host,
        wires=wires,
        wire_seconds=wire_seconds,
        step_seconds=(low, high),
        tokens_per_second=(work["tokens"] / high, work["tokens"] / low),
        mfu=(useful / device.bf16_flops / high, useful / device.bf16_flops / low),
        executed_over_useful=executed / useful,
        chips=chips,
        hours=times(hours),
        chip_hours=times(chip_hours),
        cost=times(None if chip_hours is None or price is None else chip_hours * price),
        epoch_hours=times(None if epoch_steps is None else epoch_steps / 3600),
        untimed=tuple(kernels.unknown),
    )


def plan_data(
    plan: dict[str, Any], chip: Chip, found: Prediction, *, topology: str, slices: int, length: RunLength | None
) -> dict[str, Any]:
    """What `plan --json` prints, and the page is drawn from."""
    return {
        **plan,
        "topology": topology,
        "slices": slices,
        "chip": chip.name,
        "prediction": dataclasses.asdict(found),
        "length": None if length is None else dataclasses.asdict(length),
        "assumptions": list(ASSUMPTIONS),
        "not_modelled": [*plan["beside"], *NOT_MODELLED],
        "calibration": CALIBRATION,
    }


def host_bandwidth(chip: Chip) -> float:
    """Bytes/s between one device of the chip and its host, one way."""
    return HOST_BANDWIDTH[chip.name] / chip.devices_per_chip


@dataclass
class _Kernels:
    """FLOPs that kernels execute on a device in a step."""

    attention: float = 0.0
    experts: float = 0.0
    recomputed: float = 0.0
    unknown: list[str] = field(default_factory=list)


def _kernels(found: list[dict[str, Any]], attention: float, expert: float) -> _Kernels:
    """`attention` and `expert` are FLOPs of one product in one call: over all pairs, forward and backward six of them,
    in splash attention; over all rows in the grouped products of megablox, which are named for where they stand:
    `gmm` in a loop over layers, `jvp_jit_gmm__` outside."""
    sums = _Kernels()
    for kernel in found:
        splash = re.search(r"splash_mha_(fwd|dq|dkv)", kernel["name"])
        if splash:
            product = PRODUCTS[splash[1]] * attention
            sums.attention += kernel["executed"] * product
        elif re.search(r"(?<![a-z])t?gmm(?![a-z])", kernel["name"]):
            product = expert
            sums.experts += kernel["executed"] * product
        else:
            sums.unknown.append(kernel["name"])
            continue
        sums.recomputed += kernel["recomputed"] * product
    return sums


def _least_seconds(wires: Iterable[Wire], network: str) -> float:
    """Of the collectives on one network, what is written as twice the bytes that it must be at half of them."""
    return math.fsum(wire.seconds / (2 if wire.kind == SLICED else 1) for wire in wires if wire.network == network)


def _wires(collectives: list[dict[str, Any]], device: Chip) -> list[Wire]:
    """Merged over where in the program they stand; the longest first."""
    merged: dict[tuple[str, tuple[str, ...], str], list[float]] = {}
    for found in collectives:
        kind = SLICED if found["sliced"] else found["kind"]
        sums = merged.setdefault((kind, tuple(found["axes"]), found["network"]), [0.0, 0.0, 0.0])
        for place, name in enumerate(("executed", "payload_bytes", "wire_bytes")):
            sums[place] += found[name]
    bandwidth = {"ici": device.ici_bandwidth, "dcn": device.dcn_bandwidth}
    wires = [
        Wire(kind, axes, network, executed, payload, wire, wire / bandwidth[network])
        for (kind, axes, network), (executed, payload, wire) in merged.items()
    ]
    return sorted(wires, key=lambda wire: -wire.seconds)
