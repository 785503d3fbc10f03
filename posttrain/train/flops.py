"""How much useful arithmetic a train step is, and how much the machine could do: the two sides of MFU.

Model FLOPs utilization (PaLM, arXiv:2204.02311, appendix B) is the arithmetic that the model's definition asks for,
over what the devices could have done in the same time. What counts, forward and backward, a multiply-add being two:

- Every product with a weight, `6 * weights * tokens`. The embedding lookup is no product; the head is one, counted for
  every real token as the usual 6ND does, although logits are computed for trained tokens only: the figure can then be
  compared between data sets and with what others publish. Every weight counts as trained, frozen ones too, but for
  LoRA: there the frozen weights have no gradient, `4 * weights * tokens`, and the adapter's count 6 each.
- Attention, per segment: a segment of n tokens has n(n+1)/2 (query, key) pairs, fewer in a layer with a sliding window.
  What a kernel computes beyond them (future, other segments, outside the window) is not counted.

Not counted: padding (of rows, and of the vocabulary in memory), recomputation, norms, activations, biases, softmax,
the loss, the optimizer. The loop reports MFU from this.
"""

import functools
import re
import socket
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Int

from posttrain.models.architecture import DecoderConfig
from posttrain.train.chips import chip_of

# ---- what a step is -------------------------------------------------------------------------------------------------


def matmul_weights(config: DecoderConfig) -> int:
    """Parameters that a token is multiplied with: attention, MLP and head (of a reward model its score, which
    reads few tokens and is nothing beside the others), without embedding lookup, norms, biases; of experts the router
    and those that are chosen for it."""
    c = config
    attention = 2 * c.hidden_size * c.head_dim * (c.num_attention_heads + c.num_key_value_heads)
    mlp = 3 * c.hidden_size * c.intermediate_size
    if c.moe is not None:
        chosen = 3 * c.moe.num_experts_per_tok * c.moe.moe_intermediate_size
        mlp = c.hidden_size * (chosen + c.moe.num_experts)
    return c.num_hidden_layers * (attention + mlp) + (c.num_labels or c.vocab_size) * c.hidden_size


def train_flops(config: DecoderConfig, *, tokens: int, attended: int, adapter: int | None = None) -> float:
    """FLOPs of one forward and backward pass over `tokens` real tokens with `attended` (query, key) pairs, those of all
    layers. `adapter` is the size of an adapter, if that alone is trained.

    A pair costs `4 * N * H` forward (query x key, weight x value); the backward pass costs twice the forward pass.
    """
    c = config
    per_pair = 4 * c.num_attention_heads * c.head_dim
    weights = 6 * matmul_weights(c) if adapter is None else 4 * matmul_weights(c) + 6 * adapter
    return float(weights * tokens + 3 * per_pair * attended)


def attended_pairs(config: DecoderConfig, lengths: Int[np.ndarray, "segments"]) -> int:
    """(query, key) pairs that all layers together attend in segments of these lengths."""
    layers = Counter(kind.window for kind in config.kinds)
    return sum(count * causal_pairs(lengths, window) for window, count in layers.items())


