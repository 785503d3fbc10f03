"""A guess of what a candidate takes before it is compiled, corrected by those that are: in which order to search.

The guess is arithmetic: products at peak, collectives and transfers to the host over published bandwidth, what the
backward pass needs kept. It is some tens of percent off, mostly by the same factor for candidates that are alike. So
the logarithm of truth over guess is fitted by a linear model of what the candidates set (Bayesian, normal prior and
noise; Bishop 2006, section 3.3), which also says how unsure it is. Guesses order the search and end it; they are never
shown as predictions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from posttrain.parallel.sharding import MESH_AXES
from posttrain.plan.candidates import KEPT, Candidate, Facts, Static
from posttrain.plan.predict import host_bandwidth
from posttrain.train.chips import Chip

RECOMPUTED = {"full": 1.0, "offload": 1.0, "dots": 0.7, "minimal": 0.7, "none": 0.8}
"""What a policy costs, in forward passes: what is computed again, or written and read instead. Llama-3.1-8B on v5p
takes 6 % less with `dots` than with `full`. Unknown policies count as `full`."""
PRIOR_COMMON, PRIOR, NOISE = 0.5, 0.12, 0.02
"""Standard deviations of logarithms: of what all candidates share, of each setting's part, of what no setting tells."""


def guess_seconds(static: Static, facts: Facts, chip: Chip) -> float:
    """Of a step per token of the global batch: the middle between all overlapped and nothing overlapped."""
    candidate = static.candidate
    device, sizes = chip.device, candidate.sizes
    tokens = candidate.rows * facts.row_length
    compute = tokens * facts.flops_per_token * (1 + RECOMPUTED.get(candidate.remat, 1.0) / 3) / facts.devices
    wire = _ici_bytes(candidate, facts) / device.ici_bandwidth
    across = 2 * (1 - 1 / sizes["replica"]) * _gradient_bytes(candidate, facts) / _weight_shards(candidate)
    wire += _accumulations(candidate) * across / device.dcn_bandwidth
    busy, host = compute / device.bf16_flops, _host_bytes(static, facts) / host_bandwidth(chip)
    return (max(busy, wire, host / 2) + busy + wire + host) / 2 / tokens


def _host_bytes(static: Static, facts: Facts) -> float:
    """What a device sends to its host and takes back in a step: optimizer state, each layer's input and attention."""
    candidate, sizes = static.candidate, static.candidate.sizes
    kept = facts.width + facts.heads_width / sizes["tensor"] if candidate.remat == "offload" else 0
    tokens = candidate.rows * facts.row_length / candidate.shards / sizes["context"]
    return 2 * (static.host + facts.layers * tokens * facts.compute_bytes * kept)


def _accumulations(candidate: Candidate) -> int:
    return candidate.rows // candidate.micro


def _weight_shards(candidate: Candidate) -> int:
    """Over how many devices the weights of one tensor shard are split."""
    return math.prod(candidate.sizes[axis] for axis in MESH_AXES["embed"])


def _gradient_bytes(candidate: Candidate, facts: Facts) -> float:
    """Of the trained weights of one tensor shard, in the compute dtype."""
    return facts.trained * facts.compute_bytes / candidate.sizes["tensor"]


def _ici_bytes(candidate: Candidate, facts: Facts) -> float:
    """What a device sends in a step, within its slice."""
    sizes, number, sharded = candidate.sizes, facts.compute_bytes, _weight_shards(candidate)
    gathered = 2 * facts.parameters * number / sizes["tensor"] * (1 - 1 / sharded)
    gradients = _gradient_bytes(candidate, facts)
    reduced = gradients * (1 - 1 / sharded) + 2 * gradients / sharded * (1 - 1 / sizes["data"])
    once = _accumulations(candidate) * (gathered + reduced)
    tokens = candidate.rows * facts.row_length / candidate.shards / sizes["context"]
    passes = 4 + 2 * RECOMPUTED.get(candidate.remat, 1.0)
    activations = passes * 2 * (1 - 1 / sizes["tensor"]) * facts.width
    keys = 3 * 2 * (sizes["context"] - 1) * facts.kv_width / sizes["tensor"]
    return once + facts.layers * tokens * number * (activations + keys)


def guess_bytes(static: Static, facts: Facts) -> float:
    """Of a device's memory at its fullest: state, gradients, what is kept for the backward pass, one layer at work."""
    candidate = static.candidate
    sizes, number = candidate.sizes, facts.compute_bytes
    gradients = facts.trained / sizes["tensor"] / _weight_shards(candidate)
    gradients *= 4 if _accumulations(candidate) > 1 else number
    tokens = candidate.micro * facts.row_length / candidate.shards / sizes["context"]
    heads, mlp = 2 * facts.heads_width + 2 * facts.kv_width, 3 * facts.mlp_width
    inner = {"full": 0, "dots": heads + mlp, "minimal": heads + mlp, "none": 2 * (heads + mlp) + 6 * facts.width}
    most = 2 * (heads + mlp) + 6 * facts.width
    kept = 0 if candidate.remat == "offload" else facts.width + inner.get(candidate.remat, 0) / sizes["tensor"]
    layer = 2 * facts.parameters / facts.layers / sizes["tensor"] + tokens * (facts.width + most / sizes["tensor"])
    return static.bytes + gradients + number * (facts.layers * tokens * kept + layer)


@dataclass
class Correction:
    """What compiled candidates say about the guesses of others."""

    features: list[np.ndarray] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)

    def learn(self, candidate: Candidate, guess: float, truth: float) -> None:
        self.features.append(_features(candidate))
        self.errors.append(math.log(truth / guess))

    def apply(self, candidates: Sequence[Candidate], guesses: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
        """Logarithms of the corrected guesses, `[candidates]`, and their standard deviations."""
        new = np.stack([_features(candidate) for candidate in candidates])
        precision = np.diag(1 / _prior(new.shape[1]) ** 2)
        weighted = np.zeros(new.shape[1])
        if self.features:
            known = np.stack(self.features)
            precision = precision + known.T @ known / NOISE**2
            weighted = known.T @ np.array(self.errors) / NOISE**2
        covariance = np.linalg.inv(precision)
        middle = np.log(np.array(guesses)) + new @ (covariance @ weighted)
        return middle, np.sqrt(np.einsum("cf,fg,cg->c", new, covariance, new) + NOISE**2)


def _prior(size: int) -> Float[np.ndarray, " features"]:
    return np.array([PRIOR_COMMON] + [PRIOR] * (size - 1))


def _features(candidate: Candidate) -> Float[np.ndarray, " features"]:
    sizes, ring = candidate.sizes, candidate.collective_matmul
    axes = [math.log2(sizes[axis]) / 2 for axis in ("data", "fsdp", "context", "tensor", "expert")]
    policies = [candidate.remat == name for name in (*KEPT, "offload")]
    rows = [math.log2(candidate.rows_per_device) / 2, math.log2(_accumulations(candidate)) / 2]
    # What a ring costs depends on which axis it runs along.
    rings = [ring, ring and axes[1], ring and axes[3]]
    return np.array([1.0, *policies, *axes, *rows, *rings], np.float64)
