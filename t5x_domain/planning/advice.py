"""What to change in a run that does not fit, each change compiled: nothing is advised that was not tried."""

import dataclasses
from collections.abc import Callable, Iterator

from t5x_domain.models.config import ModelConfig
from t5x_domain.planning.plan import Case, Plan

_STRONGER_REMAT = {"none": "minimal", "minimal": "full"}


@dataclasses.dataclass(frozen=True)
class Attempt:
    """A change, on top of those before it.

    Attributes:
      bindings: gin bindings to add.
      why: what it is good for, with its arithmetic.
      plan: what came of it.
    """

    bindings: tuple[str, ...]
    why: str
    plan: Plan


def advise(
    case: Case, plan: Plan, config: ModelConfig, compile_one: Callable[[Case], Plan], most: int
) -> list[Attempt]:
    """Changes that make a train step fit, one on top of the other; the last fits, unless there are no more to try.

    Parameters are spread further before anything is computed again, and that before an update is cut into parts: the
    order in which they cost time.

    Args:
      case: that did not fit.
      plan: of it.
      config: of its model.
      compile_one: gives the plan of a case.
      most: so many compilations at most.
    """
    attempts: list[Attempt] = []
    while not plan.fits and plan.memory is not None and len(attempts) < most:
        change = next(_changes(plan, config), None)
        if change is None:
            break
        bindings, why = change
        case = case.changed(*bindings)
        plan = compile_one(case)
        attempts.append(Attempt(bindings, why, plan))
    return attempts


def _changes(plan: Plan, config: ModelConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    """What can still be changed, the cheapest first."""
    memory, mesh = plan.memory, plan.mesh
    state = 2 * memory.parameters + memory.optimizer
    share = state / memory.limit
    sizes = f"{state / 2**30:.1f} of {memory.limit / 2**30:.1f} GiB are parameters, gradients and optimizer"
    # Half of a device is a state that is worth spreading: the rest is for activations.
    if share > 0.5 and mesh["data"] > 1:
        fsdp = _spread(mesh["fsdp"], mesh["data"], share / 0.5)
        if config.embed_dim % fsdp == 0:
            change = f"MeshShape.data = {mesh['data'] * mesh['fsdp'] // fsdp}", f"MeshShape.fsdp = {fsdp}"
            yield change, f"{sizes}: spread over {fsdp} devices they are {state * mesh['fsdp'] / fsdp / 2**30:.1f} GiB"
    if share <= 1 and plan.remat in _STRONGER_REMAT:
        stronger = _STRONGER_REMAT[plan.remat]
        yield (f"ModelConfig.remat = {stronger!r}",), "the backward pass computes again what is not kept"
    rows = plan.batch_size // (mesh["slice"] * mesh["data"] * mesh["fsdp"] * plan.accumulation_steps)
    if share <= 1 and rows > 1 and rows % 2 == 0:
        parts = 2 * plan.accumulation_steps
        yield (f"Run.accumulation_steps = {parts}",), f"a device then has {rows // 2} rows at a time instead of {rows}"
    if share <= 1 and mesh["fsdp"] > 1 and config.kv_heads % (2 * mesh["tensor"]) == 0 and mesh["fsdp"] % 2 == 0:
        change = f"MeshShape.fsdp = {mesh['fsdp'] // 2}", f"MeshShape.tensor = {2 * mesh['tensor']}"
        yield change, "each matrix product is shared by twice as many devices, and so is what it gives"
    if memory.optimizer > memory.parameters:
        change = "Updates.optimizer = @Adafactor()", "Updates.groups = None"
        yield change, f"its state is next to nothing, not {memory.optimizer / 2**30:.1f} GiB; but it learns otherwise"


def _spread(fsdp: int, data: int, wanted: float) -> int:
    """Devices to spread over: `wanted` times as many, or as near to it as the copies allow."""
    factors = [n for n in range(2, data + 1) if data % n == 0]
    return fsdp * next((n for n in factors if n >= wanted), factors[-1])
