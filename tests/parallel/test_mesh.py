"""Which devices lie where on a mesh."""

import types

import pytest

from t5x_domain.errors import UserError
from t5x_domain.parallel.mesh import AXES, MeshShape, _hybrid


def gpus(nodes, each=8):
    """As CUDA's plugin describes nodes that it has not told apart as slices."""
    kind = {"platform": "gpu", "device_kind": "NVIDIA H200", "slice_index": 0}
    return [types.SimpleNamespace(**kind, id=i, process_index=i // each) for i in range(nodes * each)]


def test_nodes_of_gpus_lie_along_the_first_axis():
    found = _hybrid([2, 2, 4, 1, 1], gpus(2))
    assert found.shape == (2, 2, 4, 1, 1)
    for node, devices in enumerate(found):
        assert {device.process_index for device in devices.flat} == {node}


def test_as_many_slices_as_there_are_nodes():
    with pytest.raises(UserError, match="MeshShape.slice = 4, but the devices are in 2 slices; set it to that"):
        _hybrid([4, 4, 1, 1, 1], gpus(2))


def test_slices_of_tpus_are_not_one():
    """What a run meets that was not told of them."""
    kind = {"platform": "tpu", "device_kind": "TPU v5 lite", "process_index": 0}
    devices = [types.SimpleNamespace(**kind, id=i, slice_index=i // 4) for i in range(8)]
    with pytest.raises(UserError, match="MeshShape.slice = 1, but the devices are in 2 slices; set it to that"):
        MeshShape().build(devices)


def test_what_is_left_over_goes_to_the_axis_of_minus_one():
    assert dict(zip(AXES, MeshShape(fsdp=2, tensor=2).build().devices.shape, strict=True)) == {
        "slice": 1, "data": 2, "fsdp": 2, "sequence": 1, "tensor": 2,
    }  # fmt: skip


def test_sizes_that_do_not_multiply_to_the_devices():
    with pytest.raises(UserError, match="asks for 3 devices, but there are 8"):
        MeshShape(data=3).build()
