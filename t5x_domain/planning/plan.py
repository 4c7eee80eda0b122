"""One program compiled for one topology: what it takes of a device, of the networks, and of the compiler."""

import dataclasses
import resource
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from t5x_domain import cli
from t5x_domain.inference.decoding import Decoding
from t5x_domain.planning import memory as memories
from t5x_domain.planning import program as programs
from t5x_domain.planning.bounds import Bounds, bounds, touched_by_decoding, touched_by_training
from t5x_domain.planning.collectives import Collective, collectives
from t5x_domain.planning.hlo import Module
from t5x_domain.planning.memory import Memory
from t5x_domain.planning.topologies import Topology


@dataclasses.dataclass(frozen=True)
class Case:
    """What to compile.

    Attributes:
      topology, slices: see `Topology.of`.
      files, bindings, search_paths: gin, as a run has them.
      decode: the program that writes answers instead of the train step.
    """

    topology: str
    slices: int
    files: Sequence[str]
    bindings: Sequence[str]
    search_paths: Sequence[str] = ()
    decode: bool = False

    def changed(self, *bindings: str) -> "Case":
        """With further bindings, which take the place of earlier ones."""
        return dataclasses.replace(self, bindings=(*self.bindings, *bindings))


@dataclasses.dataclass(frozen=True)
class Plan:
    """What came of it.

    Attributes:
      topology: its name.
      num_devices, num_chips: of all slices.
      program: "train" or "decode".
      mesh: devices along each axis.
      batch_size, accumulation_steps, remat: of the run.
      num_parameters, tokens, flops: see `programs.Program`.
      memory: of a device; None if the compiler failed otherwise than for want of memory.
      collectives: of a step, largest first; empty if it did not compile.
      bounds: seconds of a step; None for a CPU, or if it did not compile.
      compile_seconds: tracing, lowering and compiling.
      compiler_bytes: the compiling process at its largest.
      problem: why it did not compile; None if it did.
    """

    topology: str
    num_devices: int
    num_chips: int
    program: str
    mesh: Mapping[str, int]
    batch_size: int
    accumulation_steps: int
    remat: str
    num_parameters: int
    tokens: int
    flops: float
    memory: Memory | None
    collectives: Sequence[Collective]
    bounds: Bounds | None
    compile_seconds: float
    compiler_bytes: int
    problem: str | None = None

    @property
    def fits(self) -> bool:
        """Whether it compiles and goes into the devices."""
        return self.problem is None and self.memory is not None and self.memory.fits

    @property
    def tokens_per_second(self) -> float:
        """At most; 0 without bounds."""
        return self.tokens / self.bounds.step if self.bounds is not None else 0.0

    @classmethod
    def of_json(cls, fields: Mapping[str, Any]) -> "Plan":
        """From what `dataclasses.asdict` or `report.as_json` gives."""
        fields = {field.name: fields[field.name] for field in dataclasses.fields(cls)}
        parts = {"memory": Memory, "bounds": Bounds}
        found = {name: fields[name] and part(**fields[name]) for name, part in parts.items()}
        found["collectives"] = [Collective(**collective) for collective in fields["collectives"]]
        return cls(**{**fields, **found})


def plan(case: Case) -> Plan:
    """Compiles in this process, whose environment is to be the topology's.

    What has no room for its parameters, gradients and optimizer is not compiled.

    Raises:
      UserError: the topology is not known, its compiler is not installed, or the run cannot be on it.
    """
    topology = Topology.of(case.topology, case.slices)
    topology.require_compiler()
    program, run = build(case, topology)
    limit = topology.memory_limit
    began = time.perf_counter()
    memory, sent, least = memories.least(program, limit), [], None
    if not memory.fits:
        problem = "not compiled: there is no room for parameters, gradients and optimizer"
    else:
        compiled, problem = _compile(program, topology)
        if compiled is None:
            memory = memories.of_refused(program, problem)
        else:
            module = Module.of(compiled.as_text())
            memory = memories.of_compiled(program, compiled, module, limit)
            sent = collectives(module, topology.num_devices, topology.slices)
            least = _bounds(program, topology, memory, sent)
    return Plan(
        topology=topology.name,
        num_devices=topology.num_devices,
        num_chips=topology.num_chips,
        program="decode" if case.decode else "train",
        mesh=dict(program.mesh.shape),
        batch_size=run.batch_size,
        accumulation_steps=run.accumulation_steps,
        remat=run.config.remat,
        num_parameters=program.num_parameters,
        tokens=program.tokens,
        flops=program.flops,
        memory=memory,
        collectives=sent,
        bounds=least,
        compile_seconds=time.perf_counter() - began,
        compiler_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        problem=problem,
    )


def _bounds(program: programs.Program, topology: Topology, memory: Memory, sent: Sequence[Collective]) -> Bounds | None:
    if topology.chip is None:
        return None
    if program.steps is None:
        touched = touched_by_training(memory)
    else:
        touched = touched_by_decoding(memory, program.read_by_step, program.steps)
    return bounds(topology.chip, topology.num_devices, program.flops, touched, sent)


def build(case: Case, topology: Topology) -> tuple[programs.Program, programs.PlannedRun]:
    """The program of a case on its mesh, not yet compiled, and its run. Raises UserError as `plan` does."""
    run = programs.load(case.files, case.bindings, case.search_paths)
    mesh = run.mesh.build(topology.devices)
    if case.decode:
        return programs.decode_step(run, cli.build(Decoding), mesh), run
    return programs.train_step(run, mesh), run


def _compile(program: programs.Program, topology: Topology) -> tuple[jax.stages.Compiled | None, str | None]:
    """The compiled program, or what its compiler has to say."""
    # Kernels ask for the chip while they are traced, through the mesh in context.
    with jax.sharding.use_abstract_mesh(program.mesh.abstract_mesh):
        lowered = program.function.trace(*program.arguments).lower(lowering_platforms=(topology.platform,))
        try:
            return lowered.compile(), None
        except jax.errors.JaxRuntimeError as error:
            return None, " ".join(str(error).split())[:1000]
