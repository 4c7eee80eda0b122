"""Low-rank adaptation: a frozen model learns through small matrices beside its own (Hu et al. 2022, section 4)."""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import gin
import jax
import jax.numpy as jnp
from flax import nnx

from t5x_domain.errors import UserError
from t5x_domain.kernels.dense import dense
from t5x_domain.models.assemblies import LanguageModel
from t5x_domain.models.config import ModelConfig
from t5x_domain.models.layers import Linear, normal_param
from t5x_domain.models.names import path_name

Tree = Any
LEARNING = "lora_[ab]$"  # the names of what learns


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Lora:
    """Which linear maps are adapted, and how.

    Attributes:
      rank: columns of the low-rank factors.
      alpha: the product of the factors is scaled by alpha / rank.
      targets: regular expressions of the names of linear maps; by default the queries and values of all attention.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: Sequence[str] = ("/query$", "/value$")

    def __post_init__(self) -> None:
        """Raises UserError for a rank or alpha that no adaptation can have."""
        if type(self.rank) is not int or self.rank < 1:
            raise UserError(f"Lora.rank = {self.rank!r}: it must be a whole number, 1 or more.")
        if not self.alpha > 0:
            raise UserError(f"Lora.alpha = {self.alpha!r}: it must be above 0.")

    def model_class(self, base: Callable[..., LanguageModel]) -> Callable[..., LanguageModel]:
        """What builds the adapted model, for a `Blueprint`; its parameters are those of `base` and the factors.

        Building raises UserError if a pattern of `targets` matches no linear map, or the rank exceeds the smaller side
        of one.
        """
        return functools.partial(_adapted, self, base)

    def merge(self, params: Tree) -> Tree:
        """The parameters of the base model that computes what the adapted one does: kernel + alpha / rank * a @ b.

        Args:
          params: nested dict of the adapted model; its layers may be stacked.

        Returns:
          Nested dict with the names and shapes of the base model.
        """
        if not isinstance(params, dict):
            return params
        if "lora_a" not in params:
            return {name: self.merge(child) for name, child in params.items()}
        product = jnp.matmul(params["lora_a"], params["lora_b"], precision=jax.lax.Precision.HIGHEST)
        return {"kernel": params["kernel"] + self.alpha / self.rank * product}


class LoraLinear(nnx.Module):
    """x @ kernel + scale * x @ a @ b. The kernel keeps its name, so that parameters of the base model fit."""

    def __init__(self, base: Linear, lora: Lora, *, rngs: nnx.Rngs) -> None:
        """`base` may hold a stack of layers, [layers, in, out]; then so do the factors."""
        *layers, in_dim, out_dim = base.kernel.shape
        *layer_axes, in_axis, out_axis = base.kernel.logical_axes
        self.kernel = base.kernel
        self.lora_a = normal_param(rngs, (*layers, in_dim, lora.rank), in_dim**-0.5, (*layer_axes, in_axis, None))
        zeros = jnp.zeros((*layers, lora.rank, out_dim), jnp.float32)
        self.lora_b = nnx.Param(zeros, logical_axes=(*layer_axes, None, out_axis))
        self.dtype, self.scale = base.dtype, lora.alpha / lora.rank

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, in] -> [B, T, out]."""
        kernel, a, b = (param[...].astype(self.dtype) for param in (self.kernel, self.lora_a, self.lora_b))
        return dense(x, kernel) + (self.scale * dense(dense(x, a), b)).astype(self.dtype)


def _adapted(lora: Lora, base: Callable[..., LanguageModel], config: ModelConfig, *, rngs: nnx.Rngs) -> LanguageModel:
    model = base(config, rngs=rngs)
    linears = {path_name(path): path for path, module in nnx.iter_modules(model) if isinstance(module, Linear)}
    for pattern in lora.targets:
        if not any(re.search(pattern, name) for name in linears):
            raise UserError(f"Lora.targets: {pattern!r} matches no linear map; there are {', '.join(sorted(linears))}.")
    for name, path in sorted(linears.items()):
        if any(re.search(pattern, name) for pattern in lora.targets):
            parent = functools.reduce(_child, path[:-1], model)
            linear = _child(parent, path[-1])
            if lora.rank > min(linear.kernel.shape[-2:]):
                raise UserError(f"Lora.rank = {lora.rank} exceeds the smaller side of {name}; lower it.")
            _set_child(parent, path[-1], LoraLinear(linear, lora, rngs=rngs))
    return model


def _child(module: Any, key: Any) -> Any:
    return module[key] if isinstance(key, int) else getattr(module, key)


def _set_child(module: Any, key: Any, child: nnx.Module) -> None:
    if isinstance(key, int):
        module[key] = child
    else:
        setattr(module, key, child)
