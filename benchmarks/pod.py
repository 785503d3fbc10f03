"""What runs would take on TPU pods, by the compiler: the tables and the plot of docs/pod-scale.md.

    python benchmarks/pod.py [--only NAME ...] [--jobs 1] [--docs docs]

Compiles the train step of every case below with libtpu (`posttrain plan` does the same for one), a few minutes each;
answers are kept and found again, so an interrupted run goes on where it stopped. Then it writes `pod-scale.json`, puts
the tables between the marks of `pod-scale.md`, and draws `growth.svg`. Figures are of one device and one step.
Cases that fail are left out of the tables, and named at the end.
"""

import argparse
import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from posttrain.config import Config, parse_config
from posttrain.plan.candidates import mesh_text
from posttrain.plan.compiles import Answer, Compilation, keep_answer, key_of, read_answer, request_of
from posttrain.plan.markup import Markup, tag
from posttrain.plan.predict import predict
from posttrain.train.chips import GIB, chip_of

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "configs/pod/models"


@dataclass(frozen=True)
class Case:
    """One row of a table: configs/pod/sft.yaml for these chips, but for `overrides`."""

    name: str
    topology: str
    table: str
    rows_per_device: float = 1
    slices: int = 1
    model: str = "llama-3.1-8b"
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def devices(self) -> int:
        """As many as the topology's chips: on all chips used here a device is a chip."""
        shape = self.topology.split(":")[1]
        count = self.slices
        for side in shape.split("x"):
            count *= int(side)
        return count


DOTS = {"model": {"remat": "dots"}}
PREFERENCE = {
    "objective": {"name": "sigmoid", "beta": 0.1},
    "reference": {"logps": "cached"},
    "data": {"row_length": 4096, "max_length": 2048},
}
CASES = (
    Case("sft-v5p-16", "v5p:2x2x2", "sft"),
    Case("sft-v5p-16-dots", "v5p:2x2x2", "sft", overrides=DOTS),
    Case("sft-v5p-16-dots-b4", "v5p:2x2x2", "sft", rows_per_device=4, overrides=DOTS),
    Case("sft-v6e-16", "v6e:4x4", "sft"),
    Case("sft-v5e-16", "v5e:4x4", "sft"),
    Case("sft-70b-v5p-128", "v5p:4x4x4", "sft", rows_per_device=2, model="llama-2-70b"),
    Case("dpo-v5p-16", "v5p:2x2x2", "others", overrides=PREFERENCE),
    Case(
        "reward-v5p-16",
        "v5p:2x2x2",
        "others",
        overrides={**PREFERENCE, "objective": {"name": "reward"}, "reference": {}},
    ),
    Case("lora-v5e-8", "v5e:2x4", "others", overrides={"model": {"lora": {"r": 16}}}),
    Case(
        "moe-v5p-32",
        "v5p:2x2x4",
        "others",
        model="qwen3-30b-a3b",
        overrides={"mesh": {"fsdp": -1, "expert": 4}},
    ),
    Case("moe-v5p-32-fsdp", "v5p:2x2x4", "others", model="qwen3-30b-a3b"),
    Case(
        "context-128k-v5p-128",
        "v5p:4x4x4",
        "others",
        rows_per_device=1 / 16,
        overrides={
            "mesh": {"fsdp": 4, "context": 16},
            "data": {"row_length": 131072, "max_length": 131072},
        },
    ),
    Case("growth-16", "v5p:2x2x4", "growth"),
    Case("growth-64", "v5p:4x4x4", "growth"),
    Case("growth-256", "v5p:4x8x8", "growth"),
    Case("growth-1024", "v5p:8x8x16", "growth"),
    Case("growth-2x256", "v5p:4x8x8", "growth", slices=2, overrides={"mesh": {"replica": 2, "fsdp": -1}}),
)


