"""What gin says against where it is run: better now than when machines have been waited for."""

import math

from ml_collections import ConfigDict

from launch.config import TPU_TARGETS
from launch.sweep import Run, runs
from launch.tpu import slice_of
from t5x_domain import cli, files
from t5x_domain.errors import UserError
from t5x_domain.parallel.chips import CHIPS

_PATHS = ("CACHE_DIR", "VOCABULARY_FILE")


def require_that_gin_fits(config: ConfigDict) -> None:
    """Raises UserError for a run that gin refuses, or whose mesh or data the machines do not have."""
    for run in runs(config):
        cli.load_gin(config.gin_files, run.bindings, config.gin_search_paths)
        _require_mesh(config, run)
        if config.target in TPU_TARGETS:
            _require_data_in_a_bucket(run)


def _require_mesh(config: ConfigDict, run: Run) -> None:
    from t5x_domain.parallel.mesh import AXES, MeshShape  # with JAX: seconds, after all that is quicker to say

    mesh = cli.build(MeshShape)
    if config.target in TPU_TARGETS and mesh.slice not in (config.slices, -1):
        raise UserError(
            f"{run.name}: MeshShape.slice = {mesh.slice}, but config.slices = {config.slices}; they are to agree."
        )
    devices, sizes = _devices(config), [getattr(mesh, axis) for axis in AXES]
    known = math.prod(size for size in sizes if size != -1)
    if devices is not None and (devices % known if -1 in sizes else devices != known):
        raise UserError(
            f"{run.name}: {mesh} cannot be laid over the {devices} devices of this configuration; set MeshShape in "
            "config.overrides so that its sizes multiply to that."
        )


def _devices(config: ConfigDict) -> int | None:
    """As JAX counts them over all machines; None where the launcher does not know."""
    if config.target == "slurm":
        return config.slurm.nodes * config.slurm.gpus_per_node
    if config.target in TPU_TARGETS:
        chips = slice_of(config.accelerator, config.topology).chips
        return chips * CHIPS[config.accelerator].devices_per_chip * config.slices
    return config.local.processes * config.local.devices_per_process if config.accelerator == "cpu" else None


def _require_data_in_a_bucket(run: Run) -> None:
    import gin

    for name in _PATHS:
        try:
            place = gin.query_parameter(f"{name}/macro.value")
        except ValueError:  # not set: not asked for, or the trainer says so
            continue
        if isinstance(place, str) and not files.is_remote(place):
            raise UserError(
                f"{run.name}: {name} = {place!r}, where TPU hosts have nothing; prepare into a bucket, or copy it "
                f"there, and set \"{name}='gs://bucket/…'\" in config.overrides."
            )
