"""Placement of parameters, the rows of a process, and the matcher of parameter names."""

import jax
import numpy as np
import pytest

from posttrain.config import MeshConfig
from posttrain.errors import UserErrors
from posttrain.models.decoder import DecoderConfig, abstract_decoder
from posttrain.parallel.mesh import make_mesh
from posttrain.parallel.sharding import flatten, global_batch, local_rows, place, select
from posttrain.records import Batch

SHAPES = {"embed/embedding": (256, 8), "layers/attn/q/kernel": (4, 8, 2, 4), "layers/mlp/up/kernel": (4, 8, 16)}


def test_bytes_per_device_shrink_with_the_axes() -> None:
    decoder = abstract_decoder(DecoderConfig(250, 32, 64, 2, 4, 2, 8))
    shapes = flatten(decoder.shapes)

    def bytes_per_device(**sizes: int) -> int:
        mesh = make_mesh(MeshConfig(**sizes))
        shards = [place(decoder.axes[p], s.shape, mesh).sharding.shard_shape(s.shape) for p, s in shapes.items()]
        return 4 * sum(int(np.prod(shard)) for shard in shards)

    whole = bytes_per_device(data=8, fsdp=1)
    norms = 4 * (2 * 2 * 32 + 32)  # repeated on every mesh
    assert bytes_per_device(data=1, fsdp=8) == (whole - norms) // 8 + norms
    assert bytes_per_device(data=2, fsdp=2, tensor=2) == (whole - norms) // 4 + norms


def test_a_dim_that_does_not_divide_is_repeated_and_named() -> None:
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    placement = place(("layers", "embed", "heads", "head_size"), (3, 64, 9, 8), mesh)
    assert placement.repeated == ("heads 9 over tensor 2",)
    assert placement.sharding.shard_shape((3, 64, 9, 8)) == (3, 16, 9, 8)


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
