"""A plan as tables on standard output; `command.py` says which."""

from collections.abc import Iterable, Sequence
from typing import Any

from posttrain.plan.candidates import mesh_text
from posttrain.plan.length import RunLength
from posttrain.plan.predict import Prediction
from posttrain.train.chips import GIB
from posttrain.train.metrics import table

MEMORY = {
    "params": "parameters",
    "reference": "the reference's parameters",
    "optimizer": "optimizer",
    "batch": "batch",
    "activations": "activations kept for the backward pass",
    "gradients": "gradients",
    "other": "other temporaries: weights cast or gathered, within layers, logits, gaps",
    "temporaries": "temporaries together",
    "results": "outputs that alias nothing",
    "peak": "peak",
    "host": "on the host",
}
"""What a plan's `memory` holds, by key."""


def show(
    plan: dict[str, Any], found: Prediction, title: str, room: float, *, length: RunLength | None, missing: str
) -> None:
    """Of chips. `plan` is `predict.plan_data`, `room` the memory of a device; `missing` says why the run's length is
    not known from its data."""
    memory = plan["memory"]
    verdict = "fits" if found.fits else "DOES NOT FIT"
    print(f"{verdict}: {_gib(memory['peak'])} of {_gib(room)} GiB a device on {title} ({mesh_text(plan['mesh'])})\n")
    rows = [
        ("step", ends(found.step_seconds, "s")),
        ("tokens/s, all chips", ends(found.tokens_per_second)),
        ("MFU", ends([100 * share for share in found.mfu], "%")),
        ("chips", f"{found.chips}"),
        *_duration(found),
    ]
    table("Prediction", ("what", "low to high"), rows)
    print()
    parts = [(name, _gib(memory[key])) for key, name in _told(memory)]
    table("Memory", ("what", "GiB a device"), parts)
    print()
    table("Work", ("what", "a device and step"), work_rows(plan))
    print()
    times = [
        ("TensorCore, by XLA's cycles", found.compute_seconds),
        ("of it attention kernels, at peak", found.attention_seconds),
        *([("of it experts' kernels, at peak", found.expert_seconds)] if found.expert_seconds else []),
        ("executed matrix products at peak", found.matmul_seconds),
        ("HBM traffic at peak", found.hbm_seconds),
        ("wires at peak", found.wire_seconds),
        *([("to and from the host, one after the other", found.host_seconds)] if found.host_seconds else []),
    ]
    table("Times", ("what", "ms a step"), [(name, f"{1000 * seconds:.1f}") for name, seconds in times])
    print()
    wires = []
    for w in found.wires:
        moved = _gb(w.payload_bytes), _gb(w.wire_bytes), f"{1000 * w.seconds:.1f}"
        wires.append((w.kind, " x ".join(w.axes) or "-", w.network, f"{w.executed:.0f}", *moved))
    table("Collectives", ("kind", "axes", "network", "times", "payload GB", "wire GB", "ms at peak"), wires)
    print()
    if missing:
        print(f"Hours of the run need its data, or --tokens: {missing}")
    if length is not None:
        print(f"The data make {length.steps:,} steps, {length.epoch_steps:,} in an epoch of ", end="")
        print(f"{length.epoch_tokens:,} tokens, which fill {length.filled:.1%} of its rows.")
    _compiled(plan)
    print(f"Calibration: {calibration_text(plan['calibration'])}.")
    _list("Custom calls that no time is counted for, since nothing tells it:", found.untimed)
    _list("Assumed:", plan["assumptions"])
    _list("Not modelled:", plan["not_modelled"])


def show_local(plan: dict[str, Any]) -> None:
    """Of the devices that are here."""
    memory, work, cost, local = plan["memory"], plan["work"], plan["cost"], plan["local"]
    here, everywhere = local["here"], local["devices"]
    more = f" of {everywhere}" if everywhere > here else ""
    print(f"The devices that are here: {here}{more} {plan['device_kind']} ({mesh_text(plan['mesh'])})\n")
    rows = [(name, _gib(memory[key]), _gib(here * memory[key])) for key, name in _told(memory)]
    table("Memory", ("what", "GiB a device", f"GiB, all {here} here"), rows)
    step = _gib(here * (memory["temporaries"] + memory["results"]))
    print(f"\nA step takes {step} GiB for itself: temporaries and outputs that alias nothing, of all devices here.\n")
    executed = everywhere * cost["mxu_flops"]
    figures = [
        ("executed", f"{executed / 1e12:,.4g}"),
        ("of it recomputed", f"{everywhere * cost['recomputed_flops'] / 1e12:,.4g}"),
        ("useful", f"{work['model_flops'] / 1e12:,.4g}"),
    ]
    table("Matrix products of a step", ("what", "TFLOP, all devices"), figures)
    print()
    table("Collectives", ("kind", "axes", "times", "payload GB", "wire GB"), _collectives(cost["collectives"]))
    print()
    _compiled(plan)
    if plan["cost"]["kernels"]:
        print("Matrix products inside kernels are not counted as executed.")
    _list("Not modelled:", plan["beside"])
    print("The time of a step is not predicted: that needs chips with published peaks, named with --topology.")
    if local["peak_flops"]:
        print(f"At {local['peak_source']},")
        print(f"the executed products alone take {executed / local['peak_flops']:.3g} s.")


