"""What is known of chips: names that JAX has for them, and figures that hang together."""

import types

import pytest

from t5x_domain.parallel.chips import CHIPS, chip_of


@pytest.mark.parametrize(
    ("kind", "name"),
    # As libtpu 0.0.48 names the devices of each topology, and as CUDA names boards.
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA H200", "h200"),
        ("cpu", None),
        ("NVIDIA H100 PCIe", None),  # slower than the SXM board
    ],
)
def test_a_device_is_known_by_its_kind(kind, name):
    assert chip_of(types.SimpleNamespace(device_kind=kind)) is (None if name is None else CHIPS[name])


def test_kinds_belong_to_one_chip_each():
    kinds = [kind for chip in CHIPS.values() for kind in chip.kinds]
    assert len(set(kinds)) == len(kinds)


def test_a_pod_of_v5e_and_of_v6e():
    """cloud.google.com/tpu/docs/v6e, "Specifications": of 256 chips 50.63 and 234.9 PFLOP/s, all-reduce 51.2 and 102.4
    TB/s, data-center network 6.4 and 25.6 Tb/s."""
    for name, pflops, all_reduce, dcn in (("v5e", 50.63, 51.2e12, 6.4e12), ("v6e", 234.9, 102.4e12, 25.6e12)):
        chip = CHIPS[name]
        assert 256 * chip.flops / 1e15 == pytest.approx(pflops, rel=5e-3)  # 50.4 and 235.0 by their own figures a chip
        assert 256 * chip.link_bytes_per_second == pytest.approx(all_reduce)
        assert 256 * chip.dcn_bytes_per_second * 8 == pytest.approx(dcn)


def test_tpu7x_is_two_devices():
    """2,307 TFLOP/s, 192 GiB and 7.38 TB/s a chip (cloud.google.com/tpu/docs/tpu7x)."""
    chip = CHIPS["tpu7x"]
    assert chip.devices_per_chip * chip.flops == 2307e12
    assert chip.devices_per_chip * chip.hbm_bytes == 192 * 2**30
