"""`posttrain plan CONFIG --topology v5p:4x4x4`: will it fit, how long will it take, what will it cost."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from posttrain.config import Config
from posttrain.errors import UserError, UserErrors
from posttrain.plan.chips import GIB, chip_of
from posttrain.plan.predict import KERNEL_SHARE, NOT_MODELLED, Prediction, predict
from posttrain.plan.topology import ENVIRONMENT, check_libtpu, check_topology
from posttrain.train.metrics import table


@dataclass(frozen=True)
class PlanOptions:
    """What to plan for, beside the config."""

    topology: str = ""
    """Chips and how they are connected, of one slice: v5e:4x4, v6e:4x4, v5p:2x2x2, v4:2x2x4, tpu7x:2x2x1."""
    slices: int = 1
    """How many such slices; between them runs mesh.replica."""
    tokens: float | None = None
    """Tokens to train on in all, for hours and cost: those of the data times data.epochs."""
    price: float | None = None
    """Of a chip hour, in any currency."""
    sharding: bool = False
    """Also every parameter: over which axes it is split, and its bytes a device."""
    json: bool = False
    """One JSON object on standard output instead of tables."""


def plan(config: Config, options: PlanOptions) -> None:
    """The command. Needs neither weights nor data nor a TPU: `config.json` is enough."""
    if not options.topology:
        raise UserError("--topology is missing: name the chips to plan for, for instance v5p:2x2x2 or v6e:4x4")
    problems = check_topology(options.topology, options.slices)
    for name in ("tokens", "price"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            problems.append(f"--{name} {value}: must be above 0")
    if options.price is not None and options.tokens is None:
        problems.append("--price: tells the cost of a run only if its length is known; give --tokens too")
    if problems:
        raise UserErrors(problems)
    check_libtpu()
    compiled = compile_in_worker(config, options.topology, options.slices)
    chip = chip_of(compiled["device_kind"])
    if chip is None:
        raise UserError(f"--topology {options.topology}: no published peaks are known for {compiled['device_kind']}")
    found = predict(compiled, chip, tokens=options.tokens, price=options.price)
    if options.json:
        print(json.dumps({**compiled, "chip": chip.name, "prediction": dataclasses.asdict(found)}))
        return
    show(compiled, found, options, chip.device.hbm_bytes)


def compile_in_worker(config: Config, topology: str, slices: int) -> dict[str, Any]:
    """What `worker.compile_plan` says, computed in a process of its own. Raises `UserErrors` with its problems."""
    request = {"config": config.model_dump(mode="json"), "topology": topology, "slices": slices}
    console, started = Console(stderr=True), time.monotonic()
    with console.status(f"compiling the train step for {topology}") as status:
        worker = subprocess.Popen(
            [sys.executable, "-m", "posttrain.plan.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | ENVIRONMENT,
        )
        given: str | None = json.dumps(request)
        while True:
            try:
                answer, _ = worker.communicate(given, timeout=1)
                break
            except subprocess.TimeoutExpired:
                given = None  # it is sent
                status.update(f"compiling the train step for {topology}: {time.monotonic() - started:.0f} s")
            except BaseException:
                worker.kill()
                raise
    if worker.returncode != 0:
        raise UserError(f"--topology {topology}: the compiler failed (exit code {worker.returncode}); see above")
    compiled = json.loads(answer)
    if "problems" in compiled:
        raise UserErrors(compiled["problems"])
    return compiled


def show(plan: dict[str, Any], found: Prediction, options: PlanOptions, room: float) -> None:
    """The tables; `room` is the memory of a device."""
    memory, work = plan["memory"], plan["work"]
    verdict = "fits" if found.fits else "DOES NOT FIT"
    mesh = " x ".join(f"{name} {size}" for name, size in plan["mesh"].items() if size > 1) or "1 device"
    slices = f", {options.slices} slices" if options.slices > 1 else ""
    print(f"{verdict}: {_gib(memory['peak'])} of {_gib(room)} GiB a device on {options.topology}{slices} ({mesh})\n")
    rows = [
        ("step", _range(found.step_seconds, "s")),
        ("tokens/s, all chips", _range(found.tokens_per_second, "")),
        ("MFU", _range(tuple(100 * share for share in found.mfu), "%")),
        ("executed over useful FLOPs", f"{found.executed_over_useful:.3f}"),
        ("chips", f"{found.chips}"),
    ]
    for name, values, unit in (("hours", found.hours, "h"), ("chip hours", found.chip_hours, "h")):
        rows += [] if values is None else [(name, _range(values, unit))]
    rows += [] if found.cost is None else [("cost", _range(found.cost, ""))]
    table("Prediction", ("what", "low to high"), rows)
    print()
    parts = ("params", "optimizer", "batch", "temporaries", "peak", "host")
    names = ("parameters", "optimizer", "batch", "activations, gradients, gathered weights", "peak", "on the host")
    table("Memory", ("what", "GiB a device"), [(n, _gib(memory[p])) for n, p in zip(names, parts, strict=True)])
    print()
    times = [
        ("TensorCore, by XLA's cycles", found.compute_seconds),
        ("of it attention kernels, at peak", found.attention_seconds),
        ("executed matrix products at peak", found.matmul_seconds),
        ("HBM traffic at peak", found.hbm_seconds),
        ("wires at peak", found.wire_seconds),
    ]
    table("Times", ("what", "ms a step"), [(name, f"{1000 * seconds:.1f}") for name, seconds in times])
    print()
    wires = []
    for w in found.wires:
        moved = _gb(w.payload_bytes), _gb(w.wire_bytes), f"{1000 * w.seconds:.1f}"
        wires.append((w.kind, " x ".join(w.axes) or "-", w.network, f"{w.executed:.0f}", *moved))
    table("Collectives", ("kind", "axes", "network", "times", "payload GB", "wire GB", "ms at peak"), wires)
    if options.sharding:
        print()
        lines = []
        for p in plan["sharding"]:
            size, whole = f"{p['bytes'] / 2**20:.2f}", "; ".join(p["kept_whole"])
            lines.append((p["name"], " x ".join(map(str, p["shape"])), _split(p["split"]), size, whole))
        table("Parameters", ("name", "shape", "split over", "MiB a device", "kept whole"), lines)
    print()
    _assumptions(plan, work)


def _assumptions(plan: dict[str, Any], work: dict[str, Any]) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in plan["versions"].items())
    unknown = [loop["op_name"] or loop["name"] for loop in plan["cost"]["loops"] if loop["trips"] is None]
    print(f"Compiled in {plan['compile_seconds']:.0f} s with {versions}; {plan['attention']} attention, ", end="")
    print(f"{plan['compute_dtype']} compute, {plan['accumulation']} accumulation steps,")
    print(
        f"{work['rows']:,} rows, {work['tokens']:,} tokens a step; {work['trained']:,} parameters are trained", end=""
    )
    print(f" of {work['parameters']:,}.")
    print("Low: collectives hidden behind computation, attention kernels at peak. High: one after the other,")
    print(f"attention kernels at {KERNEL_SHARE:.0%} of peak.")
    if unknown:
        print(f"Counted once, since how often they run depends on data: {', '.join(unknown)}. All is a lower bound.")
    print("Not modelled:")
    for line in NOT_MODELLED:
        print(f"  - {line}")


def _gib(count: float) -> str:
    return f"{count / GIB:.2f}"


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f}"


def _range(values: Any, unit: str) -> str:
    low, high = values
    return f"{low:,.4g} to {high:,.4g} {unit}".rstrip()


def _split(entries: list[list[str]]) -> str:
    return ", ".join(" x ".join(entry) or "-" for entry in entries)
