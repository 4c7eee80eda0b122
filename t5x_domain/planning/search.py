"""Meshes and batch sizes tried one by one: those that cannot fit are left out by arithmetic, the others compiled."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

from t5x_domain.errors import UserError
from t5x_domain.models.config import ModelConfig
from t5x_domain.parallel.mesh import MeshShape
from t5x_domain.planning.plan import Case, Plan

# FLOPs of an update over those of a forward pass and a backward pass that is twice as much: "minimal" keeps the matrix
# products, "full" runs the forward pass once more.
_RECOMPUTED = {"none": 1.0, "minimal": 1.0, "full": 4 / 3}


@dataclasses.dataclass(frozen=True)
class Choice:
    """A way to run: as gin bindings, what a run is told to be run so.

    Attributes:
      mesh: devices along each axis.
      batch_size: rows of an update.
      remat: what the backward pass recomputes.
    """

    mesh: MeshShape
    batch_size: int
    remat: str

    def __str__(self) -> str:
        """As a line of a table begins."""
        axes = " ".join(f"{axis}={size}" for axis, size in dataclasses.asdict(self.mesh).items() if size > 1)
        return f"{axes or 'one device'}, {self.batch_size} rows, remat={self.remat}"

    @property
    def bindings(self) -> tuple[str, ...]:
        """Gin bindings."""
        axes = (f"MeshShape.{axis} = {size}" for axis, size in dataclasses.asdict(self.mesh).items())
        return (*axes, f"Run.batch_size = {self.batch_size}", f"ModelConfig.remat = {self.remat!r}")


def meshes(
    num_devices: int, slices: int, config: ModelConfig, sequence: int = 1, longest_tensor: int = 16
) -> Iterator[MeshShape]:
    """Meshes that share everything evenly: copies, shares of parameters, and shares of heads and feed-forward width.

    The fewest shares of matrix products first, then the fewest shares of parameters: what is sent grows with both.

    Args:
      num_devices: in all.
      slices: copies of the parameters over the slow network.
      config: whose heads and widths are to divide.
      sequence: shares of a row's tokens.
      longest_tensor: shares of a matrix product at most; more would leave a device too small a part.

    Raises:
      UserError: a slice's devices cannot share rows' tokens so.
    """
    if sequence < 1 or num_devices // slices % sequence:
        raise UserError(
            f"MeshShape.sequence = {sequence}: --search keeps it; set a positive one that divides the "
            f"{num_devices // slices:,} devices of a slice."
        )
    inner = num_devices // slices // sequence
    divided = (config.num_heads, config.kv_heads, config.mlp_dim, config.vocab_size)
    for tensor in _divisors(min(inner, longest_tensor)):
        if inner % tensor or any(size % tensor for size in divided):
            continue
        for fsdp in _divisors(inner // tensor):
            if config.embed_dim % fsdp == 0:
                yield MeshShape(slices, inner // tensor // fsdp, fsdp, sequence, tensor)


def search(
    case: Case,
    choices: Sequence[Choice],
    compile_one: Callable[[Case], Plan],
    needs: Callable[[MeshShape], float],
    limit: float,
    *,
    most: int,
    tell: Callable[[str], None],
) -> list[tuple[Choice, Plan]]:
    """Plans of the choices that fit, the fastest by arithmetic first, see `_rank`.

    What has no room for its state is not compiled, nor is a mesh with more rows than it had no room for.

    Args:
      case: what is compiled, but for the choice.
      choices: in the order in which they are tried, see `meshes`.
      compile_one: gives the plan of a case.
      needs: bytes of a device on a mesh without activations, see `memory.least`.
      limit: bytes of a device; infinite if that is not known.
      most: so many compilations at most.
      tell: is told how it goes, a line at a time.

    Raises:
      UserError: nothing fits.
    """
    found: list[tuple[Choice, Plan]] = []
    too_large: dict[tuple[MeshShape, str], int] = {}
    compiled = 0
    for choice in choices:
        key = choice.mesh, choice.remat
        if choice.batch_size >= too_large.get(key, math.inf):
            continue
        if (least := needs(choice.mesh)) > limit:
            tell(f"{choice}: no room for {least / 2**30:.1f} GiB of parameters, gradients and optimizer")
            too_large[key] = 0
            continue
        if compiled == most:
            tell(f"--search_limit={most} is reached; the rest is not compiled")
            break
        compiled += 1
        try:
            plan = compile_one(case.changed(*choice.bindings))
        except UserError as error:
            tell(f"{choice}: {error}")
            continue
        if plan.memory is None:
            tell(f"{choice}: does not compile: {plan.problem}")
            continue
        tell(f"{choice}: {'fits' if plan.fits else 'does not fit'} ({plan.compile_seconds:.0f} s to compile)")
        if plan.fits:
            found.append((choice, plan))
        else:
            too_large[key] = choice.batch_size
    if not found:
        raise UserError("--search: nothing fits; take more devices, smaller --batch_sizes or --remats=full.")
    return sorted(found, key=lambda pair: _rank(pair[1]))


def _rank(plan: Plan) -> tuple[float, float, float]:
    """What is less is better: seconds a token by the largest bound, by all bounds, and bytes of a device.

    What the backward pass computes again counts here, and a thousandth of a bound does not.
    """
    if plan.bounds is None:
        return 0.0, 0.0, plan.memory.peak
    compute = plan.bounds.compute * _RECOMPUTED[plan.remat]
    others = (plan.bounds.memory, plan.bounds.links, plan.bounds.network)
    largest, together = max(compute, *others) / plan.tokens, (compute + sum(others)) / plan.tokens
    return round(math.log(largest), 3), together, plan.memory.peak


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
