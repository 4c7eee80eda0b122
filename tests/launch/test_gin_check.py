"""What gin says, held against the machines of a configuration."""

import ast
import shlex

import pytest

from configs import gke_jobset, local, slurm_h200, sweep_denoisers, sweep_rates, tpu_v5e_256, tpu_v6e_multislice, xpk
from launch.gin_check import require_that_gin_fits
from t5x_domain.errors import UserError

ALL = (gke_jobset, local, slurm_h200, sweep_denoisers, sweep_rates, tpu_v5e_256, tpu_v6e_multislice, xpk)
TPUS = (gke_jobset, tpu_v5e_256, tpu_v6e_multislice, xpk)


@pytest.mark.parametrize("file", ALL, ids=lambda file: file.__name__)
def test_every_config_of_ours_fits(file):
    require_that_gin_fits(file.get_config())


@pytest.mark.parametrize("file", TPUS, ids=lambda file: file.__name__)
@pytest.mark.parametrize("name", ["CACHE_DIR", "VOCABULARY_FILE"])
def test_tpus_read_from_buckets(file, name):
    config = file.get_config()
    config.overrides = tuple(binding for binding in config.overrides if not binding.startswith(f"{name}="))
    with pytest.raises(UserError, match=f"{name} = 'cache/sample.*', where TPU hosts have nothing"):
        require_that_gin_fits(config)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (tpu_v6e_multislice, {"slices": 4}, "MeshShape.slice = 2, but config.slices = 4"),
        (tpu_v5e_256, {"slices": 2}, "MeshShape.slice = 1, but config.slices = 2"),
        (tpu_v5e_256, {"topology": "8x16"}, "cannot be laid over the 128 devices"),
        (gke_jobset, {"accelerator": "tpu7x"}, "cannot be laid over the 256 devices"),  # 64 chips of two, twice
        (local, {"overrides": ("MeshShape.fsdp=3", "TRAIN_STEPS=1")}, "cannot be laid over the 4 devices"),
        (slurm_h200, {"sweep": (("MeshShape.fsdp=5",),)}, r"large-h200-MeshShape.fsdp=5: MeshShape\(.*32 devices"),
    ],
)
def test_the_mesh_is_of_the_machines(file, changes, message):
    config = file.get_config()
    config.update(changes)
    with pytest.raises(UserError, match=message):
        require_that_gin_fits(config)


def test_the_command_that_replaces_overrides_fits():
    words = shlex.split(tpu_v6e_multislice.__doc__.rpartition("python -m launch")[2].replace("\\\n", ""))
    flags = dict(word.removeprefix("--config.").split("=", 1) for word in words if word.startswith("--config."))
    config = tpu_v6e_multislice.get_config()
    config.slices, config.overrides = int(flags["slices"]), ast.literal_eval(flags["overrides"])
    assert config.slices == 4
    require_that_gin_fits(config)
