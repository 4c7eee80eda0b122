"""Three learning rates by two seeds of the tiny model on this machine, one after the other.

python -m t5x_domain.prepare --gin_file=gin/mixtures/sample.gin
python -m launch --config=configs/sweep_rates.py --dry_run
python -m launch --config=configs/sweep_rates.py
python -m launch.status runs/rates
"""

from configs import local
from launch.sweep import grid


def get_config():
    config = local.get_config()
    config.name = "rates"
    config.storage = "runs/rates"
    config.overrides = (
        *("TRAIN_STEPS=60", "BATCH_SIZE=8", "LENGTHS={'inputs': 128, 'targets': 32}"),
        *("rsqrt.warmup_steps=200", "Run.eval_batches=4"),
    )
    config.sweep = grid({"rsqrt.base": (0.1, 0.3, 1.0), "Run.seed": (0, 1)})
    config.local.processes = 1
    config.local.devices_per_process = 1
    return config
