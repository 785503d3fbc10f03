"""Placement of parameters, the rows of a process, and the matcher of parameter names."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from posttrain.config import MeshConfig
from posttrain.errors import UserErrors
from posttrain.parallel.mesh import make_mesh
from posttrain.parallel.sharding import global_batch, idle_axes, local_rows, place, select, split_axes
from posttrain.records import Batch

SHAPES = {"embed/embedding": (256, 8), "layers/attn/q/kernel": (4, 8, 2, 4), "layers/mlp/up/kernel": (4, 8, 16)}


def test_a_dim_that_does_not_divide_is_repeated_and_named() -> None:
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    placement = place(("layers", "embed", "heads", "head_size"), (3, 64, 9, 8), mesh)
    assert placement.repeated == ("heads 9 over tensor 2 (3 would do)",)
    assert placement.sharding.shard_shape((3, 64, 9, 8)) == (3, 16, 9, 8)


def test_a_dim_is_split_over_the_first_axes_as_far_as_they_divide_it() -> None:
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2, context=2))
    placement = place(("embed", "head_size"), (12, 8), mesh)
    assert placement.sharding.spec == PartitionSpec(("fsdp", "expert"), None)
    assert placement.repeated == ("embed 12 over context 2 (3 would do)",)
    assert place(("embed",), (8,), mesh).sharding.shard_shape((8,)) == (1,)


def test_tokens_are_split_into_two_chunks_a_device() -> None:
    mesh = make_mesh(MeshConfig(fsdp=2, context=4))
    assert split_axes("tokens", 16, mesh) == ("context",)
    assert split_axes("tokens", 12, mesh) == ()


def test_an_axis_that_divides_nothing_is_refused() -> None:
    dims = [("layers", 6), ("embed", 64), ("heads", 9), ("kv_heads", 3), ("mlp", 100), ("experts", 6)]
    (problem,) = idle_axes(dims, make_mesh(MeshConfig(tensor=8, fsdp=1)))
    assert problem == "mesh.tensor = 8: divides none of heads 9, kv_heads 3, mlp 100; the nearest that works is 4"
    (problem,) = idle_axes(dims, make_mesh(MeshConfig(expert=4, fsdp=2)))
    assert problem == "mesh.expert = 4: divides none of experts 6; the nearest that works is 2"
    assert idle_axes(dims, make_mesh(MeshConfig(tensor=4, expert=2, fsdp=1))) == []  # mlp 100 is split
    assert idle_axes([("embed", 64)], make_mesh(MeshConfig(expert=4, fsdp=2))) == []  # a model without experts


def test_global_batches_hold_the_rows_in_order() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    numbers = local_rows(mesh, 2, 4)
    np.testing.assert_array_equal(numbers, np.arange(8))
    rows = np.arange(8 * 3, dtype=np.int32).reshape(8, 3)
    batch = global_batch(Batch(rows, rows, rows, rows.astype(np.float32)), numbers, mesh, 2, 4)
    np.testing.assert_array_equal(np.asarray(batch.tokens), rows.reshape(2, 4, 3))
    assert batch.tokens.sharding.shard_shape(batch.tokens.shape) == (2, 1, 3)
    assert len(batch.tokens.sharding.device_set) == jax.device_count()


def test_select_by_expression_and_layer_range() -> None:
    chosen = select(["layers[1:3]/attn/.*", "embed.*"], SHAPES, "key")
    assert chosen["embed/embedding"] is True
    assert chosen["layers/mlp/up/kernel"] is False
    np.testing.assert_array_equal(chosen["layers/attn/q/kernel"], [False, True, True, False])


def test_select_joins_ranges_that_cover_everything() -> None:
    chosen = select(["layers[:2]/mlp/.*", "layers[2:]/mlp/.*"], SHAPES, "key")
    assert chosen["layers/mlp/up/kernel"] is True


def test_select_names_every_wrong_pattern() -> None:
    with pytest.raises(UserErrors) as caught:
        select(["layrs/.*", "(", "layers[2:9]/.*"], SHAPES, "optimizer.freeze")
    text = str(caught.value)
    assert "'layrs/.*' matches no parameter; the nearest are" in text
    assert "'(' is not a regular expression" in text
    assert "names layers 2 to 9 of layers/attn/q/kernel: has 4" in text