def show_sharding(plan: dict[str, Any]) -> None:
    """Every parameter, and how it is split."""
    print()
    lines = []
    for p in plan["sharding"]:
        size, whole = f"{p['bytes'] / 2**20:.2f}", "; ".join(p["kept_whole"])
        lines.append((p["name"], " x ".join(map(str, p["shape"])), _split(p["split"]), size, whole))
    table("Parameters", ("name", "shape", "split over", "MiB a device", "kept whole"), lines)


def _told(memory: dict[str, Any]) -> list[tuple[str, str]]:
    """Keys and names of what is to be shown: nothing that is unknown, nor a sum beside its parts, nor zeros."""
    split = memory["activations"] is not None
    hidden = {"temporaries"} if split else {"activations", "gradients", "other"}
    hidden |= {key for key in ("reference", "host", "results") if not memory[key]}
    return [(key, name) for key, name in MEMORY.items() if key not in hidden]


def work_rows(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """Of a device and step: what it computes and moves."""
    found, cost = plan["prediction"], plan["cost"]
    rows = [
        ("matrix products, executed", f"{found['executed_flops'] / 1e12:,.4g} TFLOP"),
        ("of them recomputed", f"{found['recomputed_flops'] / 1e12:,.4g} TFLOP"),
        ("useful", f"{found['useful_flops'] / 1e12:,.4g} TFLOP"),
        ("executed over useful", f"{found['executed_over_useful']:.3f}"),
        ("read from and written to HBM", f"{_gb(cost['hbm_bytes'])} GB"),
    ]
    return rows + ([("to and from the host", f"{_gb(cost['host_bytes'])} GB")] if cost["host_bytes"] else [])


def _duration(found: Prediction) -> list[tuple[str, str]]:
    told = (
        ("hours an epoch", found.epoch_hours, "h"),
        ("hours", found.hours, "h"),
        ("chip hours", found.chip_hours, "h"),
        ("cost", found.cost, ""),
    )
    return [(name, ends(values, unit)) for name, values, unit in told if values is not None]


def _collectives(found: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """One row by kind and axes, the most on the wire first."""
    sums: dict[tuple[str, str], list[float]] = {}
    for one in found:
        counts = sums.setdefault((one["kind"], " x ".join(one["axes"]) or "-"), [0.0, 0.0, 0.0])
        for place, key in enumerate(("executed", "payload_bytes", "wire_bytes")):
            counts[place] += one[key]
    ordered = sorted(sums.items(), key=lambda item: -item[1][2])
    return [(*key, f"{times:.0f}", _gb(payload), _gb(wire)) for key, (times, payload, wire) in ordered]


def _compiled(plan: dict[str, Any]) -> None:
    work = plan["work"]
    versions = ", ".join(f"{name} {version}" for name, version in plan["versions"].items())
    unknown = [loop["op_name"] or loop["name"] for loop in plan["cost"]["loops"] if loop["trips"] is None]
    print(f"Compiled in {plan['compile_seconds']:.0f} s with {versions}; {plan['attention']} attention, ", end="")
    print(f"{plan['compute_dtype']} compute, {plan['accumulation']} accumulation steps,")
    print(f"{work['rows']:,} rows, {work['tokens']:,} tokens a step; ", end="")
    print(f"{work['trained']:,} parameters are trained of {work['parameters']:,}.")
    _list("Counted once, since how often they run depends on data, so that all is a lower bound:", unknown)


def _list(title: str, lines: Iterable[str]) -> None:
    """Nothing where there are none."""
    found = list(dict.fromkeys(lines))
    if found:
        print("\n".join([title, *(f"  - {line}" for line in found)]))


def calibration_text(found: dict[str, Any]) -> str:
    """One sentence, without its full stop."""
    return (
        f"{found['run']} is published with {found['published_tokens_per_second']} tokens/s a device "
        f"({found['published_mfu']:.1%} MFU; {found['source']}); this way of reading a program gives "
        f"{found['predicted_tokens_per_second']}, {found['note']}"
    )


def _gib(count: int | float) -> str:
    return f"{count / GIB:.2f}"


def _gb(count: int | float) -> str:
    return f"{count / 1e9:.2f}"


def ends(values: Sequence[float], unit: str = "") -> str:
    """Both ends of a range."""
    low, high = (f"{value:,.4g}" if value < 10_000 else f"{value:,.0f}" for value in values)
    return f"{low} to {high} {unit}".rstrip()


def _split(entries: list[list[str]]) -> str:
    return ", ".join(" x ".join(entry) or "-" for entry in entries)
