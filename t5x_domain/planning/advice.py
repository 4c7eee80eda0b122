"""What to change in a run that does not fit, each change compiled: nothing is advised that was not tried."""

import dataclasses
from collections.abc import Callable, Iterator

from t5x_domain.planning.elsewhere import CompilerFailure
from t5x_domain.planning.plan import Case, Plan
from t5x_domain.planning.program import PlannedRun

_STRONGER_REMAT = {"none": "minimal", "minimal": "full"}
_LANES = 128  # a device's part of a row is a multiple of so many tokens, or TPUs compute the row whole


@dataclasses.dataclass(frozen=True)
class Attempt:
    """A change, on top of those before it.

    Attributes:
      bindings: gin bindings to add.
      why: what it is good for, with its arithmetic.
      plan: what came of it; without memory, and its `problem` says why, if the compiler crashed or took too long.
    """

    bindings: tuple[str, ...]
    why: str
    plan: Plan


def advise(case: Case, plan: Plan, run: PlannedRun, compile_one: Callable[[Case], Plan], most: int) -> list[Attempt]:
    """Changes that make a train step fit, one on top of the other; the last fits, unless there are no more to try.

    Parameters are spread further before anything is computed again, and that before an update is cut into parts: the
    order in which they cost time.

    Args:
      case: that did not fit.
      plan: of it.
      run: whose it is.
      compile_one: gives the plan of a case.
      most: so many compilations at most.
    """
    attempts: list[Attempt] = []
    while not plan.fits and plan.memory is not None and len(attempts) < most:
        change = next(_changes(plan, run), None)
        if change is None:
            break
        bindings, why = change
        case = case.changed(*bindings)
        try:
            plan = compile_one(case)
        except CompilerFailure as error:
            plan = dataclasses.replace(plan, memory=None, collectives=(), bounds=None, problem=str(error))
        attempts.append(Attempt(bindings, why, plan))
    return attempts


def _changes(plan: Plan, run: PlannedRun) -> Iterator[tuple[tuple[str, ...], str]]:
    """What can still be changed, the cheapest first."""
    memory, mesh, config = plan.memory, plan.mesh, run.config
    state = 2 * memory.parameters + memory.optimizer
    share = state / memory.limit
    sizes = f"{state / 2**30:.1f} of {memory.limit / 2**30:.1f} GiB are parameters, gradients and optimizer"
    # Half of a device is a state that is worth spreading: the rest is for activations.
    if share > 0.5 and mesh["data"] > 1:
        fsdp = _spread(mesh["fsdp"], mesh["data"], share / 0.5, config.embed_dim)
        if fsdp > mesh["fsdp"]:
            change = f"MeshShape.data = {mesh['data'] * mesh['fsdp'] // fsdp}", f"MeshShape.fsdp = {fsdp}"
            yield change, f"{sizes}: spread over {fsdp} devices they are {state * mesh['fsdp'] / fsdp / 2**30:.1f} GiB"
    if share <= 1 and plan.remat in _STRONGER_REMAT:
        stronger = _STRONGER_REMAT[plan.remat]
        yield (f"ModelConfig.remat = {stronger!r}",), "the backward pass computes again what is not kept"
    rows = plan.batch_size // (mesh["slice"] * mesh["data"] * mesh["fsdp"] * plan.accumulation_steps)
    if share <= 1 and rows > 1 and rows % 2 == 0:
        parts = 2 * plan.accumulation_steps
        yield (f"Run.accumulation_steps = {parts}",), f"a device then has {rows // 2} rows at a time instead of {rows}"
    batch_axis = next((axis for axis in ("data", "fsdp") if mesh[axis] % 2 == 0), None)
    parts = 2 * mesh["sequence"]
    if share <= 1 and rows == 1 and batch_axis and all(n % (parts * _LANES) == 0 for n in run.lengths.values()):
        change = (
            f"MeshShape.{batch_axis} = {mesh[batch_axis] // 2}", f"MeshShape.sequence = {parts}",
            f"Run.accumulation_steps = {2 * plan.accumulation_steps}",
        )  # fmt: skip
        yield change, f"a device then has 1/{parts} of a row at a time"
    if memory.optimizer > memory.parameters:
        change = "Updates.optimizer = @Adafactor()", "Updates.groups = None"
        yield change, f"its state is next to nothing, not {memory.optimizer / 2**30:.1f} GiB; but it learns otherwise"


def _spread(fsdp: int, data: int, wanted: float, width: int) -> int:
    """Devices to spread over: `wanted` times as many, or as near to it as the copies and the width allow."""
    factors = [n for n in range(1, data + 1) if data % n == 0 and width % (fsdp * n) == 0] or [1]
    return fsdp * next((n for n in factors if n >= wanted), factors[-1])
