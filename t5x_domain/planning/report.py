"""A plan as a table to read, and as JSON."""

import dataclasses
import math
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from t5x_domain.planning.advice import Attempt
from t5x_domain.planning.bounds import cost
from t5x_domain.planning.plan import Plan
from t5x_domain.planning.search import Choice

_KINDS = {
    "parameters": "parameters",
    "optimizer": "optimizer",
    "batch": "batch",
    "activations": "activations kept for the backward pass",
    "temporaries": "other temporaries (gradients, gathered parameters, …)",
    "other": "results, padding, program",
}
_BOUNDS = {
    "compute": "FLOPs at the chips' peak",
    "memory": "bytes of main memory",
    "links": "bytes over ICI or NVLink",
    "network": "bytes between slices or nodes",
}


def lines(plan: Plan, price: float | None = None) -> Iterator[str]:
    """What a reader is told.

    Args:
      plan: of one program.
      price: of a chip for an hour; None for no cost.
    """
    mesh = " ".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    yield f"{plan.program} step on {plan.topology}: {plan.num_chips:,} chips, {plan.num_devices:,} devices, {mesh}"
    parts = f", in {plan.accumulation_steps} parts" if plan.accumulation_steps > 1 else ""
    yield (
        f"{plan.num_parameters:,} parameters, {plan.batch_size:,} rows{parts}, {plan.tokens:,} tokens, "
        f"remat={plan.remat}, {plan.flops:.3g} FLOPs a step"
    )
    yield f"compiled in {plan.compile_seconds:.0f} s with {_gib(plan.compiler_bytes)}"
    yield ""
    if plan.memory is None:
        yield f"does not compile: {plan.problem}"
        return
    yield from _memory_lines(plan)
    if plan.collectives:
        yield ""
        yield f"{'collectives of a step':28}{'network':>8}{'group':>7}{'count':>8}{'bytes a device sends':>22}"
        for one in plan.collectives:
            yield f"  {one.kind:26}{one.network:>8}{one.group:>7}{one.count:>8}{_gib(one.bytes):>22}"
    if plan.bounds is not None:
        yield ""
        yield from _bound_lines(plan, price)


def _memory_lines(plan: Plan) -> Iterator[str]:
    memory = plan.memory
    yield f"{'memory of a device':58}{'GiB':>8}"
    for kind, title in _KINDS.items():
        if (size := getattr(memory, kind)) is not None:
            yield f"  {title:56}{size / 2**30:8.2f}"
    limit = "" if memory.limit is None else f" of {memory.limit / 2**30:.2f}"
    yield f"  {'all':56}{memory.peak / 2**30:8.2f}{limit}"
    if not plan.fits:
        over = "" if memory.limit is None else f" by {_gib(memory.peak - memory.limit)}"
        yield f"does not fit{over}"


def _bound_lines(plan: Plan, price: float | None) -> Iterator[str]:
    yield "a step takes at least (arithmetic, no measurement)"
    for kind, title in _BOUNDS.items():
        seconds = getattr(plan.bounds, kind)
        yield f"  {title:56}{seconds:10.4f} s{'  <- the bound' if kind == plan.bounds.largest else ''}"
    yield f"at most {plan.tokens_per_second:,.0f} tokens a second"
    if price is not None:
        step = cost(plan.bounds.step, plan.num_chips, price)
        yield f"at least {step:.4f} a step, {step / plan.tokens * 1e9:,.2f} for 10^9 tokens, at {price:g} a chip-hour"


def advice_lines(plan: Plan, attempts: Sequence[Attempt]) -> Iterator[str]:
    """What was changed until a plan fitted, and what to give to run it so."""
    yield ""
    for number, attempt in enumerate(attempts):
        tried = attempt.plan
        came = tried.problem if tried.memory is None else f"{_gib(tried.memory.peak)} a device"
        yield f"{'then' if number else 'tried'} {_flags(attempt.bindings)}: {came}{', fits' if tried.fits else ''}"
        yield f"  {attempt.why}"
    last = attempts[-1].plan if attempts else plan
    if last.fits:
        yield "it fits with " + " ".join(_flags(attempt.bindings) for attempt in attempts)
    elif last.memory is not None:
        state = (2 * last.memory.parameters + last.memory.optimizer) * last.mesh["fsdp"] * last.mesh["tensor"]
        least = math.ceil(state / last.memory.limit)
        yield (
            f"it does not fit; parameters, gradients and optimizer are {_gib(state)} in all, which takes {least:,} "
            "devices of this kind at least, and more with activations"
        )


def search_lines(ranked: Sequence[tuple[Choice, Plan]], price: float | None = None) -> Iterator[str]:
    """A table of what fits, the best first."""
    yield f"{'':44}{'GiB':>8}{'bound (s)':>11}{'by':>9}{'tokens/s':>14}" + (f"{'per 10^9':>12}" if price else "")
    for choice, plan in ranked:
        line = f"{choice!s:44}{plan.memory.peak / 2**30:8.2f}"
        if plan.bounds is not None:
            line += f"{plan.bounds.step:11.4f}{plan.bounds.largest:>9}{plan.tokens_per_second:14,.0f}"
            if price is not None:
                line += f"{cost(plan.bounds.step, plan.num_chips, price) / plan.tokens * 1e9:12,.2f}"
        yield line
    yield "the first: " + _flags(ranked[0][0].bindings)


def as_json(plan: Plan) -> dict[str, Any]:
    """All that is known of a plan."""
    derived = {"fits": plan.fits, "tokens_per_second": plan.tokens_per_second}
    return {**dataclasses.asdict(plan), **derived}


def _flags(bindings: Sequence[str]) -> str:
    """Gin bindings as flags of a command line."""
    pairs = (binding.split(" = ", 1) for binding in bindings)
    return " ".join(f"--gin.{name}={_quoted(value)}" for name, value in pairs)


def _quoted(value: str) -> str:
    """As a shell reads it; a gin string reads best in double quotes."""
    return f'"{value}"' if "'" in value and not set(value) & set('"$`\\!') else shlex.quote(value)


def _gib(size: float) -> str:
    return f"{size / 2**30:,.3f} GiB" if size < 2**30 else f"{size / 2**30:,.2f} GiB"
