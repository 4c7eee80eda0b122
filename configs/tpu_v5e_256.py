r"""T5 1.1 XL on a v5e pod of 256 chips, spot, through Cloud TPU's queued resources.

python -m launch --config=configs/tpu_v5e_256.py --config.tpu_queued.project=mine --dry_run
python -m launch --config=configs/tpu_v5e_256.py --config.tpu_queued.project=mine \
    --config.storage=gs://my-bucket/runs --config.compilation_cache=gs://my-bucket/compiled
python -m launch.status gs://my-bucket/runs
"""

from launch.config import defaults


def get_config():
    config = defaults("tpu_queued")
    config.name = "xl-v5e"
    config.gin_files = ("gin/models/t5_1_1_xl.gin", "gin/mixtures/sample.gin", "gin/runs/pretrain.gin")
    config.overrides = (
        *("TRAIN_STEPS=100000", "BATCH_SIZE=2048", "MeshShape.fsdp=64", "MeshShape.data=4"),
        # Where `prepare` with the same two bindings has put them.
        *("CACHE_DIR='gs://my-bucket/sample'", "VOCABULARY_FILE='gs://my-bucket/sample/vocabulary.model'"),
    )
    config.accelerator = "v5e"
    config.topology = "16x16"
    config.storage = "gs://my-bucket/runs"
    config.compilation_cache = "gs://my-bucket/compiled"
    # The archive is `git archive HEAD | gzip`, copied to the bucket beforehand. Ubuntu 22.04 has Python 3.10; uv brings
    # a newer one.
    config.setup = (
        "mkdir -p t5x_domain && cd t5x_domain",
        "gcloud storage cat gs://my-bucket/t5x_domain.tar.gz | tar xz",
        "test -x ~/.local/bin/uv || curl -LsSf https://astral.sh/uv/install.sh | sh",
        "test -x .venv/bin/python || ~/.local/bin/uv venv --python=3.12 --seed .venv",
        "source .venv/bin/activate",
        "pip install --quiet -c constraints.txt -e '.[tpu,gcp]'",
    )
    config.tpu_queued.project = "my-project"
    config.tpu_queued.zone = "us-west4-a"
    config.tpu_queued.capacity = "spot"
    return config
