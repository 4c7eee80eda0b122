"""The shipped sample on this machine: two processes of two virtual CPU devices each, a tiny model, a few minutes.

python -m t5x_domain.prepare --gin_file=gin/mixtures/sample.gin
python -m launch --config=configs/local.py
python -m launch --config=configs/local.py --config.local.processes=1 --config.name=alone
python -m launch.status runs
"""

from launch.config import defaults


def get_config():
    config = defaults("local")
    config.name = "local"
    config.gin_files = ("gin/models/tiny.gin", "gin/mixtures/sample.gin", "gin/runs/pretrain.gin")
    config.overrides = ("TRAIN_STEPS=200", "BATCH_SIZE=16", "MeshShape.fsdp=2", "Run.checkpoint_every=50")
    config.local.processes = 2
    config.local.devices_per_process = 2
    return config
