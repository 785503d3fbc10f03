"""Predicted times, rates and cost, by hand from round figures."""

import pytest

from posttrain.plan import predict as prediction
from posttrain.plan.predict import HOST_BANDWIDTH, KERNEL_SHARE, SLICED, predict
from posttrain.train.chips import CHIPS, Chip

CHIP = Chip("made up", 100e12, 16e9, 1e12, 100e9, 10e9, 1e9, ("Made up",))


@pytest.fixture(autouse=True)
def link(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the made-up chip to its host."""
    monkeypatch.setitem(prediction.HOST_BANDWIDTH, CHIP.name, 20e9)


def collective(kind: str, wire: float, **given) -> dict:
    record = {"kind": kind, "axes": ["fsdp"], "network": "ici", "sliced": False, "executed": 2.0}
    return record | {"payload_bytes": wire, "wire_bytes": wire} | given


def plan(collectives=(), kernels=(), **given) -> dict:
    cost = {"mxu_flops": 40e12, "recomputed_flops": 8e12, "hbm_bytes": 0.25e12, "estimated_cycles": 0.5e9}
    cost["host_bytes"] = given.pop("host_bytes", 0.0)
    return {
        "mesh": {"fsdp": 4, "data": 2},
        "num_layers": 10,
        "accumulation": 2,
        "memory": {"peak": 12e9},
        "work": {"tokens": 8000, "model_flops": 8 * 30e12, "attention_flops": 8 * 6e12, "expert_flops": 8 * 2e12},
        "cost": cost | {"collectives": list(collectives), "kernels": list(kernels)},
    } | given


def test_computation_alone():
    found = predict(plan(), CHIP, tokens=None, price=None)
    assert found.fits and found.memory_share == 0.75
    assert found.compute_seconds == 0.5 and found.step_seconds == (0.5, 0.5)
    assert found.matmul_seconds == 0.4 and found.hbm_seconds == 0.25
    assert found.tokens_per_second == (16000, 16000)
    assert found.mfu == (0.6, 0.6)
    assert found.executed_over_useful == pytest.approx(40 / 30)
    assert (found.executed_flops, found.recomputed_flops, found.useful_flops) == (40e12, 8e12, 30e12)
    assert found.chips == 8 and found.hours is found.chip_hours is found.cost is found.epoch_hours is None
    assert found.host_seconds == 0.0 and found.untimed == ()


def test_hours_and_cost():
    found = predict(plan(), CHIP, tokens=8000.0 * 7200, price=1.5)
    assert found.hours == (1.0, 1.0) and found.chip_hours == (8.0, 8.0) and found.cost == (12.0, 12.0)
    moved = [collective("all-gather", 25e9)]
    found = predict(plan(moved), CHIP, tokens=8000.0 * 7200, price=1.5, epoch_steps=1800)
    assert found.epoch_hours == (0.25, 0.375) and found.cost == (12.0, 18.0), "steps of 0.5 and 0.75 s"


def test_attention_kernels():
    """Six products of all pairs are 6 TFLOP on a device: a call, of one of 10 layers and 2 accumulation steps, takes
    0.05 TFLOP a product. Executed: 2 forward passes, dq and dkv: 11 products in each of 20 calls."""
    kernels = [
        {"name": "splash_mha_fwd_segmented_residuals", "executed": 40.0, "recomputed": 20.0},
        {"name": "splash_mha_dq_segmented_no_residuals", "executed": 20.0, "recomputed": 0.0},
        {"name": "splash_mha_dkv_segmented_no_residuals", "executed": 20.0, "recomputed": 0.0},
        {"name": "another", "executed": 20.0, "recomputed": 0.0},
    ]
    found = predict(plan(kernels=kernels), CHIP, tokens=None, price=None)
    assert found.attention_seconds == pytest.approx(0.11)
    assert found.step_seconds == pytest.approx((0.61, 0.5 + 0.11 / KERNEL_SHARE))
    assert found.matmul_seconds == pytest.approx(0.51) and found.executed_flops == pytest.approx(51e12)
    assert found.recomputed_flops == pytest.approx(10e12), "2 products in 20 calls"
    assert found.untimed == ("another",)


def test_kernels_of_experts():
    """A product of all tokens is 2 TFLOP on a device, in 10 layers and 2 accumulation steps: 0.1 TFLOP a call."""
    kernels = [
        {"name": "gmm", "executed": 180.0, "recomputed": 60.0},
        {"name": "tgmm", "executed": 60.0, "recomputed": 0.0},
    ]
    found = predict(plan(kernels=kernels), CHIP, tokens=None, price=None)
    assert found.expert_seconds == pytest.approx(0.24) and found.attention_seconds == 0.0
    assert found.step_seconds == pytest.approx((0.74, 0.5 + 0.24 / KERNEL_SHARE))
    assert found.recomputed_flops == pytest.approx(14e12) and found.untimed == ()
    assert found.matmul_seconds == pytest.approx(0.64) and found.executed_over_useful == pytest.approx(64 / 30)


@pytest.mark.parametrize("name", ["gmm", "tgmm", "gmm.clone", "jvp_jit_gmm__", "transpose_jvp_jit_tgmm___"])
def test_names_that_the_compiler_gives_to_kernels_of_experts(name: str):
    kernels = [{"name": name, "executed": 100.0, "recomputed": 0.0}]
    found = predict(plan(kernels=kernels), CHIP, tokens=None, price=None)
    assert found.expert_seconds == pytest.approx(0.1) and found.untimed == ()


def test_collectives_are_hidden_or_not():
    moved = [
        collective("all-gather", 20e9, axes=["fsdp"]),
        collective("all-gather", 10e9, axes=["fsdp"], dtype="f32"),
        collective("all-gather", 1e9, axes=["data"], network="dcn"),
        collective("all-reduce", 40e9, sliced=True),
    ]
    found = predict(plan(moved), CHIP, tokens=None, price=None)
    assert [(w.kind, w.network, w.seconds) for w in found.wires] == [
        (SLICED, "ici", 0.4),
        ("all-gather", "ici", pytest.approx(0.3)),
        ("all-gather", "dcn", 0.1),
    ]
    assert found.wires[1].executed == 4 and found.wires[1].payload_bytes == 30e9
    assert found.wire_seconds == pytest.approx(0.8)
    # Low: within the slice 0.5 s, the sliced all-reduce at half, as long as computation. High: 0.5 s and 0.8 s.
    assert found.step_seconds == pytest.approx((0.5, 1.3))
    within, across = [*moved, collective("all-gather", 20e9)], [*moved, collective("all-gather", 8e9, network="dcn")]
    for wires, ends in ((within, (0.7, 1.5)), (across, (0.9, 2.1))):
        assert predict(plan(wires), CHIP, tokens=None, price=None).step_seconds == pytest.approx(ends)


@pytest.mark.parametrize(
    ("gigabytes", "wire", "ends"),
    [
        (4, 0, (0.5, 0.7)),  # 0.2 s one way after the other: hidden, or added
        (24, 0, (0.6, 1.7)),  # 1.2 s; 0.6 s if half of it goes each way at once, longer than what is computed
        (24, 70, (0.7, 2.4)),  # 0.7 s of collectives are longer still
    ],
)
def test_transfers_to_the_host_are_hidden_or_not(gigabytes: float, wire: float, ends: tuple[float, float]):
    moved = [collective("all-gather", wire * 1e9)] if wire else []
    found = predict(plan(moved, host_bytes=gigabytes * 1e9), CHIP, tokens=None, price=None)
    assert found.host_seconds == pytest.approx(gigabytes / 20)
    assert found.step_seconds == pytest.approx(ends)
    assert found.compute_seconds == 0.5


def test_every_chip_has_a_link_to_its_host():
    assert HOST_BANDWIDTH.keys() - {CHIP.name} == CHIPS.keys()


def test_devices_that_share_a_chip():
    half = Chip("made up", 200e12, 32e9, 2e12, 200e9, 20e9, 1e9, ("Made up",), devices_per_chip=2)
    found = predict(plan(host_bytes=1e9), half, tokens=8000.0 * 7200, price=1.0)
    assert found.host_seconds == 0.1, "they share its link to the host"
    found = predict(plan(), half, tokens=8000.0 * 7200, price=1.0)
    assert found.chips == 4 and found.cost == (4.0, 4.0)
    assert found.mfu == (0.6, 0.6) and found.memory_share == 0.75


def test_too_large():
    assert not predict(plan(memory={"peak": 17e9}), CHIP, tokens=None, price=None).fits
