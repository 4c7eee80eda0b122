"""Memory of a device by kind: what a program holds, exactly, and what its compiler adds to that."""

import dataclasses
import math
import re
from typing import Any

import jax

from t5x_domain.planning.hlo import Module
from t5x_domain.planning.program import Program

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a device.

    Attributes:
      parameters, optimizer, batch: the program's arguments, by their shapes and shardings.
      activations: arrays that a loop over layers leaves behind for another loop, so kept from the forward pass for the
        backward pass; None if the program did not compile, or has no such loops.
      temporaries: gradients, gathered parameters and all else that is alive when most is; with `activations` None these
        too.
      other: results beside the state, padding of arguments, the program's code.
      peak: all together.
      limit: what the compiler may use; None if that is not known.
    """

    parameters: float
    optimizer: float
    batch: float
    activations: float | None
    temporaries: float
    other: float
    peak: float
    limit: float | None

    @property
    def fits(self) -> bool:
        """Whether all goes into the device."""
        return self.limit is None or self.peak <= self.limit


def of_compiled(program: Program, compiled: jax.stages.Compiled, module: Module, limit: float | None) -> Memory:
    """Of a program that did compile; `limit` as of `Memory`."""
    found = compiled.memory_analysis()
    parameters, optimizer, batch = _arguments(program)
    kept = kept_activations(module)
    results = found.output_size_in_bytes - found.alias_size_in_bytes
    peak = found.argument_size_in_bytes + results + found.temp_size_in_bytes + found.generated_code_size_in_bytes
    temporaries = found.temp_size_in_bytes - (kept or 0)
    other = peak - parameters - optimizer - batch - found.temp_size_in_bytes
    return Memory(parameters, optimizer, batch, kept, temporaries, other, peak, limit)


def of_refused(program: Program, message: str) -> Memory | None:
    """Of a program that needs more than there is, from its compiler's words; None if they do not say that."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    parameters, optimizer, batch = _arguments(program)
    asked = re.search(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", message)
    needed = re.search(r"HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)", message)
    found = asked or needed
    if found is None:
        return None
    limit = _bytes(found[3], found[4])
    peak = _bytes(found[1], found[2]) + (parameters + optimizer + batch if needed else 0)
    temporaries = max(peak - parameters - optimizer - batch, 0)
    return Memory(parameters, optimizer, batch, None, temporaries, 0, peak, limit)


def kept_activations(module: Module) -> float | None:
    """Bytes of the arrays that one loop writes and another only reads: what a scan over layers keeps for its gradient.

    None without two such loops, as in a model whose layers are unrolled.
    """
    written: dict[tuple[str, int], float] = {}
    read = set()
    for loop in module.loops():
        sizes, in_core, root = loop.element_bytes(), loop.is_in_core(), module.body_root(loop)
        initial = module.origin(loop.operands[0])
        for index, operand in enumerate(root.operands):
            handed_on = module.origin(operand)
            is_read_only = handed_on.opcode == "get-tuple-element" and (
                module.origin(handed_on.operands[0]).opcode == "parameter"
                and handed_on.attribute(r"index=(\d+)") == str(index)
            )
            if not is_read_only:
                written[loop.name, index] = 0 if in_core[index] else sizes[index]
                continue
            source = module.origin(initial.operands[index])
            if source.opcode == "get-tuple-element":
                read.add((module.origin(source.operands[0]).name, int(source.attribute(r"index=(\d+)"))))
    kept = [written[key] for key in read if key in written]
    return sum(kept) if kept else None


def least(program: Program, limit: float | None) -> Memory:
    """What a program holds whatever its compiler does: arguments, and in training all gradients before an update.

    Those may be kept in bfloat16, of which they are made.
    """
    parameters, optimizer, batch = _arguments(program)
    gradients = parameters / 2 if program.steps is None else 0.0
    return Memory(parameters, optimizer, batch, None, gradients, 0, parameters + optimizer + batch + gradients, limit)


def _arguments(program: Program) -> tuple[float, float, float]:
    return device_bytes(program.parameters), device_bytes(program.optimizer), device_bytes(program.batch)


def device_bytes(tree: Any) -> float:
    """Bytes of a tree of shapes with shardings on each device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _bytes(number: str, unit: str) -> float:
    return float(number) * _UNITS[unit]
