"""Peak memory of converting a large checkpoint, on a synthetic one of T5 1.1 XXL's shape.

    python benchmarks/convert_memory.py --place=/folder/with/50/GB/free

Writes a Hugging Face folder (bfloat16, sharded at 5 GB), converts it to our format and back in processes of their own,
and compares every byte. The bound wanted: 1.5 times the largest tensor + 1 GiB.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from common import RESULTS, environment

from t5x_domain import cli
from t5x_domain.conversion.checkpoint import Checkpoint
from t5x_domain.conversion.formats import open_checkpoint, write_checkpoint
from t5x_domain.conversion.layout import part_shapes
from t5x_domain.conversion.safetensors_files import open_folder
from t5x_domain.conversion.tensors import Tensor
from t5x_domain.models.assemblies import EncoderDecoder
from t5x_domain.models.config import ModelConfig

GIN = Path(__file__).parents[1] / "gin/models/t5_1_1_xxl.gin"


def synthetic(folder: Path, layers: int) -> None:
    """Random bits everywhere (no infinities), so that nothing compresses away."""
    depth = [f"ModelConfig.num_{stack}_layers = {layers}" for stack in ("encoder", "decoder")]
    cli.load_gin([str(GIN)], depth)
    config = ModelConfig()
    block = np.random.default_rng(0).standard_normal(2**22).astype(ml_dtypes.bfloat16)
    dtype = np.dtype(ml_dtypes.bfloat16)

    def tensor(number: int, shape: tuple[int, ...]) -> Tensor:
        def read(index):  # noqa: ANN001, ANN202
            return np.resize(np.roll(block, number), shape)[index]

        return Tensor(shape, dtype, read)

    tensors = {name: tensor(i, shape) for i, (name, shape) in enumerate(part_shapes(EncoderDecoder, config).items())}
    write_checkpoint(Checkpoint("synthetic", EncoderDecoder, config, tensors).checked(), str(folder), "huggingface")


def convert(source: Path, target: Path, to_format: str) -> dict[str, float]:
    """Seconds and the process's peak resident memory in bytes."""
    arguments = [f"--from={source}", f"--to={target}", f"--to_format={to_format}"]
    code = f"import resource, t5x_domain.convert as c\ntry: c.main({arguments!r})\n"
    code += "except SystemExit as done: assert not done.code\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    return {"seconds": time.perf_counter() - start, "peak_bytes": int(done.stdout.split()[-1]) * 1024}


def same_bytes(one: Path, other: Path) -> bool:
    """Whether two folders, whatever their formats, hold the same parameters."""
    a, b = (open_checkpoint(str(folder)).tensors for folder in (one, other))
    return a.keys() == b.keys() and all(a[name].read().tobytes() == b[name].read().tobytes() for name in a)


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--place", required=True, help="a folder for the checkpoints; they are removed afterwards")
    parser.add_argument("--layers", type=int, default=24, help="of each stack (24: 11 billion parameters)")
    parser.add_argument("--output", default=str(RESULTS / "convert_memory.json"))
    flags = parser.parse_args()
    place = Path(flags.place) / "convert_memory"
    place.mkdir(parents=True)
    try:
        synthetic(place / "given", flags.layers)
        tensors = open_folder(place / "given").values()
        largest = max(tensor.nbytes for tensor in tensors)
        result = {
            "parameters": sum(tensor.nbytes for tensor in tensors) // 2,
            "largest_tensor_bytes": largest,
            "bound_bytes": int(1.5 * largest + 2**30),
            "to_native": convert(place / "given", place / "native", "native"),
            "same_bytes": same_bytes(place / "given", place / "native"),
        }
        shutil.rmtree(place / "given")  # room for the next
        result["to_huggingface"] = convert(place / "native", place / "back", "huggingface")
        result["same_bytes"] &= same_bytes(place / "native", place / "back")
    finally:
        shutil.rmtree(place)
    report = {"environment": environment("jax", "orbax-checkpoint", "tensorstore"), "result": result}
    Path(flags.output).write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
