"""T5 1.1 large on 4 nodes of 8 H200 under SLURM, from a login node, in a checkout that all nodes see.

python -m launch --config=configs/slurm_h200.py --dry_run
python -m launch --config=configs/slurm_h200.py --config.slurm.account=mine
python -m launch.status /shared/t5x_domain/runs
"""

from launch.config import defaults


def get_config():
    config = defaults("slurm")
    config.name = "large-h200"
    config.gin_files = ("gin/models/t5_1_1_large.gin", "gin/mixtures/sample.gin", "gin/runs/pretrain.gin")
    # A copy of the parameters in each node, each split over the node's GPUs: NVLink gathers them, not the network.
    config.overrides = ("TRAIN_STEPS=100000", "BATCH_SIZE=2048", "MeshShape.slice=4", "MeshShape.fsdp=8")
    config.accelerator = "gpu"
    config.setup = ("cd /shared/t5x_domain", "source .venv/bin/activate")
    config.storage = "/shared/t5x_domain/runs"
    config.logs = "/shared/t5x_domain/runs/logs"
    config.env.XLA_CLIENT_MEM_FRACTION = ".92"  # of a GPU's memory; JAX takes .75 by default
    config.compilation_cache = "/shared/t5x_domain/compiled"
    config.notice_seconds = 300
    config.slurm.nodes = 4
    config.slurm.gpus_per_node = 8
    config.slurm.cpus_per_task = 12
    config.slurm.time_limit = "2-00:00:00"
    config.slurm.partition = "gpu"
    return config
