"""Machines by name."""

import importlib.util

import pytest

from t5x_domain.errors import UserError
from t5x_domain.parallel.chips import CHIPS, chip_of
from t5x_domain.parallel.mesh import MeshShape
from t5x_domain.planning.topologies import Topology

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")

needs_cuda = pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs CUDA's plugin")


@pytest.mark.parametrize(
    ("name", "slices", "shown", "chips", "devices"),
    [
        ("v5e:16x16", 1, "v5e:16x16", 256, 256),
        ("v5e:16x16", 4, "v5e:16x16 x 4 slices", 1024, 1024),
        ("tpu7x:2x2x1", 1, "tpu7x:2x2x1", 4, 8),  # two devices a chip
        ("h200:8", 1, "h200:8", 8, 8),
        ("h200:8x2", 1, "h200:8x2", 16, 16),
        ("cpu:8", 1, "cpu:8", 8, 8),
    ],
)
def test_a_name_says_how_many(name, slices, shown, chips, devices):
    topology = Topology.of(name, slices)
    assert (topology.name, topology.num_chips, topology.num_devices) == (shown, chips, devices)
    assert topology.chip is CHIPS.get(topology.kind)


@pytest.mark.parametrize("name", ["v9:4x4", "v5e", "v5e:4", "v5e:4x4x4", "v5p:4x4", "v5e:0x4", "h200:8x2x2", "cpu:2x2"])
def test_an_unknown_name_is_answered_with_the_known(name):
    with pytest.raises(UserError, match=rf"--topology={name}: is not known; write v4:4x4x4, .* or cpu:8\.$"):
        Topology.of(name)


def test_nodes_of_gpus_are_no_slices():
    with pytest.raises(UserError, match="nodes of GPUs are written --topology=h200:8x2"):
        Topology.of("h200:8", 2)
    assert Topology.of("h200:8x2").slices == 2


def test_a_node_has_eight_gpus():
    with pytest.raises(UserError, match=r"--topology=h200:20: .* write h200:8x3 for several nodes"):
        Topology.of("h200:20")


def test_of_a_gpu_jax_takes_a_share(monkeypatch):
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert Topology.of("h200:8").memory_limit == 0.75 * CHIPS["h200"].hbm_bytes
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".5")  # as JAX called it
    assert Topology.of("h200:8").memory_limit == 0.5 * CHIPS["h200"].hbm_bytes
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", ".92")
    assert Topology.of("h200:8").memory_limit == 0.92 * CHIPS["h200"].hbm_bytes
    assert Topology.of("v5e:4x4").memory_limit == CHIPS["v5e"].hbm_bytes
    assert Topology.of("cpu:8").memory_limit is None
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "most")
    with pytest.raises(UserError, match="XLA_CLIENT_MEM_FRACTION=most: is the share"):
        _ = Topology.of("h200:8").memory_limit


@pytest.mark.parametrize(("name", "extra"), [("v5e:4x4", "tpu"), ("h200:8", "cuda")])
def test_a_missing_compiler_is_named(name, extra, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"pip install 't5x_domain\[{extra}\]'"):
        Topology.of(name).require_compiler()


@needs_libtpu
@pytest.mark.parametrize("name", ["v4:2x2x2", "v5e:4x4", "v5p:2x2x2", "v6e:4x4", "tpu7x:2x2x2"])
def test_each_tpu_is_described_and_is_the_chip_it_is_called(name):
    topology = Topology.of(name)
    assert len(topology.devices) == topology.num_devices
    assert chip_of(topology.devices[0]) is topology.chip


@needs_libtpu
def test_slices_lie_along_the_first_axis_of_the_mesh():
    mesh = MeshShape(slice=2, data=2, fsdp=4, tensor=2).build(Topology.of("v5e:4x4", 2).devices)
    for number, devices in enumerate(mesh.devices):
        assert {device.slice_index for device in devices.flat} == {number}


@needs_libtpu
def test_a_shape_that_no_slice_has():
    with pytest.raises(UserError, match=r"--topology=v5e:3x5: the compiler does not describe it"):
        _ = Topology.of("v5e:3x5").devices


@needs_cuda
@pytest.mark.parametrize("name", ["a100:4", "h100:8", "h200:8x2"])
def test_each_gpu_is_described_and_is_the_chip_it_is_called(name):
    topology = Topology.of(name)
    assert len(topology.devices) == topology.num_devices
    assert chip_of(topology.devices[0]) is topology.chip
    mesh = MeshShape(slice=topology.slices).build(topology.devices)
    assert [{d.process_index for d in devices.flat} for devices in mesh.devices] == [
        {n} for n in range(topology.slices)
    ]
