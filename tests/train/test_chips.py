"""Peaks of chips: laws that published figures obey."""

import pytest

from posttrain.train.chips import CHIPS, chip_of

MXU_FLOPS_PER_CYCLE = {
    "v3": 2 * 2 * 128,
    "v4": 2 * 4 * 128,
    "v5e": 4 * 128,
    "v5p": 2 * 4 * 128,
    "v6e": 4 * 512,
    "tpu7x": 2 * 4 * 512,
}
"""Matrix units of a chip times 128 rows of 128 (or 512 for the larger ones): multiplied by 256 below."""


@pytest.mark.parametrize("name", sorted(CHIPS))
def test_clock_times_matrix_units_is_the_peak(name: str) -> None:
    chip = CHIPS[name]
    assert chip.clock * MXU_FLOPS_PER_CYCLE[name] * 128 * 2 == pytest.approx(chip.bf16_flops, rel=0.005)


@pytest.mark.parametrize(
    ("kind", "name", "flops", "hbm"),
    [
        ("TPU v3", "v3", 61.5e12, 16),
        ("TPU v4", "v4", 137.5e12, 16),
        ("TPU v5 lite", "v5e", 197e12, 16),
        ("TPU v5", "v5p", 459e12, 95),
        ("TPU v6 lite", "v6e", 918e12, 32),
        ("TPU7x", "tpu7x", 1153.5e12, 96),
    ],
)
def test_a_device_has_its_share(kind: str, name: str, flops: float, hbm: float) -> None:
    chip = chip_of(kind)
    assert chip is not None
    assert chip.name == name
    assert (chip.device.bf16_flops, chip.device.hbm_bytes / 2**30) == (flops, hbm)
    assert chip.device.device == chip.device
    assert chip.bf16_flops / chip.hbm_bandwidth == chip.device.bf16_flops / chip.device.hbm_bandwidth


def test_other_devices_have_no_peaks() -> None:
    assert chip_of("cpu") is None
    assert chip_of("TPU v2") is None


def test_kinds_are_named_once() -> None:
    kinds = [kind for chip in CHIPS.values() for kind in chip.device_kinds]
    assert len(kinds) == len(set(kinds))
