"""From what a compiled step costs to how long it takes and what that costs.

Time of the step, as a range:

- TensorCore time: XLA's own estimate of every instruction in cycles, over the clock. Kernels of attention and of
  experts, which XLA does not see into, are added by their arithmetic: at peak for the low end, at `KERNEL_SHARE` of it
  for the high end. Experts are taken to be equally busy, and an adapter's products with them as large as theirs.
- Time on the wires: every collective's bytes over the chip's published bandwidth. The compiler writes some
  reduce-scatters as an all-reduce of which each device keeps a slice; the low end counts these as a reduce-scatter, the
  high end as what they are written as, twice the bytes.
- Low: whichever is longer, everything else hidden behind it. High: both, one after another.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

from posttrain.train.chips import Chip

KERNEL_SHARE = 0.4
"""Of the peak that kernels reach at the pessimistic end."""

PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}
"""Matrix products over all pairs in a call of the splash attention kernels, by what their names contain."""

SLICED = "all-reduce, sliced"

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
    "input, checkpoints, evaluation, compilation, and steps lost to failures",
    "memory that the runtime keeps for itself, about 0.3 GiB a chip",
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
    hbm_seconds: float
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


def predict(plan: dict[str, Any], chip: Chip, *, tokens: float | None, price: float | None) -> Prediction:
    """`plan` is what `worker.compile_plan` gives; `tokens` is how many are trained on in all."""
    device, cost, work, memory = chip.device, plan["cost"], plan["work"], plan["memory"]
    devices = math.prod(plan["mesh"].values())
    calls = plan["num_layers"] * plan["accumulation"]
    attention = _attention_flops(cost["kernels"], work["attention_flops"] / devices / calls)
    experts = _expert_flops(cost["kernels"], work["expert_flops"] / devices / calls)
    kernels = attention + experts
    at_peak = kernels / device.bf16_flops
    cycles = cost["estimated_cycles"] / device.clock
    wires = tuple(_wires(cost["collectives"], device))
    wire_seconds = math.fsum(wire.seconds for wire in wires)
    scattered = math.fsum(wire.seconds / 2 for wire in wires if wire.kind == SLICED)
    low = max(cycles + at_peak, wire_seconds - scattered)
    high = cycles + at_peak / KERNEL_SHARE + wire_seconds
    chips = devices // chip.devices_per_chip
    useful = work["model_flops"] / devices
    hours = None if tokens is None else tuple(tokens / work["tokens"] * t / 3600 for t in (low, high))
    chip_hours = None if hours is None else (hours[0] * chips, hours[1] * chips)
    return Prediction(
        fits=memory["peak"] <= device.hbm_bytes,
        memory_share=memory["peak"] / device.hbm_bytes,
        compute_seconds=cycles + at_peak,
        attention_seconds=attention / device.bf16_flops,
        expert_seconds=experts / device.bf16_flops,
        matmul_seconds=(cost["mxu_flops"] + kernels) / device.bf16_flops,
        hbm_seconds=cost["hbm_bytes"] / device.hbm_bandwidth,
        wires=wires,
        wire_seconds=wire_seconds,
        step_seconds=(low, high),
        tokens_per_second=(work["tokens"] / high, work["tokens"] / low),
        mfu=(useful / device.bf16_flops / high, useful / device.bf16_flops / low),
        executed_over_useful=(cost["mxu_flops"] + kernels) / useful,
        chips=chips,
        hours=None if hours is None else (hours[0], hours[1]),
        chip_hours=chip_hours,
        cost=None if chip_hours is None or price is None else (chip_hours[0] * price, chip_hours[1] * price),
    )


def _expert_flops(kernels: list[dict[str, Any]], product: float) -> float:
    """What the grouped products of megablox execute; `product` is one of a layer and accumulation step."""
    return math.fsum(kernel["executed"] * product for kernel in kernels if kernel["name"] in ("gmm", "tgmm"))


def _attention_flops(kernels: list[dict[str, Any]], attention_flops: float) -> float:
    """What the attention kernels execute on a device in a step.

    `attention_flops`, of one layer and accumulation step, forward and backward, are six products over all pairs.
    """
    product = attention_flops / 6
    executed = 0.0
    for kernel in kernels:
        found = re.search(r"splash_mha_(fwd|dq|dkv)", kernel["name"])
        if found:
            executed += kernel["executed"] * PRODUCTS[found[1]] * product
    return executed


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
