"""Grouped matrix products against a loop in float64: empty groups, rows behind the groups, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.errors import UserError
from posttrain.models.grouped import choose_grouped, grouped_matmul


def reference(
    rows: np.ndarray, matrices: np.ndarray, sizes: tuple[int, ...], d_out: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Result and gradients, by the definition, in float64."""
    rows, matrices, d_out = (x.astype(np.float64) for x in (rows, matrices, d_out))
    out, d_rows, d_matrices = np.zeros(d_out.shape), np.zeros(rows.shape), np.zeros(matrices.shape)
    at = 0
    for expert, size in enumerate(sizes):
        span = slice(at, at + size)
        out[span] = rows[span] @ matrices[expert]
        d_rows[span] = d_out[span] @ matrices[expert].T
        d_matrices[expert] = rows[span].T @ d_out[span]
        at += size
    return out, d_rows, d_matrices


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The TPU's kernel, run by Pallas' interpreter, and not written for strict promotion."""
    from jax.experimental.pallas.ops.tpu import megablox

    monkeypatch.setattr(megablox, "gmm", functools.partial(megablox.gmm, interpret=True))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("implementation", ["ragged", "blocks", "megablox"])
@pytest.mark.parametrize("sizes", [(7, 0, 30, 13), (0, 0, 0, 64), (0, 0, 0, 0), (1, 1, 1, 1)])
def test_groups_meet_their_own_matrix(implementation: str, sizes: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    rows, matrices = rng.normal(size=(64, 12)).astype(np.float32), rng.normal(size=(4, 12, 20)).astype(np.float32)
    d_out = rng.normal(size=(64, 20)).astype(np.float32)
    expected = reference(rows, matrices, sizes, d_out)
    rows[sum(sizes) :] = np.nan  # whatever stands behind the groups

    @jax.jit
    def run(rows: jax.Array, matrices: jax.Array) -> tuple[jax.Array, ...]:
        product = functools.partial(grouped_matmul, sizes=jnp.asarray(sizes), implementation=implementation)
        out, pull = jax.vjp(product, rows, matrices)
        return out, *pull(jnp.asarray(d_out))

    with jax.numpy_dtype_promotion("standard" if implementation == "megablox" else "strict"):
        results = run(jnp.asarray(rows), jnp.asarray(matrices))
    for found, wanted in zip(results, expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6 * max(1.0, np.abs(wanted).max()))


def test_the_platform_chooses() -> None:
    assert [choose_grouped("auto", p) for p in ("cpu", "tpu", "gpu")] == ["blocks", "megablox", "ragged"]
    assert choose_grouped("ragged", "tpu") == "ragged"
    with pytest.raises(UserError, match=r"model\.moe = megablox: a kernel for TPUs, this is cpu"):
        choose_grouped("megablox", "cpu")
