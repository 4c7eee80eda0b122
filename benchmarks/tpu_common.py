"""Compiles for TPUs without having one, and reads from the compiler what a step of a kernel costs.

libtpu compiles for a named topology on any machine (`pip install "jax[tpu]==0.11.2"`; nothing is run). Asked by two
flags of its own, it writes out every kernel's final instruction bundles with the units they use. A TensorCore issues
one bundle a cycle, so their count is a lower bound of the kernel's cycles: stalls of DMA and of the matrix unit are not
in it. It serves to compare kernels, not to predict a share of peak.

Those flags are read when libtpu is loaded, so what is compiled is compiled in another process: `compile_all` starts
this file with the cases as JSON, and reads what `_serve` prints.
"""

import collections
import dataclasses
import importlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from t5x_domain.planning.topologies import Topology

UNITS = ("MXU", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "FILL", "VSTORE", "SPILL", "SALU")


# The smallest slice of each chip that libtpu describes, and bytes of vector memory of a TensorCore.
SMALLEST = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
VMEM = {"v4": 16 << 20, "v5e": 128 << 20, "v5p": 64 << 20, "v6e": 128 << 20, "tpu7x": 64 << 20}


def compile_all(cases, *, bundles=False):
    """Compiles cases in one process of their own, since loading libtpu costs more than a small kernel.

    Args:
      cases: dicts of plain JSON: "chip", one of SMALLEST; "builder", "module:function" beside this file, which is
        called with the topology's devices and the case's "arguments" and gives (function, arguments with shardings) or
        (function, arguments, mesh of the shardings); perhaps "topology", a larger slice than the chip's smallest, e.g.
        "v5e:4x4".
      bundles: also count the bundles of each Pallas kernel.

    Yields:
      For each case {"seconds", "memory": bytes by kind, "buffers": see `hbm_buffers`, "vmem": see `scoped_vmem`,
      "kernels": see `kernel_bundles`, if asked for}, or {"error": the compiler's words}.
    """
    with tempfile.TemporaryDirectory() as dump:
        environment = os.environ | Topology.of("v5e:2x2").environment
        if bundles:
            flags = {"dump_to": dump, "dump_llo_text": "true", "dump_llo_pass_label_regex": _DUMPED}
            environment["LIBTPU_INIT_ARGS"] = " ".join(f"--xla_jf_{key}={value}" for key, value in flags.items())
        command = [sys.executable, __file__, json.dumps({"cases": list(cases), "dump": dump if bundles else None})]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                if line.startswith(_ANSWER):
                    yield json.loads(line.removeprefix(_ANSWER))
        if process.returncode:
            raise RuntimeError(f"the compiling process ended with {process.returncode}")


_ANSWER = "compiled: "
_DUMPED = ".*final.*"  # of the hundred stages of a kernel, the last


def _serve(cases, dump):
    for case in cases:
        try:
            report = _compile(dump and Path(dump), **case)
        except Exception as error:  # whatever the compiler or the builder has to say
            report = {"error": f"{type(error).__name__}: {error}"[-4000:]}
        print(_ANSWER + json.dumps(report), flush=True)


def _compile(dump, chip, builder, arguments, topology=None):
    import jax

    devices = Topology.of(topology or SMALLEST[chip]).devices
    module, _, name = builder.partition(":")
    began = time.perf_counter()
    function, shapes, *mesh = getattr(importlib.import_module(module), name)(devices=devices, **arguments)
    # Kernels ask for the chip while they are traced, through the mesh in context.
    context = mesh[0].abstract_mesh if mesh else abstract_mesh(devices)
    with jax.sharding.use_abstract_mesh(context):
        traced = (function if hasattr(function, "trace") else jax.jit(function)).trace(*shapes)
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    report = {
        "seconds": round(time.perf_counter() - began, 2),
        "memory": {
            kind: getattr(memory, f"{kind}_size_in_bytes")
            for kind in ("argument", "output", "alias", "temp", "generated_code")
        },
        "buffers": hbm_buffers(text),
        "vmem": scoped_vmem(text),
    }
    if dump:
        report["kernels"] = kernel_bundles(dump, report["vmem"])
        for file in dump.iterdir():
            file.unlink()
    return report


