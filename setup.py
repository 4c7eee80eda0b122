"""Installation. Ranges are those the test suite was run with; constraints.txt holds the exact versions `make` uses."""

from pathlib import Path

from setuptools import find_packages, setup

# The gin files live at the top of the repository, where a reader looks for them, and are installed inside the package,
# where an installed `t5x_domain` finds them.
GIN_FILES = [str(path.relative_to("gin")) for path in sorted(Path("gin").rglob("*.gin"))]

setup(
    name="t5x_domain",
    version="0.1.0",
    description="Pretrain and adapt transformers to a domain with JAX on TPU and GPU meshes",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.12",
    packages=[*find_packages(include=["t5x_domain", "t5x_domain.*"]), "t5x_domain.gin"],
    package_dir={"t5x_domain": "t5x_domain", "t5x_domain.gin": "gin"},
    package_data={"t5x_domain.gin": GIN_FILES},
    install_requires=[
        "jax>=0.11.2,<0.13",
        "flax>=0.12.10,<0.13",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.0,<0.13",
        "grain>=0.2.16,<0.3",
        "array_record>=0.8.3,<0.9",
        # 0.2.3 is built for protobuf 7, which Apache Beam does not accept yet.
        "sentencepiece>=0.2.1,<0.2.3",
        "seqio>=0.0.20,<0.1",
        "tensorflow-datasets>=4.9.9,<5",
        "tensorflow>=2.20,<2.22",
        "ml_collections>=1.0,<2",
        "gin-config>=0.5,<0.6",
        "numpy>=2.1,<3",
        "ml_dtypes>=0.5",
        "tensorstore>=0.1.74",
        "etils>=1.12",
        "pyyaml>=6",
        "fsspec>=2026.9",
        "pyarrow>=18",
        "zstandard>=0.23",
        "tensorboardX>=2.6,<3",
        "matplotlib>=3.9",
        "tqdm>=4.66",
        "scipy>=1.13",
        "scikit-learn>=1.5",
        "rouge-score>=0.1.2",
        "sacrebleu>=2.4",
        "seqeval>=1.2.2",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.11.2,<0.13"],
        "cuda": ["jax[cuda13]>=0.11.2,<0.13"],
        "gcp": ["gcsfs>=2026.9"],
        "aws": ["s3fs>=2026.9"],
        "beam": ["apache-beam>=2.70"],
        "hf": ["torch>=2.6", "transformers>=4.50"],
        "wandb": ["wandb>=0.19"],
        "dev": [
            "apache-beam>=2.70",
            "hypothesis>=6.100",
            # JobSet's and Kubernetes' published schemas, against which the tests hold manifests.
            "kubeflow-trainer-api>=2.3",
            "pytest>=8",
            "pytest-xdist>=3.5",
            "pytest-timeout>=2.3",
            "ruff>=0.15",
            "safetensors>=0.5",
            "tokenizers>=0.21",
            "tensorboard>=2.19",
            # Buckets, and servers of their protocols for the tests.
            "gcsfs>=2026.9",
            "s3fs>=2026.9",
            "flask>=3",
            "flask-cors>=6",
            "gcp-storage-emulator>=2026.7",
            "moto[s3]>=5.2",
        ],
    },
    entry_points={"console_scripts": ["t5x-domain=t5x_domain.cli:main"]},
)
