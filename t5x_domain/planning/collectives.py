"""What the devices of a compiled program send to one another in a step, and over which network."""

import dataclasses
import math
import re
from typing import Literal

import numpy as np

from t5x_domain.planning.hlo import Instruction, Module

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of a kind over groups of a size.

    Attributes:
      kind: one of `KINDS`.
      network: "ici", the fast links within a slice or node, or "dcn", the network between them.
      group: devices that take part in each, or slices.
      count: how many run in a step.
      bytes: what a device sends in all of them at least, over that network.
    """

    kind: str
    network: Literal["ici", "dcn"]
    group: int
    count: int
    bytes: float


def collectives(module: Module, num_devices: int, slices: int = 1) -> list[Collective]:
    """The collectives of a step, largest first.

    A device of a group of n that gathers R bytes sends or receives (n - 1) / n R, no matter how the links are used; one
    that reduces R bytes to its share as many, one that reduces all of them twice as many (Chan et al. 2007, "Collective
    communication", section 3). What crosses slices is reduced within each of them first, or gathered there last; what
    all send to all has no such short cut.

    Args:
      module: the compiled program.
      num_devices: that it runs on, numbered slice by slice.
      slices: of them.
    """
    found: dict[tuple[str, str, int], list[float]] = {}
    for kind, size, group, across, times in _issued(module, num_devices, slices):
        within = group // across
        for network, members, sent in (
            ("ici", within, _sent(kind, within, size if kind != "all-to-all" else size / across)),
            ("dcn", across, _sent(kind, across, size if kind == "all-to-all" else size / within)),
        ):
            if members > 1:
                sums = found.setdefault((kind, network, members), [0, 0.0])
                sums[0] += times
                sums[1] += times * sent
    result = [Collective(*key, int(count), sent) for key, (count, sent) in found.items()]
    return sorted(result, key=lambda collective: -collective.bytes)


def _issued(module: Module, num_devices: int, slices: int) -> list[tuple[str, float, int, int, int]]:
    """(kind, bytes of the whole array, group, slices that the group spans, times) of each collective.

    One that is spread over several fusions, so that others run meanwhile, keeps its channel in all of them: of those,
    what runs equally often is one and the same. Outside of fusions each is one, although copies that the compiler has
    made of a loop's turn share a channel, as do the reduce-scatter and the all-gather around what crosses slices.
    """
    fused = {name for line, _, _ in module.running() if line.opcode == "fusion" for name in line.called}
    found: dict[tuple[str, tuple[str, float, int, int]], set[int]] = {}
    for instruction, computation, times in module.running():
        channel = instruction.attribute(r"channel_id=(\d+)") if computation in fused else None
        channel = channel or instruction.name
        if (one := _between_slices(instruction, slices)) is None:
            one = _within(instruction, computation, num_devices, slices)
        if one is not None:
            found.setdefault((channel, one), set()).add(times)
    return [(*one, sum(times)) for (_, one), times in found.items()]


def _between_slices(instruction: Instruction, slices: int) -> tuple[str, float, int, int] | None:
    """A transfer that libtpu hands to the hosts, each with a slice's own share of the array."""
    kind = instruction.attribute(r'_xla_megascale_transfer_type="(\w+)"')
    if instruction.opcode != "send" or kind is None:
        return None
    kind = {"ONE_TO_ONE": "collective-permute"}.get(kind, kind.lower().replace("_", "-"))
    size = sum(instruction.element_bytes()[:-2]) * (slices if kind == "all-gather" else 1)  # then a context, a token
    return kind, size, slices, slices


def _within(
    instruction: Instruction, computation: str, num_devices: int, slices: int
) -> tuple[str, float, int, int] | None:
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    sizes = instruction.element_bytes()
    if instruction.opcode != kind and kind != "all-reduce":  # (what is sent, what is received, perhaps more)
        sizes = sizes[1:2] if len(sizes) % 2 or kind == "collective-permute" else sizes[len(sizes) // 2 :]
    size = sum(sizes)
    per_slice = max(num_devices // slices, 1)
    members = _group(instruction, num_devices, per_slice)
    if kind == "reduce-scatter":
        size *= len(members)
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):  # fused with taking a device's share
        kind = "reduce-scatter"
    across = len({member // per_slice for member in members})
    return kind, size, len(members), across


def _group(instruction: Instruction, num_devices: int, per_slice: int) -> list[int]:
    """Devices of the first group, in whichever of XLA's ways it is written; of pairs one that crosses slices, if any.

    Raises:
      ValueError: in none of them.
    """
    if written := instruction.attribute(r"source_target_pairs=\{(\{[\d,{}]+\})\}"):
        pairs = [_numbers(pair) for pair in re.findall(r"\{([\d,]+)\}", written)]
        return max(pairs, key=lambda pair: pair[0] // per_slice != pair[1] // per_slice)
    if "replica_groups=" not in instruction.rest or "replica_groups={}" in instruction.rest:
        return list(range(num_devices))
    if written := instruction.attribute(r"replica_groups=\{\{([\d,]+)\}"):
        return _numbers(written)
    # Rows of numbers that count up along transposed axes: [groups,members]<=[4,2]T(1,0).
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", instruction.rest):
        numbers = np.arange(int(iota[1]) * int(iota[2])).reshape(_numbers(iota[3]))
        if iota[4]:
            numbers = numbers.transpose(_numbers(iota[4]))
        return numbers.reshape(int(iota[1]), int(iota[2]))[0].tolist()
    # Axes of a mesh: mesh['x'=4,'y'=2] {'y'}.
    if axes := re.search(r"replica_groups=mesh\[([^\]]*)\] \{((?:'\w+',?)+)\}", instruction.rest):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes[1])}
        numbers = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
        chosen = re.findall(r"'(\w+)'", axes[2])
        return numbers[tuple(slice(None) if name in chosen else 0 for name in sizes)].ravel().tolist()
    raise ValueError(f"unknown replica groups: {instruction.rest[:300]}")


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _sent(kind: str, members: int, size: float) -> float:
    if kind == "collective-permute":
        return size
    return size * (members - 1) / members * (2 if kind == "all-reduce" else 1)
