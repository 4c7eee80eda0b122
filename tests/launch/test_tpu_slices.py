import pytest

from launch.tpu import slice_of
from t5x_domain.errors import UserError


@pytest.mark.parametrize(
    ("accelerator", "topology", "name", "chips", "hosts", "per_node"),
    [
        # https://cloud.google.com/tpu/docs/v5e and /v6e: chips; training slices of more than 8 have 4 on a VM.
        ("v5e", "2x4", "v5litepod-8", 8, 1, 4),
        ("v5e", "16x16", "v5litepod-256", 256, 64, 4),
        ("v6e", "1x1", "v6e-1", 1, 1, 1),
        ("v6e", "8x8", "v6e-64", 64, 16, 4),
        # /v4 and /v5p: TensorCores, two a chip; "2x2x1: 8 cores, 4 chips, 1 machine", "4x4x8: 256, 128, 32".
        ("v4", "2x2x1", "v4-8", 4, 1, 4),
        ("v5p", "4x4x8", "v5p-256", 128, 32, 4),
    ],
)
def test_as_the_documentation_lists_them(accelerator, topology, name, chips, hosts, per_node):
    found = slice_of(accelerator, topology)
    assert (found.accelerator_type, found.chips, found.vm_hosts, found.chips_per_node) == (name, chips, hosts, per_node)


@pytest.mark.parametrize("topology", ["", "16", "4x4x4", "4xx4", "0x4", "4x4 "])
def test_a_topology_has_the_axes_of_its_tpu(topology):
    with pytest.raises(UserError, match="v5e has 2 axes; write it as in '16x16'"):
        slice_of("v5e", topology)


def test_hosts_are_whole():
    with pytest.raises(UserError, match="'3x3' has 9 chips"):
        slice_of("v6e", "3x3")