def causal_pairs(lengths: Int[np.ndarray, "segments"], window: int | None = None) -> int:
    """Pairs of causal segments in one layer: n(n+1)/2 each, less those that are `window` or more tokens apart."""
    n = lengths.astype(np.int64)
    outside = np.maximum(n - window, 0) if window is not None else np.zeros_like(n)
    return int(np.sum(n * (n + 1) // 2 - outside * (outside + 1) // 2))


@runtime_checkable
class StepData(Protocol):
    """What is asked of a data set: how long the segments of a step's global batch are."""

    def segment_lengths(self, step: int) -> np.ndarray:
        """int `[segments]`, over all rows of the global batch."""
        ...


@dataclass(frozen=True)
class StepFlops:
    """`flops(data, step)`: FLOPs of one optimizer step, from the packing plan, so that every process knows them."""

    config: DecoderConfig
    adapter: int | None = None
    """Parameters of the adapter that a token is multiplied with, under LoRA."""

    def __call__(self, data: StepData, step: int) -> float:
        lengths = data.segment_lengths(step)
        tokens, attended = int(lengths.sum(dtype=np.int64)), attended_pairs(self.config, lengths)
        return train_flops(self.config, tokens=tokens, attended=attended, adapter=self.adapter)


# ---- what the machine can do ----------------------------------------------------------------------------------------


_GPUS = {
    r"A100-(SXM4|PCIE)-\d+GB|A100 80GB PCIe": 312e12,
    r"H100 \d+GB HBM3": 989e12,
    r"H100 NVL": 835e12,
    r"H100 PCIe": 756e12,
    r"H200": 989e12,
    r"B200": 2250e12,
}
"""By `device_kind` after `NVIDIA `. Dense bf16, from the data sheets; whole names only, since a MIG slice has its GPU's
name and more."""


def peak_flops(devices: Sequence[Any]) -> tuple[float | None, str]:
    """(FLOP/s that all `devices` could do together, where the figure is from).

    Accelerators: the published dense bf16 peak, also where the run computes in f32. One that is not in the tables has
    no peak, rather than a guess: `None`, and MFU is logged as null.

    CPU: the f32 matmul rate of the machine, measured once. Emulated devices and processes of one machine share it, so
    their number does not matter. With several processes every one of them must call this: the first on each machine
    measures while the others wait, and machines add up.
    """
    if devices[0].platform == "cpu":
        rate, machines = _cpu_peak()
        what = "this machine's" if machines == 1 else f"{machines} machines'"
        return rate, f"{what} measured f32 matmul rate of {rate / 1e9:.0f} GFLOP/s, which all CPU devices share"
    peaks = [_device_peak(device) for device in devices]
    kinds = Counter(device.device_kind for device in devices)
    unknown = sorted({device.device_kind for device, peak in zip(devices, peaks, strict=True) if peak is None})
    if unknown:
        return None, f"no peak: none is known for {', '.join(map(repr, unknown))}, so it is logged as null"
    total = float(sum(peak for peak in peaks if peak is not None))
    named = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    return total, f"the published bf16 peak of {named}: {total / 1e12:.0f} TFLOP/s together"


def _device_peak(device: Any) -> float | None:
    chip = chip_of(device.device_kind)
    if chip is not None:
        return chip.bf16_flops * (getattr(device, "num_cores", None) or chip.device_cores) / chip.cores
    name = device.device_kind.removeprefix("NVIDIA ")
    return next((peak for pattern, peak in _GPUS.items() if re.fullmatch(pattern, name)), None)


@functools.cache
def _cpu_peak() -> tuple[float, int]:
    """(FLOP/s of all machines of the run, how many they are)."""
    if jax.process_count() == 1:
        return _matmul_rate(), 1
    machine = np.uint32(zlib.crc32(socket.gethostname().encode()))
    machines = multihost_utils.process_allgather(machine).tolist()
    measures = machines.index(int(machine)) == jax.process_index()
    rate = np.float32(_matmul_rate() if measures else 0.0)
    return float(np.sum(multihost_utils.process_allgather(rate))), len(set(machines))


def _matmul_rate(size: int = 2048, seconds: float = 0.2) -> float:
    """FLOP/s of the fastest of several f32 products on one CPU device, which uses all cores."""
    x = jax.device_put(np.ones((size, size), np.float32), jax.local_devices(backend="cpu")[0])
    product = jax.jit(jnp.matmul).lower(x, x).compile()
    jax.block_until_ready(product(x, x))
    start, times = time.perf_counter(), []
    while len(times) < 3 or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        jax.block_until_ready(product(x, x))
        times.append(time.perf_counter() - before)
    return 2 * size**3 / min(times)
