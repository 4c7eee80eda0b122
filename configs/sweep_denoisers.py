"""A list of denoisers, each with its own text, as an array job of SLURM, two runs at a time.

python -m t5x_domain.prepare --gin_file=gin/mixtures/sample.gin
python -m launch --config=configs/sweep_denoisers.py --dry_run
python -m launch --config=configs/sweep_denoisers.py
python -m launch.status /shared/t5x_domain/runs/denoisers
"""

from configs import slurm_h200


def get_config():
    config = slurm_h200.get_config()
    config.name = "denoisers"
    config.storage = "/shared/t5x_domain/runs/denoisers"
    config.gin_files = ("gin/models/t5_1_1_base.gin", "gin/mixtures/sample.gin", "gin/runs/pretrain.gin")
    config.overrides = ("TRAIN_STEPS=20000", "MeshShape.fsdp=8")
    config.sweep = (
        ("DENOISERS='t5'",),
        ("DENOISERS='ul2_442'",),
        ("DENOISERS='ul2_442'", "LENGTHS={'inputs': 512, 'targets': 200}", "Run.packing='first_fit'"),
    )
    config.slurm.nodes = 1
    config.slurm.parallel_runs = 2
    return config