def config_of(case: Case) -> Config:
    """The config of a case, as `posttrain plan configs/pod/sft.yaml` with flags would have it."""
    raw = yaml.safe_load((ROOT / "configs/pod/sft.yaml").read_text())
    rows = round(case.rows_per_device * case.devices)
    train = {"global_batch_size": rows} | ({"micro_batch_size": rows} if case.rows_per_device > 1 else {})
    own = {"model": {"path": str(MODELS / case.model)}, "train": train}
    for sections in (own, case.overrides):
        for name, values in sections.items():
            replaced = name in ("objective", "mesh")
            raw[name] = dict(values) if replaced else {**raw.get(name, {}), **values}
    return parse_config(raw, case.name)


def compile_all(cases: Sequence[Case], jobs: int) -> dict[str, Answer]:
    """What the compiler says of every case, by name."""
    answers: dict[str, Answer] = {}
    waiting, running = list(cases), dict[str, tuple[str, Compilation]]()
    console, started = Console(stderr=True), time.monotonic()
    try:
        with console.status("") as status:
            while waiting or running:
                while waiting and len(running) < jobs:
                    case = waiting.pop(0)
                    request = request_of(config_of(case), case.topology, case.slices)
                    shapes = (MODELS / case.model / "config.json").read_bytes()
                    key = key_of(request, hashlib.sha256(shapes).hexdigest())
                    kept = read_answer(key)
                    if kept is None:
                        running[case.name] = key, Compilation(request)
                    else:
                        answers[case.name] = kept
                for name, (key, compilation) in list(running.items()):
                    answer = compilation.poll()
                    if answer is not None:
                        del running[name]
                        answers[name] = answer
                        if answer.final:
                            keep_answer(key, answer)
                        console.print(f"{name}: {answer.problem or 'compiled'}, {answer.seconds:.0f} s")
                done = f"{len(answers)} of {len(cases)}, {time.monotonic() - started:.0f} s"
                status.update(f"{', '.join(running)}: {done}")
                time.sleep(0.5 if running else 0)
    finally:
        for _, compilation in running.values():
            compilation.stop()
    return answers


def figures(case: Case, plan: dict[str, Any]) -> dict[str, Any]:
    """What the tables show of a compiled case."""
    chip = chip_of(plan["device_kind"])
    assert chip is not None
    found, memory = predict(plan, chip, tokens=None, price=None), plan["memory"]
    useful = plan["work"]["model_flops"] / case.devices
    return {
        "name": case.name,
        "model": case.model,
        "topology": case.topology,
        "slices": case.slices,
        "chips": found.chips,
        "mesh": mesh_text(plan["mesh"]),
        "remat": config_of(case).model.remat,
        "rows": plan["work"]["rows"],
        "row_length": plan["work"]["tokens"] // plan["work"]["rows"],
        "gib": memory["peak"] / GIB,
        "room_gib": chip.device.hbm_bytes / GIB,
        "fits": found.fits,
        "compute_seconds": found.compute_seconds,
        "attention_seconds": found.attention_seconds,
        "bound_mfu": useful / (found.compute_seconds * chip.device.bf16_flops),
        "recompute": found.executed_over_useful,
        "wire_gb": sum(wire.wire_bytes for wire in found.wires if wire.network == "ici") / 1e9,
        "dcn_gb": sum(wire.wire_bytes for wire in found.wires if wire.network == "dcn") / 1e9,
        "wire_seconds": found.wire_seconds,
        "wires": [
            {"kind": wire.kind, "axes": " x ".join(wire.axes), "network": wire.network, "gb": wire.wire_bytes / 1e9}
            for wire in found.wires
        ],
        "parts_gib": {name: memory[name] / GIB for name in ("params", "optimizer", "temporaries")},
        "step_seconds": list(found.step_seconds),
        "tokens_per_second_chip": [rate / found.chips for rate in found.tokens_per_second],
        "compile_seconds": plan["compile_seconds"],
    }


