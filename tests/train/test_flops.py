"""FLOPs of a step against hand counts and XLA's own, peaks against published figures."""

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.config import LoraConfig
from posttrain.models.architecture import DecoderConfig, LayerKind, MoEConfig
from posttrain.models.decoder import ComputeOptions, Decoder, abstract_decoder
from posttrain.models.lora import attach, choose, linear_modules
from posttrain.records import Batch, Params
from posttrain.train.flops import StepFlops, attended_pairs, causal_pairs, matmul_weights, peak_flops, train_flops
from posttrain.train.step import merge

ROOT = Path(__file__).parents[2]

SMALL = DecoderConfig(
    vocab_size=10,
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
)


# ---- a step ---------------------------------------------------------------------------------------------------------


def test_train_flops_counted_by_hand() -> None:
    # One layer: q 8x8, k and v 8x4 each, o 8x8, gate, up and down 8x16 each = 64 + 64 + 64 + 384 = 576 weights;
    # three layers 1728; head 10x8 (not its 128 padded rows) = 80. In all 1808, 6 FLOPs each a token.
    # Two segments of 3 and 2 tokens attend 1+2+3 + 1+2 = 9 pairs. A pair, per head, is two products of length 4:
    # 2 * 2*4 = 16 FLOPs, with 2 heads 32, three times that with the backward pass, and that in 3 layers.
    assert attended_pairs(SMALL, np.array([3, 2])) == 3 * 9
    assert train_flops(SMALL, tokens=5, attended=3 * 9) == 6 * 1808 * 5 + 3 * 32 * 3 * 9 == 56832


@pytest.mark.parametrize(
    ("sizes", "parameters", "not_in_products"),
    [
        # SmolLM2-135M: 134,515,008 parameters, the tied embedding once (as head); 2 * 30 + 1 norms of 576.
        ((49152, 576, 1536, 30, 9, 3, 64), 134_515_008, 61 * 576),
        # Llama 3.1 8B: 8,030,261,248 parameters; its input embedding is looked up only; 65 norms.
        ((128256, 4096, 14336, 32, 32, 8, 128), 8_030_261_248, 128256 * 4096 + 65 * 4096),
    ],
)
def test_matmul_weights_of_published_models(
    sizes: tuple[int, int, int, int, int, int, int], parameters: int, not_in_products: int
) -> None:
    assert matmul_weights(DecoderConfig(*sizes)) == parameters - not_in_products


def test_train_flops_of_an_adapter_counted_by_hand() -> None:
    # The 1808 weights have no gradient: 4 FLOPs a token. The adapter's 100 have one: 6. Attention as ever.
    assert train_flops(SMALL, tokens=5, attended=27, adapter=100) == (4 * 1808 + 6 * 100) * 5 + 3 * 32 * 27


@pytest.mark.parametrize("rank", [None, 32])
def test_train_flops_agree_with_xla(rank: int | None) -> None:
    """XLA counts a loop's body once, so one layer; it computes all T x T pairs, so those are given. What it counts
    beyond products (norms, softmax, rotary positions, loss) is small at these sizes. With an adapter it finds no
    gradient of the frozen weights."""
    config = DecoderConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    )
    B, T = 2, 512
    decoder, size = abstract_decoder(config, options=ComputeOptions(attention="reference", remat="none")), None
    trained, frozen = decoder.shapes, {}
    if rank is not None:
        adapter = choose(LoraConfig(r=rank), decoder, {path: () for path in linear_modules(decoder)})
        size = adapter.weights(decoder, experts_per_token=1)
        decoder = attach(decoder, adapter, jnp.float32)
        trained, frozen = adapter.split(decoder.shapes)

    def loss(trained: Params, frozen: Params, batch: Batch) -> jax.Array:
        model: Decoder = decoder.merge(merge(trained, frozen))
        logits = jnp.einsum("btd,vd->btv", model.hidden(batch), model.head())
        return jnp.sum(jax.nn.logsumexp(logits, axis=-1))

    ints, floats = jax.ShapeDtypeStruct((B, T), jnp.int32), jax.ShapeDtypeStruct((B, T), jnp.float32)
    compiled = jax.jit(jax.grad(loss)).lower(trained, frozen, Batch(ints, ints, ints, floats)).compile()
    analysis = compiled.cost_analysis()
    assert analysis is not None
    ours = train_flops(config, tokens=B * T, attended=B * T * T, adapter=size)
    attention = ours - train_flops(config, tokens=B * T, attended=0, adapter=size)
    assert attention > 0.2 * ours, "attention must weigh more than the tolerance, or it is not tested"
    # What enters the first layer needs no gradient where nothing before it is trained; counted as in every layer.
    first = 0 if rank is None else 2 * B * T * 256 * (256 + 128 + 128 + 3 * rank)
    assert ours - first == pytest.approx(analysis["flops"], rel=0.03)


def test_a_token_is_multiplied_with_its_chosen_experts_only() -> None:
    # Qwen3-30B-A3B: 30,532,122,624 parameters, of which 120 of 128 experts a layer do not see a token; the input
    # embedding is looked up; two norms of 2048 and two of 128 a layer, and one of 2048.
    config = DecoderConfig(151936, 2048, 6144, 48, 32, 4, 128, qk_norm="head", moe=MoEConfig(128, 8, 768))
    passive = 48 * 120 * 3 * 2048 * 768 + 151936 * 2048 + 48 * (2 * 2048 + 2 * 128) + 2048
    assert matmul_weights(config) == 30_532_122_624 - passive


