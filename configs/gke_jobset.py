"""T5 1.1 XL on two v5p slices of 64 chips on a GKE cluster with JobSet 0.10 or newer, a node pool for each slice.

python -m launch --config=configs/gke_jobset.py --dry_run
python -m launch --config=configs/gke_jobset.py --config.image=us-docker.pkg.dev/mine/repository/t5x_domain:1
kubectl get jobsets
"""

from launch.config import defaults


def get_config():
    config = defaults("gke_jobset")
    config.name = "xl-v5p"
    config.gin_files = ("gin/models/t5_1_1_xl.gin", "gin/mixtures/sample.gin", "gin/runs/pretrain.gin")
    config.overrides = (
        *("TRAIN_STEPS=100000", "BATCH_SIZE=2048"),
        *("MeshShape.slice=2", "MeshShape.fsdp=16", "MeshShape.data=4"),
        # Where `prepare` with the same two bindings has put them.
        *("CACHE_DIR='gs://my-bucket/sample'", "VOCABULARY_FILE='gs://my-bucket/sample/vocabulary.model'"),
    )
    config.accelerator = "v5p"
    config.topology = "4x4x4"
    config.slices = 2
    config.image = "us-docker.pkg.dev/my-project/my-repository/t5x_domain:latest"
    config.storage = "gs://my-bucket/runs"
    config.compilation_cache = "gs://my-bucket/compiled"
    return config
