"""T5X's state of Adafactor (`t5x/adafactor.py`), brought into the form that optax keeps for our parameters.

Both keep the mean of the squared gradients over one axis, or over the other, or all of them. Which axes T5X takes the
means over depends on the array: for matrices the two sizes decide, as in optax; arrays with more axes go by the names
of their axes, so that `v_row` keeps the width of the model and `v_col` heads, their width, or the feed-forward layer's.
An axis of layers is kept by both.
"""

from collections.abc import Mapping

import numpy as np

from t5x_domain.conversion.checkpoint import SecondMoments
from t5x_domain.conversion.t5x_names import LAYERS, Source
from t5x_domain.conversion.tensors import LastRead, Tensor
from t5x_domain.errors import UserError

Means = tuple[np.ndarray, np.ndarray]

SKIP = "convert without the state of the optimizer (--skip_optimizer)"
_SLOTS = ("v_row", "v_col", "v", "m")
_SMALLEST_FACTORED = 128  # min_dim_size_to_factor of T5X and optax, unless they are told otherwise
_UNUSED = (1,)  # shape of a slot that a parameter does not need
_INTO_THE_WIDTH = ("out/kernel", "wo/kernel")  # of the kernels, those whose last axis is the width of the model


def read_second_moments(
    slots: Mapping[str, Tensor], step: int, sources: Mapping[str, Source], origin: str
) -> SecondMoments:
    """The state of Adafactor for our parameters.

    Args:
      slots: T5X's arrays by the name of the parameter and of the slot, `encoder/encoder_norm/scale/v`.
      step: updates done so far.
      sources: where T5X keeps our parameters.
      origin: the checkpoint, for messages.

    Raises:
      UserError: another optimizer's state, a momentum, or slots that do not fit their parameter.
    """
    wanted = {f"{source.path}/{slot}" for source in sources.values() for slot in _SLOTS}
    strange = sorted(slots.keys() ^ wanted)
    if strange:
        raise UserError(f"{origin}: not the state of Adafactor for these parameters, see {strange[0]}; {SKIP}.")
    ours = {}
    for name, source in sources.items():
        own = {slot: slots[f"{source.path}/{slot}"] for slot in _SLOTS}
        if own["m"].shape != _UNUSED:
            raise UserError(
                f"{origin}: Adafactor ran with momentum (beta1), which has no place here, see {source.path}/m; {SKIP}."
            )
        ours[name] = _for_optax(_moments(name, source, own, origin))
    return SecondMoments(step, ours)


def _moments(name: str, source: Source, slots: Mapping[str, Tensor], origin: str) -> np.ndarray | Means:
    """All second moments in the shape of our parameter, or their means that belong to its first and second axis."""
    if slots["v"].shape == source.shape:
        return source.part(slots["v"], LastRead()).read().astype(np.float32)
    by_size = len(source.shape) == 2
    row = source.axes[np.argsort(source.shape)[0]] if by_size else int(name.endswith(_INTO_THE_WIDTH))
    means: dict[int, np.ndarray] = {}
    for slot, axis in (("v_row", row), ("v_col", 1 - row)):
        kept = [i for i, ours in enumerate(source.axes) if ours in (LAYERS, axis)]
        tensor = slots[slot]
        if tensor.shape != tuple(source.shape[i] for i in kept):
            raise UserError(
                f"{origin}: {source.path}/{slot} {tensor.shape} is no mean of {source.shape} as T5X's rules of "
                f"factorisation make it; {SKIP}."
            )
        if LAYERS in source.axes:
            tensor = tensor.at(kept.index(source.axes.index(LAYERS)), source.layer)
        means[axis] = tensor.read().reshape(-1).astype(np.float32)
    return means[0], means[1]


def _for_optax(moments: np.ndarray | Means) -> dict[str, np.ndarray]:
    """Slots as `optax.scale_by_factored_rms` keeps them.

    Where it keeps all second moments but T5X only the means, their product stands in for them, as in every update that
    factored Adafactor makes (Shazeer & Stern 2018, section 3).
    """
    factored = isinstance(moments, tuple)
    shape = tuple(mean.size for mean in moments) if factored else moments.shape
    if len(shape) < 2 or min(shape) < _SMALLEST_FACTORED:
        return {"v": np.outer(*moments) / moments[0].mean() if factored else moments}
    means = moments if factored else (moments.mean(axis=1), moments.mean(axis=0))
    smaller, larger = np.argsort(shape)
    return {"v_row": means[smaller], "v_col": means[larger]}