def abstract_mesh(devices):
    """A mesh of one device that only says which chip it is."""
    import jax

    kind = jax.sharding.AbstractDevice(device_kind=devices[0].device_kind, num_cores=1, platform="tpu")
    return jax.sharding.AbstractMesh((1,), ("x",), abstract_device=kind)


# --- compiled HLO


_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\(")
# Those name a buffer that another instruction made, or none.
_NO_BUFFER = {"get-tuple-element", "tuple", "bitcast", "constant", "while", "conditional", "call", "opt-barrier"}


def hbm_buffers(hlo):
    """[[bytes, dtype, shape]] of all arrays that instructions outside of fusions make in HBM, largest first."""
    found, fused = set(), False
    for line in hlo.splitlines():
        if line and not line[0].isspace():
            fused = line.startswith(("%fused", "fused", "%bitcast_fusion", "bitcast_fusion"))
        match = _INSTRUCTION.match(line)
        if fused or match is None or match[2] in _NO_BUFFER:
            continue
        for dtype, dimensions, layout in _ARRAY.findall(match[1]):
            shape = tuple(int(n) for n in dimensions.split(",") if n)
            if dtype in _BYTES and "S(" not in layout:  # S(1) is VMEM
                found.add((_BYTES[dtype] * math.prod(shape), dtype, shape))
    return [[size, dtype, list(shape)] for size, dtype, shape in sorted(found, reverse=True)]


def quadratic(buffers, length):
    """Those buffers that grow with the square of `length`: two axes of at least half of it."""
    return [b for b in buffers if sum(n >= length // 2 for n in b[2]) > 1 and b[0]]


def scoped_vmem(hlo):
    """{Pallas kernel: bytes of VMEM that it is given}."""
    found = {}
    for line in hlo.splitlines():
        if 'custom_call_target="tpu_custom_call"' in line:
            name = re.match(r"\s*(?:ROOT )?%?([\w\-]+)", line)[1]
            sizes = re.findall(r'"memory_space":"1","offset":"\d+","size":"(\d+)"', line)
            found[name] = max([found.get(name, 0), *map(int, sizes)])
    return found


# --- bundles


@dataclasses.dataclass
class Piece:
    """Bundles [start, stop) of a kernel that run or not together: a loop's body or a branch; and the pieces in it."""

    start: int
    stop: int
    trips: int | None = 1  # None: known at run time only
    is_loop: bool = False
    children: list = dataclasses.field(default_factory=list)

    def add(self, piece):
        """Puts `piece` where it belongs, taking in those of the children that are inside it."""
        for child in self.children:
            if child.start <= piece.start and piece.stop <= child.stop:
                return child.add(piece)
        inside = [c for c in self.children if piece.start <= c.start and c.stop <= piece.stop]
        piece.children = inside
        self.children = [c for c in self.children if c not in inside] + [piece]


def kernel_bundles(dump, names):
    """{kernel: cost} of the Pallas kernels `names` in a dump of libtpu's.

    A cost is {"total": bundles in all, "steps": paths, "branches": pieces}. A path is one way through the body of the
    loop over the grid that does matrix products: what each step takes, and one branch with products where there are
    several to choose from, e.g. for blocks that need a mask and for blocks that need none; paths are in the order of
    the program. Branches without products, which run on some steps (the first of a row, the last, a DMA), are not in
    the paths but listed by themselves. Both have their bundles and how often they use each unit.
    """
    costs = {}
    for final in dump.glob("*-final_bundles.txt"):
        stem, kernel = re.match(r"(\d+-(.+?)(?:\.\d+)?)-\d+-(?:schedule|final)", final.name).groups()
        if kernel in names and "schedule-analysis" not in final.name:
            (used,) = (f for f in dump.glob("*final_hlo-static*") if f.name.startswith(stem))
            costs[kernel] = _cost(final.read_text(), used.read_text())
    return costs


def _cost(final, used):
    table = used.partition("== UTILIZATION:")[2].splitlines()
    rows = [[int(n) for n in line.split()] for line in table if line.strip()]
    bundles = _bundles(final)
    if len(bundles) != len(rows):
        raise ValueError(f"{len(bundles)} bundles, but {len(rows)} rows of utilization")
    kernel = _pieces(bundles)
    matmuls = lambda piece: any(row[0] for row in rows[piece.start : piece.stop])  # noqa: E731

    loop = kernel
    while True:
        inner = [c for c in _loops(loop) if matmuls(c) and (loop is kernel or c.trips is None)]
        if len(inner) != 1:
            break
        loop = inner[0]

    def own(piece):
        inside = [(c.start, c.stop) for c in piece.children]
        return [i for i in range(piece.start, piece.stop) if not any(a <= i < b for a, b in inside)]

    def count(indices):
        units = collections.Counter()
        for i in indices:
            units.update({unit: n for unit, n in zip(UNITS, rows[i], strict=True) if n})
        units["bundles"] = len(indices)
        return units

    branches = []

    def paths(piece):
        here, choices = count(own(piece)), []
        for child in sorted(piece.children, key=lambda c: c.start):
            if child.is_loop:
                (body,) = paths(child)
                here.update({unit: n * (child.trips or 1) for unit, n in body.items()})
            elif matmuls(child):
                choices += paths(child)
            else:
                branches.append(dict(count(range(child.start, child.stop))))
        return [here + choice for choice in choices] or [here]

    steps = paths(loop)
    return {"total": len(rows), "steps": [dict(s) for s in steps], "branches": branches}


def _loops(piece):
    """The nearest loops below `piece`."""
    for child in piece.children:
        if child.is_loop:
            yield child
        else:
            yield from _loops(child)


def _bundles(final):
    """The text of every bundle, comments included."""
    bundles = []
    for line in final.splitlines():
        if re.match(r"\s*(?:0x[0-9a-f]+|0)\s+(?:\w\w)?\s*:", line):
            bundles.append(line)
        elif bundles:
            bundles[-1] += "\n" + line
    return bundles


_DELAY_SLOTS = 4  # bundles after a branch that run whether it is taken or not


def _pieces(bundles):
    """The kernel as a tree: a jump back is a loop, a jump ahead leaves out a branch."""
    kernel = Piece(0, len(bundles))
    starts, labels = {}, []
    for i, text in enumerate(bundles):
        for name in re.findall(r"Start(?:/End empty)? region (\d+)", text):
            starts[name] = i
        if re.match(r"\s*\w+ \w\w\s*:", text):
            labels.append(i)
    for i, text in enumerate(bundles):
        for target in re.findall(r"sbr\.rel (?:\([^)]*\) )?target = \$region(\d+)", text):
            # A region may start before its label, with what the scheduler has moved up over it; the last has no code.
            to = next((label for label in labels if label >= starts.get(target, len(bundles))), len(bundles))
            if to <= i:
                trips = re.search(r", (\d+) /\* loop exit test", "\n".join(bundles[max(to, i - 40) : i + 1]))
                stop = min(i + 1 + _DELAY_SLOTS, next((label for label in labels if label > i), len(bundles)))
                kernel.add(Piece(to, stop, int(trips[1]) if trips else None, is_loop=True))
            elif to > i + 1 + _DELAY_SLOTS:
                kernel.add(Piece(i + 1 + _DELAY_SLOTS, to))
    return kernel


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    _serve(**json.loads(sys.argv[1]))