COLUMNS = {
    "run": lambda f: f["name"],
    "mesh": lambda f: f["mesh"],
    "remat": lambda f: f["remat"],
    "rows x tokens": lambda f: f"{f['rows']} x {f['row_length']}",
    "GiB of": lambda f: f"{f['gib']:.2f} of {f['room_gib']:.0f}",
    "compute s": lambda f: f"{f['compute_seconds']:.3f}",
    "model FLOPs / (compute s x peak)": lambda f: f"{f['bound_mfu']:.3f}",
    "executed / useful": lambda f: f"{f['recompute']:.2f}",
    "wire GB": lambda f: f"{f['wire_gb']:.1f}" + (f" + {f['dcn_gb']:.1f} DCN" if f["dcn_gb"] else ""),
    "wire s at peak": lambda f: f"{f['wire_seconds']:.3f}",
    "tokens/s a chip": lambda f: " to ".join(f"{rate:,.0f}" for rate in f["tokens_per_second_chip"]),
}


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    """In Markdown."""
    lines = [" | ".join(COLUMNS), " | ".join("-" for _ in COLUMNS)]
    lines += [" | ".join(show(row) for show in COLUMNS.values()) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def growth_plot(rows: Sequence[dict[str, Any]]) -> Markup:
    """Compute time, wire time and memory of a device, by the number of chips: bars side by side."""
    kinds = (
        ("compute", "s", "#3b6fb5", lambda f: f["compute_seconds"]),
        ("wires, at peak", "s", "#c2702c", lambda f: f["wire_seconds"]),
        ("memory", "GiB", "#4d8a57", lambda f: f["gib"]),
    )
    panel, height, pieces = 230, 210, [Markup("<title>What grows with the number of chips</title>")]
    for number, (title, unit, colour, value) in enumerate(kinds):
        left, most = number * panel + 12, max(value(row) for row in rows)
        pieces.append(tag("text", f"{title}, {unit} a step" if unit == "s" else f"{title}, {unit}", x=left, y=18))
        step = (panel - 24) / len(rows)
        for place, row in enumerate(rows):
            tall = 140 * value(row) / most
            x = left + place * step
            pieces.append(tag("rect", x=x, y=180 - tall, width=step - 8, height=tall, fill=colour))
            middle = x + (step - 8) / 2
            pieces.append(tag("text", f"{value(row):.3g}", x=middle, y=174 - tall, text_anchor="middle"))
            label = f"{row['slices']} x {row['chips'] // row['slices']}" if row["slices"] > 1 else str(row["chips"])
            pieces.append(tag("text", label, x=middle, y=197, text_anchor="middle"))
    size = {"width": panel * len(kinds), "height": height, "viewBox": f"0 0 {panel * len(kinds)} {height}"}
    style = {"font_family": "sans-serif", "font_size": 11, "fill": "#333", "xmlns": "http://www.w3.org/2000/svg"}
    background = tag("rect", width="100%", height="100%", fill="#fff")
    return tag("svg", pieces[0], background, *pieces[1:], **size, **style)


def write(docs: Path, rows: Sequence[dict[str, Any]], versions: Mapping[str, str]) -> None:
    """The three files."""
    docs.mkdir(exist_ok=True)
    (docs / "pod-scale.json").write_text(json.dumps({"versions": versions, "runs": rows}, indent=1) + "\n")
    page, tables = docs / "pod-scale.md", {case.name: case.table for case in CASES}
    text = page.read_text()
    for name in dict.fromkeys(tables.values()):
        own = [row for row in rows if tables[row["name"]] == name]
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if pattern.search(text) is None:
            raise SystemExit(f"{page}: the marks {begin} and {end} are missing")
        text = pattern.sub(lambda _, own=own, b=begin, e=end: f"{b}\n\n{as_table(own)}\n\n{e}", text)
        if name == "growth" and own:
            (docs / "growth.svg").write_text(growth_plot(own) + "\n")
    page.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [case.name for case in CASES]
    only = "cases by name; nothing is written, their table is printed"
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"{only} ({', '.join(names)})")
    parser.add_argument("--jobs", type=int, default=1, help="compilations at once, about 3 GiB each")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    options = parser.parse_args()
    cases = [case for case in CASES if options.only is None or case.name in options.only]
    answers = compile_all(cases, options.jobs)
    failed = [f"{case.name}: {answers[case.name].problem}" for case in cases if answers[case.name].plan is None]
    plans = {case.name: plan for case in cases if (plan := answers[case.name].plan) is not None}
    rows = [figures(case, plans[case.name]) for case in cases if case.name in plans]
    if options.only is None and plans:
        write(options.docs, rows, next(iter(plans.values()))["versions"])
    print(as_table(rows))
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
