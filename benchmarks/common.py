"""What every benchmark says of the machine, and what a train step costs by formula."""

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def environment(*packages):
    """Date, processor, cores, tunables of the C library, and the versions of `packages`."""
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "cpu": cpu.partition(":")[2].strip() or platform.processor(),
        "cores": os.cpu_count(),
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
    }


def train_step_flops(config, batch_size, inputs, targets):
    """Floating-point operations of forward and backward pass of an encoder-decoder: 2 a multiply-add, backward twice
    the forward pass, attention in full (its upper triangle is computed too), nothing but matrix products counted.
    """
    heads, kv_heads = config.num_heads * config.head_dim, config.kv_heads * config.head_dim
    projections = 2 * config.embed_dim * (heads + kv_heads)
    mlp = (len(config.mlp_activations) + 1) * config.embed_dim * config.mlp_dim
    encoder = inputs * (projections + mlp) + 2 * inputs * inputs * heads
    memory = inputs * 2 * config.embed_dim * kv_heads  # keys and values of cross-attention
    decoder = targets * (projections + 2 * config.embed_dim * heads + mlp) + memory
    decoder += 2 * targets * targets * heads + 2 * targets * inputs * heads
    layers = config.num_encoder_layers * encoder + config.num_decoder_layers * decoder
    return 3 * 2 * batch_size * (layers + targets * config.embed_dim * config.vocab_size)
