"""The device mesh: how many devices share the batch, the parameters, the sequence and each matrix product."""

import dataclasses
import math

import gin
import jax
import numpy as np
from jax.experimental import mesh_utils

from t5x_domain.errors import UserError

AXES = ("slice", "data", "fsdp", "sequence", "tensor")


@gin.configurable
@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Devices along each axis; at most one may be -1, which takes all that are left.

    Attributes:
      slice: pod slices, or nodes of GPUs, with copies of the parameters; between them is the slow data-center network.
      data: copies of the parameters within a slice, each with its share of the batch.
      fsdp: shares of the parameters, gathered when used; splits the batch as well (ZeRO-3: Rajbhandari et al. 2020).
      sequence: shares of the sequence length.
      tensor: shares of heads, feed-forward width and vocabulary (Shoeybi et al. 2019).
    """

    slice: int = 1
    data: int = -1
    fsdp: int = 1
    sequence: int = 1
    tensor: int = 1

    def build(self, devices: list[jax.Device] | None = None) -> jax.sharding.Mesh:
        """The mesh over `devices`, by default all.

        Raises:
          UserError: the sizes do not multiply to the number of devices.
        """
        devices = jax.devices() if devices is None else devices
        sizes = [getattr(self, axis) for axis in AXES]
        known = math.prod(size for size in sizes if size != -1)
        if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
            raise UserError(f"{self}: sizes are positive, and one of them may be -1 for 'all that are left'.")
        sizes = [max(len(devices) // known, 1) if size == -1 else size for size in sizes]
        if math.prod(sizes) != len(devices):
            raise UserError(
                f"{self} asks for {math.prod(sizes)} devices, but there are {len(devices)}; "
                "set MeshShape.slice, .data, .fsdp, .sequence and .tensor so that they multiply to that."
            )
        if devices[0].platform == "cpu" or len(devices) == 1:
            return jax.sharding.Mesh(np.asarray(devices).reshape(sizes), AXES)
        if sizes[0] > 1 or (devices[0].platform == "tpu" and _slices(devices) > 1):
            return jax.sharding.Mesh(_hybrid(sizes, devices), AXES)
        # Knows the links between accelerators and lays the inner axes along the fast ones, where need be along a part
        # of an axis of the torus.
        return jax.sharding.Mesh(mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True), AXES)


def _hybrid(sizes: list[int], devices: list[jax.Device]) -> np.ndarray:
    """Devices with whole slices along the first axis. Raises UserError if there are not as many."""
    # Nodes of GPUs that JAX does not tell apart as slices are told by their processes.
    slices = _slices(devices)
    process_is_slice = devices[0].platform == "gpu" and slices == 1
    if process_is_slice:
        slices = len({device.process_index for device in devices})
    if slices != sizes[0]:
        raise UserError(f"MeshShape.slice = {sizes[0]}, but the devices are in {slices} slices; set it to that.")
    inner, outer = (1, *sizes[1:]), (sizes[0], *[1] * (len(sizes) - 1))
    options = {"process_is_granule": process_is_slice, "allow_split_physical_axes": True}
    return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, **options)


def _slices(devices: list[jax.Device]) -> int:
    return len({getattr(device, "slice_index", 0) for device in devices})
