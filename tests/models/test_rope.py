"""Rotary embedding in both of its forms against rotations of complex numbers in numpy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.models import rope

B, T, N, H = 2, 5, 3, 16
FORMS = [
    pytest.param(rope.apply_rope, id="chosen"),
    pytest.param(rope._turned_by_halves, id="halves"),
    pytest.param(rope._turned_by_product, id="product"),
]


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def turned(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Each pair (i, i + half) as a complex number, times cos + i sin."""
    x, half = np.float64(x), cos.shape[-1]
    pairs = (x[..., :half] + 1j * x[..., half : 2 * half]) * (np.float64(cos) + 1j * np.float64(sin))[:, :, None]
    return np.concatenate([pairs.real, pairs.imag, x[..., 2 * half :]], axis=-1)


def angles(half: int) -> tuple[np.ndarray, np.ndarray]:
    drawn = draw(1, B, T, half) * 3
    return np.cos(drawn), np.sin(drawn)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("half", [8, 6, 1])
def test_pairs_turn_and_the_rest_stays(form, half: int):
    x, (cos, sin) = draw(2, B, T, N, H), angles(half)
    found = np.asarray(form(jnp.asarray(x), jnp.asarray(cos), jnp.asarray(sin)))
    np.testing.assert_allclose(found, turned(x, cos, sin), atol=1e-6)
    np.testing.assert_array_equal(found[..., 2 * half :], x[..., 2 * half :])


@pytest.mark.parametrize("half", [8, 6])
def test_the_gradient_turns_back(half: int):
    x, dy, (cos, sin) = draw(2, B, T, N, H), draw(3, B, T, N, H), angles(half)
    _, vjp = jax.vjp(lambda x: rope.apply_rope(x, jnp.asarray(cos), jnp.asarray(sin)), jnp.asarray(x))
    np.testing.assert_allclose(vjp(jnp.asarray(dy))[0], turned(dy, cos, -sin), atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_narrow_numbers_are_rounded_once(form):
    x, (cos, sin) = jnp.asarray(draw(2, B, T, N, H), jnp.bfloat16), angles(H // 2)
    found = form(x, jnp.asarray(cos), jnp.asarray(sin))
    exact = turned(np.asarray(x, np.float32), cos, sin)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=2**-8, atol=1e-6)


def test_no_angle_changes_no_bit():
    x, ones, zeros = draw(2, B, T, N, H), jnp.ones((B, T, H // 2)), jnp.zeros((B, T, H // 2))
    np.testing.assert_array_equal(rope.apply_rope(jnp.asarray(x), ones, zeros), x)
