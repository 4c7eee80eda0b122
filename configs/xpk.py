"""T5 1.1 XL on a v6e slice of 256 chips of a GKE cluster that xpk has made.

python -m launch --config=configs/xpk.py --config.xpk.cluster=mine --dry_run
python -m launch --config=configs/xpk.py --config.xpk.cluster=mine --config.xpk.project=mine
xpk workload list --cluster=mine
"""

from launch.config import defaults


def get_config():
    config = defaults("xpk")
    config.name = "xl-v6e"
    config.gin_files = ("gin/models/t5_1_1_xl.gin", "gin/mixtures/sample.gin", "gin/runs/pretrain.gin")
    config.overrides = (
        *("TRAIN_STEPS=100000", "BATCH_SIZE=2048", "MeshShape.fsdp=64", "MeshShape.data=4"),
        # Where `prepare` with the same two bindings has put them.
        *("CACHE_DIR='gs://my-bucket/sample'", "VOCABULARY_FILE='gs://my-bucket/sample/vocabulary.model'"),
    )
    config.accelerator = "v6e"
    config.topology = "16x16"
    config.image = "us-docker.pkg.dev/my-project/my-repository/t5x_domain:latest"
    config.storage = "gs://my-bucket/runs"
    config.compilation_cache = "gs://my-bucket/compiled"
    config.max_restarts = 100  # xpk counts preemptions among them
    config.xpk.cluster = "my-cluster"
    config.xpk.project = "my-project"
    config.xpk.zone = "us-east5-b"
    return config
