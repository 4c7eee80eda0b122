"""Learning-rate schedules, from optax. Each is a gin-configured function that returns step -> learning rate."""

import gin
import jax.numpy as jnp
import optax


def _warmup_then(rest: optax.Schedule, peak: float, warmup_steps: int) -> optax.Schedule:
    """Linear from 0 to `peak`, then `rest`, which counts from the end of the warm-up."""
    if warmup_steps == 0:
        return rest
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup_steps), rest], [warmup_steps])


@gin.configurable
def constant(peak: float, warmup_steps: int = 0) -> optax.Schedule:
    """`peak` after a linear warm-up."""
    return _warmup_then(optax.constant_schedule(peak), peak, warmup_steps)


@gin.configurable
def rsqrt(base: float = 1.0, warmup_steps: int = 10_000) -> optax.Schedule:
    """base / sqrt(max(step, warmup_steps)): T5's schedule, flat during warm-up (Raffel et al. 2020, section 3.1.2)."""
    return lambda step: base / jnp.sqrt(jnp.maximum(step, warmup_steps).astype(jnp.float32))


@gin.configurable
def cosine(peak: float, total_steps: int, warmup_steps: int = 0, final: float = 0.0) -> optax.Schedule:
    """Half a cosine from `peak` down to `final` at `total_steps`."""
    decay = optax.cosine_decay_schedule(peak, max(total_steps - warmup_steps, 1), alpha=final / peak)
    return _warmup_then(decay, peak, warmup_steps)


@gin.configurable
def linear(peak: float, total_steps: int, warmup_steps: int = 0, final: float = 0.0) -> optax.Schedule:
    """A straight line from `peak` down to `final` at `total_steps`."""
    return _warmup_then(optax.linear_schedule(peak, final, max(total_steps - warmup_steps, 1)), peak, warmup_steps)


@gin.configurable
def warmup_stable_decay(
    peak: float, total_steps: int, warmup_steps: int = 0, decay_steps: int = 0, final: float = 0.0
) -> optax.Schedule:
    """`peak` until the last `decay_steps`, then a straight line to `final` (Hu et al. 2024, "MiniCPM", section 4)."""
    stable = max(total_steps - warmup_steps - decay_steps, 0)
    tail = optax.join_schedules(
        [optax.constant_schedule(peak), optax.linear_schedule(peak, final, max(decay_steps, 1))], [stable]
    )
    return _warmup_then(tail, peak, warmup_steps)
