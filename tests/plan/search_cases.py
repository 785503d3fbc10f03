"""A search without a compiler: candidates whose time and memory follow laws that the search is not told."""

import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import Any

from posttrain.config import Config, parse_config
from posttrain.parallel.mesh import resolve_sizes
from posttrain.plan.candidates import Candidate, Facts, Static, as_configured, combinations
from posttrain.plan.compiles import Answer
from posttrain.plan.search import _candidate
from posttrain.train.chips import CHIPS

LAYERS, WIDTH, MLP, VOCABULARY, LENGTH = 32, 4096, 14336, 32768, 4096
PARAMETERS = LAYERS * (2 * WIDTH * (WIDTH + 1024) + 3 * WIDTH * MLP) + 2 * VOCABULARY * WIDTH
FLOPS = 6.0 * (PARAMETERS - VOCABULARY * WIDTH)
CHIP = CHIPS["v5p"]
LINK = 15e9
"""Bytes/s to the host."""


def config(**sections: dict[str, Any]) -> Config:
    raw: dict[str, Any] = {
        "model": {"path": "model", "remat": "full"},
        "data": {"train": [{"path": "none.jsonl"}], "row_length": LENGTH, "max_length": LENGTH},
        "train": {"global_batch_size": 16},
    }
    return parse_config({name: {**raw.get(name, {}), **sections.get(name, {})} for name in {*raw, *sections}}, "test")


def facts(devices: int) -> Facts:
    return Facts(
        device_kind="TPU v5p",
        devices=devices,
        slices=1,
        layers=LAYERS,
        width=WIDTH,
        heads_width=WIDTH,
        kv_width=1024,
        mlp_width=MLP,
        row_length=LENGTH,
        compute_bytes=2,
        flops_per_token=FLOPS,
        parameters=PARAMETERS,
        trained=PARAMETERS,
        fingerprint="model",
    )


def examined(base: Config, devices: int, per_device: list[int]) -> dict[str, Any]:
    """What the process of `static.py` would say: no context, eight key/value heads."""
    own = as_configured(base, resolve_sizes(base.mesh, devices))
    batches = [rows * devices for rows in per_device] or [base.train.global_batch_size]
    found = []
    for candidate in combinations(base, devices=devices, slices=1, batches=batches, experts=False):
        sizes = candidate.sizes
        if sizes["context"] > 1:
            found.append(Static(candidate, ("context is not served",)))
        elif 8 % sizes["tensor"]:
            found.append(Static(candidate, ("8 kv_heads over tensor 16",)))
        else:
            params = 4 * PARAMETERS // (sizes["fsdp"] * sizes["tensor"])
            found.append(Static(candidate, (), params, 2 * params, 1000))
    return {
        "facts": dataclasses.asdict(facts(devices)),
        "candidates": [dataclasses.asdict(one) for one in found],
        "own": dataclasses.asdict(own),
    }


def possible(compiler: "Compiler", rows: tuple[int, ...] = ()) -> list[Candidate]:
    """Candidates that a run would not refuse."""
    told = examined(compiler.base, compiler.devices, list(rows))["candidates"]
    return [_candidate(one["candidate"]) for one in told if not one["problems"]]


def true_bytes(candidate: Candidate) -> float:
    """Of a device at the step's peak."""
    sizes = candidate.sizes
    state = 12 * PARAMETERS / (sizes["fsdp"] * sizes["tensor"])
    tokens = candidate.micro * LENGTH / candidate.shards
    kept = {"offload": 0.1, "full": 1.0, "dots": 12.0, "minimal": 14.0, "none": 31.0}[candidate.remat] * WIDTH
    gradients = (2 + 4 * (candidate.rows > candidate.micro)) * PARAMETERS / (sizes["fsdp"] * sizes["tensor"])
    return state + gradients + 2.2 * LAYERS * tokens * (WIDTH + (kept - WIDTH) / sizes["tensor"]) + 1.5e9


