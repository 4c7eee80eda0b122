"""Compiled programs as text (XLA's HLO), read as far as a plan needs: instructions, loops, and how often each runs."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8, "u64": 8,
    "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "f8e4m3fn": 1, "f8e5m2": 1, "c64": 8,
}  # fmt: skip
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations|called_computations)=\{?((?:%[\w.\-]+(?:, )?)+)")
# Those hand on a buffer as it is, or as a copy of it.
_SAME = {"copy", "bitcast", "reshape", "transpose", "copy-start", "copy-done", "optimization-barrier", "convert"}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: unique in the module.
      shape: of the result as written, layouts included.
      opcode: what is done.
      rest: operands and attributes as written.
      is_root: whether its result is the computation's.
    """

    name: str
    shape: str
    opcode: str
    rest: str
    is_root: bool

    @functools.cached_property
    def operands(self) -> list[str]:
        """Names of the instructions whose results it takes."""
        return re.findall(r"%([\w.\-]+)", self.rest.split(")", 1)[0])

    @property
    def called(self) -> list[str]:
        """Names of the computations that run within it, a loop's condition excepted."""
        return [name for group in _CALLED.findall(self.rest) for name in re.findall(r"%([\w.\-]+)", group)]

    def attribute(self, pattern: str) -> str | None:
        """The first group of a regular expression in what is written behind the opcode."""
        found = re.search(pattern, self.rest)
        return None if found is None else found[1]

    def element_bytes(self) -> list[float]:
        """Bytes of each array of the result."""
        return [_array_bytes(*found) for found in _ARRAY.findall(self.shape)]

    def is_in_core(self) -> list[bool]:
        """Whether each array of the result lies in a core's own memory, not in the device's main memory."""
        return ["S(" in layout for _, _, layout in _ARRAY.findall(self.shape)]


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program.

    Attributes:
      computations: instructions by computation.
      entry: where it begins.
    """

    computations: dict[str, list[Instruction]]
    entry: str

    @classmethod
    def of(cls, text: str) -> "Module":
        """Reads what `jax.stages.Compiled.as_text` gives."""
        computations: dict[str, list[Instruction]] = {}
        entry, current = "", None
        for line in text.splitlines():
            if match := _INSTRUCTION.match(line):
                if current is not None:
                    current.append(Instruction(match[2], match[3], match[4], match[5], bool(match[1])))
            elif match := _COMPUTATION.match(line):
                current = computations.setdefault(match[2], [])
                entry = match[2] if match[1] else entry
        return cls(computations, entry)

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        """Every instruction."""
        return {found.name: found for lines in self.computations.values() for found in lines}

    @functools.cached_property
    def turns(self) -> dict[str, int]:
        """How often each computation runs: a loop's body as often as the loop turns."""
        result: dict[str, int] = {}

        def visit(name: str, times: int) -> None:
            result[name] = result.get(name, 0) + times
            for instruction in self.computations.get(name, ()):
                inner = times * self.trip_count(instruction) if instruction.opcode == "while" else times
                for called in instruction.called:
                    visit(called, inner)

        visit(self.entry, 1)
        return result

    def running(self) -> Iterator[tuple[Instruction, str, int]]:
        """Every instruction that runs, the computation it stands in, and how often."""
        for name, times in self.turns.items():
            for instruction in self.computations.get(name, ()):
                yield instruction, name, times

    def loops(self) -> list[Instruction]:
        """All loops."""
        return [instruction for instruction, _, _ in self.running() if instruction.opcode == "while"]

    def body_root(self, loop: Instruction) -> Instruction:
        """What a loop's body hands to the next turn."""
        body = self.computations[loop.attribute(r"body=%([\w.\-]+)")]
        return next(instruction for instruction in body if instruction.is_root)

    def trip_count(self, loop: Instruction) -> int:
        """How often a loop turns at most: as the compiler notes it, or by the bound that its condition compares to.

        1 if it has none.
        """
        if (known := loop.attribute(r'known_trip_count":\{"n":"(\d+)"')) is not None:
            return int(known)
        condition = self.computations.get(loop.attribute(r"condition=%([\w.\-]+)"), [])
        numbers = [line for line in condition if line.shape.startswith("s32[]")]
        bounds = [_constant(line) for line in numbers if line.opcode == "constant"]
        counters = [line for line in numbers if line.opcode == "get-tuple-element"]
        begins = 0
        if len(counters) == 1:  # else it counts from 0, as what JAX makes of a scan does
            initial = self.origin(loop.operands[0]).operands
            start = self.origin(initial[int(counters[0].attribute(r"index=(\d+)"))])
            begins = _constant(start) if start.opcode == "constant" else 0
        return max([bound - begins for bound in bounds] or [1])

    def origin(self, name: str) -> Instruction:
        """The instruction that made what `name` hands on."""
        instruction = self.by_name[name]
        while instruction.opcode in _SAME and instruction.operands:
            instruction = self.by_name[instruction.operands[0]]
        return instruction


def _array_bytes(dtype: str, dimensions: str, layout: str) -> float:
    """A token's are 0."""
    return _BYTES.get(dtype, 0) * math.prod(int(n) for n in dimensions.split(",") if n)


def _constant(instruction: Instruction) -> int:
    return int(instruction.rest.split(")", 1)[0])
