"""What the verb does: a plan with advice, or a search; then tells it."""

import argparse
import functools
import json
import math
import os
from collections.abc import Sequence

import jax

from t5x_domain.errors import UserError
from t5x_domain.files import path, write_atomically
from t5x_domain.parallel.mesh import MeshShape
from t5x_domain.planning import report
from t5x_domain.planning.advice import advise
from t5x_domain.planning.elsewhere import plan_elsewhere
from t5x_domain.planning.memory import least
from t5x_domain.planning.plan import Case, build
from t5x_domain.planning.program import load
from t5x_domain.planning.search import Choice, meshes, search
from t5x_domain.planning.topologies import Topology


def run(flags: argparse.Namespace, bindings: Sequence[str]) -> int:
    """Plans as the flags of `compile` say; 0 if the run, or something that was searched for, fits, else 1.

    Raises:
      UserError: the topology or the run is not fit for use, or the compiler failed.
    """
    topology = Topology.of(flags.topology, flags.slices)
    topology.require_compiler()
    os.environ.update(topology.environment)  # before libtpu looks, and before JAX has devices
    jax.config.update("jax_platforms", "cpu")  # JAX is imported; of this machine's accelerators nothing is taken
    case = Case(flags.topology, flags.slices, flags.gin_file, bindings, flags.gin_search_path, flags.decode)
    if flags.search:
        return _search(case, topology, flags)
    compile_one = functools.partial(plan_elsewhere, timeout=flags.compile_timeout)
    plan = compile_one(case)
    _tell(report.lines(plan, flags.price))
    written = {"plan": report.as_json(plan)}
    _write(flags.json, written)
    if not plan.fits and not flags.decode and plan.memory is not None:
        planned = load(case.files, case.bindings, case.search_paths)
        attempts = advise(case, plan, planned, compile_one, flags.advice_limit)
        _tell(report.advice_lines(plan, attempts))
        written["advice"] = [{"bindings": a.bindings, "plan": report.as_json(a.plan)} for a in attempts]
        _write(flags.json, written)
    return 0 if plan.fits else 1


def _search(case: Case, topology: Topology, flags: argparse.Namespace) -> int:
    planned = load(case.files, case.bindings, case.search_paths)
    if flags.decode:
        raise UserError("--search: is for train steps; leave --decode out.")

    @functools.cache
    def needs(mesh: MeshShape) -> float:
        choice = Choice(mesh, mesh.slice * mesh.data * mesh.fsdp * planned.accumulation_steps, planned.config.remat)
        return least(build(case.changed(*choice.bindings), topology)[0], None).peak

    rows = sorted(flags.batch_sizes or [planned.batch_size])
    choices = [
        Choice(mesh, batch_size, remat)
        for mesh in meshes(topology.num_devices, topology.slices, planned.config, planned.mesh.sequence)
        for remat in flags.remats or [planned.config.remat]
        for batch_size in rows
        if batch_size % (mesh.slice * mesh.data * mesh.fsdp * planned.accumulation_steps) == 0
    ]
    if not choices:
        raise UserError(
            f"--search: no mesh of {topology.num_devices:,} devices divides {', '.join(map(str, rows))} rows; "
            "give others with --batch_sizes."
        )
    compile_one = functools.partial(plan_elsewhere, timeout=flags.compile_timeout)
    limit = math.inf if topology.memory_limit is None else topology.memory_limit
    ranked = search(
        case, choices, compile_one, needs, limit,
        most=flags.search_limit, tell=lambda line: print(line, flush=True),
    )  # fmt: skip
    _tell(["", *report.search_lines(ranked, flags.price)])
    _write(flags.json, {"search": [report.as_json(plan) for _, plan in ranked]})
    return 0


def _tell(lines: Sequence[str]) -> None:
    for line in lines:
        print(line, flush=True)


def _write(file: str | None, content: dict) -> None:
    if file is None:
        return
    try:
        write_atomically(path(file), json.dumps(content, indent=1).encode())
    except OSError as error:
        raise UserError(f"--json={file}: {error.strerror}; name a file that you may write.") from error
