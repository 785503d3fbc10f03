"""Published peaks of TPU chips, and which device kinds mean them: what MFU and `plan` are relative to.

Sources, by chip: the pages https://docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, "System architecture", and
what else is noted. They give the bandwidth of the interconnect (ICI) of all links in both directions together; here it
is what a chip can send. Where a core's clock is not published it follows from the peak: FLOP/s over what the matrix
units do in a cycle (v4, v5e: 4 units of 128 x 128 a core, v5p: two such cores, v6e and tpu7x: 4 x 256 x 256 a core).
XLA's estimated cycles are cycles of this clock, of both cores of a v5p together, of one of a v4 or tpu7x.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

GIB = 2.0**30
VMEM = {"xla_tpu_scoped_vmem_limit_kib": 65536}
"""Half of the memory beside the matrix units for one operation, four times as much as by default: matrix products that
have elementwise work fused into them take up to 40 % less, by the compiler's own cycles. Of v4 it changes nothing."""


@dataclass(frozen=True)
class Chip:
    """Peaks of one chip. `bf16_flops` FLOP/s; `hbm_bytes` bytes; bandwidths bytes/s; `clock` Hz.

    `ici_bandwidth` is over all links of a chip and one way; `dcn_bandwidth` the chip's share of its host's network,
    one way. JAX calls its devices one of `device_kinds`. Described ahead of time there are `devices_per_chip` of them
    for each chip (two for v3, v4 and tpu7x): what one of these has of the chip is given by `device`. At run time a
    device has some of the chip's `cores`, `device_cores` where it does not tell: v4 and v5p join both cores into one
    device (megacore), v3 and tpu7x make each a device of its own.
    """

    name: str
    bf16_flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    ici_bandwidth: float
    dcn_bandwidth: float
    clock: float
    device_kinds: tuple[str, ...]
    devices_per_chip: int = 1
    cores: int = 1
    device_cores: int = 1
    xla_options: Mapping[str, int] = field(default_factory=dict)
    """For the train step: what makes it faster than the compiler's own choice."""

    @property
    def device(self) -> "Chip":
        """The peaks of one device: those of the chip divided by its devices, the clock as it is."""
        share = self.devices_per_chip
        return replace(
            self,
            bf16_flops=self.bf16_flops / share,
            hbm_bytes=self.hbm_bytes / share,
            hbm_bandwidth=self.hbm_bandwidth / share,
            ici_bandwidth=self.ici_bandwidth / share,
            dcn_bandwidth=self.dcn_bandwidth / share,
            devices_per_chip=1,
        )


CHIPS = {
    chip.name: chip
    for chip in (
        # 123 TFLOP/s, 32 GB, 900 GB/s, 940 MHz, four links of 656 Gbit/s: Jouppi et al. 2020, "A domain-specific
        # supercomputer for training deep neural networks", table 3. DCN assumed as for v5e.
        Chip("v3", 123e12, 32 * GIB, 0.9e12, 328e9, 25e9 / 8, 0.94e9, ("TPU v3",), devices_per_chip=2, cores=2),
        # 275 TFLOP/s, 32 GiB, 1,200 GB/s; 1,228 GB/s and six links of 50 GB/s: Jouppi et al. 2023, "TPU v4", table 4.
        # No DCN figure is published: assumed as for v5e.
        Chip(
            "v4",
            275e12,
            32 * GIB,
            1.228e12,
            300e9,
            25e9 / 8,
            1.05e9,
            ("TPU v4",),
            devices_per_chip=2,
            cores=2,
            device_cores=2,
        ),
        # 197 TFLOP/s, 16 GB, 819 GB/s, ICI 400 GB/s both ways; DCN 6.4 Tbit/s for a pod of 256 chips.
        Chip("v5e", 197e12, 16 * GIB, 0.819e12, 200e9, 25e9 / 8, 1.50e9, ("TPU v5 lite", "TPU v5e"), xla_options=VMEM),
        # 459 TFLOP/s, 95 GiB, 2,765 GB/s, ICI 1,200 GB/s both ways, DCN 50 Gbit/s a chip.
        Chip(
            "v5p",
            459e12,
            95 * GIB,
            2.765e12,
            600e9,
            50e9 / 8,
            1.75e9,
            ("TPU v5", "TPU v5p"),
            cores=2,
            device_cores=2,
            xla_options=VMEM,
        ),
        # 918 TFLOP/s, 32 GB, 1,640 GB/s, ICI 3,584 Gbit/s as published at its introduction; the page now gives
        # 1,638 GB/s and 800 GB/s both ways, which is 11 % less ICI. DCN 25.6 Tbit/s for a pod of 256 chips.
        Chip("v6e", 918e12, 32 * GIB, 1.64e12, 448e9, 100e9 / 8, 1.75e9, ("TPU v6 lite", "TPU v6e"), xla_options=VMEM),
        # 2,307 TFLOP/s, 192 GiB, 7,380 GB/s, ICI 1,200 GB/s both ways, DCN 100 Gbit/s a chip; two devices a chip.
        Chip(
            "tpu7x",
            2307e12,
            192 * GIB,
            7.38e12,
            600e9,
            100e9 / 8,
            2.20e9,
            ("TPU7x",),
            devices_per_chip=2,
            cores=2,
            xla_options=VMEM,
        ),
    )
}
"""Chips by name, that with which a topology begins: `v5p:4x4x4`."""


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a `jax.Device.device_kind`; None for a device whose peaks are not listed here, such as a CPU."""
    return next((chip for chip in CHIPS.values() if device_kind in chip.device_kinds), None)
