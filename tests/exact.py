"""Loss and gradient of one step in float64, and how closely two computations of them have to agree."""

import jax
import numpy as np
import optax

from t5x_domain.training.step import make_train_step

# Both sides compute the same sums in another order, in float64. A sum of n terms is off by at most n u relative to
# the sum of magnitudes (u = 2^-53), and its relative error is carried to what depends on it. The longest sum here has
# n = 512 terms (the vocabulary; the batch has 16 x 24 targets at most), and a gradient depends on a chain of at most
# 64 products: 4 blocks of at most 8, forward and backward. Anything wrong, say a row counted twice, is off by 1/384.
EXACT = 64 * 512 * 2.0**-53

MESHES = {
    "data": {"slice": 2, "data": 4},
    "fsdp": {"data": 1, "fsdp": 8},
    "tensor_fsdp": {"data": 1, "tensor": 2, "fsdp": 4},
    "sequence": {"data": 2, "sequence": 2, "tensor": 2},
    "ring": {"data": 2, "sequence": 4},
}


def loss_and_gradients(plan, loss, params, rows, accumulation_steps=1):
    """The gradient that a step uses, seen through an optimizer that subtracts it, and the loss."""
    transform = optax.sgd(1.0)
    before = jax.tree.map(np.asarray, params)
    state = plan.init_state(params, transform)
    step = make_train_step(plan, loss, transform, seed=0, accumulation_steps=accumulation_steps)
    state, metrics = step(state, rows)
    gradients = jax.tree.map(lambda old, new: old - np.asarray(new), before, state.params)
    return float(metrics["loss"]), gradients


def assert_exact(got, wanted):
    assert abs(got[0] - wanted[0]) <= EXACT * abs(wanted[0])
    for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(wanted[1]), strict=True):
        assert b.dtype == np.float64
        # old - (old - gradient) rounds at the size of the parameter, which is at most about 4 for N(0, 1).
        assert np.abs(a - b).max() <= EXACT * np.abs(b).max() + 8 * 2.0**-53 * 4