def test_causal_pairs_do_not_overflow() -> None:
    assert causal_pairs(np.full(3, 131_072, np.int32)) == 3 * (131_072 * 131_073 // 2)
    assert causal_pairs(np.zeros(0, np.int32)) == 0


@pytest.mark.parametrize("window", [None, 1, 3, 8, 40])
def test_causal_pairs_equal_a_count_of_the_mask(window: int | None) -> None:
    lengths = np.random.default_rng(0).integers(1, 13, size=20)
    distance = np.arange(40)[:, None] - np.arange(40)[None]
    seen = (distance >= 0) & (distance < (window or 40))
    assert causal_pairs(lengths, window) == sum(seen[:n, :n].sum() for n in lengths)


def test_each_layer_attends_within_its_own_window() -> None:
    config = replace(SMALL, num_hidden_layers=5, layer_kinds=(LayerKind(window=2), LayerKind()))
    # Five tokens: 1 + 2 + 2 + 2 + 2 pairs in layers 0, 2 and 4, 15 in layers 1 and 3.
    assert attended_pairs(config, np.array([5])) == 3 * 9 + 2 * 15


def test_step_flops_ask_the_data_for_the_step() -> None:
    class Data:
        def segment_lengths(self, step: int) -> np.ndarray:
            return {7: np.array([3, 2], np.int32)}[step]

    assert StepFlops(SMALL)(Data(), 7) == 56832


# ---- the machine ----------------------------------------------------------------------------------------------------


def devices(count: int, kind: str, cores: int | None = None) -> list[SimpleNamespace]:
    extra = {} if cores is None else {"num_cores": cores}
    return [SimpleNamespace(platform="tpu" if "TPU" in kind else "gpu", device_kind=kind, **extra)] * count


@pytest.mark.parametrize(
    ("count", "kind", "cores", "peak"),
    [
        # Four chips each; what the devices of a four-chip topology say of themselves.
        (8, "TPU v3", 1, 4 * 123e12),
        (8, "TPU v4", 1, 4 * 275e12),  # without megacore: two devices a chip
        (4, "TPU v4", 2, 4 * 275e12),
        (4, "TPU v5 lite", 1, 4 * 197e12),
        (4, "TPU v5", 2, 4 * 459e12),
        (4, "TPU v6 lite", 1, 4 * 918e12),
        (8, "TPU7x", 1, 4 * 2307e12),
        # Devices that do not tell their cores.
        (4, "TPU v4", None, 4 * 275e12),
        (4, "TPU v5p", None, 4 * 459e12),
        (8, "TPU7x", None, 4 * 2307e12),
        (8, "NVIDIA A100-SXM4-80GB", None, 8 * 312e12),
        (1, "NVIDIA A100 80GB PCIe", None, 312e12),
        (8, "NVIDIA H100 80GB HBM3", None, 8 * 989e12),
        (1, "NVIDIA H100 PCIe", None, 756e12),
        (2, "NVIDIA H200", None, 2 * 989e12),
        (8, "NVIDIA B200", None, 8 * 2250e12),
    ],
)
def test_published_peaks(count: int, kind: str, cores: int | None, peak: float) -> None:
    found, source = peak_flops(devices(count, kind, cores))
    assert found == pytest.approx(peak, rel=1e-12)
    assert f"{count} x {kind}" in source


@pytest.mark.parametrize("kind", ["TPU v99", "NVIDIA GeForce RTX 4090", "NVIDIA A100-SXM4-40GB MIG 1g.5gb"])
def test_an_unknown_machine_has_no_peak(kind: str) -> None:
    found, source = peak_flops([*devices(2, kind), *devices(2, "NVIDIA B200")])
    assert found is None
    assert repr(kind) in source and "B200" not in source


def test_cpu_peak_is_of_the_machine_and_measured_once() -> None:
    all_devices = jax.devices()
    assert len(all_devices) > 1
    peak, source = peak_flops(all_devices)
    assert peak is not None and 1e8 < peak < 1e15
    assert peak_flops(all_devices[:1]) == (peak, source)
    assert "this machine's" in source and f"{peak / 1e9:.0f} GFLOP/s" in source


PROCESS = """
import sys, jax
jax.distributed.initialize(f"localhost:{sys.argv[2]}", num_processes=2, process_id=int(sys.argv[1]))
from posttrain.train import flops
rate = flops._matmul_rate
calls = []
flops._matmul_rate = lambda: calls.append(1) or rate()
peak, source = flops.peak_flops(jax.devices())
print("RESULT", repr(peak), len(calls), "this machine's" in source)
"""


@pytest.mark.slow
def test_processes_of_one_machine_count_it_once() -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    env = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    processes = [
        subprocess.Popen([sys.executable, "-c", PROCESS, str(i), str(port)], env=env, stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    results = [next(x for x in out.splitlines() if x.startswith("RESULT")).split()[1:] for out in outputs]
    peaks, calls, alone = zip(*results, strict=True)
    assert peaks[0] == peaks[1] and float(peaks[0]) > 1e8
    assert calls == ("1", "0"), "one process measures while the other waits"
    assert alone == ("True", "True")
