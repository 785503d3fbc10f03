"""One compile per run: another shape is an error that says which."""

import jax
import jax.numpy as jnp
import pytest

from posttrain.parallel.mesh import single_device_mesh
from posttrain.train.loop import OneShape


def test_a_changed_shape_is_named() -> None:
    wanted = {"rows": jax.ShapeDtypeStruct((2, 3), jnp.float32)}
    step = OneShape(lambda x: x["rows"] * 2, single_device_mesh(), wanted, donate=())
    assert float(step({"rows": jnp.ones((2, 3))}).sum()) == 12.0
    with pytest.raises(RuntimeError, match=r"'rows'.*\(3, 3\).*instead of.*\(2, 3\)"):
        step({"rows": jnp.ones((3, 3))})
