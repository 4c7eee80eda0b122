"""Machines by name: `v5e:16x16` is a slice of TPUs, `h200:8x2` two nodes of eight GPUs, `cpu:8` this machine."""

import dataclasses
import functools
import importlib.util
import math
import os
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies

from t5x_domain.errors import UserError
from t5x_domain.parallel.chips import CHIPS, Chip

_TPUS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3}  # axes of their torus


class _Gpu(NamedTuple):
    """By NVIDIA's CUDA programming guide, "Technical specifications per compute capability", and its white papers."""

    major: int
    multiprocessors: int
    lanes: int
    shared_kib: int
    l2_mib: int
    gigahertz: float


_GPUS = {
    "a100": _Gpu(8, 108, 64, 164, 40, 1.41),
    "h100": _Gpu(9, 132, 128, 228, 50, 1.98),
    "h200": _Gpu(9, 132, 128, 228, 50, 1.98),
}
_GPUS_OF_A_NODE = 8
_NAMES = f"{', '.join(name + ':' + 'x'.join('4' * axes) for name, axes in _TPUS.items())}, h200:8, h200:8x2 or cpu:8"
# Of one program for both cores of a chip.
_MEGACORE = {"v4": {"chip_config_name": "megacore"}, "v5p": {"chip_config_name": "megacore"}}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices that can be compiled for.

    Attributes:
      kind: a name of `CHIPS`, or "cpu".
      shape: chips along each axis of a slice, GPUs of a node and nodes, or CPU devices.
      slices: TPU slices, or nodes of GPUs, joined by the data-center network.
    """

    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    @classmethod
    def of(cls, name: str, slices: int = 1) -> "Topology":
        """The machines of that name.

        Args:
          name: "v5e:16x16", "h200:8", "h200:8x2", "cpu:8".
          slices: of TPUs, each of them as named.

        Raises:
          UserError: there are none of that name.
        """
        kind, _, sizes = name.partition(":")
        shape = tuple(int(n) for n in sizes.split("x")) if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes) else ()
        axes = {**{gpu: (1, 2) for gpu in _GPUS}, **{tpu: (n,) for tpu, n in _TPUS.items()}, "cpu": (1,)}
        if len(shape) not in axes.get(kind, ()):
            raise UserError(f"--topology={name}: is not known; write {_NAMES}.")
        if slices < 1 or (slices > 1 and kind in _GPUS):
            raise UserError(
                f"--slices={slices}: is for TPUs, 1 or more; nodes of GPUs are written --topology=h200:8x2."
            )
        if kind in _GPUS:
            if shape[0] > _GPUS_OF_A_NODE:
                raise UserError(
                    f"--topology={name}: NVLink joins {_GPUS_OF_A_NODE} GPUs of a node; write "
                    f"{kind}:{_GPUS_OF_A_NODE}x{math.ceil(math.prod(shape) / _GPUS_OF_A_NODE)} for several nodes."
                )
            return cls(kind, shape[:1], math.prod(shape[1:]))
        return cls(kind, shape, slices)

    @property
    def name(self) -> str:
        """As `of` takes it, and how many slices or nodes."""
        sizes = (*self.shape, self.slices) if self.kind in _GPUS and self.slices > 1 else self.shape
        several = f" x {self.slices} slices" if self.slices > 1 and self.kind not in _GPUS else ""
        return f"{self.kind}:{'x'.join(map(str, sizes))}{several}"

    @property
    def chip(self) -> Chip | None:
        """What is known of its chips; None for a CPU."""
        return CHIPS.get(self.kind)

    @property
    def platform(self) -> str:
        """As JAX lowers for: "tpu", "cuda" or "cpu"."""
        return "tpu" if self.kind in _TPUS else "cuda" if self.kind in _GPUS else "cpu"

    @property
    def num_chips(self) -> int:
        """What is paid for."""
        return math.prod(self.shape) * self.slices

    @property
    def num_devices(self) -> int:
        """JAX's devices."""
        return self.num_chips * (1 if self.chip is None else self.chip.devices_per_chip)

    @property
    def memory_limit(self) -> float | None:
        """Bytes of a device that a program may use; None if that is not known.

        JAX takes XLA_CLIENT_MEM_FRACTION of a GPU's memory (XLA_PYTHON_CLIENT_MEM_FRACTION by its older name), by
        default three quarters, and no more.

        Raises:
          UserError: that variable is no number.
        """
        if self.chip is None:
            return None
        if self.platform != "cuda":
            return self.chip.hbm_bytes
        names = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"
        name = next((name for name in names if os.environ.get(name)), None)
        try:
            return (float(os.environ[name]) if name else 0.75) * self.chip.hbm_bytes
        except ValueError as error:
            raise UserError(f"{name}={os.environ[name]}: is the share of a GPU's memory, like .92.") from error

    @property
    def environment(self) -> dict[str, str]:
        """Variables of a process that compiles for it; libtpu and JAX read them when they are loaded."""
        if self.platform != "tpu":
            devices = f"--xla_force_host_platform_device_count={self.num_devices} --xla_backend_optimization_level=0"
            return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": devices if self.platform == "cpu" else ""}
        # Told that it is a host of four v5e, libtpu asks no metadata server who it is, whatever is compiled for. There
        # is no device that a second process could be in the way of.
        return {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": "v5litepod-4",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_WORKER_ID": "0",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }

    def require_compiler(self) -> None:
        """Raises UserError if the machine's compiler is not installed."""
        if self.platform == "tpu" and importlib.util.find_spec("libtpu") is None:
            raise UserError(
                f"--topology={self.name}: compiling for TPUs needs libtpu, but no TPU; pip install 't5x_domain[tpu]'."
            )
        if self.platform == "cuda" and importlib.util.find_spec("jax_cuda13_plugin") is None:
            raise UserError(
                f"--topology={self.name}: needs the CUDA plugin, but no GPU; pip install 't5x_domain[cuda]'."
            )

    @functools.cached_property
    def devices(self) -> list[jax.Device]:
        """The devices to compile for, slice by slice.

        Raises:
          UserError: the compiler does not know a slice of that shape.
        """
        if self.platform == "cpu":
            return jax.devices("cpu")[: self.num_devices]
        name = f"{self.kind}:{'x'.join(map(str, self.shape))}"
        options = dict(_MEGACORE.get(self.kind, {}))
        if self.platform == "cuda":
            options = {"target_config": _gpu_description(self.chip), "topology": f"{self.slices}x1x{self.shape[0]}"}
        elif self.slices > 1:
            options["num_slices"] = self.slices
        try:
            return topologies.get_topology_desc(platform=self.platform, topology_name=name, **options).devices
        except (jax.errors.JaxRuntimeError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"--topology={self.name}: the compiler does not describe it ({reason}).") from error


def _gpu_description(chip: Chip) -> str:
    """What XLA would ask a GPU for, as text of its `GpuTargetConfigProto`."""
    gpu = _GPUS[chip.name]
    return f"""
    gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      shared_memory_per_block: 49152 shared_memory_per_block_optin: {(gpu.shared_kib - 1) * 2**10}
      shared_memory_per_core: {gpu.shared_kib * 2**10} registers_per_core_limit: 65536 registers_per_block_limit: 65536
      core_count: {gpu.multiprocessors} fpus_per_core: {gpu.lanes} clock_rate_ghz: {gpu.gigahertz}
      l2_cache_size: {gpu.l2_mib * 2**20} memory_bandwidth: {int(chip.hbm_bytes_per_second)}
      device_memory_size: {chip.hbm_bytes}
      cuda_compute_capability {{ major: {gpu.major} minor: 0 }}
    }}
    platform_name: "CUDA"
    dnn_version_info {{ major: 9 minor: 12 patch: 0 }}
    device_description_str: "{chip.kinds[0]}"
    """
