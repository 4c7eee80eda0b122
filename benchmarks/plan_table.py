"""T5 and UL2 on TPU slices up to 1,024 chips: what `python -m t5x_domain.compile` finds without a TPU.

    python benchmarks/plan_table.py                        # all; those that the result has are left as they are
    python benchmarks/plan_table.py --only v5e --timeout 300

Needs libtpu (`pip install "jax[tpu]==0.11.2"`). Prints a table in Markdown. The rows of an update grow with the
devices, 512 tokens go in and 512 come out, the optimizer is Adafactor.
"""

import argparse
import dataclasses
import json
from pathlib import Path

from common import RESULTS, environment

from t5x_domain.errors import UserError
from t5x_domain.planning.elsewhere import plan_elsewhere
from t5x_domain.planning.plan import Case, Plan
from t5x_domain.planning.report import as_json
from t5x_domain.planning.topologies import Topology

ROOT = Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Model:
    """How a model is run: its gin file, rows of a device, what is recomputed, and over how many devices at least its
    parameters are spread."""

    file: str
    rows: int
    remat: str
    fsdp: int


MODELS = {
    "T5 base": Model("t5_1_1_base", 16, "minimal", 1),
    "T5 XL": Model("t5_1_1_xl", 8, "full", 64),
    "T5 XXL": Model("t5_1_1_xxl", 4, "full", 64),
    "UL2 20B": Model("ul2_20b", 4, "full", 64),
}
# Topologies of each chip and slices of each: 1,024 chips, 256 and 16.
SIZES = {
    "v5e": [("v5e:16x16", 4), ("v5e:16x16", 1), ("v5e:4x4", 1)],
    "v5p": [("v5p:8x8x16", 1), ("v5p:4x8x8", 1), ("v5p:2x2x4", 1)],
    "v6e": [("v6e:16x16", 4), ("v6e:16x16", 1), ("v6e:4x4", 1)],
    "tpu7x": [("tpu7x:8x8x16", 1), ("tpu7x:4x8x8", 1), ("tpu7x:2x2x4", 1)],
}


def case_of(model: Model, name: str, slices: int) -> Case:
    """The train step of a model on a topology: shares of the parameters within a slice, copies beyond."""
    topology = Topology.of(name, slices)
    inner = topology.num_devices // slices
    fsdp = min(model.fsdp, inner)
    bindings = [
        f"MeshShape.slice = {slices}",
        f"MeshShape.data = {inner // fsdp}",
        f"MeshShape.fsdp = {fsdp}",
        f"BATCH_SIZE = {model.rows * topology.num_devices}",
        "LENGTHS = {'inputs': 512, 'targets': 512}",
        f"ModelConfig.remat = {model.remat!r}",
    ]
    files = [str(ROOT / "gin/models" / f"{model.file}.gin"), str(ROOT / "gin/runs/pretrain.gin")]
    return Case(name, slices, files, bindings)


def row(name: str, found: dict) -> str:
    """A line of the table."""
    plan = Plan.of_json(found)
    gib = lambda size: "" if size is None else f"{size / 2**30:.1f}"  # noqa: E731
    cells = [name, plan.topology, f"{plan.num_chips:,}", f"{plan.batch_size:,}"]
    if plan.memory is None:
        return " | ".join([*cells, plan.problem])
    memory = plan.memory
    cells += map(gib, (memory.parameters + memory.optimizer, memory.activations, memory.temporaries, memory.peak))
    cells += [gib(memory.limit), "yes" if plan.fits else "no"]
    cells += [f"{plan.bounds.step:.3f} ({plan.bounds.largest})" if plan.bounds else ""]
    return " | ".join([*cells, f"{plan.compile_seconds:.0f}", gib(plan.compiler_bytes)])


def main() -> None:
    """Compiles one after the other and writes what is known after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SIZES, default=list(SIZES), help="chips")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--timeout", type=float, default=900, help="seconds of a compilation")
    parser.add_argument("--output", type=Path, default=RESULTS / "plan_table.json")
    flags = parser.parse_args()
    written = json.loads(flags.output.read_text()) if flags.output.exists() else {"plans": {}}
    for number in range(len(SIZES["v5e"])):
        for model in flags.models:
            for chip in flags.only:
                name, slices = SIZES[chip][number]
                key = f"{model} on {Topology.of(name, slices).name}"
                if key in written["plans"]:
                    continue
                try:
                    plan = plan_elsewhere(case_of(MODELS[model], name, slices), timeout=flags.timeout)
                except UserError as error:
                    print(f"{key}: {error}", flush=True)
                    continue
                written["plans"][key] = as_json(plan)
                written["environment"] = environment("jax", "libtpu")
                flags.output.write_text(json.dumps(written, indent=1) + "\n")
                print(row(model, written["plans"][key]), flush=True)
    columns = (
        "model | slice | chips | rows | parameters and optimizer | activations kept | temporaries | all | of | fits"
    )
    columns += " | step at least (s) | compile (s) | compiler"
    print("\n" + columns + "\n" + " | ".join(["---"] * (columns.count("|") + 1)))
    for key, found in sorted(written["plans"].items()):
        print(row(key.split(" on ")[0], found))


if __name__ == "__main__":
    main()
