r"""T5 1.1 XXL on two v6e slices of 64 chips through Cloud TPU's queued resources: a copy of the parameters on each 16.

python -m launch --config=configs/tpu_v6e_multislice.py --config.tpu_queued.project=mine --dry_run
python -m launch --config=configs/tpu_v6e_multislice.py --config.tpu_queued.project=mine --config.slices=4 \
    --config.overrides="('TRAIN_STEPS=100000', 'BATCH_SIZE=2048', 'MeshShape.slice=4', 'MeshShape.fsdp=16', \
    'MeshShape.data=4', \"ModelConfig.remat='minimal'\", \"CACHE_DIR='gs://my-bucket/sample'\", \
    \"VOCABULARY_FILE='gs://my-bucket/sample/vocabulary.model'\")"
"""

from configs import tpu_v5e_256


def get_config():
    config = tpu_v5e_256.get_config()
    config.name = "xxl-v6e"
    config.gin_files = ("gin/models/t5_1_1_xxl.gin", "gin/mixtures/sample.gin", "gin/runs/pretrain.gin")
    config.overrides = (
        *("TRAIN_STEPS=100000", "BATCH_SIZE=1024"),
        *("MeshShape.slice=2", "MeshShape.fsdp=16", "MeshShape.data=4", "ModelConfig.remat='minimal'"),
        # Where `prepare` with the same two bindings has put them.
        *("CACHE_DIR='gs://my-bucket/sample'", "VOCABULARY_FILE='gs://my-bucket/sample/vocabulary.model'"),
    )
    config.accelerator = "v6e"
    config.topology = "8x8"
    config.slices = 2
    config.tpu_queued.zone = "us-east5-b"
    return config
