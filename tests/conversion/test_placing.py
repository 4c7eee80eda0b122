"""On eight virtual devices."""

import ml_dtypes
import numpy as np
import pytest
from jax import ShapeDtypeStruct
from jax.sharding import NamedSharding, PartitionSpec
from small_models import bits

from t5x_domain.conversion.layout import Leaf
from t5x_domain.conversion.placing import place
from t5x_domain.conversion.tensors import Tensor
from t5x_domain.parallel.mesh import MeshShape

LAYERS, ROWS, COLUMNS = 4, 8, 16
STACKED = Leaf("kernel", (LAYERS, ROWS, COLUMNS), tuple("abcd"), stacked=True)
SINGLE = Leaf("kernel", (ROWS, COLUMNS), ("a",), stacked=False)
WHOLE = np.random.default_rng(0).normal(size=STACKED.shape).astype(np.float32)


class Recorder:
    """Tensors that write down how many bytes are read of them."""

    def __init__(self, arrays):
        self.num_bytes = 0
        self.tensors = {
            name: Tensor(array.shape, array.dtype, lambda index, array=array: self._read(array[index]))
            for name, array in arrays.items()
        }

    def _read(self, part):
        self.num_bytes += part.nbytes
        return part


def target(leaf, spec, dtype=np.float32):
    return ShapeDtypeStruct(
        leaf.shape, dtype, sharding=NamedSharding(MeshShape(data=2, fsdp=2, tensor=2).build(), spec)
    )


SPECS = [
    (),
    ("fsdp",),
    (None, "tensor"),
    (("fsdp", "tensor"),),
    (("data", "fsdp", "tensor"),),
    ("tensor", "fsdp"),
]


@pytest.mark.parametrize("spec", SPECS)
def test_a_matrix(spec):
    files = Recorder({"a": WHOLE[0]})
    placed = place(SINGLE, files.tensors, target(SINGLE, PartitionSpec(*spec)))
    assert bits(np.asarray(placed)) == bits(WHOLE[0])
    assert placed.sharding.is_equivalent_to(target(SINGLE, PartitionSpec(*spec)).sharding, 2)
    for shard in placed.addressable_shards:
        assert bits(np.asarray(shard.data)) == bits(WHOLE[0][shard.index])
    assert files.num_bytes == WHOLE[0].nbytes  # once, though devices hold copies


@pytest.mark.parametrize("spec", [*((None, *spec) for spec in SPECS), ("data", "fsdp"), (("data", "fsdp"),)])
def test_a_stack(spec):
    files = Recorder(dict(zip("abcd", WHOLE, strict=True)))
    placed = place(STACKED, files.tensors, target(STACKED, PartitionSpec(*spec)))
    assert bits(np.asarray(placed)) == bits(WHOLE)
    for shard in placed.addressable_shards:
        assert bits(np.asarray(shard.data)) == bits(WHOLE[shard.index])
    assert files.num_bytes == WHOLE.nbytes


@pytest.mark.parametrize("leaf", [SINGLE, STACKED])
def test_a_process_reads_what_its_devices_hold(leaf, monkeypatch):
    """With a fourth of the rows on each pair of devices, a process with two of the pairs reads half of the file."""
    import jax

    files = Recorder(dict(zip("abcd", WHOLE, strict=True)))
    wanted = target(leaf, PartitionSpec(*[None] * leaf.stacked, ("data", "fsdp")))
    mine = set(wanted.sharding.mesh.devices.flat[:4])

    def make_array(shape, sharding, share):
        for device, index in sharding.devices_indices_map(shape).items():
            if device in mine:
                share(index)

    monkeypatch.setattr(jax, "make_array_from_callback", make_array)  # as in a process with four of eight devices
    place(leaf, files.tensors, wanted)
    assert files.num_bytes == WHOLE[: LAYERS if leaf.stacked else 1].nbytes / 2


def test_the_dtype_is_that_of_the_target():
    tensors = {"a": Tensor.of(WHOLE[0])}
    placed = place(SINGLE, tensors, target(SINGLE, PartitionSpec("fsdp"), ml_dtypes.bfloat16))
    assert bits(np.asarray(placed)) == bits(WHOLE[0].astype(ml_dtypes.bfloat16))
