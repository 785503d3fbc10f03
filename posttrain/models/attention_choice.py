"""Which implementation of attention a run uses: by the platform, unless the config names one, and only where it can
honour the model's mask. `experiment.py` asks when it has read the model's config and made the mesh."""

import logging

from posttrain.errors import UserError
from posttrain.models.architecture import DecoderConfig
from posttrain.models.attention import SPLASH_BLOCK

logger = logging.getLogger(__name__)

AUTO = {"tpu": "splash", "gpu": "triton"}
"""What each platform gets unless the config says otherwise; all others get `chunked`."""

TRITON_HEAD = 128
"""The longest heads that the kernel for GPUs is used for: its tiles of longer ones may exceed the shared memory."""


def choose_attention(name: str, platform: str, config: DecoderConfig | None = None, context: int = 1) -> str:
    """The implementation that a name, or `auto`, means on a platform, for a model whose rows are split over so many
    devices. Raises `UserError` where it cannot run, or cannot honour the model's mask."""
    chosen = AUTO.get(platform, "chunked") if name == "auto" else name
    needed = {"splash": "tpu", "triton": "gpu"}.get(chosen, platform)
    if needed != platform:
        raise UserError(
            f"model.attention = {chosen}: a kernel for {needed.upper()}s, this is {platform}; use auto, chunked or "
            "reference"
        )
    lacks = unserved_by_triton(config, context) if chosen == "triton" and config is not None else []
    if lacks and name == "auto":
        logger.info(f"attention is chunked: the kernel for GPUs has no {', no '.join(lacks)}")
        return "chunked"
    if lacks:
        raise UserError(f"model.attention = triton: it has no {', no '.join(lacks)}; use auto or chunked")
    return chosen


def unserved_by_triton(config: DecoderConfig, context: int) -> list[str]:
    """What attention of this model needs and the kernel for GPUs lacks, on a mesh with so many devices to a row."""
    windows = sorted({kind.window for kind in config.kinds if kind.window is not None})
    lacks = [f"windows (this model's layers have {', '.join(map(str, windows))})"] if windows else []
    if config.attn_softcap is not None:
        lacks.append(f"soft-cap (this model has one of {config.attn_softcap:g})")
    if config.head_dim > TRITON_HEAD:
        lacks.append(f"heads over {TRITON_HEAD} (this model's have {config.head_dim})")
    if context > 1:
        lacks.append(f"rows split over devices (mesh.context is {context})")
    return lacks


def row_unit(implementation: str, context: int) -> int:
    """What the length of rows must be a multiple of where so many devices split their tokens."""
    if context == 1:
        return 1
    return 2 * context * (SPLASH_BLOCK if implementation == "splash" else 1)


def check_split(implementation: str, row_length: int, context: int) -> list[str]:
    """Problems with rows of this length whose tokens are split over so many devices."""
    unit = row_unit(implementation, context)
    if row_length % unit == 0:
        return []
    return [
        f"data.row_length = {row_length}: with mesh.context = {context} and model.attention = {implementation} it must "
        f"be a multiple of {unit}; the nearest that works is {max(1, round(row_length / unit)) * unit}"
    ]