def true_seconds(candidate: Candidate) -> tuple[float, float, float]:
    """Of the TensorCore, on the wires, and on the link to the host, with some per cent that no law tells. `offload`
    would be the fastest if the host were near: attention is not computed again."""
    sizes, steps = candidate.sizes, candidate.rows // candidate.micro
    tokens = candidate.rows * LENGTH
    executed = tokens * FLOPS / math.prod(candidate.mesh)
    executed *= {"offload": 1.01, "full": 1.31, "dots": 1.06, "minimal": 1.05, "none": 1.08}[candidate.remat]
    chance = 1 + 0.02 * (zlib.crc32(candidate.text.encode()) / 2**31 - 1)
    ring = 1.18 if candidate.collective_matmul and sizes["fsdp"] * sizes["tensor"] > 1 else 1.0
    core = executed / CHIP.bf16_flops / 0.8 * (1 + 0.07 * math.log2(sizes["tensor"])) * ring * chance
    gathered = 6 * PARAMETERS / sizes["tensor"] * (1 - 1 / sizes["fsdp"]) * steps
    whole = 4 * PARAMETERS / sizes["tensor"] / sizes["fsdp"] * (1 - 1 / sizes["data"]) * steps
    activations = 12 * LAYERS * tokens / candidate.shards * WIDTH * 2 * (1 - 1 / sizes["tensor"])
    kept = 4.2 * LAYERS * tokens / candidate.shards * WIDTH * (1 + 1 / sizes["tensor"])
    host = kept / LINK if candidate.remat == "offload" else 0.0
    return core, 1.1 * (gathered + whole + activations) / CHIP.ici_bandwidth, host


def plan_of(candidate: Candidate) -> dict[str, Any]:
    """What `worker.compile_plan` would say."""
    core, wires, host = true_seconds(candidate)
    tokens, peak = candidate.rows * LENGTH, int(true_bytes(candidate))
    params = 4 * PARAMETERS // (candidate.sizes["fsdp"] * candidate.sizes["tensor"])
    rest = (peak - 3 * params - 10_000_000) // 4 * 4
    sent = wires * CHIP.ici_bandwidth
    collective = {"kind": "all-gather", "axes": ["fsdp"], "network": "ici", "sliced": False}
    return {
        "device_kind": "TPU v5p",
        "mesh": candidate.sizes,
        "num_layers": LAYERS,
        "attention": "splash",
        "compute_dtype": "bfloat16",
        "accumulation": candidate.rows // candidate.micro,
        "memory": {
            **{"params": params, "reference": 0, "optimizer": 2 * params, "batch": 1000, "host": 0},
            **{"temporaries": rest, "activations": rest // 2, "gradients": rest // 4, "other": rest - 3 * (rest // 4)},
            **{"results": 100, "peak": peak},
        },
        "work": {
            **{"rows": candidate.rows, "tokens": tokens, "parameters": PARAMETERS, "trained": PARAMETERS},
            **{"model_flops": tokens * FLOPS, "attention_flops": 0.0, "expert_flops": 0.0},
        },
        "cost": {
            **{"mxu_flops": 1.1 * tokens * FLOPS / math.prod(candidate.mesh), "recomputed_flops": 0.0},
            **{"hbm_bytes": 5e11, "estimated_cycles": core * CHIP.clock, "host_bytes": host * LINK},
            **{"kernels": [], "loops": []},
            "collectives": [{**collective, "executed": 64.0, "payload_bytes": sent, "wire_bytes": sent}],
        },
        "sharding": [
            {
                **{"name": "layers/mlp/up", "shape": [LAYERS, WIDTH, MLP], "dtype": "float32", "kept_whole": []},
                **{"split": [[], ["fsdp"], ["tensor"]], "bytes": 4 * LAYERS * WIDTH * MLP // 8},
            }
        ],
        "beside": [],
        "compile_seconds": 100.0,
        "versions": {"jax": "0.10.2", "libtpu": "0.0.42.1"},
    }


class Compiler:
    """In place of `compiles.Compilation`: answers at the second look, and keeps what it was asked."""

    def __init__(self, base: Config, devices: int, *, fails: Callable[[Candidate], str | None] = lambda _: None):
        self.base, self.devices, self.fails = base, devices, fails
        self.asked: list[Candidate] = []
        self.stopped = 0

    def __call__(self, request: dict[str, Any], module: str = "posttrain.plan.worker") -> "_Compilation":
        if module == "posttrain.plan.static":
            told = examined(self.base, self.devices, request["rows_per_device"])
            return _Compilation(self, Answer(told, seconds=1.0))
        asked = parse_config(request["config"], "request")
        found = as_configured(asked, resolve_sizes(asked.mesh, self.devices))
        self.asked.append(found)
        problem = self.fails(found)
        if problem is not None:
            return _Compilation(self, Answer(None, problem, seconds=100.0))
        if true_bytes(found) > 1.5 * CHIP.hbm_bytes:
            needs = true_bytes(found) / 2**30
            text = f"RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used {needs:.2f}G of 95.00G hbm."
            return _Compilation(self, Answer(None, text, too_large=True, seconds=20.0))
        return _Compilation(self, Answer(plan_of(found), seconds=100.0))


class _Compilation:
    def __init__(self, compiler: Compiler, answer: Answer):
        self._compiler, self._answer, self._looks = compiler, answer, 0

    def poll(self) -> Answer | None:
        self._looks += 1
        return self._answer if self._looks > 1 else None

    def stop(self) -> None:
        self._compiler.stopped += 1
