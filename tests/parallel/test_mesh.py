"""Mesh sizes: filled in, or refused with what would work."""

import pytest

from posttrain.config import MeshConfig
from posttrain.errors import UserError
from posttrain.parallel.mesh import check_mesh, make_mesh, resolve_sizes, row_shards


def test_the_free_axis_takes_what_remains() -> None:
    sizes = resolve_sizes(MeshConfig(data=2, tensor=2), 8)
    assert (sizes["data"], sizes["fsdp"], sizes["tensor"]) == (2, 2, 2)
    assert row_shards(sizes) == 4
    assert row_shards(resolve_sizes(MeshConfig(expert=4, fsdp=2), 8)) == 8


def test_an_axis_that_does_not_divide_is_explained() -> None:
    with pytest.raises(UserError, match="need a multiple of 3 devices, there are 8"):
        resolve_sizes(MeshConfig(tensor=3), 8)
    with pytest.raises(UserError, match="data 2 x fsdp 2 needs 4 devices, there are 8"):
        resolve_sizes(MeshConfig(data=2, fsdp=2), 8)


def test_all_impossible_axes_are_named() -> None:
    text = "\n".join(check_mesh(MeshConfig(context=2, data=0, fsdp=-1, tensor=-1)))
    assert "mesh.context = 2" in text and "mesh.data = 0" in text and "fsdp and tensor are both -1" in text


def test_the_mesh_has_all_axes() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert dict(mesh.shape) == {"replica": 1, "data": 2, "fsdp": 2, "context": 1, "tensor": 2, "expert": 1}
