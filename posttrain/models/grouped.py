"""Grouped matrix products: rows sorted by expert, each group of rows times its own expert's matrix.

`moe.py` calls `grouped_matmul`. Implementations differ in cost only:

- `ragged`: `jax.lax.ragged_dot`, the reference. XLA computes it densely on CPU and on most TPUs: every row is
  multiplied with every expert's matrix.
- `blocks`: a loop over experts and blocks of their rows in plain JAX. Costs what the groups hold, rounded up to a
  block each; the choice on CPU.
- `megablox`: the grouped-matmul kernel for TPUs of JAX (MegaBlocks, arXiv:2211.15841). Costs the same, in its tiles.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from posttrain.errors import UserError

AUTO = {"cpu": "blocks", "tpu": "megablox"}
"""What each platform gets unless the config says otherwise; all others get `ragged`."""


def choose_grouped(name: str, platform: str) -> str:
    """The implementation that a name, or `auto`, means on a platform. Raises `UserError` where it cannot run."""
    chosen = AUTO.get(platform, "ragged") if name == "auto" else name
    if chosen == "megablox" and platform != "tpu":
        raise UserError(f"model.moe = megablox: a kernel for TPUs, this is {platform}; use auto, ragged or blocks")
    return chosen


def grouped_matmul(
    rows: Float[Array, "M C"],
    matrices: Float[Array, "E C O"],
    sizes: Int[Array, " E"],
    *,
    implementation: str,
) -> Float[Array, "M O"]:
    """The first `sizes[0]` rows times the first matrix, the next `sizes[1]` times the second, and so on.

    Rows behind the last group are zero in the result, whatever they hold, and get zero gradient. Products are summed
    in f32; the result has the dtype of `rows`.
    """
    if rows.shape[0] == 0:
        return jnp.zeros((0, matrices.shape[2]), rows.dtype)
    grouped = jnp.arange(rows.shape[0], dtype=jnp.int32) < jnp.sum(sizes)
    # Kernels leave what is behind the groups as they found it, in the result and in the gradient.
    result = IMPLEMENTATIONS[implementation](jnp.where(grouped[:, None], rows, 0), matrices, sizes)
    return jnp.where(grouped[:, None], result, 0)


def _ragged(rows: Float[Array, "M C"], matrices: Float[Array, "E C O"], sizes: Int[Array, " E"]) -> Array:
    out = lax.ragged_dot(rows, matrices, sizes, preferred_element_type=jnp.float32)
    return out.astype(rows.dtype)


def _row_block(rows: int, groups: int, low: int, high: int) -> int:
    """Half of a group's mean rows, as a power of two: rounding up costs a quarter at most on average."""
    half = max(1, rows // (2 * groups))
    return min(high, max(low, 1 << (half.bit_length() - 1)))


# ---- a kernel for TPUs ----------------------------------------------------------------------------------------------


def _megablox(rows: Float[Array, "M C"], matrices: Float[Array, "E C O"], sizes: Int[Array, " E"]) -> Array:
    # Imported here: Pallas takes its time, and only TPUs run this.
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    block = _row_block(rows.shape[0], matrices.shape[0], 128, 512)
    padding = -rows.shape[0] % block
    padded = jnp.pad(rows, ((0, padding), (0, 0)))
    tiles = functools.partial(_tiles, block, 1024 if rows.dtype.itemsize == 2 else 512)
    out = gmm(padded, matrices, sizes, preferred_element_type=rows.dtype, tiling=tiles)
    return out[: rows.shape[0]]


def _tiles(block: int, widest: int, m: int, k: int, n: int) -> tuple[int, int, int]:
    """Tile sizes that fit a core's vector memory, forward and backward."""
    return block, min(widest, -(-k // 128) * 128), min(widest, -(-n // 128) * 128)


# ---- blocks in plain JAX --------------------------------------------------------------------------------------------

_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _blocks(rows: Float[Array, "M C"], matrices: Float[Array, "E C O"], sizes: Int[Array, " E"]) -> Array:
    return _each_block(rows, matrices, sizes, "mc,co->mo")


def _each_block(rows: Array, matrices: Array, sizes: Array, product: str) -> Array:
    """`product` of the rows of each group with the group's matrix."""
    M, width = rows.shape[0], matrices.shape[1 if product.endswith("mc") else 2]
    block = _row_block(M, matrices.shape[0], 8, 256)
    padded = jnp.pad(rows, ((0, block), (0, 0)))

    def group(out: Array, of_group: tuple[Array, Array, Array]) -> tuple[Array, None]:
        matrix, start, size = of_group

        def one(i: Array, out: Array) -> Array:
            # The last block runs into the next group, which is written later, or behind the groups.
            at = start + i * block
            part = _dot(product, lax.dynamic_slice_in_dim(padded, at, block), matrix).astype(out.dtype)
            return lax.dynamic_update_slice_in_dim(out, part, at, 0)

        return lax.fori_loop(0, (size + block - 1) // block, one, out), None

    out = jnp.zeros((M + block, width), rows.dtype)
    return lax.scan(group, out, (matrices, jnp.cumsum(sizes) - sizes, sizes))[0][:M]


def _blocks_forward(rows: Array, matrices: Array, sizes: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return _blocks(rows, matrices, sizes), (rows, matrices, sizes)


def _blocks_backward(residuals: tuple[Array, Array, Array], d_out: Array) -> tuple[Array, Array, None]:
    rows, matrices, sizes = residuals
    block = _row_block(rows.shape[0], matrices.shape[0], 8, 256)
    padded, d_padded = (jnp.pad(x, ((0, block), (0, 0))) for x in (rows, d_out))

    def group(_: None, of_group: tuple[Array, Array]) -> tuple[None, Array]:
        start, size = of_group

        def one(i: Array, total: Array) -> Array:
            at = start + i * block
            own = (at + jnp.arange(block, dtype=jnp.int32) < start + size)[:, None]
            part = jnp.where(own, lax.dynamic_slice_in_dim(padded, at, block), 0)
            return total + _dot("mc,mo->co", part, lax.dynamic_slice_in_dim(d_padded, at, block))

        zeros = jnp.zeros(matrices.shape[1:], jnp.float32)
        return None, lax.fori_loop(0, (size + block - 1) // block, one, zeros).astype(matrices.dtype)

    _, d_matrices = lax.scan(group, None, (jnp.cumsum(sizes) - sizes, sizes))
    return _each_block(d_out, matrices, sizes, "mo,co->mc"), d_matrices, None


_blocks.defvjp(_blocks_forward, _blocks_backward)

IMPLEMENTATIONS: dict[str, Callable[[Array, Array, Array], Array]] = {
    "ragged": _ragged,
    "blocks": _blocks,
    "megablox": _megablox,
}
