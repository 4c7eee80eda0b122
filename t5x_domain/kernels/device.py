"""The device that is compiled for, also where that is not one of this machine (ahead of time, under a mesh)."""

import jax


def platform() -> str:
    """ "cpu", "gpu" or "tpu"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def device_kind() -> str:
    """The model of the device, as "TPU v5 lite"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


def num_cores() -> int:
    """Cores that run one device's program together: 2 on a TPU v4 or v5p, else 1."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return getattr(jax.devices()[0] if device is None else device, "num_cores", None) or 1
